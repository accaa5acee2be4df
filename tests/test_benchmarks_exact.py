"""What the speed benchmark calls right: its exact results, its peers', and who is wrong."""

import math

import jax
import numpy as np
import pytest
import reference
from cases import Case as Row

from benchmarks.speed import cases, contestant, exact, in_torch, measure, peers
from benchmarks.speed.cases import Case
from benchmarks.speed.contestant import Contestant

OPERATIONS = [case for part in cases.QUICK for case in cases.cases(part, "quick")]


def row_of(case):
    """Returns a case as the tests' oracle knows it."""
    last = len(case.shape) - 1
    axes = {
        "layer": (last,),
        "rms": (last,),
        "batch": tuple(range(last)),
        "group": (*range(1, last), last + 1),
    }[case.norm]
    groups = case.groups if case.norm == "group" else None
    return Row(case.norm, None, case.shape, axes, centered=case.centered, groups=groups)


PLAIN = [
    Case("layer", "", "both", (5, 7), "float64"),
    Case("rms", "", "both", (5, 7), "float64"),
    Case("batch", "", "both", (3, 4, 2, 6), "float64"),
    Case("group", "", "both", (3, 4, 2, 6), "float64", 3),
]
WRAPPED = [
    Case("layer", "add", "both", (5, 7), "float64"),
    Case("layer", "gelu", "both", (5, 7), "float64"),
    Case("rms", "gate", "both", (5, 7), "float64"),
    Case("batch", "relu", "both", (3, 4, 2, 6), "float64"),
    Case("batch", "add_relu", "both", (3, 4, 2, 6), "float64"),
    Case("group", "silu", "both", (3, 4, 2, 6), "float64", 3),
]


def arrays(case):
    rng = np.random.default_rng(0)
    given = {name: rng.normal(size=case.shape) for name in ("x", "dy", "second", "dsum")}
    given |= {name: rng.normal(size=case.shape[-1]) for name in ("scale", "bias")}
    if not case.second:
        given["second"] = np.zeros(())
    return given


@pytest.mark.parametrize("case", PLAIN, ids=lambda case: case.norm)
def test_the_exact_results_are_those_of_the_oracle(case):
    given = arrays(case)
    found = exact.answer(case, given)
    bias = given["bias"] if case.centered else 0
    y = reference.forward(row_of(case), given["x"], given["scale"], bias)
    xhat = reference.forward(row_of(case), given["x"])
    dx = reference.backward(row_of(case), given["x"], given["dy"] * given["scale"])
    rows = tuple(range(len(case.shape) - 1))
    np.testing.assert_allclose(found["y"], y.astype(float), rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(found["dx"], dx.astype(float), rtol=1e-11, atol=1e-12)
    dscale = (xhat * given["dy"]).sum(rows).astype(float)
    np.testing.assert_allclose(found["dscale"], dscale, rtol=1e-11, atol=1e-12)
    if case.centered:
        np.testing.assert_allclose(found["dbias"], given["dy"].sum(rows), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("case", [*PLAIN, *WRAPPED], ids=lambda case: f"{case.norm}{case.wrap}")
def test_the_exact_gradients_are_the_slopes_of_the_exact_outputs(case):
    given = arrays(case)
    found = exact.answer(case, given)
    rng = np.random.default_rng(1)
    for name in contestant.differentiated(case):
        direction = rng.normal(size=given[name].shape)

        def value(step, name=name, direction=direction):
            there = exact.answer(case, given | {name: given[name] + step * direction})
            total = (there["y"] * given["dy"]).sum()
            return total + (there["sum"] * given["dsum"]).sum() if case.wrap == "add" else total

        slope = (value(1e-6) - value(-1e-6)) / 2e-6
        assert math.isclose((found[f"d{name}"] * direction).sum(), slope, rel_tol=1e-6)


def test_a_slice_has_the_first_and_the_last_row():
    case = Case("layer", "", "forward", (1000, 8))
    where = exact.indices(case)
    assert (where[0], where[-1], len(where)) == (0, 999, exact.SLICE)
    inputs = contestant.make_inputs(case)
    outside = np.delete(np.asarray(inputs.check["dy"], np.float32), where, 0)
    assert not outside.any()
    assert np.asarray(inputs.check["dy"], np.float32)[where].any()


def fake(case, change):
    """Returns a contestant that gives the exact results of a case, changed."""
    answers = contestant.expected(case, contestant.make_inputs(case))
    names = ["dx", "dscale", "dbias"] if case.mode == "backward" else ["y"]
    results = change({name: answers[name] for name in names})
    return Contestant(lambda i: None, lambda result: None, lambda: results), answers


@pytest.mark.parametrize("mode", ["forward", "backward"])
def test_who_is_wrong_is_not_timed(mode):
    case = Case("layer", "", mode, (64, 32), "float32")
    first = "y" if mode == "forward" else "dbias"

    def put(value):
        return lambda found: found | {first: np.where(found[first] == found[first], value, 0)}

    changes = {
        "right": lambda found: found,
        "wrong": lambda found: {name: 1.01 * v for name, v in found.items()},
    }
    for status, change in changes.items():
        made, answers = fake(case, change)
        timed, record = measure.prepare(case, lambda made=made: made, answers)
        assert record["status"] == status
        assert (timed is None) == (status == "wrong")
    for value in (np.nan, np.inf, 1e30):
        made, answers = fake(case, put(value))
        assert measure.prepare(case, lambda made=made: made, answers)[1]["status"] == "wrong"


def test_who_fails_is_named_with_the_reason():
    def broken():
        raise RuntimeError("no memory\nmuch more")

    timed, record = measure.prepare(OPERATIONS[0], broken, {})
    assert timed is None
    assert record == {"status": "failed", "why": "RuntimeError: no memory"}
    assert measure.prepare(OPERATIONS[0], lambda: None, {})[1] == {"status": "absent"}


@pytest.mark.parametrize("name", sorted(peers._BUILDERS))
def test_a_peer_is_right_where_it_is_installed(name):
    module, build = peers._BUILDERS[name]
    if not peers.importable(module):
        assert name not in peers.norms(OPERATIONS[0])
        return
    for case in (OPERATIONS[0], cases.QUICK["group"][0]):
        inputs = contestant.make_inputs(case)
        # Flax promotes, as users let it.
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            norm = build(case)
            made = contestant.in_jax(case, norm, inputs)
            right, error = exact.verdict(case, made.check(), contestant.expected(case, inputs))
        assert right, (case.name, error)


@pytest.mark.parametrize("case", OPERATIONS, ids=lambda case: case.title)
def test_pytorch_is_right_where_it_is_installed(case):
    names = in_torch.names(case, quick=True)
    assert ("torch" in names) == in_torch.usable()
    for name in names:
        inputs = contestant.make_inputs(case)
        made = in_torch.make(case, name, inputs)
        right, error = exact.verdict(case, made.check(), contestant.expected(case, inputs))
        assert right, (name, error)
        assert (made.kept or 0) >= (case.mode == "backward") * case.bytes
