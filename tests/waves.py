"""A function, as plain JAX and with kernels, that the tools of kernels are tested on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax.custom_derivatives import SymbolicZero
from jax.experimental import pallas as pl

from normax.kernels.dispatch import by_platform
from normax.kernels.linear import linear
from normax.kernels.sharding import sharded


def forward(residuals, dx, dscale):
    x, scale = residuals
    moves = jnp.zeros_like(x)
    if dx is not None:
        moves += jnp.cos(x) * jnp.broadcast_to(scale, x.shape) * dx
    if dscale is not None:
        moves += jnp.sin(x) * jnp.broadcast_to(dscale, x.shape)
    return moves


def backward(residuals, dy):
    x, scale = residuals
    dscale = jnp.sum(jnp.sin(x) * dy, range(x.ndim - scale.ndim))
    return jnp.cos(x) * jnp.broadcast_to(scale, x.shape) * dy, dscale


def kernel(body, kinds, *operands):
    """A stand-in for a kernel, which takes row after row: a partitioner gathers what it reads.

    Args:
      body: function of a row of each operand.
      kinds: of each output, "rows" or "sum".
      *operands: rows, or a vector.
    """
    rows, size = operands[0].shape
    one, same = pl.BlockSpec((1, size), lambda i: (i, 0)), pl.BlockSpec((1, size), lambda i: (0, 0))
    vary = {"manual_axis_type": jax.typeof(operands[0]).manual_axis_type}

    def run(*refs):
        outputs = body(*(ref[...] for ref in refs[: len(operands)]))
        for kind, ref, out in zip(kinds, refs[len(operands) :], outputs, strict=True):
            before = ref[...] if kind == "sum" else jnp.zeros_like(out)
            ref[...] = jnp.where(pl.program_id(0) == 0, 0, before) + out

    outputs = pl.pallas_call(
        run,
        grid=(rows,),
        in_specs=[one if x.ndim == 2 else same for x in operands],
        out_specs=[one if kind == "rows" else same for kind in kinds],
        out_shape=[
            jax.ShapeDtypeStruct((rows if kind == "rows" else 1, size), operands[0].dtype, **vary)
            for kind in kinds
        ],
        interpret=True,
    )(*(x if x.ndim == 2 else x[None] for x in operands))
    return [out if kind == "rows" else out[0] for kind, out in zip(kinds, outputs, strict=True)]


def by_rows(x):
    return x.reshape(-1, x.shape[-1])


def forward_kernel(x, scale):
    (y,) = kernel(lambda x, scale: [jnp.sin(x) * scale], ("rows",), by_rows(x), scale)
    return y.reshape(x.shape)


def backward_kernel(x, scale, dy):
    def body(x, scale, dy):
        return jnp.cos(x) * scale * dy, jnp.sin(x) * dy

    dx, dscale = kernel(body, ("rows", "sum"), by_rows(x), scale, by_rows(dy))
    return dx.reshape(x.shape), dscale


def plain(x, scale):
    return jnp.sin(x) * jnp.broadcast_to(scale, x.shape)


forward_sharded = sharded(forward_kernel, "... d, d -> ... d", whole="d")
backward_sharded = sharded(backward_kernel, "... d, d, ... d -> ... d, d", whole="d")


def backward_on_cpu(residuals, dy):
    return backward_sharded(*residuals, dy)


backward_by_platform = by_platform(backward, sharded=True, cpu=backward_on_cpu)


def moves_of(tangents):
    return tuple(None if isinstance(t, SymbolicZero) else t for t in tangents)


@jax.custom_jvp
def wave(x, scale):
    return by_platform(plain, sharded=True, tpu=plain)(x, scale)


@functools.partial(wave.defjvp, symbolic_zeros=True)
def _wave_jvp(primals, tangents):
    return wave(*primals), linear(forward, backward, primals, moves_of(tangents))


@jax.custom_jvp
def kernel_wave(x, scale):
    return by_platform(plain, sharded=True, cpu=forward_sharded)(x, scale)


@functools.partial(kernel_wave.defjvp, symbolic_zeros=True)
def _kernel_wave_jvp(primals, tangents):
    moves = linear(forward, backward_by_platform, primals, moves_of(tangents))
    return kernel_wave(*primals), moves


WAVES = {"wave": wave, "kernel_wave": kernel_wave}


def arrays():
    return jax.random.normal(jax.random.key(0), (8, 4, 6)), jnp.arange(1.0, 7.0)


def close(got, wanted, tolerance=2e-5):
    got, wanted = jax.tree.leaves(got), jax.tree.leaves(wanted)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), tolerance, tolerance)
