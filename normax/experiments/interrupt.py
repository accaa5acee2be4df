"""Ctrl-C that waits for the end of a step.

Python raises KeyboardInterrupt wherever it happens to be. In a callback of JAX's garbage
collection it is swallowed and the run goes on; in a compilation it can crash the process at exit.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def deferred() -> Iterator[Callable[[], None]]:
    """Yields a function that raises KeyboardInterrupt if Ctrl-C was pressed; twice is at once."""
    asked = False

    def note(number, frame):
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True
        # print may be what was interrupted, and it cannot be entered twice.
        os.write(2, b"\nstopping; Ctrl-C again to stop at once\n")

    def check():
        if asked:
            raise KeyboardInterrupt

    previous = signal.signal(signal.SIGINT, note)
    try:
        yield check
    finally:
        signal.signal(signal.SIGINT, previous)
