"""Translation in two processes: the scores and the hypotheses are those of one."""

from __future__ import annotations

import json

import pytest

pytestmark = pytest.mark.multiprocess

PAIRS = """
from spmd import Experiment
from spmd.data.text.pairs import Pairs
from spmd.models.encoder_decoder import EncoderDecoder
from spmd.optim import AdamW
from spmd.parallel.mesh import MeshConfig
from spmd.tasks import Translation
from spmd.train import EvalConfig, TrainConfig
from spmd.train.translation import TranslationScores

def made(split):
    return [(f"no {i:02}", f"Nr {i}") for i in range(0 if split == "train" else 1, 24, 2)]

def config():
    return Experiment(
        model=EncoderDecoder(
            vocab=256, encoder_layers=1, layers=1, embed=16, heads=2, mlp=16, init_std=0.3
        ),
        task=Translation(),
        data=Pairs(made=made, source_length=16, target_length=16, batch_size=4, eval_batch_size=4),
        optimizer=AdamW(learning_rate=0.01),
        mesh=MeshConfig(data=2, fsdp=2),
        train=TrainConfig(steps=2),
        eval=EvalConfig(every=100),
        evaluations=(TranslationScores(name="translation", batch_size=4),),
    )
"""
RUN = ("--experiment", "pairs.py", "--log.no-tensorboard", "--data.cache-dir", "cache")
SAMPLE = ("sample", *RUN, "--run.dir", "two", "--tokens", 6)
SAMPLE += ("--prompt", "no 07", "no 1", "number 19", "")


@pytest.mark.slow
def test_two_processes_translate_as_one(start_group, run_cli, tmp_path):
    """A run on 2 processes of 2 devices and one on 4 devices: equal scores; the same state, equal lines."""
    (tmp_path / "pairs.py").write_text(PAIRS)
    two = start_group(2, *RUN, "--run.dir", "two", "--simulate", 2)
    assert two.wait() == [0, 0], two.text()
    one = run_cli(*RUN, "--run.dir", "one", "--simulate", "4")
    assert one.returncode == 0, one.stderr
    of = lambda name: json.loads((tmp_path / name / "summary.json").read_text())["metrics"]
    scores = [name for name in of("one") if name.startswith("eval/translation/")]
    assert len(scores) >= 1
    assert [of("two")[name] for name in scores] == [of("one")[name] for name in scores]
    lines = start_group(2, *SAMPLE, "--simulate", 2)
    assert lines.wait() == [0, 0], lines.text()
    alone = run_cli(*map(str, SAMPLE), "--simulate", "4")
    assert lines.out == [alone.stdout, ""] and len(alone.stdout.split("\n")) == 5, lines.text()
    assert len({*alone.stdout.split("\n")}) > 2  # not all alike
