"""Quotients, roots and powers with derivatives whose factors stay in range.

JAX differentiates x / y by 1 / y^2 and 1 / sqrt(x) by its cube, which leave the range of float32
where what they are multiplied with would bring them back. Here one factor comes after the other.
"""

import jax
import jax.numpy as jnp
from jax import lax


@jax.custom_jvp
def quotient(x: jax.Array, y: jax.Array) -> jax.Array:
    """Returns `x / y`, of one dtype."""
    return x / y


@quotient.defjvp
def _quotient_jvp(primals, tangents):
    out, (dx, dy) = quotient(*primals), tangents
    return out, quotient(dx - out * dy, primals[1])


@jax.custom_jvp
def reciprocal_root(x: jax.Array) -> jax.Array:
    """Returns `1 / sqrt(x)`."""
    return lax.rsqrt(x)


@reciprocal_root.defjvp
def _reciprocal_root_jvp(primals, tangents):
    out = reciprocal_root(*primals)
    return out, -0.5 * tangents[0] * out * out * out


@jax.custom_jvp
def power(x: jax.Array, exponent: jax.Array) -> jax.Array:
    """Returns `x ** exponent`, x above zero."""
    return x**exponent


@power.defjvp
def _power_jvp(primals, tangents):
    (x, exponent), (dx, dexponent) = primals, tangents
    out = power(x, exponent)
    return out, out * (exponent * quotient(dx, x)) + out * jnp.log(x) * dexponent
