"""What a normalizer does at inference, folded into the weights of the layer before or behind."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from normax import axes as ax
from normax.moments import RunningStats
from normax.standardize import reciprocal_deviation


def affine_of(
    stats: RunningStats,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    epsilon: float = 1e-5,
    epsilon_on: str = "variance",
) -> tuple[jax.Array, jax.Array]:
    r"""Returns what batch norm at inference is: a factor and an offset of each feature.

    .. math:: \gamma \frac{x - \mu}{\sqrt{\sigma^2 + \epsilon}} + \beta = a x + c,\qquad
              a = \frac{\gamma}{\sqrt{\sigma^2 + \epsilon}},\quad c = \beta - a \mu

    Args:
      stats: `RunningStats` of the feature shape.
      scale: gamma, of the same shape; None is one.
      bias: beta, of the same shape; None is zero.
      epsilon: that of the batch norm.
      epsilon_on: that of the batch norm.

    Returns:
      Factor and offset, of the feature shape, float32 at least.

    Raises:
      ValueError: epsilon below 0; another `epsilon_on`; a scale or bias of another shape.
      TypeError: a `stats` that is no `RunningStats`.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> from normax import interop
      >>> stats = normax.RunningStats.create(1)._replace(mean=jnp.ones(1), var=jnp.full(1, 4.0))
      >>> a, c = interop.affine_of(stats, epsilon=0.0)
      >>> print(a, c)
      [0.5] [-0.5]
    """
    name = "affine_of"
    ax.check_statistics(name, "stats", stats, RunningStats)
    ax.check_choice(name, "epsilon_on", epsilon_on, ("variance", "deviation"))
    mean, var = jnp.asarray(stats.mean), jnp.asarray(stats.var)
    for label, value in (("scale", scale), ("bias", bias)):
        ax.check_shape(name, label, mean.shape if value is None else jnp.shape(value), mean.shape)
    epsilon = ax.to_epsilon(name, epsilon)
    dtype = ax.promote(jnp.float32, mean, *(v for v in (scale, bias) if v is not None))
    rstd = reciprocal_deviation(var, epsilon, on_deviation=epsilon_on == "deviation")
    factor = rstd.astype(dtype) * jnp.asarray(1 if scale is None else scale, dtype)
    return factor, jnp.asarray(0 if bias is None else bias, dtype) - factor * mean.astype(dtype)


def fold_into_previous(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    factor: ArrayLike,
    offset: ArrayLike,
    *,
    feature_axis: int = -1,
) -> tuple[jax.Array, jax.Array]:
    r"""Folds a factor and offset into the Dense, Conv or ConvTranspose whose output they scale.

    .. math:: a (W x + b) + c = (a W) x + (a b + c)

    Exact for any padding, stride, dilation and number of groups.

    Args:
      kernel: W, floating-point, with the output features along one axis.
      bias: b, of the shape of the output features; None is zero.
      factor: a, of that shape, such as `affine_of` gives.
      offset: c, of that shape.
      feature_axis: axis of the output features: -1 as Flax has it, -2 with `transpose_kernel`.

    Returns:
      The new kernel and bias, in the dtype of the kernel.

    Raises:
      ValueError: an axis out of range; a bias, factor or offset of another shape.
      TypeError: an integer kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from normax import interop
      >>> kernel, bias = interop.fold_into_previous(
      ...     jnp.array([[1.0, 2.0]]), None, jnp.array([10.0, 100.0]), jnp.array([1.0, 2.0])
      ... )
      >>> print(kernel, bias)
      [[ 10. 200.]] [1. 2.]
    """
    name = "fold_into_previous"
    w, a, c, (axis,) = _alike(name, kernel, factor, offset, feature_axis=feature_axis)
    for label, value in (("factor", a), ("offset", c), ("bias", bias)):
        _check_row(name, label, value, w.shape[axis])
    b = jnp.asarray(0 if bias is None else bias).astype(a.dtype)
    wide = w.astype(a.dtype) * ax.along(a, w.ndim, (axis,))
    return wide.astype(w.dtype), (b * a + c).astype(w.dtype)


def fold_into_next(
    kernel: ArrayLike,
    bias: ArrayLike | None,
    factor: ArrayLike,
    offset: ArrayLike,
    *,
    input_axis: int = -2,
    feature_axis: int = -1,
    feature_group_count: int = 1,
) -> tuple[jax.Array, jax.Array]:
    r"""Folds a factor and offset into the Dense or Conv whose input they scale.

    .. math:: W (a x + c) + b = (W a) x + (W c + b)

    With a convolution only where it pads with nothing, or with what is of the input: a zero of its
    padding would have been `-c / a` of x. Serves the scale and bias of a layer norm too: the layer
    norm is then left without.

    Args:
      kernel: W, floating-point, with the inputs of a group along one axis, and the output features
        along another.
      bias: b, of the shape of the output features; None is zero.
      factor: a, of the shape of all inputs, such as `affine_of` gives.
      offset: c, of the same shape.
      input_axis: axis of the inputs: -2 as Flax has it.
      feature_axis: axis of the output features: -1 as Flax has it.
      feature_group_count: groups of the convolution.

    Returns:
      The new kernel and bias, in the dtype of the kernel.

    Raises:
      ValueError: axes out of range or equal; a bias, factor or offset of another shape; groups that
        do not divide the output features.
      TypeError: an integer kernel.

    Example:
      >>> import jax.numpy as jnp
      >>> from normax import interop
      >>> kernel, bias = interop.fold_into_next(
      ...     jnp.array([[1.0], [2.0]]), None, jnp.array([10.0, 100.0]), jnp.array([1.0, 2.0])
      ... )
      >>> print(kernel.ravel(), bias)
      [ 10. 200.] [5.]
    """
    name = "fold_into_next"
    axes = {"input_axis": input_axis, "feature_axis": feature_axis}
    w, a, c, (inputs, outputs) = _alike(name, kernel, factor, offset, **axes)
    ax.sorted_axes(name, "input_axis and feature_axis", (inputs, outputs), w.ndim)
    groups = ax.group_count(name, w.shape[outputs], feature_group_count, None)
    size, width = w.shape[inputs], w.shape[outputs] // groups
    for label, value in (("factor", a), ("offset", c)):
        _check_row(name, label, value, groups * size)
    _check_row(name, "bias", bias, w.shape[outputs])

    def laid(row):
        """Lays each output's group of the inputs along the kernel."""
        of_output = jnp.repeat(row.reshape(groups, size), width, axis=0)
        of_output = of_output.T if inputs < outputs else of_output
        return ax.along(of_output, w.ndim, tuple(sorted((inputs, outputs))))

    wide = w.astype(a.dtype)
    b = jnp.asarray(0 if bias is None else bias).astype(a.dtype)
    b = b + jnp.sum(wide * laid(c), tuple(axis for axis in range(w.ndim) if axis != outputs))
    return (wide * laid(a)).astype(w.dtype), b.astype(w.dtype)


def _alike(name: str, kernel: Any, factor: Any, offset: Any, **axes: int) -> Any:
    """Returns the kernel, factor and offset in a dtype to compute in, and the axes from 0 on."""
    kernel = ax.to_float_array(name, kernel, "kernel")
    places = [ax.sorted_axes(name, label, axis, kernel.ndim)[0] for label, axis in axes.items()]
    dtype = ax.promote(jnp.float32, kernel, jnp.asarray(factor), jnp.asarray(offset))
    return kernel, jnp.asarray(factor).astype(dtype), jnp.asarray(offset).astype(dtype), places


def _check_row(name, label, value, size):
    """Refuses what is not one number for each feature."""
    if value is not None:
        ax.check_shape(name, label, jnp.shape(value), (size,))
