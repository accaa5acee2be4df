"""Checkpoints: training goes on with the same bits; what is damaged or another is refused."""

import math
import os
import pathlib
import shutil
import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_train import KINDS, X, Y, create

from normax import train
from normax.checkpoint import Checkpoints

pytestmark = pytest.mark.usefixtures("optax_promotes")
HERE = pathlib.Path(__file__).parent


def python(script, *arguments):
    """Runs a script of this folder in a process of its own."""
    return subprocess.run(
        [sys.executable, str(HERE / script), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=240,
    )


def same(a, b):
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.dtype == y.dtype
        assert bool((x == y).all())


@KINDS
@pytest.mark.parametrize("microbatches", [1, 4])
def test_training_goes_on_with_the_same_bits(kind, microbatches, tmp_path):
    state, loss = create(kind, rate=0.3)
    step = train.train_step(loss, microbatches=microbatches)
    with Checkpoints(tmp_path, every=2) as checkpoints:
        for i in range(1, 7):
            state, _ = step(state, (X, Y))  # what was saved is donated while it is written
            taken = checkpoints.save(i, state, position={"batch": i, "names": ["a", None]})
            assert taken == (i % 2 == 0)
            if i == 4:
                checkpoints.wait()
                break
        for _ in range(3):
            state, metrics = step(state, (X, Y))
    again = create(kind, rate=0.3)[0].replace(key=jax.random.key(9))
    with Checkpoints(tmp_path) as checkpoints:
        again, position = checkpoints.restore(again)
    assert position == {"batch": 4, "names": ["a", None]}
    assert int(again.step) == 4
    for _ in range(3):
        again, others = step(again, (X, Y))
    same(again, state)
    same(metrics, others)


def test_the_last_step_is_saved_though_it_is_not_time_to(tmp_path):
    with Checkpoints(tmp_path, every=10) as checkpoints:
        calls = (10, False), (13, False), (14, True), (14, True)
        taken = [checkpoints.save(i, {"w": jnp.full(2, i)}, force=force) for i, force in calls]
        assert taken == [True, False, True, False]
        found, _ = checkpoints.restore({"w": jnp.zeros(2, jnp.int32)})
    np.testing.assert_array_equal(found["w"], 14)


def test_training_does_not_wait_for_what_is_written(tmp_path, monkeypatch):
    go, rename = threading.Event(), os.rename

    def held(*paths, **options):
        assert go.wait(60)
        return rename(*paths, **options)

    state, loss = create("linen", rate=0.3)
    step = train.train_step(loss)
    state, _ = step(state, (X, Y))
    saved = jax.tree.map(jnp.copy, state)
    with Checkpoints(tmp_path) as checkpoints:
        monkeypatch.setattr(os, "rename", held)  # what ends the writing of a file or folder
        assert checkpoints.save(1, state)
        for _ in range(3):
            state, _ = step(state, (X, Y))
        assert not (tmp_path / "1").exists()
        go.set()
        checkpoints.wait()
        assert (tmp_path / "1").exists()
        back, _ = checkpoints.restore(state)
    same(*(s.replace(key=jax.random.key_data(s.key)) for s in (back, saved)))


def test_the_last_and_the_best_are_kept(tmp_path):
    options = {"keep": 2, "best": "loss"}
    with Checkpoints(tmp_path, **options) as checkpoints:
        for i, loss in enumerate([5.0, 1.0, 3.0, 4.0], start=1):
            checkpoints.save(i, {"w": jnp.full(2, i)}, metrics={"loss": jnp.float32(loss)})
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 3, 4], 2)
    with Checkpoints(tmp_path, **options) as checkpoints:
        assert (checkpoints.steps(), checkpoints.best_step()) == ([2, 3, 4], 2)
        checkpoints.save(5, {"w": jnp.full(2, 5)}, metrics={"loss": 0.5})
        checkpoints.save(6, {"w": jnp.full(2, 6)}, metrics={"loss": 9.0})
        checkpoints.save(7, {"w": jnp.full(2, 7)}, metrics={"loss": 9.0})
        checkpoints.wait()
        assert (checkpoints.steps(), checkpoints.best_step()) == ([5, 6, 7], 5)
        best, _ = checkpoints.restore({"w": jnp.zeros(2, jnp.int32)}, checkpoints.best_step())
        np.testing.assert_array_equal(best["w"], [5, 5])
        with pytest.raises(ValueError, match="metrics with 'loss'"):
            checkpoints.save(8, {"w": jnp.zeros(2)}, metrics={"accuracy": 1.0})
    most = Checkpoints(tmp_path / "most", best="accuracy", mode="max")
    with most as checkpoints:
        for i, value in enumerate([0.5, 0.9, 0.7], start=1):
            checkpoints.save(i, {"w": jnp.zeros(2)}, metrics={"accuracy": value})
        checkpoints.wait()
        assert checkpoints.steps() == [2, 3]


def test_metrics_that_are_damaged_are_named(tmp_path):
    state, options = {"w": jnp.ones(2)}, {"keep": 3, "best": "loss"}
    with Checkpoints(tmp_path, **options) as checkpoints:
        for step, loss in enumerate([1.0, math.nan, 2.0], start=1):
            checkpoints.save(step, state, metrics={"loss": loss, "other": 1.0})
        assert checkpoints.best_step() == 1
        checkpoints.restore(state, 2)
    with Checkpoints(tmp_path, best="accuracy") as checkpoints:  # which none has
        assert checkpoints.steps() == [1, 2, 3]
    file = tmp_path / "3" / "metrics" / "metrics"
    sound = file.read_text()
    file.write_text(sound.replace("2.0", "0.5"))
    with pytest.raises(ValueError, match=r"step 3 .* its metrics are .*0\.5.* were .*2\.0"):
        Checkpoints(tmp_path, **options)
    file.write_text(sound[:5])
    with pytest.raises(ValueError, match=r"expected .*3/metrics/metrics as it was written"):
        Checkpoints(tmp_path, **options)
    shutil.rmtree(tmp_path / "3")
    with Checkpoints(tmp_path, **options) as checkpoints:
        assert checkpoints.best_step() == 1


@pytest.mark.parametrize("order", [1, -1])
def test_killed_while_it_deletes_an_old_one_it_goes_on(order, tmp_path):
    """At each file: those of a folder go in any order."""
    state, options = {"w": jnp.ones(2)}, {"keep": 2, "best": "loss"}
    with Checkpoints(tmp_path / "whole", **options) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, metrics={"loss": -step})
    files = [path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole/1").rglob("*")]
    for gone in range(1, len(files) + 1):
        folder = tmp_path / str(gone)
        shutil.copytree(tmp_path / "whole", folder)
        for path in sorted(files)[::order][:gone]:
            if (folder / path).is_dir():
                shutil.rmtree(folder / path)
            else:
                (folder / path).unlink(missing_ok=True)
        with Checkpoints(folder, **options) as checkpoints:
            checkpoints.restore(state)
            assert checkpoints.best_step() == 2
            checkpoints.save(3, state, metrics={"loss": -3.0})
            checkpoints.save(4, state, metrics={"loss": -4.0})
            checkpoints.wait()
            assert checkpoints.steps() == [3, 4]


def test_what_is_being_written_is_no_metric(tmp_path):
    left = tmp_path / "7.orbax-checkpoint-tmp" / "metrics"
    left.mkdir(parents=True)
    (left / "metrics").touch()
    with Checkpoints(tmp_path, best="loss") as checkpoints:
        assert checkpoints.steps() == []


def test_arrays_come_back_where_they_are_to_be(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spread, whole = (NamedSharding(mesh, spec) for spec in (P("data"), P()))
    value = jnp.arange(16.0).reshape(8, 2)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"a": value, "b": jax.device_put(value, spread)})
        like = {"a": jax.device_put(0 * value, spread), "b": jax.device_put(0 * value, whole)}
        found, _ = checkpoints.restore(like)
    for name in ("a", "b"):
        assert found[name].sharding.is_equivalent_to(like[name].sharding, 2)
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda s: {**s, "more": s["w"]}, ValueError, "more"),
        (lambda s: {"w": s["w"], "n": {}}, ValueError, "n/b"),
        (lambda s: {**s, "w": s["w"].T}, ValueError, r"w .*\(3, 2\).*\(2, 3\)"),
        (lambda s: {**s, "w": s["w"].astype("bfloat16")}, TypeError, "w .*bfloat16.*float32"),
        (lambda s: {**s, "n": {"b": s["n"]["b"].astype("int32")}}, TypeError, "n/b.*int32"),
    ],
)
def test_another_structure_shape_or_dtype_is_refused_by_name(change, error, message, tmp_path):
    state = {"w": jnp.ones((2, 3)), "n": {"b": jnp.ones(4)}}
    like = change(state)
    before = jax.tree.map(np.array, like)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
        with pytest.raises(error, match=message):
            checkpoints.restore(like)
        jax.tree.map(np.testing.assert_array_equal, like, before)


def test_what_is_not_there_is_said(tmp_path):
    with Checkpoints(tmp_path / "none") as checkpoints:
        with pytest.raises(FileNotFoundError, match=r"expected a checkpoint in .*none"):
            checkpoints.restore({"w": jnp.ones(2)})
        checkpoints.save(3, {"w": jnp.ones(2)})
        with pytest.raises(FileNotFoundError, match=r"of step 2 in .*has \[3\]"):
            checkpoints.restore({"w": jnp.ones(2)}, 2)
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=r"a folder, got the file .*/file$"):
        Checkpoints(tmp_path / "file")
    for options in ({"every": 0}, {"keep": 0}, {"mode": "least"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            Checkpoints(tmp_path, **options)


def test_a_damaged_file_is_refused_or_does_not_matter(tmp_path):
    """Whatever byte it is: no other numbers come back than those that were saved."""
    said = python("damaged.py", tmp_path)
    assert said.returncode == 0, said.stderr
    lines = said.stdout.splitlines()
    assert {line.split(" | ")[0] for line in lines} == {"refused", "right"}, lines
    refused = [line for line in lines if line.startswith("refused")]
    assert len(refused) > len(lines) // 4, lines


def test_a_checksum_tells_what_orbax_does_not(tmp_path):
    """Numbers that were put in the place of others, by the same library."""
    import orbax.checkpoint as ocp

    state = {"w": jnp.arange(6.0), "b": jnp.ones(3)}
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, state)
    arrays = tmp_path / "1" / "arrays"
    shutil.rmtree(arrays)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(arrays, {**state, "w": state["w"].at[3].set(3.0000002)})
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(ValueError, match="w is not what"):
        checkpoints.restore(state)


def run(folder, seconds, steps=200):
    return python("interrupted.py", folder, steps, seconds)


def test_killed_at_twenty_points_it_ends_with_the_same_bits(tmp_path):
    whole = run(tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    rng, starts = np.random.default_rng(0), []
    for _ in range(20):
        said = run(tmp_path / "killed", rng.uniform(0.01, 0.8))
        starts.append(int(said.stdout.split()[1]))
        if said.returncode == 0:
            shutil.rmtree(tmp_path / "killed")
        else:
            assert said.returncode == -9, said.stderr
    last = run(tmp_path / "killed", 0)
    assert last.stdout.splitlines()[-1] == whole.stdout.splitlines()[-1], last.stderr
    assert len(set(starts)) > 1, starts  # it went on from several places


def test_what_cannot_come_back_is_refused_when_it_is_saved(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        with pytest.raises(ValueError, match="different names"):
            checkpoints.save(1, {"a/b": jnp.zeros(2), "a": {"b": jnp.ones(2)}})
        for value in (np.int64(2**40), np.arange(3.0)):
            with pytest.raises(TypeError, match=r"n of a dtype that is kept, got .*64, of which"):
                checkpoints.save(1, {"n": value})
        for dtype in ("uint4", "float8_e4m3"):
            with pytest.raises(TypeError, match=f"got {dtype}, which TensorStore has not"):
                checkpoints.save(1, {"n": jnp.ones(3, dtype)})
        for metric in (jnp.ones(2), None):
            with pytest.raises(TypeError, match=r"metrics\['loss'\] to be a Python number, got"):
                checkpoints.save(1, {"w": jnp.ones(3)}, metrics={"loss": metric})
        assert checkpoints.steps() == []


@pytest.mark.parametrize(
    "state", [{}, {"none": jnp.zeros((0, 3))}, {"none": jnp.zeros((0, 3)), "some": jnp.ones(2)}]
)
def test_arrays_of_no_entries_come_back(state, tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.save(1, state, position=7)
        found, position = checkpoints.restore(state)
        assert position == 7
        jax.tree.map(np.testing.assert_array_equal, found, state)
        for shape in ((0, 2), (1, 3)):
            with pytest.raises(ValueError, match="none"):
                checkpoints.restore({**state, "none": jnp.zeros(shape)})


def test_random_keys_of_another_kind_are_refused(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"key": jax.random.key(0, impl="rbg")})
        with pytest.raises(TypeError, match="key to be 'unsafe_rbg' as a random key, got 'rbg'"):
            checkpoints.restore({"key": jax.random.key(0, impl="unsafe_rbg")})


def test_an_older_one_is_gone_on_with(tmp_path):
    with Checkpoints(tmp_path, keep=3) as checkpoints:
        for step in (10, 20, 30):
            checkpoints.save(step, {"w": jnp.full(2, step)})
        checkpoints.restore({"w": jnp.zeros(2, jnp.int32)}, 20)
        for step in (10, 25, 30):
            with pytest.raises(ValueError, match=f"after the last, 30, or .* deleted, got {step}"):
                checkpoints.save(step, {"w": jnp.zeros(2, jnp.int32)})
        checkpoints.delete(30)
        assert checkpoints.save(25, {"w": jnp.full(2, 25)})
        assert checkpoints.save(30, {"w": jnp.full(2, 31)})
        assert not checkpoints.save(30, {"w": jnp.full(2, 32)})
        found, _ = checkpoints.restore({"w": jnp.zeros(2, jnp.int32)})
        np.testing.assert_array_equal(found["w"], 31)


def test_who_reads_disturbs_nobody_who_writes(tmp_path):
    large = {"w": jnp.ones(2**22)}
    with Checkpoints(tmp_path) as writer:
        writer.save(1, large)
        with Checkpoints(tmp_path) as reader:
            reader.steps()
        writer.wait()
        assert writer.steps() == [1]
    left = tmp_path / "7.orbax-checkpoint-tmp"
    left.mkdir()
    with Checkpoints(tmp_path) as writer:
        assert left.exists()
        writer.save(2, large)
        assert not left.exists()


def test_what_was_free_to_move_is_still(tmp_path):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(jnp.ones(8), NamedSharding(mesh, P("data")))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(1, {"w": jnp.full(1, 2.0)})
        found, _ = checkpoints.restore({"w": jnp.zeros(1)})
    np.testing.assert_array_equal(jax.jit(jnp.multiply)(x, found["w"]), 2 * np.ones(8))
