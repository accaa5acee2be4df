"""The page of all functions is whole and in step with the docstrings; its recipes run."""

import importlib.util
import json
import pathlib
import re

import jax
import numpy as np
import pytest

import normax
import normax.linen
import normax.nnx
from normax.experiments import stored
from normax.experiments.__main__ import STUDIES

ROOT = pathlib.Path(normax.__file__).parents[1]


def script(name):
    """Returns a script of the docs as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


build, claims = script("build"), script("claims")
LISTED = {name: facts for group in build.GROUPS.values() for name, facts in group.items()}


def test_the_page_is_what_the_docstrings_say():
    assert (ROOT / "docs" / "normalizers.md").read_text() == build.page()


def test_every_function_and_module_is_listed():
    assert set(LISTED) == set(build.public())
    modules = {module for module, _ in LISTED.values() if module}
    for room in (normax.linen, normax.nnx):
        assert modules == {name for name in vars(room) if name[0].isupper()}


def test_the_readme_s_table_has_every_function():
    readme = (ROOT / "README.md").read_text().split("## Every function")[1].split("\n## ")[0]
    rows = [line for line in readme.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert set(LISTED) <= named
    for row in rows:
        assert row.count("|") == 5, row


@pytest.mark.usefixtures("optax_promotes")
def test_the_page_on_training_runs(capsys):
    text, names = (ROOT / "docs" / "training.md").read_text(), {}
    with jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(block, names)
    assert capsys.readouterr().out.splitlines() == ["1 of 3 skipped", "20 {'batch': 20}"]
    assert int(names["state"].step) == 1


@pytest.mark.usefixtures("optax_promotes")
def test_the_recipes_run():
    text = (ROOT / "docs" / "normalizers.md").read_text()
    names = {}
    with jax.numpy_rank_promotion("allow"):
        for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL):
            exec(block, names)
    x = np.asarray(names["x"], np.float64)
    np.testing.assert_allclose(names["cumulative"].var, x.var(0), rtol=1e-5)
    np.testing.assert_allclose(names["both"].mean, x.mean(0), rtol=1e-5)
    halves = (0.9 * x[:16].mean(0) + x[16:].mean(0)) / 1.9
    np.testing.assert_allclose(names["unbiased"].mean, halves, rtol=1e-4)
    np.testing.assert_array_equal(names["back"]["fc.weight"], 1)
    assert dict(names["folded"]) == {"norm": "dense"}
    assert abs(names["logits"]).max() <= 4.01


def test_the_claims_are_what_the_studies_found():
    page = (ROOT / "docs" / "claims.md").read_text()
    assert page == claims.page()
    rows = [line.split(" | ") for line in page.splitlines() if line.startswith("| ")]
    assert all(len(row) in (5, 6) for row in rows)
    verdicts = {row[0].strip("| "): row[4].strip("*") for row in rows if len(row) == 6}
    assert [n for n in verdicts if n.isdigit()] == [str(n) for n in range(1, 24)]
    # By the verdicts of the theory: right, right to the first order, in part, wrong.
    right = {"1": "holds to the first order", "4": "holds"}
    wrong = dict.fromkeys(("7", "8", "10", "16", "19", "20"), "does not hold")
    part = {n: "holds in part" for n in map(str, range(1, 24)) if n not in {*right, *wrong, "21"}}
    expected = right | wrong | part | {"21": "holds at one stopping time only"}
    assert {n: verdict for n, verdict in verdicts.items() if n.isdigit()} == expected


def test_every_study_is_stored_and_told():
    studies = ROOT / "docs" / "studies"
    told = (studies / "README.md").read_text()
    for name in set(STUDIES) - {"compare"}:
        record = json.loads((studies / f"{name}.json").read_text())
        assert record["command"] == f"python -m normax.experiments {name} --out docs/studies"
        assert not record["interrupted"]
        assert f"`python -m normax.experiments {name}`" in told
        assert f"({name}.png)" in told
        assert (studies / f"{name}.png").exists()


def test_the_results_come_with_the_package():
    for name in set(STUDIES) - {"compare"}:
        path = ROOT / "docs" / "studies" / f"{name}.json"
        assert stored.load(name) == json.loads(path.read_text())


@pytest.mark.parametrize("path", sorted((ROOT / "notebooks").glob("*.ipynb")), ids=lambda p: p.stem)
def test_the_notebooks_are_whole(path):
    cells = json.loads(path.read_text())["cells"]
    numbers = [cell["execution_count"] for cell in cells if cell["cell_type"] == "code"]
    assert numbers == list(range(1, len(numbers) + 1))  # run from top to bottom
    assert '"pip", "install"' in "".join(cells[1]["source"])  # where normax is missing
    for cell in cells:
        text = "".join(cell["source"])
        assert not re.search(r"[A-Z]+_TEXT|TODO|XXX", text)
        if cell["cell_type"] == "markdown":
            last = text.strip().splitlines()[-1]
            assert not last.startswith("#"), f"{path.stem}: nothing under {last!r}"
        for output in cell.get("outputs", []):
            assert output["output_type"] != "error"
