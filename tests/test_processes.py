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
BOUND = 240  # seconds within which all is done
TOLD = 60  # within which a death is told of; by itself JAX takes 100


def start(processes, folder, *options, program="processes.py"):
    """Starts processes of two devices each, which listen on this machine alone."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=2",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
    }
    before = [str(port), str(processes)]
    return [
        subprocess.Popen(
            [sys.executable, str(HERE / program), *before, str(number), str(folder), *options],
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


def train(processes, folder):
    return finish(start(processes, folder, str(STEPS), "0", "0", "killed"))


def train_until(ended, how, folder, ended_at):
    """Trains by two processes, of which one ends early, and holds the other to end soon after."""
    running = start(2, folder, str(STEPS), str(ended_at), str(ended), how)
    code = running[ended].wait(BOUND)
    assert code == -9 if how == "killed" else code
    begun = time.monotonic()
    codes, said = finish(running)
    assert time.monotonic() - begun < TOLD
    assert codes[1 - ended] != 0, said
    assert how == "killed" or "RuntimeError: this process alone" in said[ended][1], said


def hold_dealt_out(processes, folder, act):
    """Returns the lines that processes say of an array of which each holds a part."""
    codes, said = finish(start(processes, folder, act, program="dealt_out.py"))
    assert codes == [0] * processes, said
    lines = [line for out, _ in said for line in out.splitlines()]
    return [line.removeprefix("found ") for line in lines if line.startswith("found ")]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process comes to."""
    codes, said = train(1, tmp_path_factory.mktemp("alone"))
    assert codes == [0], said
    return ends(said)


def near(found, right):
    assert found["skipped"] == right["skipped"] == 1
    np.testing.assert_allclose(found["losses"], right["losses"][-len(found["losses"]) :], rtol=1e-4)
    for a, b in zip(found["leaves"], right["leaves"], strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)


def test_processes_train_as_one_does(alone, tmp_path):
    codes, said = train(4, tmp_path)
    assert codes == [0] * 4, said
    losses = ends(said)["losses"]
    assert np.isnan(losses).tolist() == [i == BAD_AT for i in range(STEPS)]
    near(ends(said), alone)


def test_the_first_which_the_others_know_each_other_by_may_be_killed_too(tmp_path):
    train_until(0, "killed", tmp_path, ended_at=2)


@pytest.mark.parametrize("how", ["killed", "raises"])
def test_one_that_ends_stops_the_others_and_all_go_on(how, alone, tmp_path):
    train_until(1, how, tmp_path, ended_at=5)
    codes, said = train(2, tmp_path)
    assert codes == [0, 0], said
    starts = {line for out, _ in said for line in out.splitlines() if line.startswith("from")}
    assert starts <= {"from 2", "from 4"}  # what was written when one died
    assert len(starts) == 1
    near(ends(said), alone)


@pytest.mark.parametrize(("writers", "readers"), [(1, 2), (2, 1), (2, 2)])
def test_what_is_dealt_out_comes_back_to_any_number_of_processes(writers, readers, tmp_path):
    hold_dealt_out(writers, tmp_path, "save")
    assert hold_dealt_out(readers, tmp_path, "restore") == ["same"] * readers


def test_damage_to_what_several_processes_wrote_is_noticed(tmp_path):
    hold_dealt_out(2, tmp_path, "save")
    found = hold_dealt_out(1, tmp_path, "damage")
    assert found
    assert "other" not in found  # a bit of what no array is made of may be any
    assert any("w is not what was saved" in line for line in found)
