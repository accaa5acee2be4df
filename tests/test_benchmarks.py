"""The speed benchmark: what it calls right is right, its arithmetic, and one run of all of it."""

import json
import math
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import reference
from cases import Case as Row

import normax
from benchmarks.speed import __main__ as command
from benchmarks.speed import cases, ceilings, contestant, exact, measure, peers, report, timing
from benchmarks.speed.cases import Case
from benchmarks.speed.contestant import Contestant

ROOT = pathlib.Path(normax.__file__).parents[1]
OPERATIONS = [case for part in cases.QUICK for case in cases.cases(part, "quick")]


def contestants(record):
    return record["contestants"].items()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Runs everything in its quick form, as a user does, and returns the folder it wrote."""
    folder = tmp_path_factory.mktemp("speed")
    line = [sys.executable, "-m", "benchmarks.speed", "--quick", "--output", str(folder)]
    # PyTorch takes seconds to import, and the peers have their own tests.
    line += ["--only", "normax", "normax xla", "plain jax", "flax linen", "flax nnx"]
    # One device, as users have.
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    environment = os.environ | {"XLA_FLAGS": " ".join(flags)}
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture(scope="module")
def stored(run):
    return json.loads((run / report.JSON).read_text())


def test_a_run_measures_every_part(stored):
    assert list(stored) == list(cases.PARTS)
    for part in stored.values():
        assert part["complete"]
        assert part["cases"]
        assert part["about"]["versions"]["jax"] == jax.__version__
        assert "--quick" in part["command"]


def test_a_run_holds_normax_and_flax_to_be_right(stored):
    for part in stored.values():
        for case in part["cases"]:
            status = {name: (r["status"], r.get("why")) for name, r in contestants(case)}
            assert {"normax", "flax linen"} <= set(status)
            assert {s for n, s in status.items() if n.startswith("normax")} == {("right", None)}
            assert status["flax linen"] == ("right", None)


def test_what_a_run_writes_is_consistent(stored):
    for part in cases.QUICK:
        for case, record in zip(cases.cases(part, "quick"), stored[part]["cases"], strict=True):
            assert record["name"] == case.name
            assert record["best_ms"]["median"] > 0
            labels = {name.split()[1] for name in record["ceilings"]}
            assert labels == {ceilings.label(mix) for mix in case.passes}
            for name, result in contestants(record):
                ms = result["ms"]
                assert 0 < ms["q1"] <= ms["median"] <= ms["q3"], name
                assert result["of_ceiling"]["median"] > 0
                assert math.isclose(result["gb_s"], case.floor / ms["median"] / 1e6)
                assert result["error"] <= exact.LIMITS[case.dtype].gradient
                if case.mode == "backward":
                    assert result["kept"] >= (name != "normax") * case.bytes
            assert record["contestants"]["normax"]["normax_over"]["median"] == 1


def test_a_run_compiles_from_nothing_and_tells_the_stages(stored):
    for record in stored["compile"]["cases"]:
        for _, result in contestants(record):
            parts = [result[f"{stage}_s"]["median"] for stage in ("trace", "lower", "compile")]
            assert min(parts) > 0
            assert math.isclose(sum(parts), result["all_s"]["median"])
        lines = {name: result["lines"] for name, result in contestants(record)}
        assert lines["no norms"] < lines["flax linen"]


def test_a_run_writes_a_table_and_figures(run, stored):
    text = (run / report.TABLE).read_text()
    for part, content in stored.items():
        assert f"\n## {part}\n" in text
        for case in content["cases"]:
            assert f"\n### {case['name']}\n" in text
    rows = [line for line in text.splitlines() if line.startswith("| ceiling 1R1W jax |")]
    assert len(rows) == sum((1, 1) in case.passes for case in OPERATIONS)
    for name in ("roofline.png", "share.png"):
        content = (run / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(content) > 10_000


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


def test_contestants_take_turns(monkeypatch):
    clock, order = [0.0], []

    def who(name, cost):
        def call(i):
            order.append((name, i))
            clock[0] += cost

        return Contestant(call, lambda result: None)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    effort = timing.Effort(rounds=2, sample=6.0, calls=50, kernel=0, queue=True)
    found = timing.rounds({"a": who("a", 2.0), "b": who("b", 3.0)}, effort)
    assert found == [{"a": 2000.0, "b": 3000.0}] * 2
    warm, turns = order[:4], order[4:]
    assert warm == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    # Three calls of a last as long as two of b; the second round begins with b and the next inputs.
    first = [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)]
    assert turns == [*first, ("b", 1), ("b", 2), ("a", 1), ("a", 2), ("a", 3)]


ROUNDS = [
    {"normax": 4.0, "flax": 8.0, "ceiling 1R0W jax": 3.0, "ceiling 1R0W torch": 1.0,
     "ceiling 1R1W jax": 2.0},
    {"normax": 6.0, "flax": 8.0, "ceiling 1R0W jax": 1.0, "ceiling 1R0W torch": 2.0,
     "ceiling 1R1W jax": 2.0},
    {"normax": 12.0, "flax": 48.0, "ceiling 1R0W jax": 4.0, "ceiling 1R0W torch": 4.0,
     "ceiling 1R1W jax": 8.0},
]  # fmt: skip


def test_ratios_are_of_each_round_and_ceilings_sum_their_passes():
    case = Case("batch", "", "forward", (64, 4, 4, 1024), "float32")
    assert [ceilings.best(case, times) for times in ROUNDS] == [3.0, 3.0, 12.0]
    ours = measure.evaluated(case, ROUNDS, "normax")
    assert (ours["ms"]["median"], ours["normax_over"]["median"]) == (6.0, 1.0)
    assert ours["of_ceiling"] == {"median": 0.75, "q1": 0.625, "q3": 0.875, "n": 3}
    # Two reads and a write of 4 MiB in 6 ms.
    assert math.isclose(ours["gb_s"], 3 * 4 * 2**20 / 6e-3 / 1e9)
    theirs = measure.evaluated(case, ROUNDS, "flax")
    # Not 6 / 8, the ratio of the medians.
    assert theirs["normax_over"]["median"] == 0.5
    assert theirs["ms"]["q3"] == 28.0


def test_both_passes_of_a_layer_norm_are_five_arrays():
    floors = {
        ("layer", ""): (2, 3),
        ("rms", "add"): (4, 4),
        ("rms", "gate"): (3, 5),
        ("batch", "relu"): (3, 5),
        ("batch", "add_relu"): (4, 7),
        ("group", "silu"): (3, 5),
    }
    for (norm, wrap), (forward, backward) in floors.items():
        for mode, arrays in [
            ("forward", forward),
            ("backward", backward),
            ("both", forward + backward),
        ]:
            case = Case(norm, wrap, mode, (8, 16))
            assert case.floor == arrays * case.bytes == arrays * 8 * 16 * 2


@pytest.mark.parametrize("size", ["gpu", "cpu"])
def test_every_part_has_cases_of_its_size(size):
    usual = {"gpu": "bfloat16", "cpu": "float32"}[size]
    for part in cases.QUICK:
        found = cases.cases(part, size)
        assert len({case.name for case in found}) == len(found)
        assert found[0].dtype == usual
        for case in found:
            if part == "latency":
                continue
            # The inputs that are taken in turn are more than a cache of the device holds.
            assert contestant.SETS * case.bytes >= {"gpu": 60e6, "cpu": 24e6}[size]


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


@pytest.fixture
def counted(monkeypatch):
    """Puts contestants that do nothing in the place of all, and returns the cases in turn."""
    names = []
    idle = Contestant(lambda i: None, lambda result: None)

    def makers(case, inputs, quick):
        names.append(case.name)
        return {"normax": lambda: fake(case, lambda found: found)[0]}

    def passes(case, inputs):
        return {f"ceiling {ceilings.label(mix)} jax": idle for mix in case.passes}

    monkeypatch.setattr(measure, "makers", makers)
    monkeypatch.setattr(ceilings, "ceilings", passes)
    return names


def start(folder, *more):
    return command.main(["--matrix", "backward", "--quick", "--output", str(folder), *more])


def test_ctrl_c_keeps_what_was_measured_and_resume_does_the_rest(counted, monkeypatch, tmp_path):
    def stopped():
        if len(counted) == 2:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(command, "stopper", lambda: stopped)
        assert start(tmp_path) == 130
    kept = json.loads((tmp_path / report.JSON).read_text())["backward"]
    first, second = (case.name for case in cases.QUICK["backward"])
    assert [case["name"] for case in kept["cases"]] == [first]
    assert not kept["complete"]
    assert "stopped before its end" in (tmp_path / report.TABLE).read_text()
    assert start(tmp_path, "--resume") == 0
    # The second was begun, stopped, and begun again; the first was not.
    assert counted == [first, second, second]
    whole = json.loads((tmp_path / report.JSON).read_text())["backward"]
    assert [case["name"] for case in whole["cases"]] == [first, second]
    assert whole["complete"]


def test_a_part_that_takes_too_long_leaves_out_the_rest(counted, tmp_path):
    assert start(tmp_path, "--minutes", "0") == 0
    assert not counted
    assert not json.loads((tmp_path / report.JSON).read_text())["backward"]["complete"]


def test_parts_measured_apart_are_joined(counted, tmp_path):
    for part in ("rows", "latency"):
        folder = tmp_path / part
        assert command.main(["--matrix", part, "--quick", "--output", str(folder)]) == 0
    files = [str(tmp_path / part / report.JSON) for part in ("rows", "latency")]
    assert command.main(["--combine", *files, "--output", str(tmp_path / "all")]) == 0
    assert list(json.loads((tmp_path / "all" / report.JSON).read_text())) == ["rows", "latency"]
    text = (tmp_path / "all" / report.TABLE).read_text()
    assert "\n## rows\n" in text
    assert "\n## latency\n" in text


def test_results_name_no_host_and_no_folder(stored):
    text = json.dumps(stored)
    assert str(ROOT) not in text
    assert str(pathlib.Path.home()) + "/" not in text
    assert os.uname().nodename not in text


def test_what_is_stored_is_json_though_an_error_be_nan(tmp_path):
    report.save({"rows": {"error": math.nan, "of": [math.inf, 1.5]}}, tmp_path / "a" / report.JSON)
    assert report.load([tmp_path / "a" / report.JSON]) == {
        "rows": {"error": None, "of": [None, 1.5]}
    }


def test_numbers_are_written_with_the_digits_that_count():
    values = {
        0.012345: "0.0123",
        1.2345: "1.23",
        12.345: "12.3",
        1234.5: "1234",
        None: "-",
        math.nan: "-",
    }
    assert {value: report.number(value) for value in values} == values


def test_the_passes_move_what_they_say():
    inputs = contestant.make_inputs(Case("rms", "gate", "both", (64, 32), "float32"))
    made = ceilings._in_jax((3, 2), [v for given in inputs.sets for v in given.values()])
    outputs = made.call(0)
    x, dy, second = (inputs.sets[0][name] for name in ("x", "dy", "second"))
    assert len(outputs) == 2
    np.testing.assert_allclose(outputs[0], x + dy + second + 1, rtol=1e-6, atol=1e-6)
    total = ceilings._in_jax((2, 0), [x, dy]).call(0)
    np.testing.assert_allclose(total, jnp.sum(x * dy), rtol=1e-4, atol=1e-3)
