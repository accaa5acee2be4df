"""Shapes, axes and dtypes: the one room where bad input is refused.

Every check but `check_values`, which is for checkpoints, looks at static facts only (shapes,
dtypes, Python numbers), so it costs nothing at run time and speaks while a function is traced. A
message names the function, the argument, what was given and what was expected.
"""

import math
import numbers
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike

Axes = int | Iterable[int]


def to_float_array(name: str, x: ArrayLike, label: str = "x") -> jax.Array:
    """Returns `x` as an array; refuses anything but real or complex floating point."""
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.inexact):
        raise TypeError(
            f"{name}: expected {label} of a floating-point or complex dtype, got {x.dtype}; "
            f"convert it first, e.g. {label}.astype(jnp.float32)"
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


def to_parameter(
    name: str, label: str, value: ArrayLike | None, x: jax.Array, feature_axes: tuple[int, ...]
) -> jax.Array | None:
    """Returns a scale or bias of shape `x.shape[feature_axes]`, laid along those axes of x."""
    if value is None:
        return None
    value = to_float_array(name, value, label)
    check_feature_shape(name, label, value.shape, x, feature_axes)
    return along(value, x.ndim, feature_axes)


def to_dtype(name: str, dtype: DTypeLike | None, like: jax.Array, **operands: Any) -> jnp.dtype:
    """Returns the dtype of the output, like's by default; refuses one that cannot hold it."""
    result = jnp.dtype(like.dtype if dtype is None else dtype)
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


def to_ids(name: str, label: str, ids: ArrayLike) -> jax.Array:
    """Returns the number of the segment, or domain, that each row belongs to."""
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
    if mask is None:
        return None
    mask = jnp.asarray(mask)
    if not (mask.dtype == jnp.bool_ or jnp.issubdtype(mask.dtype, jnp.integer)):
        raise TypeError(
            f"{name}: expected a boolean mask (True: the entry counts), got {mask.dtype}"
        )
    fits = mask.ndim <= x.ndim and all(
        m in (1, n) for m, n in zip(mask.shape[::-1], x.shape[::-1], strict=False)
    )
    if not fits:
        raise ValueError(
            f"{name}: expected a mask that broadcasts to x.shape={x.shape}, got shape {mask.shape}"
        )
    return jnp.expand_dims(mask.astype(bool), tuple(range(x.ndim - mask.ndim)))


def to_epsilon(name: str, epsilon: float) -> float:
    """Returns epsilon as a Python float; it is part of the compiled program."""
    return _number_within(name, "epsilon", epsilon, 0.0, math.inf)


def check_momentum(name: str, momentum: Any) -> None:
    """Refuses a Python number outside [0, 1]; a traced momentum is taken as it is."""
    if momentum is not None:
        check_fraction(name, "momentum", momentum)


def _number_within(name: str, label: str, value: Any, low: float, high: float) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):  # JAX's ConcretizationTypeError, of a tracer, is a TypeError
        raise TypeError(f"{name}: expected {label} to be a Python number, got {value!r}") from None
    if not low <= number <= high or math.isinf(number):
        raise ValueError(f"{name}: expected {label} in [{low:g}, {high:g}], got {value!r}")
    return number


def check_loss_scale(name: str, loss_scale: Any) -> None:
    """Refuses a Python number that is not above zero; a traced one is taken as it is."""
    if not isinstance(loss_scale, jax.Array):
        _number_within(name, "loss_scale", loss_scale, np.finfo(np.float32).tiny, math.inf)


def check_computing_dtype(name: str, dtype: DTypeLike | None) -> None:
    """Refuses a dtype for a model to compute in that is not real floating-point."""
    if dtype is not None and not jnp.issubdtype(jnp.dtype(dtype), jnp.floating):
        raise TypeError(
            f"{name}: expected dtype to be floating-point or None, got {jnp.dtype(dtype)}"
        )


def check_names(name: str, label: str, names: Any) -> tuple[str, ...]:
    """Returns several names; refuses a lone string, which would be taken letter by letter."""
    if isinstance(names, str) or not all(isinstance(each, str) for each in names):
        raise TypeError(f"{name}: expected {label} to be a tuple of strings, got {names!r}")
    return tuple(names)


def check_given(name: str, label: str, value: Any) -> None:
    """Refuses None."""
    if value is None:
        raise TypeError(f"{name}: expected a {label}, got None")


def check_real(name: str, label: str, value: jax.Array) -> None:
    """Refuses complex numbers, where there is no formula for them."""
    if jnp.iscomplexobj(value):
        raise TypeError(f"{name}: expected {label} of a real dtype, got {value.dtype}")


def check_limit(name: str, label: str, value: Any, low: float) -> None:
    """Refuses a Python number below a limit; a traced one is taken as it is."""
    if not isinstance(value, jax.Array):
        _number_within(name, label, value, low, math.inf)


def check_fraction(name: str, label: str, value: Any) -> None:
    """Refuses a Python number outside [0, 1]; a traced one is taken as it is."""
    if not isinstance(value, jax.Array):
        _number_within(name, label, value, 0.0, 1.0)


def to_positive_int(name: str, label: str, value: Any) -> int:
    """Returns an int of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {label} to be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected {label} to be at least 1, got {value}")
    return int(value)


def check_ghosts(name: str, size: int, batch: int, devices: int) -> None:
    """Refuses ghost batches that would end in the middle of a device's examples."""
    whole = batch % size == 0 if size <= batch else size % batch == 0
    if not whole or (size > batch and devices % min(size // batch, devices)):
        raise ValueError(
            f"{name}: expected ghost_size to divide the {batch} examples of a device, or to be a "
            f"multiple of them that divides {devices} devices, got {size}"
        )


def check_switch(name: str, label: str, value: Any) -> None:
    """Refuses anything but a Python bool, for what decides which program is compiled."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name}: expected {label} to be True or False, got {value!r}; it chooses the program, "
            "so it cannot be traced: make it a static argument of jit"
        )


def check_statistics(name: str, label: str, value: Any, kind: type) -> None:
    """Refuses what is no named tuple of statistics, or has leaves of several shapes."""
    if not isinstance(value, kind):
        fields = ", ".join(getattr(kind, "_fields", ()))
        raise TypeError(
            f"{name}: expected {label} to be a normax.{kind.__name__}({fields}), "
            f"got {type(value).__name__}"
        )
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(value)]
    if len(set(shapes)) > 1:
        raise ValueError(f"{name}: expected {label} with leaves of one shape, got {shapes}")


def check_choice(name: str, label: str, value: Any, choices: tuple[str, ...]) -> None:
    """Refuses anything but one of a few words."""
    if value not in choices:
        raise ValueError(f"{name}: expected {label} to be one of {choices}, got {value!r}")


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


def axis_size(name: str, axis_name: Any) -> int:
    """Returns the number of devices along `axis_name`; says what to do where it is not bound."""
    try:
        return lax.axis_size(axis_name)
    except NameError:
        raise ValueError(
            f"{name}: expected axis_name={axis_name!r} to be an axis of an enclosing "
            "jax.shard_map, jax.vmap or jax.pmap, and there is none of that name. Under plain "
            "jax.jit leave axis_name=None: statistics of a sharded array are those of all of it"
        ) from None


def check_axis_name_with_groups(name: str, axis_name: Any, groups: Any) -> None:
    """Refuses groups of devices without the axis they are on."""
    if axis_name is None and groups is not None:
        raise ValueError(
            f"{name}: expected an axis_name with axis_index_groups={groups!r}, got None"
        )


def check_axis_index_groups(name: str, groups: Any, size: int) -> tuple[tuple[int, ...], ...]:
    """Returns groups of device indices as tuples; each device must be in just one."""
    groups = tuple(tuple(int(i) for i in group) for group in groups)
    if sorted(i for group in groups for i in group) != list(range(size)):
        raise ValueError(
            f"{name}: expected axis_index_groups to hold each of 0 to {size - 1} once, got {groups}"
        )
    return groups


def check_keys(name: str, label: str, given: Iterable[str], expected: Iterable[str]) -> None:
    """Refuses keys that are missing, or that nobody asked for."""
    given, expected = set(given), set(expected)
    if given != expected:
        raise ValueError(
            f"{name}: expected {label} with the keys of like; missing are "
            f"{sorted(expected - given)}, unknown are {sorted(given - expected)}"
        )


def check_all_or_none(name: str, label: str, given: Iterable, expected: Iterable) -> None:
    """Refuses a state that is there in part: what is missing cannot be made up."""
    given, expected = tuple(given), tuple(expected)
    if given and given != expected:
        raise ValueError(
            f"{name}: expected {label} with {expected}, got only {given}; a checkpoint made with a "
            "momentum has no count: give one, or keep the momentum"
        )


def check_like(name: str, label: str, value: Any, like: Any) -> None:
    """Refuses another shape or dtype than that of `like`."""
    if jnp.shape(value) != jnp.shape(like):
        raise ValueError(
            f"{name}: expected {label} of shape {jnp.shape(like)}, got {jnp.shape(value)}"
        )
    if jnp.result_type(value) != jnp.result_type(like):
        raise TypeError(
            f"{name}: expected {label} of dtype {jnp.result_type(like)}, "
            f"got {jnp.result_type(value)}"
        )


def check_values(name: str, label: str, value: Any, not_negative: bool) -> None:
    """Refuses numbers that are not finite, or negative where that means nothing."""
    if jnp.issubdtype(jnp.result_type(value), jnp.number):
        value = np.asarray(value)
        wide = value.astype(complex)
        if not np.isfinite(wide).all():
            bad = int((~np.isfinite(wide)).sum())
            raise ValueError(f"{name}: expected finite {label}, got {bad} values that are not")
        if not_negative and value.size and wide.real.min() < 0:
            raise ValueError(f"{name}: expected {label} of at least 0, got {wide.real.min()}")


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


def result_dtype(dtype: DTypeLike | None, *operands: Any) -> jnp.dtype:
    """Returns Flax's dtype for a result: `dtype`, or what the operands present promote to."""
    if dtype is not None:
        return jnp.dtype(dtype)
    return promote(*(operand for operand in operands if operand is not None))
