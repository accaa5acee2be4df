"""Numbers, words, states and devices: what `axes.py` refuses of them, in its name.

A message names the function, the argument, what was given and what was expected.
"""

import contextlib
import inspect
import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike, DTypeLike


def to_epsilon(name: str, epsilon: float) -> float:
    """Returns epsilon as a Python float; it is part of the compiled program."""
    return to_number(name, "epsilon", epsilon)


def to_number(name: str, label: str, value: Any) -> float:
    """Returns a Python float of at least 0; it is part of the compiled program."""
    return _number_within(name, label, value, 0.0, math.inf)


def check_number(name: str, label: str, value: Any) -> None:
    """Refuses what is no Python number; a traced one is taken, if it is real and a scalar."""
    if not _is_scalar_array(name, label, value):
        _number_within(name, label, value, -math.inf, math.inf)


def check_fraction(name: str, label: str, value: Any) -> None:
    """Refuses a Python number outside [0, 1]; an array is taken, if it is real."""
    if isinstance(value, jax.Array):
        check_real(name, label, value)
    else:
        _number_within(name, label, value, 0.0, 1.0)


def to_fraction(name: str, label: str, value: Any) -> float:
    """Returns a Python float in [0, 1]; it is part of the compiled program."""
    return _number_within(name, label, value, 0.0, 1.0)


def check_momentum(name: str, momentum: Any) -> None:
    """Refuses a Python number outside [0, 1]; a traced momentum is taken as it is."""
    if momentum is not None:
        check_fraction(name, "momentum", momentum)


def check_limit(name: str, label: str, value: Any, low: float) -> None:
    """Refuses a Python number below a limit, which may be inf; a traced one is taken likewise."""
    if not _is_scalar_array(name, label, value) and value != math.inf:
        _number_within(name, label, value, low, math.inf)


def check_bound(name: str, bound: Any) -> None:
    """Refuses a Python number that is not above zero; None is none, a traced one stays."""
    if bound is not None:
        check_positive(name, "bound", bound)


def check_loss_scale(name: str, loss_scale: Any) -> None:
    """Refuses a Python number that is not above zero; a traced one is taken as it is."""
    check_positive(name, "loss_scale", loss_scale)


def check_positive(name: str, label: str, value: Any) -> None:
    """Refuses a Python number that is not above zero; a traced one is taken likewise."""
    if not _is_scalar_array(name, label, value):
        _number_within(name, label, value, float(np.finfo(np.float32).tiny), math.inf)


def to_positive_int(name: str, label: str, value: Any) -> int:
    """Returns an int of at least 1."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name}: expected {label} to be an int, got {value!r}")
    if value < 1:
        raise ValueError(f"{name}: expected {label} to be at least 1, got {value}")
    return int(value)


def to_positive_ints(name: str, label: str, values: Any) -> tuple[int, ...]:
    """Returns several ints of at least 1."""
    if not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected {label} to be several ints, got {values!r}")
    return tuple(to_positive_int(name, label, value) for value in values)


def to_float(name: str, label: str, value: Any) -> float:
    """Returns any number that is not traced as a Python float."""
    if not isinstance(value, str | bytes):  # in which `float` would read numbers
        with contextlib.suppress(TypeError, ValueError):  # of a tracer it is a TypeError
            return float(value)
    raise TypeError(f"{name}: expected {label} to be a Python number, got {value!r}")


def _is_scalar_array(name: str, label: str, value: Any) -> bool:
    """Returns whether it is an array of JAX, traced or not; refuses one that is no real scalar."""
    if not isinstance(value, jax.Array):
        return False
    check_real(name, label, value)
    if value.ndim:
        raise ValueError(f"{name}: expected {label} to be one number, got shape {value.shape}")
    return True


def _number_within(name: str, label: str, value: Any, low: float, high: float) -> float:
    number = to_float(name, label, value)
    if not low <= number <= high or math.isinf(number):
        any_finite = math.isinf(low) or low <= number
        wanted = "to be finite" if any_finite and math.isinf(high) else f"in [{low:g}, {high:g}]"
        raise ValueError(f"{name}: expected {label} {wanted}, got {value!r}")
    return number


def check_real(name: str, label: str, value: ArrayLike | None) -> None:
    """Refuses complex numbers, where there is no formula for them."""
    if jnp.iscomplexobj(value):
        raise TypeError(f"{name}: expected {label} of a real dtype, got {jnp.result_type(value)}")


def check_computing_dtype(name: str, dtype: DTypeLike | None) -> None:
    """Refuses a dtype for a model to compute in that is not real floating-point."""
    if dtype is None:
        return
    if not jnp.issubdtype(result := dtype_of(name, dtype), jnp.floating):
        raise TypeError(f"{name}: expected dtype to be floating-point or None, got {result}")


def dtype_of(name: str, dtype: DTypeLike) -> jnp.dtype:
    """Returns the dtype that something names."""
    try:
        return jnp.dtype(dtype)
    except TypeError:
        raise TypeError(
            f"{name}: expected dtype to be one, such as jnp.float32, got {dtype!r}"
        ) from None


def check_found(name: str, what: str, found: bool) -> None:
    """Refuses that something is not there."""
    if not found:
        raise ValueError(f"{name}: expected {what}, got none")


def check_given(name: str, label: str, value: Any) -> None:
    """Refuses None."""
    if value is None:
        raise TypeError(f"{name}: expected a {label}, got None")


def check_params(name: str, params: Any) -> None:
    """Refuses the update of an optax transformation without the parameters."""
    if params is None:
        raise ValueError(f"{name}: expected params in update(updates, state, params), got None")


def check_not_both(name: str, label: str, other: str, given: bool) -> None:
    """Refuses one argument beside another, with which it has no meaning."""
    if given:
        raise ValueError(f"{name}: expected either {label} or {other}, got both")


def check_names(name: str, label: str, names: Any) -> tuple[str, ...]:
    """Returns several names; refuses a lone string, which would be taken letter by letter."""
    if isinstance(names, str) or not all(isinstance(each, str) for each in names):
        raise TypeError(f"{name}: expected {label} to be a tuple of strings, got {names!r}")
    return tuple(names)


def check_switch(name: str, label: str, value: Any) -> None:
    """Refuses anything but a Python bool, for what decides which program is compiled."""
    if not isinstance(value, bool | np.bool_):
        raise TypeError(
            f"{name}: expected {label} to be True or False, got {value!r}; it chooses the program, "
            "so it cannot be traced: make it a static argument of jit"
        )


def check_choice(name: str, label: str, value: Any, choices: tuple[Any, ...]) -> None:
    """Refuses anything but one of a few words."""
    if value not in choices:
        raise ValueError(f"{name}: expected {label} to be one of {choices}, got {value!r}")


def check_kind(name: str, label: str, value: Any, kind: type) -> None:
    """Refuses what is no named tuple of a kind."""
    if not isinstance(value, kind):
        fields = ", ".join(getattr(kind, "_fields", ()))
        raise TypeError(
            f"{name}: expected {label} to be a normax.{kind.__name__}({fields}), "
            f"got {type(value).__name__}"
        )


def check_collections(name: str, label: str, value: Any) -> None:
    """Refuses what is no dict of updated collections, as linen gives them beside the output."""
    if not isinstance(value, Mapping):
        raise TypeError(
            f"{name}: expected {label} to be the updated collections, the second part of what "
            f"model.apply(..., mutable=...) returns, got {type(value).__name__}"
        )


def check_statistics(name: str, label: str, value: Any, kind: type) -> None:
    """Refuses what is no named tuple of statistics, or has leaves of several shapes."""
    check_kind(name, label, value, kind)
    shapes = [jnp.shape(leaf) for leaf in jax.tree.leaves(value)]
    if len(set(shapes)) > 1:
        raise ValueError(f"{name}: expected {label} with leaves of one shape, got {shapes}")


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


def check_takes_mask(name: str, function: Any) -> None:
    """Refuses a mask for a function that knows none."""
    if "mask" not in inspect.signature(function).parameters:
        raise TypeError(f"{name}: expected no mask, which {function.__name__} does not take")


def check_learned(name: str, given: Iterable[str], learned: Iterable[str]) -> None:
    """Refuses, at a call, what is no parameter of a module."""
    for label in given:
        if label not in learned:
            expected = ", ".join(learned) or "none"
            raise TypeError(f"{name}: expected a call to give of {expected}, got {label}")


def check_structure(name: str, label: str, value: Any, like: Any) -> None:
    """Refuses containers of other types than those of `like`."""
    ours, expected = (jax.tree.structure(tree) for tree in (value, like))
    if ours != expected:
        raise TypeError(f"{name}: expected {label} of the structure {expected}, got {ours}")


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


def check_ghosts(name: str, size: int, batch: int, devices: int) -> None:
    """Refuses ghost batches that would end in the middle of a device's examples."""
    whole = batch % size == 0 if size <= batch else size % batch == 0
    if not whole or (size > batch and devices % min(size // batch, devices)):
        raise ValueError(
            f"{name}: expected ghost_size to divide the {batch} examples of a device, or to be a "
            f"multiple of them that divides {devices} devices, got {size}"
        )


def check_divides(name: str, label: str, size: int, batch: Any) -> None:
    """Refuses a symbolic batch, of a program to be exported, that a size may not divide."""
    if not isinstance(batch, int) and batch % size != 0:
        raise ValueError(
            f"{name}: expected {label} to divide a symbolic batch, such as {size}*b, got {size} "
            f"for {batch} examples"
        )


def check_available(name: str, implementation: str | None, reason: str | None) -> None:
    """Refuses a kernel that was asked for and cannot be had, for a reason."""
    if reason is not None:
        raise ValueError(
            f"{name}: expected what implementation={implementation!r} can do, got {reason}; "
            'implementation="xla" does all'
        )


def check_activation(name: str, activation: Any, x: jax.Array) -> None:
    """Refuses what is no function of entries alone: it is traced once, and kept."""
    if activation is None:
        return
    held = [cell.cell_contents for cell in getattr(activation, "__closure__", None) or ()]
    held += [
        getattr(activation, "args", ()),
        vars(activation) if hasattr(activation, "__dict__") else (),
    ]
    arrays = any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(held))
    try:
        hash(activation)
    except TypeError:  # a module of linen, which has parameters
        arrays = True
    if not callable(activation) or arrays:
        raise TypeError(
            f"{name}: expected activation to be a function that holds no arrays, such as "
            f"jax.nn.relu, got {activation!r}; apply another one to the output"
        )
    out = jax.eval_shape(activation, jax.ShapeDtypeStruct(x.shape, jnp.float32))
    if getattr(out, "shape", None) != x.shape or getattr(out, "dtype", None) != jnp.float32:
        raise ValueError(
            f"{name}: expected activation to act entry by entry and to keep the dtype, got "
            f"{activation!r}, which makes {out} of a float32 array of shape {x.shape}"
        )
