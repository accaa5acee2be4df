"""The main job: the network's sizes, the data, and the command line as its user meets it."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import types
import urllib.error

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import sklearn.datasets

from normax.experiments import compare, data
from normax.experiments.__main__ import main
from normax.experiments.network import NORMS, Network, count_parameters

pytestmark = pytest.mark.usefixtures("optax_promotes")


def variables(norm, shape=(2, 28, 28, 1)):
    return Network(norm).init(jax.random.key(0), jnp.zeros(shape), train=False)


def test_the_network_has_the_sizes_of_the_paper_s_summary():
    counts = count_parameters(variables("batch"))
    assert list(counts.values()) == [260, 40, 5020, 80, 32100, 400, 1010]
    assert sum(counts.values()) == 38_910
    params = variables("batch")["params"]
    trainable = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert (trainable, 38_910 - trainable) == (38_650, 260)


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("shape", [(2, 28, 28, 1), (2, 32, 32, 3)])
def test_every_network_runs(norm, shape):
    out = Network(norm).apply(variables(norm, shape), jnp.ones(shape), train=False)
    assert out.shape == (2, 10)


def test_the_digits_are_split_alike_for_one_seed():
    (train_x, train_y), (test_x, test_y) = data.load("digits", 3)
    assert train_x.shape == (1437, 28, 28, 1)
    assert test_x.shape == (360, 28, 28, 1)
    assert (train_x.min(), train_x.max()) == (0.0, 1.0)
    np.testing.assert_array_equal(np.bincount(train_y) > 135, True)
    again = data.load("digits", 3)[1]
    np.testing.assert_array_equal(again.image, test_x)
    assert not np.array_equal(data.load("digits", 4)[1].label, test_y)


@pytest.mark.parametrize(
    ("name", "number", "shape"),
    [("mnist", 70_000, (28, 28, 1)), ("cifar10", 60_000, (32, 32, 3))],
)
def test_openml_tables_become_images(monkeypatch, name, number, shape):
    def fetch(title, *, version, as_frame, data_home, n_retries, delay):
        assert (title, data_home) == (data.OPENML[name][0], "cache")
        width = int(np.prod(shape))
        table = np.broadcast_to(np.arange(number, dtype=np.uint16)[:, None] % 256, (number, width))
        labels = np.array([str(i % 10) for i in range(number)], object)
        return types.SimpleNamespace(data=table.astype(np.uint8), target=labels)

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    training, test = data.load(name, 0, "cache")
    assert training.image.shape == (data.OPENML[name][3], *shape)
    assert len(test.label) == 10_000
    assert training.image.dtype == np.float32
    assert training.label.dtype == np.int32
    assert training.label[13] == 3
    np.testing.assert_allclose(training.image[51], 0.2)


def test_an_unreachable_dataset_is_a_sentence(monkeypatch, capsys):
    def fetch(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    assert main(["compare", "--dataset", "mnist"]) == 2
    error = capsys.readouterr().err
    assert "openml.org cannot be reached" in error
    assert "--dataset digits" in error


def test_the_last_batch_of_an_evaluation_is_padded_and_not_counted():
    images = data.Images(np.zeros((5, 1, 1, 1), np.float32), np.arange(5))

    def evaluate(state, batch):
        assert len(batch["label"]) == 2
        return {"label": (batch["label"] * batch["weight"]).sum() / batch["weight"].sum()}

    assert compare.measure(evaluate, None, images, size=2) == {"label": 2.0}


def test_a_run_leaves_a_table_a_figure_and_the_numbers(tmp_path, capsys):
    out = tmp_path / "deep" / "folder"
    command = f"compare --epochs 2 --limit 300 --norms batch,none --out {out} --target 0.2"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "38,910 in all, 38,650 trainable, 260 not" in printed
    assert "train - test" in printed
    record = json.loads((out / "compare.json").read_text())
    assert list(record["results"]) == ["batch", "none"]
    assert record["arguments"]["limit"] == 300
    assert record["versions"]["jax"] == jax.__version__
    for result in record["results"].values():
        assert len(result["epochs"]) == 2
        assert result["step_ms"] > 0
        reached = [e["test_accuracy"] >= 0.2 for e in result["epochs"]]
        assert result["epochs_to_target"] == (reached.index(True) + 1 if any(reached) else None)
        gap = result["epochs"][-1]["train_accuracy"] - result["epochs"][-1]["test_accuracy"]
        assert result["generalization_gap"] == pytest.approx(gap)
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_bfloat16_learns_too(tmp_path):
    command = f"compare --norms batch --epochs 4 --dtype bfloat16 --out {tmp_path}"
    assert main(command.split()) == 0
    record = json.loads((tmp_path / "compare.json").read_text())
    assert record["results"]["batch"]["best_test_accuracy"] > 0.93


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("--epochs 0", "whole number above 0"),
        ("--norms spectral", "expected some of none,batch"),
        ("--norms ,", "expected some of none,batch"),
        ("--learning-rate -1", "a number above 0"),
        ("--learning-rate inf", "a number above 0"),
        ("--target 1.5", "at most 1"),
        ("--dataset imagenet", "invalid choice"),
        ("--batch-size 5000", "is more than the 1437 images"),
        ("--limit 10", "is more than the 10 images"),
        ("--out /proc/nowhere", "cannot be written"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments, sentence, capsys):
    try:
        status = main(["compare", *arguments.split()])
    except SystemExit as stop:
        status = stop.code
    assert status == 2
    assert sentence in capsys.readouterr().err


def test_an_interruption_leaves_what_was_measured(tmp_path):
    script = tmp_path / "interrupt.py"
    # The progress bar's second advance is where Ctrl-C falls.
    script.write_text(
        "import os, signal\n"
        "from normax.experiments import report\n"
        "from normax.experiments.__main__ import main\n"
        "progress, seen = report.progress, []\n"
        "import contextlib\n"
        "@contextlib.contextmanager\n"
        "def interrupting(total):\n"
        "    with progress(total) as advance:\n"
        "        def then(text):\n"
        "            advance(text)\n"
        "            seen.append(text)\n"
        f"            len(seen) == 2 and os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "        yield then\n"
        "report.progress = interrupting\n"
        f"raise SystemExit(main('compare --limit 200 --norms none,batch --out {tmp_path}'.split()))"
    )
    root = pathlib.Path(compare.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, str(script)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert run.returncode == 130, run.stderr
    assert "Traceback" not in run.stderr
    assert "interrupted" in run.stderr
    results = json.loads((tmp_path / "compare.json").read_text())["results"]
    assert len(results["none"]["epochs"]) == 2
    assert (tmp_path / "compare.png").exists()
