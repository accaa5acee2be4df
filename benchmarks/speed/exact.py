"""What is right: each operation and its gradients in float64 NumPy, on a slice of the input.

The gradients of scale and bias sum over all rows. So that a slice is enough, the check is made
with a cotangent that is zero outside of it; the slice has the first row, the last, and some
between. A batch norm is cut along its features instead, each of which stands by itself.
"""

from typing import Any, NamedTuple

import numpy as np

from benchmarks.speed.cases import Case

SLICE = 16


class Limits(NamedTuple):
    """How far from exact a contestant may be, as a part of the largest exact value."""

    output: float
    gradient: float


# Of 8 bits of a bfloat16 four may be lost, for a contestant that computes in it; of float32 what
# plain sums of millions lose.
LIMITS = {"bfloat16": Limits(0.06, 0.06), "float16": Limits(0.01, 0.01)}
LIMITS["float32"] = Limits(1e-4, 1e-3)
LIMITS["float64"] = LIMITS["float32"]


def axis(case: Case) -> int:
    """Returns the axis of x along which the slice is cut."""
    return -1 if case.norm == "batch" else 0


def indices(case: Case) -> np.ndarray:
    """Returns where along that axis: the first, the last, and some between."""
    length = case.shape[axis(case)]
    number = min(length, {"batch": 4, "group": 2}.get(case.norm, SLICE))
    return np.unique(np.linspace(0, length - 1, number).round().astype(int))


def _sigmoid(z):
    return 1 / (1 + np.exp(-z))


def _activate(wrap: str, z: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns the activation that goes with a wrap, and its derivative."""
    if wrap in ("relu", "add_relu"):
        return np.maximum(z, 0), (z > 0).astype(z.dtype)
    if wrap == "silu":
        s = _sigmoid(z)
        return z * s, s * (1 + z * (1 - s))
    if wrap == "gelu":
        k = np.sqrt(2 / np.pi)
        t = np.tanh(k * (z + 0.044715 * z**3))
        slope = 0.5 * z * (1 - t * t) * k * (1 + 3 * 0.044715 * z * z)
        return 0.5 * z * (1 + t), 0.5 * (1 + t) + slope
    return z, np.ones_like(z)


def answer(case: Case, given: dict[str, Any]) -> dict[str, np.ndarray]:
    """Returns outputs and gradients of a slice in float64.

    Args:
      case: the operation.
      given: arrays of the slice: x, scale, bias, second if the case has one, dy, and dsum, the
        cotangent of the sum, for "add".

    Returns:
      By name: y, and sum for "add"; dx, dscale, dbias if centered, dsecond for a gate or a
      residual that is added after the norm; near_zero, where a ReLU's input is too near zero for
      its derivative to be told, if there is a ReLU.
    """
    given = {name: np.asarray(value).astype(np.float64) for name, value in given.items()}
    x, scale, dy = given["x"], given["scale"], given["dy"]
    bias = given["bias"] if case.centered else 0.0
    second = given.get("second", 0.0)
    found = {}
    if case.wrap == "add":
        x = found["sum"] = x + second
    grouped = x
    if case.norm == "group":
        grouped = x.reshape(*x.shape[:-1], case.groups, -1)
    last = grouped.ndim - 1
    axes = {
        "layer": (last,),
        "rms": (last,),
        "batch": tuple(range(last)),
        "group": (*range(1, last - 1), last),
    }[case.norm]

    def mean(values):
        return np.mean(values, axes, keepdims=True)

    d = grouped - mean(grouped) if case.centered else grouped
    rstd = 1 / np.sqrt(mean(d * d) + case.epsilon)
    xhat = (d * rstd).reshape(x.shape)
    z = xhat * scale + bias
    if case.wrap == "add_relu":
        z = z + second
    found["y"], slope = _activate(case.wrap, z)
    dz = dy * slope
    if case.wrap == "gate":
        gate, gate_slope = _activate("silu", second)
        found["dsecond"] = dy * found["y"] * gate_slope
        found["y"], dz = found["y"] * gate, dy * gate
    if case.wrap == "add_relu":
        found["dsecond"] = dz
    if case.wrap.endswith("relu"):
        found["near_zero"] = np.abs(z) < (1e-4 if case.dtype == "float32" else 0.05)
    t = (dz * scale).reshape(grouped.shape)
    t = t - mean(t) if case.centered else t
    hat = d * rstd
    found["dx"] = ((t - hat * mean(t * hat)) * rstd).reshape(x.shape)
    if case.wrap == "add":
        found["dx"] = found["dx"] + given["dsum"]
    rows = tuple(range(x.ndim - 1))
    found["dscale"] = np.sum(dz * xhat, rows)
    if case.centered:
        found["dbias"] = np.sum(dz, rows)
    return found


def error(name: str, value: Any, exact: dict[str, np.ndarray]) -> float:
    """Returns the largest error of a named result, as a part of the largest exact value."""
    expected = exact[name]
    value = np.asarray(value).astype(np.float64)
    if value.shape != expected.shape:
        raise ValueError(f"{name}: expected the shape {expected.shape}, got {value.shape}")
    apart = np.abs(value - expected)
    if name in ("dx", "dsecond") and "near_zero" in exact:
        apart = np.where(exact["near_zero"], 0, apart)
    return float(np.max(apart) / max(np.max(np.abs(expected)), 1e-30))


def verdict(case: Case, found: dict[str, Any], exact: dict[str, np.ndarray]) -> tuple[bool, float]:
    """Returns whether all results are right, and the largest error of y or dx."""
    limits = LIMITS[case.dtype]
    right, largest = True, 0.0
    for name, value in found.items():
        apart = error(name, value, exact)
        limit = limits.output if name in ("y", "sum") else limits.gradient
        # Not `apart > limit`: NaN is wrong, too.
        right = right and apart <= limit
        if name in ("y", "dx"):
            largest = max(largest, apart) if apart == apart else apart
    return right, largest
