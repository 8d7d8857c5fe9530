"""How a program ends: an error is one line on stderr and an exit code; a run that is told to stop saves first."""

import contextlib
import functools
import os
import signal
import sys
import threading
from pathlib import Path

import torch
import torch.distributed as dist

from common import UsageError, printable
from harness.distributed import is_main, leave, together

PIPE_CLOSED = 141  # 128 + SIGPIPE: what shells expect of a program whose reader, `head` for instance, has left


class Interrupted(Exception):
    """The run was told to end, by a signal or by a stdout that takes no more, and what it had reached is saved."""

    def __init__(self, code, message):
        super().__init__(message)
        self.code = code


class OwnError(UsageError):
    """Of one process alone, which says so whatever its rank; any other error all processes have."""


def complain(message, code, anyone=False):
    """The last words of a program, on stderr; it ends with this exit code. anyone: not of process 0 alone."""
    try:
        sys.stdout.flush()
    except OSError:
        silence_stdout()
    if is_main() or anyone:
        with contextlib.suppress(OSError):  # the terminal has gone
            print(message if is_main() else f"process {dist.get_rank()}: {message}", file=sys.stderr)
    sys.exit(code)


def silence_stdout():
    """Once it has failed: nothing goes there any more, and what still waits does not fail when Python ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def out_of_memory(error):
    """Whether torch (on a GPU or on the host) or Python could not get the memory it asked for."""
    words = ("not enough memory", "can't allocate memory", "out of memory", "size calculation overflowed",
             "CUBLAS_STATUS_ALLOC_FAILED", "Unable to find a valid cuDNN algorithm")
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or any(w in str(error) for w in words)


def command(main):
    """Decorates a program's main(argv=None)."""

    @functools.wraps(main)
    def wrapped(argv=None):
        name = Path(sys.argv[0]).name
        for stream in ("stdout", "stderr"):
            if getattr(sys, stream) is None:  # closed, as by >&-
                setattr(sys, stream, open(os.devnull, "w"))
            if hasattr(getattr(sys, stream), "reconfigure"):  # a letter that the terminal lacks is escaped
                getattr(sys, stream).reconfigure(errors="backslashreplace")
        try:
            code = main(argv)
            sys.stdout.flush()  # what it does not take is said here, not when Python has ended
            leave()
            return code
        except UsageError as error:
            complain(f"{name}: error: {error}", 2, isinstance(error, OwnError))
        except Interrupted as error:
            complain(f"\n{error}", error.code)
        except KeyboardInterrupt:
            complain("\ninterrupted", 130)
        except OSError as error:
            if error.errno is None:
                raise
            if error.filename is None:  # all other writes name their file, or are caught
                silence_stdout()
            if isinstance(error, BrokenPipeError):
                sys.exit(PIPE_CLOSED)
            complain(f"{name}: error: {printable(str(error.filename or 'stdout'))}: {error.strerror}", 2)
        except (RuntimeError, MemoryError) as error:
            if together() and ("gloo" in str(error).lower() or isinstance(error, dist.DistError)):
                complain(f"{name}: error: another process of this run ended; its own message says why. With torchrun "
                         "--max-restarts N the run goes on from its last checkpoint", 1)
            if not out_of_memory(error):
                raise
            complain(f"{name}: error: out of memory; free some, or choose another --device", 2, together())

    return wrapped


class Stop:
    """`told` is None, or (reason, exit code) once the run is to end after the step that it is in.

    The first signal waits for that, the second ends at once. Of several processes only the first can save, so it
    alone listens; the others end with it.
    """

    def __init__(self):
        self.told, self.handlers = None, {}

    def listen(self):
        """Take the signals that end a program; close() gives them back."""
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGTERM]
            if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as nohup sets it
                numbers.append(signal.SIGHUP)
            self.handlers = {number: signal.signal(number, self._signalled) for number in numbers}

    def _signalled(self, number, frame):
        name = signal.Signals(number).name
        # Of a terminal that closes, several may tell, one after the other.
        if self.told and self.told[0] in ("SIGINT", "SIGTERM") and name != "SIGHUP":
            raise KeyboardInterrupt
        self.tell(name, 128 + number)

    def tell(self, reason, code):
        if is_main():
            self.told = self.told or (reason, code)

    def close(self):
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
