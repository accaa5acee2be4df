"""Contestants of PyTorch, where it is installed: eager, compiled, and Liger's Triton kernels.

"torch native" is batch norm without cuDNN. They read JAX's own arrays. Features are last in memory
for all but "torch nchw" and Liger's group norm; the others see such an array as channels_last,
which is PyTorch's fast layout.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.speed import exact
from benchmarks.speed.cases import Case
from benchmarks.speed.contestant import Contestant, Inputs, differentiated
from benchmarks.speed.peers import importable

NAMES = ("torch", "torch nchw", "torch native", "torch compile", "liger")


def usable() -> bool:
    """Returns whether PyTorch is there and sees the devices that JAX uses."""
    if not importable("torch"):
        return False
    import torch

    return {"cpu": True, "gpu": torch.cuda.is_available()}.get(jax.default_backend(), False)


def names(case: Case, quick: bool) -> list[str]:
    """Returns the contestants of PyTorch for a case."""
    if not usable():
        return []
    found = ["torch"] + ["torch nchw"] * (case.norm == "group")
    if case.norm == "batch" and jax.default_backend() == "gpu":
        found.append("torch native")
    if not quick:
        found.append("torch compile")
    if jax.default_backend() == "gpu" and importable("liger_kernel.transformers.functional"):
        found += ["liger"] * (case.norm != "batch")
    return found


def _first(x):
    """Returns an array with its features second, as PyTorch has them: no copy."""
    return x.movedim(-1, 1)


def _norm(case: Case, name: str, channels: int) -> Callable[[Any, Any, Any], Any]:
    """Returns the norm as a function of tensors; scale and bias have the dtype that suits it."""
    import torch
    import torch.nn.functional as F

    if name == "liger":
        from liger_kernel.transformers import functional as liger

        if case.norm == "layer":
            return lambda x, w, b: liger.liger_layer_norm(x, w, b, case.epsilon)
        if case.norm == "rms":
            return lambda x, w, b: liger.liger_rms_norm(x, w, case.epsilon, in_place=False)
        return lambda x, w, b: liger.liger_group_norm(x, w, b, channels, case.groups, case.epsilon)
    if case.norm == "layer":
        return lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b, case.epsilon)
    if case.norm == "rms":
        return lambda x, w, b: F.rms_norm(x, x.shape[-1:], w, case.epsilon)
    if case.norm == "group":
        return lambda x, w, b: F.group_norm(x, case.groups, w, b, case.epsilon)
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    mean, var = torch.zeros(channels, device=device), torch.ones(channels, device=device)
    return lambda x, w, b: F.batch_norm(
        x, mean, var, w, b, training=True, momentum=0.01, eps=case.epsilon
    )


def _composed(case: Case, norm: Callable, name: str) -> Callable[[dict], dict]:
    """Returns a function of a dict of tensors that returns the outputs by name."""
    import torch.nn.functional as F

    if name == "liger" and (case.norm, case.wrap) == ("rms", "add"):
        from liger_kernel.transformers import functional as liger

        def fused(given):
            y, total = liger.liger_fused_add_rms_norm(
                given["x"], given["second"], given["scale"], case.epsilon, in_place=False
            )
            return {"sum": total, "y": y}

        return fused

    def run(given):
        x, second = given["x"], given.get("second")
        x = x + second if case.wrap == "add" else x
        y = norm(x, given["scale"], given["bias"])
        if case.wrap == "gate":
            y = y * F.silu(second)
        elif case.wrap == "add_relu":
            y = F.relu(y + second)
        elif case.wrap == "gelu":
            y = F.gelu(y, approximate="tanh")
        elif case.wrap in ("relu", "silu"):
            y = {"relu": F.relu, "silu": F.silu}[case.wrap](y)
        return {"sum": x, "y": y} if case.wrap == "add" else {"y": y}

    return run


def make(case: Case, name: str, inputs: Inputs) -> Contestant:
    """Returns a contestant of `names`."""
    import torch

    cuda = jax.default_backend() == "gpu"
    features_first = case.norm in ("batch", "group")
    contiguous = name in ("torch nchw", "liger") and features_first
    wanted_names = differentiated(case)

    def tensor(value):
        value = torch.from_dlpack(value)
        value = _first(value) if features_first and value.ndim > 1 else value
        return value.contiguous() if contiguous else value

    def parameter(value):
        # Batch norm alone takes float32 parameters for bfloat16 input on every device.
        dtype = torch.float32 if case.norm == "batch" else getattr(torch, case.dtype)
        return torch.from_dlpack(value).to(dtype, copy=True)

    parameters = {"scale": parameter(inputs.scale), "bias": parameter(inputs.bias)}

    def ready(given):
        given = {key: tensor(value) for key, value in given.items()} | parameters
        grads = {key: given.pop(key) for key in ("dsum", "dy") if key in given}
        if case.mode != "forward":
            given |= {key: given[key].detach().requires_grad_() for key in wanted_names}
        return given, list(grads.values())

    function = _composed(case, _norm(case, name, case.shape[-1]), name)
    if name == "torch native":
        function = functools.partial(_without_cudnn, function)
    if name == "torch compile":
        import torch._functorch.config as functorch

        # The backward pass is run more than once on what one forward pass kept.
        functorch.donated_buffer = False
        torch._dynamo.reset()
        function = torch.compile(function, dynamic=False)
    sets = [ready(given) for given in inputs.sets]
    kept = None

    def gradients(outputs, given, cotangents, retain):
        found = torch.autograd.grad(
            [outputs[key] for key in ("sum", "y") if key in outputs],
            [given[key] for key in wanted_names],
            cotangents,
            retain_graph=retain,
        )
        return {f"d{key}": grad for key, grad in zip(wanted_names, found, strict=True)}

    def forward(given, _):
        with torch.no_grad():
            return function(given)

    def both(given, cotangents):
        outputs = function(given)
        return outputs | gradients(outputs, given, cotangents, False)

    graphs: list[Any] = []

    def backward(numbered, cotangents):
        number, given = numbered
        return gradients(graphs[number], given, cotangents, True)

    run, arguments = both if case.mode == "both" else forward, sets
    if case.mode == "backward":
        saved: dict[int, int] = {}

        def pack(value):
            storage = value.untyped_storage()
            saved[storage.data_ptr()] = storage.nbytes()
            return value

        for number, (given, _) in enumerate(sets):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
                graphs.append(function(given))
            if number == 0:
                kept = sum(saved.values())

        run, arguments = backward, [((i, given), grads) for i, (given, grads) in enumerate(sets)]

    def checked():
        given, cotangents = ready(inputs.check)
        if case.mode == "backward":
            given = (0, sets[0][0])
        return {key: _take(case, v) for key, v in run(given, cotangents).items()}

    def call(i):
        return run(*arguments[i % len(arguments)])

    scratch = None
    wait(call(0))
    if cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        wait(call(0))
        scratch = torch.cuda.max_memory_allocated() - before
    return Contestant(call, wait, checked, device_times(call), kept, scratch)


def _take(case: Case, value: Any) -> np.ndarray:
    """Returns the slice of a tensor of the shape of x, features last again, or of its features."""
    import torch

    value = value.detach()
    if value.ndim == 1 and case.norm != "batch":
        return value.float().cpu().numpy()
    if value.ndim > 1 and case.norm in ("batch", "group"):
        value = value.movedim(1, -1)
    axis = exact.axis(case) if value.ndim > 1 else 0
    where = torch.as_tensor(exact.indices(case), device=value.device)
    return value.index_select(axis % value.ndim, where).float().cpu().numpy()


def _without_cudnn(function: Callable[[dict], dict], given: dict) -> dict:
    """Returns what a function returns where cuDNN may not be used."""
    import torch

    with torch.backends.cudnn.flags(enabled=False):
        return function(given)


def wait(_: Any) -> None:
    """Waits for all that PyTorch was asked to do."""
    import torch

    if jax.default_backend() == "gpu":
        torch.cuda.synchronize()


def release() -> None:
    """Gives back the memory that PyTorch holds but does not use."""
    if usable():
        import torch

        torch.cuda.empty_cache()


def device_times(call: Callable[[int], Any]) -> Callable[[int], list[float]] | None:
    """Returns a function that times a number of calls by the device's own clock, on a GPU."""
    if jax.default_backend() != "gpu":
        return None
    return functools.partial(_events, call)


def _events(call: Callable[[int], Any], iterations: int) -> list[float]:
    """Returns milliseconds between two events around each of a number of calls."""
    import torch

    found = []
    for i in range(iterations):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        # What is queued before keeps the device from waiting for the host between the events.
        call(i)
        begin.record()
        call(i)
        end.record()
        end.synchronize()
        found.append(begin.elapsed_time(end))
    return found
