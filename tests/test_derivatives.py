"""Forwards, backwards and twice: every transformation agrees with the naive float64 formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import CASES, MEASURED
from differences import check_derivatives
from test_implementations import NATIVE
from test_range import NORMS, entries

import normax

pytestmark = pytest.mark.usefixtures("x64")
EVERY = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
# One of each function, for what is slow to compile.
FEW = pytest.mark.parametrize(
    "case",
    [c for c in CASES if c.name in ("batch", "layer", "rms", "group", "instance")],
    ids=lambda case: case.name,
)
MASKED = pytest.mark.parametrize("masked", [False, True], ids=["", "masked"])


def inputs(case, masked=False):
    """Returns x, scale, bias, mask and a cotangent, float64."""
    keys = jax.random.split(jax.random.key(0), 5)
    x = 3 + 2 * jax.random.normal(keys[0], case.shape, jnp.float64)
    scale = 1 + 0.3 * jax.random.normal(keys[1], case.parameter_shape(), jnp.float64)
    bias = jax.random.normal(keys[2], case.parameter_shape(), jnp.float64)
    mask = jax.random.bernoulli(keys[3], 0.8, case.shape) if masked else None
    return x, scale, bias, mask, jax.random.normal(keys[4], case.shape, jnp.float64)


def pair(case, mask):
    """Returns ours and the naive one, of (x, scale, bias)."""
    naive = reference.naive(case)
    return lambda *args: case.apply(*args, mask), lambda *args: naive(*args, mask)


def agree(a, b):
    for left, right in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        np.testing.assert_allclose(left, right, rtol=1e-8, atol=1e-8)


@EVERY
@MASKED
def test_values_jvp_and_vjp(case, masked):
    *args, mask, ct = inputs(case, masked)
    tangents = tuple(jnp.cos(7 * a) for a in args)

    @jax.jit
    def both(args, ct):
        every = lambda f: (jax.jvp(f, args, tangents), jax.vjp(f, *args)[1](ct))
        return [every(f) for f in pair(case, mask)]

    agree(*both(tuple(args), ct))


def test_eagerly_too():
    case = next(case for case in CASES if case.name == "group")
    *args, mask, ct = inputs(case, masked=True)
    ours, naive = pair(case, mask)
    tangents = jax.tree.map(jnp.sin, args)
    agree(jax.jvp(ours, args, tangents), jax.jvp(naive, args, tangents))
    agree(jax.vjp(ours, *args)[1](ct), jax.vjp(naive, *args)[1](ct))


@FEW
def test_jacobians(case):
    x, scale, bias, _, _ = inputs(case)
    x = x[:3] if 0 not in (a % x.ndim for a in case.features) and 0 not in case.reduced else x
    ours, naive = pair(case, None)
    three = lambda *args: (
        jax.jacrev(ours)(*args),
        jax.jacfwd(ours)(*args),
        jax.jacrev(naive)(*args),
    )
    backwards, forwards, expected = jax.jit(three)(x, scale, bias)
    agree(backwards, expected)
    agree(forwards, expected)


@FEW
@MASKED
def test_hessian(case, masked):
    *args, mask, ct = inputs(case, masked)
    ours, naive = pair(case, mask)

    def energy(f):
        return lambda *args: jnp.sum(ct * jnp.tanh(f(*args)) + f(*args) ** 3)

    every = (0, 1, 2)
    expected = jax.jit(jax.hessian(energy(naive), every))(*args)
    agree(jax.jit(jax.hessian(energy(ours), every))(*args), expected)
    agree(jax.jit(jax.jacrev(jax.grad(energy(ours), every), every))(*args), expected)


@FEW
def test_vmap_of_grad_scan_and_remat(case):
    x, scale, bias, _, ct = inputs(case)
    ours, naive = pair(case, None)
    many = jnp.stack([x, 2 * x + 1, -x])

    def grad(f):
        return jax.jit(jax.grad(lambda x: jnp.sum(ct * f(x, scale, bias) ** 2)))

    agree(jax.vmap(grad(ours))(many), jnp.stack([grad(naive)(one) for one in many]))
    agree(jax.lax.map(grad(ours), many), jnp.stack([grad(naive)(one) for one in many]))

    def layers(f):
        def body(x, _):
            return x + f(x, scale, bias), None

        loss = lambda x: jnp.sum(ct * jax.lax.scan(body, x, None, length=3)[0])
        return jax.jit(jax.grad(loss))

    agree(layers(ours)(x), layers(naive)(x))
    agree(layers(jax.checkpoint(ours))(x), layers(naive)(x))


@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.name)
@MASKED
def test_numerically_to_second_order(case, masked):
    *args, mask, _ = inputs(case, masked)
    ours, _ = pair(case, mask)
    check_derivatives(ours, tuple(args))


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex128])
@MASKED
def test_derivatives_of_moments(masked, dtype):
    x = jax.random.normal(jax.random.key(0), (5, 4), dtype)
    mask = jax.random.bernoulli(jax.random.key(1), 0.7, x.shape) if masked else None

    def ours(x):
        _, mean, var = normax.moments(x, 0, mask=mask)
        return jnp.sum(jnp.abs(mean) ** 2 + var**2)

    def standardized(x):
        _, m = normax.standardize(x, reduction_axes=0, mask=mask)
        return jnp.sum(jnp.abs(m.mean) ** 2 + m.var**2)

    def naive(x):
        valid = jnp.ones(x.shape, bool) if mask is None else mask
        n = valid.sum(0).astype(jnp.float64)
        mean = jnp.where(valid, x, 0).sum(0) / n.astype(x.dtype)
        var = jnp.where(valid, jnp.abs(x - mean[None]) ** 2, 0).sum(0) / n
        return jnp.sum(jnp.abs(mean) ** 2 + var**2)

    agree(jax.grad(ours)(x), jax.grad(naive)(x))
    agree(jax.grad(standardized)(x), jax.grad(naive)(x))
    if dtype == jnp.float64:
        agree(jax.hessian(ours)(x), jax.hessian(naive)(x))
        agree(jax.hessian(standardized)(x), jax.hessian(naive)(x))


def test_complex_gradient():
    x = jax.random.normal(jax.random.key(0), (5, 4), jnp.complex128)

    def energy(f):
        return lambda x: jnp.sum(jnp.abs(f(x) + 0.3) ** 3)

    def naive(x):
        d = x - x.mean(0, keepdims=True)
        rstd = 1 / jnp.sqrt((jnp.abs(d) ** 2).mean(0, keepdims=True) + 1e-6)
        return d * rstd.astype(x.dtype)

    ours = lambda x: normax.layer_norm(x, reduction_axes=0)
    agree(jax.grad(energy(ours))(x), jax.grad(energy(naive))(x))


def test_no_gradient_flows_through_running_statistics():
    stats = normax.RunningStats.create(3, jnp.float64)

    def remembered(x):
        _, new = normax.batch_norm(x, stats, use_running_average=False)
        return jnp.sum(new.mean) + jnp.sum(new.var)

    x = jax.random.normal(jax.random.key(0), (4, 3))
    np.testing.assert_array_equal(jax.grad(remembered)(x), jnp.zeros_like(x))


def test_the_inference_gradient_is_linear_in_the_cotangent_alone():
    stats = normax.RunningStats(jnp.ones(3), jnp.full(3, 4.0), jnp.ones(3, jnp.int32))
    x = jax.random.normal(jax.random.key(0), (4, 3))
    f = lambda x: normax.batch_norm(x, stats, use_running_average=True, epsilon=0.0)[0]
    agree(jax.vjp(f, x)[1](jnp.ones_like(x))[0], jnp.full_like(x, 0.5))


@pytest.mark.parametrize("size", [1e13, 1e16, 1e20])
@pytest.mark.parametrize("by", ["xla", NATIVE])
@pytest.mark.parametrize("name", ["layer", "batch", "group"])
def test_second_derivatives_of_entries_of_any_size(name, by, size):
    norm, case = NORMS[name]
    x, ct, t = (entries(case.shape, 1, offset) for offset in (0.5, 0.1, 0.2))
    x, t = (jnp.asarray(np.float32(size) * np.asarray(v)) for v in (x, t))

    def formula(x):
        split = (*x.shape[:-1], case.groups, -1) if case.groups else x.shape
        grouped = x.reshape(split)
        d = grouped - grouped.mean(case.reduced, keepdims=True)
        return (d / jnp.sqrt(jnp.square(d).mean(case.reduced, keepdims=True))).reshape(x.shape)

    def along(f, x, t):
        curved = jax.grad(lambda x: jnp.sum(jnp.sin(f(x)) * ct.astype(x.dtype)))
        return jax.jvp(curved, (x,), (t,))[1]

    found = along(functools.partial(norm, epsilon=1e-5, implementation=by), x, t)
    expected = along(formula, x.astype(jnp.float64), t.astype(jnp.float64))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=2e-6 * float(abs(expected).max()))
