"""The kernels of groups for GPU, by the same arithmetic on whole arrays.

As with those of rows, their interpreter cannot run within a primitive of ours.
"""

import jax.numpy as jnp

from normax.kernels import entrywise, mosaic_gpu_groups, row_arithmetic

supports_groups = mosaic_gpu_groups.supports_groups


def whole(op, piece):
    """Returns the totals of groups as those of rows, which XLA adds up more exactly."""
    reduce = {"add": jnp.sum, "max": jnp.max}[op]
    examples, positions, groups, members = piece.shape
    entries = piece.swapaxes(1, 2).reshape(examples, 1, groups, positions * members)
    return reduce(entries, axis=3, keepdims=True)


def total(wanted):
    return [whole(op, row_arithmetic.combine(op, pieces)) for op, pieces in wanted]


def rule_and_piece(x, centered, epsilon):
    length = x.shape[1] * x.shape[3]
    rule = row_arithmetic.Rule(length, centered, epsilon, x.dtype != jnp.float16, (None,))
    return rule, [x.astype(jnp.float32)]


def parameter(value):
    return None if value is None else [value.astype(jnp.float32)[None, None]]


def forward_groups(
    x, scale=None, bias=None, *, centered, epsilon, dtype=None, activation=None, interpret=False
):
    assert interpret
    rule, entries = rule_and_piece(x, centered, epsilon)
    parameters = parameter(scale), parameter(bias)
    [y], _, _ = row_arithmetic.forward(rule, entries, *parameters, total)
    y = y if activation is None else entrywise.apply(activation, y)
    return y.astype(x.dtype if dtype is None else dtype)


def backward_groups(x, scale, bias, dy, *, centered, epsilon, activation=None, interpret=False):
    assert interpret
    rule, entries = rule_and_piece(x, centered, epsilon)
    dy = [dy.astype(jnp.float32)]
    if activation is None:
        [dx], [share] = row_arithmetic.backward(rule, entries, parameter(scale), dy, total)
    else:
        parameters = parameter(scale), parameter(bias)
        [dx], [share], dy = row_arithmetic.backward_through(
            rule, entries, *parameters, dy, total, activation
        )
    return dx.astype(x.dtype), jnp.sum(share, (0, 1)), jnp.sum(dy[0], (0, 1))
