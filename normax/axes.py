"""Shapes, axes and dtypes: the one room where bad input is refused.

Every check but `check_values`, which is for checkpoints, looks at static facts only (shapes,
dtypes, Python numbers), so it costs nothing at run time and speaks while a function is traced. A
message names the function, the argument, what was given and what was expected.
"""

import math
import numbers
from collections.abc import Iterable
from typing import Any, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import core
from jax.typing import ArrayLike, DTypeLike

from normax.checks import axis_size as axis_size
from normax.checks import check_activation as check_activation
from normax.checks import check_all_or_none as check_all_or_none
from normax.checks import check_available as check_available
from normax.checks import check_axis_index_groups as check_axis_index_groups
from normax.checks import check_axis_name_with_groups as check_axis_name_with_groups
from normax.checks import check_bound as check_bound
from normax.checks import check_choice as check_choice
from normax.checks import check_collections as check_collections
from normax.checks import check_computing_dtype as check_computing_dtype
from normax.checks import check_divides as check_divides
from normax.checks import check_found as check_found
from normax.checks import check_fraction as check_fraction
from normax.checks import check_ghosts as check_ghosts
from normax.checks import check_given as check_given
from normax.checks import check_keys as check_keys
from normax.checks import check_kind as check_kind
from normax.checks import check_learned as check_learned
from normax.checks import check_like as check_like
from normax.checks import check_limit as check_limit
from normax.checks import check_loss_scale as check_loss_scale
from normax.checks import check_momentum as check_momentum
from normax.checks import check_names as check_names
from normax.checks import check_not_both as check_not_both
from normax.checks import check_number as check_number
from normax.checks import check_params as check_params
from normax.checks import check_positive as check_positive
from normax.checks import check_real as check_real
from normax.checks import check_statistics as check_statistics
from normax.checks import check_structure as check_structure
from normax.checks import check_switch as check_switch
from normax.checks import check_takes_mask as check_takes_mask
from normax.checks import check_values as check_values
from normax.checks import dtype_of as dtype_of
from normax.checks import to_epsilon as to_epsilon
from normax.checks import to_float as to_float
from normax.checks import to_fraction as to_fraction
from normax.checks import to_number as to_number
from normax.checks import to_positive_int as to_positive_int
from normax.checks import to_positive_ints as to_positive_ints

Axes = int | Iterable[int]


def to_float_array(name: str, x: ArrayLike, label: str = "x") -> jax.Array:
    """Returns `x` as an array; refuses anything but floats of 16 bits or more, real or complex."""
    try:
        x = jnp.asarray(x)
    except (TypeError, ValueError):  # text, lists of several lengths, None
        raise TypeError(f"{name}: expected {label} to be an array, got {x!r}") from None
    if not jnp.issubdtype(x.dtype, jnp.inexact) or jnp.finfo(x.dtype).bits < 16:
        raise TypeError(
            f"{name}: expected {label} of a floating-point or complex dtype of at least 16 bits, "
            f"got {x.dtype}; convert it first, e.g. {label}.astype(jnp.float32)"
        )
    return x


def sorted_axes(name: str, label: str, axes: Axes, ndim: int) -> tuple[int, ...]:
    """Returns `axes` as non-negative, ascending axes of an array of rank `ndim`."""
    given: Any = (axes,) if isinstance(axes, numbers.Integral) else axes
    if isinstance(given, str) or not isinstance(given, Iterable):
        raise TypeError(f"{name}: expected {label} to be an int or several ints, got {axes!r}")
    given = tuple(given)
    for axis in given:
        if not isinstance(axis, numbers.Integral) or isinstance(axis, bool):
            raise TypeError(f"{name}: expected {label} to be an int or several ints, got {axes!r}")
        if not -ndim <= int(axis) < ndim:
            raise ValueError(
                f"{name}: expected {label} within [{-ndim}, {ndim}) for an array of rank "
                f"{ndim}, got {axes!r}"
            )
    positive = tuple(sorted(int(axis) % ndim for axis in given))
    if len(set(positive)) < len(positive):
        raise ValueError(
            f"{name}: expected {label} without repeats for an array of rank {ndim}, got {axes!r}"
        )
    return positive


def reduced_axes(name: str, label: str, axes: Axes, ndim: int) -> tuple[int, ...]:
    """Like `sorted_axes`, for axes to reduce: there must be one."""
    positive = sorted_axes(name, label, axes, ndim)
    if not positive:
        raise ValueError(f"{name}: expected at least one axis in {label}, got {axes!r}")
    return positive


def other_axes(axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Returns the axes of an array of rank `ndim` that are not in `axes`."""
    return tuple(axis for axis in range(ndim) if axis not in axes)


def known_size(name: str, label: str, x: jax.Array, axes: tuple[int, ...]) -> int:
    """Returns how many entries there are along axes; refuses a symbolic number of them."""
    size = math.prod(x.shape[axis] for axis in axes)
    if not isinstance(size, int):
        raise ValueError(f"{name}: expected {label} of known sizes, got {axes} of {x.shape}")
    return size


def spatial_axes(name: str, feature_axes: tuple[int, ...], ndim: int) -> tuple[int, ...]:
    """Returns every axis but the leading one and `feature_axes`."""
    if 0 in feature_axes:
        raise ValueError(
            f"{name}: expected feature_axes without axis 0, got {feature_axes} for x of rank "
            f"{ndim}. The channel axes cannot include the leading dimension as this is assumed "
            "to be the batch axis."
        )
    return other_axes((0, *feature_axes), ndim)


def only_axis(name: str, label: str, axes: Axes, ndim: int) -> int:
    """Returns the single axis in `axes`."""
    positive = sorted_axes(name, label, axes, ndim)
    if len(positive) != 1:
        raise ValueError(f"{name}: expected one axis in {label}, got {axes!r}")
    return positive[0]


def group_axes(name: str, axes: Axes | None, feature: int, ndim: int) -> tuple[int, ...]:
    """Returns the axes that a group is summarised over, the feature axis among them."""
    if axes is None:
        return tuple(sorted((feature, *spatial_axes(name, (feature,), ndim))))
    positive = sorted_axes(name, "reduction_axes", axes, ndim)
    if feature not in positive:
        raise ValueError(
            f"{name}: expected reduction_axes to include the feature axis {feature} for x of rank "
            f"{ndim}, got {axes!r}"
        )
    return positive


@overload
def to_parameter(
    name: str, label: str, value: ArrayLike, x: jax.Array, feature_axes: tuple[int, ...]
) -> jax.Array: ...
@overload
def to_parameter(
    name: str, label: str, value: None, x: jax.Array, feature_axes: tuple[int, ...]
) -> None: ...
@overload
def to_parameter(
    name: str, label: str, value: ArrayLike | None, x: jax.Array, feature_axes: tuple[int, ...]
) -> jax.Array | None: ...
def to_parameter(name, label, value, x, feature_axes):
    """Returns a scale or bias of shape `x.shape[feature_axes]`, laid along those axes of x."""
    if value is None:
        return None
    value = to_float_array(name, value, label)
    check_feature_shape(name, label, value.shape, x, feature_axes)
    return along(value, x.ndim, feature_axes)


def to_dtype(name: str, dtype: DTypeLike | None, like: jax.Array, **operands: Any) -> jnp.dtype:
    """Returns the dtype of the output, like's by default; refuses one that cannot hold it."""
    result = like.dtype if dtype is None else dtype_of(name, dtype)
    if not jnp.issubdtype(result, jnp.inexact):
        raise TypeError(f"{name}: expected dtype to be floating-point or complex, got {result}")
    for label, value in operands.items():
        if jnp.iscomplexobj(value) and not jnp.issubdtype(result, jnp.complexfloating):
            raise TypeError(
                f"{name}: expected a complex dtype for the output, {label} being "
                f"{jnp.result_type(value)}, got {result}"
            )
    return result


def check_feature_shape(
    name: str, label: str, shape: tuple, x: jax.Array, feature_axes: tuple[int, ...]
) -> None:
    """Refuses a shape that is not `x.shape[feature_axes]`: nothing is ever broadcast here."""
    expected = tuple(x.shape[axis] for axis in feature_axes)
    if tuple(shape) != expected:
        raise ValueError(
            f"{name}: expected {label}.shape == {expected} (x.shape={x.shape} at feature axes "
            f"{feature_axes}), got {tuple(shape)}"
        )


def check_rank(name: str, label: str, value: Any, least: int) -> None:
    """Refuses an array of too few axes."""
    if jnp.ndim(value) < least:
        raise ValueError(
            f"{name}: expected {label} of rank {least} or more, got shape {jnp.shape(value)}"
        )


def check_known(name: str, label: str, value: Any) -> None:
    """Refuses what a model computes of its input, where it is needed after the model is called."""
    if isinstance(value, core.Tracer):
        raise TypeError(
            f"{name}: expected {label} to be known before the model is called, or a schedule, "
            f"where a batch is taken in microbatches, got {value}"
        )


def check_not_dealt_out(name: str, label: str, value: jax.Array) -> None:
    """Refuses rows that are on several devices by their type: nothing scatters over them."""
    sharding = jax.typeof(value).sharding
    if not sharding.mesh.empty and sharding.spec[0] is not None:
        raise ValueError(
            f"{name}: expected {label} with rows that are not dealt out along explicit mesh axes, "
            f"got {sharding.spec}; use automatic axes, or shard_map and axis_name"
        )


def to_ids(name: str, label: str, ids: ArrayLike) -> jax.Array:
    """Returns the number of the segment, or domain, that each row belongs to."""
    if not isinstance(ids, jax.Array):
        # JAX would keep the lower digits of larger ones alone.
        wide = np.asarray(ids)
        is_wide = np.issubdtype(wide.dtype, np.integer) and wide.itemsize > 4
        ids = wide.clip(-1, np.iinfo(np.int32).max).astype(np.int32) if is_wide else wide
    ids = jnp.asarray(ids)
    if not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(f"{name}: expected {label} to be ints, got {ids.dtype}")
    return ids


def check_shape(name: str, label: str, shape: tuple, expected: tuple) -> None:
    """Refuses another shape than the one that is expected."""
    if tuple(shape) != tuple(expected):
        raise ValueError(f"{name}: expected {label}.shape == {expected}, got {tuple(shape)}")


def shape_along(name: str, label: str, axes: Axes, x: ArrayLike) -> tuple[int, ...]:
    """Returns the lengths of x along `axes`, ascending: the shape of a scale and bias."""
    shape = jnp.shape(x)
    return tuple(shape[axis] for axis in sorted_axes(name, label, axes, len(shape)))


def feature_shape(num_features: int | Iterable[int]) -> tuple[int, ...]:
    """Returns the shape of a scale and bias for one number of features, or several."""
    return tuple(num_features) if isinstance(num_features, Iterable) else (num_features,)


def along(value: jax.Array, ndim: int, axes: tuple[int, ...]) -> jax.Array:
    """Returns `value` with its axes at `axes` of rank `ndim` and length 1 elsewhere."""
    return jnp.expand_dims(value, other_axes(axes, ndim))


def to_mask(name: str, mask: ArrayLike | None, x: jax.Array) -> jax.Array | None:
    """Returns a mask as booleans of the rank of x, each axis as long as in x or 1."""
    if mask is not None and jnp.issubdtype(jnp.result_type(mask), jnp.integer):
        mask = jnp.asarray(mask) > 0
    mask = to_weights(name, mask, x)
    if mask is not None and mask.dtype != jnp.bool_:
        raise TypeError(
            f"{name}: expected a boolean mask (True: the entry counts), got {mask.dtype}; "
            "there is no such thing as weights here"
        )
    return mask


def to_weights(name: str, mask: ArrayLike | None, x: jax.Array) -> jax.Array | None:
    """Returns a mask, or weights in the real dtype to compute in, of the rank of x."""
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if jnp.issubdtype(mask.dtype, jnp.complexfloating):
        raise TypeError(
            f"{name}: expected a mask of booleans (True: the entry counts) or of real weights, "
            f"got {mask.dtype}"
        )
    fits = mask.ndim <= x.ndim and all(
        m in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected a mask that broadcasts to x.shape={x.shape}, got shape {mask.shape}"
        )
    if mask.dtype != jnp.bool_:
        mask = mask.astype(real_dtype(compute_dtype(x.dtype)))
    return jnp.expand_dims(mask, tuple(range(x.ndim - mask.ndim)))


def group_count(name: str, features: int, num_groups: int | None, group_size: int | None) -> int:
    """Returns how many groups `features` are split into; just one of the two must be given."""
    if (num_groups is None) == (group_size is None):
        raise ValueError(
            f"{name}: expected either num_groups or group_size, got num_groups={num_groups}, "
            f"group_size={group_size} (num_groups is 32 unless told: pass num_groups=None)"
        )
    label, divisor = (
        ("num_groups", num_groups) if group_size is None else ("group_size", group_size)
    )
    if not isinstance(divisor, numbers.Integral) or isinstance(divisor, bool):
        raise TypeError(f"{name}: expected {label} to be an int, got {divisor!r}")
    if divisor <= 0 or features % divisor:
        raise ValueError(f"{name}: expected {label} to divide {features} features, got {divisor}")
    return int(divisor if group_size is None else features // divisor)


def check_spectral(name: str, w: jax.Array, u_shape: tuple, n_steps: Any) -> None:
    """Refuses what power iteration cannot start from."""
    check_real(name, "w", w)
    if w.ndim < 2:
        raise ValueError(f"{name}: expected w of rank 2 or more, got shape {w.shape}")
    if tuple(u_shape) != (1, w.shape[-1]):
        raise ValueError(
            f"{name}: expected state.u.shape == {(1, w.shape[-1])} (w.shape={w.shape}), "
            f"got {tuple(u_shape)}"
        )
    if not isinstance(n_steps, numbers.Integral) or n_steps < 1:
        raise ValueError(f"{name}: expected n_steps to be an int of at least 1, got {n_steps!r}")


def is_weight(value: jax.Array, matrices_only: bool) -> bool:
    """Returns whether a parameter has rank 2 or more; refuses one above 2 where told to."""
    if matrices_only and value.ndim > 2:
        raise ValueError(
            f"SpectralNorm: expected weights of rank 2, got shape {value.shape}. "
            f"Input is {value.ndim}D but error_on_non_matrix is True"
        )
    return value.ndim > 1


def check_more_than_one_value(name: str, count: Any, x: jax.Array) -> None:
    """Refuses a training batch that has one value per feature: its variance means nothing."""
    if isinstance(count, int) and count == 1:
        raise ValueError(
            f"{name}: expected more than one value per feature to train on, got x.shape={x.shape}; "
            "use a larger batch, use_running_average=True, or layer_norm"
        )


def compute_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype to compute in: float32 at least, so halves are widened and float64 kept."""
    return promote(dtype, jnp.float32)


def real_dtype(dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype of the real part of `dtype`."""
    return jnp.finfo(dtype).dtype


def promote(*operands: Any) -> jnp.dtype:
    """Returns the common dtype by JAX's standard rules, also where strict rules are in force."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*operands)


def result_dtype(name: str, dtype: DTypeLike | None, *operands: Any) -> jnp.dtype:
    """Returns Flax's dtype for a result: `dtype`, or what the operands present promote to."""
    if dtype is not None:
        return dtype_of(name, dtype)
    return promote(*(operand for operand in operands if operand is not None))
