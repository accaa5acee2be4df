"""Runs notebooks from top to bottom in this environment; an error in a cell is an error here.

python .ci/notebooks.py [--write] [PATH ...]: all of them, or those named; with --write the outputs
are stored in the notebooks.
"""

import argparse
import pathlib
import time

import nbclient
import nbformat


def main() -> None:
    """Runs the notebooks."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("paths", nargs="*", type=pathlib.Path, metavar="PATH")
    parser.add_argument("--write", action="store_true", help="store the outputs")
    options = parser.parse_args()
    for path in options.paths or sorted(pathlib.Path("notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        start = time.perf_counter()
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
        seconds = time.perf_counter() - start
        outputs = sum(len(cell.get("outputs", [])) for cell in notebook.cells)
        print(f"{path}: {len(notebook.cells)} cells, {outputs} outputs, {seconds:.0f} s")
        if options.write:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
