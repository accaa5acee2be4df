"""Layer and root mean square norm on TPU, and batch norm's moments: what callers see.

Rows that fit are read once and stay on chip (`mosaic_tpu_rows`), short ones across; longer ones are
read twice, chunk by chunk (`mosaic_tpu_long`). Columns are in `mosaic_tpu_columns` and
`mosaic_tpu_gradients`.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from normax.kernels import mosaic_tpu_blocks as bl
from normax.kernels import mosaic_tpu_long as long
from normax.kernels import mosaic_tpu_rows as rows
from normax.kernels.mosaic_tpu_columns import column_moments_in_units as column_moments_in_units
from normax.kernels.mosaic_tpu_columns import supports_columns as supports_columns
from normax.kernels.mosaic_tpu_gradients import column_gradients as column_gradients


def supports(x: Any, *, dtype: DTypeLike | None = None) -> str | None:
    """Returns why the kernels over rows cannot take an array, or None.

    Args:
      x: the array, or anything with its shape and dtype.
      dtype: dtype of the output, or of its cotangent; that of `x` by default.
    """
    for each in (x.dtype, dtype):
        reason = None if each is None else bl.unsupported_dtype(each)
        if reason:
            return reason
    return bl.unsupported_shape(x.shape)


def forward(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    centered: bool,
    epsilon: float,
    dtype: DTypeLike | None = None,
    interpret: Any = False,
) -> jax.Array:
    """Normalizes over the last axis.

    Args:
      x: array of any leading shape, bfloat16 or float32.
      scale: gamma, of shape `x.shape[-1:]`; None is one.
      bias: beta, likewise; None is zero.
      centered: subtract the mean; False divides by the root mean square.
      epsilon: added to the variance.
      dtype: dtype of the output, bfloat16 or float32; that of `x` by default.
      interpret: run it in Pallas' interpreter; True or `pltpu.InterpretParams`.

    Returns:
      An array of the shape of `x`.

    Raises:
      ValueError: what `supports` names.
    """
    return _forward(x, None, scale, bias, centered, epsilon, dtype, interpret, False)[0]


def forward_with_statistics(
    x: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    centered: bool,
    epsilon: float,
    dtype: DTypeLike | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normalizes as `forward`, and returns the mean and variance too.

    Returns:
      y, and float32 mean and var of shape `x.shape[:-1]`; not centered, the mean is zero and the
      variance the mean square.
    """
    y, *mean, var = _forward(x, None, scale, bias, centered, epsilon, dtype, interpret, True)
    return y, mean[0] if mean else jnp.zeros_like(var), var


def add_forward(
    x: jax.Array,
    residual: jax.Array,
    scale: jax.Array | None,
    bias: jax.Array | None,
    *,
    centered: bool,
    epsilon: float,
    dtype: DTypeLike | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """Adds a residual, and normalizes the sum as `forward`, in one read.

    Args:
      x: as in `forward`.
      residual: array of the shape of `x`, bfloat16 or float32.
      scale: as in `forward`.
      bias: likewise.
      centered: likewise.
      epsilon: likewise.
      dtype: of y, likewise.
      interpret: likewise.

    Returns:
      s = x + residual, rounded to the dtype of `x`, and y, normalized from that.

    Raises:
      ValueError: what `supports` names, or a residual of another shape.
    """
    s, y = _forward(x, residual, scale, bias, centered, epsilon, dtype, interpret, False)
    return s, y


def backward(
    x: jax.Array,
    scale: jax.Array | None,
    dy: jax.Array,
    *,
    centered: bool,
    epsilon: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of `forward`; the statistics are measured anew.

    Args:
      x: what `forward` was given.
      scale: likewise.
      dy: cotangent of its output, of the shape of `x`, bfloat16 or float32.
      centered: as there.
      epsilon: as there.
      interpret: as there.

    Returns:
      dx, of the dtype of `x`; dscale and dbias, float32 of shape `x.shape[-1:]`, summed over all
      rows in a fixed order.

    Raises:
      ValueError: what `supports` names.
    """
    return _backward(x, scale, dy, None, centered, epsilon, interpret)


def add_backward(
    s: jax.Array,
    scale: jax.Array | None,
    dy: jax.Array,
    ds: jax.Array,
    *,
    centered: bool,
    epsilon: float,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns the gradients of `add_forward`, in one read.

    Args:
      s: the sum that it returned.
      scale: as there.
      dy: cotangent of y, of the shape of `s`, bfloat16 or float32.
      ds: cotangent of the sum, likewise.
      centered: as there.
      epsilon: as there.
      interpret: as there.

    Returns:
      dx, which is also the residual's, rounded once; dscale and dbias as of `backward`.

    Raises:
      ValueError: what `supports` names, or cotangents of another shape.
    """
    return _backward(s, scale, dy, ds, centered, epsilon, interpret)


def _check(x, dtype, *others):
    for each in (dtype, *(other.dtype for other in others)):
        reason = supports(x, dtype=each)
        if reason:
            raise ValueError(reason)
    for other in others:
        if other.shape != x.shape:
            raise ValueError(f"expected arrays of shape {x.shape}, got {other.shape}")


def _forward(x, residual, scale, bias, centered, epsilon, dtype, interpret, with_statistics):
    dtype = jnp.dtype(x.dtype if dtype is None else dtype)
    _check(x, dtype, *([] if residual is None else [residual]))
    if 0 in x.shape:
        nothing = [jnp.zeros(x.shape[:-1], jnp.float32)] * (2 * with_statistics)
        return [*([] if residual is None else [x]), jnp.zeros(x.shape, dtype), *nothing]
    function, there, back = _laid_out(x.shape, gradient=False, residual=residual is not None)
    made = function(
        there(x),
        None if residual is None else there(residual),
        scale,
        bias,
        centered=centered,
        epsilon=float(epsilon),
        dtype=dtype,
        with_statistics=with_statistics,
        interpret=interpret,
    )
    return [back(v) for v in made]


def _backward(x, scale, dy, ds, centered, epsilon, interpret):
    _check(x, None, dy, *([] if ds is None else [ds]))
    length = x.shape[-1]
    if 0 in x.shape:
        return x, jnp.zeros(length, jnp.float32), jnp.zeros(length, jnp.float32)
    function, there, back = _laid_out(x.shape, gradient=True, residual=ds is not None)
    dx, dscale, dbias = function(
        there(x),
        scale,
        there(dy),
        None if ds is None else there(ds),
        centered=centered,
        epsilon=float(epsilon),
        interpret=interpret,
    )
    return back(dx), dscale.reshape(length), dbias.reshape(length)


def _laid_out(shape, *, gradient, residual) -> tuple[Any, Any, Any]:
    """Returns the kernel for a shape, and how arrays get to be as it takes them, and back."""
    axis = rows.lanes_of(shape)
    if axis is not None:
        function = rows.backward if gradient else rows.forward
        return (
            functools.partial(function, across=True),
            functools.partial(rows.turned, axis=axis),
            functools.partial(rows.turned_back, shape=shape, axis=axis),
        )
    on_chip = rows.fits(shape[-1], gradient=gradient, residual=residual)
    module = rows if on_chip else long
    return (
        module.backward if gradient else module.forward,
        lambda v: v.reshape(bl.grouped(shape)),
        lambda v: v.reshape(shape if v.ndim == 3 else shape[:-1]),
    )
