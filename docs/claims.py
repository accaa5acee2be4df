"""Writes docs/claims.md: what the sources say of batch normalization, and what the studies found.

python docs/claims.py
"""

import json
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from normax.experiments.generalization_claims import Claim, judge

HERE = pathlib.Path(__file__).parent
HOLDS, NOT, PART, FIRST = "holds", "does not hold", "holds in part", "holds to the first order"
UNTOLD = "not told apart"
SURE = 4.3  # standard errors that three seeds leave open, of Student's t at 95 %
WORDS = {"yes": HOLDS, "no": NOT, "to first order": FIRST, "in part": PART, "within 5 %": FIRST}
Found = tuple[str, str]


def results(study: str) -> Any:
    """Returns what a study found."""
    return json.loads((HERE / "studies" / f"{study}.json").read_text())["results"]


def stated(*keys: str) -> Callable[[], Found]:
    """Returns what the study of statements found of some, and the verdict of all together."""

    def found() -> Found:
        rows = {row["statement"]: row for row in results("statements")}
        texts = [_sentence(rows[key]) for key in keys]
        verdicts = {WORDS.get(rows[key]["holds"], rows[key]["holds"]) for key in keys}
        if len(verdicts) == 1:
            return "; ".join(texts), verdicts.pop()
        return "; ".join(texts), FIRST if verdicts == {HOLDS, FIRST} else PART

    return found


def _sentence(row):
    text = f"{row['quantity']}: {_number(row['measured'])}"
    text += f" ± {row['error']:.2g}" if (row["error"] or 0) > 1e-9 else ""
    said = []
    if row["claimed"] is not None and row["claimed"] != row["measured"]:
        said.append(f"claimed {_number(row['claimed'])}")
    if row["expected"] is not None and row["expected"] != row["claimed"]:
        said.append(f"corrected {_number(row['expected'])}")
    return text + (f" ({', '.join(said)})" if said else "")


def _number(value):
    if isinstance(value, list):
        return ", ".join(map(_number, value))
    if isinstance(value, float) and 0 < abs(value) < 1e-9:
        return "0 to rounding"
    return f"{value:,}" if isinstance(value, int) else _short(value)


def _short(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _of(study, **wanted):
    """Returns the rows of a study that have some values."""
    return [row for row in results(study) if all(row.get(k) == v for k, v in wanted.items())]


def _measured(row, scale=1.0):
    return f"{scale * row['measured']:.4g} ± {scale * row['error']:.2g}"


def away_from_the_truth() -> Found:
    """The first-order term is negligible."""
    rows = _of("regularization", part="away")
    texts = [
        f"M (L_BN - L_PN), {row['head']}, {row['inputs']}, gamma {row['gamma']:g} where the true one is "
        f"{row['true_gamma']:g}: {_measured(row, row['batch_size'])}, without the term "
        f"{row['batch_size'] * row['published']:.3g}, with it {row['batch_size'] * row['corrected']:.3g}"
        for row in rows[:2]
    ]
    off = [abs(row["measured"] - row["published"]) > 4 * row["error"] for row in rows]
    return "; ".join(texts), NOT if all(off) else PART


def decomposition() -> Found:
    """L_BN = L_PN + zeta gamma^2."""
    rows = _of("regularization", part="truth", batch_size=128)
    ratio = lambda row: row["measured"] / row["published"]  # noqa: E731
    skewed = [
        ratio(row) for row in rows if row["inputs"] == "exponential" and row["head"] != "linear"
    ]
    others = [ratio(row) for row in rows if row["inputs"] in ("gaussian", "uniform", "laplace")]
    (gamma,) = _of("regularization", part="gamma", batch_size=32)
    text = (
        f"gap over claimed at the truth, M = 128: {min(others):.3f} to {max(others):.3f} for symmetric "
        f"inputs, {min(skewed):.2f} to {max(skewed):.2f} for skewed ones; best gamma over the true "
        f"one, M = 32: {_measured(gamma)} (claimed {gamma['published']:.4f}, corrected "
        f"{gamma['corrected']:.4f})"
    )
    good = all(abs(value - 1) < 2.5 / 128 + 0.01 for value in others)
    return text, PART if good else NOT


def students() -> Found:
    """Batch norm is weight norm with gamma decay, finite at alpha = 1."""
    rows = [r for r in results("teacher-student") if r["student"].startswith("batch norm, M = 32")]
    late = [r for r in rows if r["part"] == "in time" and r["rate"] == 0.02]
    first, last = late[0], late[-1]
    stopped = [
        r for r in rows if r.get("steps") == 2400 and r["alpha"] == 1.0 and r["rate"] == 0.005
    ]
    text = (
        f"error at alpha = 1: {_measured(stopped[0])} when stopped after 2,400 steps of 0.005, where "
        f"ridge regression of 1 / (2 M) has {first['same_data']:.3f}; in steps of 0.02 "
        f"{_measured(first)} after {first['steps']:,} and {_measured(last)} after {last['steps']:,}"
    )
    diverges = last["measured"] - first["measured"] > 4 * (last["error"] + first["error"])
    return text, "holds at one stopping time only" if diverges else HOLDS


def gamma_and_batch() -> Found:
    """Gamma squared grows with M."""
    rows = _of("regularization", part="gamma")
    texts = [f"{row['batch_size']}: {row['measured']:.4f}" for row in rows]
    grows = [row["measured"] for row in rows] == sorted(row["measured"] for row in rows)
    trends = _of("batch-size", part="trend", control="ghosts")
    slopes = [value for row in trends for name, value in row.items() if name.startswith("gamma2")]
    up = [slope for slope, error in slopes if slope > SURE * error]
    down = [slope for slope, error in slopes if slope < -SURE * error]
    text = (
        f"best gamma over the true one, linear model, by M: {', '.join(texts)}; in a network where "
        f"only the statistics change, gamma² rises with M in {len(up)} of {len(slopes)} layers and "
        f"falls in {len(down)}"
    )
    return text, (HOLDS if len(up) == len(slopes) else PART) if grows else NOT


def error_and_batch() -> Found:
    """The test error grows with M."""
    trends = {
        row["after"]: row["test_error"] for row in _of("batch-size", part="trend", control="ghosts")
    }
    texts = [f"{after}: {100 * s:.2f} ± {100 * e:.2f}" for after, (s, e) in trends.items()]
    up = [slope > SURE * error for slope, error in trends.values()]
    down = [slope < -SURE * error for slope, error in trends.values()]
    text = f"points of test error per doubling of M where only the statistics change, by layer: {', '.join(texts)}"
    return text, HOLDS if all(up) else PART if any(up) else NOT if any(down) else UNTOLD


def _gradient(norm, activation, gain):
    (row,) = _of("gradients", norm=norm, activation=activation, gain=gain)
    return row["factor"]


def vanishing() -> Found:
    """Gradients vanish with sigmoid and tanh."""
    factors = {act: _gradient("none", act, 1.0) for act in ("sigmoid", "tanh", "relu")}
    text = "gradient's factor through a layer, usual weights: " + ", ".join(
        f"{act} {factor:.3f}" for act, factor in factors.items()
    )
    vanish = [factors[act] < 0.9 for act in ("sigmoid", "tanh")]
    return text, HOLDS if all(vanish) else PART if any(vanish) else NOT


def initialization() -> Found:
    """Badly scaled weights make gradients vanish or explode."""
    cases = [(act, gain) for act in ("sigmoid", "tanh", "relu") for gain in (0.3, 1.0, 3.0)]
    factors = {case: _gradient("none", *case) for case in cases}
    text = "gradient's factor through a layer without a norm: " + ", ".join(
        f"{act} x{gain:g} {factor:.3f}" for (act, gain), factor in factors.items()
    )
    size = {case: abs(np.log(factor)) for case, factor in factors.items()}
    worse = [size[act, gain] > size[act, 1.0] for act, gain in cases if gain != 1.0]
    return text, HOLDS if all(worse) else PART if any(worse) else NOT


def slower() -> Found:
    """Lower layers learn more slowly."""
    of = {}
    for act in ("sigmoid", "tanh", "relu"):
        (row,) = _of("gradients", norm="none", activation=act, gain=1.0)
        of[act] = row["weights"][0] / row["weights"][-1]
    text = (
        "gradient of the first layer's weights over that of the last's, usual weights: "
        + ", ".join(f"{act} {ratio:.2g}" for act, ratio in of.items())
    )
    far = [ratio < 0.1 for ratio in of.values()]
    return text, HOLDS if all(far) else PART if any(far) else NOT


def tamed() -> Found:
    """Batch norm keeps gradients from vanishing and exploding."""
    of = {
        act: [_gradient("batch", act, g) for g in (0.3, 1.0, 3.0)]
        for act in ("sigmoid", "tanh", "relu")
    }
    text = "gradient's factor through a layer with batch norm, weights x0.3, x1, x3: " + "; ".join(
        f"{act} {', '.join(f'{value:.3f}' for value in values)}" for act, values in of.items()
    )
    kept = [all(0.9 < value < 1.1 for value in values) for values in of.values()]
    return text, HOLDS if all(kept) else PART if any(kept) else NOT


def _along(name):
    """Returns a measure of the landscape by norm and step: geometric means over the seeds."""
    found: dict[str, dict[int, float]] = {}
    for row in results("landscape"):
        found.setdefault(row["norm"], {}).setdefault(row["step"], []).append(np.log(row[name]))
    return {n: {at: float(np.exp(np.mean(v))) for at, v in by.items()} for n, by in found.items()}


def shifting() -> Found:
    """Layers' inputs move in each step, the further up the more."""
    rows = _of("landscape", norm="none")
    layers = np.exp(np.mean([np.log(row["shifts"]) for row in rows], 0))
    text = (
        "shift of a layer's input in a step, deviations, without a norm, from the second layer up: "
    )
    text += ", ".join(f"{shift:.2f}" for shift in layers)
    grows = np.corrcoef(np.arange(len(layers)), layers)[0, 1]
    return text, HOLDS if grows > 0.5 else PART


def _compared(name, what, smaller):
    of = _along(name)
    steps = list(of["none"])
    text = f"{what}, without a norm over with batch norm, " + ", ".join(
        f"step {step}: {of['none'][step] / of['batch'][step]:.2g}" for step in steps
    )
    better = [(of["batch"][step] < of["none"][step]) == smaller for step in steps]
    return text, HOLDS if all(better) else PART if any(better) else NOT


def _summary():
    (row,) = _of("convergence", part="summary")
    return row


def larger_rates() -> Found:
    """Batch norm allows larger learning rates."""
    rates = _summary()["largest_usable_rate"]
    text = f"largest rate at which every seed arrives: batch norm {rates['batch']:g}, none {rates['none']:g}"
    return text, HOLDS if rates["batch"] > rates["none"] else NOT


def epochs() -> Found:
    """Without batch norm it takes ten times the epochs."""
    ratio, error = _summary()["ratio_of_best"]
    equal = {rate: value for rate, value in _summary()["ratio_at_equal_rate"].items() if value}
    text = f"epochs to 95 %, without over with, each at its best rate: {ratio:.1f} ± {error:.1f}"
    text += "".join(f"; both at {rate}: {r:.1f} ± {e:.1f}" for rate, (r, e) in equal.items())
    faster = ratio - 2 * error > 1
    return text, HOLDS if abs(
        ratio - 10
    ) <= 2 * error else "faster, but not ten times" if faster else NOT


def insensitive() -> Found:
    """Batch norm is insensitive to the initial weights."""
    texts, worst = [], {}
    for net in ("batch", "none"):
        best = {}
        for row in _of("convergence", part="training", net=net):
            if row["reached"] == row["runs"]:
                best[row["scale"]] = min(row["epochs"], best.get(row["scale"], np.inf))
        parts = [
            f"x{scale:g} {best[scale]:.1f}" if scale in best else f"x{scale:g} never"
            for scale in (0.1, 1.0, 10.0)
        ]
        texts.append(f"{net} {', '.join(parts)}")
        worst[net] = max(best.get(scale, np.inf) for scale in (0.1, 10.0)) / best[1.0]
    text = (
        "epochs to 95 % at the best rate tried, by the scale of the initial kernels: "
        + "; ".join(texts)
    )
    return text, HOLDS if worst["batch"] < 1.25 else PART if worst["batch"] < worst["none"] else NOT


def generalization(*texts: str, others: Sequence[Claim] = ()) -> Callable[[], Found]:
    """Returns what the study of generalization found of some comparisons, and of others."""

    def found() -> Found:
        rows = results("generalization")
        judged = {row["claim"]: row for row in rows if "claim" in row}
        runs = [row for row in rows if "runs" in row]
        chosen = [*(judged[text] for text in texts), *judge(runs, others)]
        text = "; ".join(
            f"{row['claim']} ({row['of']}): {row['difference']:+.3f} ± {row['room']:.3f}, {row['verdict']}"
            for row in chosen
        )
        verdicts = {row["verdict"] for row in chosen}
        if verdicts == {"holds"}:
            return text, HOLDS
        if "holds" in verdicts:
            return text, PART
        return text, NOT if verdicts & {"the opposite", "differ"} else UNTOLD

    return found


def not_isolated(*texts: str) -> Callable[[], Found]:
    """Returns the same of variants that differ in more than what is claimed."""

    def found() -> Found:
        text, verdict = generalization(*texts)()
        return text, "seen, but not of the noise alone" if verdict == HOLDS else verdict

    return found


def conditions() -> Found:
    """Condition numbers 9.2e4, 281.7 and 1."""
    rows = {row["features"]: row for row in results("conditioning")}
    names = ("dollars and inches", "thousands of dollars and feet", "standardized")
    texts = [
        f"{name}: {rows[name]['condition_number']:,.4g} ± {rows[name]['deviation']:,.2g} between samples, "
        f"{rows[name]['population']:,.5g} of the law"
        for name in names
    ]
    away = [
        abs(claimed - rows[name]["condition_number"]) / rows[name]["deviation"]
        for name, claimed in zip(names, (9.2e4, 281.7, 1.0), strict=True)
    ]
    return "; ".join(texts), "holds of one sample each" if max(away) < 3 else NOT


def fewer_steps() -> Found:
    """Standardized features are fitted in fewer steps."""
    rows = {row["features"]: row["steps"] for row in results("conditioning")}
    text = "steps of gradient descent: " + ", ".join(
        f"{name} {steps:,.0f}" for name, steps in rows.items()
    )
    return text, HOLDS if rows["standardized"] == min(rows.values()) else NOT


def unmeasured() -> Found:
    """What needs data that has to be fetched."""
    return (
        "`python -m normax.experiments compare --dataset mnist` is the measurement; it needs a network",
        "not measured",
    )


S = "statements"
# Number, claim, section, study, and what was found. The numbers are those of THEORY's verdicts.
SECOND = [
    ("1", "the error of the program is 3 / (2 M) = 0.046875", "1.1", S, stated("1", "1-run")),
    ("2", "μ_B is N(μ_P, σ_P² / M)", "1.3", S, stated("2-mean-gaussian", "2-variance-gaussian", "2-normal-gaussian", "2-normal-exponential")),
    ("3", "σ_B is N(σ_P, (ρ + 2) / (4 M))", "1.3", S, stated("3-mean-gaussian", "3-variance-gaussian", "3-normal-gaussian")),
    ("4", "ρ = (C - σ⁴) / σ⁴ - 2 is the kurtosis", "1.3", S, stated("4")),
    ("5", "the expansion: A'(h̄ - y), with a remainder O((ĥ - h̄)²)", "1.3", S, stated("5", "5-remainder")),
    ("6", "E (ĥ - h̄)² given x, without a term of skewness", "1.3", S, stated("6-gaussian", "6-exponential-1", "6-exponential--0.9")),
    ("7", "equality as M → P", "1.3", S, stated("7")),
    ("8", "the first-order term is negligible", "1.3", "regularization", away_from_the_truth),
    ("9", "L_BN = L_PN + ζ γ², ζ = (ρ + 2) / (8 M) F + μ / (2 M)", "1.3", "regularization", decomposition),
    ("10", "ReLU: f = lim (1 / t) (1 + exp(t h)), μ about the mean of sigmoid", "1.4", S, stated("10", "10-sigmoid")),
    ("11", "identity: μ is the mean of h̄; ζ = 3 / (4 M)", "1.4", S, stated("11-mean", "11")),
    ("12", "(φ - y)²: ζ = 3 / (2 M); without the mean 1 / (2 M)", "1.4", S, stated("12", "12-no-mean", "12-no-mean-halved")),
    ("13", "F = E (∂l / ∂γ)²", "1.5", S, stated("13-squared", "13-logistic")),
    ("14", "PN is WN where the covariance has a on its diagonal, v = γ / a", "1.5", S, stated("14", "14-bias")),
    ("15", "SGD: δ² / (1 - α) for α > 1", "2.3", S, stated("15", "15-below")),
    ("16", "G, as printed", "2.3", S, stated("16")),
    ("17", "ε = δ² d(ζ G) / dζ - ζ² dG / dζ", "2.3", S, stated("17", "17-scale")),
    ("18", "ζ = 0.25 is the best", "2.3", S, stated("18", "18-scale")),
    ("19", "the error is against y", "2.2", S, stated("19")),
    ("20", "the student with batch norm has ζ = 1 / (2 M), by the formula of 12", "2.3", S, stated("20")),
    ("21", "batch norm (M = 32) coincides with WN + gamma decay, and is finite at α = 1", "2.3", "teacher-student", students),
    ("22", "N > 100 is enough", "2.3", S, stated("22", "15-below")),
    ("23", "γ² grows with M", "2.4.3", "regularization, batch-size", gamma_and_batch),
    ("", "the test error grows with M", "2.4.3", "batch-size", error_and_batch),
    ("", "batch norm generalizes better than SGD and WN", "2.4.2", "generalization", generalization("BN below SGD", "BN below WN")),
    ("", "WN + mean-only and variance-only BN lie between", "2.4.2", "generalization", generalization("BN below WN, mean-only BN", "BN below WN, variance-only BN", "WN, mean-only BN below WN", "WN, variance-only BN below WN")),
    ("", "a batch of 64 generalizes better than one of 256", "2.4.1", "generalization", generalization("M = 64 below M = 256, BN")),
    ("", "PN + gamma decay is as good as batch norm, or better", "2.4.1", "generalization", generalization("PN, gamma decay below BN", "PN, gamma decay above BN")),
    ("", "dropout after batch norm mends large batches", "2.4.4", "generalization", generalization("dropout after BN below none", "dropout after BN above none", "dropout after BN above M = 64")),
    ("", "dropout before batch norm is worse than after", "2.4.4", "generalization", generalization("dropout before BN below after")),
    ("", "WN with dropout comes to batch norm", "2.4.4", "generalization", generalization("WN, dropout above WN", "WN, dropout as BN")),
    ("", "with ReLU after it, batch norm needs no γ", "1.5", S, stated("002-scale")),
]  # fmt: skip
OTHERS = [
    ("000", "the slopes of sigmoid and tanh are below 1", S, stated("000-saturating")),
    ("000", "so gradients vanish in deep networks of them", "gradients", vanishing),
    ("000", "lower layers learn more slowly than upper ones", "gradients", slower),
    ("000", "ReLU has slope 1", S, stated("000-relu")),
    ("000", "badly scaled weights make gradients vanish or explode", "gradients", initialization),
    ("000", "initial weights should lie around 1", S, stated("000-weights")),
    ("000, 001", "batch norm keeps gradients from vanishing and exploding", "gradients", tamed),
    ("000, 001, 003", "inputs of layers shift at each step, further up the more", "landscape", shifting),
    ("000, 001, 003", "batch norm reduces that shift", "landscape", lambda: _compared("shift", "shift in a step, deviations", True)),
    ("000", "inputs of layers become independent and identically distributed", "", lambda: ("", "not measured")),
    ("000, 003", "of a convolution each channel is normalized over all the rest", S, stated("000-channels")),
    ("000, 001", "what comes out is normal", S, stated("001-normal")),
    ("001", "what comes out lies in [-1, 1]", S, stated("001-bounded")),
    ("001", "most of it lies in the linear region", S, stated("001-linear")),
    ("001", "so the gradient grows: the slope", S, stated("001-slope-sigmoid", "001-slope-tanh")),
    ("001", "so the gradient grows: what arrives", S, stated("001-gradient-sigmoid", "001-gradient-tanh")),
    ("001, 003", "larger learning rates can be used", "convergence", larger_rates),
    ("001, 004", "training is faster: ten times fewer epochs", "convergence", epochs),
    ("001", "it is insensitive to the initial weights", "convergence", insensitive),
    ("001", "it improves the classification", "generalization", generalization(others=[Claim("BN above SGD", "accuracy", "BN", "SGD", 1)])),
    ("001", "without dropout it does as well as with", "generalization", generalization(others=[Claim("BN as with dropout after, M = 256", "accuracy", "BN, M = 256", "BN, M = 256, dropout after", 1)])),
    ("001", "it loses expressive power, which γ and β give back", S, stated("003-restore")),
    ("001", "γ is not needed where the next layer is linear", S, stated("001-scale")),
    ("001", "momentum=0.99, epsilon=0.001 in Keras", S, stated("001-keras")),
    ("001", "the shape stays", S, stated("001-shape")),
    ("003", "the loss is smoother: its gradient changes less", "landscape", lambda: _compared("smoothness", "change of the gradient over the step", True)),
    ("003", "the loss is smoother: longer steps lower it", "landscape", lambda: _compared("largest_rate", "largest step", False)),
    ("003", "the noise of the batch's statistics regularizes a little", "generalization", not_isolated("BN below PN")),
    ("003", "the backward formula", S, stated("003-backward")),
    ("003", "γ = √(var + ε), β = μ give the input back", S, stated("003-restore")),
    ("003", "moving averages are the global statistics", S, stated("003-running")),
    ("004", "condition numbers 9.2e4, 281.7, and 1 when standardized", "conditioning", conditions),
    ("004", "a better condition number is faster", "conditioning", fewer_steps),
    ("004", "the Hessians as printed have these condition numbers", S, stated("004-rounded", "004-rounded-units")),
    ("004", "400² and 3² are standard deviations", S, stated("004-deviation")),
    ("004", "min-max scaling gives [0, 1]", S, stated("004-min-max")),
    ("004", "its formula, as printed", S, stated("004-min-max-formula")),
    ("004", "standardization gives variance 1: formula, program", S, stated("004-standardize", "004-standardize-program")),
    ("004", "batch norm divides by σ + 0.001, as Keras does", S, stated("004-epsilon")),
    ("004", "σ + 0.001 is safe", S, stated("004-constant")),
    ("004", "its backward formula, γ dy / (σ + 0.001)", S, stated("004-backward", "004-frozen")),
    ("004", "∂L/∂γ and ∂L/∂β, summed over the batch", S, stated("003-backward")),
    ("004", "260, 40, 5020, 80, 32100, 400, 1010 parameters", S, stated("004-parameters", "004-total")),
    ("004", "4 d = 1.44M", S, stated("004-4d")),
    ("004", "1x1x64, 150x1x1 or 1x150x1 parameters instead", S, stated("004-shared")),
    ("004", "MNIST: 0.9644, 0.9822, 0.9832 after epochs 1, 2, 3", "compare", unmeasured),
]  # fmt: skip

HEAD = """# Claims

Five notes explain batch normalization: an account of its regularization (002, after Luo, Wang, Shao and Peng,
[2018](https://arxiv.org/abs/1809.00846)), and four introductions (000, 001, 003, 004). They are not part of this repository;
numbers, sections and "as printed" are theirs. Here is each claim of theirs, what was measured, and whether it holds; advice, such
as where to put batch norm, is left out. The numbers are those of the [studies](studies/README.md), which have their commands, seeds
and versions. The verdicts follow from the numbers; what they say of networks is of small ones on small data. After ± stands a
standard error, and where variants are compared the half of a 95 % interval: "not told apart" is a difference within it. `python
docs/claims.py` writes this page.
"""


def page() -> str:
    """Returns the whole page."""
    lines = [HEAD, "## 002: regularization in batch norm", ""]
    lines += ["| | claim | section | measured | verdict | study |", "|---|---|---|---|---|---|"]
    for number, claim, section, study, measure in SECOND:
        text, verdict = measure()
        lines.append(_line(number, claim, section, text, f"**{verdict}**", study))
    lines += ["", "## 000, 001, 003, 004: introductions", ""]
    lines += ["| document | claim | measured | verdict | study |", "|---|---|---|---|---|"]
    for document, claim, study, measure in OTHERS:
        text, verdict = measure()
        lines.append(_line(document, claim, text, f"**{verdict}**", study))
    return "\n".join([*lines, ""])


def _line(*cells):
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


if __name__ == "__main__":
    (HERE / "claims.md").write_text(page())
