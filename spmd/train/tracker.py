"""Weights & Biases beside the metrics on disk: optional, and imported only when asked for."""

from __future__ import annotations

import importlib
import importlib.util
import io
import json
import os
import sys
import uuid
from typing import Any

from etils import epath

from spmd.core.fields import check
from spmd.core.storage import is_remote, json_text, write_atomically


def check_installed(project: str) -> None:
    """ValueError when a project is given and the package is missing."""
    spec = importlib.util.find_spec("wandb") if project else None
    # A folder ./wandb, as runs leave it, has a spec too, but no file.
    check(
        not project or (spec is not None and spec.origin is not None),
        "--log.wandb needs a package that is not installed: pip install wandb",
    )


class Tracker:
    """The Weights & Biases run of a run directory, the same however often it is resumed.

    Its id is kept in RUN/wandb.json. Key, server and mode are wandb's own: `wandb login`, WANDB_API_KEY,
    WANDB_MODE=offline.
    """

    def __init__(self, directory: epath.Path, project: str, config: dict[str, Any]):
        check_installed(project)
        self._wandb: Any = importlib.import_module("wandb")
        wandb = self._wandb
        local = not is_remote(directory)
        try:
            self._run = wandb.init(
                project=project,
                id=_run_id(directory),
                name=directory.name,
                resume="allow",
                dir=str(directory) if local and not os.environ.get("WANDB_DIR") else None,
                config=config,
                settings=wandb.Settings(console="off", save_code=False),
            )
        except wandb.errors.Error as error:
            raise ValueError(
                f"--log.wandb {project}: {error}. Set WANDB_API_KEY, or WANDB_MODE=offline to keep the"
                " data here"
            ) from None
        # A resumed run repeats steps that were lost; wandb's own step counter would drop them.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Sends the metrics of a step."""
        self._run.log({"step": step} | metrics)

    def picture(self, step: int, name: str, png: bytes) -> None:
        """Send a picture of a step."""
        from PIL import Image

        with Image.open(io.BytesIO(png)) as image:
            self._run.log({"step": step, name: self._wandb.Image(image)})

    def close(self) -> None:
        """Send the remaining metrics."""
        self._run.finish()


def _run_id(directory: epath.Path) -> str:
    """The id of the run directory's run, chosen at its first start."""
    file = directory / "wandb.json"
    if file.exists():
        try:
            return str(json.loads(file.read_text())["id"])
        except (ValueError, KeyError, TypeError):
            print(f"{file} cannot be read: a new run of Weights & Biases begins", file=sys.stderr)
    run_id = uuid.uuid4().hex[:12]
    write_atomically(file, json_text({"id": run_id}) + "\n")
    return run_id
