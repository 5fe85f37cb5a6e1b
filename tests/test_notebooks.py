"""The notebooks: .ipynb in step with .py, run from top to bottom by a real kernel, stopped and resumed.

`make notebooks` runs each .py and writes its .ipynb.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tests.command import HARDWARE, REPOSITORY, ROOT, STRICT
from tests.marks import slow_but

if TYPE_CHECKING:  # the gate collects this file where only the default run is installed
    from nbformat import NotebookNode

NOTEBOOKS = sorted((REPOSITORY / "notebooks").glob("*.py"))
FILES = pytest.mark.parametrize("file", NOTEBOOKS, ids=lambda path: path.stem)
# The kernel's own warnings (about itself, on shutting down) are not the notebook's.
STRICT_CELL = """
import warnings
warnings.simplefilter("error")
warnings.filterwarnings("default", module="ipykernel")
"""
MOST_BYTES = 300_000


def environment() -> dict[str, str]:
    """Of a kernel: the repository on the path, the suite's caches, strict promotion."""
    ambient = ("JAX_", "XLA_", "TF_", "PYTHON", "PYTEST_")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(ambient)}
    environ |= STRICT
    environ["PYTHONPATH"] = str(REPOSITORY)
    environ["JAX_COMPILATION_CACHE_DIR"] = f"{os.environ[ROOT]}/compiled"
    if not HARDWARE:
        environ["JAX_PLATFORMS"] = "cpu"
    return environ


def execute(file: Path, directory: Path) -> NotebookNode:
    """The notebook of a .py file with its outputs; warnings are errors."""
    import jupytext
    import nbformat
    from nbclient import NotebookClient

    notebook = jupytext.read(file)
    notebook.cells.insert(0, nbformat.v4.new_code_cell(STRICT_CELL))
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(directory)}},
    )
    client.execute(env=environment())
    del notebook.cells[0]
    return notebook


def code(cells: list[NotebookNode]) -> list[NotebookNode]:
    return [cell for cell in cells if cell.cell_type == "code"]


# What the last cell of a notebook prints, and the least that it is; else accuracy.
LEAST = {"04_translation": ("exact", 0.5), "05_recommender": ("hit@10", 0.7)}


def check_final(notebook: NotebookNode, name: str) -> None:
    """The figure that the last cell printed."""
    what, least = LEAST.get(name, ("accuracy", 0.95))
    printed = notebook.cells[-1].outputs[0].text
    assert float(re.search(rf"{what} (\d\.\d+)", printed)[1]) > least


def write(notebook: NotebookNode, file: Path) -> None:
    """Without what differs from machine to machine and from run to run."""
    import nbformat

    notebook.metadata["language_info"] = {"name": "python"}
    for i, cell in enumerate(notebook.cells):
        cell.id = f"cell-{i}"
    for i, cell in enumerate(code(notebook.cells)):
        cell.execution_count = i + 1
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = i + 1
    nbformat.write(notebook, file)


def sources(notebook: NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_there_are_notebooks():
    assert NOTEBOOKS


IN_THE_GATE = [path for path in NOTEBOOKS if path.stem[:2] in ("01", "03")]


@pytest.mark.parametrize(
    "file", slow_but([], NOTEBOOKS, gate=IN_THE_GATE), ids=lambda path: path.stem
)
def test_runs_from_top_to_bottom(file, tmp_path, update):
    done = execute(file, tmp_path)
    check_final(done, file.stem)
    if update:
        write(done, file.with_suffix(".ipynb"))


@FILES
def test_the_executed_copy_is_in_step(file):
    import jupytext
    import nbformat

    kept = file.with_suffix(".ipynb")
    assert kept.exists(), f"no {kept.name}; run: make notebooks"
    notebook = nbformat.read(kept, as_version=4)
    nbformat.validate(notebook)
    assert sources(notebook) == sources(jupytext.read(file)), "differs from the .py: make notebooks"
    outputs = [o for cell in code(notebook.cells) for o in cell.outputs]
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    assert any("image/png" in o.get("data", ()) for o in outputs)
    check_final(notebook, file.stem)
    assert kept.stat().st_size < MOST_BYTES
    # nothing of the machine that ran it
    printed = [o.get("text", "") + str(o.get("data", {}).get("text/plain", "")) for o in outputs]
    assert not [p for p in printed if re.search(r"(?<![\w.])/\w+/|0x[0-9a-f]{6}", p)]


@pytest.fixture
def kernel(tmp_path) -> Iterator[tuple]:
    """(manager, client) of a running kernel."""
    from jupyter_client.manager import start_new_kernel

    manager, client = start_new_kernel(
        kernel_name="python3", env=environment(), cwd=str(tmp_path), startup_timeout=120
    )
    yield manager, client
    client.stop_channels()
    manager.shutdown_kernel(now=True)


def run_cell(kernel: tuple, source: str, interrupt_at: str = "") -> tuple[dict, str]:
    """(reply, what was printed); the stop button is pressed when `interrupt_at` is printed."""
    manager, client = kernel
    printed: list[str] = []
    pressed = False

    def output(message: dict) -> None:
        nonlocal pressed
        if message["msg_type"] == "stream":
            printed.append(message["content"]["text"])
        if interrupt_at and not pressed and interrupt_at in "".join(printed):
            pressed = True
            manager.interrupt_kernel()

    reply = client.execute_interactive(source, output_hook=output, timeout=300)
    return reply["content"], "".join(printed)


@pytest.mark.gate
def test_the_stop_button_saves_and_the_next_call_goes_on(kernel):
    load = "import spmd; exp = spmd.load('digits', '--run.dir runs/a --train.steps {}'.split())"
    assert run_cell(kernel, load.format(1_000_000))[0]["status"] == "ok"
    stopped, _ = run_cell(kernel, "run = exp.train()", interrupt_at="step 50/")
    assert stopped.get("ename") == "Stopped", stopped
    step = int(re.search(r"at step (\d+), state saved in runs/a", stopped["evalue"])[1])
    # the kernel lives, and so does the state
    assert run_cell(kernel, "print(exp.restore().step)")[1] == f"{step}\n"
    run_cell(kernel, load.format(step + 20))
    again, printed = run_cell(kernel, "run = exp.train()")
    assert again["status"] == "ok" and f"resuming at step {step} of {step + 20}" in printed
    assert f"is finished: {step + 20} steps" in run_cell(kernel, "run = exp.train()")[1]
