"""Sampling: cached equals full, the same tokens on every mesh, the filters against numpy, the command."""

from __future__ import annotations

import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import spmd
from spmd.cli import main
from spmd.cli.sample import stream
from spmd.data.text.tokenizer import Bytes
from spmd.train import sample

EXPERIMENT = """
from spmd import Experiment
from spmd.data.text import Text
from spmd.models.transformer import Transformer
from spmd.optim import AdamW
from spmd.tasks import LanguageModel
from spmd.train import TrainConfig

def config():
    return Experiment(
        model=Transformer(vocab=256, length=64, layers=2, embed=32, heads=4, kv_heads=2),
        task=LanguageModel(),
        data=Text(files=(FILE,), sequence_length=32, batch_size=8, eval_batch_size=8),
        optimizer=AdamW(learning_rate=1e-2),
        train=TrainConfig(steps=60),
    )
"""
MESHES = {
    "one": [],
    "eight": ["--simulate", "8", "--mesh.data", "2", "--mesh.fsdp", "2", "--mesh.tensor", "2"],
}
PROMPTS = [np.frombuffer(text, np.uint8) for text in (b"abc", b"x", b"def abc def")]
GREEDY = sample.Choice(temperature=0)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    root = tmp_path_factory.mktemp("sample")
    (root / "text.txt").write_text("def abc(x): return x ünd so weiter\n" * 200)
    text = textwrap.dedent(EXPERIMENT).replace("FILE", repr(str(root / "text.txt")))
    (root / "tiny.py").write_text(text)
    load(root).train()
    return root


def load(place, *words):
    return spmd.load(
        str(place / "tiny.py"), ["--run.dir", str(place / "run"), "--eval.every", "1000", *words]
    )


def drawn(snapshot, prompts=PROMPTS, **options):
    options = {"num_tokens": 12, "choice": GREEDY} | options
    return np.stack(list(sample.generate(snapshot, prompts, **options)), axis=1)


@pytest.mark.slow
def test_greedy_is_the_argmax_of_the_whole_sequence(place):
    """Prompts of different lengths in one batch, against the uncached model, a row at a time."""
    snapshot = load(place).restore()
    params, model_state = snapshot.variables
    task = snapshot.program.task
    for prompt, found in zip(PROMPTS, drawn(snapshot), strict=True):
        row = prompt.astype(np.int32)
        for token in found:
            batch = {"tokens": jnp.asarray(row)[None]}
            logits_BTV = task.predict(params, model_state, batch)
            assert token == int(logits_BTV[0, -1].argmax())
            row = np.append(row, token).astype(np.int32)


@pytest.mark.gate
def test_the_same_tokens_on_every_mesh(place):
    choice = sample.Choice(temperature=0.9, top_k=50, top_p=0.95)
    one, eight = (
        drawn(load(place, *words).restore(), choice=choice, seed=3) for words in MESHES.values()
    )
    np.testing.assert_array_equal(one, eight)
    alone = drawn(load(place).restore(), PROMPTS[:1], choice=choice, seed=3)
    np.testing.assert_array_equal(one[:1], alone)  # whatever else is in the batch
    other = drawn(load(place).restore(), choice=choice, seed=4)
    assert (one != other).any()


@pytest.mark.gate
def test_a_row_stays_at_its_end(place):
    snapshot = load(place).restore()
    free = drawn(snapshot)
    end = int(free[0, 3])
    stopped = drawn(snapshot, end=end)
    for row, was in zip(stopped, free, strict=True):
        where = np.flatnonzero(was[: stopped.shape[1]] == end)
        last = where[0] if len(where) else stopped.shape[1]
        np.testing.assert_array_equal(row[:last], was[:last])
        assert (row[last:] == end).all()


def expected(logits, choice):
    """Which tokens of a row may be drawn, in plain Python."""
    logits = logits / choice.temperature
    order = sorted(range(len(logits)), key=lambda i: -logits[i])
    if choice.top_k:
        order = order[: choice.top_k]
    shares = np.exp(logits[order] - logits[order].max())
    shares /= shares.sum()
    kept, total = set(), 0.0
    for i, share in zip(order, shares, strict=True):
        if total < choice.top_p or choice.top_p == 1:
            kept.add(i)
        total += share
    return kept


@settings(deadline=None, max_examples=40)
@given(
    st.permutations(range(12)),
    st.floats(0.3, 3),
    st.integers(0, 14),
    st.sampled_from([0.05, 0.33, 0.71, 0.9, 1.0]),
)
def test_filters_against_a_loop(order, temperature, top_k, top_p):
    choice = sample.Choice(temperature=temperature, top_k=top_k, top_p=top_p)
    logits = np.asarray(order, np.float32) * 0.37
    found = choice.filter(jnp.asarray(logits)[None])[0]
    assert set(np.flatnonzero(np.isfinite(found))) == expected(logits, choice)


def test_draws_follow_the_probabilities():
    choice = sample.Choice()
    logits = jnp.log(jnp.array([0.5, 0.3, 0.2], jnp.float32))
    keys = jax.random.split(jax.random.key(0), 20_000)
    found = choice(jnp.broadcast_to(logits[None], (20_000, 3)), keys)
    np.testing.assert_allclose(np.bincount(found) / 20_000, [0.5, 0.3, 0.2], atol=0.015)


@settings(deadline=None, max_examples=50)
@given(st.text(max_size=20), st.integers(0, 5))
def test_streamed_text_is_the_text(text, extra):
    tokens = [*text.encode("utf-8", "ignore"), 255, *b"beyond"[:extra]]
    parts = list(stream(Bytes(), tokens))
    assert "".join(parts) == text.encode("utf-8", "ignore").decode()


@pytest.mark.gate
def test_the_command_continues_prompts(run_main, place):
    words = [
        "sample",
        "--experiment",
        place / "tiny.py",
        "--run.dir",
        place / "run",
        "--tokens",
        "20",
    ]
    one = run_main(*words, "--simulate", 1, "--prompt", "def a", "--temperature", "0")
    assert one.returncode == 0, one.stderr
    assert one.stdout.startswith("def abc(x): return x")
    mesh = [*MESHES["eight"], "--prompt", "def a", "ret", "--temperature", "0"]
    two = run_main(*words, *mesh)
    assert two.returncode == 0, two.stderr
    assert two.stdout.startswith("--- 1\n" + one.stdout.rstrip("\n"))
    assert "--- 2\nreturn x" in two.stdout


def test_mistakes(run_main, place):
    snapshot = load(place).restore()
    with pytest.raises(ValueError, match="11 tokens and --tokens 60 exceed the model's 64 pos"):
        drawn(snapshot, num_tokens=60)
    with pytest.raises(ValueError, match="at least one token"):
        drawn(snapshot, [np.zeros(0, np.int32)])
    for wrong in ({"temperature": -1}, {"top_k": -1}, {"top_p": 0}):
        with pytest.raises(ValueError, match=next(iter(wrong)).replace("_", "-")):
            sample.Choice(**wrong)
    digits = run_main("sample", "--experiment", "digits", "--prompt", "a")
    assert digits.returncode == 2 and "no text: it has no tokenizer" in digits.stderr
    none = run_main("sample", "--experiment", place / "tiny.py", "--run.dir", "no")
    assert none.returncode == 2 and "no run in" in none.stderr


def test_without_a_number_as_many_as_the_model_has_positions_for(place, capsys):
    words = ["sample", "--experiment", str(place / "tiny.py"), "--run.dir", str(place / "run")]
    assert main([*words, "--prompt", "def a", "--temperature", "0"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("def abc(x): return x")
    assert err == "note: the model's positions end after 59 tokens more\n"
    assert main([*words, "--prompt", "x" * 64]) == 2
    assert "leaves nothing of the model's 64 positions; shorten it" in capsys.readouterr().err
