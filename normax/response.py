"""Response normalization: by the square of the response, filter by filter or among neighbours."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

from normax import axes as ax
from normax import pool, units
from normax.measure import present, square
from normax.moments import moments_over
from normax.parts import spread
from normax.quotient import power
from normax.standardize import normalize, root, standardize


def filter_response_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    threshold: ArrayLike | None = None,
    *,
    learned_epsilon: ArrayLike | None = None,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    axis_name: Any = None,
    axis_index_groups: Any = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Divides each feature of each example by its root mean square, then thresholds it.

    .. math:: \nu^2 = \frac1n \sum x^2, \qquad
              y = \max\left(\frac{x}{\sqrt{\nu^2 + \epsilon}} \gamma + \beta,\ \tau\right)

    over the axes between batch and features: no batch statistics, and with the threshold, a
    thresholded linear unit, no activation to follow.

    Args:
      x: array of rank 2 or more, floating-point; its leading axis is the batch.
      scale: gamma, of shape `x.shape[feature_axes]`, the axes ascending; None is one.
      bias: beta, of the same shape; None is zero.
      threshold: tau, of the same shape, which the paper starts at 0; None leaves it out.
      learned_epsilon: its magnitude is added to epsilon, of the same shape; the paper has it where
        there are no axes to average over, starting at 1e-4. None is zero.
      feature_axes: axes that have parameters of their own, the leading one not among them.
      epsilon: added to the mean square, inside the root.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, move no statistic and no gradient, and come out as `bias`, or the
        threshold.
      axis_name: name, or names, of a mapped axis over which the reduced axes are sharded.
      axis_index_groups: groups of device indices that pool among themselves.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: parameters that are not of the feature shape; feature axes that include axis 0;
        epsilon below 0; a mask that does not broadcast; an unbound axis_name.
      TypeError: integer or complex `x`.

    Where others differ: timm squares in half precision, which is inf above 255.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[[3.0], [-3.0], [0.0]]])
      >>> print(normax.filter_response_norm(x, threshold=jnp.zeros(1)).ravel().round(3))
      [1.225 0.    0.   ]

    Singh and Krishnan, "Filter Response Normalization Layer", 2019,
    https://arxiv.org/abs/1911.09737.
    """
    name = "filter_response_norm"
    x = ax.to_float_array(name, x)
    ax.check_real(name, "x", x)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    spatial = ax.spatial_axes(name, features, x.ndim)
    dtype = ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias)
    ax.check_real(name, "threshold", threshold)
    ax.check_real(name, "learned_epsilon", learned_epsilon)
    devices = {"axis_name": axis_name, "axis_index_groups": axis_index_groups}
    wide = ax.promote(jnp.float32, dtype) if threshold is not None else dtype
    if learned_epsilon is None:
        y, _ = standardize(
            x,
            scale,
            bias,
            reduction_axes=spatial,
            feature_axes=features,
            centered=False,
            epsilon=epsilon,
            mask=mask,
            dtype=wide,
            caller=name,
            **devices,
        )
    else:
        mask = ax.to_weights(name, mask, x)
        learned = ax.to_parameter(name, "learned_epsilon", learned_epsilon, x, features)
        m = moments_over(name, x, spatial, centered=False, mask=mask, **devices)
        squared = jnp.expand_dims(m.var, spatial)
        y = normalize(
            x,
            jnp.zeros_like(squared),
            squared + jnp.abs(learned).astype(squared.dtype),
            ax.to_parameter(name, "scale", scale, x, features),
            ax.to_parameter(name, "bias", bias, x, features),
            epsilon=ax.to_epsilon(name, epsilon),
            mask=mask,
            dtype=wide,
        )
    if threshold is None:
        return y
    tau = ax.to_parameter(name, "threshold", threshold, x, features)
    return jnp.maximum(y, spread(tau.astype(y.dtype), y)).astype(dtype)


def global_response_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    feature_axes: ax.Axes = -1,
    epsilon: float = 1e-6,
    mask: ArrayLike | None = None,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Scales each feature by its length over that of the average feature, and adds it to itself.

    .. math:: y = x + \gamma\, x \frac{\|x\|}{\frac1C \sum_c \|x_c\| + \epsilon} + \beta

    the lengths over the axes between batch and features.

    Args:
      x: array of rank 3 or more, floating-point; its leading axis is the batch.
      scale: gamma, of shape `x.shape[feature_axes]`; None is one. The paper starts it at zero.
      bias: beta, of the same shape; None is zero.
      feature_axes: axes of the features, the leading one not among them.
      epsilon: added to the mean of the lengths.
      mask: booleans, or weights as in `moments`, that broadcast to `x.shape`. False entries read as
        absent: they may hold NaN, add to no length, get no gradient, and come out as `bias`.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: parameters that are not of the feature shape; feature axes that include axis 0;
        epsilon below 0; a mask that does not broadcast.
      TypeError: integer or complex `x`.

    Where others differ: timm takes the length in half precision.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([[[3.0, 0.0], [4.0, 5.0]]])  # two features of length 5
      >>> print(normax.global_response_norm(x).round().astype(int).ravel())
      [ 6  0  8 10]

    Woo and others, "ConvNeXt V2", 2023, https://arxiv.org/abs/2301.00808.
    """
    name = "global_response_norm"
    x = ax.to_float_array(name, x)
    ax.check_real(name, "x", x)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    spatial = ax.reduced_axes(
        name, "the axes between batch and features", ax.spatial_axes(name, features, x.ndim), x.ndim
    )
    parameters = [
        ax.to_parameter(name, label, value, x, features)
        for label, value in (("scale", scale), ("bias", bias))
    ]
    dtype = ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias)
    options = spatial, features, ax.to_epsilon(name, epsilon), dtype
    return _global_response(*options, x, *parameters, ax.to_weights(name, mask, x))


@functools.partial(jax.checkpoint, static_argnums=(0, 1, 2, 3))
def _global_response(spatial, features, epsilon, dtype, x, scale, bias, mask):
    x = present(x, mask)
    # In a unit of each example the squares are in range.
    unit = lax.stop_gradient(units.choose(x, tuple(range(1, x.ndim)), units.least(epsilon)))
    scaled = units.divide(x, unit)
    # The root of the mean square: of the length it is a fixed part, but for epsilon.
    m = moments_over("", scaled, spatial, centered=False, mask=mask)
    length = root(jnp.expand_dims(m.var * m.count.astype(m.var.dtype), spatial))
    average = jnp.mean(length, features, keepdims=True) + epsilon / unit
    response = length / jnp.where(average == 0, 1, average)
    y = x * response
    y = y if scale is None else y * scale.astype(y.dtype)
    y = x + y
    return (y if bias is None else y + bias.astype(y.dtype)).astype(dtype)


def local_response_norm(
    x: ArrayLike,
    *,
    size: int = 5,
    alpha: float = 1e-4,
    beta: float = 0.75,
    k: float = 1.0,
    feature_axes: ax.Axes = -1,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Divides each entry by a power of the mean square of the features around it.

    .. math:: y_c = x_c \left(k + \frac{\alpha}{n} \sum_{|c' - c| \le n/2} x_{c'}^2\right)^{-\beta}

    the sum over a window of `size` = n neighbouring features, zeros beyond the first and last.

    Args:
      x: array of any rank, floating-point.
      size: features in the window; of an even size the window reaches one further back.
      alpha: weight of the mean square.
      beta: exponent.
      k: added inside the power.
      feature_axes: the one axis of features.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`. There is no mask: a window belongs to one position.

    Raises:
      ValueError: a `size` below 1; `k` not above 0, `alpha` below 0; more than one feature axis.
      TypeError: integer or complex `x`; a `size` that is no int; another that is no number.

    Where others differ: the paper and TensorFlow do not divide alpha by n, PyTorch and ONNX do;
    the paper's k is 2. ONNX's window of an even size reaches one further forward.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> x = jnp.array([3.0, 0.0, 4.0])  # over the root of 9/3, 25/3 and 16/3
      >>> y = normax.local_response_norm(x, size=3, alpha=1.0, beta=0.5, k=1e-9)
      >>> print((y * y).round().astype(int))
      [3 0 3]

    Krizhevsky, Sutskever and Hinton, "ImageNet Classification with Deep Convolutional Neural
    Networks", 2012, https://doi.org/10.1145/3065386.
    """
    name = "local_response_norm"
    x = ax.to_float_array(name, x)
    ax.check_real(name, "x", x)
    axis = ax.only_axis(name, "feature_axes", feature_axes, x.ndim)
    size = ax.to_positive_int(name, "size", size)
    ax.check_limit(name, "k", k, 1e-30)
    ax.check_limit(name, "alpha", alpha, 0.0)
    ax.check_number(name, "beta", beta)
    wide = x.astype(ax.compute_dtype(x.dtype))
    start, share, exponent = (jnp.asarray(v, wide.dtype) for v in (k, alpha / size, -beta))
    y = wide * power(start + share * _window_sum(square(wide), {axis: size}), exponent)
    return y.astype(ax.to_dtype(name, dtype, x, x=x))


def divisive_norm(
    x: ArrayLike,
    scale: ArrayLike | None = None,
    bias: ArrayLike | None = None,
    *,
    window: tuple[int, ...],
    feature_axes: ax.Axes = -1,
    epsilon: float = 1.0,
    dtype: DTypeLike | None = None,
) -> jax.Array:
    r"""Standardizes each entry by its neighbours: their mean, and their mean square about it.

    .. math::
        v = x - \mathrm{mean}_{A}(x), \qquad
        y = \frac{v}{\sqrt{\mathrm{mean}_{A}(v^2) + \epsilon}} \gamma + \beta

    A is a window around the entry; beyond the borders nothing counts. With a window as long as
    every axis but the batch, epsilon 0 and that mean for all entries, it would be layer norm.

    Args:
      x: array of rank 2 or more, floating-point; its leading axis is the batch.
      scale: gamma, of shape `x.shape[feature_axes]`; None is one.
      bias: beta, of the same shape; None is zero.
      window: length of the window along each axis after the first; 1 is the entry alone.
      feature_axes: axes that have a scale and bias of their own.
      epsilon: added to the mean square, inside the root; the paper's sigma squared.
      dtype: dtype of the output, that of `x` by default; all is computed in float32 at least.

    Returns:
      An array of the shape of `x`. There is no mask.

    Raises:
      ValueError: a window that has not one length for each axis after the first; a length below
        1; parameters that are not of the feature shape; epsilon below 0.
      TypeError: integer or complex `x`; a length that is no int.

    Example:
      >>> import jax.numpy as jnp, normax
      >>> y = normax.divisive_norm(jnp.array([[1.0, 2.0, 4.0]]), window=(3,))
      >>> print((1000 * y).round().astype(int))  # v is -1/2, -1/3, 1
      [[-460 -276  802]]

    Ren, Liao, Urtasun, Sinz and Zemel, "Normalizing the Normalizers", 2016,
    https://arxiv.org/abs/1611.04520.
    """
    name = "divisive_norm"
    x = ax.to_float_array(name, x)
    ax.check_real(name, "x", x)
    features = ax.sorted_axes(name, "feature_axes", feature_axes, x.ndim)
    window = ax.to_positive_ints(name, "window", window)
    ax.check_shape(name, "window", (len(window),), (x.ndim - 1,))
    lengths = dict(enumerate(window, start=1))
    epsilon = ax.to_epsilon(name, epsilon)
    wide = x.astype(ax.compute_dtype(x.dtype))
    number = _window_sum(jnp.ones((1, *x.shape[1:]), wide.dtype), lengths)
    v = wide - _window_sum(wide, lengths) / number
    return normalize(
        v,
        jnp.zeros((1,) * x.ndim, wide.dtype),
        _window_sum(square(v), lengths) / number,
        ax.to_parameter(name, "scale", scale, x, features),
        ax.to_parameter(name, "bias", bias, x, features),
        epsilon=epsilon,
        dtype=ax.to_dtype(name, dtype, x, x=x, scale=scale, bias=bias),
    )


def _window_sum(x, lengths):
    """Returns the sum of the entries around each, along some axes; zeros beyond the borders."""
    dimensions = [lengths.get(axis, 1) for axis in range(x.ndim)]
    padding = [(length // 2, (length - 1) // 2) for length in dimensions]
    zero = np.zeros((), x.dtype)  # a traced zero would hide that this is a sum, with a transpose
    layout = jax.typeof(x).sharding
    # JAX knows no transpose of uneven padding along what is dealt out.
    x = pool.whole(x, *(axis for axis, length in enumerate(dimensions) if length % 2))
    total = lax.reduce_window(x, zero, lax.add, dimensions, [1] * x.ndim, padding)
    return pool.place(total, layout.mesh, layout.spec)
