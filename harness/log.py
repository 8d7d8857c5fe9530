"""What a run says and writes down: the terminal, log.txt, metrics.jsonl, TensorBoard."""

import json
import math
import textwrap
import time

import torch

from common import AverageMeter, UsageError, clock
from harness.command import PIPE_CLOSED, silence_stdout
from harness.distributed import is_main, size


def wrapped(text):
    """A paragraph in 79 columns, hanging by the width of its title."""
    return textwrap.fill(text, 79, subsequent_indent=" " * 8, break_long_words=False, break_on_hyphens=False)


def tensorboard_writer():
    """torch's SummaryWriter class, or one line that says what to install."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UsageError("--tensorboard needs the package: pip install tensorboard") from None
    return SummaryWriter


class Log:
    """Prints, and keeps in log.txt what it printed, once begin() has said that the folder is there.

    folder  harness.folder.Folder.  stop: told when stdout takes no more.
    score   name of the main figure of an epoch, in percent; title: on the terminal.
    """

    def __init__(self, folder, stop, quiet, score, title):
        self.folder, self.stop, self.quiet, self.score, self.title = folder, stop, quiet or not is_main(), score, title
        self.line, self.waiting, self.begun, self.writer = None, [], False, None  # line: the updating one

    def begin(self, tensorboard, step):
        self.begun = True
        if tensorboard and is_main():
            self.writer = tensorboard_writer()(str(self.folder.path), purge_step=step + 1)  # later ones come again

    def show(self, text, **kinds):
        """print() to a stdout that may be gone: a run that has begun saves first, then ends."""
        try:
            print(text, **kinds)
        except OSError as error:
            if not self.begun:
                raise
            silence_stdout()
            self.stop.tell(f"stdout: {error.strerror}", PIPE_CLOSED if isinstance(error, BrokenPipeError) else 2)

    def say(self, text):
        if not is_main():
            return
        if self.line is not None:
            self.line.close()
        if not self.quiet:
            self.show(text, flush=True)
        self.waiting.append(text)
        if self.begun:
            self.folder.append("log.txt", "".join(line + "\n" for line in self.waiting))
            self.waiting = []

    def write(self, row, epochs):
        """A row of metrics.jsonl, and the epoch's line; one that would pass 79 columns goes on below."""
        written = {name: round(value, 6) if isinstance(value, float) else value for name, value in row.items()}
        self.folder.append("metrics.jsonl", json.dumps(written) + "\n")
        figures = {name: value for name, value in written.items() if isinstance(value, (int, float))}
        if self.writer is not None:
            for name in figures.keys() - {"epoch", "step"}:
                self.writer.add_scalar(name, figures[name], row["step"])
            self.writer.flush()

        width, epoch = len(str(epochs)), row["epoch"]
        words = [f"epoch {epoch:>{width}}/{epochs}" if epoch else "untrained".ljust(7 + 2 * width)]
        words += [f"loss {row['loss']:7.4f}"] if epoch else []
        apart = {"epoch", "step", "seconds", "loss", "lr", "images_per_second", self.score}
        apart |= {"rank", "agreement"} if row[self.score] is not None else set()  # those are for want of a score
        words += [f"{name} {value:.3f}" for name, value in figures.items() if name not in apart and name[:3] != "knn"]
        words += [f"{self.title} {row[self.score]:5.2f} %"] if row[self.score] is not None else []
        words += [f"{name[4:]} {value:5.2f} %" for name, value in figures.items() if name.startswith("knn_layer")]
        words += [f"{row['images_per_second']:,.0f} images/s"] if epoch else []
        line = ""
        for word in [*words, clock(row["seconds"])]:
            if len(line) - line.rfind("\n") + len(word) > 77:
                line += "\n" + " " * len(words[0])
            line += ("  " if line else "") + word
        self.say(line)


class Figures:
    """The means of an epoch in `meters`, and an eye on its loss.

    watchful  look at every loss: on a CPU, where it costs nothing.
    count     images of the present step.
    """

    def __init__(self, watchful):
        self.watchful, self.meters, self.count, self.unchecked, self.looked = watchful, {}, 0, [], time.perf_counter()

    def begin(self, saved):
        """A new epoch, or the rest of one. saved: {name: (sum, count)} of all processes."""
        self.meters = {name: AverageMeter() for name in saved}
        for name, (total, count) in saved.items():
            self.meters[name].sum, self.meters[name].count = float(total) / size(), count // size()

    def record(self, step, lr, **values):
        for name, value in values.items():
            if not torch.is_tensor(value):  # on the device of the others, where processes can share it
                value = torch.full((), float(value), device=values["loss"].device)
            self.meters.setdefault(name, AverageMeter()).update(value, self.count)
        self.unchecked.append((step, lr, values["loss"].detach()))

    def due(self):
        return self.watchful or time.perf_counter() - self.looked > 1

    def first_wrong(self):
        """(step, lr, loss) of the first loss since the last look that is not finite, or None."""
        pending, self.unchecked, self.looked = self.unchecked, [], time.perf_counter()
        if pending and not torch.stack([loss for _, _, loss in pending]).isfinite().all():
            return next((step, lr, float(loss)) for step, lr, loss in pending if not math.isfinite(loss))
