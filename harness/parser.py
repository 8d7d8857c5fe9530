"""argparse with one-line errors, the nearest flag for a wrong one, and types that check a value before any work."""

import argparse
import difflib
import operator
import os
import re
import sys
import textwrap
from pathlib import Path

from common import UsageError, printable
from harness.command import complain

# What articles and other programs call it, where the letters do not lead to our word for it.
WORDS = {
    "threshold": "--stop-at-accuracy", "early-stop": "--stop-at-accuracy", "early-stopping": "--stop-at-accuracy",
    "save-steps": "--keep-every", "save-freq": "--keep-every", "freeze": "linear.py --probe",
    "unfreeze": "linear.py --finetune", "moco-k": "--queue-size", "moco-m": "--momentum-encoder",
    "moco-t": "--temperature", "tau": "--temperature", "learning-rate": "--lr", "wd": "--weight-decay",
    "bs": "--batch-size", "b": "--batch-size", "arch": "--width (of a ResNet-18)", "gpu": "--device",
    "pretrained": "--checkpoint or --init", "ckpt": "--checkpoint or --init", "init": "--weights",
    "workers": "all cores work anyway", "num-workers": "all cores work anyway",
}


def flag_text(name, value):
    """("lr", 0.1) -> "--lr 0.1"."""
    return f"--{name.replace('_', '-')} {value}"


class Help(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Default values in the help, where they say something."""

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def narrow(doc):
    """A docstring in lines of at most 78 columns; what stands behind "Title   " or is indented keeps its place."""
    items = [[0, ""]]
    for line in doc.strip().splitlines():
        indent, title = len(line) - len(line.lstrip()), re.match(r"\S+(?: \S+)* {2,}(?=\S)", line)
        if line and items[-1][1] and (indent > 4 or not (indent or title or items[-1][0])):
            items[-1][1] += " " + line.strip()
        else:
            items.append([title.end() if title else indent, line])
    return "\n".join(textwrap.fill(text, 78, subsequent_indent=" " * place) for place, text in items[1:])


class Parser(argparse.ArgumentParser):
    """argparse with one-line errors, and flags whose default depends on the data.

    recipes  {kind of data: {flag: value}}; a flag that stands there starts as None, see fill_flags.
    """

    def __init__(self, description, recipes=None):
        super().__init__(description=narrow(description), formatter_class=Help, allow_abbrev=False)
        self.recipes, self.title = recipes or {"": {}}, None  # of the group of flags that are added now

    def flag(self, flag, meaning, recipes=None, group=None, **kind):
        """add_argument(flag, ...) whose help also says what each kind of data takes by default.

        raises  UsageError for a flag that takes a value but has none: neither a default nor one in each recipe.
        """
        name, recipes = flag[2:].replace("-", "_"), recipes or self.recipes
        lacking = [data for data, recipe in recipes.items() if name not in recipe]
        if not lacking:
            meaning += f" (default: {', '.join(f'{data} {recipe[name]}' for data, recipe in recipes.items())})"
        elif "default" not in kind and not isinstance(kind.get("action"), str):  # as "store_true", which has one
            raise UsageError(f"{flag}: this flag has no default, and RECIPES[{lacking[0]!r}] has no {name!r}; give it "
                             "one of the two (default=None, if it may be left out)")
        title = "ablations" if meaning.startswith("ablation") else self.title
        (group or (self.group(title) if title else self)).add_argument(flag, help=meaning, **kind)

    def group(self, title):
        """The flags below this title in the help; made where there are none yet."""
        return next((g for g in self._action_groups if g.title == title), None) or self.add_argument_group(title)

    def error(self, message):  # argparse prints the whole usage first
        complain(f"{self.prog}: error: {printable(message)}", 2)

    def exit(self, status=0, message=None):  # after --help
        sys.stdout.flush()
        super().exit(status, message)

    def parse_known_args(self, args=None, namespace=None):
        """argparse's, of flags that may be spelt with underscores; an unknown flag is refused before all else."""
        args = [str(arg) for arg in (sys.argv[1:] if args is None else args)]
        for i, arg in enumerate(args):
            name, *value = arg.split("=", 1)
            if arg == "--":  # what follows are no flags
                break
            if not re.match("--?[A-Za-z][^ ]*$", name) or name in self._option_string_actions:
                continue
            flag = name.replace("_", "-")
            if flag not in self._option_string_actions:
                self.error(f"{name}: no such flag{self._meant(flag)}")
            args[i] = "=".join([flag, *value])
        return super().parse_known_args(args, namespace)

    def _meant(self, flag):
        word, flags = flag.lstrip("-").lower(), [f.lstrip("-") for f in self._option_string_actions]
        here = (w for w in WORDS.get(word, "").split(" or ") if not w.startswith("--") or w.split()[0][2:] in flags)
        other = next(here, "") or "".join(f"--{near}" for near in difflib.get_close_matches(word, flags, 1))
        return f"; did you mean {other}?" if "--" in other else f"; {other or '--help lists them'}"

    def _check_value(self, action, value):  # argparse's names no nearest
        if action.choices is not None and value not in action.choices:
            choices = [str(choice) for choice in action.choices]
            near = difflib.get_close_matches(str(value).lower(), choices, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise argparse.ArgumentError(action, f"no such value: {value!r}{hint} (choose from {', '.join(choices)})")


class Instead(argparse.Action):
    """A flag that replaces another, which a resumed run may have saved."""

    OTHER = {"lr": "step_lr", "step_lr": "lr", "epochs": "minutes"}

    def __call__(self, parser, args, value, flag=None):
        setattr(args, self.OTHER[self.dest], None)
        setattr(args, self.dest, value)


def number(kind, low=None, high=None, above=None):
    """An argparse type: an int or float within [low, high], or strictly above `above`, that a tensor can hold.

    A whole number, be it a count or a seed, must fit int64; another float32, with room for a product or a quotient.
    """
    limits = [limit for limit in ((operator.ge, "at least", low), (operator.gt, "above", above),
                                  (operator.le, "at most", high)) if limit[-1] is not None]
    bounds = " and ".join(f"{words} {limit}" for _, words, limit in limits)
    smallest, largest = (1, 2**63 - 1) if kind is int else (1e-30, 1e30)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text[:80]!r} is not a {'whole ' * (kind is int)}number") from None
        if value and not smallest <= abs(value) <= largest:  # nor is nan
            raise argparse.ArgumentTypeError(f"{text[:80]} is out of range, at most {largest}, at least {smallest}")
        if not all(holds(value, limit) for holds, _, limit in limits):
            raise argparse.ArgumentTypeError(f"{text} must be {bounds}")
        return value

    return parse


def path(text):
    """An argparse type: a file or folder that is there or could be; ~ stands for the home folder."""
    text = os.path.expanduser(text)
    if not text or "\0" in text or len(text) > 4000 or max(map(len, os.fsencode(text).split(b"/"))) > 255:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is no path: empty or too long")
    return text


def absolute_path(text):
    """The same, for what a run may be asked for from another folder."""
    return os.path.abspath(path(text))


def file_to_write(ending):
    """An argparse type: a file to write, of a name that ends so, checked before any work."""
    def parse(text):
        text = path(text)
        file, folder = Path(text), Path(text).absolute().parent
        if file.suffix.lower() != ending or file.is_dir() or not folder.is_dir() or not os.access(folder, os.W_OK):
            raise argparse.ArgumentTypeError(f"{text} must be a {ending} file in a folder that can be written to")
        return text

    return parse


png_file = file_to_write(".png")


def save_interval(text):
    """An argparse type: "3" epochs -> 3; "10min" stays what it is."""
    minutes = text.endswith("min")
    value = (number(float, above=0) if minutes else number(int, low=1))(text.removesuffix("min"))
    return text if minutes else value
