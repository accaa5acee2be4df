"""Writes docs/normalizers.md: every public function by what its docstring says, and the recipes.

python docs/build.py
"""

import inspect
import pathlib
import re
import types

import normax
import normax.diagnostics
import normax.interop
import normax.linen
import normax.population_training
import normax.recalibrate
import normax.theory

HERE = pathlib.Path(__file__).parent

RUNNING = "`RunningStats`"
# Title, then each function: its module in normax.linen and normax.nnx, and its state.
GROUPS = {
    "Over a batch": {
        "batch_norm": ("BatchNorm", RUNNING),
        "normalize_batch": ("", "returns `Moments`"),
        "batch_renorm": ("BatchRenorm", RUNNING),
        "ghost_batch_norm": ("GhostBatchNorm", RUNNING),
        "kalman_batch_norm": ("KalmanBatchNorm", f"{RUNNING}; the prior is an argument"),
        "kalman_prior": ("", ""),
        "mean_only_batch_norm": ("MeanOnlyBatchNorm", RUNNING),
        "variance_only_batch_norm": ("VarianceOnlyBatchNorm", RUNNING),
        "running_instance_norm": ("RunningInstanceNorm", RUNNING),
        "switchable_norm": ("SwitchableNorm", RUNNING),
        "domain_batch_norm": ("DomainBatchNorm", f"{RUNNING}, a row for each domain"),
        "evonorm_b0": ("EvoNormB0", RUNNING),
        "power_norm": ("PowerNorm", "`PowerState`"),
        "population_norm": ("", "given `Moments` or " + RUNNING),
        "mixed_batch_norm": ("", f"{RUNNING}, which stay"),
    },
    "Over each example": {
        "layer_norm": ("LayerNorm", ""),
        "rms_norm": ("RMSNorm", ""),
        "add_layer_norm": ("AddLayerNorm", "returns the sum too"),
        "add_rms_norm": ("AddRMSNorm", "returns the sum too"),
        "group_norm": ("GroupNorm", ""),
        "instance_norm": ("InstanceNorm", ""),
        "evonorm_s0": ("EvoNormS0", ""),
        "filter_response_norm": ("FilterResponseNorm", ""),
        "global_response_norm": ("GlobalResponseNorm", ""),
        "local_response_norm": ("LocalResponseNorm", ""),
        "divisive_norm": ("DivisiveNorm", ""),
        "l2_norm": ("L2Norm", ""),
        "dynamic_tanh": ("DynamicTanh", ""),
        "segment_norm": ("SegmentNorm", ""),
        "standardize": ("", "returns `Moments`"),
    },
    "By a condition": {
        "adaptive_instance_norm": ("AdaptiveInstanceNorm", ""),
        "film": ("FiLM", ""),
        "adaln_zero": ("AdaLNZero", ""),
    },
    "Of weights": {
        "weight_norm": ("WeightNorm", ""),
        "weight_norm_init": ("", ""),
        "centered_weight_norm": ("CenteredWeightNorm", ""),
        "weight_standardization": ("WeightStandardization", ""),
        "scaled_weight_standardization": ("ScaledWeightStandardization", ""),
        "spectral_norm": ("SpectralNorm", "`SpectralState`"),
        "exact_spectral_norm": ("", ""),
        "operator_norm": ("", "`SpectralState`"),
        "transform_weights": ("", ""),
        "weight_constraint": ("", "an optax transformation"),
    },
    "Of input features": {
        "standardize_features": ("", "`FeatureScaling`"),
        "min_max_features": ("", "`FeatureScaling`"),
        "robust_features": ("", "`FeatureScaling`"),
        "transform_features": ("", "given `FeatureScaling`"),
        "inverse_features": ("", "given `FeatureScaling`"),
        "extremes": ("", "returns `Extremes`"),
        "merge_extremes": ("", "`Extremes`"),
        "condition_number": ("", ""),
    },
    "Statistics": {
        "moments": ("", "returns `Moments`"),
        "merge": ("", "`Moments`"),
        "update": ("", RUNNING),
        "segment_moments": ("", "returns `Moments`"),
        "debias": ("", RUNNING),
        "momentum_per_entry": ("", ""),
        "convention": ("", "a dict of options"),
        "validate": ("", "any"),
    },
    "Of a model's parameters": {
        "norm_labels": ("", ""),
        "norm_penalty": ("", ""),
        "norm_constraint": ("", "an optax transformation"),
        "overwrite_drift": ("", "an optax transformation"),
    },
    "In and out (`normax.interop`), and population statistics (`normax.recalibrate`)": {
        "from_torch": ("", ""),
        "to_torch": ("", ""),
        "from_keras": ("", ""),
        "to_keras": ("", ""),
        "from_flax": ("", ""),
        "options_of": ("", ""),
        "affine_of": ("", ""),
        "fold_into_previous": ("", ""),
        "fold_into_next": ("", ""),
        "fold_linen": ("", ""),
        "fold_nnx": ("", ""),
        "recalibrate": ("", "new variables"),
        "recalibrate_nnx": ("", "a new model"),
    },
    "The theory (`normax.theory`)": {
        "batch_noise": ("", ""),
        "approximate_noise": ("", ""),
        "expected_deviation": ("", ""),
        "deviation_law": ("", "returns `DeviationLaw`"),
        "finite_population": ("", ""),
        "excess_kurtosis": ("", ""),
        "skewness": ("", ""),
        "loss_derivatives": ("", ""),
        "decay_coefficient": ("", "returns `Coefficient`"),
        "first_order_gap": ("", ""),
        "resolvent_trace": ("", ""),
        "ridge_of_decay": ("", ""),
        "ridge_error": ("", ""),
        "least_squares_error": ("", ""),
        "batch_norm_error": ("", ""),
        "gamma_decay": ("", "`GammaDecayState`"),
        "population_step": ("", "`TrainState`"),
    },
    "Looking into a model (`normax.diagnostics`)": {
        "layer_statistics": ("", "returns `LayerStatistics`"),
        "activation_shift": ("", "returns `Shift`"),
        "gradient_norms": ("", "returns `GradientNorms`"),
        "decay_coefficients": ("", "returns `Coefficient`"),
        "measured_decay": ("", "for `gamma_decay`"),
        "objective": ("", ""),
        "gradient_smoothness": ("", "returns `Smoothness`"),
        "largest_learning_rate": ("", ""),
        "hessian_spectrum": ("", "returns `Spectrum`"),
    },
}
# Of these modules what they import is not theirs.
SINGLE = (normax.recalibrate, normax.population_training)
ROOMS = (normax, normax.interop, normax.theory, normax.diagnostics, *SINGLE)


def public() -> dict[str, types.FunctionType]:
    """Returns the public functions by name."""
    return {
        name: function
        for room in ROOMS
        for name, function in vars(room).items()
        if inspect.isfunction(function) and not name.startswith("_")
        if room not in SINGLE or function.__module__ == room.__name__
    }


def entry(name: str, module: str, state: str) -> str:
    """Returns the lines of a function."""
    text = inspect.getdoc(public()[name]) or ""
    formula = re.search(r"\.\. math::(.*?)\n\n", text, re.DOTALL)
    links = re.findall(r"https?://[^\s;]+", text)
    lines = [f"### `{name}`", "", text.splitlines()[0], ""]
    if formula:
        lines += ["```math", re.sub(r"\s+", " ", formula[1]).strip(), "```", ""]
    facts = [f"module: `{module}`"] if module else []
    facts += [f"state: {state}"] if state else []
    facts += [f"mask: {mask(name)}"] if name in vars(normax) else []
    facts += ["paper: " + ", ".join(f"<{link.rstrip('.')}>" for link in links)] if links else []
    return "\n".join([*lines, "; ".join(facts), ""] if facts else lines)


def mask(name: str) -> str:
    """Returns whether a function takes a mask."""
    return "yes" if "mask" in inspect.signature(public()[name]).parameters else "no"


def page() -> str:
    """Returns the whole page."""
    parts = [(HERE / "normalizers.head.md").read_text()]
    for title, functions in GROUPS.items():
        parts += [f"## {title}\n", *(entry(name, *facts) for name, facts in functions.items())]
    return "\n".join([*parts, (HERE / "normalizers.tail.md").read_text()])


if __name__ == "__main__":
    (HERE / "normalizers.md").write_text(page())
