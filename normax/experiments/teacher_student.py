"""Measure what linear students learn of a noisy linear teacher, against examples per dimension.

Least squares and ridge regression are solved; weight norm with decay of gamma and batch norm are
trained, batch norm both for long and stopped where it looks like ridge regression. An error is the
squared distance from the teacher, which is the error on new inputs without noise.
"""

import argparse
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np

from normax import theory
from normax.experiments import study
from normax.experiments.students import (
    NOISE,
    BatchNormed,
    Lesson,
    descended,
    lesson,
    solved,
    weight_normed,
)

M = 32
SOLVED, NORMED, BATCHED, IN_TIME = "solved", "weight norm", "batch norm", "in time"
LEAST, DECAY, RIDGE = "least squares", "zeta = 1/(2M)", "z = 0.25"
LONG, STOPPED = "batch norm, long", "batch norm, stopped"
PLAIN = "no norm"
ALPHAS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0, 4.0)
CHUNK = 400  # steps between two looks
RATE = 0.005  # of what is stopped
STOP = 2400
TIMES = (2.0, 4.0, 8.0, 12.0, 16.0, 48.0, 128.0, 512.0, 1200.0)  # steps times their rate
PATIENT = 0.02  # of what is followed for long


class Plan(NamedTuple):
    """How much is done.

    Attributes:
      solved: dimensions, draws of the data, and examples per dimension.
      trained: the same of what is trained.
      long: rates of the students who are trained for long, and the steps of each.
      sizes: of batches, at as many examples as dimensions.
      sized_steps: of these students.
      followed: steps of students with as many examples as dimensions, at the first of the rates.
      followers: how many those are, and of each size.
    """

    solved: tuple[tuple[int, int, tuple[float, ...]], ...]
    trained: tuple[tuple[int, int, tuple[float, ...]], ...]
    long: tuple[tuple[float, int], ...]
    sizes: tuple[int, ...]
    sized_steps: int
    followed: int
    followers: int


FULL = Plan(
    solved=(
        (256, 32, (*ALPHAS[:3], 0.9, 1.1, *ALPHAS[4:])),
        (1024, 8, (0.5, 0.75, 1.5, 2.0)),
        (4096, 4, (0.5, 1.0, 2.0)),
    ),
    trained=((256, 8, ALPHAS), (1024, 4, (0.5, 1.0, 1.5))),
    long=((PATIENT, 40_000), (0.002, 20_000), (0.0005, 10_000)),
    sizes=(8, 16, 32, 64, 128),
    sized_steps=9600,
    followed=60_000,
    followers=8,
)
QUICK = Plan(
    solved=((256, 8, (0.25, 0.5, 0.75, 1.5, 2.0, 4.0)),),
    trained=((256, 1, (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 4.0)),),
    long=((PATIENT, 6400), (0.002, 3200), (0.0005, 1600)),
    sizes=(8, 128),
    sized_steps=STOP,
    followed=0,
    followers=1,
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    study.add_common(parser, "teacher-student")


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Solves, trains, reports, and returns the exit status."""
    study.prepare(options.out, "teacher-student")
    plan = QUICK if options.quick else FULL
    results: list[dict[str, Any]] = []
    interrupted = False
    steps = len(plan.trained) * (STOP + sum(steps for _, steps in plan.long))
    steps += len(plan.sizes) * plan.sized_steps + plan.followed
    looks = sum(len(case[2]) for case in plan.solved) + len(plan.trained) + steps // CHUNK
    with study.progress(looks, "parts") as advance, jax.enable_x64(True):

        def look(text):
            advance(text)
            check()

        try:
            for part in (solutions, weight_norms, batch_norms, in_time):
                for row in part(options.seed, plan, look):
                    results.append(row)
        except KeyboardInterrupt:
            interrupted = True
    show(results)
    return study.finish(options, "teacher-student", results, interrupted, draw)


def row_of(
    part: str,
    student: str,
    lessons: list[Lesson],
    weights: np.ndarray,
    like: np.ndarray | None,
    said: float | None,
    **more: Any,
) -> dict[str, Any]:
    """Returns what students of as many examples and dimensions have learned.

    Args:
      part: of the study.
      student: its name.
      lessons: what each student saw.
      weights: of each student.
      like: weights to compare with, of the same examples.
      said: the error as of the theory.
      more: what else the numbers depend on.
    """
    errors = np.array([data.error_of(w) for data, w in zip(lessons, weights, strict=True)])
    row = {"part": part, "student": student, "dimensions": lessons[0].x.shape[1]}
    row |= {"alpha": len(lessons[0].y) / row["dimensions"], "repetitions": len(errors), **more}
    row |= {"measured": float(errors.mean()), "error": None, "theory": said}
    if len(errors) > 1:
        row["error"] = float(errors.std(ddof=1) / len(errors) ** 0.5)
    if like is not None:
        others = [data.error_of(w) for data, w in zip(lessons, like, strict=True)]
        row["same_data"] = float(np.mean(others))
    return row


def lessons_of(seed: int, dimensions: int, alpha: float, number: int) -> list[Lesson]:
    """Returns data sets of a seed, the same ones whatever is to learn of them."""
    examples = round(alpha * dimensions)
    return [
        lesson((seed, dimensions, examples, place), examples, dimensions) for place in range(number)
    ]


def decay_of(name: str, alpha: float) -> float:
    """Returns zeta of a mean loss, of either scale of the ridge."""
    return 1 / (2 * M) if name == DECAY else NOISE / alpha


def ridge_error(name: str, alpha: float) -> float:
    """Returns what ridge regression of so many inputs comes to."""
    return theory.ridge_error(alpha, theory.ridge_of_decay(decay_of(name, alpha), alpha), NOISE)


def solutions(seed: int, plan: Plan, look: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yields the errors of least squares and of ridge regression."""
    for dimensions, number, alphas in plan.solved:
        for alpha in alphas:
            lessons = lessons_of(seed, dimensions, alpha, number)
            # One example goes to the mean.
            left = (len(lessons[0].y) - 1) / dimensions
            said = theory.least_squares_error(left, NOISE, dimensions=dimensions)
            found = np.array([solved(data) for data in lessons])
            yield row_of(SOLVED, LEAST, lessons, found, None, said)
            for name in (DECAY, RIDGE):
                found = np.array([solved(data, decay_of(name, alpha)) for data in lessons])
                yield row_of(SOLVED, name, lessons, found, None, ridge_error(name, alpha))
            look(f"solved, N = {dimensions}, alpha = {alpha:g}")


def weight_norms(seed: int, plan: Plan, look: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yields the errors of weight norm with decay of gamma, and how far they are from ridge."""
    for dimensions, number, alphas in plan.trained:
        cases = [(name, alpha) for name in (DECAY, RIDGE) for alpha in alphas]
        groups = [lessons_of(seed, dimensions, alpha, number) for _, alpha in cases]
        decays = [decay_of(*case) for case in cases for _ in range(number)]
        found = weight_normed([data for group in groups for data in group], decays, 3000)
        parts = found.reshape(len(cases), number, dimensions)
        for (name, alpha), lessons, weights in zip(cases, groups, parts, strict=True):
            like = np.array([solved(data, decay_of(name, alpha)) for data in lessons])
            apart = np.linalg.norm(weights - like, axis=1) / np.linalg.norm(like, axis=1)
            more = {"decay": decay_of(name, alpha), "distance": float(apart.max())}
            yield row_of(NORMED, name, lessons, weights, like, ridge_error(name, alpha), **more)
        look(f"weight norm, N = {dimensions}")


def batch_norms(seed: int, plan: Plan, look: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yields the errors of batch norm, stopped, and in new students trained for long."""
    shorter = theory.expected_deviation(M)
    for dimensions, number, alphas in plan.trained:
        groups = [lessons_of(seed, dimensions, alpha, number) for alpha in alphas]
        for student, schedule in ((STOPPED, ((RATE, STOP),)), (LONG, plan.long)):
            students = BatchNormed.beginning([data for group in groups for data in group])
            rng = np.random.default_rng((seed, dimensions))
            for rate, steps in schedule:
                for _ in range(steps // CHUNK):
                    students = students.trained(students.orders(rng, M, CHUNK), rate)
                    look(f"{student}, N = {dimensions}, rate {rate:g}")
            parts = students.weights().reshape(len(alphas), number, dimensions)
            more = {"batch_size": M, "steps": sum(steps for _, steps in schedule)}
            for alpha, lessons, weights in zip(alphas, groups, parts, strict=True):
                if student == STOPPED:
                    like = np.array([solved(data, 1 / (2 * M)) for data in lessons])
                    said = ridge_error(DECAY, alpha)
                else:
                    like = np.array([shorter * solved(data) for data in lessons])
                    left = (len(lessons[0].y) - 1) / dimensions
                    said = theory.batch_norm_error(left, NOISE, M, dimensions=dimensions)
                yield row_of(BATCHED, student, lessons, weights, like, said, **more)


def in_time(seed: int, plan: Plan, look: Callable[[str], None]) -> Iterator[dict[str, Any]]:
    """Yields the errors in the course of training, at alpha = 1, with batch norm and without."""
    lessons = lessons_of(seed, 256, 1.0, plan.followers)
    for time in TIMES:
        found = np.array([descended(data, RATE, round(time / RATE)) for data in lessons])
        yield row_of(IN_TIME, PLAIN, lessons, found, None, None, rate=RATE, time=time)
    runs = [(size, RATE, plan.sized_steps) for size in plan.sizes]
    for size, rate, last in [*runs, (M, PATIENT, plan.followed)]:
        students = BatchNormed.beginning(lessons)
        rng = np.random.default_rng((seed, size))
        like = np.array([solved(data, 1 / (2 * size)) for data in lessons])
        said = theory.ridge_error(1.0, 1 / (2 * size), NOISE)
        for step in range(CHUNK, last + 1, CHUNK):
            students = students.trained(students.orders(rng, size, CHUNK), rate)
            look(f"alpha = 1, M = {size}, rate {rate:g}, step {step:,}")
            chunks = step // CHUNK
            if chunks & (chunks - 1) == 0 or step in (STOP, last):
                more = {"batch_size": size, "rate": rate, "steps": step, "time": rate * step}
                found = students.weights()
                yield row_of(IN_TIME, f"batch norm, M = {size}", lessons, found, like, said, **more)


def show(results: list[dict[str, Any]]) -> None:
    """Prints the tables."""
    notes = {
        SOLVED: "theory: of least squares, of this N; of ridge regression, of N without end; "
        "zeta = 1/(2M) of M = 32 is lambda = P zeta, and z = 0.25 is lambda = N z",
        NORMED: "trained on w and gamma, with zeta gamma^2 beside the mean squared error; same "
        "data: ridge regression of lambda = P zeta = N z; theory: of N without end",
        BATCHED: f"same data: of what is stopped, after {STOP} steps of {RATE}, ridge regression "
        "of zeta = 1/(2M), which it is like at this time only; of what is trained long, least "
        "squares times E[s_M], which has no end at alpha = 1",
        IN_TIME: "time: steps times their rate; same data, theory: ridge regression of "
        "zeta = 1/(2M); no norm: gradient descent on all examples, from zero",
    }
    for part, note in notes.items():
        rows = [row for row in results if row["part"] == part]
        second = "time" if part == IN_TIME else "alpha"
        numbers = ("measured", "error", "same_data", "theory")
        if not rows:  # interrupted
            continue
        study.table(
            "alpha = 1, in time" if part == IN_TIME else part,
            ("student", "N", second, "measured", "se", "same data", "theory"),
            [
                (
                    row["student"],
                    str(row["dimensions"]),
                    f"{row[second]:g}",
                    *("" if row.get(name) is None else f"{row[name]:.3g}" for name in numbers),
                )
                for row in rows
            ],
            note,
        )


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws the errors against alpha, and those at alpha = 1 in time."""
    against, timed = figure.subplots(1, 2)
    draw_against_alpha(against, [row for row in record["results"] if row["part"] != IN_TIME])
    draw_in_time(timed, [row for row in record["results"] if row["part"] == IN_TIME])
    for axes in (against, timed):
        axes.minorticks_off()
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
    figure.suptitle(
        f"error of a linear student, N = 256, noise {NOISE}; bars: 2 standard errors", fontsize=11
    )


def draw_against_alpha(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draws what was measured as points, and the theory of N without end as lines."""
    black, blue, orange, green = "black", *study.COLORS[:3]
    grid = np.geomspace(0.22, 4.5, 600)
    lines = (
        (black, lambda alpha: theory.least_squares_error(alpha, NOISE)),
        (orange, lambda alpha: theory.batch_norm_error(alpha, NOISE, M)),
        (blue, lambda alpha: ridge_error(DECAY, alpha)),
        (green, lambda alpha: ridge_error(RIDGE, alpha)),
    )
    for color, line in lines:
        axes.plot(grid, [line(alpha) for alpha in grid], color=color, linewidth=1, zorder=1)
    large = {"marker": "o", "markersize": 9, "markerfacecolor": "none"}
    decay, ridge = r"$\zeta = 1/2M$: $\lambda = P\zeta$", r"$z = 0.25$: $\lambda = Nz$"
    points = (
        (SOLVED, LEAST, LEAST, {"color": black, "marker": "x"}),
        (BATCHED, LONG, f"batch norm, M = {M}, long", {"color": orange, "marker": "o"}),
        (BATCHED, STOPPED, f"the same, stopped at {RATE * STOP:g}", {"color": orange, **large}),
        (NORMED, DECAY, f"weight norm, {decay}", {"color": blue, "marker": "s"}),
        (NORMED, RIDGE, f"weight norm, {ridge}", {"color": green, "marker": "^"}),
    )
    for part, student, label, style in points:
        case = part, student, 256
        chosen = [r for r in rows if (r["part"], r["student"], r["dimensions"]) == case]
        style = {"linestyle": "none", "markersize": 4.5, "label": label, **style}
        _points(axes, chosen, "alpha", **style)
    largest = [row for row in rows if row["part"] == SOLVED and row["dimensions"] == 4096]
    if largest:
        style = {"color": study.COLORS[3], "marker": "+", "markersize": 11, "linestyle": "none"}
        _points(axes, largest, "alpha", label="solved, N = 4096", **style)
    axes.plot([], [], color=black, linewidth=1, label="lines: theory, N without end")
    axes.set(xscale="log", yscale="log", ylim=(0.06, 90))
    axes.set(xlabel="alpha, examples per dimension", ylabel="error")
    axes.set_xticks([0.25, 0.5, 0.75, 1, 1.5, 2, 3, 4])
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def draw_in_time(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draws the errors at alpha = 1, and ridge regression's, which batch norm is said to be."""
    sizes = sorted({row["batch_size"] for row in rows if "batch_size" in row})
    # M = 32 in the colour that it has against alpha.
    colors = [study.COLORS[place] for place in (0, 2, 1, 3, 4)]
    for color, size in zip(colors, sizes, strict=False):
        for rate, line in ((RATE, "-"), (PATIENT, "--")):
            chosen = [r for r in rows if (r.get("batch_size"), r["rate"]) == (size, rate)]
            label = f"batch norm, M = {size}" + (f", rate {rate:g}" if rate == PATIENT else "")
            if chosen:
                style = {"color": color, "marker": "o", "markersize": 4, "linestyle": line}
                _points(axes, chosen, "time", label=label, **style)
        axes.axhline(theory.ridge_error(1.0, 1 / (2 * size), NOISE), color=color, linestyle=":")
    plain = [row for row in rows if row["student"] == PLAIN]
    if plain:
        _points(axes, plain, "time", label="no norm", color="black", linewidth=1)
    axes.plot([], [], color="black", linestyle=":", label=r"ridge of $\zeta = 1/2M$, theory")
    axes.axvline(RATE * STOP, color="black", linewidth=0.8, alpha=0.5)
    axes.annotate(
        "stopped",
        (RATE * STOP, 0.01),
        xycoords=("data", "axes fraction"),
        fontsize=9,
        xytext=(4, 0),
        textcoords="offset points",
    )
    axes.set(xscale="log", yscale="log", xlabel="rate x steps", ylabel="error at alpha = 1")
    axes.set_ylim(0.35, 40)
    axes.set_yticks([0.5, 1, 2, 5, 10, 20])
    axes.legend(frameon=False, fontsize=8, loc="upper left")


def _points(axes, rows, place, **style):
    values, errors = ([row[name] or 0 for row in rows] for name in ("measured", "error"))
    bars = 2 * np.array(errors)
    axes.errorbar([row[place] for row in rows], values, bars, capsize=2, **style)
