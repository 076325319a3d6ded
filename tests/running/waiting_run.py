"""``waiting_run.py run|resume|compare FILE DIRECTORY``: holds the directory, says so, waits for a line."""

import sys
from pathlib import Path

from fedexperts.config.load import load_config
from fedexperts.config.matrix import load_suite
from fedexperts.running.experiment import run_experiment
from fedexperts.running.progress import QuietProgress
from fedexperts.running.suite import compare


class Waiting(QuietProgress):
    """Stops at the first phase of the first run, where no more than config.toml is written."""

    is_waiting = True

    def phase(self, name):
        if Waiting.is_waiting:
            Waiting.is_waiting = False
            print("holds", flush=True)
            sys.stdin.readline()


def main(how, file, directory):
    if how == "compare":
        outcome = compare(load_suite(file), directory, lambda title: Waiting())
        assert not outcome.failed, outcome.failed
    else:
        run_experiment(load_config(file), directory, progress=Waiting(), resume=how == "resume")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
