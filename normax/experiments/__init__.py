"""Studies to run from the command line: `python -m normax.experiments --help`."""
