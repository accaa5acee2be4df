"""The page of all functions is whole and in step with the docstrings; its recipes run."""

import importlib.util
import pathlib
import re

import jax
import numpy as np
import pytest

import normax
import normax.linen
import normax.nnx

ROOT = pathlib.Path(normax.__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("build", ROOT / "docs" / "build.py")
build = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(build)
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
