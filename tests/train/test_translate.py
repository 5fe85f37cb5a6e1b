"""Decoding of an encoder-decoder: cached against full logits, beam search against numpy, on meshes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from spmd import Experiment, optim, tasks
from spmd.data.text.pairs import Pairs
from spmd.models.encoder_decoder import EncoderDecoder
from spmd.parallel.mesh import MeshConfig
from spmd.train import TrainConfig
from spmd.train.beam import BeamSearch
from spmd.train.sample import Choice
from spmd.train.snapshot import Snapshot
from spmd.train.translate import Decoding, translate

END, VOCAB, EXTRA = 0, 16, 3
MODEL = EncoderDecoder(
    vocab=VOCAB, encoder_layers=1, layers=2, embed=16, heads=4, kv_heads=2, mlp=16, init_std=0.6
)


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def snapshot(float64):
    return snapshot_of()


@pytest.fixture(scope="module")
def full(snapshot):
    """(sources, segments, tokens) -> logits of the uncached model, compiled once."""
    params, model_state = snapshot.variables
    call = snapshot.program.task.call

    @jax.jit
    def logits(source, segments, tokens):
        packing = (None, jnp.ones_like(tokens), None, segments)
        return call(params, model_state, lambda module: module(tokens, source, *packing))

    return logits


def snapshot_of(mesh=None, devices=1, model=MODEL):
    """Random weights in float64, the same on every mesh."""
    data = Pairs(made=lambda split: [("a", "b")], source_length=8, target_length=8, batch_size=8)
    exp = Experiment(
        name="pairs",
        model=model,
        task=tasks.Translation(),
        data=data,
        optimizer=optim.AdamW(),
        mesh=mesh or MeshConfig(),
        train=TrainConfig(steps=1),
        param_dtype="float64",
    )
    program = exp.build(jax.devices()[:devices], source=())
    return Snapshot(program, program.init())


def sources_of(num=6):
    rng = np.random.default_rng(1)
    sizes = rng.integers(1, 8, num)
    return [np.append(rng.integers(1, VOCAB, n), END).astype(np.int32) for n in sizes]


def log_probabilities(full, source):
    """(tokens so far [N, T]) -> log-probabilities of the next token [N, V], from the uncached model."""
    rows, segments = np.zeros((4, 8), np.int32), np.zeros((4, 8), np.int32)
    rows[:, : len(source)], segments[:, : len(source)] = source, 1

    def function(tokens):
        num, size = tokens.shape
        padded = np.zeros((4, 12), np.int32)
        padded[:, 0] = END
        padded[:num, 1 : size + 1] = tokens
        last = np.asarray(full(rows, segments, padded))[:num, size]
        return last - np.log(np.exp(last).sum(-1, keepdims=True))

    return function


def beam_search(config, next_tokens, limit):
    """Beam search by its definition: [(tokens, score)], the best first."""
    divide = lambda n: ((5 + n) / 6 if config.penalty == "gnmt" else n) ** config.alpha
    live, ended = [((), 0.0)], []
    for size in range(1, limit + 1):
        scores = next_tokens(
            np.array([tokens for tokens, _ in live], np.int32).reshape(len(live), -1)
        )
        candidates = [
            ((*tokens, v), total + scores[i, v])
            for i, (tokens, total) in enumerate(live)
            for v in range(VOCAB)
        ]
        candidates = sorted(candidates, key=lambda c: -c[1])[: 2 * config.beams]
        going = [c for c in candidates if c[0][-1] != END][: config.beams]
        over = [c for c in candidates if c[0][-1] == END] + (going if size == limit else [])
        ended += [(tokens, total / divide(size)) for tokens, total in over]
        ended = sorted(ended, key=lambda c: -c[1])[: config.beams]
        live = going
        if len(ended) == config.beams and live[0][1] / divide(limit) <= ended[-1][1]:
            break
    return ended


def strip(tokens):
    return tuple(int(t) for t in tokens if t != END)


@pytest.mark.parametrize(
    "search",
    [
        BeamSearch(),
        pytest.param(BeamSearch(alpha=1.0, penalty="power"), marks=pytest.mark.slow),
    ],
)
def test_beam_search_equals_numpy(search, snapshot, full):
    """Width 4: the same hypotheses and scores, sources of several lengths in one batch."""
    sources = sources_of()
    found = translate(snapshot, sources, decoding=Decoding(search=search, extra=EXTRA), end=END)
    for source, hypotheses in zip(sources, found, strict=True):
        want = beam_search(search, log_probabilities(full, source), len(source) + EXTRA)
        assert [strip(h.tokens) for h in hypotheses] == [strip(tokens) for tokens, _ in want]
        np.testing.assert_allclose([h.score for h in hypotheses], [s for _, s in want], rtol=1e-9)


def test_greedy_and_drawn_tokens_are_those_of_the_full_model(snapshot, full):
    """Cached against full logits: greedy tokens are their argmax; a draw depends on its source's number."""
    sources = sources_of()
    greedy = translate(snapshot, sources, decoding=Decoding(search=None, extra=EXTRA), end=END)
    for source, (hypothesis,) in zip(sources, greedy, strict=True):
        next_tokens = log_probabilities(full, source)
        tokens = ()
        while len(tokens) < len(source) + EXTRA:
            tokens += (int(next_tokens(np.array([tokens], np.int32).reshape(1, -1))[0].argmax()),)
            if tokens[-1] == END:
                break
        assert strip(hypothesis.tokens) == strip(tokens)
    drawn = Decoding(search=None, choice=Choice(), extra=EXTRA, batch_size=2)
    first = translate(snapshot, sources, decoding=drawn, end=END)
    again = translate(snapshot, sources[:4], decoding=drawn, end=END)
    same = lambda a, b: np.array_equal(a[0].tokens, b[0].tokens)
    assert all(map(same, first[:4], again))
    assert not all(map(same, first, greedy))


def test_cached_logits_equal_full_ones(snapshot, full):
    """Two rows for each source, of two lengths, against the packed model."""
    params, model_state = snapshot.variables
    call = snapshot.program.task.call
    rng = np.random.default_rng(0)
    source = rng.integers(1, VOCAB, (2, 8)).astype(np.int32)
    segments = (np.arange(8) < np.array([[8], [5]])).astype(np.int32)
    tokens = rng.integers(1, VOCAB, (4, 12)).astype(np.int32)
    twice = lambda x: np.repeat(x, 2, axis=0)
    want = np.asarray(full(twice(source), twice(segments), tokens))

    @jax.jit
    def decode(source, segments, tokens):
        def run(module):
            cache, found = module.encode(source, segments, tokens.shape[1], 2), []
            for i in (0, 1):  # several tokens at once, then the rest
                part = slice(7 * i, 7 + 5 * i)
                at = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32)[part], tokens[:, part].shape)
                logits, cache = module.decode(tokens[:, part], at, cache)
                found.append(logits)
            return jnp.concatenate(found, axis=1)

        return call(params, model_state, run)

    assert np.abs(np.asarray(decode(source, segments, tokens)) - want).max() <= 1e-12


def test_a_mesh_gives_the_same_hypotheses(devices, snapshot):
    """Caches sharded over data, fsdp and tensor."""
    sources = sources_of()
    decoding = Decoding(extra=EXTRA)
    want = translate(snapshot, sources, decoding=decoding, end=END)
    mesh = MeshConfig(data=2, fsdp=2, tensor=2)
    found = translate(snapshot_of(mesh, 8), sources, decoding=decoding, end=END)
    for a, b in zip(want, found, strict=True):
        assert [strip(h.tokens) for h in a] == [strip(h.tokens) for h in b]
        np.testing.assert_allclose([h.score for h in a], [h.score for h in b], rtol=1e-9)
