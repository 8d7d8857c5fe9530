"""A trained backbone: out of a run, out of anyone's ResNet-18 file, or out of the program that built it."""

import argparse
import importlib.util
import os
import re
import sys
import textwrap
from pathlib import Path

import torch

from common import ResNet18, UsageError, pick_precision, printable
from harness import checkpoint
from harness.distributed import is_main
from harness.log import wrapped

OWN = {name: Path(__file__).parents[1] / f"{name}.py" for name in ("simsiam", "moco", "simclr", "rotnet")}
PARTS = ("conv1", "bn1", "layer1", "layer2", "layer3", "layer4")


def named_tensors(value, name=""):
    """Yields (dotted name, tensor) for all tensors in nested dictionaries, in their order."""
    if torch.is_tensor(value):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from named_tensors(inner, f"{name}.{key}" if name else str(key))


def load_weights(path):
    """The first ResNet-18 in a file, whoever wrote it.

    path     a file whose tensors bear torchvision's names, or the numbers that Sequential(*list(net.children())[:-1])
             gives; with anything before them, and with anything else in the file. Or a run of ours.
    returns  {"backbone", "stem", "width"} as in a checkpoint, and "note": a line about what was found and left out.
    raises   UsageError where it is missing, damaged, or has no ResNet-18.
    """
    file, content = checkpoint.read_tensors(path)
    tensors = dict(named_tensors(content["backbone"] if checkpoint.is_ours(content) else content))
    # What stands before the name of the first block stands before all names of the network.
    blocks = (re.fullmatch(r"((?:.+\.)?)(layer1|\d+)\.0\.conv1\.weight", name) for name in tensors)
    prefix, layer1 = next((block.groups() for block in blocks if block), (None, None))
    if prefix is None:
        raise UsageError(f"{file}: no ResNet-18 in it: no tensor is called layer1.0.conv1.weight, as in torchvision, "
                         "or 4.0.conv1.weight, as in a Sequential of its children")
    found, left = _under_our_names(tensors, prefix, numbered=layer1 != "layer1")
    kernel = tuple(found["conv1.weight"].shape) if "conv1.weight" in found else ()
    stem = {(3, 7, 7): "imagenet", (3, 3, 3): "cifar"}.get(kernel[1:])
    if stem is None:
        raise UsageError(f"{file}: conv1.weight is {kernel or 'missing'}; ResNet-18 has (64, 3, 7, 7), for small "
                         "pictures (64, 3, 3, 3)")
    net = ResNet18(stem=stem, width=kernel[0])
    try:
        net.load_state_dict(found)  # counters of BatchNorm, which old files lack, may be missing
    except RuntimeError as error:
        fault = textwrap.shorten(str(error).partition("\n")[2], 200, placeholder=" ...")
        raise UsageError(f"{file}: no ResNet-18 of width {kernel[0]}: {fault}") from None
    note = f"{file}: ResNet-18, stem {stem}, width {kernel[0]}" + (f", from {prefix}*" if prefix else "")
    note += f"; left out: {', '.join(left[:3] + ['...'] * (len(left) > 3))}" if left else ""
    return {"backbone": net.state_dict(), "stem": stem, "width": kernel[0],
            "note": wrapped(printable(f"weights {note}"))}


def _under_our_names(tensors, prefix, numbered):
    """{name in ResNet18: tensor} of what stands behind prefix, and the other names."""
    split = {name: name.removeprefix(prefix).partition(".")[::2] for name in tensors if name.startswith(prefix)}
    numbers = sorted({part for part, _ in split.values() if part.isdecimal()}, key=int)  # of children with weights
    part_of = dict(zip(numbers if numbered else PARTS, PARTS, strict=False))
    ours = {name: f"{part_of[part]}.{rest}" for name, (part, rest) in split.items() if part in part_of}
    return {ours[name]: tensors[name] for name in ours}, [name for name in tensors if name not in ours]


def initialised(backbone, args):
    """The same backbone, a ResNet18; with --init it has those weights now. A resumed run has left them behind."""
    if getattr(args, "init", None) and not args.resume:
        weights = load_weights(args.init)
        backbone.load_state_dict(weights["backbone"])
        if is_main() and not args.quiet:
            print(weights["note"])
    return backbone


def load_pretrained(args):
    """The checkpoint that --checkpoint names; without it one of the same form, with the weights of --weights if given.

    There None stands for what no run tells: the data say it (see flags.SHAPES).
    """
    if args.checkpoint:  # of a linear.py run the epoch that validation chose
        return checkpoint.load(checkpoint.file_of(args.checkpoint, "linear.pt"))
    saved = dict(data="toy", data_root=os.path.abspath("data"), cache=None, skip_unreadable=False, knn_split="val")
    unknown = dict.fromkeys(("method", "image_size", "stem", "width", "mean", "std", "note"))
    return {**unknown, "args": saved, **(load_weights(args.weights) if args.weights else {})}


def take_shape(args, pretrained, origin):
    """Give image size, stem and width their values from what a checkpoint or a file of weights says about them.

    origin   the flag that named it.  raises  UsageError where another value was given.
    """
    for name in ("image_size", "stem", "width"):
        given, has = getattr(args, name), pretrained.get(name)
        if given is not None and has not in (None, given):
            raise UsageError(f"--{name.replace('_', '-')} {given}: the network of {origin} has {has}; leave it out")
        setattr(args, name, given or has)


def load_backbone(saved, device="cpu", program=None):
    """The trained backbone of a checkpoint, in eval mode, without a classifier.

    saved    of checkpoint.load().
    program  a file whose build_model(args) builds the model; needed where the backbone is no ResNet18.
    raises   UsageError where the weights do not fit.
    """
    backbone = build_model(saved, program).backbone if program else ResNet18(stem=saved["stem"], width=saved["width"])
    try:
        backbone.load_state_dict(saved["backbone"])
    except RuntimeError:
        is_not = (f"not the one that {program} builds" if program else
                  "no ResNet18; name the program that trained it: --program FILE.py")
        raise UsageError(f"the backbone of this {saved['method']} run is {is_not}") from None
    return backbone.to(device, memory_format=torch.channels_last).eval()


def build_model(saved, program):
    """What build_model(args) of a program gives for the flags of a checkpoint, weights not loaded.

    program  a file that the user named, never one that a checkpoint names: importing it runs its code.
    raises   UsageError where it has no build_model.
    """
    name = f"program_{Path(program).stem}"  # of its own: a module of that name may be in use
    spec = importlib.util.spec_from_file_location(name, program)
    if spec is None or not Path(program).is_file():
        raise UsageError(f"--program {program}: no such Python file")
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    sys.path.append(str(Path(program).resolve().parent))  # for what it imports, as where it is started
    spec.loader.exec_module(module)
    if not hasattr(module, "build_model"):
        raise UsageError(f"--program {program}: has no build_model(args), as every method has")
    try:
        return module.build_model(argparse.Namespace(**saved.get("pretrained_args", saved["args"]) | {"init": None}))
    except AttributeError as error:
        if not isinstance(error.obj, argparse.Namespace):
            raise
        raise UsageError(f"--program {program}: asks for --{error.name.replace('_', '-')}, which this "
                         f"{saved['method']} run does not have; name the program that trained it") from None


def precision(args, saved, device):
    """autocast() of --amp. "auto": off if the run took that, on a CPU its bf16 too, so that its figures come again."""
    taken = saved["args"].get("amp")
    name = taken if args.amp == "auto" and (taken == "off" or device.type == "cpu" and taken == "bf16") else args.amp
    return pick_precision(name, device, saved["width"] or 64)[0]


def program_flag(parser):
    """Adds --program, for what comes after training."""
    parser.add_argument("--program", metavar="FILE.py", help="the program that trained the run, whose build_model() "
                        "builds its network: needed where that is no ResNet18; it is imported, which runs its code")
