"""Nothing lost: whatever happens to the files of a checkpoint is noticed, told, and survived."""

from __future__ import annotations

import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.parallel import mesh
from spmd.parallel.mesh import MeshConfig
from spmd.train import CheckpointConfig
from spmd.train.checkpoint import steps
from spmd.train.checkpoint.store import Checkpoints

OLD, NEW = 10, 20


def placed(num: int = 1):
    cut = mesh.make(MeshConfig(fsdp=num), jax.devices()[:num])
    return {
        "step": NamedSharding(cut, P()),
        "params": {"w": NamedSharding(cut, P("fsdp")), "b": NamedSharding(cut, P())},
    }


def state_at(step: int, num: int = 1):
    rng = np.random.default_rng(step)
    state = {
        "step": np.int32(step),
        "params": {
            "w": rng.standard_normal((64, 256)).astype(np.float32),
            "b": rng.standard_normal(100).astype(jnp.bfloat16),
        },
    }
    return jax.device_put(state, placed(num))


def shapes():
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state_at(0))


def opened(path, **kwargs):
    return Checkpoints(epath.Path(path) / "checkpoints", CheckpointConfig(keep=2), **kwargs)


def restored(path, num: int = 1, step: int | None = None):
    """(the step that came back, its state) of the run at `path`."""
    checkpoints = opened(path)
    try:
        state = checkpoints.restore(shapes(), placed(num), step)
    finally:
        checkpoints.close()
    found = int(state["step"])
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(state_at(found)), strict=True):
        np.testing.assert_array_equal(a, b)
    return found


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A run with two steps."""
    path = tmp_path_factory.mktemp("saved")
    checkpoints = opened(path)
    for step in (OLD, NEW):
        checkpoints.save(state_at(step, 4), step, {"eval/accuracy": 0.5}, {"data": {"step": step}})
    checkpoints.wait()
    checkpoints.close()
    return path


@pytest.fixture
def run(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "run")
    return tmp_path / "run"


def newest_files(run):
    return sorted(p for p in (run / "checkpoints" / str(NEW)).rglob("*") if p.is_file())


def flip(file, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def quarantined(run):
    return steps.list_quarantine(epath.Path(run) / "checkpoints")


def test_a_good_run_comes_back_on_another_mesh_and_nothing_is_moved(run, capsys):
    assert restored(run, 2) == NEW
    assert quarantined(run) == {} and capsys.readouterr().out == ""


def test_flipped_bits_in_fifty_random_places_are_all_noticed(saved, tmp_path):
    """Weighted by size, over all files of the newest step: data, metadata, and the manifest itself."""
    rng = np.random.default_rng(0)
    files = [p for p in newest_files(saved) if p.stat().st_size]
    sizes = np.array([p.stat().st_size for p in files])
    for i in range(50):
        # half of the places by size (mostly array data), half by file
        weights = sizes / sizes.sum() if i % 2 else None
        file = files[rng.choice(len(files), p=weights)].relative_to(saved)
        run = tmp_path / "run"
        shutil.copytree(saved, run)
        flip(run / file, int(rng.integers(8 * (run / file).stat().st_size)))
        assert restored(run) == OLD, f"flip {i}, in {file}"
        assert list(quarantined(run)) == [str(NEW)]
        shutil.rmtree(run)


def test_without_a_manifest_the_digests_and_orbax_notice(saved, tmp_path, capsys):
    """As after a kill between a save and its manifest; flips in the file that holds the array data."""
    rng = np.random.default_rng(1)
    reasons = []
    for _ in range(30):
        run = tmp_path / "run"
        shutil.copytree(saved, run)
        (run / "checkpoints" / str(NEW) / steps.MANIFEST).unlink()
        data = max(newest_files(run), key=lambda p: p.stat().st_size)
        flip(data, int(rng.integers(8 * data.stat().st_size)))
        assert restored(run) == OLD
        reasons += quarantined(run).values()
        shutil.rmtree(run)
    assert len(reasons) == 30
    assert any("the digest of" in r and "differs" in r for r in reasons)


def truncate(file):
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


@pytest.mark.parametrize("manifest", [True, False])
@pytest.mark.parametrize("harm", ["unlink", "truncate"])
def test_every_file_may_be_lost_or_cut(saved, tmp_path, harm, manifest):
    for file in newest_files(saved):
        if not manifest and file.name == steps.MANIFEST:
            continue
        run = tmp_path / "run"
        shutil.copytree(saved, run)
        if not manifest:
            (run / "checkpoints" / str(NEW) / steps.MANIFEST).unlink()
        hurt = run / file.relative_to(saved)
        hurt.unlink() if harm == "unlink" else truncate(hurt)
        same = file.stat().st_size == 0 and harm == "truncate"
        without = harm == "unlink" and file.name == steps.MANIFEST
        found = restored(run)  # compares the state
        if manifest and not same and not without:
            assert found == OLD, file
        elif same or without:
            assert found == NEW, file
        assert len(quarantined(run)) == (found == OLD)
        shutil.rmtree(run)


def test_the_reason_is_told_and_kept(run, capsys):
    flip(run / "checkpoints" / str(NEW) / "state" / "_METADATA", 100)
    assert restored(run) == OLD
    reason = "file state/_METADATA has another sha256"
    line = capsys.readouterr().out
    assert line.startswith(f"the checkpoint of step {NEW} is bad: {reason}; moved to {run}/quaran")
    assert line.count("\n") == 1
    assert (run / "quarantine" / str(NEW) / "reason.txt").read_text() == reason + "\n"
    assert (run / "quarantine" / str(NEW) / "state" / "d").is_dir()


def test_a_second_bad_step_of_that_number_has_a_place_of_its_own(run):
    for name in (str(NEW), f"{NEW}.1"):
        (run / "checkpoints" / str(NEW) / "state" / "_METADATA").unlink()
        assert restored(run) == OLD
        assert name in quarantined(run)
        checkpoints = opened(run)
        checkpoints.save(state_at(NEW), NEW, {}, {})
        checkpoints.wait()
        checkpoints.close()
    assert restored(run) == NEW


def test_an_explicit_step_does_not_fall_back(run):
    flip(run / "checkpoints" / str(NEW) / "state" / "_METADATA", 100)
    with pytest.raises(ValueError, match=rf"step {NEW} .* is bad: file state/_METADATA"):
        restored(run, step=NEW)
    assert (run / "checkpoints" / str(NEW)).exists() and not (run / "quarantine").exists()
    assert restored(run, step=OLD) == OLD


def test_when_none_is_left_it_says_so_and_never_starts_anew(run):
    for step in (OLD, NEW):
        (run / "checkpoints" / str(step) / "state" / "_METADATA").unlink()
    with pytest.raises(ValueError, match=r"no good checkpoint is left.*10, 20 .*--run\.fresh"):
        restored(run)
    checkpoints = opened(run)
    with pytest.raises(ValueError, match="no good checkpoint is left"):
        checkpoints.exist()
    checkpoints.close()


def test_where_nothing_can_be_moved_the_older_step_is_taken_all_the_same(run, capsys):
    flip(run / "checkpoints" / str(NEW) / "state" / "_METADATA", 100)
    (run / "quarantine").write_text("a file in the way")
    assert restored(run) == OLD
    assert "left in place (File exists)" in capsys.readouterr().out
    assert (run / "checkpoints" / str(NEW)).exists()


def test_another_model_is_the_users_mistake_and_moves_nothing(run):
    like = shapes()
    like["params"]["w"] = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    before = {p: p.read_bytes() for p in run.rglob("*") if p.is_file()}
    checkpoints = opened(run)
    with pytest.raises(ValueError, match="another model"):
        checkpoints.restore(like, placed())
    checkpoints.close()
    assert {p: p.read_bytes() for p in run.rglob("*") if p.is_file()} == before


def test_an_unfinished_save_is_not_the_latest_and_is_removed(run):
    checkpoints = run / "checkpoints"
    shutil.copytree(checkpoints / str(NEW), checkpoints / "30.orbax-checkpoint-tmp")
    shutil.copytree(checkpoints / str(OLD), checkpoints / "5.deleted")
    reading = opened(run, writing=False)
    assert reading.steps() == [OLD, NEW]
    reading.close()
    assert len(list(checkpoints.iterdir())) == 4  # an evaluation beside a live run removes nothing
    assert restored(run) == NEW
    assert sorted(p.name for p in checkpoints.iterdir()) == [str(OLD), str(NEW)]


def test_a_checkpoint_of_an_older_version_is_restored_unverified(tmp_path, capsys):
    from orbax.checkpoint import v1 as ocp

    state = state_at(NEW)
    flat = {
        "step": state["step"],
        "params.w": state["params"]["w"],
        "params.b": state["params"]["b"],
    }
    (tmp_path / "checkpoints").mkdir()
    ocp.save(tmp_path / "checkpoints" / str(NEW), flat)
    assert restored(tmp_path) == NEW
    assert "step 20 has no digests" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["../../evil", "..", "a b", "a//b", "$(rm)", ""])
def test_names_that_lead_out_are_refused(tmp_path, name):
    checkpoints = opened(tmp_path)
    with pytest.raises(ValueError, match="named"):
        checkpoints.save({name: jnp.ones(3)}, 1, {}, {})
    with pytest.raises(ValueError, match="named"):
        checkpoints.restore({name: jax.ShapeDtypeStruct((3,), jnp.float32)}, {name: None})
    checkpoints.close()
    assert list(tmp_path.iterdir()) == []


def test_names_that_lead_out_are_refused_in_a_checkpoint(tmp_path):
    from orbax.checkpoint import v1 as ocp

    (tmp_path / "checkpoints").mkdir()
    ocp.save(tmp_path / "checkpoints" / str(NEW), {"../../evil": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"'\.\./\.\./evil', which could lead out"):
        restored(tmp_path)
    assert not (tmp_path / "quarantine").exists()


def test_two_arrays_of_one_name_are_refused(tmp_path):
    checkpoints = opened(tmp_path)
    with pytest.raises(ValueError, match="two arrays of one name"):
        checkpoints.save({"a.b": jnp.ones(3), "a": {"b": jnp.ones(3)}}, 1, {}, {})
    with pytest.raises(ValueError, match="one named 'digests'"):
        checkpoints.save({"digests": jnp.ones(3)}, 1, {}, {})
    checkpoints.close()


def test_the_manifest_lists_every_file_and_seals_itself(run):
    path = run / "checkpoints" / str(NEW)
    manifest = json.loads((path / steps.MANIFEST).read_text())
    files = {str(p.relative_to(path)) for p in newest_files(run)} - {steps.MANIFEST}
    assert set(manifest["files"]) == files
    assert steps.check_manifest(epath.Path(path)) == ""
    (path / "state" / "stray").write_text("")
    assert steps.check_manifest(epath.Path(path)) == "file state/stray does not belong there"
