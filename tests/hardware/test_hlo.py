"""hlo: replica groups against NumPy, loops, starts and dones, fusions; programs of known traffic."""

from __future__ import annotations

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from spmd.hardware import hlo
from spmd.hardware.hlo import groups

pytestmark = pytest.mark.usefixtures("devices")

AXES = {"replica": 1, "data": 2, "fsdp": 4, "tensor": 3}


def blocks(axes: dict[str, int], over: tuple[str, ...]) -> np.ndarray:
    """Devices that differ in `over` only, a row for each of the other places."""
    ids = np.arange(math.prod(axes.values())).reshape(tuple(axes.values()))
    moved = [i for i, axis in enumerate(axes) if axis in over]
    rest = [i for i, axis in enumerate(axes) if axis not in over]
    size = math.prod(axes[axis] for axis in over)
    return ids.transpose(*rest, *moved).reshape(-1, size)


# ---- replica groups

sizes = st.lists(st.integers(1, 4), min_size=1, max_size=4)


@given(sizes, st.data())
def test_every_product_of_axes_is_found_in_every_form(dims, data):
    axes = {f"a{i}": size for i, size in enumerate(dims)}
    over = tuple(data.draw(st.lists(st.sampled_from(list(axes)), unique=True, min_size=1)))
    over = tuple(axis for axis in axes if axis in over)
    wanted = blocks(axes, over)
    named = tuple(axis for axis in over if axes[axis] > 1)
    mesh = ",".join(f"'{axis}'={size}" for axis, size in axes.items())
    order = [i for i, a in enumerate(axes) if a not in over] + [
        i for i, a in enumerate(axes) if a in over
    ]
    forms = {
        "list": "{" + ",".join("{" + ",".join(map(str, row)) + "}" for row in wanted) + "}",
        "iota": f"[{wanted.shape[0]},{wanted.shape[1]}]<=[{','.join(map(str, dims))}]"
        f"T({','.join(map(str, order))})",
        "mesh": f"mesh[{mesh}] {{{','.join(repr(axis) for axis in over)}}}",
    }
    for form, text in forms.items():
        found = groups.devices(text, math.prod(dims))
        assert found is not None
        np.testing.assert_array_equal(found, wanted, form)
        assert groups.spanned_axes(found, axes) == named


@pytest.mark.parametrize(
    "text, wanted",
    [
        ("{}", [[0, 1, 2, 3, 4, 5, 6, 7]]),
        ("[2,4]<=[8]", [[0, 1, 2, 3], [4, 5, 6, 7]]),
        ("[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['x'=4,'y'=2] {'x'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        # A part of an axis: the outer half of x, then its inner half.
        ("mesh['x'=4,'y'=2] {'x':(1)2}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
        ("mesh['x'=4,'y'=2] {'x':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        # The mesh's own order of devices: its first row is 0 2 4 6.
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("mesh['a'=2,'b'=2], device_ids=(3,1,2,0) {'b'}", [[3, 1], [2, 0]]),
        ("{{0,1},{2,3,4}}", None),
    ],
)
def test_forms_of_replica_groups(text, wanted):
    found = groups.devices(text, 8)
    assert (None if found is None else found.tolist()) == wanted


def test_groups_that_are_no_product_of_axes_have_no_name():
    axes = {"data": 2, "tensor": 4}
    assert (
        groups.spanned_axes(np.array([[0, 1], [2, 3], [4, 5], [6, 7]]), axes) == ()
    )  # half of tensor
    assert groups.spanned_axes(np.array([[0, 5], [1, 4]]), axes) == ()  # a diagonal
    assert groups.spanned_axes(np.array([[0, 9]]), axes) == ()  # no such device
    assert groups.spanned_axes(None, axes) == ()


def test_an_unknown_form_is_named():
    with pytest.raises(ValueError, match=r"unknown form of replica groups: spiral\(3\)"):
        groups.devices("spiral(3)", 8)


def test_a_permute_crosses_the_axes_along_which_it_sends():
    ring = "{" + ",".join(f"{{{i},{(i + 3) % 24}}}" for i in range(24)) + "}"
    along = lambda text: groups.crossed_axes(groups.pairs(text), AXES)
    assert along("{{0,1},{1,2}}") == ("tensor",)
    assert along("{{0,3},{3,6},{6,9}}") == ("fsdp",)
    assert along(ring) == ("data", "fsdp")


# ---- texts

HEADER = "HloModule small, entry_computation_layout={(f32[8]{0})->f32[8]{0}}\n"
SUM = """
%sum (x: f32[], y: f32[]) -> f32[] {
  %x = f32[] parameter(0)
  %y = f32[] parameter(1)
  ROOT %z = f32[] add(%x, %y)
}
"""
TWO = {"data": 2, "tensor": 4}
OVER_TENSOR = "replica_groups=[2,4]<=[8], use_global_device_ids=true, to_apply=%sum"


def module(body: str, before: str = "", scheduled: bool = False) -> str:
    header = HEADER.replace("small,", "small, is_scheduled=true,") if scheduled else HEADER
    return f"{header}{SUM}{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def loop(compare: str, start: int = 0, step: int = 1, bound: str = "constant(5)") -> str:
    """A while-loop with one all-reduce in its body."""
    before = f"""
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {{
  %s = (s32[], f32[8]{{0}}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %v = f32[8]{{0}} get-tuple-element(%s), index=1
  %step = s32[] constant({step})
  %next = s32[] add(%i, %step)
  %r = f32[8]{{0}} all-reduce(%v), channel_id=1, {OVER_TENSOR}
  ROOT %t = (s32[], f32[8]{{0}}) tuple(%next, %r)
}}

%condition (c: (s32[], f32[8])) -> pred[] {{
  %c = (s32[], f32[8]{{0}}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %n = s32[] {bound}
  ROOT %lt = pred[] compare({compare}
}}
"""
    return module(
        f"""  %p = f32[8]{{0}} parameter(0)
  %zero = s32[] constant({start})
  %copied = s32[] copy(%zero)
  %first = (s32[], f32[8]{{0}}) tuple(%copied, %p)
  %w = (s32[], f32[8]{{0}}) while(%first), condition=%condition, body=%body
  ROOT %out = f32[8]{{0}} get-tuple-element(%w), index=1""",
        before,
    )


@pytest.mark.parametrize(
    "text, times",
    [
        (loop("%j, %n), direction=LT"), 5),
        (loop("%n, %j), direction=GT"), 5),
        (loop("%c#0, %n), direction=LT").replace("add(%i,", "add(%s#0,"), 5),
        (loop("%j, %n), direction=LE"), 6),
        (loop("%j, %n), direction=NE"), 5),
        (loop("%j, %n), direction=LT", start=2), 3),
        (loop("%j, %n), direction=LT", step=2), 3),
        (loop("%j, %n), direction=GT", start=9, step=-1), 4),
        (loop("%j, %n), direction=LT", start=7), 0),
    ],
)
def test_a_loop_counts_its_trips(text, times):
    program = hlo.read(text, TWO)
    assert [c.count for c in program.collectives] == [times] and program.endless == 0


def test_a_bound_that_comes_through_the_state_of_the_loops_around():
    """As the TPU compiler's "wide" loops have it: constants are handed from loop to loop."""
    state = "(s32[], s32[])"

    def body(name: str, work: str) -> str:
        return f"""
%{name} (s: {state}) -> {state} {{
  %s = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %n = s32[] get-tuple-element(%s), index=1
  %one = s32[] constant(1)
  %next = s32[] add(%i, %one)
  {work}
  ROOT %t = (s32[], s32[]) tuple(%next, %n)
}}
"""

    condition = """
%condition (c: (s32[], s32[])) -> pred[] {
  %c = (s32[], s32[]) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %m = s32[] get-tuple-element(%c), index=1
  ROOT %lt = pred[] compare(%j, %m), direction=LT
}
"""
    inner = body("inner", f"%r = s32[] all-reduce(%i), channel_id=1, {OVER_TENSOR}")
    begin = """%zero = s32[] constant(0)
  %first = (s32[], s32[]) tuple(%zero, %n)
  %w = (s32[], s32[]) while(%first), condition=%condition, body=%BODY"""
    outer = body("outer", begin.replace("BODY", "inner"))
    main = f"  %n = s32[] constant(3)\n  {begin.replace('BODY', 'outer')}"
    text = module(
        f"{main}\n  ROOT %o = s32[] get-tuple-element(%w), index=1", inner + condition + outer
    )
    program = hlo.read(text, TWO)
    assert program.endless == 0 and [c.count for c in program.collectives] == [9]


def test_a_known_trip_count_is_taken_and_an_endless_loop_said():
    endless = loop("%j, %n), direction=LT", bound="custom-call(%j)")
    program = hlo.read(endless, TWO)
    assert program.endless == 1 and [c.count for c in program.collectives] == [1]
    known = endless.replace(
        "body=%body", 'body=%body, backend_config={"known_trip_count":{"n":"7"}}'
    )
    program = hlo.read(known, TWO)
    assert program.endless == 0 and [c.count for c in program.collectives] == [7]


def test_a_start_and_its_done_are_one_collective_hidden_by_work_between():
    body = """  %p = f32[8]{{0}} parameter(0)
  %s = (f32[8]{{0}}, f32[32]{{0}}) all-gather-start(%p), replica_groups=[2,4]<=[8], dimensions={{0}}
  {between}
  %d = f32[32]{{0}} all-gather-done(%s)
  ROOT %out = f32[8]{{0}} slice(%d), slice={{[0:8]}}"""
    work = '%f = f32[8]{0} custom-call(%p), custom_call_target="work"'
    for between, hidden in ((work, True), ("%n = f32[8]{0} negate(%p)", False)):
        text = module(body.format(between=between), scheduled=True)
        (one,) = hlo.read(text, TWO).collectives
        assert (one.kind, one.axes, one.group, one.bytes) == ("all-gather", ("tensor",), 4, 128)
        assert one.wire_bytes == 96 and one.overlapped is hidden and one.dtype == "f32"


def test_an_asynchronous_computation_counts_once():
    before = """
%wrapped (q: f32[8]) -> f32[2] {
  %q = f32[8]{0} parameter(0)
  ROOT %rs = f32[2]{0} reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%sum
}
"""
    body = """  %p = f32[8]{0} parameter(0)
  %s = ((f32[8]{0}), f32[2]{0}, u32[]) async-start(%p), calls=%wrapped
  %w = f32[8]{0} custom-call(%p), custom_call_target="work"
  %u = ((f32[8]{0}), f32[2]{0}, u32[]) async-update(%s), calls=%wrapped
  %d = f32[2]{0} async-done(%u), calls=%wrapped
  ROOT %out = f32[8]{0} pad(%d, %w)"""
    (one,) = hlo.read(module(body, before, scheduled=True), TWO).collectives
    assert (one.kind, one.bytes, one.overlapped) == ("reduce-scatter", 32, True)


def test_one_collective_spread_over_fusions_counts_once_and_is_hidden():
    part = """
%part.{i} (q: f32[8]) -> f32[32] {{
  %q = f32[8]{{0}} parameter(0)
  ROOT %g = f32[32]{{0}} all-gather(%q), channel_id={channel}, replica_groups=[2,4]<=[8], dimensions={{0}}
}}
"""
    before = "".join(part.format(i=i, channel=c) for i, c in enumerate((5, 5, 6)))
    body = """  %p = f32[8]{0} parameter(0)
  %a = f32[32]{0} fusion(%p), kind=kCustom, calls=%part.0, metadata={op_name="first"}
  %b = f32[32]{0} fusion(%p), kind=kCustom, calls=%part.1
  %c = f32[32]{0} fusion(%p), kind=kCustom, calls=%part.2
  ROOT %out = f32[8]{0} slice(%c), slice={[0:8]}"""
    found = hlo.read(module(body, before, scheduled=True), TWO).collectives
    assert [(c.bytes, c.overlapped, c.op_name) for c in found] == [
        (128, True, "first"),
        (128, False, ""),
    ]


SLICED = f"""  %p = f32[8]{{0}} parameter(0)
  %r = f32[8]{{0}} all-reduce(%p), channel_id=1, {OVER_TENSOR}
  %id = u32[] partition-id()
  %t = s32[8]{{0}} constant({{0, 2, 4, 6, 0, 2, 4, 6}})
  %at = s32[1]{{0}} dynamic-slice(%t, %id), dynamic_slice_sizes={{1}}
  %i = s32[] reshape(%at)
  %mine = f32[SIZE]{{0}} dynamic-slice(%r, %i), dynamic_slice_sizes={{SIZE}}
  ROOT %out = f32[8]{{0}} pad(%mine, %OTHER)"""


@pytest.mark.parametrize(
    "size, other, scheduled, kind",
    [
        ("2", "p", False, "reduce-scatter"),
        ("2", "r", False, "all-reduce"),  # the whole sum is read too
        ("4", "p", False, "all-reduce"),  # the group has four devices, half is kept
        ("2", "p", True, "all-reduce"),  # no pass is to come
    ],
)
def test_a_sum_of_which_each_device_keeps_its_slice_is_a_reduce_scatter(
    size, other, scheduled, kind
):
    body = SLICED.replace("SIZE", size).replace("OTHER", other)
    (one,) = hlo.read(module(body, scheduled=scheduled), TWO).collectives
    assert one.kind == kind
    assert one.wire_bytes == 24 * (2 if kind == "all-reduce" else 1)


def test_a_sum_of_all_reduces_is_one_until_the_module_is_final():
    body = f"""  %p = f32[8]{{0}} parameter(0)
  %a = f32[8]{{0}} all-reduce(%p), channel_id=1, {OVER_TENSOR}
  %q = f32[8]{{0}} negate(%p)
  %b = f32[8]{{0}} all-reduce(%q), channel_id=2, {OVER_TENSOR}
  %ab = f32[8]{{0}} add(%a, %b)
  %c = f32[8]{{0}} all-reduce(%q), channel_id=3, {OVER_TENSOR}
  %other = f32[8]{{0}} all-reduce(%q), channel_id=4, replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%sum
  %abc = f32[8]{{0}} add(%ab, %c)
  ROOT %out = f32[8]{{0}} add(%abc, %other)"""
    count = lambda scheduled: sorted(
        c.axes for c in hlo.read(module(body, scheduled=scheduled), TWO).collectives
    )
    assert count(False) == [("data",), ("tensor",)]
    assert count(True) == [("data",), ("tensor",), ("tensor",), ("tensor",)]


def test_a_sum_of_copies_of_all_reduces_is_one():
    """The partitioner leaves copies within a shard_map."""
    body = f"""  %p = f32[8]{{0}} parameter(0)
  %a = f32[8]{{0}} all-reduce(%p), channel_id=1, {OVER_TENSOR}
  %a.1 = f32[8]{{0}} copy(%a)
  %q = f32[8]{{0}} negate(%p)
  %b = f32[8]{{0}} all-reduce(%q), channel_id=2, {OVER_TENSOR}
  %b.1 = f32[8]{{0}} copy(%b)
  %ab = f32[8]{{0}} add(%a.1, %b.1)
  %ab.1 = f32[8]{{0}} copy(%ab)
  %c = f32[8]{{0}} all-reduce(%q), channel_id=3, {OVER_TENSOR}
  %c.1 = f32[8]{{0}} copy(%c)
  ROOT %abc = f32[8]{{0}} add(%ab.1, %c.1)"""
    (one,) = hlo.read(module(body), TWO).collectives
    assert one.axes == ("tensor",)


def test_a_permute_of_each_device_to_itself_sends_nothing():
    body = """  %p = f32[8]{0} parameter(0)
  %a = f32[8]{0} collective-permute(%p), channel_id=1, source_target_pairs={{0,0},{1,1}}
  ROOT %b = f32[8]{0} collective-permute(%a), channel_id=2, source_target_pairs={{0,1},{1,1}}"""
    (one,) = hlo.read(module(body), TWO).collectives
    assert one.axes == ("tensor",)


def test_a_computation_may_run_on_a_part_of_the_chip_of_its_own():
    apart = """
%scatter (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%q)
}, execution_thread="sparsecore"

%fused (q: f32[8]) -> f32[8] {
  %q = f32[8]{0} parameter(0)
  ROOT %n = f32[8]{0} negate(%q)
}
"""
    body = f"""  %p = f32[8]{{0}} parameter(0)
  %f = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%fused
  ROOT %r = f32[8]{{0}} all-reduce(%f), channel_id=1, {OVER_TENSOR}"""
    (one,) = hlo.read(module(body, before=apart, scheduled=True), TWO).collectives
    assert one.bytes == 32


def test_elements_named_in_short_are_elements():
    body = f"""  %p = f32[8]{{0}} parameter(0)
  %t = ((f32[8]{{0}}, bf16[4,2]{{1,0:T(8,128)(2,1)}}), s32[]) custom-call(%p), custom_call_target="work"
  %r = bf16[4,2]{{1,0}} all-reduce(%t#0#1), channel_id=1, {OVER_TENSOR}
  ROOT %o = f32[8]{{0}} copy(%t#0#0)"""
    (one,) = hlo.read(module(body), TWO).collectives
    assert (one.bytes, one.dtype) == (16, "bf16")


def test_attributes_of_a_kernel_may_go_over_several_lines():
    body = f"""  %p = f32[8]{{0}} parameter(0)
  %k = f32[8]{{0}} custom-call(%p), custom_call_target="tpu_custom_call", backend_config={{"a":{{
"xprof_metadata":"x"
}}}}, metadata={{op_name="kernel"}}
  ROOT %r = f32[8]{{0}} all-reduce(%k), channel_id=1, {OVER_TENSOR}"""
    (one,) = hlo.read(module(body, scheduled=True), TWO).collectives
    assert one.bytes == 32 and one.op_name == "kernel"


BRANCH = """
%branch.{n} (q: f32[{n}]) -> f32[{n}] {{
  %q = f32[{n}]{{0}} parameter(0)
  ROOT %r = f32[{n}]{{0}} all-reduce(%q), channel_id={n}, replica_groups={{}}, to_apply=%sum
}}
"""
SILENT = """
%branch.4 (q: f32[8]) -> f32[8] {
  ROOT %q = f32[8]{0} parameter(0)
}
"""
CHOICE = """  %p = f32[8]{0} parameter(0)
  %i = s32[] constant(0)
  ROOT %out = f32[8]{0} conditional(%i, %p, %p), branch_computations={%branch.4, %branch.8}"""


def test_the_dearest_branch_of_a_conditional_counts():
    program = hlo.read(module(CHOICE, BRANCH.format(n=4) + BRANCH.format(n=8)), TWO)
    (one,) = program.collectives
    assert one.bytes == 32 and one.axes == ("data", "tensor") and one.group == 8


PERIODIC = """  %p = f32[8]{0} parameter(0)
  %step = s32[] parameter(1)
  %period = s32[] constant(50)
  %rest = s32[] remainder(%step, %period)
  %last = s32[] constant(49)
  %due = pred[] compare(%rest, %last), direction=EQ
  %i = s32[] convert(%due)
  ROOT %out = f32[8]{0} conditional(%i, %p, %p), branch_computations={%branch.4, %branch.8}"""


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({}, 1 / 50),
        ({"direction=EQ": "direction=NE"}, 49 / 50),
        ({"conditional(%i": "conditional(%due"}, 1 / 50),  # jax orders them by number all the same
        (
            {
                "conditional(%i": "conditional(%due",
                "branch_computations={%branch.4, %branch.8}": "true_computation=%branch.8,"
                " false_computation=%branch.4",
            },
            1 / 50,
        ),
        ({"remainder": "divide"}, 1),  # unknown: as if always
    ],
)
def test_what_every_nth_step_sends_counts_by_its_part(changes, part):
    body = PERIODIC
    for old, new in changes.items():
        body = body.replace(old, new)
    (one,) = hlo.read(module(body, SILENT + BRANCH.format(n=8)), TWO).collectives
    assert one.count == pytest.approx(part)


def test_the_period_of_a_compiled_conditional_is_read_inside_a_loop(devices):
    """Before and after the compiler has fused the condition."""
    cut = NamedSharding(jax.make_mesh((8,), ("x",), axis_types=(AxisType.Auto,)), P("x"))

    def step(carry, _):
        count, x = carry
        add = lambda x: x + x.sum()
        x = jax.lax.cond(jax.lax.rem(count + 1, jnp.int32(5)) == 0, add, lambda x: x, x)
        return (count + 1, x), None

    def steps(count, x):
        return jax.lax.scan(step, (count, x), length=10)[0]

    lowered = jax.jit(steps, in_shardings=(None, cut), out_shardings=(None, cut)).lower(
        jnp.int32(0), jnp.zeros(64)
    )
    (one,) = hlo.read(lowered.compile().as_text(), {"x": 8}).collectives
    assert one.kind == "all-reduce" and one.count == pytest.approx(2)


def test_text_that_is_no_module_is_refused():
    with pytest.raises(ValueError, match="must begin with HloModule"):
        hlo.read("func.func @main()", TWO)


def test_the_source_is_the_innermost_line_of_our_own():
    tables = """
FileNames
1 "/home/a/experiments/mine.py"
2 "/usr/lib/python3.11/site-packages/flax/nnx/module.py"
3 "/home/a/spmd/models/layers/__init__.py"

FileLocations
1 {file_name_id=1 function_name_id=1 line=26 end_line=26 column=1 end_column=2}
2 {file_name_id=2 function_name_id=1 line=99 end_line=99 column=1 end_column=2}
3 {file_name_id=3 function_name_id=1 line=48 end_line=48 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}
3 {file_location_id=3 parent_frame_id=3}
4 {file_location_id=2 parent_frame_id=1}
5 {file_location_id=3 parent_frame_id=1}
"""
    said = 'replica_groups={{}}, metadata={{op_name="o" stack_frame_id={i}}}'
    line = f"  %r{{i}} = f32[8]{{{{0}}}} all-reduce(%p), {said}"
    lines = "\n".join(line.format(i=i) for i in (3, 4, 5, 6))
    text = module(f"  %p = f32[8]{{0}} parameter(0)\n{lines}\n  ROOT %o = f32[8]{{0}} copy(%p)")
    found = hlo.read(text.replace("\n", f"\n{tables}\n", 1), TWO).collectives
    assert [c.source for c in found] == [
        "experiments/mine.py:26",  # through a library and through plumbing
        "",
        "spmd/models/layers/__init__.py:48",  # nothing else to be named
        "",
    ]


# ---- FLOPs


@pytest.mark.parametrize(
    "stride, pad, dilate, spread", list(itertools.product((1, 2), (0, 1), (1, 2), (1, 2)))
)
def test_products_of_a_convolution_are_counted_one_by_one(stride, pad, dilate, spread):
    from spmd.hardware.hlo import work

    size, kernel = 7, 3
    out = ((size - 1) * dilate + 1 + 2 * pad - (kernel - 1) * spread - 1) // stride + 1
    lanes = np.zeros((size - 1) * dilate + 1)
    lanes[::dilate] = 1
    padded = np.pad(lanes, pad)
    wanted = sum(padded[o * stride + k * spread] for o in range(out) for k in range(kernel))
    assert work._pairs(size, out, kernel, stride, pad, dilate, spread) == wanted


def test_flops_of_scanned_products_are_those_of_the_loop():
    def run(x_BD, w_LDD):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x_BD, w_LDD)[0]

    shapes = jax.ShapeDtypeStruct((16, 32), "float32"), jax.ShapeDtypeStruct((6, 32, 32), "float32")
    text = jax.jit(run).lower(*shapes).compile().as_text()
    assert text is not None
    assert hlo.read(text, {"data": 1}).flops == 2 * 6 * 16 * 32 * 32


# ---- programs


def test_explicit_collectives_are_read_from_a_compiled_program(devices):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), (AxisType.Auto,) * 2, devices=devices)

    def each(x):
        x = jax.lax.psum(x, "data")
        y = jax.lax.all_gather(x, "tensor", tiled=True)
        y = jax.lax.psum_scatter(y, "tensor", tiled=True)
        y = jax.lax.all_to_all(y.reshape(4, -1), "tensor", 0, 0, tiled=True)
        turn = [(i, (i + 1) % 4) for i in range(4)]
        return jax.lax.ppermute(y.reshape(-1), "tensor", turn)

    spec = P(("data", "tensor"))
    run = jax.shard_map(each, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    x = jax.ShapeDtypeStruct((8 * 64,), "float32", sharding=NamedSharding(mesh, spec))
    text = jax.jit(run).lower(x).compile().as_text()
    assert text is not None
    found = {
        c.kind: (c.axes, c.group, c.bytes) for c in hlo.read(text, dict(mesh.shape)).collectives
    }
    assert found == {
        "all-reduce": (("data",), 2, 256),
        "all-gather": (("tensor",), 4, 1024),
        "reduce-scatter": (("tensor",), 4, 1024),
        "all-to-all": (("tensor",), 4, 256),
        "collective-permute": (("tensor",), 4, 256),
    }
