"""What the comparison shows: its table and its figure."""

from typing import Any

# Okabe and Ito's colours, told apart by the colour-blind too; a dash and a marker for each.
STYLES = {
    "none": ("#777777", (0, (1, 1)), "x"),
    "batch": ("#0072B2", "-", "o"),
    "layer": ("#D55E00", "-", "s"),
    "group": ("#009E73", (0, (5, 1.5)), "^"),
    "instance": ("#CC79A7", (0, (4, 1, 1, 1)), "D"),
    "weight": ("#56B4E9", (0, (2, 1)), "v"),
}


def show(results: dict[str, dict[str, Any]], target: float, test_images: int) -> None:
    """Prints the parameter counts and the table of results."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    for norm, result in results.items():
        counts = result["parameters"]
        layers = ", ".join(f"{layer} {count:,}" for layer, count in counts.items())
        total, trainable = sum(counts.values()), result["trainable"]
        console.print(
            f"{norm}: {layers}; {total:,} in all, {trainable:,} trainable, "
            f"{total - trainable:,} not",
            highlight=False,
            soft_wrap=True,
        )
    longest = max((len(result["epochs"]) for result in results.values()), default=0)
    # As many epochs as fit, the last one always; a column of them is 8 wide, the others 45.
    room = max((console.width - 45) // 8, 1)
    shown = [i for i in range(longest) if longest <= room or i < room - 1 or i == longest - 1]
    table = Table(title="test accuracy after each epoch, in per cent")
    table.add_column("norm", no_wrap=True)
    headings = (*(f"{i + 1}" for i in shown), "best", f"to {target:.3g}", "gap", "ms")
    for heading in headings:
        table.add_column(heading, justify="right", no_wrap=True)
    for norm, result in results.items():
        epochs = result["epochs"]
        table.add_row(
            norm,
            *(f"{100 * epochs[i]['test_accuracy']:.1f}" if i < len(epochs) else "-" for i in shown),
            f"{100 * result['best_test_accuracy']:.1f}",
            str(result["epochs_to_target"] or "never"),
            f"{100 * result['generalization_gap']:.1f}",
            "-" if result["step_ms"] is None else f"{result['step_ms']:.1f}",
        )
    console.print(table)
    console.print(
        f"to {target:.3g}: epochs to that test accuracy; gap: train minus test accuracy at the "
        f"end, in per cent; ms: median time of a training step. One seed: an image of the "
        f"{test_images} is {100 / test_images:.2g} per cent, so a difference of a few is none",
        highlight=False,
        soft_wrap=True,
    )


def draw(figure: Any, record: dict[str, Any]) -> None:
    """Draws test accuracy and training loss by epoch, a labelled line for each normalizer."""
    accuracy, loss = figure.subplots(1, 2)
    for norm, result in record["results"].items():
        color, dashes, marker = STYLES[norm]
        epochs = range(1, len(result["epochs"]) + 1)
        style = {"color": color, "linestyle": dashes, "linewidth": 2, "label": norm}
        style |= {"marker": marker, "markersize": 4.5}
        accuracy.plot(epochs, [100 * e["test_accuracy"] for e in result["epochs"]], **style)
        loss.semilogy(epochs, [max(e["train_loss"], 1e-6) for e in result["epochs"]], **style)
    arguments = record["arguments"]
    lowest = min(
        100 * e["test_accuracy"] for result in record["results"].values() for e in result["epochs"]
    )
    accuracy.axhline(100 * arguments["target"], color="black", linewidth=0.8, alpha=0.5)
    accuracy.set(ylabel="test accuracy, %", ylim=(max(lowest - 1, 0), 100.3))
    loss.set(ylabel="training loss")
    for axes in (accuracy, loss):
        axes.set(xlabel="epoch")
        axes.xaxis.get_major_locator().set_params(integer=True)
    accuracy.legend(frameon=False, ncols=2, loc="lower right", title="normalization")
    figure.suptitle(
        f"{arguments['dataset']}, batch {arguments['batch_size']}, Adam at "
        f"{arguments['learning_rate']:g}, {arguments['dtype']}; "
        f"grey line: {arguments['target']:.0%}",
        fontsize=11,
    )
