"""Several processes start from the same weights as one does: of a run, and of safetensors."""

from __future__ import annotations

import numpy as np
import pytest

from tests.command import final_state, start

pytestmark = pytest.mark.multiprocess

MODEL = ("--model.layers", "2", "--model.embed", "32", "--model.heads", "2", "--model.length", "32")
DATA = ("--data.sequence-length", "32", "--data.batch-size", "4", "--data.eval-batch-size", "512")
RUN = ("--experiment", "lm_stdlib", "--train.steps", "6", *MODEL, *DATA, "--eval.every", "1000")
MESH = ("--mesh.data", "1", "--mesh.fsdp", "2")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """Directories of a run, and of the same weights as safetensors."""
    directory = tmp_path_factory.mktemp("weights")
    own = ("--run.dir", directory / "run")
    for words in ((*RUN, *own), ("export", *RUN, *own, "--to", directory / "safetensors")):
        process = start(*words, cwd=directory)
        out, err = process.communicate()
        assert process.returncode == 0, out + err
    return directory


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["run", "safetensors"])
def test_two_processes_start_as_one(start_group, weights, tmp_path, kind):
    states = []
    for num in (1, 2):
        place = ("--run.dir", tmp_path / str(num), "--simulate", 2 // num)
        group = start_group(num, *RUN, *MESH, "--init.from", weights / kind, *place)
        assert group.wait() == [0] * num, group.text()
        assert "starting from" in group.out[0]
        states.append(final_state(tmp_path / str(num), *MODEL, *DATA, experiment="lm_stdlib"))
    one, two = states
    assert one.keys() == two.keys()
    for name in one:
        np.testing.assert_allclose(two[name], one[name], rtol=1e-5, atol=1e-6, err_msg=name)


@pytest.mark.gate
def test_two_processes_refuse_weights_of_another_model(start_group, weights, tmp_path):
    run = (*RUN, "--model.embed", "64", "--simulate", 1, "--run.dir", tmp_path)
    group = start_group(2, *run, "--init.from", weights / "safetensors")
    assert group.wait() == [2, 2], group.text()
    assert "is of another model" in group.text() and not list(tmp_path.glob("checkpoints/*"))
