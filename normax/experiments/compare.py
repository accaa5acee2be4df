"""Train one network with each normalizer on the same images, and measure what it changes."""

import argparse
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax import train
from normax.experiments import data, report, resume, study
from normax.experiments.network import NORMS, Network, count_parameters


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares the options of the study."""
    parser.description = __doc__
    add = parser.add_argument
    add("--dataset", choices=data.NAMES, default="digits")
    add("--data-home", help="folder of scikit-learn's cache, for mnist and cifar10")
    add("--norms", type=_norms, nargs="+", action="extend", help=f"of {','.join(NORMS)}")
    add("--epochs", type=study.positive_int, default=12)
    add("--batch-size", type=study.batch_size, default=64)
    add("--learning-rate", type=study.positive_float, default=0.003)
    add("--target", type=study.fraction, default=0.97, help="test accuracy to count the epochs to")
    add("--limit", type=study.positive_int, help="train on this many images only")
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--seed", type=study.seed, default=0)
    add("--out", type=pathlib.Path, default=pathlib.Path("results/compare"))
    resume.add_arguments(parser)


def run(options: argparse.Namespace, check: Callable[[], None]) -> int:
    """Trains, reports, and returns the exit status; an interruption keeps what was measured.

    Args:
      options: what the command line says.
      check: raises KeyboardInterrupt if Ctrl-C was pressed; called between steps.
    """
    named = options.norms or [list(NORMS)]
    options.norms = list(dict.fromkeys(norm for names in named for norm in names))
    resume.check(options)
    study.prepare(options.out, "compare")
    training, test = data.load(options.dataset, options.seed, options.data_home)
    training = data.Images(*(array[: options.limit] for array in training))
    if options.batch_size > len(training.label):
        raise data.UsageError(
            f"--batch-size {options.batch_size} is more than the {len(training.label)} images"
        )
    check_kept(training, options)
    results: dict[str, dict[str, Any]] = {}
    interrupted = False
    with study.progress(len(options.norms) * options.epochs, "epochs") as advance:
        try:
            for norm in options.norms:
                results[norm] = {"epochs": []}
                fit(norm, training, test, options, results[norm], advance, check)
        except KeyboardInterrupt:
            interrupted = True
    results = {norm: result for norm, result in results.items() if result["epochs"]}
    for result in results.values():
        summarize(result, options.target)
    record = {**study.record_of(options), "interrupted": interrupted}
    record["images"] = {"training": len(training.label), "test": len(test.label)}
    report.show(results, options.target, len(test.label))
    for path in study.write(options.out, "compare", {**record, "results": results}, report.draw):
        print(path)
    if interrupted:
        raise KeyboardInterrupt  # for the exit status
    return 0


def check_kept(training, options) -> None:
    """Refuses what cannot be gone on with, of any of the networks, before one is trained."""
    for norm in options.norms if options.checkpoint is not None else ():
        with resume.Kept(options, norm) as kept:
            if kept.has_begun():
                kept.start(initial(norm, training, options))
            elif options.resume:  # the folder may be misspelt
                print(f"{options.checkpoint / norm} has no checkpoint: {norm} begins anew")


def initial(norm, training, options) -> train.TrainState:
    """Returns a network before its training."""
    example = jnp.asarray(training.image[:2])
    steps = len(training.label) // options.batch_size
    schedule = optax.cosine_decay_schedule(options.learning_rate, steps * options.epochs)
    key = jax.random.key(options.seed)
    return train.TrainState.create(Network(norm), optax.adam(schedule), key, example, train=False)


def fit(norm, training, test, options, result, advance, check) -> None:
    """Trains one network, adding to `result` epoch by epoch."""
    with resume.Kept(options, norm) as kept:
        _fit(norm, training, test, options, result, advance, check, kept)


def _fit(norm, training, test, options, result, advance, check, kept):
    dtype = None if options.dtype == "float32" else jnp.dtype(options.dtype)
    state = initial(norm, training, options)
    result["parameters"] = count_parameters(state.variables)
    result["trainable"] = sum(int(leaf.size) for leaf in jax.tree.leaves(state.params))
    step = train.train_step(loss, dtype=dtype)
    evaluate = train.eval_step(loss, dtype=dtype)
    state, epochs = kept.start(state)
    result["epochs"] += epochs
    result["step_ms"] = None
    rng = np.random.default_rng(options.seed)
    times, done, count = [], int(state.step), 0
    for epoch in range(options.epochs):
        for batch in shuffled(training, options.batch_size, rng):
            count += 1
            if count <= done:
                continue  # seen before it was stopped
            start = time.perf_counter()
            state, metrics = step(state, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - start)
            kept.save(count, state, result["epochs"])
            check()
        if epoch < len(epochs):
            advance(f"{norm}: epoch {epoch + 1}, measured before")
            continue
        scores = {
            f"{split}_{name}": value
            for split, images in (("train", training), ("test", test))
            for name, value in measure(evaluate, state, images).items()
        }
        # The first step compiles and does not count; the rest are alike.
        result["step_ms"] = 1e3 * statistics.median(times[1:]) if times[1:] else None
        result["epochs"].append(scores)
        advance(f"{norm}: epoch {epoch + 1}, test accuracy {scores['test_accuracy']:.3f}")
        check()
    kept.save(count, state, result["epochs"], force=True)


def loss(model, batch, train):
    """Returns the cross entropy, and the accuracy."""
    logits = model(batch["image"], train=train)
    value = optax.softmax_cross_entropy_with_integer_labels(logits, batch["label"])
    right = logits.argmax(-1) == batch["label"]
    weight = batch["weight"] / batch["weight"].sum()
    return (value * weight).sum(), {"accuracy": weight.sum(where=right)}


def shuffled(images, size, rng):
    """Yields batches of one size in a new order; the few images left over wait for the next."""
    order = rng.permutation(len(images.label))
    for start in range(0, len(order) - size + 1, size):
        index = order[start : start + size]
        yield _batch(images.image[index], images.label[index], np.ones(size, np.float32))


def measure(evaluate, state, images, size=1024) -> dict[str, float]:
    """Returns loss and accuracy over all images, in batches of one size, the last one padded."""
    total, sums = len(images.label), {}
    size = min(size, total)
    for start in range(0, total, size):
        index = np.arange(start, start + size)
        weight = (index < total).astype(np.float32)
        index = np.minimum(index, total - 1)
        metrics = evaluate(state, _batch(images.image[index], images.label[index], weight))
        for name, value in metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value) * float(weight.sum())
    return {name: value / total for name, value in sums.items()}


def _batch(image, label, weight):
    return {"image": image, "label": label, "weight": weight}


def summarize(result: dict[str, Any], target: float) -> None:
    """Adds what the table shows: epochs to the target, and the generalization gap."""
    epochs, last = result["epochs"], result["epochs"][-1]
    reached = (i for i, scores in enumerate(epochs, start=1) if scores["test_accuracy"] >= target)
    result["epochs_to_target"] = next(reached, None)
    result["best_test_accuracy"] = max(scores["test_accuracy"] for scores in epochs)
    result["generalization_gap"] = last["train_accuracy"] - last["test_accuracy"]


def _norms(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    unknown = [name for name in names if name not in NORMS]
    if unknown or not names:
        raise argparse.ArgumentTypeError(f"expected some of {','.join(NORMS)}, got {text!r}")
    return names
