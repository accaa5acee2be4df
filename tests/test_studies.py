"""The studies of the theory in their quick form: what they find is what the theory says."""

import json

import jax
import pytest

from normax import theory
from normax.experiments.__main__ import STUDIES, main

FORMULAS = sorted(set(STUDIES) - {"compare"})


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """Returns a function that runs a study, once, and reads what it left."""
    folder = tmp_path_factory.mktemp("studies")

    def record(study):
        path = folder / f"{study}.json"
        if not path.exists():
            # As from the command line, where JAX is not strict.
            with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
                assert main([study, "--quick", "--seed", "1", "--out", str(folder)]) == 0
        return json.loads(path.read_text()), folder

    return record


@pytest.mark.parametrize("study", FORMULAS)
def test_a_study_leaves_numbers_a_figure_and_its_command(study, records, capsys):
    record, folder = records(study)
    assert (folder / f"{study}.png").read_bytes().startswith(b"\x89PNG")
    assert record["command"].startswith(f"python -m normax.experiments {study} --quick --seed 1")
    assert record["arguments"]["seed"] == 1
    assert not record["interrupted"]
    assert record["versions"]["jax"]


def test_noise(records):
    rows = records("noise")[0]["results"]
    gaussian = {row["batch_size"]: row for row in rows if row["inputs"] == "gaussian"}
    assert sorted(gaussian) == [8, 32, 128]
    for size, row in gaussian.items():
        assert row["exact"] == theory.batch_noise(size)
        assert abs(row["measured"] - row["exact"]) <= 4 * row["error"]
    for row in rows:
        room = 4 * row["error"] / row["first_order"] + 3 / row["batch_size"]
        assert abs(row["measured"] / row["first_order"] - 1) <= room
    (network,) = [row for row in rows if row["inputs"] == "trained network"]
    assert network["batch_size"] == 32
    low, median, high = network["excess_kurtosis"]
    assert low < median < high


def test_regularization(records):
    rows = records("regularization")[0]["results"]
    parts = {part: [row for row in rows if row["part"] == part] for part in ("truth", "away")}
    for row in parts["truth"]:
        room = 4 * row["error"] / row["corrected"] + 3.5 / row["batch_size"]
        assert abs(row["measured"] / row["corrected"] - 1) <= room
    for row in parts["away"]:
        assert abs(row["measured"] - row["corrected"]) <= 4 * row["error"] + 5e-4
        assert abs(row["measured"] - row["published"]) > 4 * row["error"]  # which is off
    for part in ("gamma", "without replacement"):
        (row,) = [row for row in rows if row["part"] == part]
        assert abs(row["measured"] - row["corrected"]) <= 4 * row["error"]
        assert abs(row["measured"] - row["published"]) > 20 * row["error"]


def test_conditioning(records):
    rows = {row["features"]: row for row in records("conditioning")[0]["results"]}
    assert rows["dollars and inches"]["population"] == pytest.approx(99_492, abs=0.5)
    assert rows["thousands of dollars and feet"]["population"] == pytest.approx(302.99, abs=0.01)
    for row in rows.values():
        if row["population"] is not None:
            assert row["condition_number"] == pytest.approx(row["population"], rel=0.08)
    assert rows["standardized"]["condition_number"] < 1.25
    order = ["standardized", "from 0 to 1", "thousands of dollars and feet", "dollars and inches"]
    steps = [rows[name]["steps"] for name in order]
    assert steps == sorted(steps)
    assert steps[0] <= 5


@pytest.mark.parametrize("study", FORMULAS)
def test_a_folder_that_cannot_be_written_is_known_before(study, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main([study, "--quick", "--out", str(tmp_path / "file")]) == 2
    assert "cannot be written" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([study, "--seed", "-1"])
    assert "usage: python -m normax.experiments" in capsys.readouterr().err
