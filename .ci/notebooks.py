"""Runs every notebook from top to bottom in this environment; an error in a cell is an error here.

python .ci/notebooks.py [--write]: with --write the outputs are stored in the notebooks.
"""

import pathlib
import sys

import nbclient
import nbformat


def main() -> None:
    """Runs the notebooks."""
    for path in sorted(pathlib.Path("notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        nbclient.NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
        outputs = sum(len(cell.get("outputs", [])) for cell in notebook.cells)
        print(f"{path}: {len(notebook.cells)} cells, {outputs} outputs")
        if "--write" in sys.argv:
            nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
