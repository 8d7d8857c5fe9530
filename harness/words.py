"""What a run says of itself before its first step and after its last."""

import shlex

import torch

from harness import distributed, flags
from harness.command import OwnError
from harness.folder import read_metrics
from harness.log import wrapped
from harness.parser import flag_text


def say_recipe(run, chance, lr):
    args = run.args
    hidden, length = flags.PLUMBING, f"{run.total_steps:,} in all"
    if args.minutes:  # the epochs only say which share of the run is its warm-up
        hidden = hidden | {"epochs", "warmup_epochs"}
        length = (f"as many as fit into {args.minutes:g} minutes, {100 * run.warmup_steps / run.total_steps:.0f} % of "
                  "them to warm up")
    recipe = ", ".join(f"{name.replace('_', '-')} {value}" for name, value in vars(args).items()
                       if name not in hidden and value not in (None, "val") and value is not False)
    device = f"{distributed.size()} processes, {run.device}" if distributed.size() > 1 else str(run.device)
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", None: "float32"}
    device += f", {names[run.autocast.keywords['dtype']]}"
    device += f" (bf16: {args.bf16_gain:.1f} times as fast)" if getattr(args, "bf16_gain", None) else ""
    facts = {
        "recipe": recipe,
        "lr": f"{lr:g} per step of {args.batch_size} images" + (f" ({args.lr:g} per 256)" if args.lr else ""),
        "steps": f"{run.epoch_steps:,} per epoch, {length}, on {device}",
        "chance": f"loss {chance}",
        "writes": f"{run.folder.path}",
    }
    if args.warmup_epochs > args.epochs / 2:
        facts["note"] = (f"--warmup-epochs {args.warmup_epochs:g} of {args.epochs} epochs: the rate climbs for "
                         f"most of the run; {args.epochs / 10:g} is usual")
    if run.step:
        facts["resumes"] = f"at step {run.step:,}" + ": nothing is left to do" * (run.step >= run.plan.end)
    for name, text in facts.items():
        run.say(wrapped(f"{name:8}{text}"))


def read_scores(run):
    """{epoch: its score} from metrics.jsonl, where it has one."""
    name = run.log.score
    return {row["epoch"]: row[name] for row in read_metrics(run.folder.path) if row[name] is not None}


def finish(run):
    """What was reached, where it is, what to do next."""
    args, log, scores = run.args, run.log, read_scores(run)
    untrained = scores.pop(0, None)
    score = run.saver.best if args.knn_split == "val" else next(reversed(scores.values()), None)
    if None not in (untrained, score):
        log.say(f"{log.title:8}{untrained:.2f} % untrained, {score:.2f} % "
                f"{'at best' if args.knn_split == 'val' else 'at the end, test split'}")
    splits = [getattr(run.dataset, split) for split in ("train", args.knn_split)]
    folder = shlex.quote(run.folder.path.as_posix())
    command = f"python linear.py --checkpoint {folder}"
    if len(run.dataset.classes) < 2 or not all(split and (split.labels >= 0).any() for split in splits):
        command = f"python knn.py --checkpoint {folder} --neighbours neighbours.png"  # needs no labels
    log.say(f"next    {run.next_command or command}")


def broken(run, what):
    """The error of a network that is not finite any more."""
    there = (run.folder.path / "last.pt").exists()
    return OwnError(f"{what}: lower --lr, raise --warmup-epochs, or try --amp off; " + (
        f"the last good checkpoint stays in {run.folder.path}" if there else "nothing was saved yet"))


def too_large(args):
    """The error that names the flags that memory depends on."""
    names = ("batch_size", "view_size", "image_size", "width", "dim", "pred_dim", "hidden_dim", "queue_size")
    sizes = ", ".join(flag_text(name, getattr(args, name)) for name in names if getattr(args, name, None))
    return OwnError(f"out of memory with {sizes}; lower one of them; --stem imagenet and, on a GPU, --amp bf16 need "
                      "less too")
