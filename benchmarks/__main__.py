"""``python -m benchmarks [NAME ...]``: measure, show, write results and the figures of a document."""

import argparse
import json
import warnings
from pathlib import Path

import transformers
from rich.console import Console

from benchmarks.registry import BENCHMARKS, write_into
from benchmarks.setting import describe_machine, load_average
from benchmarks.tables import show

HERE = Path(__file__).resolve().parent
QUIET_LOAD = 0.7


def main() -> None:
    """Run what was asked for, one after the other."""
    options = _options()
    console = Console()
    _be_quiet()
    for name in options.names or BENCHMARKS:
        load = load_average()
        if load > QUIET_LOAD:
            console.print(f"load average is {load:.2f}: other processes run, and the figures will be poor")
        console.print(f"measuring {name} on {options.model} ...")
        benchmark = BENCHMARKS[name]
        figures = benchmark.measure(options.model, **(benchmark.quick if options.quick else {}))
        show(benchmark.tables(figures), console)
        record = {"name": name, "machine": describe_machine(load), "figures": figures}
        options.results.mkdir(parents=True, exist_ok=True)
        (options.results / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
        if options.docs is not None and not write_into(options.docs, name, record):
            console.print(f"{options.docs} has no marks for {name} and stays as it is")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"some of {', '.join(BENCHMARKS)}; all by default"
    )
    parser.add_argument("--model", default="tinyworld", help="model.name (default: the embedded checkpoint)")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the JSON files")
    parser.add_argument("--docs", type=Path, help="document whose marked figures are replaced, if any")
    parser.add_argument("--quick", action="store_true", help="only see that it works")
    options = parser.parse_args()
    for name in options.names:
        if name not in BENCHMARKS:
            parser.error(f"{name} is no benchmark; it must be one of {', '.join(BENCHMARKS)}")
    return options


def _be_quiet() -> None:
    """The rivals' warnings and bars say nothing about speed."""
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


if __name__ == "__main__":
    main()
