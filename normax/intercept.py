"""Interceptors of linen that no compiled part of a model remembers."""

import contextlib
from collections.abc import Callable, Iterator
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


def as_if(options_of: Callable[[linen.Module], dict[str, Any]]) -> Any:
    """Returns an interceptor that calls linen modules as if they had other options.

    Args:
      options_of: returns the other options of a module by name; of most there are none.
    """

    def look(call, args, kwargs, context):
        with having(context.module, options_of(context.module)):
            return call(*args, **kwargs)

    return look


@contextlib.contextmanager
def having(module: Any, options: dict[str, Any]) -> Iterator[None]:
    """Gives a module other options for a while.

    Args:
      module: of linen or nnx.
      options: by name; those that it has now come back.
    """
    before = {name: getattr(module, name) for name in options}
    for name, value in options.items():
        object.__setattr__(module, name, value)
    try:
        yield
    finally:
        for name, value in before.items():
            object.__setattr__(module, name, value)
