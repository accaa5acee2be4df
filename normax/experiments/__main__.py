"""The command line: one subcommand a study."""

import argparse
import sys
from importlib.util import find_spec

STUDIES = {"compare": "train one network with six normalizers on images"}
NEEDED = ("matplotlib", "rich", "scipy", "sklearn")


def main(arguments: list[str] | None = None) -> int:
    """Runs a study and returns the exit status."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        print(
            f'normax.experiments needs {", ".join(missing)}: pip install "normax[experiments]"',
            file=sys.stderr,
        )
        return 2
    from normax.experiments import compare
    from normax.experiments.data import UsageError

    parser = argparse.ArgumentParser(prog="python -m normax.experiments", description=__doc__)
    studies = parser.add_subparsers(dest="study", required=True, metavar="STUDY")
    compare.add_arguments(studies.add_parser("compare", help=STUDIES["compare"]))
    options = parser.parse_args(arguments)
    try:
        return compare.run(options)
    except UsageError as error:
        print(f"{parser.prog} {options.study}: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
