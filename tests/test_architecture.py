"""Who may import whom, what a shell may not do, and how long a file may be."""

import ast
import inspect
import itertools
import pathlib
import re
import subprocess
import sys
import types

import conftest
import pytest

import normax
from normax import train

ROOT = pathlib.Path(normax.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))
# Of the working tree: what is installed has them built.
SOURCES = pathlib.Path(__file__).parent.parent / "normax" / "kernels" / "native"
NATIVE = sorted(path for path in SOURCES.iterdir() if path.suffix in (".cc", ".h"))

# Rooms from the lowest up; a file may import from lower rooms and from its own.
ROOMS = [
    ["checks", "quotient", "singular"],
    ["axes", "pool"],
    ["units"],
    ["sums", "kernels"],
    ["entries"],
    ["parts"],
    ["forms"],
    ["measure"],
    ["moments", "order", "rescale"],
    ["rows", "defaults", "layout"],
    ["implementations"],
    ["gradient"],
    ["standardize"],
    [
        "batch",
        "layer",
        "group",
        "weight",
        "regularize",
        "state",
        "length",
        "features",
        "condition",
        "residual",
    ],
    [
        "partial",
        "renorm",
        "ghost",
        "kalman",
        "switchable",
        "response",
        "evonorm",
        "adaptive",
        "instance",
    ],
    ["kernel", "operator", "segment", "trees", "population", "conventions", "power"],
    ["exporting"],
    ["__init__"],
    ["options", "theory"],
    ["linen", "nnx"],
    ["bind", "intercept"],
    ["merging"],
    ["microbatch"],
    ["train", "recalibrate", "interop", "checkpoint"],
    ["population_training", "diagnostics"],
    ["experiments"],
]
FLAX = {"linen", "nnx", "bind", "intercept", "train", "recalibrate", "interop", "experiments"}
FLAX |= {"population_training", "diagnostics", "merging"}
REFUSE_NOTHING = {"norm_labels", "norm_penalty", "from_nnx"}
PAPERS = ["batch_norm", "layer_norm", "rms_norm", "group_norm", "instance_norm", "weight_norm"]
PAPERS += ["spectral_norm", "moments", "merge", "update"]
SHELLS = [path for path in FILES if path.relative_to(ROOT).parts[0] in ("linen", "nnx")]


def room(name):
    """Returns the height of the room that a module of normax is in."""
    return next(height for height, names in enumerate(ROOMS) if name in names)


def name_of(path):
    """Returns the room's name for a file."""
    first = path.relative_to(ROOT).parts[0]
    return first.removesuffix(".py")


def imports_of(path):
    """Yields the dotted names that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_down(path):
    here = name_of(path)
    for imported in imports_of(path):
        parts = imported.split(".")
        if parts[0] == "flax":
            assert here in FLAX, f"{path} imports {imported}"
        if parts[0] != "normax" or len(parts) == 1 or here == "__init__":
            continue
        known = parts[1] if any(parts[1] in names for names in ROOMS) else "__init__"
        assert room(known) <= room(here), f"{path} imports {imported}"
        if {here, known} == {"linen", "nnx"}:
            pytest.fail(f"{path} imports {imported}")


@pytest.mark.parametrize("path", SHELLS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shells_have_no_arithmetic(path):
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.BinOp | ast.AugAssign):
            # `A | B` of types is no arithmetic.
            assert isinstance(node.op, ast.BitOr), f"{path}:{node.lineno}"
        assert not isinstance(node, ast.UnaryOp) or isinstance(node.op, ast.Not), (
            f"{path}:{node.lineno}"
        )
    for imported in imports_of(path):
        assert not imported.startswith(("jax.numpy", "jax.lax", "numpy")), f"{path}: {imported}"
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    assert not names & {"numpy", "lax"}, path


@pytest.mark.parametrize("path", [*FILES, *NATIVE], ids=lambda path: path.name)
def test_a_file_is_one_idea(path):
    assert len(path.read_text().splitlines()) <= 400


def test_the_parts_of_a_run_are_all_of_its_cases_and_each_has_some_of_every_test():
    names = ["alone", *(f"few[{i}]" for i in range(2)), *(f"many[{i}]" for i in range(11))]
    parts = []
    for part in range(1, 5):
        items = [types.SimpleNamespace(nodeid=name) for name in names]
        left = []
        hook = types.SimpleNamespace(pytest_deselected=lambda items, left=left: left.extend(items))
        config = types.SimpleNamespace(getoption=lambda _, part=part: f"{part}/4", hook=hook)
        conftest.pytest_collection_modifyitems(config, items)
        kept = [item.nodeid for item in items]
        assert sorted(kept + [item.nodeid for item in left]) == sorted(names)
        assert {name.partition("[")[0] for name in kept} == {"alone", "few", "many"}
        parts.append([name for name in kept if name.startswith("many")])
    assert sorted(itertools.chain(*parts)) == sorted(names[3:])


def test_importing_normax_does_not_import_flax():
    code = "import sys, normax; sys.exit('flax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT.parent)


def test_every_public_name_is_documented():
    public = {name: value for name, value in vars(normax).items() if not name.startswith("_")}
    public |= {"train_step": train.train_step, "eval_step": train.eval_step}
    public |= {"create": train.TrainState.create, "from_nnx": train.TrainState.from_nnx}
    for name, value in public.items():
        if inspect.ismodule(value):
            continue
        doc = inspect.getdoc(value)
        assert doc, name
        if inspect.isroutine(value):
            sections = ["Args:", "Returns:", "Example:", ">>> "]
            sections += [] if name in REFUSE_NOTHING else ["Raises:"]
            for section in sections:
                assert section in doc, f"{name}: {section}"
            for parameter, about in inspect.signature(value).parameters.items():
                stars = {2: "*", 4: "**"}.get(about.kind, "")
                assert f"{stars}{parameter}:" in doc, f"{name}: {parameter}"


@pytest.mark.parametrize("name", PAPERS)
def test_a_normalizer_names_its_paper(name):
    assert re.search(r"https?://\S+\d", inspect.getdoc(getattr(normax, name)))
