"""Results of studies to look at again, such as those that the repository keeps."""

import importlib
import json
import pathlib
import tempfile
from typing import Any

from normax.experiments.__main__ import main, module_of

FOLDER = pathlib.Path("docs") / "studies"


def load(name: str) -> dict[str, Any]:
    """Returns what the full form of a study found, or runs its quick form.

    Args:
      name: of the study.

    Returns:
      The record: command, arguments, versions and results; from the nearest checkout around the
      working folder, and where there is none from a run of the quick form.
    """
    here = pathlib.Path.cwd()
    for folder in (here, *here.parents):
        path = folder / FOLDER / f"{name}.json"
        if path.exists():
            return json.loads(path.read_text())
    with tempfile.TemporaryDirectory() as folder:
        if main([name, "--quick", "--out", folder]):
            raise RuntimeError(f"the study {name} did not run")
        return json.loads((pathlib.Path(folder) / f"{name}.json").read_text())


def figure(name: str, record: dict[str, Any]) -> Any:
    """Returns the study's figure of a record.

    Args:
      name: of the study.
      record: as `load` gives it.
    """
    import matplotlib.pyplot as plt

    from normax.experiments import study

    drawn = plt.figure(figsize=(10, 4.2), layout="constrained")
    study.draw_on(drawn, importlib.import_module(module_of(name)).draw, record)
    return drawn
