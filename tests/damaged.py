"""Damages the files of a checkpoint one by one, and prints what comes of it.

    python tests/damaged.py FOLDER

In a process of its own, for `test_checkpoint.py`: where a file is damaged orbax leaves tasks behind
that end with the process, and complain.
"""

import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp

from normax.checkpoint import Checkpoints


def damages(content):
    """Yields what may happen to a file."""
    size = len(content)
    for where in sorted({0, size // 3, size // 2, size - 1} - {-1}):
        flipped = bytearray(content)
        flipped[where] ^= 0x10
        yield f"bit of byte {where}", bytes(flipped)
    if size:
        yield "half", content[: size // 2]
        yield "nothing", b""


def outcome(folder, state):
    """Returns what comes back: a sentence, or whether it is what was saved."""
    with Checkpoints(folder) as checkpoints:
        try:
            found, position = checkpoints.restore(state)
        except (ValueError, TypeError, FileNotFoundError) as error:
            ours = str(error).startswith(("Checkpoints: ", "Checkpoints.restore: "))
            return "refused" if ours else f"raised {error}"
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found, state)
    return "right" if all(same.values()) and position == {"batch": 7} else "WRONG"


def main(folder):
    state = {"w": jax.random.normal(jax.random.key(0), (40, 3)), "b": jnp.arange(5)}
    right, broken = folder / "right", folder / "broken"
    with Checkpoints(right) as checkpoints:
        checkpoints.save(1, state, position={"batch": 7})
    for path in sorted(p for p in right.rglob("*") if p.is_file()):
        for what, content in damages(path.read_bytes()):
            shutil.copytree(right, broken)
            (broken / path.relative_to(right)).write_bytes(content)
            print(outcome(broken, state), "|", path.name, what, flush=True)
            shutil.rmtree(broken)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
