"""A training run from its flags to its last checkpoint: what stands around the loop that a method shows.

How a run is saved, told to stop, what it says and where it lies have files of their own; here they come together.
The names of a Run that a method uses are explained in harness/__init__.py.
"""

import math
import shlex
import sys
import time

import torch

import common
import pictures
from common import UsageError
from harness import checkpoint, distributed, flags, health
from harness.command import Interrupted, Stop, out_of_memory
from harness.folder import Folder
from harness.log import Figures, Log, wrapped
from harness.parser import flag_text
from harness.plan import Plan
from harness.views import ViewsWritten, write_views
from harness.words import broken, finish, read_scores, say_recipe, too_large


def open_run(args, recipes, **derived):
    """The Run of a method: device, precision, pictures, and what a resumed run had. Use it in a `with` statement.

    args     of the method's parse_args(); complete afterwards: nothing writes to it any more.
    recipes  the method's table: kind of data -> flag -> value, for the flags that are None.
    derived  flag -> () -> its value, for what follows from other flags.
    raises   UsageError for whatever does not fit or is not there; nothing but packed pictures is written then.
    """
    device, autocast, scaler = set_up(args)
    with distributed.leader_first():  # which downloads what is to be
        source = pictures.open_source(args.data, args.data_root, args.download, holdout=flags.holdout(args))
    args.kind = source.kind
    flags.fill_flags(args, flags.recipe_of(args, recipes, source))
    pictures.check_batch(args.batch_size, sum(source.splits["train"].counts), distributed.size())  # before any is read
    for name, value in derived.items():
        setattr(args, name, value())
    run = Run(args, source, device, autocast, scaler)
    with distributed.leader_first():
        dataset = pictures.pack(source, args.image_size, args.cache, ("train", args.knn_split), run.log.quiet,
                                args.skip_unreadable)
    run.feed(dataset, pictures.Batches(dataset.train, args.batch_size, device, args.seed, rank=distributed.rank(),
                                       world=distributed.size()))
    return run


def set_up(args):
    """-> device, autocast and gradient scaler of the flags; random generators seeded, processes joined."""
    device = distributed.join(args.device)
    if device.type == "cuda":
        torch.set_num_threads(1)  # what is left for the host is small operations: none that many threads could share
    if args.amp == "auto" and device.type == "cpu":  # what is measured here holds for all processes, and once resumed
        width = args.width or flags.SHAPES["toy" if args.data == "toy" else "photos"]["width"]
        args.bf16_gain = distributed.same(common.bf16_gain(width) if distributed.is_main() else None)
        args.amp = common.faster_precision(args.bf16_gain)
    autocast, scaler = common.pick_precision(args.amp, device)
    common.seed_everything(args.seed)
    return device, autocast, scaler


class Run:
    """One training run.

    source  of pictures.open_source.  device, autocast, scaler: of set_up().
    name    what the folder's name begins with, if it is not the method.
    score   the figure of report() that chooses the file `best`, percent; title: its name on the terminal.
    """

    def __init__(self, args, source, device, autocast, scaler, name=None, score="knn", title="kNN", best="best.pt"):
        self.args, self.device, self.autocast, self.scaler, self.best_file = args, device, autocast, scaler, best
        self.saved = saved_run(args, source) if args.resume else None
        args.contents = source.contents
        self.folder, self.stop = Folder(args.out, f"{name or args.method}-{source.name}", bool(self.saved)), Stop()
        self.log = Log(self.folder, self.stop, args.quiet, score, title)
        self.step, self.inside, self.ended, self.saver, self.next_command = 0, False, None, None, None
        self.before, self.jump = 0.0, None  # of a resumed run: seconds, rate
        for line in source.description:
            self.say(line)

    def feed(self, dataset, batches):
        """Name what it trains on: pictures.Dataset and pictures.Batches."""
        self.dataset, self.batches, self.epoch_steps, args = dataset, batches, len(batches), self.args
        self.plan = Plan(args, len(batches))
        self.total_steps, self.warmup_steps = self.plan.total_steps, self.plan.warmup_steps

    def place(self, model):
        return model.to(self.device, memory_format=torch.channels_last)

    def say(self, text):
        self.log.say(text)

    def begin(self, model, optimizer, chance, views=None, sync_bn=False, extra=dict, **states):
        """Make the folder, or restore the run that stands there; say the recipe in one screen.

        chance   the loss of a network that knows nothing, in words.
        views    (images, aspect, random) -> views of the images, for --views-png.
        sync_bn  on several GPUs, BatchNorm sees the batch of all.
        extra    () -> dict: what else stands in the checkpoints, for others to read.
        states   whatever else has a state_dict(): it is saved and restored.
        returns  the network to call in the loop: the model, on several processes wrapped.
        raises   UsageError where the folder cannot be written or lacks space, or the flags do not fit.
        """
        if views and self.args.views_png:
            write_views(self, views)
        if not isinstance(getattr(getattr(model, "backbone", None), "dim", None), int):
            raise UsageError("the model has no backbone.dim: model.backbone must map images to (N, backbone.dim)")
        self.parts, self.extra = (model, optimizer, self.scaler, states), extra
        self.model, self.optimizer, lr = model, optimizer, optimizer.param_groups[0]["lr"]
        best = restore(self) if self.saved else None
        write_buffers(optimizer, self.scaler)
        self.began = self.worked = time.perf_counter()  # worked: till when it did no evaluation
        self.figures = Figures(watchful=self.device.type == "cpu")
        if distributed.is_main():
            needed = checkpoint.bytes_needed(model, self.args, self.plan.epochs, self.epoch)
            self.folder.make(needed, self.args, done(self))
        self.saver = checkpoint.Saver(self.folder, self.args, lambda: state_of(self), self.best_file, best)
        self.log.begin(self.args.tensorboard, self.step)
        self.stop.listen()
        say_recipe(self, chance, lr)
        return distributed.parallel(compiled(model, views, self), self.device, sync_bn)

    @property
    def epoch(self):
        """Finished epochs; in the loop the present one counts."""
        return self.step // self.epoch_steps + self.inside

    @property
    def position(self):
        return self.plan.position(self.step)

    @property
    def last(self):
        return self.step + 1 == self.plan.end

    @property
    def epoch_ends(self):
        return (self.step + 1) % self.epoch_steps == 0 or self.last

    def steps(self):
        """Yields images (n, 3, S, S) uint8, aspect (n,) and labels (n,) of every step; label -1 is none.

        Between two steps, never inside one, the run is watched, saved and told to stop.
        raises  UsageError for a loss that is NaN or infinite; Interrupted after a signal, when all is saved.
        """
        while self.step < self.plan.end and self.ended is None:
            self.model.train()
            begin_epoch(self)
            for images, aspect, labels, _ in self.batches.batches(self.epoch, start=self.step % self.epoch_steps):
                self.random = common.Draws(self.args.seed, self.step, rank=distributed.rank())
                self.inside, self.figures.count, ends = True, len(labels), self.epoch_ends
                yield images, aspect, labels
                self.step, self.inside = self.step + 1, False
                after_step(self, ends)
                if self.step == self.plan.end:
                    break
        self.stop.close()  # nothing is left to be saved

    def record(self, *, loss, **figures):
        self.figures.record(self.step + 1, self.optimizer.param_groups[0]["lr"], loss=loss, **figures)
        if self.epoch_ends:
            end_epoch(self)

    def report(self, stop=None, **scores):
        self.plan.evaluated(time.perf_counter() - self.worked, self.step + self.inside)
        row = epoch_row(self, scores)
        self.ended, self.reached = None if self.last else distributed.same(stop), row[self.log.score]
        if distributed.is_main():
            self.log.write(row, self.plan.epochs)
            health.speak(self)
        return row

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        """Gives signals and the folder back; says what was reached, or what to do about too little memory."""
        self.stop.close()
        try:
            if kind is None and self.saver:
                finish(self)
        finally:
            self.folder.close()
        if isinstance(error, (RuntimeError, MemoryError)) and out_of_memory(error):
            raise too_large(self.args) from None
        return kind is ViewsWritten


# ------------------------------------------------------------------------------------------------
# Before the loop
# ------------------------------------------------------------------------------------------------


def saved_run(args, source):
    """The checkpoint of --resume; raises UsageError where it is not one of these images."""
    saved = checkpoint.load(args.resume, args.method)
    changed = flags.changed_images(saved["args"], source, ("train", args.knn_split))
    if changed:
        raise UsageError(f"--resume {args.out}: the images are not those of the run any more ({changed}); bring "
                         "them back, or start a new run on those that are there now")
    return saved


def restore(run):
    """Take up a resumed run; returns its best score, or None."""
    run.step = checkpoint.restore(run.saved, *run.parts, run.dataset.classes)
    epoch, saved, run.before = run.saved["epoch"], run.saved["args"], run.saved["seconds"]
    run.plan.restore(run.saved.get("plan"), run.step, run.before)
    if run.step // run.epoch_steps != epoch:  # pictures that could not be read before, say
        raise UsageError(f"--resume {run.folder.path}: an epoch has {run.epoch_steps:,} steps now, so step "
                         f"{run.step:,} is not in epoch {epoch + 1:,} any more: the images changed; bring back "
                         "those of the run, or start a new one")
    names = ("epochs", "minutes", "max_steps", "lr", "step_lr", "warmup_epochs", "schedule")
    changed = [flag_text(n, value) + (f" (was {saved[n]})" if saved[n] is not None else "") for n in names
               if n in saved and (value := getattr(run.args, n, None)) not in (None, saved[n])]
    run.jump = (", ".join(changed), run.optimizer.param_groups[0]["lr"]) if changed and run.step else None
    best = run.folder.path / run.best_file
    if best.exists() and checkpoint.load(best)["step"] > run.step:
        return None  # of a branch that is left: whatever comes next is the best
    # The untrained network is no candidate.
    return max((score for number, score in read_scores(run).items() if 0 < number <= done(run)), default=None)


def done(run):
    """How many epochs of a resumed run are not run again; the last one of a run that has ended may be no whole one."""
    return run.epoch + (run.step >= run.plan.end)


def write_buffers(optimizer, scaler):
    """Zeros for SGD's momentum: where fp16 overflows in the first step, fused SGD would leave its buffers unwritten."""
    for group in optimizer.param_groups if scaler.is_enabled() and isinstance(optimizer, torch.optim.SGD) else ():
        for p in group["params"] if group["momentum"] else ():
            optimizer.state[p].setdefault("momentum_buffer", torch.zeros_like(p))


def compiled(model, views, run):
    """The model; with --compile compiled, it and the TwoCrops `views`, where torch.compile can work on this machine.
    In one process on a GPU as CUDA graphs: what `network` returned, and gradients, are overwritten in the next step."""
    if run.args.compile:
        try:
            mode = "reduce-overhead" if run.device.type == "cuda" and not distributed.together() else None
            for probe in [torch.compile(lambda x: x * 2 + 1, mode=mode)] * 3:  # it warms up, records, replays
                probe(torch.ones(8, device=run.device))
            model.compile(mode=mode, dynamic=False)
            if run.device.type == "cpu":  # 157 images/s of 218 on one machine, 1.14 to 1.24 times as many on another
                run.say("note    --compile: on a CPU it may not pay; compare images/s with a short run without it")
            elif isinstance(views, common.TwoCrops):
                views.compile()
        except Exception as error:  # no C++ compiler, no Triton, a GPU too old: many kinds of errors
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:60]
            run.say(f"note    --compile does not work here, going on without: {reason}")
    return model


# ------------------------------------------------------------------------------------------------
# Between two steps, and at the end
# ------------------------------------------------------------------------------------------------


def begin_epoch(run):
    saved = run.saved if run.saved and run.step % run.epoch_steps and run.step == run.saved["step"] else None
    run.figures.begin(saved["meters"] if saved else {})
    run.reached = None
    images = run.batches.passes * len(run.batches.split)  # linear.py keeps a short batch at the end
    run.log.line = common.Progress(run.plan.end, label(run), quiet=run.log.quiet, first=run.step, show=run.log.show,
                                   per_step=min(run.args.batch_size, images / run.epoch_steps))


def end_epoch(run):
    check(run)  # waits for a GPU: what it still works on is no part of the evaluation
    run.log.line.update(run.step + 1, lr=run.optimizer.param_groups[0]["lr"], **run.figures.meters)
    run.worked = time.perf_counter()


def label(run):
    return f"epoch {run.epoch + 1:>{len(str(run.plan.epochs))}}/{run.plan.epochs}"


def after_step(run, ends):
    if run.args.compile:  # CUDA graphs may overwrite this step's outputs and gradients now, not before
        torch.compiler.cudagraph_mark_step_begin()
    if run.jump:
        (changed, before), run.jump, lr = run.jump, None, run.optimizer.param_groups[0]["lr"]
        if f"{before:.3g}" != f"{lr:.3g}":
            run.say(wrapped(f"note    {changed}: the learning rate goes from {before:.3g} to {lr:.3g}"))
    over = run.step == run.plan.end or run.ended is not None
    # Looking at a loss makes the host wait for a GPU: there it is done about once a second, and at the end of an
    # epoch, so that the rate counts steps that are done and not only asked for.
    if ends or run.figures.due() or run.plan.due(run.step):
        check(run)
        if not over and run.plan.after_step(run.step, now := seconds(run), ends):
            run.say(run.plan.say(run.step, now, run.device))
            run.log.line.total, run.log.line.label = run.plan.end, label(run)
    if ends:
        whole = run.step % run.epoch_steps == 0
        run.saver.after_epoch(math.ceil(run.step / run.epoch_steps), whole, run.reached, over or run.stop.told)
        if run.ended:
            run.say(f"stopped {run.ended}")
        if over:
            return
    else:
        run.log.line.update(run.step, lr=run.optimizer.param_groups[0]["lr"], **run.figures.meters)
        if run.stop.told or run.saver.minutes_are_up():
            run.saver.write()
    if run.stop.told:
        reason, code = run.stop.told
        raise Interrupted(code, f"{reason}: saved at step {run.step:,}; go on with\n"
                                f"  {shlex.join(['python', sys.argv[0], '--resume', run.folder.path.as_posix()])}")


def check(run):
    """raises  UsageError where a loss since the last look is not finite."""
    wrong = run.figures.first_wrong()
    if wrong:
        step, lr, loss = wrong
        scale = f", loss scale {run.scaler.get_scale():g}" if run.scaler.is_enabled() else ""
        raise broken(run, f"the loss is {loss} at step {step} (lr {lr:.3g}{scale})")


def seconds(run):
    """Since the run began, interruptions left out."""
    return run.before + time.perf_counter() - run.began


def epoch_row(run, scores):
    """What report() writes: {name: figure}, means over all processes."""
    check(run)
    rate, lr, means = None, None, {}
    if run.inside:
        lr = run.optimizer.param_groups[0]["lr"]
        rate, means = run.log.line.rate, {name: meter.mean() for name, meter in run.figures.meters.items()}
    row = {"epoch": run.epoch, "step": run.step + run.inside, "seconds": seconds(run), "loss": means.pop("loss", None),
           "lr": lr, "images_per_second": rate, run.log.score: scores.pop(run.log.score, None)}
    return row | means | scores


def state_of(run):
    """What a checkpoint holds."""
    check(run)
    if not torch.nn.utils.get_total_norm(run.model.parameters()).isfinite():  # by a gradient, of a finite loss
        raise broken(run, f"the weights are not finite after step {run.step}")
    state = checkpoint.state_of(*run.parts, run.args, run.dataset, run.epoch, run.step)
    state["args"]["out"] = str(run.folder.path)  # also where no --out named it
    n = distributed.size()  # what the others have seen is not known here: this one stands for all
    meters = {name: (n * meter.sum, n * meter.count) for name, meter in run.figures.meters.items()}
    return state | {"seconds": seconds(run), "meters": meters, "plan": run.plan.state()} | run.extra()
