"""Kernels, and the tools that place them in a JAX program.

`dispatch` picks a function by platform, `linear` gives a linear function a transpose written by
hand, `sharding` keeps a batch sharded; `primitive` is what the three are made of. None of them
knows what is normalized.
"""


def available() -> dict[str, str | None]:
    """Says which kernels that are built with the package can be had here, and why others cannot.

    `implementation="cpu"` is a library in C++: it is there if a compiler was when normax was
    installed. The kernels for GPU and TPU are compiled by JAX, where a program is.

    Returns:
      None for each implementation that can be had, or the reason why not.

    Example:
      >>> import normax.kernels
      >>> reason = normax.kernels.available()["cpu"]
      >>> reason is None or isinstance(reason, str)
      True
    """
    from normax.kernels import cpu_library

    return {"cpu": cpu_library.unavailable()}
