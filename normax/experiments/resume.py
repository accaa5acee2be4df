"""Going on with a study where it was stopped: its networks are kept as they train."""

import argparse
import pathlib
from typing import Any, Self

from normax.checkpoint import Checkpoints
from normax.experiments import data, study
from normax.train import TrainState

# What training depends on; of anything else the rest of a run may be another.
SAME = ("dataset", "batch_size", "epochs", "learning_rate", "limit", "dtype", "seed")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options."""
    add = parser.add_argument
    add("--checkpoint", type=pathlib.Path, metavar="DIR", help="keep the networks here")
    add("--checkpoint-every", type=study.positive_int, default=20, metavar="STEPS")
    add("--resume", action="store_true", help="go on with what --checkpoint has")


def check(options: argparse.Namespace) -> None:
    """Refuses to go on with nothing."""
    if options.resume and options.checkpoint is None:
        raise data.UsageError("--resume needs --checkpoint DIR, of the run to go on with")


class Kept:
    """The checkpoints of one network, or none if nobody asked for any.

    Args:
      options: what the command line says.
      name: of the network.
    """

    def __init__(self, options: argparse.Namespace, name: str):
        self.options, self.checkpoints = options, None
        if options.checkpoint is not None:
            folder = options.checkpoint / name
            try:
                folder.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise data.UsageError(f"{folder} cannot be written: {error}") from error
            self.checkpoints = Checkpoints(folder, every=options.checkpoint_every, keep=2)

    def has_begun(self) -> bool:
        """Returns whether there is something to go on with, or in the way."""
        return self.checkpoints is not None and len(self.checkpoints.steps()) > 0

    def start(self, state: TrainState) -> tuple[TrainState, list[dict[str, Any]]]:
        """Returns the state to begin with, and what was measured of the epochs before it."""
        if self.checkpoints is None or not self.has_begun():
            return state, []
        folder = self.checkpoints.directory
        if not self.options.resume:
            raise data.UsageError(
                f"{folder} has checkpoints: give --resume to go on with them, or another folder"
            )
        try:
            state, position = self.checkpoints.restore(state)
        except (ValueError, TypeError) as error:
            raise data.UsageError(str(error)) from error
        for name, before in position["options"].items():
            now = getattr(self.options, name)
            if now != before:
                option = f"--{name.replace('_', '-')}"
                raise data.UsageError(f"{folder} was trained with {option} {before}, not {now}")
        return state, position["epochs"]

    def save(
        self, step: int, state: TrainState, epochs: list[dict[str, Any]], *, force: bool = False
    ) -> None:
        """Keeps a state after a number of steps, and what was measured of the epochs before it."""
        if self.checkpoints is not None:
            same = {name: getattr(self.options, name) for name in SAME}
            position = {"epochs": epochs, "options": same}
            self.checkpoints.save(step, state, position=position, force=force)

    def __enter__(self) -> Self:
        """Returns itself."""
        return self

    def __exit__(self, *error: object) -> None:
        """Waits for what is being written."""
        if self.checkpoints is not None:
            self.checkpoints.close()
