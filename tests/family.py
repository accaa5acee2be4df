"""The family beyond Flax's normalizers: each function, its paper's formula in NumPy, its module."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import normax


class Member(NamedTuple):
    """A normalizer, and the formula it must agree with.

    Attributes:
      name: of the row.
      function: the public function.
      formula: function of (x, *told, **parameters, **options), in NumPy, of any precision.
      shape: shape of x.
      parameters: shape of each learned parameter by name.
      options: of the function.
      stats: shape of the running statistics; None for none.
      told: what is given by position after x and the statistics.
      module: name of the module in linen and nnx; None for none.
      module_options: of the module.
      removable: axis whose masked positions are as good as not there; None for no mask.
      stops: whether some gradient is stopped, so that numbers cannot check it.
    """

    name: str
    function: Callable
    formula: Callable
    shape: tuple
    parameters: dict
    options: Mapping[str, Any] = MappingProxyType({})
    stats: tuple | None = None
    told: tuple = ()
    module: str | None = None
    module_options: Mapping[str, Any] = MappingProxyType({})
    removable: int | None = None
    stops: bool = False

    def inputs(self, dtype=jnp.float32):
        """Returns an input and parameters by name."""
        keys = jax.random.split(jax.random.key(1), len(self.parameters) + 1)
        x = 0.5 + 2 * jax.random.normal(keys[0], self.shape, dtype)
        uniform = lambda key, shape: jax.random.uniform(key, shape, dtype, 0.5, 1.5)
        shapes = zip(self.parameters.items(), keys[1:], strict=True)
        return x, {name: uniform(key, shape) for (name, shape), key in shapes}

    def start(self, dtype=jnp.float32):
        """Returns running statistics after some data."""
        stats = normax.RunningStats.create(self.stats, dtype)
        return stats._replace(mean=stats.mean + 0.25, var=stats.var * 3, count=stats.count + 7)

    def call(self, x, parameters, training=True, **options):
        """Returns y alone."""
        options = {**self.options, **options}
        if self.stats is None:
            return self.function(x, *self.told, **parameters, **options)
        stats = self.start(x.real.dtype)
        options["use_running_average"] = not training
        return self.function(x, stats, *self.told, **parameters, **options)[0]

    def expected(self, x, parameters):
        """Returns y by the formula, in the precision of NumPy's float64."""
        wide = lambda v: np.asarray(v, np.float64) if np.asarray(v).dtype.kind == "f" else v
        told = [jax.tree.map(wide, value) for value in self.told]
        options = {k: v for k, v in self.options.items() if k != "feature_axes"}
        return self.formula(wide(x), *told, **jax.tree.map(wide, parameters), **options)


def affine(y, scale, bias):
    """Returns y rescaled, features last."""
    return y * (1 if scale is None else scale) + (0 if bias is None else bias)


def renorm(x, scale, bias, r_max, d_max, epsilon=1e-3):
    """Ioffe 2017, equation 3, from a mean of 0.25 and a variance of 3."""
    axes = tuple(range(x.ndim - 1))
    mean, deviation = x.mean(axes), np.sqrt(x.var(axes) + epsilon)
    r = np.clip(deviation / np.sqrt(3 + epsilon), 1 / r_max, r_max)
    d = np.clip((mean - 0.25) / np.sqrt(3 + epsilon), -d_max, d_max)
    return affine((x - mean) / deviation * r + d, scale, bias)


def ghost(x, scale, bias, ghost_size):
    """Hoffer 2017: batch norm of each part."""
    parts = np.array_split(x, -(-len(x) // ghost_size))
    axes = tuple(range(x.ndim - 1))
    done = [(part - part.mean(axes)) / np.sqrt(part.var(axes) + 1e-5) for part in parts]
    return affine(np.concatenate(done), scale, bias)


def kalman(x, prior, scale, bias, prior_weight):
    """Wang 2018: the moments of a mixture, by its second moment."""
    axes, p = tuple(range(x.ndim - 1)), prior_weight
    mean = p * prior.mean + (1 - p) * x.mean(axes)
    second = p * (prior.var + prior.mean**2) + (1 - p) * (x.var(axes) + x.mean(axes) ** 2)
    return affine((x - mean) / np.sqrt(second - mean**2 + 1e-5), scale, bias)


def switchable(x, mean_weights, var_weights, scale, bias):
    """Luo 2018, equations 3 to 5, the layer's and batch's statistics out of the instance's."""
    w, v = (np.exp(weights) / np.exp(weights).sum() for weights in (mean_weights, var_weights))
    spatial = tuple(range(1, x.ndim - 1))
    mean_in, var_in = x.mean(spatial, keepdims=True), x.var(spatial, keepdims=True)
    second = var_in + mean_in**2
    mean_ln, mean_bn = mean_in.mean(-1, keepdims=True), mean_in.mean(0, keepdims=True)
    var_ln = second.mean(-1, keepdims=True) - mean_ln**2
    var_bn = second.mean(0, keepdims=True) - mean_bn**2
    mean = w[0] * mean_in + w[1] * mean_ln + w[2] * mean_bn
    var = v[0] * var_in + v[1] * var_ln + v[2] * var_bn
    return affine((x - mean) / np.sqrt(var + 1e-5), scale, bias)


def frn(x, scale, bias, threshold=None, learned_epsilon=0.0):
    """Singh and Krishnan 2019, equations 1 to 3."""
    squared = (x * x).mean(tuple(range(1, x.ndim - 1)), keepdims=True)
    y = affine(x / np.sqrt(squared + 1e-6 + np.abs(learned_epsilon)), scale, bias)
    return y if threshold is None else np.maximum(y, threshold)


def grn(x, scale, bias):
    """Woo 2023, listing 1."""
    length = np.linalg.norm(x.reshape(len(x), -1, x.shape[-1]), axis=1)[:, None]
    response = length / (length.mean(-1, keepdims=True) + 1e-6)
    return x + affine(x * response.reshape(len(x), *[1] * (x.ndim - 2), -1), scale, bias)


def lrn(x, size, alpha, beta, k):
    """Krizhevsky 2012, section 3.3, alpha divided by the size."""
    y = np.empty_like(x)
    for c in range(x.shape[-1]):
        near = x[..., max(c - size // 2, 0) : c + (size - 1) // 2 + 1]
        y[..., c] = x[..., c] / (k + alpha / size * (near**2).sum(-1)) ** beta
    return y


def divisive(x, scale, bias, window):
    """Ren 2016, equations 1 and 2, entry by entry."""

    def near(array, at):
        slices = [
            slice(max(i - n // 2, 0), i + (n - 1) // 2 + 1) for i, n in zip(at, window, strict=True)
        ]
        return array[(slice(None), *slices)].reshape(len(array), -1)

    v, y = np.empty_like(x), np.empty_like(x)
    places = list(np.ndindex(*x.shape[1:]))
    for at in places:
        v[(slice(None), *at)] = x[(slice(None), *at)] - near(x, at).mean(1)
    for at in places:
        squared = (near(v, at) ** 2).mean(1)
        y[(slice(None), *at)] = v[(slice(None), *at)] / np.sqrt(squared + 1.0)
    return affine(y, scale, bias)


def b0(x, slope, scale, bias):
    """Liu 2020, table 2."""
    batch = np.sqrt(x.var(tuple(range(x.ndim - 1))) + 1e-5)
    instance = np.sqrt(x.var(tuple(range(1, x.ndim - 1)), keepdims=True) + 1e-5)
    return affine(x / np.maximum(batch, slope * x + instance), scale, bias)


def s0(x, slope, scale, bias, num_groups):
    """Liu 2020, table 2."""
    grouped = x.reshape(*x.shape[:-1], num_groups, -1)
    axes = (*range(1, x.ndim - 1), x.ndim)
    var = np.broadcast_to(grouped.var(axes, keepdims=True), grouped.shape).reshape(x.shape)
    return affine(x / (1 + np.exp(-slope * x)) / np.sqrt(var + 1e-5), scale, bias)


def instance(x, scale, bias, epsilon):
    """Ulyanov 2016: each feature of each example."""
    axes = tuple(range(1, x.ndim - 1))
    d = x - x.mean(axes, keepdims=True)
    return affine(d / np.sqrt(x.var(axes, keepdims=True) + epsilon), scale, bias)


def segments(x, ids, number, scale, bias, mean_scale):
    """Cai 2020, equation 4, segment by segment."""
    y = np.zeros_like(x)
    for segment in range(number):
        rows = x[np.asarray(ids) == segment]
        d = rows - mean_scale * rows.mean(0)
        y[np.asarray(ids) == segment] = d / np.sqrt((d**2).mean(0) + 1e-5)
    return affine(y, scale, bias)


def domains(x, ids, scale, bias):
    """Chang 2019: batch norm of each domain's examples."""
    y = np.zeros_like(x)
    for domain in range(2):
        rows = x[np.asarray(ids) == domain]
        axes = tuple(range(x.ndim - 1))
        y[np.asarray(ids) == domain] = (rows - rows.mean(axes)) / np.sqrt(rows.var(axes) + 1e-5)
    return affine(y, scale, bias)


def batch(mean, var):
    """Returns batch norm with the mean, the variance, or both left out."""

    def formula(x, scale=None, bias=None, epsilon=1e-5, epsilon_on="variance"):
        axes = tuple(range(x.ndim - 1))
        d = x - x.mean(axes) if mean else x
        if epsilon_on == "deviation":
            return affine(d / (x.std(axes) + epsilon), scale, bias)
        return affine(d / np.sqrt(x.var(axes) + epsilon) if var else d, scale, bias)

    return formula


def length(x, scale):
    """The definition."""
    return scale * x / np.linalg.norm(x, axis=-1, keepdims=True)


IMAGES, IDS = (6, 3, 2, 4), np.array([0, 1, 1, 0, 1, 0])
PRIOR = normax.Moments(np.full(4, 9), np.linspace(-1, 1, 4), np.linspace(1, 4, 4))
AFFINE = {"scale": (4,), "bias": (4,)}

FAMILY = [
    Member(
        "renorm",
        normax.batch_renorm,
        renorm,
        IMAGES,
        AFFINE,
        {"r_max": 1.1, "d_max": 0.1},
        (4,),
        module="BatchRenorm",
        removable=0,
        stops=True,
    ),
    Member(
        "ghost",
        normax.ghost_batch_norm,
        ghost,
        IMAGES,
        AFFINE,
        {"ghost_size": 3},
        (4,),
        module="GhostBatchNorm",
    ),
    Member("ghost_ragged", normax.ghost_batch_norm, ghost, (7, 4), AFFINE, {"ghost_size": 3}, (4,)),
    Member(
        "kalman",
        normax.kalman_batch_norm,
        kalman,
        IMAGES,
        AFFINE,
        {"prior_weight": 0.7},
        (4,),
        (PRIOR,),
        module="KalmanBatchNorm",
        removable=0,
    ),
    Member(
        "switchable",
        normax.switchable_norm,
        switchable,
        IMAGES,
        {"mean_weights": (3,), "var_weights": (3,), **AFFINE},
        {},
        (4,),
        module="SwitchableNorm",
        removable=1,
    ),
    Member(
        "running_instance",
        normax.running_instance_norm,
        instance,
        IMAGES,
        AFFINE,
        {"epsilon": 1e-3},
        (4,),
        module="RunningInstanceNorm",
        module_options={"epsilon": 1e-3},
        removable=1,
    ),
    Member(
        "mean_only",
        normax.mean_only_batch_norm,
        batch(True, False),
        IMAGES,
        {"bias": (4,)},
        {},
        (4,),
        module="MeanOnlyBatchNorm",
        removable=0,
    ),
    Member(
        "variance_only",
        normax.variance_only_batch_norm,
        batch(False, True),
        IMAGES,
        AFFINE,
        {},
        (4,),
        module="VarianceOnlyBatchNorm",
        removable=0,
    ),
    Member(
        "epsilon_on_deviation",
        normax.batch_norm,
        batch(True, True),
        IMAGES,
        AFFINE,
        {"epsilon": 0.1, "epsilon_on": "deviation"},
        (4,),
        module="BatchNorm",
        module_options={"epsilon": 0.1, "epsilon_on": "deviation"},
        removable=0,
    ),
    Member(
        "frn",
        normax.filter_response_norm,
        frn,
        IMAGES,
        {**AFFINE, "threshold": (4,)},
        module="FilterResponseNorm",
        removable=1,
    ),
    Member(
        "frn_learned_epsilon",
        normax.filter_response_norm,
        frn,
        (6, 4),
        {**AFFINE, "threshold": (4,), "learned_epsilon": (4,)},
        module="FilterResponseNorm",
        module_options={"use_learned_epsilon": True},
    ),
    Member(
        "grn",
        normax.global_response_norm,
        grn,
        IMAGES,
        AFFINE,
        module="GlobalResponseNorm",
        removable=1,
    ),
    Member(
        "lrn",
        normax.local_response_norm,
        lrn,
        (3, 7),
        {},
        {"size": 4, "alpha": 0.5, "beta": 0.75, "k": 2.0},
        module="LocalResponseNorm",
        module_options={"size": 4, "alpha": 0.5, "k": 2.0},
    ),
    Member(
        "divisive",
        normax.divisive_norm,
        divisive,
        (2, 5, 4, 4),
        AFFINE,
        {"window": (3, 2, 4)},
        module="DivisiveNorm",
        module_options={"window": (3, 2, 4)},
    ),
    Member(
        "evonorm_b0",
        normax.evonorm_b0,
        b0,
        IMAGES,
        {"slope": (4,), **AFFINE},
        {},
        (4,),
        module="EvoNormB0",
        removable=1,
    ),
    Member(
        "evonorm_s0",
        normax.evonorm_s0,
        s0,
        IMAGES,
        {"slope": (4,), **AFFINE},
        {"num_groups": 2},
        module="EvoNormS0",
        module_options={"num_groups": 2},
        removable=1,
    ),
    Member(
        "segment",
        normax.segment_norm,
        segments,
        (6, 4),
        {**AFFINE, "mean_scale": (4,)},
        told=(IDS, 2),
        module="SegmentNorm",
        module_options={"num_segments": 2},
    ),
    Member(
        "domain",
        normax.domain_batch_norm,
        domains,
        IMAGES,
        AFFINE,
        {},
        (2, 4),
        (IDS,),
        module="DomainBatchNorm",
    ),
    Member("l2", normax.l2_norm, length, (5, 4), {"scale": ()}, module="L2Norm"),
    Member(
        "dynamic_tanh",
        normax.dynamic_tanh,
        lambda x, alpha, scale, bias: affine(np.tanh(alpha * x), scale, bias),
        (5, 4),
        {"alpha": (), **AFFINE},
        module="DynamicTanh",
    ),
    Member(
        "rms_one_plus_scale",
        normax.rms_norm,
        lambda x, scale, scale_offset: (
            x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * (1 + scale)
        ),
        (5, 4),
        {"scale": (4,)},
        {"scale_offset": 1.0},
        module="RMSNorm",
        module_options={"scale_offset": 1.0},
    ),
]
