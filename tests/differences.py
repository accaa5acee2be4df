"""Derivatives by differences: forwards, backwards and twice, in one compiled function."""

import jax
import jax.numpy as jnp
import numpy as np

STEP = 1e-5


def check_derivatives(f, args, rtol=1e-6, atol=1e-7):
    """Holds the derivatives of `f(*args)`, float64, to central differences along a direction.

    The first derivative forwards and backwards, and the second forwards over backwards and
    backwards over backwards; counts and other ints among the outputs have none.
    """
    floats = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    real = lambda out: [leaf for leaf in jax.tree.leaves(out) if floats(leaf)]
    direction = jax.tree.map(lambda a: jnp.cos(7 * a + 1), args)

    def inner(a, b):
        parts = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
        return sum((jnp.sum(u * v) for u, v in parts), jnp.zeros(()))

    def loss(args):
        out = real(f(*args))
        return inner(out, [jnp.cos(jnp.arange(0.5, v.size)).reshape(v.shape) for v in out])

    @jax.jit
    def every(args):
        y, dy = jax.jvp(lambda *args: real(f(*args)), args, direction)
        _, along = jax.jvp(loss, (args,), (direction,))
        g, forwards = jax.jvp(jax.grad(loss), (args,), (direction,))
        backwards = jax.grad(lambda args: inner(jax.grad(loss)(args), direction))(args)
        return {"y": y, "dy": dy, "along": along, "g": g, "over": (forwards, backwards)}

    moved = lambda step: every(jax.tree.map(lambda a, t: a + step * t, args, direction))
    here, ahead, behind = every(args), moved(STEP), moved(-STEP)
    slope = lambda name: jax.tree.map(lambda a, b: (a - b) / (2 * STEP), ahead[name], behind[name])

    def agree(ours, theirs):
        for left, right in zip(*map(jax.tree.leaves, (ours, theirs)), strict=True):
            size = max(np.abs(right).max(initial=0), 1)
            np.testing.assert_allclose(left, right, rtol=rtol, atol=atol * size)

    agree(here["dy"], slope("y"))
    agree(here["along"], inner(here["g"], direction))
    for second in here["over"]:
        agree(second, slope("g"))
