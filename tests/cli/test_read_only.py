"""Commands that only read leave a run directory as it is, healthy or damaged, in an odd working directory."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from spmd.cli import main
from tests.marks import slow_but

EXPERIMENT = """
from spmd import Experiment
from spmd.data.text import Text
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import CheckpointConfig, TrainConfig

def config():
    return Experiment(
        model=Transformer(vocab=256, length=32, layers=1, embed=16, heads=2),
        task=LanguageModel(),
        data=Text(files=("te[x]t.txt",), sequence_length=16, batch_size=8, eval_batch_size=8),
        optimizer=AdamW(learning_rate=1e-2),
        train=TrainConfig(steps=2),
        checkpoint=CheckpointConfig(every=1),
    )
"""
RUN = ("--experiment", "tiny.py", "--run.dir", "runs [all]/one~")
COMMANDS = {
    "eval": ("eval", *RUN),
    "sample": ("sample", *RUN, "--tokens", "2"),
    "export": ("export", *RUN, "--to", "../exported"),
    "plan": ("plan", *RUN, "--no-compile"),
    "verify": ("verify", *RUN, "--steps", "1"),
    "compare": (
        "compare",
        *RUN,
        "--strategies",
        "allreduce",
        "--compute",
        "1e-3",
        "--train.steps",
        "1",
    ),
    "list": ("runs", "list", "runs [all]"),
    "status": ("runs", "status", "runs [all]"),
    "check": ("runs", "check", "runs [all]/one~"),
}


def contents(run: Path) -> dict:
    """Everything that a change of the directory changes; reading changes only the time of access."""
    found = {p: p.lstat() for p in (run, *run.rglob("*"))}
    times = {p: (s.st_mtime_ns, s.st_ino, s.st_mode, s.st_size) for p, s in found.items()}
    return times | {f"bytes of {p}": p.read_bytes() for p in found if p.is_file()}


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A working directory `pr[1]`, in which a run has two checkpoints."""
    root = tmp_path_factory.mktemp("read_only") / "pr[1]"
    root.mkdir()
    (root / "te[x]t.txt").write_text("def abc(x): return x\n" * 100)
    (root / "tiny.py").write_text(EXPERIMENT)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        assert main([*RUN, "--log.no-tensorboard"]) == 0
    return root


def _flip(run: Path, step: str) -> None:
    file = max((run / "checkpoints" / step).rglob("d/*"), key=lambda p: p.stat().st_size)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def _damage(run: Path) -> None:
    """A flipped bit in the newest step, an unfinished save and a torn line: a machine that was killed."""
    _flip(run, "2")
    shutil.copytree(run / "checkpoints" / "1", run / "checkpoints" / "3.orbax-checkpoint-tmp")
    (run / "config.json.part").write_text("{")
    with (run / "metrics.jsonl").open("a") as lines:
        lines.write('{"st')
    (run / "summary.json").unlink()


STATES = ("healthy", "damaged", "no step is good")


@pytest.mark.parametrize("state", slow_but([], STATES, gate=["damaged"]))
def test_commands_that_read_change_nothing(trained, tmp_path, monkeypatch, capsys, state):
    root = tmp_path / "a*b" / "work"
    shutil.copytree(trained, root, copy_function=shutil.copy2)
    run = root / "runs [all]" / "one~"
    if state != "healthy":
        _damage(run)
    if state == "no step is good":
        _flip(run, "1")
    monkeypatch.chdir(root)
    before = contents(run)
    codes, errors = {}, {}
    for name, words in COMMANDS.items():
        if name == "verify" and state != "healthy":
            continue  # it opens no checkpoint, and takes as long as the rest together
        shutil.rmtree(root.parent / "exported", ignore_errors=True)
        codes[name] = main([*words])
        assert contents(run) == before, name
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        errors[name] = err
        if name == "eval" and state != "healthy":
            assert "step 2 is bad" in out + err and "left as it is" in out + err
        if name == "list":
            assert "one~" in out
    restoring = 2 if state == "no step is good" else 0
    checked = 0 if state == "healthy" else 1
    expected = dict.fromkeys(codes, 0) | dict.fromkeys(("eval", "sample", "export"), restoring)
    assert codes == expected | {"check": checked, "compare": 2}, errors.values()
    assert "a comparison is a directory of several" in errors["compare"]
    # the run goes on from the good step, and only now is the bad one put aside
    if state == "damaged":
        assert main([*RUN, "--log.no-tensorboard"]) == 0
        assert [p.name for p in (run / "quarantine").iterdir()] == ["2"]
