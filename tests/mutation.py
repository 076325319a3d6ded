"""Change the code at random places, and list the changes that no test notices.

    python -m tests.mutation --sample 10 --seed 0             # 10 of every file that is named below
    python -m tests.mutation moe/choosing evaluation/loss.py  # of these alone

mutmut makes the mutants, finds the tests that reach each function, and runs them. This module says which
tests may cover a package, draws the sample, and leaves out what cannot be noticed.
docs/design/0008-mutation.md has the results.
"""

import argparse
import ast
import collections
import difflib
import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from mutmut.mutation.file_mutation import mutate_file_contents

ROOT = Path(__file__).parents[1]
PACKAGE = Path("src/fedexperts")
WORKSPACE = Path("build/mutation")
NOTICED = {"killed", "timeout", "segfault", "suspicious"}
NEAREST_FIRST = '''

import itertools
import json
import os
from pathlib import Path

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Run the module's own tests first, then the fastest, and as many as take 20 seconds together."""
    recorded = Path("mutmut-stats.json")
    if recorded.exists() and not config.option.collectonly:
        seconds = json.loads(recorded.read_text())["duration_by_test"]
        own = "test_" + "".join(os.environ["MUTANT_UNDER_TEST"].split(".")[-2:-1])
        items.sort(key=lambda item: (item.path.stem != own, seconds.get(item.nodeid, 0)))
        together = itertools.accumulate(seconds.get(item.nodeid, 0) for item in items)
        del items[max(1, sum(total <= 20 for total in together)) :]
'''
"""Hook for the copy's conftest: a mutant is noticed within 20 seconds of the nearest tests, or not at all."""

COVERED_BY = {
    "algorithms": ["tests/algorithms", "tests/federation", "tests/test_own_algorithm.py"],
    "training": ["tests/training"],
    "federation": ["tests/federation", "tests/algorithms"],
    "moe/observing": ["tests/moe", "tests/evaluation", "tests/algorithms"],
    "moe/choosing": ["tests/moe", "tests/algorithms"],
    "moe/compressing": ["tests/moe", "tests/algorithms"],
    "moe/surgery": ["tests/moe", "tests/algorithms"],
    "data/partition.py": ["tests/data/test_partition.py"],
    "data/batches.py": ["tests/data/test_batches.py"],
    "evaluation": ["tests/evaluation", "tests/test_own_algorithm.py"],
}
"""Tests that may notice a change in a folder or file; mutmut finds out which of them reach a function."""

READ_SOURCE = ["tests/algorithms/test_aggregation.py::test_no_other_method_takes_a_mean_past_the_setting"]
"""Tests that read the code's text, which is another one in the copy whatever is changed."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One change of one function, under mutmut's name for it."""

    name: str
    path: Path
    before: str
    after: str

    def __str__(self) -> str:
        return f"{self.path}\n  - {self.before}\n  + {self.after}"


def can_be_noticed(mutant: Mutant) -> bool:
    """Return False for another wording of a message, another device, a looser ``zip`` and a type for mypy."""
    return _essence(mutant.before) != _essence(mutant.after)


def is_blunt(mutant: Mutant) -> bool:
    """Return True for a value replaced by None and for an argument left out, which mostly end in an error."""
    more_nones = mutant.after.count("None") > mutant.before.count("None")
    loses_not = mutant.before.count("not ") > mutant.after.count("not ")
    return more_nones or (len(mutant.after) + 2 < len(mutant.before) and not loses_not)


def _essence(line: str) -> str:
    line = re.sub(r"\"[^\"]*\"|'[^']*'", lambda text: '""' if " " in text[0] else text[0], line)
    line = re.sub(r'\b(strict|device)=("\w*"|[\w.]+),?|\.to\((None|[\w.]*device)\)', "", line)
    line = re.sub(r"\bcast\([^,]+,", "cast(", line)
    return re.sub(r"[\s,]", "", line)


def plain_functions(source: str) -> str:
    """Rewrite ``@wrap`` above a function as ``function = wrap(function)`` below it.

    mutmut leaves out every function that has a decorator other than staticmethod and classmethod.
    """
    lines = source.splitlines()
    tree = ast.parse(source)
    bodies = [tree.body, *(node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef))]
    functions = [node for body in bodies for node in body if isinstance(node, ast.FunctionDef)]
    for node in sorted(functions, key=lambda node: -node.lineno):
        wrappers = [ast.unparse(decorator) for decorator in node.decorator_list]
        if wrappers and wrappers not in (["staticmethod"], ["classmethod"]):
            wrapped = "".join(f"{wrapper}(" for wrapper in wrappers) + node.name + ")" * len(wrappers)
            lines.insert(node.end_lineno, f"{' ' * node.col_offset}{node.name} = {wrapped}")
            del lines[node.decorator_list[0].lineno - 1 : node.lineno - 1]
    return "\n".join(lines) + "\n"


def mutants_of(path: Path) -> list[Mutant]:
    """Return all mutants of a file, given by its path below the package."""
    source = plain_functions((ROOT / PACKAGE / path).read_text())
    mutated = mutate_file_contents(str(PACKAGE / path), source)
    lines = mutated.code.splitlines()

    def text(function: str) -> list[str]:
        span = mutated.line_span_by_function_name[function]
        name = function.partition("__mutmut_")[0]
        return [line.replace(function, name).strip() for line in lines[span.start - 1 : span.end]]

    found = []
    for function in mutated.mutant_names:
        original = text(function.partition("__mutmut_")[0] + "__mutmut_orig")
        changed = [line for line in difflib.ndiff(original, text(function)) if line[0] in "-+"]
        before, after = (" ".join(line[2:] for line in changed if line[0] == sign) for sign in "-+")
        name = ".".join(["fedexperts", *path.with_suffix("").parts, function])
        found.append(Mutant(name=name, path=path, before=before, after=after))
    return found


def draw(paths: Iterable[Path], sample: int, seed: int) -> list[Mutant]:
    """Draw ``sample`` mutants of every file, or all where it has fewer; a file's draw is its own."""
    drawn = []
    for path in paths:
        all_of_file = [mutant for mutant in mutants_of(path) if can_be_noticed(mutant)]
        rng = random.Random(f"{seed} {path}")
        drawn += rng.sample(all_of_file, min(sample, len(all_of_file)))
    return drawn


def prepare(paths: Iterable[Path], tests: Iterable[str], workspace: Path) -> None:
    """Copy the repository, with what mutmut has to know; a copy with other files to mutate is of no use."""
    shutil.rmtree(workspace, ignore_errors=True)
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    files = subprocess.run(listed, cwd=ROOT, check=True, capture_output=True, text=True).stdout.splitlines()
    mutated = {str(PACKAGE / path) for path in paths}
    settings = {
        "source_paths": ["src"],
        "only_mutate": sorted(mutated),
        "pytest_add_cli_args": [f"--deselect={name}" for name in READ_SOURCE],
        "pytest_add_cli_args_test_selection": sorted(set(tests)),
        "also_copy": sorted({name.split("/")[0] for name in files} - {"src"}),
        "process_isolation": "forkserver",
        "use_git_change_detection": False,
    }
    for name in files:
        text = (ROOT / name).read_bytes()
        if name in mutated:
            text = plain_functions(text.decode()).encode()
        if name == "pyproject.toml":
            table = "".join(f"{key} = {json.dumps(value)}\n" for key, value in settings.items())
            text += f"\n[tool.mutmut]\n{table}".encode()
        if name == "tests/conftest.py":
            text += NEAREST_FIRST.encode()
        target = workspace / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text)


def run(mutants: list[Mutant], tests: Iterable[str], workspace: Path) -> dict[Mutant, str]:
    """Run the tests on each mutant; return mutmut's word on it, such as killed or survived."""
    prepare({mutant.path for mutant in mutants}, tests, workspace)
    mutmut = Path(sys.executable).with_name("mutmut")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    names = [mutant.name for mutant in mutants]
    subprocess.run(
        [mutmut, "run", "--max-children", "1", *names],
        cwd=workspace,
        env=environment,
        check=True,
        stdout=sys.stderr,
    )
    listed = subprocess.run(
        [mutmut, "results", "--all", "true"],
        cwd=workspace,
        env=environment,
        check=True,
        capture_output=True,
        text=True,
    )
    status = dict(line.strip().rsplit(": ", 1) for line in listed.stdout.splitlines() if ": " in line)
    return {mutant: status[mutant.name] for mutant in mutants}


def show(status: Mapping[Mutant, str]) -> None:
    """Print the mutants that no test noticed, and count those noticed by file and in all."""
    noticed, drawn = collections.Counter(), collections.Counter()
    for mutant, word in status.items():
        for row in (str(mutant.path), "all", *(() if is_blunt(mutant) else ("all but None and arguments",))):
            drawn[row] += 1
            noticed[row] += word in NOTICED
        if word not in NOTICED:
            print(f"{word}: {mutant}")
    for row, number in sorted(drawn.items()):
        print(f"{noticed[row]:4d} of {number:4d}  {noticed[row] / number:4.0%}  {row}")


def main() -> None:
    """Draw, run and show."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description=__doc__.splitlines()[0])
    parser.add_argument(
        "covered", nargs="*", help=f"files and folders of the package, in {', '.join(COVERED_BY)}"
    )
    parser.add_argument("--sample", type=int, default=10, help="mutants of each file")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    paths, tests = [], set()
    for asked in arguments.covered or COVERED_BY:
        covering = [
            folders
            for part, folders in COVERED_BY.items()
            if asked.startswith(part) or part.startswith(asked)
        ]
        place = ROOT / PACKAGE / asked
        if not covering or not place.exists():
            parser.error(f"{asked} is not in a part with known tests: {', '.join(COVERED_BY)}")
        found = sorted(place.rglob("*.py")) if place.is_dir() else [place]
        paths += [path.relative_to(ROOT / PACKAGE) for path in found if path.name != "__init__.py"]
        tests.update(*covering)
    show(run(draw(paths, arguments.sample, arguments.seed), tests, ROOT / WORKSPACE))


if __name__ == "__main__":
    main()
