"""Every mistake of a user: one clear message, exit code 2, no traceback, nothing written."""

from __future__ import annotations

import gzip
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from spmd.cli import main
from spmd.experiment.registry import find, from_file
from tests import mistakes


def make(root: Path) -> None:
    """Makes the files that the table names."""
    _runs(root)
    digits = find("digits").read_text()
    for name, (old, new, _) in mistakes.EDITS.items():
        assert old in digits, name
        (root / f"{name}.py").write_text(digits.replace(old, new, 1))
    model = "MLP(inputs=64, hidden=(256, 128), classes=10, dropout=0.1)"
    net = digits.replace(model, "Net").replace(
        "from spmd import", "from flax import nnx\nfrom spmd import"
    )
    (root / "net.py").write_text(net + mistakes.NET)
    (root / "empty.py").write_text("x = 1\n")
    (root / "wrong.py").write_text("def config():\n    return 3\n")
    (root / "moe_tiny.py").write_text(digits)
    (root / "text.py").write_text(mistakes.TEXT)
    (root / "masks.py").write_text(mistakes.MASKS)
    (root / "poem.txt").write_text("Rose is a rose\n" * 40)
    _texts(root)
    _weights(root)
    _images(root)


def _images(root: Path) -> None:
    """Folders of images that are not what they should be."""
    from PIL import Image

    for name in mistakes.IMAGES:
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith("/"):
            file.mkdir(exist_ok=True)
        else:
            Image.new("L", (6, 6)).save(file)
    torn = root / "torn_images/a/0.png"
    torn.write_bytes(torn.read_bytes()[:30])
    for name, text in (mistakes.INDICES | mistakes.CSV).items():
        (root / name).write_text(text)
    for kind in ("table", "tar", "saved"):
        (root / f"{kind}.py").write_text(mistakes.TABLES.replace("KIND", kind))
    (root / "text.tar").write_text("hello" * 400)


def _runs(root: Path) -> None:
    (root / "file").write_text("mine")
    for name in (
        "foreign",
        "corrupt",
        "listed",
        "other",
        "both",
        "toks",
        "pickled",
        "weights",
        "two",
    ):
        (root / name).mkdir()
    (root / "foreign/thesis.txt").write_text("mine")
    (root / "corrupt/config.json").write_text("{")
    (root / "listed/config.json").write_text('{"identity": []}')
    same = from_file(find("digits")).identity() | {"optimizer.momentum": 0.5}
    (root / "other/config.json").write_text(json.dumps({"identity": same}))


def _texts(root: Path) -> None:
    (root / "both/a.txt").write_text("x" * 400)
    (root / "both/a.txt.gz").write_bytes(gzip.compress(b"x" * 400))
    (root / "surrogate.jsonl").write_text('{"text": "\\ud800"}\n')
    (root / "null.jsonl").write_text('{"text": null}\n')
    (root / "field.jsonl").write_text('{"txt": "a"}\n')
    (root / "table.parquet").write_bytes(b"PAR1")
    (root / "utf16.txt").write_bytes("abc".encode("utf-16"))
    (root / "void.txt").write_text("")
    torn = bytearray(gzip.compress(np.random.default_rng(0).bytes(3000)))
    torn[500] ^= 255
    (root / "torn.txt.gz").write_bytes(torn)
    (root / "toks/tokenizer.json").write_text("{}")


def _weights(root: Path) -> None:
    from safetensors.numpy import save_file

    (root / "pickled/pytorch_model.bin").write_bytes(b"")
    for file in ("weights/model", "two/a", "two/b"):
        save_file({"wte.weight": np.zeros((256, 8), np.float32)}, root / f"{file}.safetensors")
    sizes = {"vocab_size": 256, "n_positions": 8, "n_embd": 8, "n_layer": 1, "n_head": 2}
    other = sizes | {"model_type": "gpt2", "scale_attn_by_inverse_layer_idx": True}
    (root / "weights/config.json").write_text(json.dumps(other))


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A directory with the files that the table names."""
    monkeypatch.chdir(tmp_path)
    make(tmp_path)
    return tmp_path


def files(root):
    return {
        p: p.read_bytes() for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts
    }


@pytest.fixture(scope="module")
def started():
    """The modules that a first row would import."""
    from spmd.train import lease, loop
    from spmd.train.checkpoint import store

    return store, lease, loop


@pytest.mark.parametrize("case", mistakes.TABLE)
def test_one_clear_message(case, started, place, monkeypatch, capsys):
    line, message = mistakes.TABLE[case]
    for name, value in mistakes.ENVIRONMENTS.get(case, {}).items():
        monkeypatch.setenv(name, value)
    before = files(place)
    code = main(line.split())
    shown = capsys.readouterr()
    text = " ".join((shown.err + shown.out).split())
    assert code == 2, text
    assert shown.err.startswith("error: ") and shown.err.count("error: ") == 1, text
    assert "╭" not in text
    assert message in text
    assert "Traceback" not in text
    assert files(place) == before


@pytest.mark.parametrize("case", mistakes.CONVERTED)
def test_one_clear_message_about_a_table(case, started, place, capsys):
    file, message = mistakes.CONVERTED[case]
    code = main(f"--experiment table.py --data.files {file}{mistakes.B}".split())
    shown = capsys.readouterr()
    text = " ".join(shown.err.split())
    assert code == 2 and message in text and text.count("error: ") == 1, text
    assert not (place / "out").exists()


@pytest.mark.smoke
def test_through_the_process(run_cli):
    done = run_cli("--experiment", "digitz")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: unknown experiment 'digitz'")


@pytest.mark.gate
def test_a_checkpoint_of_another_run_shows_the_difference(digits_run, run_main, tmp_path):
    args = ("--experiment", "digits", "--run.dir", "out", "--train.steps")
    shutil.copytree(digits_run, tmp_path / "out")
    config = tmp_path / "out/config.json"
    known = json.loads(config.read_text())
    known["identity"]["model.hidden"] = [64, 32]  # as if the directory were that model's
    config.write_text(json.dumps(known))
    saved = files(tmp_path / "out/checkpoints")
    done = run_main(*args, 90, "--model.hidden", 64, 32)
    assert files(tmp_path / "out/checkpoints") == saved
    assert not (tmp_path / "out/checkpoints/90").exists()
    assert done.returncode == 2, done.stdout + done.stderr
    assert "the checkpoint was saved by another run" in done.stderr
    assert "model.hidden: [256, 128] -> [64, 32]" in done.stderr
    assert "Traceback" not in done.stderr
    assert "holds a run of another identity" in run_main("eval", *args[:4]).stderr
