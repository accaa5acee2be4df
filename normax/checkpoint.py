"""Checkpoints of training: saved while it goes on, and given back whole or refused by name."""

import json
import math
import pathlib
import shutil
import zlib
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.checkpoint_managers import preservation_policy as policies

from normax import axes as ax
from normax.checksum import checksum
from normax.state import leaves_by_path

NAME = "Checkpoints.restore"
# Of these TensorStore would say so late, while it writes.
UNKNOWN = {"uint2", "uint4", "float8_e4m3"}


class Checkpoints:
    """A folder of checkpoints, by orbax: the last ones, and the best.

    A checkpoint is there as a whole or not at all, whenever the process is killed. Beside the
    arrays there are their names, shapes, dtypes and checksums, to which they are held when they
    come back: what orbax alone restores in silence, or not at all.

    Args:
      directory: the folder; it is made if need be.
      every: `save` takes steps that this divides.
      keep: how many of the last checkpoints to keep.
      best: name of a metric; the checkpoint with the least of it is kept, too.
      mode: "min", or "max" where the most of `best` is the best.

    Raises:
      ValueError: `every` or `keep` below 1, `mode` another word; metrics in the folder that cannot
        be read, or, where the best is chosen by them, are not those that were saved.
      NotADirectoryError: `directory` is a file.

    Example:
      >>> import tempfile, jax.numpy as jnp
      >>> from normax.checkpoint import Checkpoints
      >>> state = {"w": jnp.arange(3.0)}
      >>> folder = tempfile.TemporaryDirectory()
      >>> with Checkpoints(folder.name, every=10) as checkpoints:
      ...     for step in range(1, 26):
      ...         taken = checkpoints.save(step, state, position={"batch": step})
      >>> with Checkpoints(folder.name) as checkpoints:
      ...     state, position = checkpoints.restore(state)
      >>> print(state["w"], position)
      [0. 1. 2.] {'batch': 20}
      >>> folder.cleanup()
    """

    def __init__(
        self,
        directory: str | pathlib.Path,
        *,
        every: int = 1,
        keep: int = 1,
        best: str | None = None,
        mode: str = "min",
    ):
        self.every = ax.to_positive_int("Checkpoints", "every", every)
        keep = ax.to_positive_int("Checkpoints", "keep", keep)
        ax.check_choice("Checkpoints", "mode", mode, ("min", "max"))
        kept: list[policies.PreservationPolicy] = [policies.LatestN(keep)]
        if best is not None:
            kept.append(
                policies.BestN(
                    get_metric_fn=self._metric,
                    reverse=mode == "min",
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self.directory, self.best, self.mode = pathlib.Path(directory).absolute(), best, mode
        if self.directory.is_file():
            raise NotADirectoryError(f"Checkpoints: expected a folder, got the file {directory}")
        _check_metrics(self.directory)
        self._manager = ocp.CheckpointManager(
            self.directory,
            options=ocp.CheckpointManagerOptions(
                preservation_policy=policies.AnyPreservationPolicy(kept),
                best_fn=None if best is None else self._metric,
                best_mode=mode,
            ),
        )
        if best is not None:
            self._hold_metrics()
        self._has_saved = False
        self._at: int | None = None  # the step of what was restored

    def save(
        self,
        step: int,
        state: Any,
        *,
        position: Any = None,
        metrics: dict[str, Any] | None = None,
        force: bool = False,
    ) -> bool:
        """Saves, if it is time to: what is written is copied at once, and written meanwhile.

        Args:
          step: number of steps taken; the last one is not saved again.
          state: a pytree of arrays, such as a `TrainState`, which may be donated afterwards.
          position: where the data is, and whatever else is no array: what JSON can say, in which
            a tuple is a list.
          metrics: numbers that tell of this state, by name, `best` among them.
          force: take a step that `every` does not divide, such as the last of a training.

        Returns:
          Whether it is saved.

        Raises:
          ValueError: metrics without `best`; a step before the last, or the last where an earlier
            one was restored: those that are later are to be deleted first.
          TypeError: a position that JSON cannot say; a metric that is no number; an array of a
            dtype that JAX narrows, or that TensorStore has not.
        """
        step, last = int(step), max(self.steps(), default=-1)
        is_time = force or step % self.every == 0
        if not is_time or step == last == (last if self._at is None else self._at):
            return False
        if step <= last:
            raise ValueError(
                f"Checkpoints.save: expected a step after the last, {last}, or the later ones "
                f"deleted, got {step}"
            )
        if self.best is not None and self.best not in (metrics or {}):
            raise ValueError(
                f"Checkpoints.save: expected metrics with {self.best!r}, got {metrics!r}"
            )
        leaves = _leaves("Checkpoints.save", state)
        arrays = {name: _plain("Checkpoints.save", name, leaf) for name, leaf in leaves.items()}
        told = {name: _about(leaf, arrays[name]) for name, leaf in leaves.items()}
        if not self._has_saved and jax.process_index() == 0:
            # What a process that was killed has left; one that only reads leaves it.
            for left in self.directory.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(left, ignore_errors=True)
        if metrics is not None:
            metrics = {
                name: ax.to_float("Checkpoints.save", f"metrics[{name!r}]", value)
                for name, value in metrics.items()
            }
        text = json.dumps({"arrays": told, "position": position, "metrics": metrics})
        self._has_saved, self._at = True, None
        about = ocp.args.JsonSave({"text": text, "checksum": zlib.crc32(text.encode())})
        # Orbax refuses arrays of no entries, of which their shapes say all.
        filled = {name: array for name, array in arrays.items() if array.size}
        items = {"arrays": ocp.args.StandardSave(filled)} if filled else {}
        return self._manager.save(
            step,
            args=ocp.args.Composite(about=about, **items),
            metrics=metrics,
            force=True,  # by itself orbax takes none that is before one that was deleted
        )

    def steps(self) -> Sequence[int]:
        """Returns the steps that there are checkpoints of, ascending."""
        return sorted(self._manager.all_steps())

    def delete(self, step: int) -> None:
        """Deletes a checkpoint, such as one that is damaged."""
        self.wait()
        self._manager.delete(step)

    def best_step(self) -> int | None:
        """Returns the step of the best one; None if there is none, or no metric was named."""
        return None if self.best is None else self._manager.best_step()

    def restore(self, like: Any, step: int | None = None) -> tuple[Any, Any]:
        """Returns the state and the position of a checkpoint; nothing else changes.

        Args:
          like: a state of the same structure, shapes and dtypes, such as a new `TrainState`: the
            arrays come back where those of it are.
          step: of which step; None is the last.

        Raises:
          FileNotFoundError: there is no such checkpoint.
          ValueError: another key, or shape; a file that is not as it was written.
          TypeError: another dtype, or kind of random key.
        """
        self.wait()
        step = self._manager.latest_step() if step is None else step
        if step is None or step not in self.steps():
            wanted = "a checkpoint" if step is None else f"a checkpoint of step {step}"
            raise FileNotFoundError(
                f"{NAME}: expected {wanted} in {self.directory}, which has {list(self.steps())}"
            )
        about = self._said(step)
        leaves = _leaves(NAME, like)
        wanted = {name: _plain(NAME, name, leaf) for name, leaf in leaves.items()}
        ax.check_keys(NAME, f"the checkpoint of step {step}", about["arrays"], wanted)
        for name, leaf in wanted.items():
            told = about["arrays"][name]
            kept = jax.ShapeDtypeStruct(tuple(told["shape"]), jnp.dtype(told["dtype"]))
            ax.check_like(NAME, name, kept, leaf)
            if told["key"] != _kind(leaves[name]):
                raise TypeError(
                    f"{NAME}: expected {name} to be {_kind(leaves[name])!r} as a random key, got "
                    f"{told['key']!r}"
                )
        places = {
            name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)
            for name, leaf in wanted.items()
            if leaf.size
        }
        arrays = {name: jnp.copy(leaf) for name, leaf in wanted.items() if not leaf.size}
        if places:
            arrays |= self._read(step, arrays=ocp.args.StandardRestore(places))["arrays"]
        for name, leaf in arrays.items():
            if about["arrays"][name]["checksum"] != checksum(leaf):
                raise self._damaged(step, f"{name} is not what was saved")
        found = [_as(arrays[name], leaf) for name, leaf in leaves.items()]
        self._at = step
        return jax.tree.unflatten(jax.tree.structure(like), found), about["position"]

    def wait(self) -> None:
        """Waits for what is being written."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and lets go of the folder."""
        self._manager.close()

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Waits, and lets go of the folder."""
        self.close()

    def _metric(self, metrics):
        """Returns the metric that tells which is best; what is no number, or not there, is not."""
        value = float((metrics or {}).get(self.best, math.nan))
        worst = math.inf if self.mode == "min" else -math.inf
        return worst if math.isnan(value) else value

    def _hold_metrics(self):
        """Holds the metrics to be those that were saved: one that is not might be the best."""
        for step in self.steps():
            found = self._manager.metrics(step)
            try:
                saved = self._said(step).get("metrics")
            except ValueError:
                continue  # it is refused when it is to be restored
            # One that is being deleted, or was when it was killed, has some of its files.
            if None not in (found, saved) and json.dumps(found) != json.dumps(saved):
                raise self._damaged(step, f"its metrics are {found}, and were {saved}")

    def _said(self, step):
        """Returns what was said of a checkpoint when it was saved."""
        read = self._read(step, about=ocp.args.JsonRestore())["about"]
        read = read if isinstance(read, dict) else {}
        text = read.get("text")
        if not isinstance(text, str) or read.get("checksum") != zlib.crc32(text.encode()):
            raise self._damaged(step, "what it says of its arrays is not what was saved")
        return json.loads(text)

    def _read(self, step, **items):
        """Returns what is read; what cannot be is damaged, whatever orbax raises."""
        try:
            return self._manager.restore(step, args=ocp.args.Composite(**items))
        except Exception as error:
            first = next(iter(str(error).splitlines()), "")
            why = f"it cannot be read: {type(error).__name__}: {first}"
            raise self._damaged(step, why) from error

    def _damaged(self, step, why):
        return ValueError(
            f"Checkpoints: expected the checkpoint of step {step} in {self.directory} as it was "
            f"written, but {why}; {list(self.steps())} are there"
        )


def _check_metrics(directory):
    """Holds the metrics of a folder to be such: orbax reads them all to begin with."""
    for file in sorted(directory.glob("*[0-9]/metrics/metrics")):  # not what is being written
        try:
            json.loads(file.read_bytes())
        except ValueError as error:
            raise ValueError(
                f"Checkpoints: expected {file} as it was written, but it cannot be read ({error}); "
                "without that step's folder the others are there"
            ) from error


def _leaves(caller, tree):
    """Returns the leaves by their path."""
    found = leaves_by_path(tree)
    if len(found) < len(jax.tree.leaves(tree)):
        raise ValueError(f"{caller}: expected leaves of different names, got {sorted(found)}")
    return found


def _plain(caller, name, leaf):
    """Returns a leaf as an array of numbers: a random key as what it is made of."""
    array = jnp.asarray(leaf)
    given = getattr(leaf, "dtype", array.dtype)
    if array.dtype != given:
        why = f"of which JAX would make {array.dtype}"
    elif array.size and str(given) in UNKNOWN:
        why = "which TensorStore has not"
    else:
        return jax.random.key_data(array) if _is_key(array) else array
    raise TypeError(f"{caller}: expected {name} of a dtype that is kept, got {given}, {why}")


def _kind(leaf):
    """Returns what kind of random key a leaf is; None if it is none."""
    return str(jax.random.key_impl(leaf)) if _is_key(jnp.asarray(leaf)) else None


def _is_key(leaf):
    return jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.prng_key)


def _about(leaf, array):
    """Returns what is said of a leaf."""
    return {
        "shape": array.shape,
        "dtype": array.dtype.name,
        "key": _kind(leaf),
        "checksum": checksum(array),
    }


def _as(new, old):
    """Returns an array that may go where others are, if the old one might; or its random key."""
    if not getattr(old, "committed", False):
        new = jnp.asarray(np.asarray(new))
    return jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if _is_key(old) else new
