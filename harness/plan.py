"""How long a run is: the steps that fit into --minutes, or the time that its epochs will take."""

import bisect
import math
import sys

import torch

from harness.distributed import same

try:
    import resource
except ImportError:  # Windows
    resource = None

USED = 0.99    # of the minutes: the rest is for the last checkpoint, and for what no measurement foresees
RECENT = 0.02  # of the minutes: steps are expected to take what they took over the last one or two such times
LEAST = 16     # steps for a whole schedule, even where time is up: a cosine of 16 steps ends at 1 % of its peak


class Plan:
    """The number of steps, and the place of each in the schedule of the learning rate.

    With --minutes the schedule is that of the recipe's epochs, and the run goes through it slower or faster. A new plan
    changes the pace of what is left: the rate never jumps. Without --minutes a step is a step of the schedule.

    epoch_steps                steps of an epoch.
    total_steps, warmup_steps  length of the schedule, and of its warm-up.
    end                        steps that the run takes, as planned now.
    """

    # What a resumed run needs to go on with the same plan. All times are seconds of the run.
    SAVED = ("minutes", "max_steps", "end", "step", "share", "pace", "next", "said", "evaluation", "older", "mark")

    def __init__(self, args, epoch_steps):
        whole = args.epochs * epoch_steps
        self.total_steps = min(whole, args.max_steps or whole)
        self.warmup_steps = round(args.warmup_epochs / args.epochs * self.total_steps)  # --max-steps shortens it too
        self.minutes, self.max_steps, self.epoch_steps = args.minutes, args.max_steps, epoch_steps
        self.interval = epoch_steps * getattr(args, "eval_every", getattr(args, "knn_every", 0))  # of evaluations
        self.end = self.capped(max(self.total_steps, 4)) if self.minutes else self.total_steps
        self.step, self.share, self.pace = 0, 0.0, 0.0  # share of the schedule at a step, and of every one after it
        self.next, self.said = 3, None                  # step of the next plan; `end` as last said
        self.evaluation, self.older = 0.0, (0.0, 0)     # seconds of an evaluation; seconds and steps measured before
        self.mark = self.skipped = 0.0, 0               # the time and the step from which on others are measured
        self.first = 0                                  # step at which this process began

    @property
    def epochs(self):
        return math.ceil(self.end / self.epoch_steps)

    def capped(self, end):
        return min(end, self.max_steps or end)

    def share_at(self, step):
        return self.share + (step - self.step) * self.pace

    def position(self, step):
        """The place of a step in the schedule, from 0 to total_steps."""
        return self.share_at(step) * self.total_steps if self.minutes else step

    def state(self):
        return {name: getattr(self, name) for name in self.SAVED} if self.minutes else None

    def restore(self, saved, step, seconds):
        """saved: a state(), or None of a run that had no plan.  step, seconds: where the run stood."""
        wanted, self.first = (self.minutes, self.max_steps), step
        self.mark = self.skipped = seconds, step
        if saved and self.minutes:
            for name in self.SAVED:
                setattr(self, name, saved[name])
        if self.minutes and (not saved or wanted != (self.minutes, self.max_steps)):
            # With other minutes, as with other epochs, what was done is another share of the whole.
            share = self.share_at(step) * self.minutes / wanted[0] if saved else step / self.total_steps
            self.minutes, self.max_steps = wanted
            self.step, self.share, self.pace, self.next, self.said = step, min(1.0, share), 0.0, step + 3, None
            self.end = self.capped(max(self.end, step + 4))

    def evaluated(self, seconds, step):
        """An evaluation after so many steps took so long; one at no planned place counts as a part of the steps."""
        if self.interval and (step % self.interval == 0 or step == self.end):
            self.evaluation = seconds
            self.mark, self.skipped = ((t + seconds, step) for t, step in (self.mark, self.skipped))

    def due(self, step):
        """Whether after_step() needs the time of this step, epoch's end or not; the same in every process."""
        return step - self.first <= 2 or (self.minutes is not None and step >= self.next)

    def after_step(self, step, now, ends):
        """Plan anew at an epoch's end and where it is due; returns whether there is something new to say().

        step, now  steps done, and the seconds that the run has taken for them.  ends: an epoch's last.
        """
        if step - self.first <= 2:  # the first steps of a process compile, choose kernels, fill caches: not measured
            self.mark = self.mark[0] + now - self.skipped[0], self.mark[1] + step - self.skipped[1]
            self.skipped = now, step
        if self.minutes and (ends or step >= self.next):
            self.plan(step, now)
        if self.minutes:
            planned = self.pace > 0 and now > min(10, 0.6 * self.minutes)  # the first plans are rough
            return planned and abs(self.end - (self.said or 0)) > 0.05 * self.end
        return self.said is None and step - self.first >= 10 and now - self.skipped[0] > 2

    def seconds_of_step(self, step, now):
        """The mean of recent steps, or None before the first that counts."""
        took, steps = now - self.mark[0], step - self.mark[1]
        both = self.older[0] + took, self.older[1] + steps
        if self.minutes and steps and took > 60 * RECENT * self.minutes:
            self.older, self.mark = (took, steps), (now, step)
        return max(both[0] / both[1], 1e-9) if both[1] else None

    def seconds_of(self, steps, step, each):
        """Of so many steps after `step`, with their evaluations; the last one is always evaluated."""
        evaluations = (step + steps - 1) // self.interval - step // self.interval + 1 if self.interval else 0
        return steps * each + evaluations * self.evaluation

    def plan(self, step, now):
        each = self.seconds_of_step(step, now)
        if each is not None:
            left, share = 60 * USED * self.minutes - now, self.share_at(step)
            fits = range(1, int(max(0.0, left) / each) + 1)
            steps = bisect.bisect_right(fits, left, key=lambda steps: self.seconds_of(steps, step, each))
            # Of several processes the first one's clock counts. --max-steps ends the schedule too.
            self.end = same(self.capped(step + max(steps, math.ceil(LEAST * (1 - share)), 1)))
            self.step, self.share, self.pace = step, share, (1 - share) / (self.end - step)
            self.next = step + max(1, min(step, (self.end - step) // 10))

    def say(self, step, now, device):
        """The plan in words, or how long the rest will take and how much memory that needs."""
        self.said = self.end
        if self.minutes:
            return (f"plan    in {self.minutes:g} minutes: {self.end / self.epoch_steps:,.1f} epochs, "
                    f"{self.end:,} steps")
        left = self.seconds_of(self.end - step, step, self.seconds_of_step(step, now))
        return ", ".join(filter(None, (f"time    about {in_words(left)} to go", memory(device))))


def in_words(seconds):
    """90 -> "90 seconds", 12345 -> "3.4 hours"."""
    sizes = ((86400, "days", 1), (3600, "hours", 1), (60, "minutes", 0), (1, "seconds", 0))
    size, unit, digits = next((s for s in sizes if seconds >= 2 * s[0]), sizes[-1])
    return f"{seconds / size:.{digits}f} {unit}"


def memory(device):
    """What the process has needed at most, in words; None where nobody counts it."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_reserved(device) / 1e9:.1f} GB of GPU memory"
    if device.type == "cpu" and resource:
        unit = 1 if sys.platform == "darwin" else 1024
        return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9:.1f} GB of memory"
