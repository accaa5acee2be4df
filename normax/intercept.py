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


def as_if(kind: type | tuple[type, ...], **values: Any) -> Any:
    """Returns an interceptor that calls linen modules of a kind as if they had other options."""

    def look(call, args, kwargs, context):
        module = context.module
        if not isinstance(module, kind):
            return call(*args, **kwargs)
        before = {name: getattr(module, name) for name in values}
        for name, value in values.items():
            object.__setattr__(module, name, value)
        try:
            return call(*args, **kwargs)
        finally:
            for name, value in before.items():
                object.__setattr__(module, name, value)

    return look
