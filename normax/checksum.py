"""A checksum of an array that is the same however the array lies on devices and hosts."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

CHUNK = 1 << 16  # words, that a near cache holds


def checksum(x: jax.Array) -> int:
    r"""Returns a number of 32 bits that any change of one word of `x` changes.

    .. math:: \sum_i h(w_i \oplus c\, i) \bmod 2^{32}

    of its words, with h one to one. What a process does not hold is added up where it lies, so that
    all processes have to ask.

    Args:
      x: array of numbers, of any dtype and layout.
    """
    if x.is_fully_addressable or x.is_fully_replicated:
        words = _words_at_hand(np.asarray(x))
        total = 0
        for first in range(0, len(words), CHUNK):
            some = words[first : first + CHUNK].astype(np.uint32)
            total += int(_mixed(some, np.arange(first, first + len(some))).sum(dtype=np.uint64))
        return total % 2**32
    return int(_of_all(x))


def _mixed(words: Any, places: Any) -> Any:
    """Returns words and their places mixed, as the hash MurmurHash3 ends: one to one."""
    h = words ^ places.astype(np.uint32) * np.uint32(0x9E3779B1)
    h = (h ^ (h >> np.uint32(16))) * np.uint32(0x85EBCA6B)
    h = (h ^ (h >> np.uint32(13))) * np.uint32(0xC2B2AE35)
    return h ^ (h >> np.uint32(16))


def _words_at_hand(x):
    """Returns the words of an array, of 32 bits or, if its entries are less, as many as they."""
    flat = np.ascontiguousarray(x).reshape(-1)
    words = flat.view(f"u{min(flat.dtype.itemsize, 4)}")
    return words & np.array(2 ** _bits(x.dtype) - 1, words.dtype) if _bits(x.dtype) < 8 else words


@jax.jit
def _of_all(x):
    if jnp.iscomplexobj(x):
        x = jnp.stack([x.real, x.imag], -1)
    x = x.astype(jnp.uint8) if x.dtype == jnp.bool_ else x
    words = lax.bitcast_convert_type(x, jnp.dtype(f"uint{min(_bits(x.dtype), 32)}"))
    places, stride = jnp.zeros(words.shape, jnp.uint32), 1
    for axis in reversed(range(words.ndim)):
        iota = lax.broadcasted_iota(jnp.uint32, words.shape, axis)
        places, stride = places + iota * np.uint32(stride % 2**32), stride * words.shape[axis]
    return jnp.sum(_mixed(words.astype(jnp.uint32), places), dtype=jnp.uint32)


def _bits(dtype):
    """Returns how many bits a number of a dtype has."""
    if jnp.issubdtype(dtype, jnp.bool_):
        return 8
    return (jnp.iinfo if jnp.issubdtype(dtype, jnp.integer) else jnp.finfo)(dtype).bits
