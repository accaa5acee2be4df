"""A residual is added and the sum is normalized: the step between two layers of a transformer.

The sum goes on to the next layer, and its norm into this one. By a kernel both are written in one
read of what they come from; without one, the norm reads the sum again.
"""

import functools

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import gradient, implementations
from normax.kernels.linear import linear
from normax.standardize import from_measured, planned


def add_layer_norm(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    reduction_axes: ax.Axes = -1,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Adds a residual, and normalizes the sum by its mean and variance.

    .. math:: s = x + r, \qquad y = \frac{s - \mu}{\sqrt{\sigma^2 + \epsilon}} \gamma + \beta

    What is normalized is the sum as it is returned, rounded.

    Args:
      x: array of any rank, floating-point or complex, such as the output of a layer.
      residual: r, of the shape of `x`, such as what that layer was added to.
      scale: gamma, of shape `x.shape[feature_axes]`, the axes ascending; None is one.
      bias: beta, of the same shape; None is zero.
      reduction_axes: axes that are summarised together.
      feature_axes: axes that have a scale and bias of their own.
      epsilon: added to the variance, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent from the norm, and come out of it as `bias`; they are added all the same.
      dtype: dtype of y, that of the sum by default; all is computed in float32 at least.
      implementation: "xla", or a kernel by name: "cpu", "mosaic_gpu" or "mosaic_tpu". One that
        cannot be had is refused, here or when the program is lowered; exported for other platforms,
        it is "xla" there, with a warning. None adds by "xla", and normalizes as `layer_norm` does.

    Returns:
      y, and the sum, both of the shape of `x`; the sum is of the dtype that x and r promote to.

    Raises:
      ValueError: a residual of another shape; otherwise as `layer_norm`.
      TypeError: integer `x` or `residual`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> y, total = normax.add_layer_norm(jnp.array([1.0, 2.0, 3.0]), jnp.array([0.0, 1.0, 2.0]))
      >>> print(y.round(3), total)
      [-1.225  0.     1.225] [1. 3. 5.]

    Ba, Kiros and Hinton, "Layer Normalization", 2016, https://arxiv.org/abs/1607.06450.
    """
    options = reduction_axes, feature_axes, epsilon, mask, dtype, implementation
    return _add("add_layer_norm", True, x, residual, scale, bias, *options)


def add_rms_norm(
    x: ArrayLike,
    residual: ArrayLike,
    scale: ArrayLike | None = None,
    *,
    reduction_axes: ax.Axes = -1,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Adds a residual, and divides the sum by its root mean square.

    .. math:: s = x + r, \qquad y = \frac{s}{\sqrt{\frac1n \sum |s|^2 + \epsilon}} \gamma

    `add_layer_norm` without the mean.

    Args:
      x: array of any rank, floating-point or complex, such as the output of a layer.
      residual: r, of the shape of `x`, such as what that layer was added to.
      scale: gamma, of shape `x.shape[feature_axes]`, the axes ascending; None is one.
      reduction_axes: axes that are summarised together.
      feature_axes: axes that have a scale of their own.
      epsilon: added to the mean square, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent from the norm, and come out of it as zero; they are added all the same.
      dtype: dtype of y, that of the sum by default; all is computed in float32 at least.
      implementation: "xla", or a kernel by name: "cpu", "mosaic_gpu" or "mosaic_tpu". One that
        cannot be had is refused, here or when the program is lowered; exported for other platforms,
        it is "xla" there, with a warning. None adds by "xla", and normalizes as `rms_norm` does.

    Returns:
      y, and the sum, both of the shape of `x`; the sum is of the dtype that x and r promote to.

    Raises:
      ValueError: as `add_layer_norm`.
      TypeError: integer `x` or `residual`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> y, total = normax.add_rms_norm(jnp.array([1.0, 3.0]), jnp.array([1.0, -1.0]))
      >>> print(y.round(3), total)
      [1. 1.] [2. 2.]

    Zhang and Sennrich, "Root Mean Square Layer Normalization", 2019,
    https://arxiv.org/abs/1910.07467.
    """
    options = reduction_axes, feature_axes, epsilon, mask, dtype, implementation
    return _add("add_rms_norm", False, x, residual, scale, None, *options)


def _add(
    name, centered, x, residual, scale, bias, reduction_axes, feature_axes, epsilon, mask, dtype, by
):
    x, residual = ax.to_float_array(name, x), ax.to_float_array(name, residual, "residual")
    ax.check_shape(name, "residual", residual.shape, x.shape)
    total = _sum(x, residual)
    plan, *arguments = planned(
        name,
        total,
        scale,
        bias,
        reduction_axes=ax.reduced_axes(name, "reduction_axes", reduction_axes, x.ndim),
        feature_axes=feature_axes,
        centered=centered,
        epsilon=epsilon,
        mask=mask,
        dtype=dtype,
        implementation=by,
        residual=True,
    )
    if plan.implementation in (None, implementations.XLA):
        return from_measured(plan, *arguments)[0], total
    kinds = f"x of {x.dtype} and a residual of {residual.dtype}"
    if x.dtype != total.dtype:  # a kernel gives the sum the dtype of what comes first
        x, residual = residual, x
    ax.check_available(name, by, None if x.dtype == total.dtype else kinds)
    _, scale, bias, _ = arguments
    return _by_kernel(plan, x, residual, scale, bias)


def _sum(x, residual):
    dtype = ax.promote(x, residual)
    total = x.astype(dtype) + residual.astype(dtype)
    if jnp.dtype(dtype).itemsize > 2:
        return total
    # Else XLA may leave out that the sum is rounded before it is normalized.
    return jax.lax.reduce_precision(total, jnp.finfo(dtype).nexp, jnp.finfo(dtype).nmant)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _by_kernel(plan, x, residual, scale, bias):
    form = functools.partial(_form, plan)
    total, y = implementations.add_forward(plan, form, x, residual, scale, bias)
    return y, total


def _form(plan, x, residual, scale, bias):
    total = _sum(x, residual)
    return total, from_measured(plan._replace(implementation=None), total, scale, bias, None)[0]


@functools.partial(_by_kernel.defjvp, symbolic_zeros=True)
def _by_kernel_jvp(plan, primals, tangents):
    x, residual, scale, bias = primals
    y, total = _by_kernel(plan, x, residual, scale, bias)
    dx, dresidual, dscale, dbias = (None if isinstance(t, SymbolicZero) else t for t in tangents)
    moves = [t.astype(total.dtype) for t in (dx, dresidual) if t is not None]
    shape, dtypes = gradient.of_parameters(scale, bias)
    dtotal, dy = linear(
        functools.partial(_forward, plan),
        functools.partial(_backward, plan, shape, dtypes),
        (total, scale, None, None),
        (functools.reduce(jnp.add, moves) if moves else None, dscale, dbias),
    )
    return (y, total), (dy, dtotal)


def _forward(plan, known, dtotal, dscale, dbias):
    dy = gradient.forward(plan, known, dtotal, dscale, dbias)
    return jnp.zeros_like(known[0]) if dtotal is None else dtotal, dy


def _backward(plan, shape, dtypes, known, cotangents):
    dtotal, dy = cotangents
    if dy is None:
        return dtotal, None, None
    if dtotal is None:
        return gradient.backward(plan, shape, dtypes, known, dy)
    whole = functools.partial(_whole, plan, shape, dtypes)
    dx, *found = implementations.add_backward(plan, shape, whole, known, dtotal, dy)
    return dx, *gradient.rounded(found, dtypes)


def _whole(plan, shape, dtypes, known, dtotal, dy):
    plain = plan._replace(implementation=None)
    dx, *found = gradient.backward(plain, shape, dtypes, known, dy)
    dtype = ax.compute_dtype(known[0].dtype)
    found = (v if v is None else v.astype(dtype) for v in found)
    none = None if shape is None else jnp.zeros(shape, dtype)
    return dtotal + dx, *(none if v is None else v for v in found)
