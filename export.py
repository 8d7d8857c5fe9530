"""The network of a run as a plain file of weights, for torchvision or timm.

    python export.py runs/simsiam-food-11-... backbone.pth
    python export.py runs/linear-cached-food-11-.../linear.pt classifier.pth

Writes tensors alone, under torchvision's names, and beside them a .json file of
how the network is shaped and fed. The classifier of a linear.py run goes along
if it reads layer4, as torchvision's does. Prints the lines that load the file.
"""

import harness  # isort: skip  # before torch: how threads wait, where memory comes from
import json
from pathlib import Path

import torch

import common
import knn
from harness.checkpoint import file_of, save, shapes
from harness.parser import Parser, path


def parse_args(argv):
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("run", metavar="RUN", type=path, help="a run folder (its linear.pt, else last.pt) or a .pt file of it")
    add("out", metavar="OUT", type=path, help="file to write, ending in .pth; its description ends in .json")
    add("--backbone-only", action="store_true", help="leave the classifier out")
    add("--force", action="store_true", help="overwrite files that are there")
    args = parser.parse_args(argv)
    args.out = Path(args.out)
    if args.out.suffix != ".pth":
        parser.error(f"{args.out}: must end in .pth")
    for file in (args.out, args.out.with_suffix(".json")):
        if file.exists() and not args.force:
            parser.error(f"{file}: exists; name another file, or --force to overwrite it")
    return args


def loading_lines(path, checkpoint, classified):
    """Python that builds the network and loads the file: torchvision's where its shape allows, else ours."""
    classes = len(checkpoint["classes"]) if classified else 0
    head = f"num_classes={classes}" if classified else ""
    load = [f"net.load_state_dict(torch.load({str(path)!r}))", "net.eval()"]
    if checkpoint["width"] != 64:
        shape = f'num_classes={classes}, stem="{checkpoint["stem"]}", width={checkpoint["width"]}'
        return ["import torch", "from common import ResNet18", f"net = ResNet18({shape})", *load]
    lines = ["import torch, torchvision", f"net = torchvision.models.resnet18({head})"]
    if checkpoint["stem"] == "cifar":
        lines += ["net.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False)", "net.maxpool = torch.nn.Identity()"]
    if not classified:
        lines.append("net.fc = torch.nn.Identity()")
    return [*lines, *load, "", "# With timm the first two lines are", "# import torch, timm",
            f'# net = timm.create_model("resnet18", num_classes={classes})', "",
            "# As a Sequential without classifier: (N, 512, 1, 1), with timm (N, 512)",
            "# encoder = torch.nn.Sequential(*list(net.children())[:-1])"]


@harness.command
def main(argv=None):
    args = parse_args(argv)
    file = file_of(args.run, "linear.pt")
    checkpoint = harness.load_checkpoint(file)
    stem, width, beside = checkpoint["stem"], checkpoint["width"], args.out.with_suffix(".json")
    if shapes(checkpoint["backbone"]) != shapes(common.ResNet18(stem=stem, width=width).state_dict()):
        raise common.UsageError(f"{file}: its backbone is not a ResNet-18 of this project; export writes those only")
    if args.out.exists() and args.out.samefile(file):
        raise common.UsageError(f"{args.out}: is the checkpoint itself; name another file")
    classified = "classifier" in checkpoint and checkpoint["layer"] == "layer4" and not args.backbone_only
    head = checkpoint["classifier"] if classified else {}
    # torch.save writes the whole storage of a view, so every tensor is copied out of what it may be a part of.
    state = {name: tensor.clone(memory_format=torch.contiguous_format)
             for name, tensor in (checkpoint["backbone"] | {f"fc.{n}": t for n, t in head.items()}).items()}
    names = ["method", "stem", "width", "image_size", "mean", "std", "classes"] + ["layer"] * classified
    about = {name: checkpoint[name] for name in names}
    about["crop_fraction"] = knn.evaluated_share(checkpoint["image_size"])  # of the shorter side, in evaluations
    save(args.out, state)
    save(beside, (json.dumps(about, indent=1) + "\n").encode())

    print(f"read    {file}: {checkpoint['method']}, stem {stem}, width {width}")
    if "classifier" in checkpoint and not classified and not args.backbone_only:
        print(f"note    its classifier reads {checkpoint['layer']}, where ResNet-18 has none: left out")
    if width != 64:
        print(f"note    torchvision has no ResNet-18 of width {width}; common.ResNet18 loads it")
    print(f"wrote   {args.out}: {len(state)} tensors{', with classifier' if classified else ''}\n"
          f"wrote   {beside}: how it is shaped and what to feed it\n")
    print("\n".join(loading_lines(args.out, checkpoint, classified)))


if __name__ == "__main__":
    main()
