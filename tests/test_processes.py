"""Several processes train as one does; where one dies the others say so, and all can go on."""

import json
import os
import pathlib
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
from processes import BAD_AT

HERE = pathlib.Path(__file__).parent
STEPS = 6
BOUND = 240  # seconds within which nothing may hang


def start(processes, folder, killed_at=0, killed=1):
    """Starts processes of two devices each, which listen on this machine alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
    }
    before = [str(port), str(processes)]
    after = [str(folder), str(STEPS), str(killed_at), str(killed)]
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / "processes.py"), *before, str(number), *after],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for number in range(processes)
    ]


def finish(running):
    """Returns exit statuses and what was printed; what hangs is killed and fails the test."""
    said, begun = [], time.monotonic()
    try:
        for process in running:
            left = BOUND - (time.monotonic() - begun)
            said.append(process.communicate(timeout=max(left, 1)))
    finally:
        for process in running:
            process.kill()
    return [process.returncode for process in running], said


def ends(said):
    return json.loads(said[0][0].splitlines()[-1])


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process comes to."""
    codes, said = finish(start(1, tmp_path_factory.mktemp("alone")))
    assert codes == [0], said
    return ends(said)


def near(found, right):
    assert found["skipped"] == right["skipped"] == 1
    np.testing.assert_allclose(found["losses"], right["losses"][-len(found["losses"]) :], rtol=1e-4)
    for a, b in zip(found["leaves"], right["leaves"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("processes", [2, 4])
def test_processes_train_as_one_does(processes, alone, tmp_path):
    codes, said = finish(start(processes, tmp_path))
    assert codes == [0] * processes, said
    losses = ends(said)["losses"]
    assert np.isnan(losses).tolist() == [i == BAD_AT for i in range(STEPS)]
    near(ends(said), alone)


def test_the_first_which_the_others_know_each_other_by_may_be_killed_too(tmp_path):
    begun = time.monotonic()
    codes, said = finish(start(2, tmp_path, killed_at=2, killed=0))
    assert codes[0] == -9
    assert codes[1] != 0, said
    assert time.monotonic() - begun < BOUND


def test_one_that_is_killed_stops_the_others_and_all_go_on(alone, tmp_path):
    begun = time.monotonic()
    codes, said = finish(start(2, tmp_path, killed_at=5))
    assert codes[1] == -9
    assert codes[0] != 0, said
    assert time.monotonic() - begun < BOUND
    codes, said = finish(start(2, tmp_path))
    assert codes == [0, 0], said
    starts = {line for out, _ in said for line in out.splitlines() if line.startswith("from")}
    assert starts <= {"from 2", "from 4"}  # what was written when one died
    assert len(starts) == 1
    near(ends(said), alone)
