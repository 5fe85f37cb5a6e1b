r"""Odd run directories save and restore, or are refused before the first step; reading changes nothing."""

from __future__ import annotations

import contextlib
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from spmd.cli import main
from spmd.core import paths
from spmd.train import CheckpointConfig, rundir
from spmd.train.checkpoint import index, steps
from spmd.train.checkpoint.failures import SaveFailed
from spmd.train.checkpoint.store import Checkpoints

# What a directory may be called, and what some library takes for a pattern, an address or an option.
NAMES = {
    "brackets": "pr[1]",
    "open_bracket": "a[b",
    "close_bracket": "a]b",
    "negated_class": "[!a]",
    "star": "*",
    "star_inside": "a*b",
    "double_star": "**",
    "question": "a?b",
    "all_wildcards": "[*]?",
    "backslash": "a\\b",
    "one_backslash": "\\",
    "escaped_bracket": "\\[1\\]",
    "hash": "#1",
    "percent": "100%",
    "percent_encoded": "a%5B1%5D",
    "colon": "12:30:00",
    "bucket_scheme": "gs:",
    "file_scheme": "file:",
    "tilde": "~",
    "backup": "run~",
    "home_of_nobody": "~nobody-of-this-name",
    "dash": "-rf",
    "two_dashes": "--run.fresh",
    "space": "my runs",
    "only_spaces": "  ",
    "space_at_end": "run ",
    "tab": "a\tb",
    "newline": "a\nb",
    "return": "a\rb",
    "control": "a\x01b",
    "escape_sequence": "\x1b[31m",
    "braces": "{a,b}",
    "dollar": "$HOME",
    "single_quote": "it's",
    "double_quote": '"run"',
    "backquote": "`run`",
    "semicolon": "a;b",
    "ampersand": "a&b",
    "pipe": "a|b",
    "angles": "<run>",
    "accent": "é",
    "combining_accent": "e\u0301",
    "emoji": "\U0001f680",
    "joined_emoji": "\U0001f468\u200d\U0001f4bb",
    "japanese": "実験",
    "arabic": "تجربة",
    "right_to_left_override": "a\u202eb",
    "no_width": "a\u200bb",
    "long_200": "n" * 200,
    "dots": "...",
    "digits_only": "300",
    "unfinished_step": "3.orbax-checkpoint-tmp",
    "slice": "train[0:10]",
}


def state() -> dict:
    return {"params": {"w": jnp.arange(600.0, dtype=jnp.float32)}, "step": jnp.int32(3)}


def device():
    return jax.sharding.SingleDeviceSharding(jax.devices()[0])


@contextlib.contextmanager
def opened(run: epath.Path, *, writing: bool = True):
    checkpoints = Checkpoints(run / "checkpoints", CheckpointConfig(), writing=writing)
    try:
        yield checkpoints
    finally:
        checkpoints.close()


def save(run: epath.Path, step: int = 3) -> None:
    with opened(run) as checkpoints:
        checkpoints.save(state(), step, {}, {})
        checkpoints.wait()


def restored(run: epath.Path) -> np.ndarray:
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state())
    with opened(run, writing=False) as checkpoints:
        placed = jax.tree.map(lambda _: device(), like)
        return np.asarray(checkpoints.restore(like, placed)["params"]["w"])


def saves_and_restores(directory: str) -> None:
    """Through the run directory that --run.dir DIRECTORY means."""
    run = rundir.locate(directory, "digits")
    assert not rundir.inspect(run, {}, fresh=False)
    rundir.create(run)
    save(run)
    assert steps.has_manifest(run / "checkpoints" / "3")
    np.testing.assert_array_equal(restored(run), np.arange(600.0))
    assert steps.list_quarantine(run / "checkpoints") == {}
    for descriptor in Path("/proc/self/fd").iterdir() if os.path.isdir("/proc/self/fd") else ():
        with contextlib.suppress(FileNotFoundError):  # the one of the listing itself
            assert not os.readlink(descriptor).startswith(os.path.realpath(run)), "left open"


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_a_run_directory_of_any_name(tmp_path, monkeypatch, name):
    """The name stands in the middle of the path, in the path of the working directory, and at the end.

    A neighbour that the name would match as a pattern must not be read.
    """
    monkeypatch.chdir(tmp_path)
    other = tmp_path / "a1b"
    save(epath.Path(other))
    known = {p: p.stat().st_mtime_ns for p in other.rglob("*")}
    saves_and_restores(str(tmp_path / name))
    inside = tmp_path / name / "work"
    inside.mkdir()
    monkeypatch.chdir(inside)
    saves_and_restores("runs/one")
    saves_and_restores(f"./{name}/")
    assert (inside / name / "checkpoints" / "3").is_dir()
    assert {p: p.stat().st_mtime_ns for p in other.rglob("*")} == known


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_the_commands_in_a_working_directory_of_any_name(tmp_path, monkeypatch, capsys, name):
    """The gate runs them in `pr[1]` and `a*b`: tests/cli/test_read_only.py."""
    work = tmp_path / name
    work.mkdir()
    monkeypatch.chdir(work)
    run = ("--experiment", "digits", f"--run.dir=./{name}/one")
    assert main([*run, "--train.steps", "6", "--log.no-tensorboard"]) == 0
    assert main(["eval", *run]) == 0
    assert main(["runs", "check", f"./{name}/one"]) == 0
    out, err = capsys.readouterr()
    assert '"eval/accuracy"' in out and "verified by digests and manifest" in out and err == ""


def test_links_and_relative_paths(tmp_path, monkeypatch):
    (tmp_path / "real[1]").mkdir()
    (tmp_path / "link").symlink_to("real[1]")
    (tmp_path / "link[2]").symlink_to(tmp_path / "real[1]")
    monkeypatch.chdir(tmp_path / "link")
    saves_and_restores("one")
    saves_and_restores("../link[2]/two//")
    saves_and_restores("../link[2]/../three")
    assert {"one", "two"} <= {p.name for p in (tmp_path / "real[1]").iterdir()}


def test_without_proc_a_link_leads_there_and_is_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "_DESCRIPTORS", str(tmp_path / "none"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    saves_and_restores(str(tmp_path / "pr[1]"))
    assert list((tmp_path / "temporary").iterdir()) == []


def test_a_difference_of_long_lists_is_shown_by_its_first_element():
    films = tuple(f"film {i}" for i in range(2000))
    identity = {"data.items": films, "train.steps": 3}
    other = identity | {"data.items": (*films[:1200], "another", *films[1200:])}
    (line,) = rundir._difference_lines(rundir.find_differences(identity, other))
    assert line == "  data.items: 2000 -> 2001 values; number 1201: 'film 1200' -> 'another'"


@pytest.mark.parametrize(
    ("directory", "why"),
    {
        "gs://bucket/pr[1]": "has '\\['",
        "gs://bucket/a*": "has '\\*'",
        "gs://bucket/a#1": "has '#'",
        "gs://bucket/a%20b": "has '%'",
        "a\0b": "null character",
        "a\udcffb": "not UTF-8",
        "n" * 3900: "3800",
    }.items(),
)
def test_what_cannot_be_is_refused(directory, why):
    with pytest.raises(ValueError, match=why) as refused:
        rundir.locate(directory, "digits")
    assert "--run.dir" in str(refused.value)


def test_a_save_that_cannot_be_read_again_is_not_reported_complete(tmp_path, monkeypatch):
    """Orbax merges nothing where its glob matches nothing: only the reopening notices."""
    run = epath.Path(tmp_path / "run")
    save(run, step=1)
    moved = epath.Path(tmp_path / "pr[1]")
    run.rename(moved)
    monkeypatch.setattr(paths, "plain_path", lambda path, **_: contextlib.nullcontext(path))
    with opened(moved) as checkpoints:
        checkpoints.save(state(), 3, {}, {})
        with pytest.raises(SaveFailed, match=r"not complete.*checkpoint of step 1 is kept"):
            checkpoints.wait()
        assert checkpoints.steps() == [1]
    assert sorted(p.name for p in (moved / "checkpoints").iterdir()) == ["1"]


def test_reopening_notices_every_file_that_is_lost_or_cut(tmp_path):
    run = epath.Path(tmp_path / "run")
    save(run)
    step = run / "checkpoints" / "3"
    leaves = {"params.w": state()["params"]["w"], "step": state()["step"]}
    leaves["digests"] = jax.ShapeDtypeStruct((2, 2), np.uint32)
    assert index.check_complete(step, leaves) == ""
    assert index.check_complete(step, leaves | {"more": leaves["step"]})
    assert "instead of int32[]" in index.check_arrays(step, leaves | {"params.w": leaves["step"]})
    counted = 0
    for file in Path(step).rglob("*"):
        # the arrays: the merged index, the data; Orbax's own description of them
        if file.is_file() and (
            file.parent.name == "d" or file.name in ("_METADATA", "manifest.ocdbt")
        ):
            content = file.read_bytes()
            if file.name == "manifest.ocdbt" and file.parent.name.startswith("ocdbt.process"):
                continue  # the merged index has what stands there
            for harm in (b"", content[: len(content) // 2]):
                file.write_bytes(harm)
                assert index.check_complete(step, leaves), (file, len(harm))
                counted += 1
            file.write_bytes(content)
    assert counted >= 8 and index.check_complete(step, leaves) == ""


def test_reading_a_damaged_run_changes_nothing(tmp_path):
    run = epath.Path(tmp_path / "run")
    save(run, step=1)
    shutil.copytree(run / "checkpoints" / "1", run / "checkpoints" / "2")
    (run / "checkpoints" / "2" / steps.MANIFEST).write_text("{}")
    before = {p: (p.stat().st_mtime_ns, p.is_dir()) for p in tmp_path.rglob("*")}
    np.testing.assert_array_equal(restored(run), np.arange(600.0))
    assert {p: (p.stat().st_mtime_ns, p.is_dir()) for p in tmp_path.rglob("*")} == before
    (run / "checkpoints" / "1" / steps.MANIFEST).write_text("{}")
    with pytest.raises(ValueError, match=r"no checkpoint in .* is good: step 2: .*; step 1: "):
        restored(run)
    assert not (run / "quarantine").exists()
