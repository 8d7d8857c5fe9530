"""The network of a run as a plain file of weights, for torchvision or timm.

    python export.py runs/simsiam-food-11-... backbone.pth
    python export.py runs/linear-food-11-.../linear.pt classifier.pth

Writes tensors alone, under torchvision's names, and beside them a .json file of
how the network is shaped and fed. The classifier of a linear.py run goes along
if it reads layer4, as torchvision's does. Prints the lines that load the file.
"""

import json
from pathlib import Path

import torch

import common


def parse_args(argv):
    parser = common.Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", type=common.path,
        help="a run folder (its linear.pt, else its last.pt) or one of its .pt files")
    add("out", metavar="OUT", type=common.path,
        help="file to write, ending in .pth; the description gets the ending .json")
    add("--backbone-only", action="store_true", help="leave the classifier out")
    add("--force", action="store_true", help="overwrite files that are there")
    args = parser.parse_args(argv)
    args.out = Path(args.out)
    if args.out.suffix != ".pth":
        parser.error(f"{args.out}: must end in .pth")
    for path in (args.out, args.out.with_suffix(".json")):
        if path.exists() and not args.force:
            parser.error(f"{path}: exists; name another file, or --force to overwrite it")
    return args


def weights(checkpoint, backbone_only=False):
    """The state dict of a checkpoint's network under torchvision's names, and whether a classifier is in it.

    returns  ({name: contiguous tensor that owns its storage}, bool). The classifier of linear.py comes along as
             fc.weight (classes, C) and fc.bias (classes,) if it reads layer4 and backbone_only does not forbid it.
    """
    state = dict(checkpoint["backbone"])
    classified = "classifier" in checkpoint and checkpoint["layer"] == "layer4" and not backbone_only
    if classified:
        state |= {f"fc.{name}": value for name, value in checkpoint["classifier"].items()}
    # torch.save writes the whole storage of a view, so every tensor is copied out of what it may be a part of.
    return {name: value.clone(memory_format=torch.contiguous_format) for name, value in state.items()}, classified


def description(checkpoint, classified):
    """What the weights do not say: how to build the network and what to feed it; plain values."""
    names = ("method", "stem", "width", "image_size", "mean", "std", "classes")
    return {name: checkpoint[name] for name in names} | ({"layer": checkpoint["layer"]} if classified else {})


def loading_lines(path, checkpoint, classified):
    """Python that builds the network and loads the file: torchvision's where its shape allows, else ours."""
    classes, stem, width = len(checkpoint["classes"]), checkpoint["stem"], checkpoint["width"]
    load = [f"net.load_state_dict(torch.load({str(path)!r}))", "net.eval()"]
    if width != 64:
        head = f"num_classes={classes}, " if classified else ""
        return ["import torch", "from common import ResNet18",
                f'net = ResNet18({head}stem="{stem}", width={width})', *load]
    lines = ["import torch, torchvision",
             f"net = torchvision.models.resnet18({f'num_classes={classes}' if classified else ''})"]
    if stem == "cifar":
        lines += ["net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)", "net.maxpool = torch.nn.Identity()"]
    if not classified:
        lines.append("net.fc = torch.nn.Identity()")
    return lines + load


@common.command
def main(argv=None):
    args = parse_args(argv)
    inside = Path(args.run) / "linear.pt"
    file = inside if inside.exists() else common.checkpoint_path(args.run)
    checkpoint = common.load_checkpoint(file)
    if args.out.exists() and args.out.samefile(file):
        raise common.UsageError(f"{args.out}: is the checkpoint itself; name another file")
    state, classified = weights(checkpoint, args.backbone_only)
    about, beside = json.dumps(description(checkpoint, classified), indent=1), args.out.with_suffix(".json")
    for path, content in ((args.out, state), (beside, f"{about}\n".encode())):
        try:
            common.write_atomically(path, content)
        except (OSError, RuntimeError) as error:
            reason = getattr(error, "strerror", None) or str(error).splitlines()[0]
            raise common.UsageError(f"{path}: cannot be written: {reason}") from None

    print(f"read    {file}: {checkpoint['method']}, stem {checkpoint['stem']}, width {checkpoint['width']}")
    if "classifier" in checkpoint and not classified and not args.backbone_only:
        print(f"note    its classifier reads {checkpoint['layer']}, where ResNet-18 has none: left out")
    if checkpoint["width"] != 64:
        print(f"note    torchvision has no ResNet-18 of width {checkpoint['width']}; common.ResNet18 loads it")
    print(f"wrote   {args.out}: {len(state)} tensors{', with classifier' if classified else ''}\n"
          f"wrote   {beside}: how it is shaped and what to feed it\n")
    print("\n".join(loading_lines(args.out, checkpoint, classified)))
    if checkpoint["width"] == 64:
        head = len(checkpoint["classes"]) if classified else 0
        print("\n# With timm the first two lines are\n# import torch, timm\n"
              f'# net = timm.create_model("resnet18", num_classes={head})')
        print("\n# As a Sequential without classifier, once net is loaded: (N, 512, 1, 1)\n"
              "# encoder = torch.nn.Sequential(*list(net.children())[:-1])")


if __name__ == "__main__":
    main()
