"""run.py eval --tasks: log-likelihoods on meshes, and the harness on local tasks beside transformers."""

from __future__ import annotations

import importlib.util
import json

import jax
import numpy as np
import pytest

import spmd
from spmd.train.judge import Scorer, cut
from tests import local_tasks
from tests.local_tasks import RUN, TASKS

needs_harness = pytest.mark.skipif(
    importlib.util.find_spec("lm_eval") is None, reason="needs lm_eval"
)
MESH = ("--simulate", "8", "--mesh.fsdp", "2", "--mesh.tensor", "2")


def initial(*words):
    return spmd.load("hf", ["--model.layers", "1", *words]).experiment.initial()


def test_log_likelihoods_are_those_of_the_logits_on_every_mesh(devices):
    rng = np.random.default_rng(0)
    sizes = [
        (3, 4),
        (1, 1),
        (20, 30),
        (120, 20),
        (1, 128),
    ]  # the last two are longer than 128 tokens
    pairs = [(rng.integers(0, 255, a).tolist(), rng.integers(0, 255, b).tolist()) for a, b in sizes]
    one = initial("--simulate", "1")
    scores = Scorer(one, 128, 4).score(pairs)
    for (context, rest), (total, greedy) in zip(pairs, scores, strict=True):
        ids = np.array([*context, *rest])[-129:]
        tokens = np.zeros((1, 128), np.int32)
        tokens[0, : len(ids) - 1] = ids[:-1]
        logits = one.program.task.predict(*one.variables, {"tokens": jax.numpy.asarray(tokens)})
        logits = np.asarray(logits, np.float64)[0, len(ids) - 1 - len(rest) : len(ids) - 1]
        log_z = np.log(np.exp(logits).sum(-1))
        want = (logits[np.arange(len(rest)), rest] - log_z).sum()
        np.testing.assert_allclose(total, want, rtol=1e-5)
        assert greedy == (logits.argmax(-1) == rest).all()
    elsewhere = Scorer(initial(*MESH), 128, 4).score(pairs)
    np.testing.assert_allclose([s for s, _ in elsewhere], [s for s, _ in scores], rtol=1e-5)
    with pytest.raises(ValueError, match=r"129 tokens is longer than model\.length=128"):
        Scorer(one, 128, 4).score([([1], [2] * 129)])
    assert cut("a\nb. c", [".", "\n"]) == "a" and cut("a", ["b"]) == "a"


def test_mistakes(run_main, monkeypatch):
    monkeypatch.setattr("spmd.cli.harness.check_installed", lambda: None)
    done = run_main("eval", "--experiment", "digits", "--tasks", "arc_easy")
    assert done.returncode == 2 and "--tasks judges causal language models" in done.stderr
    done = run_main("eval", "--experiment", "hf", "--limit", 3)
    assert done.returncode == 2 and "--limit is for --tasks" in done.stderr
    monkeypatch.undo()
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    done = run_main("eval", "--experiment", "hf", "--tasks", "arc_easy")
    assert done.returncode == 2 and "pip install lm_eval" in done.stderr


@pytest.fixture
def documents(tmp_path, monkeypatch):
    """Those of the task files, which are written beside them."""
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    return local_tasks.write(tmp_path)


@needs_harness
@pytest.mark.gate
def test_local_tasks_against_transformers(run_main, documents, tmp_path):
    done = run_main(*RUN, "--simulate", 1, "--train.steps", 6)
    assert done.returncode == 0, done.stderr
    measured = {}
    for words in (("--simulate", "1"), MESH):
        done = run_main("eval", *RUN, *words, "--tasks", TASKS)
        assert done.returncode == 0, done.stderr
        measured[words] = json.loads(done.stdout.splitlines()[-1])
    one, several = measured.values()
    assert one.keys() == several.keys()
    for name, value in one.items():
        np.testing.assert_allclose(several[name], value, rtol=1e-5)
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["tasks"]["6"] == several
    lines = [json.loads(x) for x in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines[-1].items() >= several.items() and any("train/loss" in line for line in lines)

    import torch
    import transformers

    assert run_main("export", *RUN, "--simulate", 1, "--to", "out").returncode == 0
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")

    def score(context, rest):
        ids = tokenizer(context + rest, return_tensors="pt").input_ids
        num = len(tokenizer(rest).input_ids)
        if not context:
            ids = torch.cat([torch.tensor([[tokenizer.eos_token_id]]), ids], 1)
        with torch.no_grad():
            log = torch.log_softmax(model(ids).logits[0, :-1].double(), -1)
        return float(log.gather(1, ids[0, 1:, None])[-num:].sum())

    right = [
        int(np.argmax([score(d["question"], c) for c in d["choices"]])) == d["answer"]
        for d in documents
    ]
    assert one["tasks/local_choice/acc"] == np.mean(right)
    short = [d for d in documents if len(d["text"]) < 128]
    assert len(short) == 4
    lengths = sum(len(d["text"]) for d in short)
    want = np.exp(-sum(score("", d["text"]) for d in short) / lengths)
    (tmp_path / "items.jsonl").write_text("".join(json.dumps(d) + "\n" for d in short))
    done = run_main("eval", *RUN, "--simulate", 1, "--tasks", "rolling.yaml")
    got = json.loads(done.stdout.splitlines()[-1])["tasks/local_rolling/byte_perplexity"]
    np.testing.assert_allclose(np.log(got), np.log(want), rtol=1e-5)


@needs_harness
@pytest.mark.gate
def test_task_files_may_not_name_code(documents, tmp_path):
    from spmd.cli import harness

    file = tmp_path / "bad.yaml"
    for line, named in (
        ("process_docs: !function evil.run", "!function evil.run"),
        ("include: worse.yaml", "!function evil.run"),
        ("doc_to_text: !!python/name:os.system", "python/name:os.system"),
        ("metric_list: [{metric: ./evil.py}]", "metric: ./evil.py"),
        ("dataset_kwargs: {trust_remote_code: true}", "trust_remote_code: true"),
    ):
        (tmp_path / "worse.yaml").write_text("doc_to_text: !function evil.run\n")
        file.write_text(f"task: bad\n{line}\n")
        with pytest.raises(ValueError, match="would execute code") as error:
            harness.read_task(str(file), False)
        assert named in str(error.value)
    with pytest.raises(ValueError, match="no such file"):
        harness.read_task(str(tmp_path / "absent.yaml"), False)
    with pytest.raises(ValueError, match=r"no such task\..*arc_easy"):
        harness.judge(None, ["arc_eazy"])
