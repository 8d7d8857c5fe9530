"""What stands around a training loop and no paper mentions. A method needs these names:

    command(main)               errors become one line and exit code 2
    training_parser, parse      the flags of every method; number(...): a type of a flag
    fill_flags                  further defaults
    check_stop, stop_reason     whether --stop-at-accuracy makes sense; why a run ends that reaches it
    initialised(backbone, args) the weights of --init
    gather_with_gradient(z)     rows of all processes, and gradients back to them
    is_main()                   whether this process is the one that evaluates (more of processes: distributed.py)
    open_run(args, recipes)     a run, for a `with` statement. Its names, all that a method may use:

        args          the flags, complete                         dataset       pictures: classes, mean, std, splits
        place(model)  on the device                               random        this step's common.Draws
        begin(...)    folder, --resume, --views-png, processes    scaler        torch's GradScaler
        total_steps   of the schedule                             autocast()    context of the forward pass
        warmup_steps  of them                                     record(...)   figures of this step, loss among them
        position      of this step among total_steps              epoch_ends    whether this step is an epoch's last
        step          its number, from 0; --minutes moves         last          whether it is the run's last
                      position on at another pace
        steps()       images, aspect, labels of every step        report(...)   an epoch's line; stop="why" ends the run
        say(text)     terminal and log.txt

Saved and restored are the model, the optimizer and whatever else is handed to begin() by a name of its own, always
between two steps. So what a step changes may be changed anywhere in the loop's body.
"""

from harness import threads  # noqa: F401  # before the others, which import torch
from harness.checkpoint import load as load_checkpoint
from harness.command import command
from harness.distributed import gather_with_gradient, is_main
from harness.flags import check_stop, fill_flags, parse, stop_reason, training_parser
from harness.parser import number
from harness.run import open_run
from harness.weights import initialised, load_backbone

__all__ = ["check_stop", "command", "fill_flags", "gather_with_gradient", "initialised", "is_main", "load_backbone",
           "load_checkpoint", "number", "open_run", "parse", "stop_reason", "training_parser"]
