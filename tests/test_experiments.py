"""The main job: the network's sizes, the data, and the command line as its user meets it."""

import argparse
import gzip
import hashlib
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

from normax.experiments import __main__, compare, data, report
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
    def fetch(title, *, version, as_frame, data_home, n_retries, read_csv_kwargs):
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


def test_the_cache_of_openml_is_read(monkeypatch, tmp_path):
    pytest.importorskip("pandas")
    pixels = np.arange(20 * 28 * 28).reshape(20, -1) % 256
    rows = [f"{','.join(map(str, row))},{i % 10}" for i, row in enumerate(pixels)]
    names = [*(f"pixel{i}" for i in range(28 * 28)), "class"]
    kinds = ["numeric"] * 28 * 28 + ["{0,1,2,3,4,5,6,7,8,9}"]
    head = ["@relation mnist_784"]
    head += [f"@attribute {name} {kind}" for name, kind in zip(names, kinds, strict=True)]
    arff = "\n".join([*head, "@data", *rows]) + "\n"
    description = {
        "description": "",
        "id": "554",
        "name": "mnist_784",
        "version": "1",
        "status": "active",
    }
    description |= {
        "format": "ARFF",
        "url": "https://www.openml.org/data/v1/download/52667/mnist_784.arff",
    }
    description |= {"file_id": "52667", "default_target_attribute": "class"}
    description["md5_checksum"] = hashlib.md5(arff.encode()).hexdigest()
    features = [
        {
            "index": str(i),
            "name": name,
            "data_type": "nominal" if name == "class" else "numeric",
            "is_target": "true" if name == "class" else "false",
            "is_ignore": "false",
            "is_row_identifier": "false",
            "number_of_missing_values": "0",
        }
        for i, name in enumerate(names)
    ]
    listed = {"did": 554, "name": "mnist_784", "version": 1, "status": "active"}
    files = {
        "api/v1/json/data/list/data_name/mnist_784/limit/2/data_version/1": {
            "data": {"dataset": [listed]}
        },
        "api/v1/json/data/554": {"data_set_description": description},
        "api/v1/json/data/features/554": {"data_features": {"feature": features}},
        "api/v1/json/data/qualities/554": {"data_qualities": {"quality": []}},
        "data/v1/download/52667/mnist_784.arff": arff,
    }
    for name, content in files.items():
        path = tmp_path / "openml" / "openml.org" / f"{name}.gz"
        path.parent.mkdir(parents=True, exist_ok=True)
        text = content if isinstance(content, str) else json.dumps(content)
        path.write_bytes(gzip.compress(text.encode()))
    monkeypatch.setitem(data.OPENML, "mnist", (*data.OPENML["mnist"][:3], 12))
    training, test = data.load("mnist", 0, str(tmp_path))
    images = np.concatenate([training.image, test.image])
    assert (len(training.label), len(test.label)) == (12, 8)
    np.testing.assert_allclose(images.reshape(20, -1), pixels / 255, rtol=1e-6)
    np.testing.assert_array_equal(training.label, np.arange(12) % 10)


def test_a_corrupt_dataset_is_a_sentence(monkeypatch, capsys, tmp_path):
    def fetch(*args, **kwargs):
        raise ValueError("md5 checksum")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    assert main(["compare", "--dataset", "cifar10", "--out", str(tmp_path)]) == 2
    assert "cifar10 as openml.org gave it cannot be read (md5 checksum)" in capsys.readouterr().err


def test_an_unreachable_dataset_is_a_sentence(monkeypatch, capsys, tmp_path):
    def fetch(*args, **kwargs):
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(sklearn.datasets, "fetch_openml", fetch)
    assert main(["compare", "--dataset", "mnist", "--out", str(tmp_path)]) == 2
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
    command = f"compare --epochs 2 --limit 300 --norms batch none --out {out} --target 0.2"
    assert main(command.split()) == 0
    printed = capsys.readouterr().out
    assert "38,910 in all, 38,650 trainable, 260 not" in printed
    assert "gap: train minus test" in printed
    record = json.loads((out / "compare.json").read_text())
    assert list(record["results"]) == ["batch", "none"]
    assert record["arguments"]["limit"] == 300
    assert record["interrupted"] is False
    assert record["versions"]["jax"] == jax.__version__
    for result in record["results"].values():
        assert len(result["epochs"]) == 2
        assert result["step_ms"] > 0
        reached = [e["test_accuracy"] >= 0.2 for e in result["epochs"]]
        assert result["epochs_to_target"] == (reached.index(True) + 1 if any(reached) else None)
        gap = result["epochs"][-1]["train_accuracy"] - result["epochs"][-1]["test_accuracy"]
        assert result["generalization_gap"] == pytest.approx(gap)
    assert (out / "compare.png").read_bytes().startswith(b"\x89PNG")


def test_a_training_that_diverges_leaves_valid_json(tmp_path):
    command = f"compare --epochs 2 --limit 200 --norms none --learning-rate 1e30 --out {tmp_path}"
    assert main(command.split()) == 0

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    text = (tmp_path / "compare.json").read_text()
    result = json.loads(text, parse_constant=refuse)["results"]["none"]
    assert result["epochs"][-1]["train_loss"] is None


def test_a_step_that_compiles_is_not_timed(tmp_path):
    command = f"compare --epochs 1 --limit 64 --norms none --out {tmp_path}"
    assert main(command.split()) == 0
    result = json.loads((tmp_path / "compare.json").read_text())["results"]["none"]
    assert result["step_ms"] is None


def test_the_table_is_whole_on_a_narrow_terminal(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    epoch = {"train_accuracy": 1.0, "test_accuracy": 1.0}
    result = {
        "parameters": {"conv1": 260},
        "trainable": 260,
        "epochs": [epoch] * 12,
        "step_ms": 1234.5,
    }
    compare.summarize(result, 0.975)
    report.show({"instance": result}, 0.975, 360)
    printed = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in printed
    for cell in ("instance", "100.0", " 12 ", "1234.5", "to 0.975"):
        assert cell in printed


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
        ("--batch-size 1", "whole number above 1"),
        ("--seed -1", "from 0 to 2**32 - 1"),
        ("--seed 4294967296", "from 0 to 2**32 - 1"),
        ("--batch-size 5000", "is more than the 1437 images"),
        ("--limit 10", "is more than the 10 images"),
        ("--out /proc/nowhere", "cannot be written"),
        ("--checkpoint /proc/nowhere", "cannot be written"),
        ("--resume", "--resume needs --checkpoint DIR"),
    ],
)
def test_bad_arguments_get_a_sentence(arguments, sentence, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
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
        "from normax.experiments import study\n"
        "from normax.experiments.__main__ import main\n"
        "progress, seen = study.progress, []\n"
        "import contextlib\n"
        "@contextlib.contextmanager\n"
        "def interrupting(total, unit):\n"
        "    with progress(total, unit) as advance:\n"
        "        def then(text):\n"
        "            advance(text)\n"
        "            seen.append(text)\n"
        f"            len(seen) == 2 and os.kill(os.getpid(), {int(signal.SIGINT)})\n"
        "        yield then\n"
        "study.progress = interrupting\n"
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


def epochs_of(out):
    return json.loads((out / "compare.json").read_text())["results"]["batch"]["epochs"]


@pytest.mark.parametrize("stop", [3, 9, 11])
def test_what_was_stopped_goes_on_with_the_same_numbers(stop, tmp_path, capsys):
    """In an epoch, at its end, and behind it: of five steps each, of which each second is kept."""
    options = "--epochs 3 --limit 320 --norms batch --checkpoint-every 2 --out"
    command = ["compare", *options.split()]
    assert main([*command, str(tmp_path / "whole")]) == 0
    options = ["--checkpoint", str(tmp_path / "kept")]
    parser = argparse.ArgumentParser()
    compare.add_arguments(parser)
    given = parser.parse_args([*command[1:], str(tmp_path / "stopped"), *options])
    given.command, calls = "", []

    def check():
        calls.append(None)
        if len(calls) == stop:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        compare.run(given, check)
    again = [*command, str(tmp_path / "again"), *options]
    assert main(again) == 2
    assert "give --resume to go on" in capsys.readouterr().err
    assert main([*again, "--resume", "--seed", "5"]) == 2
    assert "was trained with --seed 0, not 5" in capsys.readouterr().err
    assert main([*again, "--resume"]) == 0
    assert epochs_of(tmp_path / "again") == epochs_of(tmp_path / "whole")
    assert (tmp_path / "kept" / "batch" / "15").is_dir()  # the last, which 2 does not divide
    assert main([*again, "--resume"]) == 0  # there is nothing left to do
    assert epochs_of(tmp_path / "again") == epochs_of(tmp_path / "whole")


def test_a_folder_of_nothing_to_go_on_with_is_said(tmp_path, capsys):
    command = f"compare --epochs 1 --limit 64 --norms layer --out {tmp_path} --checkpoint"
    assert main([*command.split(), str(tmp_path / "misspelt"), "--resume"]) == 0
    assert "misspelt/layer has no checkpoint: layer begins anew" in capsys.readouterr().out
    assert main([*command.split(), str(tmp_path / "misspelt"), "--resume"]) == 0
    assert "begins anew" not in capsys.readouterr().out


def test_a_bad_folder_is_refused_before_anything_is_trained(tmp_path, capsys):
    """Of the last network, too, and without a new one for the first."""
    kept = tmp_path / "kept"
    command = f"compare --epochs 1 --limit 64 --checkpoint-every 1 --checkpoint {kept} --out"
    assert main([*command.split(), str(tmp_path / "one"), "--norms", "layer"]) == 0
    capsys.readouterr()
    again = [*command.split(), str(tmp_path / "two"), "--norms", "batch,layer"]
    for more, message in (
        ([], "layer has checkpoints: give --resume"),
        (["--resume", "--learning-rate", "0.5"], "--learning-rate 0.003, not 0.5"),
    ):
        assert main([*again, *more]) == 2
        assert message in capsys.readouterr().err
    assert not list((kept / "batch").glob("[0-9]*"))


def test_an_interruption_before_the_first_epoch_is_no_traceback(monkeypatch, capsys, tmp_path):
    def load(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(data, "load", load)
    assert main(["compare", "--out", str(tmp_path)]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.parametrize(("arguments", "status"), [("", 2), ("--help", 0), ("compar", 2)])
def test_the_general_help_imports_no_flax(arguments, status):
    code = (
        "import sys\n"
        "from normax.experiments.__main__ import main\n"
        "try: status = main(sys.argv[1:])\n"
        "except SystemExit as stop: status = stop.code\n"
        "assert not {'flax', 'matplotlib', 'sklearn', 'rich'} & set(sys.modules)\n"
        "raise SystemExit(status)\n"
    )
    root = pathlib.Path(compare.__file__).parents[2]
    run = subprocess.run(
        [sys.executable, "-c", code, *arguments.split()],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(root)},
        check=False,
    )
    assert run.returncode == status, run.stderr
    assert "usage: python -m normax.experiments" in run.stdout + run.stderr


def test_a_result_that_cannot_be_written_is_known_before_the_work(tmp_path, capsys):
    (tmp_path / "compare.json").mkdir()
    assert main(["compare", "--out", str(tmp_path)]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_wrong_option_shows_the_options_of_the_study(capsys):
    with pytest.raises(SystemExit):
        main(["compare", "--bogus"])
    assert "[--batch-size BATCH_SIZE]" in capsys.readouterr().err


def test_a_missing_extra_is_a_sentence(monkeypatch, capsys):
    find_spec = __main__.find_spec
    monkeypatch.setattr(
        __main__, "find_spec", lambda name: None if name == "rich" else find_spec(name)
    )
    assert main(["compare"]) == 2
    assert 'needs rich: pip install "normax[experiments]"' in capsys.readouterr().err
