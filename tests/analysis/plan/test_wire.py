"""What each way of merging gradients sends, read from the compiled step, is what its closed form says."""

from __future__ import annotations

import math

import pytest

import spmd
from spmd.analysis.plan import compile
from spmd.core import tree
from spmd.hardware import hlo, targets
from spmd.strategies.compress import num_kept
from tests.marks import slow_but

pytestmark = pytest.mark.usefixtures("devices")
N, BLOCK, KEEP, RANK = 8, 64, 0.05, 4
ONCE = (N - 1) / N  # of an array: what a device sends for a reduce-scatter or an all-gather of it
SCALARS = 500  # bytes at most: loss, accuracy, their weights, the norm of the gradients

# Forms: {parameter: shape} -> bytes that a device sends in a step, all in float32.
Shapes = dict[str, tuple[int, ...]]


def elements(shapes: Shapes) -> int:
    return sum(map(math.prod, shapes.values()))


def owned(shapes: Shapes) -> Shapes:
    return {name: s for name, s in shapes.items() if math.prod(s) >= 1024}


def shared(shapes: Shapes) -> Shapes:
    return {name: s for name, s in shapes.items() if name not in owned(shapes)}


def exact(shapes: Shapes) -> float:
    """Rings, reduce-scatter with all-gather, push and pull: Patarasuk and Yuan 2009."""
    return 2 * ONCE * 4 * elements(shapes)


def hierarchical(shapes: Shapes) -> float:
    """replica=2, data=4: a quarter of all crosses the replicas."""
    return (2 * 3 / 4 + 2 * 1 / 2 / 4) * 4 * elements(shapes)


def int8(shapes: Shapes) -> float:
    """There and back, each chunk padded to whole blocks; a scale of 4 bytes for each block."""
    chunk = math.ceil(math.ceil(elements(shapes) / N) / BLOCK) * BLOCK
    return 2 * ONCE * N * chunk * (1 + 4 / BLOCK)


def int8_push(shapes: Shapes) -> float:
    """There as int8, back as the parameters are; small arrays as they are."""
    sent = 0.0
    for shape in owned(shapes).values():
        chunk = math.ceil(math.prod(shape) / N / BLOCK) * BLOCK
        sent += ONCE * N * chunk * (1 + 4 / BLOCK)
    return sent + pull(shapes) + exact(shared(shapes))


def pull(shapes: Shapes) -> float:
    return ONCE * 4 * elements(owned(shapes))


def top_k(shapes: Shapes) -> float:
    """Each device's entries, 4 bytes and a place of 4 bytes, come to each other device."""
    return (N - 1) * 8 * sum(num_kept(math.prod(s), KEEP) for s in shapes.values())


def powersgd(shapes: Shapes) -> float:
    """Two thin matrices for each matrix, vectors as they are."""
    vectors = {name: s for name, s in shapes.items() if len(s) == 1}
    thin = 0
    for m, n in (s for s in shapes.values() if len(s) == 2):
        thin += min(RANK, m, n) * (m + n)
    return exact(vectors) + 2 * ONCE * 4 * thin


REDUCTION, COMPRESS = "--strategy.reduction", "--strategy.compress.kind"
PERIOD = 4  # local steps, of which the last one sends
LOCAL = ["local", "--strategy.period", str(PERIOD), "--mesh.replica", "8", "--mesh.data", "1"]
CASES = {
    "psum": (["allreduce"], exact),
    "ring": (["allreduce", REDUCTION, "ring"], exact),
    "both ways": (["allreduce", REDUCTION, "ring", "--strategy.bidirectional"], exact),
    "buckets": (["allreduce", REDUCTION, "ring", "--strategy.bucket-mb", "0.05"], exact),
    "reduce_scatter": (["allreduce", REDUCTION, "reduce_scatter"], exact),
    "hierarchical": (
        ["allreduce", REDUCTION, "hierarchical", "--mesh.replica", "2", "--mesh.data", "4"],
        hierarchical,
    ),
    "server": (["server"], exact),
    "stale": (["server", "--strategy.staleness", "3"], exact),
    "int8": (["allreduce", COMPRESS, "int8"], int8),
    "top-k": (["allreduce", COMPRESS, "top-k"], top_k),
    "powersgd": (["allreduce", COMPRESS, "powersgd"], powersgd),
    "powersgd, ring": (["allreduce", COMPRESS, "powersgd", REDUCTION, "ring"], powersgd),
    "server, int8": (["server", COMPRESS, "int8"], int8_push),
    "server, top-k": (["server", COMPRESS, "top-k"], lambda s: top_k(s) + pull(s)),
    "server, powersgd": (["server", COMPRESS, "powersgd"], lambda s: powersgd(s) + pull(s)),
    "local": ([*LOCAL], lambda s: exact(s) / PERIOD),
    "local, int8": ([*LOCAL, COMPRESS, "int8"], lambda s: int8(s) / PERIOD),
    "local, top-k": ([*LOCAL, COMPRESS, "top-k"], lambda s: top_k(s) / PERIOD),
    "local, powersgd": ([*LOCAL, COMPRESS, "powersgd"], lambda s: powersgd(s) / PERIOD),
}
SETTINGS = {
    "int8": ["--strategy.compress.block", str(BLOCK)],
    "top-k": ["--strategy.compress.keep", str(KEEP)],
    "powersgd": ["--strategy.compress.rank", str(RANK)],
}


def read(case: str):
    words = CASES[case][0]
    words = ["--strategy", *words, *(w for k in words for w in SETTINGS.get(k, ()))]
    program = spmd.load("digits", words).experiment.unread(N).build(source=())
    made = compile.compile_step(program, targets.parse(f"cpu:{N}"))
    assert made.program.endless == 0
    params = tree.named_leaves(program.abstract_state().params)
    return made.program, {name: leaf.shape for name, leaf in params.items()}


@pytest.mark.parametrize("case", slow_but(("both ways", "int8", "local, int8"), CASES))
def test_bytes_on_the_wire(case):
    found, shapes = read(case)
    wanted = CASES[case][1](shapes)
    sent = sum(total.wire_bytes for total in hlo.ledger(found).values())
    assert wanted - 1 <= sent <= 1.02 * wanted + SCALARS
    assert 0.02 * exact(shapes) > SCALARS  # else it would say nothing


def by_type(found: hlo.CompiledProgram) -> dict[str, float]:
    sent: dict[str, float] = {}
    for c in found.collectives:
        sent[c.dtype] = sent.get(c.dtype, 0) + c.count * c.wire_bytes
    return sent


@pytest.mark.parametrize("case", slow_but(("int8",), ("int8", "server, int8", "local, int8")))
def test_int8_is_what_moves(case):
    """Not float32 that has been rounded."""
    found, shapes = read(case)
    sent = by_type(found)
    rest = pull(shapes) + exact(shared(shapes)) if "server" in case else 0
    scales = (sent["s8"] * 4 / BLOCK) * 1.001
    assert sent["s8"] >= (CASES[case][1](shapes) - rest) / (1 + 4 / BLOCK) * 0.999
    assert sum(sent.values()) - sent["s8"] <= scales + rest + SCALARS
    if "server" not in case:
        assert sum(sent.values()) < 0.3 * exact(shapes)


def test_rings_are_permutes_and_levels_keep_to_their_axes():
    ring, _ = read("both ways")
    permutes = [c for c in ring.collectives if c.kind == "collective-permute"]
    assert sum(c.count for c in permutes) == 2 * 2 * (N - 1)  # there and back, both ways
    assert all(c.bytes < SCALARS for c in ring.collectives if c.kind != "collective-permute")
    levels, shapes = read("hierarchical")
    across = [c for c in levels.collectives if "replica" in c.axes and c.bytes > SCALARS]
    assert {(c.kind, c.axes) for c in across} == {("all-reduce", ("replica",))}
    assert sum(c.count * c.bytes for c in across) == pytest.approx(elements(shapes), rel=0.01)
