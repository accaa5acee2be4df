"""Rows that registers do not hold, or bulk copies do not bring: as `test_kernels_gpu`, for them.

An interpreted warpgroup waits in a thread of XLA's, of which there are as many as processors, so
that several programs of several warpgroups could wait for ever: here each kernel has one program.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
import test_kernels_gpu as short
from test_accuracy import GRID, stress, units
from test_kernels_gpu import (
    ENDS,
    by_kernel,
    check,
    check_rows,
    compiled,
    data,
    for_h200,
    races,
    sized,
)

from normax.kernels import mosaic_gpu as kernels
from normax.kernels import mosaic_gpu_long as long
from normax.kernels import row_arithmetic as arithmetic
from normax.kernels import row_passes as passes

races = races  # of the interpreter: this file's too
# Of a lane, of a few, of a warp, of a warpgroup, of four; sums on chip and by XLA.
CASES = [
    ((5, 1), "float32", False, ("forward", "add_forward")),
    ((2, 2, 3), "bfloat16", True, ("backward", "add_forward")),
    ((6, 65), "float32", False, ("forward", "add_backward")),
    ((2, 1001), "float16", True, ("forward",)),
    ((2, 1501), "float32", True, ("backward",)),
    ((2, 16400), "bfloat16", False, ("add_forward",)),
    ((2, 20000), "float16", True, ("forward",)),
]
if ENDS:  # older interpreters take long
    CASES += [
        ((1, 8193), "bfloat16", True, ("backward",)),
        ((1, 40000), "float32", True, ("add_backward",)),
    ]


@pytest.fixture(autouse=True)
def one_program(monkeypatch):
    """Has one program do all rows."""
    make = long.make_plan
    monkeypatch.setattr(long, "make_plan", lambda *args: make(*args)._replace(programs=1))


@pytest.mark.parametrize(("shape", "dtype", "centered", "which"), CASES)
def test_rows(shape, dtype, centered, which):
    check(shape, dtype, centered, True, which)


def test_rows_of_one_entry_are_zero():
    x, dy, _, scale, _ = data((5, 1), "float32")
    how = {"centered": True, "epsilon": 1e-5, "interpret": True}
    dx, dscale, _ = jax.block_until_ready(
        jax.jit(functools.partial(kernels.backward, **how))(x, scale, dy)
    )
    np.testing.assert_array_equal(dscale, jnp.zeros(1))
    # A product less itself, rounded, is that rounding.
    assert np.all(np.abs(dx) <= 1e-7 * np.abs(dy * scale[None]) / np.sqrt(1e-5))


def test_hard_rows():
    hard = np.stack([*stress(65).values(), *np.asarray(sized(65))[-3:-1], np.full(65, 3e38)])
    x = jnp.asarray(hard, "float32")
    check_rows(by_kernel, x, data(x.shape, "float32")[1], either=(True,))


def plan_of(length, dtype, backward=True):
    rule = arithmetic.Rule(length, True, 0.0, True)
    x = jnp.zeros(0, dtype)
    if backward:
        task, inputs = kernels._backward_task(rule, x, True, False), [dtype] * 2
    else:
        task, inputs = kernels._forward_task(rule, x, None, True, True, False, False), [dtype]
    return long.make_plan(task, 8, length, inputs, 1)


@pytest.mark.parametrize(
    "length", [*range(1, 70), 1001, 1024, 1025, 2047, 8193, 16400, 40000, 10**6]
)
@pytest.mark.parametrize("dtype", short.DTYPES)
def test_blocks_cover_a_row_once(length, dtype):
    for backward in (True, False):
        plan = plan_of(length, dtype, backward)
        assert plan.block <= length
        assert length % plan.vector == 0
        assert plan.whole >= plan.warpgroups
        assert plan.vector * jnp.dtype(dtype).itemsize <= long.WIDEST
        for whole, rest, among in (
            (plan.whole, length % plan.block, plan.warpgroups),
            (plan.rows // plan.at_once, plan.rows % plan.at_once, plan.programs),
        ):
            shares = [int(long._share(whole, rest, jnp.int32(i), among)) for i in range(among)]
            done = sorted(i + k * among for i, share in enumerate(shares) for k in range(share))
            assert done[:whole] == list(range(whole))
            assert len(done) == whole + (rest > 0)


def test_where_sums_are_kept():
    assert plan_of(24576, "bfloat16").sums_kept
    assert not plan_of(40000, "bfloat16").sums_kept


@functools.partial(jax.jit, static_argnums=(0, 1))
def passes_of(centered, epsilon, x, dy):
    """Returns y and dx by the passes that the kernels make, over blocks that overlap."""
    n = x.shape[-1]
    size = min(n, 300)
    rule = arithmetic.Rule(n, centered, epsilon, x.dtype != jnp.float16)
    arrays = [each.astype(jnp.float32) for each in (x, dy)]
    starts = [min(start, n - size) for start in range(0, n, size)]

    def block(number):
        start = starts[number]
        valid = jnp.arange(start, start + size) >= number * size
        return passes.Block(lambda i: [arrays[i][:, start : start + size]], lambda _: [], [valid])

    def sweep(ops, each):
        found = zip(*[each(block(number)) for number in range(len(starts))], strict=True)
        return [
            arithmetic.combine(op, [piece for pieces in of_blocks for piece in pieces])
            for op, of_blocks in zip(ops, found, strict=True)
        ]

    def write(each):
        made = [each(block(number))[0][0][0] for number in range(len(starts))]
        rest = n - size * (n // size)
        whole = made[: n // size] + ([made[-1][:, size - rest :]] if rest else [])
        results.append(jnp.concatenate(whole, axis=1).astype(x.dtype))

    results = []
    forward = kernels._forward_task(rule, x, None, False, False, False, False)
    for task in (forward, kernels._backward_task(rule, x, False, False)):
        task.passes(short.total, rule, sweep, write, False)
    return tuple(results)


@pytest.mark.parametrize(("scale", "dtype"), GRID)
def test_the_grid(scale, dtype):
    x, dy, *_ = data((6, 1001), dtype, mean=scale[0], deviation=scale[1])
    check_rows(passes_of, x, dy)


def test_stress_rows():
    x = jnp.asarray(np.stack(list(stress(1001).values())), "float32")
    check_rows(passes_of, x, data(x.shape, "float32")[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_constant_rows_are_zero_with_the_right_gradient(dtype):
    values = [0.0, 1 / 3, 1e6, 1e7 + 1, 3e9 / 7, 1e30, -1e30, 3e38]
    x = jnp.broadcast_to(jnp.asarray(values, dtype)[:, None], (8, 1001))
    dy = data(x.shape, dtype)[1]
    y, _ = passes_of(True, 1e-5, x, dy)
    np.testing.assert_array_equal(y, jnp.zeros_like(y))
    check_rows(passes_of, x, dy, either=(True,))


@pytest.mark.parametrize("epsilon", [0.0, 1e-12, 1e-5])
def test_entries_of_any_size(epsilon):
    x = sized(1001)
    x = x[3:] if epsilon else x
    check_rows(passes_of, x, data(x.shape, "float32")[1], epsilon)


def test_sums_by_xla():
    """What is summed outside of the kernel, from the numbers of each row, where a mean is large."""
    x, dy, *_ = data((30, 500), "float32", mean=1e6)
    rule = arithmetic.Rule(500, True, 1e-5, True)
    pivot = x.max(1)
    mean = (x - pivot[:, None]).mean(1)
    var = ((x - pivot[:, None] - mean[:, None]) ** 2).mean(1)
    numbers = [1 / jnp.sqrt(var + 1e-5), jnp.ones(30), pivot, mean]
    dscale, dbias = long._sums_by_xla(rule, x, dy, numbers)
    xhat = reference.forward(short.exact(x, True), x)
    long_dy = np.asarray(dy).astype(np.longdouble)
    assert units(dscale, (long_dy * xhat).sum(0), "float32") <= 16
    assert units(dbias, long_dy.sum(0), "float32") <= 8


@for_h200
@pytest.mark.parametrize(
    ("shape", "limit"),
    # Of three arrays of the size of x; where sums are too long to be kept, five are moved.
    [
        ("65536x1001xbfloat16", 1.06),
        ("8192x16400xbfloat16", 1.06),
        ("4096x40000xfloat32", 5 / 3 + 0.005),
    ],
)
def test_what_an_h200_moves(shape, limit):
    row = compiled(shape, "layer backward")["layer backward"]
    assert row["mosaic_gpu"] == 1
    assert row["over floor"] <= limit
    assert not row.get("spilled")
