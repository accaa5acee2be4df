"""The matrix: which operations at which shapes, and what memory traffic none can avoid."""

import dataclasses
import math

import jax
import jax.numpy as jnp

PARTS = ("both", "rows", "backward", "fused", "batch", "group", "models", "latency", "compile")
MODES = ("forward", "backward", "both")
ACTIVATIONS = {"gelu": jax.nn.gelu, "relu": jax.nn.relu, "silu": jax.nn.silu}

# What each operation reads and writes, in arrays of the size of x, one pair for each pass over
# them. A row that is summarised stays on chip; a batch does not, so it is read once more. The
# backward pass of a batch norm with a sum and a ReLU reads the mask from y, which the next layer
# keeps anyhow, and writes the gradient of the residual.
FORWARD = {
    ("row", ""): [(1, 1)],
    ("row", "gelu"): [(1, 1)],
    ("row", "add"): [(2, 2)],
    ("row", "gate"): [(2, 1)],
    ("many", ""): [(1, 0), (1, 1)],
    ("many", "relu"): [(1, 0), (1, 1)],
    ("many", "silu"): [(1, 0), (1, 1)],
    ("many", "add_relu"): [(1, 0), (2, 1)],
}
BACKWARD = {
    ("row", ""): [(2, 1)],
    ("row", "gelu"): [(2, 1)],
    ("row", "add"): [(3, 1)],
    ("row", "gate"): [(3, 2)],
    ("many", ""): [(2, 0), (2, 1)],
    ("many", "relu"): [(2, 0), (2, 1)],
    ("many", "silu"): [(2, 0), (2, 1)],
    ("many", "add_relu"): [(3, 1), (2, 1)],
}


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation at one shape.

    Attributes:
      norm: "layer", "rms", "batch" or "group".
      wrap: what is fused with it: "add" (x + r is normalized, and returned too), "gate" (times
        silu of a second array), "gelu", "relu", "silu", "add_relu" (relu of the norm plus r).
      mode: "forward", "backward" from what the forward pass kept, or "both" in one program.
      shape: of x; features are last.
      dtype: of x and the gradients.
      groups: of a group norm.
      epsilon: added to the variance.
    """

    norm: str
    wrap: str
    mode: str
    shape: tuple[int, ...]
    dtype: str = "bfloat16"
    groups: int = 1
    epsilon: float = 1e-5

    @property
    def title(self) -> str:
        """Says which operation it is, as `layer+gelu backward`."""
        return f"{self.norm}{'+' if self.wrap else ''}{self.wrap} {self.mode}"

    @property
    def name(self) -> str:
        """Says which case it is: operation, shape and dtype."""
        return f"{self.title} {'x'.join(map(str, self.shape))} {self.dtype}"

    @property
    def centered(self) -> bool:
        """Whether the mean is subtracted and there is a bias."""
        return self.norm != "rms"

    @property
    def second(self) -> bool:
        """Whether there is a second array of the size of x: a residual or a gate."""
        return self.wrap in ("add", "gate", "add_relu")

    @property
    def bytes(self) -> int:
        """Bytes of x."""
        return math.prod(self.shape) * jnp.dtype(self.dtype).itemsize

    @property
    def passes(self) -> list[tuple[int, int]]:
        """Arrays read and written in each pass over memory that cannot be avoided."""
        key = ("row" if self.norm in ("layer", "rms") else "many", self.wrap)
        return {
            "forward": FORWARD[key],
            "backward": BACKWARD[key],
            "both": FORWARD[key] + BACKWARD[key],
        }[self.mode]

    @property
    def floor(self) -> int:
        """Bytes that cannot be avoided: those of scale and bias and of the statistics left out."""
        return self.bytes * sum(map(sum, self.passes))


# Each way through the code once, as small as can be.
QUICK = {
    "both": [Case("batch", "", "both", (4, 6, 6, 8))],
    "rows": [Case("layer", "", "forward", (64, 32))],
    "backward": [
        Case("rms", "", "backward", (64, 32)),
        Case("layer", "", "both", (64, 32), "float32"),
    ],
    "fused": [Case("layer", "add", "backward", (64, 32)), Case("rms", "gate", "forward", (64, 32))],
    "batch": [Case("batch", "add_relu", "backward", (4, 6, 6, 8), "float32")],
    "group": [Case("group", "silu", "forward", (2, 6, 6, 8), "bfloat16", 4)],
    "latency": [Case("rms", "", "forward", (1, 64))],
}


# Smaller ones, which a cache may hold: they show what calls cost.
IN_CACHE = [(32, 28, 28, 128), (256, 1, 1, 1024), (32, 7, 7, 512)]


def _rows(elements: int, lengths: list[int]) -> list[tuple[int, int]]:
    return [(elements // length, length) for length in lengths]


def _shapes(size: str) -> dict[str, list[tuple[int, ...]]]:
    """Returns shapes by part: for an accelerator or for a CPU."""
    if size == "cpu":
        return {
            "rows": _rows(2**22, [64, 768, 1024, 4096, 16384]),
            "few": _rows(2**22, [1024]),
            "heads": _rows(2**22, [64]),
            "fused": _rows(2**22, [1024]),
            "batch": [
                (32, 56, 56, 64),
                (512, 14, 14, 64),
                (4096, 1, 1, 1024),
                (128, 14, 14, 256),
                (16384, 1, 1, 256),
                *IN_CACHE,
            ],
            "group": [(4, 64, 64, 256), (16, 32, 32, 320), (8, 32, 32, 512), (64, 16, 16, 320)],
            "latency": [(1, 4096), (16, 4096)],
        }
    return {
        "rows": _rows(2**27, [4096, 1024, 8192, 16384, 512, 32768, 768, 5120]),
        "few": _rows(2**27, [4096, 1024, 16384]),
        "heads": _rows(2**27, [64, 128]),
        "fused": [(32768, 4096)],
        "batch": [
            (256, 56, 56, 256),
            (256, 56, 56, 64),
            (256, 112, 112, 64),
            (256, 28, 28, 512),
            (256, 14, 14, 1024),
            (256, 7, 7, 2048),
        ],
        "group": [(16, 64, 64, 320), (16, 32, 32, 640), (8, 128, 128, 256), (4, 256, 256, 128)],
        "latency": [(1, 4096), (8, 4096), (64, 4096), (512, 4096)],
    }


def cases(part: str, size: str) -> list[Case]:
    """Returns the cases of a part, those that matter most first: a run that is cut keeps them.

    Args:
      part: of `PARTS`, but not "models" and "compile", which are no single operations.
      size: "gpu", "cpu" or "quick".

    Returns:
      The cases, in the order to run them.
    """
    if part not in QUICK:
        raise ValueError(f"expected one of {', '.join(QUICK)}, got {part!r}")
    if size == "quick":
        return QUICK[part]
    shapes = _shapes(size)
    # bfloat16 is what accelerators are fed; a CPU has no arithmetic for it.
    usual, other = ("float32", "bfloat16") if size == "cpu" else ("bfloat16", "float32")

    def over(part: str, norms: list[str], wraps: list[str], modes: list[str], dtype: str):
        return [
            Case(norm, wrap, mode, shape, dtype, 32 if norm == "group" else 1)
            for shape in shapes[part]
            for norm in norms
            for wrap in wraps
            for mode in modes
        ]

    both = ["layer", "rms"]
    if part == "both":
        return [
            case
            for dtype in (usual, other)
            for where, norms in (("rows", both), ("batch", ["batch"]), ("group", ["group"]))
            for case in over(where, norms, [""], ["both"], dtype)
        ]
    if part == "rows":
        return over("rows", both, [""], ["forward"], usual) + over(
            "few", both, [""], ["forward"], other
        )
    if part == "backward":
        most = over("rows", both, [""], ["backward"], usual)
        return most + over("few", both, [""], ["backward"], other)
    if part == "fused":
        modes = ["forward", "backward"]
        sums = over("fused", both, ["add"], modes, usual)
        wrapped = over("fused", ["layer"], ["gelu"], modes, usual)
        wrapped += over("fused", ["rms"], ["gate"], modes, usual)
        return sums + wrapped + over("heads", ["rms"], [""], modes, usual)
    if part == "batch":
        wraps = ["", "relu", "add_relu"]
        modes = ["forward", "backward"]
        most = over("batch", ["batch"], wraps, modes, usual)
        last = [dataclasses.replace(case, dtype=other) for case in most if not case.wrap][:2]
        return most + last
    if part == "group":
        return over("group", ["group"], ["", "silu"], ["forward", "backward"], usual)
    return over("latency", both, [""], ["forward", "backward"], usual)
