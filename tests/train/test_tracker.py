"""Weights & Biases: one run over several starts, nothing secret on disk, a clear word when it is missing."""

from __future__ import annotations

import importlib.util
import io
import json
import sys
import types

import pytest
from etils import epath
from PIL import Image

from spmd.cli import main

RUN = ["--experiment", "digits", "--log.wandb", "trials", "--run.dir", "out"]


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="needs requirements/peers.txt"
)
def test_one_run_over_two_starts(run_cli, tmp_path):
    key = "0123456789abcdef0123456789abcdef01234567"
    env = {"WANDB_MODE": "offline", "WANDB_API_KEY": key}
    for steps in (5, 10):
        done = run_cli(*RUN, "--log.pictures", 4, "--train.steps", steps, env=env)
        assert done.returncode == 0, done.stderr
    own = json.loads((tmp_path / "out/wandb.json").read_text())["id"]
    first, second = sorted((tmp_path / "out/wandb").glob(f"offline-run-*-{own}/*.wandb"))
    for file, accuracy in ((first, b"eval/accuracy"), (second, b"train/loss")):
        assert accuracy in file.read_bytes() and b"trials" in file.read_bytes()
    drawn = {Image.open(p).tobytes() for p in (tmp_path / "out/pictures").iterdir()}
    for file in (first, second):
        sent = list(file.parent.glob("files/media/images/eval/predictions*.png"))
        assert sent and {Image.open(p).tobytes() for p in sent} <= drawn
    written = [p for p in (tmp_path / "out").rglob("*") if p.is_file()]
    assert not [p for p in written if key.encode() in p.read_bytes()]
    assert key not in done.stdout + done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("wandb") is None, reason="needs requirements/peers.txt"
)
def test_without_a_key_it_says_so(run_cli, tmp_path):
    done = run_cli(*RUN, "--train.steps", 5, env={"HOME": str(tmp_path), "WANDB_API_KEY": ""})
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "WANDB_MODE=offline" in done.stderr


def test_a_picture_is_sent_with_its_step(tmp_path, monkeypatch):
    from spmd.train import tracker

    sent = []
    run = types.SimpleNamespace(log=sent.append, define_metric=lambda *a, **k: None)
    errors = types.SimpleNamespace(Error=RuntimeError)
    read = lambda image: ("image", image.size, image.getpixel((0, 0)))
    fake = types.SimpleNamespace(
        init=lambda **k: run, Settings=lambda **k: None, errors=errors, Image=read
    )
    monkeypatch.setitem(sys.modules, "wandb", fake)
    monkeypatch.setattr(tracker, "check_installed", lambda project: None)
    file = io.BytesIO()
    Image.new("RGB", (5, 3), (1, 2, 3)).save(file, "PNG")
    made = tracker.Tracker(epath.Path(tmp_path), "trials", {})
    made.picture(7, "eval/predictions", file.getvalue())
    assert sent == [{"step": 7, "eval/predictions": ("image", (5, 3), (1, 2, 3))}]


def test_the_missing_package_is_named_before_anything_is_written(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "wandb", None)  # import and find_spec fail, as without it
    assert main([*RUN, "--train.steps", "5"]) == 2
    assert "pip install wandb" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_folder_of_that_name_is_not_the_package(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb").mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    from spmd.train import tracker

    with pytest.raises(ValueError, match="pip install wandb"):
        tracker.check_installed("trials")
