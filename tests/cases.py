"""One table of normalizers: what every law, oracle and benchmark runs over."""

from collections.abc import Callable
from typing import NamedTuple

import normax


class Case(NamedTuple):
    """A normalizer with one signature for all, and what its formula needs to know.

    Attributes:
      name: of the row.
      apply: function of (x, scale, bias, mask) that returns y.
      shape: shape of x.
      reduced: axes that are summarised together, of x with its features in groups.
      features: axes of scale and bias.
      epsilon: added to the variance.
      centered: whether the mean is subtracted.
      groups: number of groups along the feature axis, or None.
      bias: whether there is a bias.
      fixed: whether mean 0 and variance 1 are given instead of measured.
    """

    name: str
    apply: Callable
    shape: tuple
    reduced: tuple
    features: tuple = (-1,)
    epsilon: float = 1e-5
    centered: bool = True
    groups: int | None = None
    bias: bool = True
    fixed: bool = False

    def parameter_shape(self):
        """Returns the shape of scale and bias."""
        return tuple(self.shape[axis] for axis in self.features)


def _batch(feature_axes=-1, use_running_average=False):
    def apply(x, scale, bias, mask=None):
        axes = [feature_axes] if isinstance(feature_axes, int) else feature_axes
        stats = normax.RunningStats.create(tuple(x.shape[axis] for axis in axes), x.dtype)
        return normax.batch_norm(
            x,
            stats,
            scale,
            bias,
            use_running_average=use_running_average,
            feature_axes=feature_axes,
            mask=mask,
        )[0]

    return apply


def _with(function, **options):
    return lambda x, scale, bias, mask=None: function(
        x, scale, bias, mask=mask, epsilon=1e-5, **options
    )


def _rms(**options):
    return lambda x, scale, bias, mask=None: normax.rms_norm(
        x, scale, mask=mask, epsilon=1e-5, **options
    )


_layer, _group, _instance = normax.layer_norm, normax.group_norm, normax.instance_norm

CASES = [
    Case("batch", _batch(), (6, 3, 4), (0, 1)),
    Case("batch_2d", _batch(), (6, 4), (0,)),
    Case("batch_features_first", _batch(1), (6, 4, 5), (0, 2), (1,)),
    Case("batch_two_features", _batch((1, 2)), (6, 3, 4), (0,), (1, 2)),
    Case("batch_inference", _batch(-1, True), (6, 4), (0,), fixed=True),
    Case("layer", _with(_layer), (6, 8), (1,)),
    Case("layer_two_axes", _with(_layer, reduction_axes=(-2, -1)), (5, 3, 4), (1, 2)),
    Case("layer_first_axis", _with(_layer, reduction_axes=0), (6, 4), (0,)),
    Case("rms", _rms(), (6, 8), (1,), centered=False, bias=False),
    Case("rms_axis_1", _rms(reduction_axes=1), (3, 6, 2), (1,), centered=False, bias=False),
    Case("group", _with(_group, num_groups=2), (3, 5, 4), (1, 3), groups=2),
    Case(
        "group_features_first",
        _with(_group, num_groups=2, feature_axes=1),
        (3, 4, 5),
        (2, 3),
        (1,),
        groups=2,
    ),
    Case("instance", _with(_instance), (3, 6, 4), (1,)),
    Case("instance_features_first", _with(_instance, feature_axes=1), (3, 4, 6), (2,), (1,)),
]
MEASURED = [case for case in CASES if not case.fixed]
