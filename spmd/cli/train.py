"""run.py [train]: train or resume a run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from spmd.experiment import registry


def run(name: str, words: Sequence[str]) -> int:
    """Exit code 0 when finished, 128 + signal when stopped, 1 when the loss diverged or the disk is full;
    spmd.runtime has the codes after which a launcher restarts.
    """
    exp, _ = registry.load(name, words)
    from spmd.runtime import EXIT_AGAIN, EXIT_FAILED, EXIT_MISTAKE, agree
    from spmd.runtime.join import Absent
    from spmd.train.checkpoint.failures import SaveFailed
    from spmd.train.log import NonFinite
    from spmd.train.trainer import Stopped

    try:
        exp.train_run()
    except Stopped as stop:
        agree.say(str(stop), sys.stderr)
        return 128 + stop.signum
    except NonFinite as error:
        agree.say(f"error: {error}", sys.stderr)
        return EXIT_FAILED
    except SaveFailed as error:
        text = f"error: {error}"
        agree.from_first(lambda: agree.say(text, sys.stderr), "the end")  # before any process exits
        # At once: savers may still wait for other processes, and closing log writers would fail again.
        agree.leave(EXIT_FAILED, agreed=True)
    except agree.FirstProcessMistake:
        return EXIT_MISTAKE
    except (Absent, agree.PeerLost) as error:
        print(f"error: {error}", file=sys.stderr)
        agree.leave(EXIT_AGAIN)
    return 0
