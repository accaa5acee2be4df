"""The short form of `soak.py`: what it holds, and that it would notice."""

import copy

import pytest
import soak


def test_a_training_that_is_killed_and_fed_badly():
    found, starts = soak.soak(steps=400, kills=2, seed=1)
    assert len(found[0]["memory"]) == 4
    assert starts[0] == 0 < starts[-1]
    soak.hold(found, 400, 1)
    assert found[0]["skipped"] > 3
    for name, value in {
        "skipped": found[0]["skipped"] + 1,
        "finite": False,
        "compiled": [1, 2, 1],
        "bits": 0,
        "memory": [0, 0, 100, 150, 200, 250],
        "alive": [26, 74, 75, 76],
    }.items():
        broken = copy.deepcopy(found)
        broken[0][name] = value
        with pytest.raises(AssertionError):
            soak.hold(broken, 400, 1)
