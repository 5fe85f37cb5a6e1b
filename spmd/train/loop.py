"""The training loop: dispatch steps, evaluate, save, stop cleanly."""

from __future__ import annotations

import contextlib
import sys
from typing import Any

from spmd.runtime import agree
from spmd.runtime.stop import Stop, catch_signals
from spmd.runtime.watchdog import Watchdog
from spmd.train import progress
from spmd.train.checkpoint.failures import translate_disk_full
from spmd.train.program import Program
from spmd.train.trainer import Directory, Settings, Trainer


def fit(
    program: Program, run: Directory, settings: Settings, stop: Stop | None = None
) -> dict[str, Any]:
    """Train to program.num_steps from the newest checkpoint in the run directory; returns the summary.

    Nothing is written before the first dispatch has run, so that a run that cannot step leaves no trace.

    Args:
        stop: collects signals that are caught already; None catches them here.

    Raises:
        Stopped: after a signal to any process; NonFinite: the loss diverged; SaveFailed: the disk is full.
            All processes raise the same at the same step.
    """
    with (
        contextlib.nullcontext(stop) if stop else catch_signals(settings.runtime.grace) as stop,
        Watchdog(settings.runtime.hang_timeout) as watchdog,
        translate_disk_full(run.path),
        contextlib.ExitStack() as closing,
        agree.exit_on_lost_peer(),
    ):
        trainer = Trainer(program, run, settings, stop, watchdog, closing)
        trainer.open_state()
        trainer.open_input()
        trainer.take_first_steps()
        trainer.open_output()
        while trainer.step < program.num_steps:
            trainer.take_steps()
            if trainer.stop_signal():
                break
            if trainer.step < program.num_steps:
                trainer.evaluate_and_save_when_due()
            if trainer.stop_signal():
                break
        summary = trainer.finish()
    progress.print_summary(summary, run.path)
    sys.stdout.flush()
    return summary
