"""Singular values of which the others, where they are equal, do not spoil the derivatives.

JAX differentiates a decomposition twice by differences of all its singular values: where any two of
them are equal, as those of a kernel of low rank nearly are, that is noise or NaN. The derivative of
one of them needs its own two vectors, and theirs its distance from each of the others alone.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def singular_values(matrix: jax.Array, indices: tuple[int, ...]) -> list[jax.Array]:
    """Returns some singular values of a matrix, the largest at index 0."""
    found = jnp.linalg.svd(matrix, full_matrices=False, compute_uv=False)
    return [found[index] for index in indices]


@singular_values.defjvp
def _values_jvp(indices, primals, tangents):
    (move,) = tangents
    values, lefts, rights = _with_vectors(*primals, indices)
    pairs = zip(lefts, rights, strict=True)
    return values, [jnp.real(left.conj() @ move @ right) for left, right in pairs]


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def _with_vectors(matrix, indices):
    """Returns some singular values, and their left and right vectors."""
    return _chosen(_decomposed(matrix), indices)


@_with_vectors.defjvp
def _with_vectors_jvp(indices, primals, tangents):
    (matrix,), (move,) = primals, tangents
    decomposed = _decomposed(matrix)
    moves = [_move(decomposed, index, move) for index in indices]
    return _chosen(decomposed, indices), [list(each) for each in zip(*moves, strict=True)]


def _chosen(decomposed, indices):
    lefts, values, rights = decomposed
    return [[v[..., index] for index in indices] for v in (values, lefts, rights)]


def _move(decomposed, index, move):
    """Returns the tangents of a singular value, and of its left and right vector."""
    lefts, values, rights = decomposed
    forth, back = move @ rights[:, index], move.conj().T @ lefts[:, index]
    along, against = lefts.conj().T @ forth, rights.conj().T @ back
    tangent = jnp.real(along[index])
    # Of complex vectors the phase is free: each takes half of what they turn against each other.
    turn = (along[index] - tangent.astype(along.dtype)) / 2
    values = values.astype(along.dtype)
    value, others = values[index], jnp.arange(len(values)) != index % len(values)
    gap = jnp.where(others, (value - values) * (value + values), 1)
    to_left = jnp.where(others, (value * along + values * against) / gap, turn / value)
    to_right = jnp.where(others, (values * along + value * against) / gap, -turn / value)
    # What is orthogonal to all vectors of a side, where there are fewer than its length.
    forth, back = forth - lefts @ along, back - rights @ against
    return tangent, lefts @ to_left + forth / value, rights @ to_right + back / value


def _decomposed(matrix):
    """Returns left vectors, singular values and right vectors, a column each."""
    lefts, values, rights = jnp.linalg.svd(matrix, full_matrices=False)
    return lefts, values, rights.conj().T
