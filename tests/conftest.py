"""Strict JAX for every test: no silent promotion of dtypes or ranks, on eight CPU devices."""

import collections
import gc
import os
import sys
from importlib.metadata import version

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of a run is compiling: of the compiler's two ways to write a loop, which newer ones have not,
# the one that takes half as long. CI holds the last digits to the other, too.
os.environ["XLA_FLAGS"] = (
    {"0.10.": "--xla_cpu_use_fusion_emitters=false"}.get(version("jaxlib")[:5], "")
    + " --xla_force_host_platform_device_count=8 "
    + os.environ.get("XLA_FLAGS", "")
)

import jax
import pytest

jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")
# Where digits are not the question, the compiler optimizes less.
jax.config.update("jax_disable_most_optimizations", True)
# What JAX traces and compiles stays for long: to look through it again and again took a tenth.
gc.set_threshold(200_000, 20, 100)
EXACT = {"test_accuracy", "test_laws", "test_moments", "test_onnx", "test_range", "test_torch"}


def pytest_addoption(parser):
    parser.addoption(
        "--part",
        default="1/1",
        metavar="I/N",
        help="of the cases of each test every Nth, from the Ith on, and one at least",
    )


def pytest_collection_modifyitems(config, items):
    """Leaves out the other parts, which a run of all tests on a second JAX can do without."""
    part, parts = map(int, config.getoption("part").split("/"))
    names = [item.nodeid.partition("[")[0] for item in items]
    sizes, seen = collections.Counter(names), collections.Counter()
    kept, left = [], []
    for item, name in zip(items, names, strict=True):
        first = (part - 1) % min(sizes[name], parts)
        (kept if seen[name] % parts == first else left).append(item)
        seen[name] += 1
    items[:] = kept
    if left:
        config.hook.pytest_deselected(items=left)


@pytest.fixture(autouse=True)
def optimized(request):
    """Compiles what is held to the last digits as users do."""
    jax.config.update("jax_disable_most_optimizations", request.path.stem not in EXACT)
    yield
    jax.config.update("jax_disable_most_optimizations", True)


@pytest.fixture(autouse=True, scope="module")
def released():
    """Gives back what was compiled: a process may map 65530 pieces of memory, and a run is more."""
    yield
    jax.clear_caches()


@pytest.fixture
def x64():
    """Runs a test with float64 arrays."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def optax_promotes():
    """Lets optax raise a float to an integer count, as Adam's bias correction does."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(params=["cuda", "tpu"], scope="module")
def form(request):
    """Chooses, on CPU too, the form of the formulas that another platform gets."""
    from normax.kernels.dispatch import by_platform

    def chosen(default, **others):
        return by_platform(default, cpu=others.get(request.param, default))

    with pytest.MonkeyPatch.context() as monkeypatch:
        for module in ("forms", "implementations"):
            monkeypatch.setattr(sys.modules[f"normax.{module}"], "by_platform", chosen)
        jax.clear_caches()
        yield request.param
        jax.clear_caches()
