"""The speed benchmark: one run of all of it, its command line and its arithmetic."""

import dataclasses
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

import normax
from benchmarks.speed import __main__ as command
from benchmarks.speed import cases, ceilings, contestant, exact, measure, peers, report, timing
from benchmarks.speed.cases import Case
from benchmarks.speed.contestant import Contestant
from normax import kernels

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
    line += ["--only", "normax", "normax xla", "plain jax", "flax linen"]
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
            assert labels == {ceilings.label(mix) for mix in ceilings.timed(case)}
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
    assert len(rows) == sum((1, 1) in ceilings.timed(case) for case in OPERATIONS)
    for name in ("roofline.png", "share.png"):
        content = (run / name).read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        assert len(content) > 10_000


def test_contestants_take_turns(monkeypatch):
    clock, order = [0.0], []

    def who(name, cost):
        def call(i):
            order.append((name, i))
            clock[0] += cost

        return Contestant(call, lambda result: None)

    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock[0])
    effort = timing.Effort(rounds=2, sample=6.0, calls=50, kernel=0, queue=True, warm=4.0)
    found = timing.rounds({"a": who("a", 2.0), "b": who("b", 3.0)}, effort)
    assert found == [{"a": 2000.0, "b": 3000.0}] * 2
    warm, turns = order[:4], order[4:]
    assert warm == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    # Three calls of a last as long as two of b; the second round begins with b and the next inputs.
    # A turn begins with calls that are not timed, two of a and one of b.
    first = [("a", -2), ("a", -1), ("a", 0), ("a", 1), ("a", 2), ("b", -1), ("b", 0), ("b", 1)]
    second = [("b", 0), ("b", 1), ("b", 2), ("a", -1), ("a", 0), ("a", 1), ("a", 2), ("a", 3)]
    assert turns == [*first, *second]


def test_others_are_compared_with_normax_as_it_comes_or_by_a_kernel():
    assert measure.own(["ceiling 1R1W jax", "normax", "normax xla", "normax cpu"]) == "normax"
    assert measure.own(["normax xla", "normax cpu", "flax linen"]) == "normax cpu"
    assert measure.own(["normax_like", "torch"]) is None


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


def test_a_ceiling_is_the_faster_of_one_pass_and_two():
    case = Case("rms", "add", "forward", (8, 16))
    times = {"ceiling 1R1W jax": 2.0, "ceiling 1R1W torch": 3.0}
    assert ceilings.best(case, times | {"ceiling 2R2W jax": 5.0}) == 4.0
    assert ceilings.best(case, times | {"ceiling 2R2W jax": 3.5}) == 3.5


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
            if part == "latency" or case.shape in cases.IN_CACHE:
                continue
            # The inputs that are taken in turn are more than a cache of the device holds.
            assert contestant.SETS * case.bytes >= {"gpu": 60e6, "cpu": 24e6}[size]


def test_kernels_take_part_by_name_where_they_can_be_asked_for(monkeypatch):
    layer, batch = (
        cases.Case(norm, "", "forward", (64, 32), "float32") for norm in ("layer", "batch")
    )
    here = ["xla"] + ["cpu"] * (kernels.available()["cpu"] is None)
    assert peers.implementations(layer) == peers.implementations(batch) == here
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert peers.implementations(layer) == ["xla", "mosaic_gpu"]
    assert peers.implementations(batch) == ["xla"]
    assert list(peers.norms(layer))[:3] == ["normax", "normax xla", "normax mosaic_gpu"]
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    assert peers.implementations(batch) == ["xla", "mosaic_tpu"]
    x = jnp.ones((2, 32))
    with pytest.raises(NotImplementedError, match="is for tpu alone"):
        peers.norms(batch)["normax mosaic_tpu"]()(x, x[0], x[0])


@pytest.mark.parametrize(
    "case",
    [
        cases.Case("layer", "add", "both", (64, 32), "float32"),
        cases.Case("rms", "add", "forward", (64, 32), "float32"),
        cases.Case("layer", "gelu", "both", (64, 32), "float32"),
        cases.Case("batch", "relu", "backward", (4, 6, 6, 8), "float32"),
    ],
    ids=lambda case: case.name,
)
def test_what_is_fused_is_what_is_written_apart(case):
    inputs = contestant.make_inputs(case)
    made = {name: peers.norms(case)[name]() for name in ("normax", "normax fused")}
    apart, fused = (contestant.in_jax(case, norm, inputs).check() for norm in made.values())
    assert apart.keys() == fused.keys()
    for name, value in apart.items():
        np.testing.assert_allclose(fused[name], value, rtol=1e-5, atol=1e-5)


def test_device_times_are_kept_apart_and_their_failures_named():
    def broken(calls):
        raise RuntimeError("no profiler")

    idle = Contestant(lambda i: None, lambda result: None)
    made = {
        "none": idle,
        "timed": dataclasses.replace(idle, kernel=lambda calls: [2.0] * calls),
        "broken": dataclasses.replace(idle, kernel=broken),
        "empty": dataclasses.replace(idle, kernel=lambda calls: None),
    }
    found, why = measure.kernel_times(made, 3)
    assert found == {"timed": {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 3}}
    assert why == {"broken": "RuntimeError: no profiler"}
    assert measure.kernel_times(made, 0) == ({}, {})


@pytest.fixture
def counted(monkeypatch):
    """Puts contestants that do nothing in the place of all, and returns the cases in turn."""
    names = []
    idle = Contestant(lambda i: None, lambda result: None)

    def makers(case, inputs, quick):
        names.append(case.name)
        dx = contestant.expected(case, inputs)["dx"]
        return {"normax": lambda: dataclasses.replace(idle, check=lambda: {"dx": dx})}

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


@pytest.mark.parametrize("machine", ["cpu", "cpu-avx512", "h100"])
def test_the_readme_has_the_numbers_of_the_results(machine):
    folder = ROOT / "benchmarks" / "results" / machine
    stored = report.load([folder / report.JSON])
    text = (folder / report.TABLE).read_text()
    assert text == report.markdown(stored)
    if machine == "cpu":  # of which there is a sentence, and no table
        return
    assert "\n".join(report.ratios(stored["both"])[2:]).strip() in (ROOT / "README.md").read_text()
