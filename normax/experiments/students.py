"""Linear students of a noisy linear teacher: solved, and trained with weight or batch norm."""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import normax
from normax import interop

NOISE = 0.25  # the variance of what is added to the teacher


class Lesson(NamedTuple):
    """What a student sees, both of mean zero over the examples, and the teacher's weights."""

    x: np.ndarray
    y: np.ndarray
    teacher: np.ndarray

    def error_of(self, weights: np.ndarray) -> float:
        """Returns the squared error of weights, of inputs that were never seen."""
        return float(np.sum((weights - self.teacher) ** 2))


class Students(NamedTuple):
    """What is trained: directions, a column each, of any length, and what replaces their length."""

    direction: jax.Array
    length: jax.Array


def lesson(seed: tuple[int, ...], examples: int, dimensions: int) -> Lesson:
    """Draws standard Gaussian inputs, a teacher of length one, and what it says with noise."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((examples, dimensions))
    teacher = rng.standard_normal(dimensions)
    teacher /= np.linalg.norm(teacher)
    y = x @ teacher + NOISE**0.5 * rng.standard_normal(examples)
    x -= x.mean(0)
    return Lesson(x, y - y.mean(), teacher)


def solved(data: Lesson, decay: float = 0.0) -> np.ndarray:
    """Returns what least squares learns, the shortest, or ridge regression of a mean loss."""
    x, y, examples = data.x, data.y, len(data.y)
    if examples > x.shape[1]:
        return np.linalg.solve(_with_ridge(x.T @ x, examples * decay), x.T @ y)
    # The rows sum to zero, and so does y: with one added to each product it can be solved.
    return x.T @ np.linalg.solve(_with_ridge(x @ x.T + 1.0, examples * decay), y)


def descended(data: Lesson, rate: float, steps: int) -> np.ndarray:
    """Returns what gradient descent on all examples comes to from zero, in closed form."""
    curvature, axes = np.linalg.eigh(data.x.T @ data.x / len(data.y))
    slope = axes.T @ (data.x.T @ data.y) / len(data.y)
    # 1 - (1 - 2 r k)^n over k, and what that tends to where k is zero.
    kept = np.maximum(curvature, 1e-15)
    return axes @ (slope * -np.expm1(steps * np.log1p(-2 * rate * kept)) / kept)


def _with_ridge(matrix, ridge):
    matrix[np.diag_indices_from(matrix)] += ridge
    return matrix


def weight_normed(lessons: Sequence[Lesson], decays: Sequence[float], steps: int) -> np.ndarray:
    """Trains students with weight norm on all their examples at once, by gradient descent.

    Args:
      lessons: what each student sees.
      decays: of the square of each student's length, beside the mean squared error.
      steps: at a rate of 0.1.

    Returns:
      Weights, a row for each student.
    """
    # Along the axes of the inputs' moments, which gradient descent does not tell from others, a
    # step takes no product with a matrix.
    moments = [
        (data.x.T @ data.x / len(data.y), data.x.T @ data.y / len(data.y)) for data in lessons
    ]
    curvature, axes = np.linalg.eigh([inputs for inputs, _ in moments])
    slope = np.stack([slope @ turn for (_, slope), turn in zip(moments, axes, strict=True)], -1)
    found = _weight_normed(_beginning(slope), curvature.T, slope, np.asarray(decays), steps)
    return np.einsum("rnk,kr->rn", axes, found)


@jax.jit
def _weight_normed(students, curvature, slope, decays, steps):
    def loss(students):
        weights = normax.weight_norm(students.direction, students.length)
        error = jnp.sum(curvature * weights**2 - 2 * slope * weights, 0)
        return jnp.sum(error + decays * students.length**2)

    def step(_, students):
        return _descend(students, jax.grad(loss)(students), 0.1)

    students = jax.lax.fori_loop(0, steps, step, students)
    return normax.weight_norm(students.direction, students.length)


class BatchNormed(NamedTuple):
    """Students with batch norm that are trained at once, each on the first so many of its rows."""

    students: Students
    x: jax.Array
    y: jax.Array
    examples: tuple[int, ...]

    @classmethod
    def beginning(cls, lessons: Sequence[Lesson]) -> "BatchNormed":
        """Returns students of no training, who know no direction but those of their examples."""
        examples = tuple(len(data.y) for data in lessons)
        x = np.zeros((len(lessons), max(examples), lessons[0].x.shape[1]))
        y = np.zeros(x.shape[:2])
        for place, data in enumerate(lessons):
            x[place, : examples[place]], y[place, : examples[place]] = data.x, data.y
        slope = np.stack([data.x.T @ data.y for data in lessons], -1)
        return cls(_beginning(slope), jnp.asarray(x), jnp.asarray(y), examples)

    def orders(self, rng: np.random.Generator, batch_size: int, steps: int) -> np.ndarray:
        """Returns the rows of each step and student: all in some order, then in another."""
        orders = []
        for number in self.examples:
            batches = number // batch_size
            passes = np.tile(np.arange(number), (-(-steps // batches), 1))
            rows = rng.permuted(passes, axis=1)[:, : batches * batch_size]
            orders.append(rows.reshape(-1, batch_size)[:steps])
        return np.stack(orders, 1)

    def trained(self, orders: np.ndarray, rate: float) -> "BatchNormed":
        """Returns the students after gradient descent on the squared error of each batch."""
        return self._replace(students=_batch_normed(self.students, self.x, self.y, orders, rate))

    def weights(self) -> np.ndarray:
        """Returns what the students are at inference, by the statistics of all their examples."""
        h = jnp.einsum("rpn,nr->pr", self.x, self.students.direction)
        seen = np.arange(len(h))[:, None] < np.array(self.examples)
        found = normax.moments(h, 0, mask=jnp.asarray(seen))
        stats = normax.update(normax.RunningStats.create(h.shape[1]), found, momentum=None)
        factor, _ = interop.affine_of(stats, self.students.length, epsilon=0.0)
        return np.asarray(factor * self.students.direction).T


@jax.jit
def _batch_normed(students, x, y, orders, rate):
    def loss(students, x, y):
        h = jnp.einsum("rmn,nr->mr", x, students.direction)
        output, _ = normax.normalize_batch(h, students.length, epsilon=0.0)
        return jnp.sum(jnp.mean((output - y.T) ** 2, 0))  # the students are independent

    def step(students, rows):
        batch = (jax.vmap(jnp.take, (0, 0, None))(part, rows, 0) for part in (x, y))
        return _descend(students, jax.grad(loss)(students, *batch), rate), None

    return jax.lax.scan(step, students, orders)[0]


def _beginning(slope):
    return Students(jnp.asarray(slope / np.linalg.norm(slope, axis=0)), jnp.ones(slope.shape[1]))


def _descend(students, gradient, rate):
    return jax.tree.map(lambda value, slope: value - rate * slope, students, gradient)
