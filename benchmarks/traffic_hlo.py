"""What a compiled program launches and moves, read from its HLO text.

A kernel moves each of its operands once and its outputs once, at their logical sizes: padding to
tiles, and what a cache saves, are not seen. Of an operand that a fusion does nothing with but cut
it up, the slices count.
"""

import math
import re
from collections.abc import Iterator
from typing import NamedTuple

FREE = {
    "add-dependency", "after-all", "bitcast", "constant", "domain", "get-tuple-element",
    "opt-barrier", "parameter", "partition-id", "replica-id", "tuple",
}  # fmt: skip
FREE_CALLS = {"AllocateBuffer", "ConcatBitcast", "Sharding"}
PRODUCT_CALLS = ("__cublas", "__cudnn$conv", "__cudnn$backendConv")
PRODUCTS = ("dot", "convolution")
MOVES = ("copy", "slice", "dynamic-slice")
MAYBE = ("while", "conditional")
CONTROL = (*MAYBE, "call", "async-start")

_HEAD = re.compile(r"^(ENTRY )?%?([\w.\-]+) .*\{$")
_LINE = re.compile(r"^\s+(?:ROOT )?%?([\w.\-]+) = (.*)$")
_OPCODE = re.compile(r" ([a-z][\w\-]*)\(")
_ARRAY = re.compile(r"\b([a-z]+\d*\w*)\[([\d,<= ]*)\](\{[^{}]*\})?")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|body|condition|true_computation|false_computation)=%?([\w.\-]+)"
)
_BRANCHES = re.compile(r"\bbranch_computations=\{([^}]*)\}")
_TARGET = re.compile(r'custom_call_target="([^"]*)"')


class Instruction(NamedTuple):
    """One line of a computation."""

    name: str
    type: str
    opcode: str
    operands: tuple[str, ...]
    called: tuple[str, ...]
    target: str


class Array(NamedTuple):
    """One array of a type, and whether it lies in the chip's own memory."""

    size: int
    bits: int
    on_chip: bool

    @property
    def bytes(self) -> float:
        """Bytes to and from the memory outside of the chip."""
        return 0 if self.on_chip else self.size * self.bits / 8


class Kernel(NamedTuple):
    """One thing that is launched, or one asynchronous move, and the bytes that it moves.

    Attributes:
      name: of the instruction.
      opcode: of the instruction.
      bytes: moved; of products only what else they move, where that was asked.
      products: how many matrix products and convolutions it does.
      is_move: whether it is a copy or slice that runs beside the kernels.
    """

    name: str
    opcode: str
    bytes: float
    products: int = 0
    is_move: bool = False


class Traffic(NamedTuple):
    """Kernels and bytes of a program: always, and more if its loops and branches run once."""

    kernels: int
    bytes: int
    maybe_kernels: int
    maybe_bytes: int


def arrays(text: str, on_chip: str = "") -> list[Array]:
    """Returns the arrays of a type, those of a tuple one by one; tokens are none.

    Args:
      text: the type, as `(bf16[8,128]{1,0:T(8,128)S(1)}, f32[])`.
      on_chip: how a layout says that the array is in the chip's own memory; "" is never.
    """
    found = []
    for kind, dims, layout in _ARRAY.findall(text):
        bits = 8 if kind == "pred" else int((re.search(r"\d+", kind) or ["0"])[0])
        size = math.prod(int(d.strip("<= ")) for d in dims.split(",") if d.strip())
        found.append(Array(size, bits, bool(on_chip) and on_chip in layout))
    return found


def parse(text: str) -> tuple[dict[str, dict[str, Instruction]], str]:
    """Returns the computations of a module, by name, and the name of its entry."""
    computations, entry, here = {}, "", {}
    for line in text.splitlines():
        line = re.sub(r"/\*.*?\*/", "", line)
        head = None if line.startswith(" ") else _HEAD.match(line)
        if head and not line.startswith("HloModule"):
            here = computations[head[2]] = {}
            entry = head[2] if head[1] else entry
        elif made := _LINE.match(line):
            one = _instruction(made[1], made[2])
            here[one.name] = one
    if not entry:
        raise ValueError("no ENTRY computation in this text")
    return computations, entry


def _instruction(name: str, rest: str) -> Instruction:
    """Returns the instruction that stands to the right of `name =`."""
    opcode = _OPCODE.search(_without_types(rest))
    if opcode is None:
        raise ValueError(f"no operation in {rest!r}")
    start = opcode.start()
    inner, after = _closed(rest[opcode.end() :])
    branches = _BRANCHES.search(after)
    called = _CALLED.findall(after) + (re.split(r",\s*", branches[1]) if branches else [])
    target = _TARGET.search(after)
    return Instruction(
        name,
        rest[:start],
        opcode[1],
        tuple(part.split()[-1].lstrip("%") for part in _parts(inner)),
        tuple(one.lstrip("%") for one in called),
        target[1] if target else "",
    )


def _without_types(text: str) -> str:
    """Returns the text with what is in braces blanked: layouts have words with parentheses too."""
    return re.sub(r"\{[^{}]*\}", lambda braces: " " * len(braces[0]), text)


def _closed(text: str) -> tuple[str, str]:
    """Returns what is before the parenthesis that closes the one before `text`, and the rest."""
    depth = 1
    for at, letter in enumerate(text):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return text[:at], text[at + 1 :]
    raise ValueError(f"a parenthesis is not closed: {text!r}")


def _parts(text: str) -> list[str]:
    """Returns what stands between the commas that are in no brackets."""
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part for part in parts if part.strip()]


class Program:
    """A compiled module, ready to be counted.

    Args:
      text: what `compiled.as_text()` gives.
      on_chip: how a layout says that an array is in the chip's own memory: "S(1)" on TPU.
    """

    def __init__(self, text: str, on_chip: str = ""):
        self.computations, self.entry = parse(text)
        self.on_chip = on_chip

    def traffic(self, product_itemsize: int = 0) -> Traffic:
        """Returns the kernels and bytes of the program.

        Args:
          product_itemsize: 0 counts everything. Otherwise matrix products and convolutions, whose
            entries have so many bytes, are left out: they are no kernels, and what each would move
            by itself is taken from the bytes, so that what else is fused into it counts.
        """
        sums = [0, 0.0, 0, 0.0]
        for kernel, maybe in self.kernels(product_itemsize):
            left_out = kernel.products > 0 and product_itemsize > 0
            sums[2 * maybe] += not (kernel.is_move or left_out)
            sums[2 * maybe + 1] += kernel.bytes
        return Traffic(*map(round, sums))

    def kernels(
        self, product_itemsize: int = 0, name: str = "", maybe: bool = False
    ) -> Iterator[tuple[Kernel, bool]]:
        """Yields what a computation launches, and whether that is in a loop or a branch."""
        here = self.computations[name or self.entry]
        for one in here.values():
            if one.opcode in CONTROL and one.called:
                for called in one.called:
                    inside = maybe or one.opcode in MAYBE
                    yield from self.kernels(product_itemsize, called, inside)
            elif one.opcode.endswith("-done"):
                if (start := _start(one, here)).opcode != "async-start":
                    yield self._finished(start, one, here, product_itemsize), maybe
            elif one.opcode.endswith(("-start", "-update")):
                continue
            elif one.opcode not in FREE and one.target not in FREE_CALLS:
                yield self._kernel(one, here, product_itemsize), maybe

    def _kernel(
        self, one: Instruction, here: dict[str, Instruction], product_itemsize: int
    ) -> Kernel:
        moved = self._bytes(one.type) + sum(self._reads(one, here).values())
        if one.target.startswith(PRODUCT_CALLS):
            return Kernel(one.name, one.opcode, 0 if product_itemsize else moved, 1)
        products = list(self._products(one, here))
        if products and product_itemsize:
            moved -= sum(_own_bytes(made, where, product_itemsize) for made, where in products)
        return Kernel(one.name, one.opcode, moved, len(products))

    def _reads(self, one: Instruction, here: dict[str, Instruction]) -> dict[str, float]:
        """Returns what is read of each operand: of one that a fusion but cuts up, the slices."""
        read = {name: self._bytes(here[name].type) for name in one.operands}
        if one.opcode == "fusion":
            inside = self.computations[one.called[0]]
            for parameter in inside.values():
                if parameter.opcode == "parameter":
                    name = one.operands[int(parameter.operands[0])]
                    slices = _slices(parameter.name, inside)
                    if slices and not arrays(here[name].type, self.on_chip)[0].on_chip:
                        cut = sum(array.bytes for each in slices for array in arrays(each.type))
                        read[name] = min(read[name], cut)
        return read

    def _finished(
        self,
        start: Instruction,
        done: Instruction,
        here: dict[str, Instruction],
        product_itemsize: int,
    ) -> Kernel:
        """Returns what ran asynchronously; a copy or slice moves as much as arrives."""
        opcode = start.opcode.removesuffix("-start")
        if opcode not in MOVES:
            whole = start._replace(opcode=opcode, type=done.type)
            return self._kernel(whole, here, product_itemsize)
        source = arrays(here[start.operands[0]].type, self.on_chip)
        arrived = arrays(done.type, self.on_chip)
        ends = (not source[0].on_chip) + (not arrived[0].on_chip)
        size = sum(array.size * array.bits / 8 for array in arrived)
        return Kernel(start.name, start.opcode, ends * size, is_move=True)

    def _products(
        self, one: Instruction, here: dict[str, Instruction]
    ) -> Iterator[tuple[Instruction, dict[str, Instruction]]]:
        """Yields the matrix products and convolutions that an instruction does."""
        if one.opcode in PRODUCTS:
            yield one, here
        for called in one.called if one.opcode == "fusion" else ():
            for inner in self.computations[called].values():
                yield from self._products(inner, self.computations[called])

    def _bytes(self, text: str) -> float:
        return sum(array.bytes for array in arrays(text, self.on_chip))


def _slices(name: str, here: dict[str, Instruction]) -> list[Instruction]:
    """Returns the slices that are all that is made of an array; none if something else is."""
    found = []
    for user in here.values():
        if name in user.operands:
            if user.opcode == "slice":
                found.append(user)
            elif user.opcode != "bitcast" or not (within := _slices(user.name, here)):
                return []
            else:
                found += within
    return found


def _start(done: Instruction, here: dict[str, Instruction]) -> Instruction:
    """Returns what started that which is done."""
    while not done.opcode.endswith("-start"):
        done = here[done.operands[0]]
    return done


def _own_bytes(product: Instruction, here: dict[str, Instruction], itemsize: int) -> float:
    """Returns what a product moves by itself; inside of a fusion its entries may be wider."""
    types = [product.type, *(here[name].type for name in product.operands)]
    return sum(a.size * min(a.bits / 8, itemsize) for text in types for a in arrays(text))
