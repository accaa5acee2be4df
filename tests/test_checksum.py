"""A checksum: the same by hand in whole numbers, in every layout, and another for every bit."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from normax import checksum

DTYPES = ["bool", "int4", "uint4", "int8", "uint16", "int32", "float8_e5m2", "bfloat16", "float32"]
WIDE = ["int64", "float64", "complex64", "complex128"]


def by_hand(x):
    """Returns the same by whole numbers that do not wrap: the end of MurmurHash3's 32 bits."""
    size, total = min(x.dtype.itemsize, 4), 0
    octets = np.ascontiguousarray(x).tobytes()
    for i in range(len(octets) // size):
        word = int.from_bytes(octets[i * size : (i + 1) * size], "little")
        word &= 15 if str(x.dtype).endswith("int4") else 2**32 - 1
        h = word ^ (i * 0x9E3779B1 % 2**32)
        for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
            h = (h ^ h >> shift) * factor % 2**32
        total += h
    return total % 2**32


@pytest.mark.parametrize("dtype", DTYPES + WIDE)
@pytest.mark.parametrize("shape", [(16, 3, 5), (8,), ()], ids=str)
def test_every_dtype_in_every_layout(dtype, shape, x64):
    x = (3 * jax.random.normal(jax.random.key(0), shape)).astype(dtype)
    wanted = by_hand(np.asarray(x))
    assert checksum.checksum(x) == wanted
    assert int(checksum._of_all(x)) == wanted  # as of one of which each process has a part
    if shape:
        mesh = jax.make_mesh((8,), ("data",))
        placed = jax.device_put(x, NamedSharding(mesh, P("data")))
        assert int(checksum._of_all(placed)) == checksum.checksum(placed) == wanted


def test_every_bit_of_an_array_of_several_chunks():
    x = np.random.default_rng(0).normal(size=(3, checksum.CHUNK)).astype(np.float32)
    wanted = checksum.checksum(jnp.asarray(x))
    words = x.view(np.uint32).reshape(-1)
    for i, place in enumerate(np.linspace(0, words.size - 1, 64, dtype=int)):
        words[place] ^= np.uint32(1 << i % 32)
        assert checksum.checksum(jnp.asarray(x)) != wanted
        words[place] ^= np.uint32(1 << i % 32)
    assert checksum.checksum(jnp.asarray(x[::-1])) != wanted
