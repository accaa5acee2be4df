"""Linear functions whose transpose is written by hand."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import waves
from jax.test_util import check_grads
from waves import WAVES, backward, close, forward, plain, wave

from normax.kernels.linear import linear


@pytest.fixture
def arrays():
    return waves.arrays()


TRANSFORMS = {
    "eager": lambda function: function,
    "jit": jax.jit,
    "remat": jax.checkpoint,
    "rows": lambda function: jax.jit(jax.vmap(function, (0, None))),
    "columns": lambda function: jax.jit(jax.vmap(function, (1, 0), 1)),
    "scales": lambda function: jax.jit(jax.vmap(function, (None, 1))),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_derivatives_of_all_orders(x64, name):
    x = jax.random.normal(jax.random.key(0), (3, 4), jnp.float64)
    scale = jnp.arange(1.0, 5.0)
    if name == "scales":
        scale = jnp.stack([scale, 2 * scale], 1)
    function = TRANSFORMS[name](wave)
    check_grads(function, (x, scale), order=2)


def test_derivatives_in_one_argument(x64):
    x = jax.random.normal(jax.random.key(0), (3, 4), jnp.float64)
    scale = jnp.arange(1.0, 5.0)
    check_grads(jax.jit(lambda x: wave(x, scale)), (x,), order=3)
    check_grads(jax.jit(lambda scale: wave(x, scale)), (scale,), order=2)


def test_hessians(x64):
    x, scale = jax.random.normal(jax.random.key(0), (2, 4), jnp.float64), jnp.arange(1.0, 5.0)
    wanted = jax.hessian(lambda *args: plain(*args).sum(), (0, 1))(x, scale)
    loss = lambda *args: wave(*args).sum()
    both_arguments = lambda derivative: functools.partial(derivative, argnums=(0, 1))
    forth, back = both_arguments(jax.jacfwd), both_arguments(jax.jacrev)
    for outer in (forth, back):
        for inner in (forth, back):
            close(outer(inner(loss))(x, scale), wanted, 1e-12)


def test_the_transpose_is_the_one_given(arrays):
    x, _ = arrays
    wrong = lambda residuals, dy: (2 * dy,)
    function = lambda dx: linear(lambda residuals, dx: residuals * dx, wrong, x, (dx,))
    dx = jnp.ones(x.shape)
    close(function(dx), x)
    once = jax.linear_transpose(function, dx)
    close(once(dx), 2 * dx)
    # Transposed twice it is the function, which is not the transpose's own transpose.
    close(jax.linear_transpose(lambda dy: once(dy)[0], dx)(dx), x)
    # The transpose of what is batched is batched, and sums over what is not.
    times = lambda x, dx: linear(plain_times, wrong, x, (dx,))
    mapped = lambda dx: jax.vmap(times)(x, dx)
    close(jax.linear_transpose(mapped, dx)(dx), 2 * dx)
    shared = lambda dx: jax.vmap(times, (0, None))(x, dx)
    close(jax.linear_transpose(shared, dx[0])(dx), 2 * np.asarray(dx).sum(0))


def plain_times(residuals, dx):
    return residuals * dx


def test_operands_that_are_zero_are_dropped(arrays):
    seen = []

    def function(residuals, dx, dscale):
        seen.append((dx is None, dscale is None))
        return forward(residuals, dx, dscale)

    x, scale = arrays
    apply = lambda dx, dscale: linear(function, backward, (x, scale), (dx, dscale))
    close(jax.jvp(lambda dx: apply(dx, scale), (x,), (x,))[1], forward(arrays, x, None))
    assert set(seen) == {(False, False), (False, True)}
    seen.clear()
    transposed = jax.linear_transpose(lambda dx: apply(dx, None), x)
    close(transposed(x), backward(arrays, x)[0])
    assert set(seen) == {(False, True)}
    text = jax.jit(transposed).lower(x).as_text()
    assert "stablehlo.cosine" in text
    assert "stablehlo.sine" not in text  # of the scale's cotangent
    with pytest.raises(ValueError, match="not None"):
        apply(None, None)


def test_a_cotangent_of_another_type_is_refused(arrays):
    x, _ = arrays
    for wrong in (lambda r, dy: (dy[:1],), lambda r, dy: dy, lambda r, dy: (dy, dy)):
        function = lambda dx, wrong=wrong: linear(plain_times, wrong, x, (dx,))
        with pytest.raises(TypeError, match="`transposed` to return"):
            jax.linear_transpose(function, x)(x)


@pytest.mark.parametrize("which", ["wave", "kernel_wave"])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_only_the_residuals_are_kept(arrays, which, transform):
    x, scale = arrays
    _, back = jax.vjp(transform(WAVES[which]), x, scale)
    kept = {leaf.unsafe_buffer_pointer(): leaf for leaf in jax.tree.leaves(back)}
    assert sorted(leaf.shape for leaf in kept.values()) == [scale.shape, x.shape]
