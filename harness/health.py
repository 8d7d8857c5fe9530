"""Is a run well? One table of rules on what it wrote down: its flags (args.json), its figures (metrics.jsonl).

    for finding in examine(vars(args), rows):  print(finding)       at chance: accuracy 0.0021, ...; try --lr ...

No rule speaks before there is evidence: an epoch that lies wholly past the warm-up, its end at least 100 steps past it.
Where an epoch has fewer than 1,000 images, the means of several are compared. "By chance" is 1/(2N - 1) of SimCLR's
`accuracy`, 1/(1 + K) of MoCo's, 25 % of `rotation`; a loss is no measure, it may begin above that of chance.
"""

import collections
import functools
import math

from harness.folder import read_metrics
from harness.log import wrapped

EVIDENCE, SAMPLES, FEW = 100, 1000, 1000  # steps past the warm-up; images behind a mean; steps of a short run


class Finding(collections.namedtuple("Finding", "wrong figure change")):
    """What is wrong, by which figure, what to change."""

    def __str__(self):
        return f"{self.wrong}: {self.figure}; try {self.change}"


class Facts:
    """What the rules ask of a run.  args: {flag: value}.  rows: as report() writes them, with or without untrained."""

    def __init__(self, args, rows):
        self.args, batch = args, args["batch_size"]
        trained = [row for row in rows if row.get("loss") is not None]
        self.untrained = next((row for row in rows if row["epoch"] == 0), {})
        self.queries = args.get("contents", {}).get(args.get("knn_split"), [SAMPLES])[0]
        self.images = args.get("contents", {}).get("train", [0])[0]
        self.images = self.images or (trained[0]["step"] // trained[0]["epoch"] * batch if trained else batch)
        epoch_steps = max(1, self.images // batch)
        steps = args["epochs"] * epoch_steps
        if args.get("minutes") and trained:  # as many as there will be at the pace so far
            steps = trained[-1]["step"] * 60 * args["minutes"] / max(1e-9, trained[-1]["seconds"])
        self.total = min(steps, args.get("max_steps") or math.inf)
        warmup = args["warmup_epochs"] / args["epochs"] * self.total
        self.first = math.ceil(warmup) + max(EVIDENCE, epoch_steps)
        self.rows = [row for row in trained if row["step"] >= self.first]
        self.name = next((name for name in ("accuracy", "rotation", "knn") if self.rows and name in self.rows[-1]), "")

    def latest(self, name):
        """The last value of a figure that is not measured in every epoch, or None."""
        return next((row[name] for row in reversed(self.rows) if row.get(name) is not None), None)

    @functools.cached_property
    def knn(self):
        """(the best layer's kNN now, that of the untrained network), percent; None where 50 images did not tell."""
        now, before = ([value for name, value in row.items() if value is not None and name[:3] == "knn"
                        and name[4:] in ("", "layer2", "layer3")]
                       for row in (next((r for r in reversed(self.rows) if r.get("knn") is not None), {}),
                                   self.untrained))
        return (max(now), max(before)) if now and before and self.queries >= 50 else None

    @property
    def knn_noise(self):
        """Two standard errors of the untrained network's kNN, percent."""
        before = self.knn[1] / 100
        return 200 * math.sqrt(before * (1 - before) / self.queries)

    def error(self, value):
        """The standard error of `self.name` where it is value, as they stand in a row."""
        unit, samples = 1 if self.name == "accuracy" else 100, max(SAMPLES, self.images)
        if self.name == "knn":
            samples = self.queries
        elif self.name == "rotation" and not self.args.get("one_rotation"):
            samples *= 4
        return unit * math.sqrt(max(0, value / unit * (1 - value / unit)) / samples)

    @property
    def chance(self):
        """Of `accuracy` and `rotation`, as they stand in a row."""
        if self.name == "rotation":
            return 25.0
        return 1 / (1 + self.args["queue_size"] if self.args.get("queue_size") else 2 * self.args["batch_size"] - 1)

    def means(self, since=0):
        """[(self.name, loss), ...] over consecutive epochs of together SAMPLES images, the latest last."""
        rows = [row for row in self.rows if row.get(self.name) is not None and row["step"] >= since]
        size = math.ceil(SAMPLES / self.images)
        parts = [rows[max(0, end - size):end] for end in range(len(rows), 0, -size)]
        return [tuple(sum(row[name] for row in part) / len(part) for name in (self.name, "loss"))
                for part in reversed(parts) if len(part) == min(size, len(rows))]


def rate(args, lower=False):
    """Another learning rate: the recipe's where the run is far from it (lower: and above it), else half of it."""
    if args["warmup_epochs"] > args["epochs"] / 2:
        return f"--warmup-epochs {args['epochs'] / 10:g}, now {args['warmup_epochs']:g} of {args['epochs']} epochs"
    name, share = "step_lr" if args.get("step_lr") else "lr", args["batch_size"] / 256
    share = 1 if name == "step_lr" else math.sqrt(share) if args.get("lr_scaling") == "sqrt" else share
    now, usual = args[name], args.get("usual_step_lr", 0) / share
    far = usual and not usual / 2 <= now <= 1.01 * usual
    new = usual if far and not (lower and usual > now) else now / 2
    return f"--{name.replace('_', '-')} {new:.2g}, now {now:g}"


# ------------------------------------------------------------------------------------------------
# The rules: Facts -> (figure, change), or None where all is well
# ------------------------------------------------------------------------------------------------


def at_chance(facts):
    """Within four standard errors of chance, or below twice chance (of rotations: a point above it)."""
    means = facts.means()
    if facts.name not in ("accuracy", "rotation") or not means:
        return None
    now, chance = means[-1][0], facts.chance
    if now - chance > max(4 * facts.error(chance), 1 if facts.name == "rotation" else chance):
        return None
    slow = facts.args.get("momentum_encoder", 1)
    change = rate(facts.args) if slow >= 0.9 else f"--momentum-encoder 0.99, now {slow:g}"
    if facts.total < FEW:  # of a small folder, say
        name = ("max_steps" if facts.total == facts.args.get("max_steps") else
                "minutes" if facts.args.get("minutes") else "epochs")
        length = facts.args[name]
        change = (f"--{name.replace('_', '-')} {4 * length:g}, now {length:g}, for {facts.total:,.0f} steps are few; "
                  f"or {change}")
    return f"{facts.name} {now:.3g}, by chance {chance:.3g}", change


def collapsed(facts):
    """All images look the same. SimSiam's std has BatchNorm below it, so it stays above 0 (see its header)."""
    row, rank, without = facts.rows[-1], facts.latest("rank"), ("no_stop_gradient", "no_predictor")
    change = next((f"without --{name.replace('_', '-')}" for name in without if facts.args.get(name)), rate(facts.args))
    if "std" in row and row["loss"] < 0:  # minus a cosine
        if row["std"] < 0.5:
            return f"std {row['std']:.2f} (1: spread, 0: collapsed)", change
        if row["loss"] < (-0.95 if row["std"] < 0.9 else -0.99):
            return f"loss {row['loss']:.3f} (collapsed: -1), std {row['std']:.2f}", change
    if rank is not None and rank < min(2, facts.untrained.get("rank") or 2):
        return f"rank {rank:.2f}: the features of all images point one way", change
    if facts.knn and facts.knn[0] < min(0.5 * facts.knn[1], facts.knn[1] - facts.knn_noise):
        return f"knn {facts.knn[0]:.1f} %, untrained {facts.knn[1]:.1f} %", change


def fall(facts):
    """How the figure fell, by a fifth and four standard errors, while the loss climbed, in words; or None.

    Only in epochs that began when real keys had filled MoCo's queue twice: until then its loss climbs by nature.
    """
    steps = (2 * facts.args.get("queue_size", 0) + facts.images) / facts.args["batch_size"]
    *earlier, now = facts.means(steps) or [None]
    best = max(earlier, default=None)
    if not best or facts.name == "knn" and not facts.knn:
        return None
    noise = 4 * math.sqrt(2) * facts.error(best[0])  # of a difference
    if now[0] < best[0] - max(0.2 * best[0], noise) and now[1] > best[1]:
        return f"{facts.name} fell from {best[0]:.3g} to {now[0]:.3g}, loss climbed from {best[1]:.3g} to {now[1]:.3g}"


def share_of_queue(facts):
    return facts.args.get("queue_size", 0) / facts.images


def own_keys(facts):
    """MoCo's queue is long enough to hold earlier keys of the query's own picture, which count as negatives."""
    words = share_of_queue(facts) >= 0.5 and fall(facts)
    if words:
        size = 2 ** int(math.log2(max(2, facts.images / 4)))
        return (f"queue of {facts.args['queue_size']} keys, {facts.images} images; {words}",
                f"--queue-size {size}, now {facts.args['queue_size']}")


def rising(facts):
    """The same fall, and no queue to blame."""
    words = share_of_queue(facts) < 0.5 and fall(facts)
    return words and (words, rate(facts.args, lower=True))


def below_untrained(facts):
    """By more than two standard errors, after a third of the run."""
    if not facts.knn or facts.rows[-1]["step"] < facts.total / 3:
        return None
    now, before = facts.knn
    if now < before - facts.knn_noise:
        change = "without --no-color-jitter" if facts.args.get("no_color_jitter") else rate(facts.args)
        return f"knn {now:.1f} %, untrained {before:.1f} %", change


def shortcut(facts):
    """Partners are found, classes are not: by colours alone, say, or by what BatchNorm tells of a group."""
    accuracy = facts.name == "accuracy" and facts.latest("accuracy")
    if accuracy and accuracy > 0.9 and facts.knn and facts.rows[-1]["step"] > facts.total / 3:
        now, before = facts.knn
        if now < before + facts.knn_noise:
            given = [f"without --{name.replace('_', '-')}" for name in ("no_color_jitter", "no_shuffle_bn")
                     if facts.args.get(name)]
            change = given[0] if given else "stronger views"
            return f"accuracy {accuracy:.3g}, and knn {now:.1f} %, untrained {before:.1f} %", change


RULES = {
    "at chance": at_chance,
    "collapsed": collapsed,
    "old keys of a picture are its negatives": own_keys,
    "learning rate too high": rising,
    "worse than untrained": below_untrained,
    "solved by a shortcut": shortcut,
}


# ------------------------------------------------------------------------------------------------
# Who asks
# ------------------------------------------------------------------------------------------------


def examine(args, rows):
    """Findings of the rules on a run as it stood after the last row; none before there is evidence."""
    facts = Facts(args, rows)
    found = {wrong: facts.rows and rule(facts) for wrong, rule in RULES.items()}
    if found["collapsed"] or found["solved by a shortcut"]:
        found["worse than untrained"] = None  # says nothing more
    return [Finding(wrong, *words) for wrong, words in found.items() if words]


def news(args, rows):
    """Those that the row before had not."""
    before = {finding.wrong for finding in examine(args, rows[:-1])}
    return [finding for finding in examine(args, rows) if finding.wrong not in before]


def speak(run):
    """Have a run say its news after a row."""
    for finding in news(vars(run.args), read_metrics(run.folder.path)):
        run.say(wrapped(f"warning {finding}"))


def diagnose(args, rows):
    """Lines on a run: its findings, or "healthy: ..." with the figures that were looked at."""
    facts, found = Facts(args, rows), examine(args, rows)
    if not facts.rows and rows and rows[-1]["step"] >= facts.total:
        return [f"too short to judge: nothing is before step {facts.first:,}, and the run has {rows[-1]['step']:,}"]
    if not facts.rows:
        return [f"too early to say: nothing is judged before the end of the epoch that has step {facts.first:,}"]
    names = [name for name in ("loss", "accuracy", "rotation", "std", "knn", "rank", "agreement")
             if facts.latest(name) is not None]
    beside = {facts.name: f" (by chance {facts.chance:.3g})"} if facts.name in ("accuracy", "rotation") else {}
    if facts.untrained.get("knn") is not None:
        beside["knn"] = f" (untrained {facts.untrained['knn']:.3g})"
    if not {*names} - {"loss", "agreement"}:
        return ["no rule reads these figures; of linear.py's compare top1 with train_top1, val_loss with loss"]
    return [str(finding) for finding in found] or ["healthy: " + ", ".join(
        f"{name} {facts.latest(name):.3g}{beside.get(name, '')}" for name in names)]
