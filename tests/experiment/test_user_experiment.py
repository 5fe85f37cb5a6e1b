"""An experiment outside the repository: a plain NNX model, the user's own arrays."""

from __future__ import annotations

import json

import pytest

from tests.rings import FILE, write


def test_trains_sharded_by_size(run_main, tmp_path):
    assert len(FILE.splitlines()) <= 60
    write(tmp_path)
    done = run_main("--experiment", "rings.py", "--simulate", 8, "--mesh.fsdp", 4)
    assert done.returncode == 0, done.stderr
    (row,) = [x for x in done.stdout.splitlines() if x.startswith("params/outer/kernel")]
    assert "fsdp" in row and "4.0 KiB" in row
    summary = json.loads((tmp_path / "runs/rings/summary.json").read_text())
    assert summary["metrics"]["eval/accuracy"] > 0.97


@pytest.mark.parametrize(
    ("extra", "apply", "args", "message"),
    [
        (
            "self.drop = nnx.Dropout(0.1, rngs=rngs)",
            "self.drop(x)",
            (),
            "spmd.models.layers.Dropout",
        ),
        (
            "self.norm = nnx.BatchNorm(64, rngs=rngs)",
            "self.norm(x)",
            ("--strategy", "allreduce"),
            "spmd.models.layers.BatchNorm",
        ),
    ],
)
def test_layers_that_would_depend_on_the_mesh_are_refused(
    run_main, tmp_path, extra, apply, args, message
):
    write(tmp_path, extra, apply)
    done = run_main("--experiment", "rings.py", "--simulate", 2, *args)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


def test_two_files_of_one_name(tmp_path, monkeypatch):
    """A name in the folder and a file of it here; two files of one name in two folders."""
    from spmd.experiment import files, registry

    monkeypatch.chdir(tmp_path)
    shipped = files.find("digits")
    (tmp_path / "digits.py").write_text(shipped.read_text())
    with pytest.raises(ValueError, match=r"digits\.py and a file digits\.py in this directory"):
        files.find("digits")
    assert files.find("digits.py").samefile(tmp_path / "digits.py")
    (tmp_path / "wide.py").write_text(shipped.read_text())
    with pytest.raises(ValueError, match=r"Did you mean 'wide\.py'"):
        files.find("wide")

    (tmp_path / "other").mkdir()
    (tmp_path / "other/wide.py").write_text(shipped.read_text().replace("256, 128", "32,"))
    first = registry.from_file(tmp_path / "wide.py")
    second = registry.from_file(tmp_path / "other/wide.py")
    assert (first.model.hidden, second.model.hidden) == ((256, 128), (32,))
    with pytest.raises(ValueError, match="two experiment files are called wide"):
        registry.file_of("wide")
