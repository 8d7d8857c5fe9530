"""What a run says of itself before its first step and after its last."""

import torch

from harness import distributed, flags
from harness.folder import read_metrics
from harness.log import wrapped


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
    args, score, log = run.args, run.saver.best, run.log
    if args.knn_split == "test":
        score = next(reversed(read_scores(run).values()), None)
    if run.untrained is not None and score is not None:
        log.say(f"{log.title:8}{run.untrained:.2f} % untrained, {score:.2f} % "
                f"{'at best' if args.knn_split == 'val' else 'at the end, test split'}")
    splits = [getattr(run.dataset, split) for split in ("train", args.knn_split)]
    command = f"python linear.py --checkpoint {run.folder.path}"
    if len(run.dataset.classes) < 2 or not all(split and (split.labels >= 0).any() for split in splits):
        command = f"python knn.py --checkpoint {run.folder.path} --neighbours neighbours.png"  # needs no labels
    log.say(f"next    {run.next_command or command}")
