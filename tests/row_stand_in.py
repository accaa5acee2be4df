"""The kernels of rows for GPU, by the same arithmetic on whole rows.

Their interpreter calls back, in order, which JAX lets no primitive of ours contain; so what is
around the kernels is tested with this in their place.
"""

import jax.numpy as jnp

from normax.kernels import mosaic_gpu, row_arithmetic

supports = mosaic_gpu.supports


def total(wanted):
    reduce = {"add": jnp.sum, "max": jnp.max}
    return [
        reduce[op](row_arithmetic.combine(op, pieces), axis=-1, keepdims=True)
        for op, pieces in wanted
    ]


def rule_and_piece(x, centered, epsilon):
    rule = row_arithmetic.Rule(x.shape[-1], centered, epsilon, x.dtype != jnp.float16, (None,))
    return rule, piece(x, x.ndim)


def piece(value, ndim):
    if value is None:
        return None
    value = value.astype(jnp.float32)
    return [jnp.expand_dims(value, tuple(range(ndim - value.ndim)))]


def forward(x, scale, bias, *, centered, epsilon, dtype, interpret):
    assert interpret
    rule, entries = rule_and_piece(x, centered, epsilon)
    parameters = piece(scale, x.ndim), piece(bias, x.ndim)
    [y], _, _ = row_arithmetic.forward(rule, entries, *parameters, total)
    return y.astype(dtype)


def backward(x, scale, dy, *, centered, epsilon, interpret):
    assert interpret
    rule, entries = rule_and_piece(x, centered, epsilon)
    dy = dy.astype(jnp.float32)
    [dx], [share] = row_arithmetic.backward(rule, entries, piece(scale, x.ndim), [dy], total)
    rows = tuple(range(x.ndim - 1))
    return dx.astype(x.dtype), jnp.sum(share, rows), jnp.sum(dy, rows)


def add_forward(x, residual, scale, bias, *, dtype, **options):
    total = (x.astype(jnp.float32) + residual.astype(jnp.float32)).astype(x.dtype)
    return total, forward(total, scale, bias, dtype=dtype, **options)


def add_backward(s, scale, dy, ds, **options):
    dx, *sums = backward(s, scale, dy, **options)
    return dx + ds.astype(dx.dtype), *sums
