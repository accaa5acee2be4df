"""The library of native kernels: loaded, and made known to XLA, if this JAX can take it."""

import ctypes
import functools
import importlib.metadata
import pathlib
import re

import jax

NAME = "libnormax_cpu.so"


def _find():
    """Returns where the library is: beside this file, or with what was installed from here."""
    beside = pathlib.Path(__file__).with_name(NAME)
    if beside.exists():
        return beside
    # An editable install, or tests run in the folder that was installed from, which may hold
    # what an older build left of another.
    for installed in importlib.metadata.distributions(name="normax"):
        path = pathlib.Path(str(installed.locate_file(f"normax/kernels/{NAME}")))
        if path.exists():
            return path.resolve()
    return beside


PATH = _find()
INTERFACE = 2  # that of interface.cc, to tell what another version of normax left
TARGETS = (
    "normax_forward",
    "normax_add_forward",
    "normax_backward",
    "normax_groups_forward",
    "normax_groups_backward",
    "normax_column_moments",
    "normax_column_gradients",
    "normax_columns_forward",
    "normax_columns_backward",
)


@functools.cache
def unavailable() -> str | None:
    """Returns why the native kernels cannot be called, or None; then XLA knows them."""
    return _register(PATH, _version_of_runtime())


def _register(path, runtime):
    """Registers what is in a library, for a runtime of a version; returns why not, or None."""
    if not path.exists():
        return f"the kernels for CPU were not built: there is no {path.name}"
    try:
        library = ctypes.CDLL(str(path))
        major, minor = ctypes.c_int32(), ctypes.c_int32()
        library.normax_ffi_version(ctypes.byref(major), ctypes.byref(minor))
        built, interface = (major.value, minor.value), library.normax_interface()
        handlers = {name: jax.ffi.pycapsule(getattr(library, name)) for name in TARGETS}
    except (OSError, AttributeError) as error:
        return f"the kernels for CPU cannot be loaded: {error}"
    if interface != INTERFACE:
        return (
            f"the kernels for CPU are those of another version of normax, with interface "
            f"{interface} where {INTERFACE} is asked for: install normax again"
        )
    # XLA itself would refuse newer ones where it starts, and leave JAX without a device.
    if runtime is None or built[0] != runtime[0] or built > runtime:
        return (
            f"the kernels for CPU were built for version {_dotted(built)} of XLA's interface, "
            f"and jaxlib has {_dotted(runtime)}"
        )
    for name, handler in handlers.items():
        jax.ffi.register_ffi_target(name, handler, platform="cpu")
    return None


def _version_of_runtime():
    """Returns the version of the interface that jaxlib has, by its own headers; None is unknown."""
    header = pathlib.Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    if not header.exists():
        return None
    text = header.read_text()
    found = [re.search(rf"#define XLA_FFI_API_{part}\s+(\d+)", text) for part in ("MAJOR", "MINOR")]
    return tuple(int(each[1]) for each in found if each) if all(found) else None


def _dotted(version):
    return "none that is known" if version is None else ".".join(map(str, version))
