"""Interceptors of linen that no compiled part of a model remembers."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
from flax import linen

# A value of JAX's caches: `nn.jit` traces a module once, whoever listens.
_listener = jax.make_user_context(None)


@contextlib.contextmanager
def intercepted(interceptor: Any) -> Iterator[None]:
    """Listens to the methods of linen modules, those within `nn.jit` too.

    Args:
      interceptor: as `flax.linen.intercept_methods` takes it; what it does is remembered for itself
        alone.
    """
    with _listener(interceptor), linen.intercept_methods(interceptor):
        yield
