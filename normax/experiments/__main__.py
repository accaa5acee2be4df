"""The command line: one subcommand a study."""

import argparse
import importlib
import sys
from importlib.util import find_spec

from normax.experiments import interrupt
from normax.experiments.data import UsageError

# A study is a module of this package with `add_arguments` and `run`.
STUDIES = {
    "compare": "train one network on images, plain and with five normalizers",
    "noise": "how far the statistics of a batch stray from those of the population",
    "regularization": "what that noise does to a loss, against zeta gamma^2",
    "teacher-student": "what linear students with weight or batch norm learn of a linear teacher",
    "gradients": "the gradient that reaches each layer of a deep network, with each normalizer",
    "landscape": "how a loss curves as it is trained, and how far activations shift in a step",
    "convergence": "epochs to an accuracy, with and without batch norm, by learning rate",
    "generalization": "validation minus training loss, with batch norm, weight norm and dropout",
    "batch-size": "gamma^2 and test error by size of batch, batch norm layer by layer",
    "conditioning": "how unevenly least squares curves before and after scaling",
    "statements": "the small statements of the theory, each beside what it claims",
}
NEEDED = ("matplotlib", "rich", "scipy", "sklearn")
INTERRUPTED = 130


def main(arguments: list[str] | None = None) -> int:
    """Runs a study and returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="python -m normax.experiments", description=__doc__)
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    parsers = {name: studies.add_parser(name, help=text) for name, text in STUDIES.items()}
    chosen = arguments[0] if arguments and arguments[0] in STUDIES else None
    if chosen is None:
        parser.parse_args(arguments)  # prints the help or the error, and exits
        return 2
    if missing := [name for name in NEEDED if find_spec(name) is None]:
        return _complain(chosen, f'needs {", ".join(missing)}: pip install "normax[experiments]"')
    try:
        with interrupt.deferred() as check:
            # Only now, so that a general --help does not wait for the libraries.
            study = importlib.import_module(module_of(chosen))
            study.add_arguments(parsers[chosen])
            options = parsers[chosen].parse_args(arguments[1:])
            options.command = " ".join(["python -m normax.experiments", *arguments])
            return study.run(options, check)
    except UsageError as error:
        return _complain(chosen, str(error))
    except KeyboardInterrupt:
        _complain(chosen, "interrupted")
        return INTERRUPTED


def module_of(name: str) -> str:
    """Returns the module of a study."""
    return f"normax.experiments.{name.replace('-', '_')}"


def _complain(study, sentence):
    print(f"python -m normax.experiments {study}: {sentence}", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
