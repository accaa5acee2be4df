"""The results of the studies that come with normax, to be looked at again."""

import importlib
import importlib.resources
import json
from typing import Any

from normax.experiments import study
from normax.experiments.__main__ import module_of


def load(name: str) -> dict[str, Any]:
    """Returns what the full form of a study found: command, arguments, versions and results.

    Args:
      name: of the study.
    """
    folder = importlib.resources.files("normax.experiments") / "results"
    return json.loads((folder / f"{name}.json").read_text())


def figure(name: str, record: dict[str, Any]) -> Any:
    """Returns the study's figure of a record.

    Args:
      name: of the study.
      record: as `load` gives it.
    """
    import matplotlib.pyplot as plt

    drawn = plt.figure(figsize=(10, 4.2), layout="constrained")
    study.draw_on(drawn, importlib.import_module(module_of(name)).draw, record)
    return drawn
