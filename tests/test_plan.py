"""--minutes: runs that end with the time, by a clock of the tests' own; a step takes what the test says."""

import argparse
import importlib
import json
import os
import signal
import time

import pytest
import torch
from test_linear import pictures, pretrained  # noqa: F401
from test_resume import METHODS

import common
import harness
import knn
import linear
from harness.folder import read_metrics
from harness.plan import Plan

FLAGS = ["--width", "4", "--image-size", "16", "--stem", "cifar", "--batch-size", "8", "--amp", "off",
         "--device", "cpu", "--knn-k", "5", "--quiet"]


# ------------------------------------------------------------------------------------------------
# The plan alone
# ------------------------------------------------------------------------------------------------


def simulate(seconds_of, minutes=10, epoch_steps=20, evaluation=5.0, every=1, max_steps=None, epochs=100,
             stop_at=None, plan=None, start=(0, 0.0)):
    """A run whose step number s takes seconds_of(s, now): its last plan, steps, seconds, and shares of the schedule."""
    args = argparse.Namespace(minutes=minutes, epochs=epochs, warmup_epochs=0, max_steps=max_steps, knn_every=every)
    saved, plan = plan, Plan(args, epoch_steps)
    (step, now), shares = start, []
    if step:
        plan.restore(saved, step, now)
    elif every:
        now += evaluation
        plan.evaluated(evaluation, 0)
    while step < plan.end and step != stop_at:
        shares.append(plan.share_at(step))
        now, step = now + seconds_of(step, now), step + 1
        ends = step % epoch_steps == 0 or step == plan.end
        if ends and every and (step % (epoch_steps * every) == 0 or step == plan.end):
            now += evaluation
            plan.evaluated(evaluation, step)
        if step < plan.end:
            plan.after_step(step, now, ends)
    return plan, step, now, shares


def jitter(step):
    return 0.8 + 0.4 * (step * 7919 % 101) / 100


MACHINES = {
    "steady": dict(seconds_of=lambda s, now: 0.5),
    "compiles": dict(seconds_of=lambda s, now: 60 if s == 0 else 0.5),
    "uneven": dict(seconds_of=lambda s, now: 0.5 * jitter(s)),
    "slows down in the middle": dict(seconds_of=lambda s, now: 0.5 if now < 300 else 1.0),
    "slows down at the end": dict(seconds_of=lambda s, now: 0.5 if now < 500 else 1.0),
    "becomes faster": dict(seconds_of=lambda s, now: 1.0 if now < 300 else 0.5),
    "fast steps": dict(seconds_of=lambda s, now: 0.01 * jitter(s)),
    "epochs of one step": dict(seconds_of=lambda s, now: 0.2 * jitter(s), epoch_steps=1, evaluation=0.1, every=10),
    "less than an epoch": dict(seconds_of=lambda s, now: 0.5 if now < 300 else 1.0, epoch_steps=5000),
    "costly evaluations": dict(seconds_of=lambda s, now: 0.5, evaluation=20.0),
    "rare costly evaluations": dict(seconds_of=lambda s, now: 0.5, evaluation=50.0, every=4),
    "no evaluations": dict(seconds_of=lambda s, now: 0.5, every=0),
    "few steps": dict(seconds_of=lambda s, now: 15.0, epoch_steps=4, evaluation=20.0),
}


@pytest.mark.parametrize("machine", MACHINES)
def test_runs_end_with_their_time_and_their_schedule(machine):
    case = MACHINES[machine]
    _, step, now, shares = simulate(**case)
    # Before an evaluation that does not fit any more, and a step that might not, time may be left.
    spare = case.get("evaluation", 5.0) * bool(case.get("every", 1)) + 2 * case["seconds_of"](step, now)
    assert 600 * 0.99 - spare - 6 <= now <= 606
    paces = [b - a for a, b in zip(shares, shares[1:], strict=False)]
    assert shares[0] == 0 and min(paces) >= 0 and max(paces[:-1]) < 0.08 and shares[-1] <= 1
    rate = common.LRScheduler(torch.optim.SGD([torch.zeros(1)], 1.0), 1.0, 1000).lr_at(1000 * shares[-1])
    assert rate < 0.01


def test_time_that_is_up_leaves_a_short_way_down_to_a_rate_of_zero():
    """A machine that stands still for longer than there is time; the end of its epoch, step 220, tells."""
    _, step, now, shares = simulate(lambda s, now: 700 if s == 200 else 0.5)
    assert 220 < step <= 220 + 16 and 1 - shares[-1] < 1 / 16 and now > 700


@pytest.mark.parametrize("stop_at", [3, 7, 100, 110, 1030])
def test_a_resumed_plan_is_the_same(stop_at):
    whole, *end = simulate(lambda s, now: 0.5)
    plan, step, now, before = simulate(lambda s, now: 0.5, stop_at=stop_at)
    saved = json.loads(json.dumps(plan.state()))
    again, *rest = simulate(lambda s, now: 0.5, plan=saved, start=(step, now))
    assert [*rest[:2], before + rest[2]] == end
    assert (again.end, again.step, again.pace) == (whole.end, whole.step, whole.pace)


def test_a_resumed_run_may_have_other_minutes_or_a_cap():
    plan, step, now, before = simulate(lambda s, now: 0.5, stop_at=400)
    _, _, longer, shares = simulate(lambda s, now: 0.5, minutes=20, plan=plan.state(), start=(step, now))
    assert 1180 <= longer <= 1206 and shares[0] == pytest.approx(before[-1] / 2, abs=0.01) and shares[-1] > 0.99
    _, last, _, shares = simulate(lambda s, now: 0.5, max_steps=450, plan=plan.state(), start=(step, now))
    assert last == 450 and shares[0] == pytest.approx(before[-1], abs=0.01) and 1 - shares[-1] < 0.06


def test_steps_have_a_cap_still():
    _, step, _, shares = simulate(lambda s, now: 0.5, max_steps=50)
    assert step == 50 and 1 - shares[-1] < 0.06


# ------------------------------------------------------------------------------------------------
# Whole runs
# ------------------------------------------------------------------------------------------------


class Clock:
    """time.perf_counter() that stands still but when a step or an evaluation passes: half a second, two seconds."""

    def __init__(self, monkeypatch):
        self.now, self.rates, schedule, monitor = 1000.0, [], common.LRScheduler.step, knn.Monitor.__call__
        self.step, self.kill_at = 0.5, None

        def step(scheduler, at):
            self.now += self.step
            self.rates.append(schedule(scheduler, at))
            if len(self.rates) == self.kill_at:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.rates[-1]

        def evaluate(of, *args, **kinds):
            self.now += 2.0 * of.due
            return monitor(of, *args, **kinds)

        monkeypatch.setattr(time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(common.LRScheduler, "step", step)
        monkeypatch.setattr(knn.Monitor, "__call__", evaluate)


@pytest.fixture
def clock(monkeypatch):
    return Clock(monkeypatch)


@pytest.fixture
def train(pictures, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(pictures.parent / ".cache"))

    def start(method, *flags):
        new = [] if "--resume" in flags else ["--data", pictures, *FLAGS, *METHODS[method]]
        importlib.import_module(method).main([str(flag) for flag in (*new, *flags)])

    return start


@pytest.mark.parametrize("method", METHODS)
def test_a_run_ends_in_time_with_a_rate_near_zero(train, clock, method):
    train(method, "--minutes", "1", "--out", "run")
    rows = read_metrics("run")
    assert 55 <= rows[-1]["seconds"] <= 60 and rows[-1]["knn"] is not None
    assert clock.rates[-1] < 0.01 * max(clock.rates)
    log = open("run/log.txt").read()
    plans = [int(line.split()[-2]) for line in log.splitlines() if line.startswith("plan    in 1 minutes: ")]
    assert "as many as fit into 1 minutes" in log and len(plans) <= 3
    assert plans == pytest.approx([rows[-1]["step"]] * len(plans), rel=0.3) and plans
    assert [row["epoch"] for row in rows] == list(range(len(rows)))


@pytest.mark.parametrize("method", METHODS)
def test_interrupted_and_resumed_a_run_keeps_its_plan(train, clock, method):
    train(method, "--minutes", "0.5", "--out", "whole")
    whole, clock.rates, clock.now = clock.rates, [], 5000.0
    clock.kill_at = 23
    with pytest.raises(SystemExit):
        train(method, "--minutes", "0.5", "--out", "ended")
    clock.now += 10_000  # what lies between two processes does not count
    train(method, "--resume", "ended")
    assert clock.rates == whole
    one, two = (torch.load(f"{run}/last.pt", weights_only=True) for run in ("whole", "ended"))
    assert one["step"] == two["step"] == len(whole) and one["seconds"] == two["seconds"]
    assert one["plan"]["end"] == two["plan"]["end"] == len(whole)
    assert all(torch.equal(tensor, two["model"][name]) for name, tensor in one["model"].items())


def test_a_machine_that_becomes_twice_as_slow(train, clock, monkeypatch):
    clock.step, slow = 0.125, lambda now: 0.125 if now < 1030 else 0.25
    monkeypatch.setattr(Clock, "step", property(lambda self: slow(self.now), lambda self, value: None), raising=False)
    train("simclr", "--minutes", "1", "--knn-every", "4", "--out", "run")
    assert 55 <= read_metrics("run")[-1]["seconds"] <= 60.5 and clock.rates[-1] < 0.01 * max(clock.rates)


def test_epochs_may_follow_minutes_and_minutes_epochs(train, clock):
    train("simsiam", "--epochs", "20", "--max-steps", "20", "--out", "run")
    train("simsiam", "--resume", "run", "--max-steps", "1000", "--minutes", "0.5")
    done = read_metrics("run")[-1]
    assert 25 <= done["seconds"] <= 30 and clock.rates[-1] < 0.01 * max(clock.rates)
    more = done["epoch"] + 2
    train("simsiam", "--resume", "run", "--epochs", more)
    assert read_metrics("run")[-1]["epoch"] == more
    assert harness.load_checkpoint("run")["args"]["minutes"] is None


def test_both_lengths_are_refused(train, capsys):
    for script in (*METHODS, "linear"):
        with pytest.raises(SystemExit) as end:
            importlib.import_module(script).main(["--minutes", "1", "--epochs", "2"])
        err = capsys.readouterr().err
        assert end.value.code == 2 and len(err.splitlines()) == 1 and "--minutes" in err and "--epochs" in err


@pytest.mark.parametrize("way", ["--cached", "--probe", "--finetune"])
def test_linear_ends_in_time(pretrained, tmp_path, clock, way):  # noqa: F811
    clock.step = 0.25
    linear.main(["--checkpoint", str(pretrained), "--out", str(tmp_path / "run"), "--device", "cpu", "--amp", "off",
                 "--quiet", way, "--minutes", "1", "--batch-size", "8"])
    last = read_metrics(tmp_path / "run")[-1]
    assert 56 <= last["seconds"] <= 60 and last["top1"] is not None and clock.rates[-1] < 0.01 * max(clock.rates)


def test_a_run_of_epochs_says_once_how_long_it_takes(train, clock):
    train("simclr", "--epochs", "10", "--knn-every", "1", "--out", "run")
    lines = [line for line in open("run/log.txt") if line.startswith("time ")]
    steps = harness.load_checkpoint("run")["step"]
    # After the tenth step, its epoch's end or not: the rest in half seconds, evaluations of two seconds.
    assert len(lines) == 1 and "seconds to go, " in lines[0] and lines[0].endswith(" GB of memory\n")
    evaluations = sum(steps // 10 * epoch > 10 for epoch in range(1, 11))
    assert int(lines[0].split()[2]) == 0.5 * (steps - 10) + 2 * evaluations
