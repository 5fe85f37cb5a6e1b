"""Experiments that translate: trained, stopped, resumed, scored, sampled; the smoothed loss."""

from __future__ import annotations

import io
import json

import jax.numpy as jnp
import numpy as np
import pytest

import spmd
from spmd.cli import main
from spmd.tasks import Translation
from spmd.train.translation import score

TINY = """
from spmd import Experiment
from spmd.data.text.pairs import Pairs
from spmd.models.encoder_decoder import EncoderDecoder
from spmd.optim import AdamW
from spmd.tasks import Translation
from spmd.train import TrainConfig
from spmd.train.translation import TranslationScores

def made(split):
    return [(f"no {i:02}", f"Nr {i}") for i in range(0 if split == "train" else 1, 32, 2)]

def config():
    return Experiment(
        model=EncoderDecoder(vocab=256, encoder_layers=1, layers=1, embed=16, heads=2, mlp=16),
        task=Translation(),
        data=Pairs(made=made, source_length=16, target_length=16, batch_size=4, eval_batch_size=4),
        optimizer=AdamW(),
        train=TrainConfig(steps=2),
        evaluations=(TranslationScores(name="translation", batch_size=4),),
    )
"""


def test_an_experiment_trains_resumes_and_translates(tmp_path, monkeypatch, capsys):
    """BLEU, chrF and exact matches as metrics of a run and of eval; lines of standard input."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny.py").write_text(TINY)
    words = ["--simulate", "1", "--log.no-tensorboard", "--data.cache-dir", "cache"]
    spmd.load("tiny.py", words).train()
    words += ["--train.steps", "3"]
    run = spmd.load("tiny.py", words).train()
    names = {f"eval/translation/{name}" for name in ("exact", "bleu", "chrf")}
    assert run.steps == 3 and names <= run.metrics.keys()
    capsys.readouterr()
    command = ["--experiment", "tiny.py", *words]
    assert main(["eval", *command]) == 0
    measured = json.loads(capsys.readouterr().out)
    assert {name: measured[name] for name in names} == {name: run.metrics[name] for name in names}
    monkeypatch.setattr("sys.stdin", io.StringIO("no 07\n\nno 9\nno 07\nno 1\n"))
    assert main(["sample", *command]) == 0
    lines = capsys.readouterr().out.split("\n")
    assert len(lines) == 6 and lines[1] == lines[5] == "" and lines[0] == lines[3]
    assert main(["sample", *command, "--length-penalty", "-1"]) == 2


@pytest.mark.slow
def test_the_first_steps_of_wmt(tmp_path, monkeypatch):
    """Transformer base, narrower, on made-up pairs."""
    monkeypatch.chdir(tmp_path)
    text = "".join(json.dumps({"en": f"word {i}", "de": f"Wort {i}"}) + "\n" for i in range(16))
    (tmp_path / "pairs.jsonl").write_text(text)
    words = "--simulate 1 --model.embed 32 --model.heads 4 --model.mlp 32 --model.vocab 320"
    words += " --data.name= --data.files pairs.jsonl --data.eval-files pairs.jsonl"
    words += " --data.tokenizer bpe:300 --data.source-length 16 --data.target-length 16"
    words += " --train.steps 2 --optimizer.warmup-steps 1 --data.cache-dir cache"
    words += " --data.batch-size 4 --data.eval-batch-size 4 --log.no-tensorboard"
    run = spmd.load("wmt17_en_de", words.split()).train()
    assert np.isfinite(run.metrics["train/loss"]) and "eval/translation/exact" in run.metrics


def test_the_loss_is_smoothed_in_training_only():
    rng = np.random.default_rng(0)
    logits, target = rng.normal(size=(2, 3, 5)).astype(np.float32), rng.integers(0, 5, (2, 3))
    log_share = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    nll = -np.take_along_axis(log_share, target[..., None], -1)[..., 0]
    batch = {"targets": jnp.asarray(target, jnp.int32), "weight": jnp.ones(2)}
    task = Translation(label_smoothing=0.2)
    smoothed = task.values(jnp.asarray(logits), batch, train=True)["loss"]
    np.testing.assert_allclose(smoothed, 0.8 * nll - 0.2 * log_share.mean(-1), rtol=1e-5)
    plain = task.values(jnp.asarray(logits), batch, train=False)["loss"]
    np.testing.assert_allclose(plain, nll, rtol=1e-5)


def test_scores_are_those_of_sacrebleu():
    """One reference for each; equal texts have 100."""
    texts = ["the file is open now", "close the file first"]
    assert score(texts, texts) == pytest.approx({"exact": 1.0, "bleu": 100.0, "chrf": 100.0})
    half = score([texts[0], "x"], texts)
    assert half["exact"] == 0.5 and 0 < half["bleu"] < 100
