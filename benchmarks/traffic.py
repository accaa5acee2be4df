"""Kernels and bytes of norms in compiled programs, for an H200 and a TPU v5e; neither is needed.

    python benchmarks/traffic.py [--target h200|v5e|both] [--all] [--only TEXT] [--kernels]
                                 [--write] [--check]

It needs the compilers, of JAX's own version: jax-cuda12-plugin and jax-cuda12-pjrt, and libtpu.
Nothing runs, so that nothing is said about time. By default a few programs are counted, in a minute
and a half; --all counts all, and --only those of all whose name holds a text, as "h200, layer_norm,
forward + backward, bfloat16". --kernels lists what each program launches, with its bytes over T.
--write puts the numbers into traffic.json and traffic.md, and keeps what was not counted; --check
fails where a program is above LIMITS, moves more bytes than Flax's, or, with the compilers of
traffic.json, is worse than there.
"""

import argparse
import json
import os
import pathlib
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import NamedTuple

HERE = pathlib.Path(__file__).parent
NUMBERS, TABLE = HERE / "traffic.json", HERE / "traffic.md"
TARGETS = {"h200": "H200", "v5e": "TPU v5e"}
COMPILERS = "jax", "jaxlib", "jax-cuda12-plugin", "libtpu"

# What bytes over floor may be, by target, norm and context.
LIMITS = {
    ("h200", "layer_norm", "forward"): 1.02,
    ("h200", "rms_norm", "forward"): 1.02,
    ("h200", "layer_norm", "forward + backward"): 1.65,
    ("h200", "batch_norm", "forward"): 1.02,
    ("h200", "batch_norm", "forward + backward"): 1.02,
    ("h200", "batch_norm + relu", "forward"): 1.02,
    ("h200", "batch_norm + relu", "forward + backward"): 1.02,
    ("h200", "layer_norm by mosaic_gpu", "forward"): 1.1,
    ("h200", "layer_norm by mosaic_gpu", "forward + backward"): 1.1,
    ("v5e", "layer_norm by mosaic_tpu", "forward"): 1.1,
    ("v5e", "layer_norm by mosaic_tpu", "forward + backward"): 1.1,
}
# Rows shorter than this have statistics of a weight beside them: there Flax's is the limit.
SHORT = 256
# What bytes may be over the committed ones, and over Flax's: sums in parts, numbers of each row.
COMMITTED, FLAX = 1.02, 1.02

# Set before JAX is imported: no accelerator is looked for, and no flags change what comes out.
ENVIRONMENT = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "JAX_ENABLE_COMPILATION_CACHE": "false",
    "JAX_PLATFORMS": "cpu",
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "LIBTPU_INIT_ARGS": "",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_MIN_LOG_LEVEL": "3",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_STDERR_LOG_LEVEL": "3",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "XLA_FLAGS": "",
}

TITLES = "program", "dtype", "shape", "kernels", "bytes/T", "floor", "ratio", "flax's", "temp/T"
# Of what is printed while it is counted.
WIDTHS = 8, 45, 10, 21, 12, 15, 7, 7, 8, 6
HEAD = """\
# What norms launch and move

Read from the programs that XLA compiles for an H200 and for a TPU v5e, where nothing was run or
timed: kernels that are launched, and bytes, each operand of a kernel once and its outputs once, at
their logical sizes, over T, the bytes of the norm's input x.

    {command}

- `floor` is the least that the norm must move, in T: x and dy are read once where it summarises a
  row at a time, else twice. `ratio` is bytes over floor, and `flax's` that of the same program with
  Flax's module, of the dtype of x. `temp/T` is memory for what neither came in nor goes out.
- `forward` returns y, and new statistics; `forward + backward` also the gradients of x, scale and
  bias, in one jit where dy comes after y. `between products` is forward and backward with a product
  before and after: matrix products if x is a matrix or the target is a TPU, else convolutions of
  3 x 3. What the products would move by themselves is left out, and they are no kernels; what is
  fused into them can fall below the floor.
- `(+ n)`: so much more if each loop and branch that may run does so once.
- Caches are not seen, and padding to tiles counts as nothing. On TPU
  only the memory outside of the chip counts, an asynchronous copy is no kernel, and x is made 256
  MiB, so that it does not fit on the chip. GPU products are not tuned for the shape.
"""


Key = tuple[str, str, str, str, str]


class Row(NamedTuple):
    """One program: what it is, and the counts of normax's and of Flax's."""

    target: str
    norm: str
    context: str
    dtype: str
    shape: str
    x_bytes: int
    floor: int
    normax: dict[str, int]
    flax: dict[str, int]

    @property
    def program(self) -> str:
        """Norm and context."""
        return f"{self.norm}, {self.context}"

    @property
    def key(self) -> Key:
        """What no other row has."""
        return self.target, self.norm, self.context, self.dtype, self.shape

    def ratio(self, counts: dict[str, int]) -> float:
        """Returns bytes over floor."""
        return counts["bytes"] / (self.floor * self.x_bytes)

    def cells(self) -> list[str]:
        """Returns what the table shows, as text."""
        mine, kernels, moved = self.normax, "", ""
        if mine["maybe_kernels"]:
            kernels = f" (+ {mine['maybe_kernels']})"
            moved = f" (+ {mine['maybe_bytes'] / self.x_bytes:.2f})"
        return [
            self.program,
            self.dtype,
            self.shape,
            f"{mine['kernels']}{kernels}",
            f"{mine['bytes'] / self.x_bytes:.2f}{moved}",
            str(self.floor),
            f"{self.ratio(mine):.2f}",
            f"{self.ratio(self.flax):.2f}",
            f"{mine['temp_bytes'] / self.x_bytes:.2f}",
        ]


class Numbers(NamedTuple):
    """What traffic.json holds."""

    versions: dict[str, str]
    rows: list[Row]


def versions() -> dict[str, str]:
    """Returns the versions of what makes the numbers."""
    found = {}
    for package in (*COMPILERS, "flax"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "none"
    return found


def read(path: pathlib.Path = NUMBERS) -> Numbers:
    """Returns the committed numbers; none if there is no such file."""
    if not path.exists():
        return Numbers({}, [])
    stored = json.loads(path.read_text())
    return Numbers(stored["versions"], [Row(**row) for row in stored["rows"]])


def merged(old: Numbers, rows: list[Row], now: dict[str, str], order: list[Key]) -> Numbers:
    """Returns the numbers with rows put in or replaced, in the order of their keys.

    Rows that were counted with other versions, or are in the order no more, are left out.
    """
    kept = old.rows if old.versions == now else []
    by_key = {row.key: row for row in [*kept, *rows]}
    return Numbers(now, [by_key[key] for key in order if key in by_key])


def write(numbers: Numbers) -> None:
    """Writes traffic.json and traffic.md."""
    lines = ",\n".join("    " + json.dumps(row._asdict()) for row in numbers.rows)
    made = json.dumps(numbers.versions)
    NUMBERS.write_text(f'{{\n  "versions": {made},\n  "rows": [\n{lines}\n  ]\n}}\n')
    TABLE.write_text(page(numbers))


def page(numbers: Numbers) -> str:
    """Returns the text of traffic.md."""
    parts = [HEAD.format(command="python benchmarks/traffic.py --all --write")]
    made = ", ".join(f"{name} {number}" for name, number in numbers.versions.items())
    parts.append(f"Made with {made}.\n")
    for target, title in TARGETS.items():
        rows = [row.cells() for row in numbers.rows if row.target == target]
        parts += [f"## {title}\n", table(TITLES, rows) + "\n"]
    return "\n".join(parts)


def table(titles: tuple[str, ...], rows: list[list[str]]) -> str:
    """Returns a table in Markdown, its columns aligned."""
    lines = [list(titles), ["" for _ in titles], *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = [" | ".join(map(str.ljust, line, widths)) for line in lines]
    text[1] = " | ".join("-" * width for width in widths)
    return "\n".join(f"| {line} |" for line in text)


def worse(row: Row, committed: Row | None, exact: bool) -> list[list[str]]:
    """Returns what is wrong with a program: what, counted, allowed; a line for each.

    Args:
      row: what was counted.
      committed: what is stored for the same program, if anything.
      exact: whether the compilers are those of what is stored.
    """
    mine, found = row.normax, []

    def hold(what: str, counted: float, allowed: float) -> None:
        if counted > allowed:
            where = [TARGETS[row.target], row.program, row.dtype, row.shape]
            found.append([*where, what, f"{counted:.6g}", f"{allowed:.6g}"])

    limit = LIMITS.get((row.target, row.norm, row.context))
    if row.context != "forward" and int(row.shape.split()[-1]) < SHORT and "layer" in row.norm:
        limit = None
    if limit is not None:
        hold("bytes over floor", row.ratio(mine), limit)
    if mine["bytes"] > FLAX * row.flax["bytes"]:
        hold("bytes/T, Flax's", mine["bytes"] / row.x_bytes, row.flax["bytes"] / row.x_bytes)
    if exact and committed is None:
        hold("programs not in traffic.json", 1, 0)
    if exact and committed is not None:
        then = committed.normax
        for name in ("kernels", "maybe_kernels"):
            hold(f"{name}, committed", mine[name], then[name])
        for name in ("bytes", "maybe_bytes"):
            if mine[name] > COMMITTED * then[name]:
                hold(f"{name}/T, committed", mine[name] / row.x_bytes, then[name] / row.x_bytes)
    return found


def check(rows: list[Row], committed: Numbers, now: dict[str, str]) -> int:
    """Prints what is worse than it may be, and returns the exit status."""
    stored = committed.versions
    other = [
        f"{name} {stored.get(name)}, not {now.get(name)}"
        for name in COMPILERS
        if stored.get(name) != now.get(name)
    ]
    if other:
        print(f"traffic.json is of {'; '.join(other)}: only the limits and Flax hold")
    by_key = {row.key: row for row in committed.rows}
    wrong = [line for row in rows for line in worse(row, by_key.get(row.key), not other)]
    if not wrong:
        print(f"{len(rows)} programs are within what is allowed")
        return 0
    titles = "target", "program", "dtype", "shape", "what", "counted", "allowed"
    print(table(titles, wrong), f"{len(wrong)} counts are above what is allowed", sep="\n\n")
    return 1


def missing(target: str) -> str:
    """Returns what must be installed to compile for a target; "" if it is there."""
    if target == "v5e":
        return "" if find_spec("libtpu") else "libtpu"
    lacking = []
    if not find_spec("jax_cuda12_plugin"):
        lacking.append("jax-cuda12-plugin")
    if not (find_spec("jax_plugins") and find_spec("jax_plugins.xla_cuda12")):
        lacking.append("jax-cuda12-pjrt")
    return ", ".join(lacking)


def count(asked: argparse.Namespace, targets: list[str]) -> tuple[list[Row], list[Key]]:
    """Counts programs and prints each; returns the rows, and the keys of all that there are."""
    os.environ.update(ENVIRONMENT)
    sys.path[:0] = [str(HERE), str(HERE.parent)]
    import traffic_programs as programs

    every = {
        (name, case.norm, case.context, case.dtype, case.size): case
        for name in TARGETS
        for case in programs.cases(name)
    }
    goals = {name: programs.target(name) for name in targets}
    rows = []
    print("".join(map(str.ljust, ("target", *TITLES), WIDTHS)))
    for key, case in every.items():
        chosen = asked.all or asked.only or programs.is_quick(key[0], case)
        if key[0] not in goals or not chosen or asked.only not in ", ".join(key):
            continue
        both = [programs.compiled(case, of, goals[key[0]]) for of in programs.LIBRARIES]
        counts = (one.traffic._asdict() | {"temp_bytes": one.temp_bytes} for one in both)
        rows.append(Row(*key, case.x_bytes, case.floor, *counts))
        print("".join(map(str.ljust, (key[0], *rows[-1].cells()), WIDTHS)), flush=True)
        if asked.kernels:
            print(both[0].listing(case), "  flax", both[1].listing(case), sep="\n", flush=True)
    return rows, list(every)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command and returns its exit status."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--target", choices=[*TARGETS, "both"], default="both")
    parser.add_argument("--all", action="store_true", help="all programs, not a few")
    parser.add_argument("--only", default="", metavar="TEXT", help="those of this name, of all")
    parser.add_argument("--kernels", action="store_true", help="show the kernels of each")
    parser.add_argument("--write", action="store_true", help="write traffic.json and traffic.md")
    parser.add_argument("--check", action="store_true", help="fail if anything is worse")
    asked = parser.parse_args(arguments)
    targets = list(TARGETS) if asked.target == "both" else [asked.target]
    lacking = [package for package in map(missing, targets) if package]
    if lacking:
        parser.error(f"not installed: {', '.join(lacking)}")
    committed, now = read(), versions()
    rows, order = count(asked, targets)
    if not rows:
        parser.error(f"no program's name holds {asked.only!r}")
    if asked.write:
        write(merged(committed, rows, now, order))
    return check(rows, committed, now) if asked.check else 0


if __name__ == "__main__":
    sys.exit(main())
