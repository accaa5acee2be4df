"""What the TPU kernels cost, as far as a compiler without a TPU can tell: bytes and bundles.

    python benchmarks/costs_tpu.py [--json] [--bytes-only] [--only NAME ...]

Compiles for TPU v5e; needs libtpu (pip install "jax[tpu]"), no TPU. Writes costs_tpu.md beside this
file. Bytes are those of the operands and outputs of every kernel of the program, as a multiple of
x's. Bundles are instructions of the final schedule: a cycle each where nothing waits for memory.
Nothing here was timed.
"""

import argparse
import importlib.metadata
import json
import math
import os
import pathlib
import re
import sys
import tempfile

os.environ.update(
    JAX_PLATFORMS="cpu",
    TPU_SKIP_MDS_QUERY="1",
    TPU_ACCELERATOR_TYPE="v5litepod-4",
    TPU_WORKER_HOSTNAMES="localhost",
    ALLOW_MULTIPLE_LIBTPU_LOAD="1",
    TPU_STDERR_LOG_LEVEL="3",
    TPU_MIN_LOG_LEVEL="3",
)
if "--bytes-only" not in sys.argv:
    dump = tempfile.TemporaryDirectory()
    os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump.name} --xla_jf_dump_llo_text=true"

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from normax.kernels import mosaic_tpu as kernels
from normax.kernels import mosaic_tpu_long as long
from normax.kernels import mosaic_tpu_rows as rows_on_chip
from normax.kernels.mosaic_tpu_blocks import grouped
from normax.kernels.mosaic_tpu_columns import plan_columns
from normax.kernels.mosaic_tpu_gradients import plan_gradients

SHAPES = [(131072, 1024), (8190, 1000), (200704, 64), (4096, 4096), (512, 16384)]
GROUPS = [(64, 197, 1024), (64, 7, 7, 2048)]  # no multiple of eight before the last axis
HEADS = [(8, 2048, 16, 64)]
LONG = {"forward": (256, 65536), "backward": (256, 24576), "columns": (256, 65536)}
LONG |= {"add": (256, 49152), "add backward": (256, 24576)}
TOO_LONG = [(2048, 131072), (2000, 100000)]  # for the chip, and more of them than its memory holds
DTYPES = ["bfloat16", "float32"]
FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast"}
LAYER = {"centered": True, "epsilon": 1e-6}
RMS = {"centered": False, "epsilon": 1e-6}
# Name: function, arrays like x, parameters, and the multiple of x it must move.
OPERATIONS = {
    "forward": (lambda x, s, b: kernels.forward(x, s, b, **LAYER), 1, 2, 2),
    "rms": (lambda x, s: kernels.forward(x, s, None, **RMS), 1, 1, 2),
    "statistics": (lambda x, s, b: kernels.forward_with_statistics(x, s, b, **LAYER), 1, 2, 2),
    "backward": (lambda x, dy, s: kernels.backward(x, s, dy, **LAYER), 2, 1, 3),
    "add": (lambda x, r, s, b: kernels.add_forward(x, r, s, b, **LAYER), 2, 2, 4),
    "add backward": (lambda x, dy, ds, s: kernels.add_backward(x, s, dy, ds, **LAYER), 3, 1, 4),
    "columns": (kernels.column_moments_in_units, 1, 0, 1),
    "column gradients": (
        lambda x, dy, *measured: kernels.column_gradients(x, dy, *measured, epsilon=1e-5),
        2,
        4,
        2,
    ),
    # Two kernels, the first of which measures.
    "long forward": (lambda x, s, b: kernels.forward(x, s, b, **LAYER), 1, 2, 3),
    "long backward": (lambda x, dy, s: kernels.backward(x, s, dy, **LAYER), 2, 1, 5),
}


def shapes_of(name):
    """Returns the shapes that an operation is compiled for."""
    if name.startswith("long"):
        return TOO_LONG
    more = GROUPS if name.startswith("column") else GROUPS + HEADS
    return [*SHAPES, *([LONG[name]] if name in LONG else []), *more]


def size_of(types):
    """Returns the bytes of the arrays that a piece of HLO names."""
    bits = {"bf16": 16, "f32": 32, "s32": 32, "u32": 32, "pred": 8}
    plain = re.sub(r"\{[^{}]*\}", "", types)
    found = re.findall(r"\b([a-z]+[0-9]*)\[([0-9,]*)\]", plain)
    return sum(
        bits[dtype] // 8 * math.prod(int(n) for n in dims.split(",") if n) for dtype, dims in found
    )


def kernels_of(text):
    """Yields the name of each kernel that a program runs, with the bytes it reads and writes."""
    types = {}
    for line in text[text.index("ENTRY") :].splitlines()[1:]:
        match = re.match(r"\s*(?:ROOT )?%([\w.\-]+) = (.*?) ([\w\-]+)\((.*?)\)(?:,|$)", line)
        if match:
            name, made, operation, operands = match.groups()
            types[name] = made
            if operation not in FREE:
                read = sum(
                    size_of(types[each]) for each in set(re.findall(r"%([\w.\-]+)", operands))
                )
                yield name, size_of(made) + read


def bundles():
    """Returns the bundles outside the loops over chunks, and of each such loop, in order."""
    outside, loops = 0, []
    for path in sorted(pathlib.Path(dump.name).iterdir()):
        if re.search(r"normax_.*-\d+-final_bundles\.txt$", path.name):
            for line in path.read_text().splitlines():
                match = re.match(r"\s*0x[0-9a-f]+\s*(\w\w)?\s*:\s*((?:> ?)*)\{", line)
                if match:
                    label, depth = match[1], match[2].count(">")
                    if depth == 2 and label == "LB":
                        loops.append(0)
                    if depth == 2 and loops:
                        loops[-1] += 1
                    outside += depth == 1
        path.unlink()
    return outside, loops


def compile_for_tpu(function, *shapes, across=True):
    """Returns the program, all arrays row by row as between two layers of a model.

    Or if short, across, which is how XLA has them. Kernels over columns take only the former.
    """
    sharding = SingleDeviceSharding(topologies.get_topology_desc("v5e:2x2", "tpu").devices[0])

    def laid_out(array):
        order, lanes = [*range(array.ndim)], rows_on_chip.lanes_of(array.shape or (1,))
        if across and lanes is not None:
            order.append(order.pop(lanes))
        return Format(Layout(tuple(order)), sharding)

    arrays = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    outputs = jax.tree.map(laid_out, jax.eval_shape(function, *arrays))
    inputs = tuple(map(laid_out, arrays))
    jitted = jax.jit(function, in_shardings=inputs, out_shardings=outputs)
    return jitted.lower(*arrays).compile()


def walked(name, groups, moved):
    """Returns how an operation walks its rows, and how many entries of each at a time."""
    if name == "columns":
        width, walk = plan_columns(groups, moved)
    elif name == "column gradients":
        width, walk = plan_gradients(groups, moved)
    elif name.startswith("long"):  # the second kernel; the first has fewer arrays
        moved = moved * 2 // 3 if name == "long forward" else moved * 3 // 5
        rows = long.plan(groups, moved, True, 1e-6)
        width, walk = rows.width, rows.walk
    else:
        plan = rows_on_chip.plan_backward if "backward" in name else rows_on_chip.plan
        width, walk = groups[-1], plan(groups, moved)
    return walk, width


def measure(name, shape, dtype, with_bundles):
    """Returns a row of the table."""
    function, arrays, parameters, floor = OPERATIONS[name]
    itemsize = jnp.dtype(dtype).itemsize
    operands = [(shape, dtype)] * arrays + [(shape[-1:], "float32")] * parameters
    made = compile_for_tpu(function, *operands, across=not name.startswith("column"))
    found = dict(kernels_of(made.as_text()))
    ours = [each for each in found if each.startswith("normax_")]
    size = math.prod(shape) * itemsize
    row = {
        "operation": name,
        "shape": list(shape),
        "dtype": dtype,
        "kernels": len(ours),
        "bytes": sum(found.values()) / size,
        "floor": floor,
        "beside": sum(found[each] for each in found if each not in ours) / size,
    }
    outside, loops = bundles() if with_bundles else (0, [])
    if with_bundles and len(shape) == 2:
        # Loops come in pairs, over whole chunks and over one that hangs over the end.
        passes = {
            "columns": loops[:4:2],
            "backward": loops[:1],
            "add backward": loops[:1],
            "column gradients": loops[:1],
            # Between them are small loops that copy what hangs over the end.
            "long forward": [loop for loop in loops if loop > 64],
            "long backward": [loop for loop in loops if loop > 64][:2],
        }.get(name, loops)
        walk, width = walked(name, grouped(shape), floor * itemsize)
        all_chunks = outside + sum(passes) * (walk.block // walk.chunk)
        row |= {
            "block": [walk.block, width],
            "chunk": [walk.chunk, width],
            "bundles_outside": outside,
            "bundles_per_chunk": sum(passes),
            "bundles_per_1024": all_chunks * 1024 / (walk.block * width),
        }
    return row


def versions():
    """Returns what compiled it."""
    return {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "libtpu")}


def table(rows):
    """Returns the rows in Markdown."""
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    by = lambda size: " x ".join(map(str, size))
    lines = [
        "# Costs of the TPU kernels, by their compiler",
        "",
        f"Made by `python benchmarks/costs_tpu.py` with {made}, for TPU v5e. Nothing was timed.",
        "",
        "Bytes: of all operands and outputs of the program, over those of x; then the floor.",
        "Bundles: instructions of the final schedule, for a chunk, for the rest of a block (what",
        "only the first or last block does counts too), and together for 1024 entries of a block.",
        "",
    ]
    heads = ["operation", "shape", "dtype", "bytes", "floor", "block", "chunk"]
    heads += ["bundles a chunk", "the rest", "bundles per 1024"]
    lines += ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for row in rows:
        cells = [
            row["operation"],
            by(row["shape"]),
            row["dtype"],
            f"{row['bytes']:.3f}",
            row["floor"],
        ]
        if "block" in row:
            cells += [by(row["block"]), by(row["chunk"])]
            cells += [row["bundles_per_chunk"], row["bundles_outside"]]
            cells += [f"{row['bundles_per_1024']:.2f}"]
        cells += [""] * (len(heads) - len(cells))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines) + "\n"


def main():
    """Compiles every row, and prints or writes them."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--json", action="store_true", help="print, write nothing")
    parser.add_argument("--bytes-only", action="store_true", help="count no bundles; print")
    parser.add_argument("--only", nargs="*", default=list(OPERATIONS), choices=list(OPERATIONS))
    options = parser.parse_args()
    rows = [
        measure(name, shape, dtype, not options.bytes_only)
        for name in options.only
        for shape in shapes_of(name)
        for dtype in DTYPES
    ]
    if options.json or options.bytes_only:  # a table has both
        print(json.dumps(rows))
    else:
        pathlib.Path(__file__).with_suffix(".md").write_text(table(rows))


if __name__ == "__main__":
    main()
