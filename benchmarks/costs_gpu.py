"""What the Mosaic GPU kernels compile to for an H200, on a machine that has none.

For each kernel and shape: bytes that kernels read and write, over those that have to be moved, and
registers and spills, where ptxas is found. It takes jax >= 0.11 and of that version
jax-cuda12-pjrt and jax-cuda12-plugin. No time is measured.

  python benchmarks/costs_gpu.py --write      benchmarks/costs_gpu.md
  python benchmarks/costs_gpu.py --json 32768x4096xbfloat16 64x196x32x10xbfloat16
"""

import argparse
import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import tempfile

HERE = pathlib.Path(__file__).parent
SHAPES = [
    *((2**27 // length, length, "bfloat16") for length in (512, 768, 1024, 2048, 4096, 5120, 8192)),
    *((2**26 // length, length, "float32") for length in (1024, 4096, 8192)),
    (2**17, 1000, "bfloat16"),
    # Read more than once: rows of an odd length, and rows that registers do not hold.
    (2**17, 65, "bfloat16"),
    (2**17, 1001, "bfloat16"),
    (2**13, 8193, "bfloat16"),
    (2**13, 16384, "bfloat16"),
    (2**12, 32768, "bfloat16"),
    (2**12, 40000, "float32"),
]
# Of examples, positions, groups and features of a group.
GROUPS = [
    *((256, 49, 32, size, "bfloat16") for size in (16, 64)),
    *((256, 196, 32, size, "bfloat16") for size in (10, 40)),
    *((64, 1024, 32, size, "bfloat16") for size in (10, 20)),
    *((64, 1024, features, 1, "bfloat16") for features in (64, 256)),
    (256, 196, 32, 10, "float32"),
    (64, 1024, 32, 10, "float32"),
    (16, 4096, 32, 8, "bfloat16"),
    (16, 4096, 32, 10, "bfloat16"),
]
SIZES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4}
FREE = ("parameter", "constant", "tuple", "get-tuple-element", "bitcast")


def programs():
    """Returns name: (function, arguments of the size of x, parameters, least bytes over x's)."""
    from normax.kernels import mosaic_gpu as kernels

    layer = {"centered": True, "epsilon": 1e-6}
    rms = {"centered": False, "epsilon": 1e-6}

    def both(x, dy, scale, bias):
        y = kernels.forward(x, scale, bias, **layer)
        return y, kernels.backward(x, scale, dy, **layer)

    return {
        "layer": (lambda x, s, b: kernels.forward(x, s, b, **layer), 1, 2, 2),
        "layer statistics": (
            lambda x, s, b: kernels.forward_with_statistics(x, s, b, **layer),
            1,
            2,
            2,
        ),
        "layer backward": (lambda x, dy, s: kernels.backward(x, s, dy, **layer), 2, 1, 3),
        "layer both": (both, 2, 2, 5),
        "rms": (lambda x, s: kernels.forward(x, s, **rms), 1, 1, 2),
        "rms backward": (lambda x, dy, s: kernels.backward(x, s, dy, **rms), 2, 1, 3),
        "add layer": (lambda x, r, s, b: kernels.add_forward(x, r, s, b, **layer), 2, 2, 4),
        "add layer backward": (
            lambda x, dy, ds, s: kernels.add_backward(x, s, dy, ds, **layer),
            3,
            1,
            4,
        ),
    }


def programs_of_groups():
    """Returns the same of x of shape (N, L, G, K)."""
    import jax

    from normax.kernels import mosaic_gpu_groups as kernels

    def forward(**how):
        return lambda x, s, b: kernels.forward_groups(x, s, b, centered=True, epsilon=1e-6, **how)

    def backward(**how):
        how |= {"centered": True, "epsilon": 1e-6}
        return lambda x, dy, s, b: kernels.backward_groups(x, s, b, dy, **how)

    silu = {"activation": jax.nn.silu}
    return {
        "group": (forward(), 1, 2, 2),
        "group backward": (backward(), 2, 2, 3),
        "group silu": (forward(**silu), 1, 2, 2),
        "group silu backward": (backward(**silu), 2, 2, 3),
    }


def refusal(x, name):
    """Returns why a program of that name is refused for x, or None."""
    from normax.kernels import mosaic_gpu, mosaic_gpu_groups

    if x.ndim == 4:
        return mosaic_gpu_groups.supports_groups(x, backward="back" in name)
    return mosaic_gpu.supports(x)


def sizes(text):
    """Returns the bytes of the arrays named in a type."""
    arrays = re.findall(r"([a-z]+[0-9]*)\[([0-9,]*)\]", re.sub(r"\{[^{}]*\}", "", text))
    return sum(SIZES[d] * math.prod(int(n) for n in dims.split(",") if n) for d, dims in arrays)


def kernels_of(text):
    """Returns (opcode and target, bytes in and out) of what an HLO module runs."""
    types, found = {}, []
    for line in text[text.index("ENTRY") :].splitlines()[1:]:
        match = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:, |$)", line)
        if not match:
            continue
        name, kind, opcode, operands = match.groups()
        types[name] = kind
        if opcode in FREE:
            continue
        operands = {re.sub(r".*%", "", each.strip()) for each in operands.split(", ")}
        target = re.search(r'custom_call_target="([^"]+)"', line)
        bytes_ = sizes(kind) + sum(sizes(types.get(each, "")) for each in operands)
        found.append((target[1] if target else opcode, bytes_))
    return found


def registers(folder, ptxas):
    """Returns {kernel: (registers, bytes spilled)} of the PTX in a folder."""
    found = {}
    for path in sorted(pathlib.Path(folder).glob("*.ptx")):
        command = [ptxas, "-v", "-arch=sm_90a", str(path), "-o", os.devnull]
        said = subprocess.run(command, capture_output=True, text=True, check=True)
        said = said.stdout + said.stderr
        spilled = sum(int(n) for n in re.findall(r"(\d+) bytes spill (?:stores|loads)", said))
        found[path.stem] = (int(re.search(r"Used (\d+) registers", said)[1]), spilled)
        path.unlink()
    return found


def measure(shapes, only, folder, ptxas):
    """Yields a row of the table for each program and shape; None of the names is all."""
    import jax
    import jax.numpy as jnp
    from jax.experimental import topologies

    jax.devices()
    config = (HERE / "targets" / "h200.txtpb").read_text()
    described = topologies.get_topology_desc("h200", "cuda", target_config=config, topology="1x1x1")
    there = jax.sharding.SingleDeviceSharding(described.devices[0])
    tables = {2: programs(), 4: programs_of_groups()}
    every = ((shape, dtype, name) for *shape, dtype in shapes for name in tables[len(shape)])
    for shape, dtype, name in every:
        if only and name not in only:
            continue
        function, arrays, parameters, least = tables[len(shape)][name]
        x = jax.ShapeDtypeStruct(tuple(shape), dtype, sharding=there)
        features = tuple(shape[len(shape) // 2 :])
        scale = jax.ShapeDtypeStruct(features, "float32", sharding=there)
        row = {"program": name, "shape": " x ".join(map(str, shape)), "dtype": dtype}
        if why := refusal(x, name):
            yield row | {"refused": why}
            continue
        text = jax.jit(function).lower(*[x] * arrays, *[scale] * parameters).compile().as_text()
        ran = kernels_of(text)
        floor = least * math.prod(shape) * jnp.dtype(dtype).itemsize
        row["kernels"] = len(ran)
        row["mosaic_gpu"] = sum("mosaic_gpu" in target for target, _ in ran)
        row["bytes"] = sum(size for _, size in ran)
        row["over floor"] = round(row["bytes"] / floor, 3)
        # A kernel that was met before is not compiled again, and leaves nothing to ask ptxas about.
        if ptxas and (used := registers(folder, ptxas).values()):
            row["registers"] = ", ".join(str(each) for each, _ in used)
            row["spilled"] = sum(spilled for _, spilled in used)
        yield row


def table(measured):
    """Returns Markdown."""
    columns = ["program", "shape", "dtype", "kernels", "over floor", "registers", "spilled"]
    lines = ["| " + " | ".join(columns) + " |", "|" + " --- |" * len(columns)]
    for row in measured:
        if "refused" in row:
            cells = [row["program"], row["shape"], row["dtype"], row["refused"], "", "", ""]
        else:
            cells = [str(row.get(column, "")) for column in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main():
    """Prints, or writes, the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("shapes", nargs="*", help="such as 32768x4096xbfloat16")
    parser.add_argument("--only", nargs="*", help="programs, by name")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--write", action="store_true", help="to costs_gpu.md")
    parser.add_argument("--ptxas", default=shutil.which("ptxas"))
    options = parser.parse_args()
    split = [each.split("x") for each in options.shapes]
    shapes = [(*map(int, sizes), dtype) for *sizes, dtype in split] or SHAPES + GROUPS
    with tempfile.TemporaryDirectory() as folder:
        dump = {"MOSAIC_GPU_DUMP_TO": folder, "MOSAIC_GPU_DUMP_PTX": "1"} if options.ptxas else {}
        os.environ.update(JAX_PLATFORMS="cpu", JAX_SKIP_CUDA_CONSTRAINTS_CHECK="1", **dump)
        measured = list(measure(shapes, options.only, folder, options.ptxas))
    if options.json:
        print(json.dumps(measured))
        return
    text = table(measured)
    if options.write:
        import jax

        head = (
            "# Kernels of rows and groups, compiled for an H200\n\n"
            f"By `python benchmarks/costs_gpu.py --write`, jax {jax.__version__}; nothing was run."
            " Kernels and bytes are of the whole program, the sums over partial sums included;"
            " the floor is every array of the size of x once. What a kernel reads again, as those"
            " for odd or long rows do, counts once: a cache should have it. Registers are of a"
            " thread, one"
            " number for each Mosaic GPU kernel that no row above has; spilled are bytes.\n\n"
        )
        (HERE / "costs_gpu.md").write_text(head + text + "\n")
    print(text)


if __name__ == "__main__":
    main()
