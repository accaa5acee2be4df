"""On what a run was made: processor, accelerator, versions, commit. No names of hosts or users."""

import os
import pathlib
import platform
import subprocess
from importlib import metadata
from typing import Any

import jax

PACKAGES = ["jax", "jaxlib", "flax", "numpy", "dm-haiku", "equinox", "keras", "torch", "triton"]
PACKAGES += ["liger-kernel", "jax-cuda12-plugin", "jax-cuda13-plugin", "libtpu"]
SETTINGS = ["MALLOC_ARENA_MAX", "MALLOC_MMAP_THRESHOLD_", "MALLOC_TRIM_THRESHOLD_", "XLA_FLAGS"]
SETTINGS += ["XLA_PYTHON_CLIENT_PREALLOCATE", "LIBTPU_INIT_ARGS", "OMP_NUM_THREADS"]


def _processor() -> str:
    """Returns the name of the processor."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _says(*command: str) -> str | None:
    """Returns what a program prints, or None where it is not there or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe() -> dict[str, Any]:
    """Returns machine, versions, settings and commit."""
    device = jax.devices()[0]
    gpu = None
    if device.platform == "gpu":
        gpu = _says(
            "nvidia-smi", "--query-gpu=name,driver_version,clocks.max.sm", "--format=csv,noheader"
        )
    changed = _says("git", "status", "--porcelain", "--untracked-files=no")
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "gpu": gpu,
        "processor": _processor(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else None,
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": {name: v for name in PACKAGES if (v := _version(name)) is not None},
        "settings": {name: os.environ[name] for name in SETTINGS if name in os.environ},
        "commit": _says("git", "rev-parse", "HEAD"),
        "changed": None if changed is None else bool(changed),
    }
