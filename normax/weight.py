"""Normalizers of weights: by length (weight norm) and by largest singular value (spectral)."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import pool, units
from normax.quotient import quotient
from normax.singular import singular_values
from normax.standardize import standardize


def weight_norm(
    v: ArrayLike,
    g: ArrayLike | None = None,
    *,
    feature_axes: ax.Axes | None = -1,
    epsilon: float = 1e-12,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Gives each output's weights the length `g`, whatever the length of `v`.

    .. math:: w = g \frac{v}{\|v\|}

    the length taken over every axis but `feature_axes`.

    Args:
      v: kernel of any rank, floating-point or complex.
      g: lengths, of shape `v.shape[feature_axes]`, the axes ascending; None is one.
      feature_axes: axes whose entries have a length of their own; None or () is none: the whole
        kernel has one length.
      epsilon: vectors not longer than this come out as zero, with a zero derivative.
      dtype: dtype of the output, that of `v` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `v`.

    Raises:
      ValueError: axes out of range or repeated; a `g` that is not of the feature shape; epsilon
        below 0.
      TypeError: integer `v`.

    Where others differ: flax adds epsilon to the squared length, so that vectors shorter than
    1e-6 are not normalized; PyTorch and Equinox return NaN for a zero vector.

    Example:
      >>> import jax.numpy as jnp, normax, numpy as np
      >>> v = jnp.array([[3.0, 0.0], [4.0, 1e-9]])
      >>> print(np.asarray(normax.weight_norm(v, jnp.array([10.0, 1.0]))).round(3))
      [[6. 0.]
       [8. 1.]]

    Salimans and Kingma, "Weight Normalization", 2016, https://arxiv.org/abs/1602.07868.
    """
    name = "weight_norm"
    v = ax.to_float_array(name, v, "v")
    features = ax.sorted_axes(
        name, "feature_axes", () if feature_axes is None else feature_axes, v.ndim
    )
    reduced = ax.other_axes(features, v.ndim)
    size = max(math.prod(v.shape[axis] for axis in reduced), 1)
    shape = tuple(v.shape[axis] for axis in features)
    g = jnp.ones(shape, ax.real_dtype(v.dtype)) if g is None else ax.to_float_array(name, g, "g")
    ax.check_feature_shape(name, "g", g.shape, v, features)
    w, _ = standardize(
        v,
        # |v| is the root mean square times the root of the number of entries.
        g.astype(ax.compute_dtype(g.dtype)) / math.sqrt(size),
        reduction_axes=reduced,
        feature_axes=features,
        centered=False,
        epsilon=0.0,
        floor=ax.to_epsilon(name, epsilon) ** 2 / size,
        dtype=ax.to_dtype(name, dtype, v, v=v, g=g),
        caller=name,
    )
    return w


class SpectralState(NamedTuple):
    """What the power iteration remembers.

    Attributes:
      u: right singular vector so far, a row of shape `(1, w.shape[-1])`.
      sigma: the largest singular value it gave, a scalar.
    """

    u: Any
    sigma: Any

    @classmethod
    def create(cls, key: jax.Array, features: int, dtype: DTypeLike = jnp.float32):
        """Returns a random start for a kernel with `features` outputs.

        `spectral_norm` of the first kernel with `n_steps=15` makes a better one of it.

        >>> import jax
        >>> SpectralState.create(jax.random.key(0), 3).u.shape
        (1, 3)
        """
        ax.dtype_of("SpectralState.create", dtype)  # refuses what is none
        return cls(jax.random.normal(key, (1, features), dtype), jnp.ones((), dtype))


def spectral_norm(
    w: ArrayLike,
    state: SpectralState,
    *,
    n_steps: int = 1,
    bound: float | None = None,
    epsilon: float = 1e-12,
    dtype: DTypeLike | None = None,
) -> tuple[jax.Array, SpectralState]:
    r"""Divides a kernel by its largest singular value, as power iteration estimates it.

    .. math:: v \leftarrow \frac{W u}{\|W u\|},\quad u \leftarrow \frac{W^T v}{\|W^T v\|},\quad
              \sigma = v^T W u,\quad \bar{W} = W / \sigma

    with W of shape (everything else, outputs). No gradient flows through u and v, so that of
    :math:`\bar{W}` is :math:`(G - \langle G, \bar{W} \rangle v u^T) / \sigma`.

    Args:
      w: floating-point kernel of rank 2 or more; its leading axes are flattened.
      state: `SpectralState` with `u` of shape `(1, w.shape[-1])`.
      n_steps: power iterations, at least 1.
      bound: divide only what is larger than this, to this; None brings every kernel to 1.
      epsilon: a kernel that leaves no vector longer than this comes out as it is.
      dtype: dtype of the output, that of `w` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `w`, and the new `SpectralState`, of the dtypes of `state`. A kernel
      that is not finite, or so small, leaves `u` as it was. A zero kernel comes out as zero with a
      `u` of zero, and with that state every kernel comes out as it is: so Flax leaves the
      zero-initialized biases of an attention layer alone. Start from a new state to normalize it.

    Raises:
      ValueError: `w` of rank below 2; `u` of another shape; `n_steps` below 1; a `bound` that is
        not above 0; epsilon below 0.
      TypeError: integer or complex `w`; a `state` that is no `SpectralState`.

    Where others differ: PyTorch and Equinox iterate 15 times at the start and return NaN for a
    zero kernel.

    Example:
      >>> import jax, jax.numpy as jnp, normax
      >>> w = jnp.diag(jnp.array([4.0, 1.0]))
      >>> state = normax.SpectralState.create(jax.random.key(0), 2)
      >>> w_bar, state = normax.spectral_norm(w, state, n_steps=20)
      >>> print(w_bar.round(3), state.sigma.round(3))
      [[1.   0.  ]
       [0.   0.25]] 4.0

    Miyato, Kataoka, Koyama and Yoshida, "Spectral Normalization for Generative Adversarial
    Networks", 2018, https://arxiv.org/abs/1802.05957.
    """
    name = "spectral_norm"
    w = ax.to_float_array(name, w, "w")
    ax.check_kind(name, "state", state, SpectralState)
    ax.check_spectral(name, w, jnp.shape(state.u), n_steps)
    ax.check_bound(name, bound)
    epsilon = ax.to_epsilon(name, epsilon)
    matrix = _as_matrix(w)
    fixed, old = lax.stop_gradient((matrix, jnp.asarray(state.u)))
    mesh, (rows, columns) = jax.typeof(matrix).sharding.mesh, jax.typeof(matrix).sharding.spec
    start = pool.place(old.astype(matrix.dtype), mesh, (None, columns))

    def step(u):
        v = _unit(pool.matmul(u, fixed.T, mesh, (None, rows)), epsilon)
        return v, _unit(pool.matmul(v, fixed, mesh, (None, columns)), epsilon)

    v, u = iterate(step, start, n_steps)
    sigma = jnp.sum(v.T * matrix * u)
    bar = _as_kernel(_bounded(matrix, sigma, bound), w)
    # From NaN an iteration never comes back, nor from a zero that a kernel was only too small for;
    # where the kernel is zero, u is Flax's.
    left = jnp.all(jnp.isfinite(u)) & (jnp.any(u != 0) | jnp.all(fixed == 0))
    u = pool.placed_like(jnp.where(left, u, start), old)
    new = SpectralState(
        u.astype(jnp.result_type(state.u)),
        lax.stop_gradient(sigma).astype(jnp.result_type(state.sigma)),
    )
    return bar.astype(ax.to_dtype(name, dtype, w, w=w)), new


def exact_spectral_norm(
    w: ArrayLike, *, bound: float | None = None, dtype: DTypeLike | None = None
) -> jax.Array:
    r"""Divides a kernel by its largest singular value, by a singular value decomposition.

    .. math:: \bar{W} = W / \sigma(W), \qquad \text{or}\ W / \max(\sigma(W) / b, 1)

    with W of shape (everything else, outputs). Nothing is remembered, at a price that is cubic in
    the smaller side: for `weight_constraint`, and to see how far a power iteration is off.

    Args:
      w: floating-point kernel of rank 2 or more; its leading axes are flattened.
      bound: as in `spectral_norm`.
      dtype: dtype of the output, that of `w` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `w`; a zero kernel comes out as zero. Its second derivative is NaN,
      as is that of a kernel whose two largest singular values are equal.

    Raises:
      ValueError: `w` of rank below 2; a `bound` that is not above 0.
      TypeError: integer or complex `w`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> w = jnp.diag(jnp.array([4.0, 1.0]))
      >>> print(normax.exact_spectral_norm(w, bound=2.0).round(3))
      [[2.  0. ]
       [0.  0.5]]

    Yoshida and Miyato, "Spectral Norm Regularization for Improving the Generalizability of Deep
    Learning", 2017, https://arxiv.org/abs/1705.10941.
    """
    name = "exact_spectral_norm"
    w = ax.to_float_array(name, w, "w")
    ax.check_spectral(name, w, (1, w.shape[-1] if w.ndim else 0), 1)
    ax.check_bound(name, bound)
    matrix = pool.whole(_as_matrix(w))
    # In a unit, a power of two: squares of large entries are not in range.
    unit = units.choose(matrix, (0, 1), 0.0)
    matrix = units.divide(matrix, unit)
    sigma = jnp.ones((), matrix.dtype)
    if w.size:
        (sigma,) = singular_values(matrix, (0,))
    bar = _as_kernel(_bounded(matrix, sigma, bound, 1 / unit), w)
    return bar.astype(ax.to_dtype(name, dtype, w, w=w))


def iterate(step: Any, start: Any, n_steps: int) -> tuple[Any, Any]:
    """Returns v and u of the last of so many steps of a power iteration; the program stays short.

    Args:
      step: from u to the v and the u that follow.
      start: the first u.
      n_steps: 1 or more.
    """
    first = step(start)
    return first if n_steps == 1 else lax.fori_loop(1, n_steps, lambda _, vu: step(vu[1]), first)


def _as_matrix(w):
    """Returns a kernel as (everything else, outputs), in the dtype to compute in."""
    w = pool.whole(w.astype(ax.compute_dtype(w.dtype)), 0, -1)
    shape, spec = (math.prod(w.shape[:-1]), w.shape[-1]), jax.typeof(w).sharding.spec
    return pool.reshape(w, shape, (spec[0], spec[-1]))


def _as_kernel(matrix, w):
    """Returns a matrix in the shape of a kernel, dealt out as that is."""
    spec = jax.typeof(matrix).sharding.spec
    kernel = pool.reshape(matrix, w.shape, (spec[0], *[None] * (w.ndim - 2), spec[-1]))
    return pool.placed_like(kernel, w)


def _bounded(matrix, sigma, bound, per_unit: Any = 1):
    """Returns a matrix over its largest singular value, or no larger than the bound.

    Both may be in a unit; what comes out is in none.
    """
    if bound is None:
        return quotient(matrix, jnp.where(sigma == 0, 1, sigma))
    return quotient(matrix, jnp.maximum(sigma / jnp.asarray(bound, sigma.dtype), per_unit))


def _unit(row, epsilon):
    return weight_norm(row, feature_axes=None, epsilon=epsilon)
