"""One way down: which module may import which, read from the source."""

import ast
import re
from pathlib import Path

import pytest

import fedexperts
from fedexperts.algorithms import ALGORITHMS

ROOT = Path(fedexperts.__file__).parent

ROWS = (
    ("__main__",),
    ("cli", "api_reference"),
    ("toolbox",),
    ("api",),
    ("running.suite",),
    ("running.search", "config.reference"),
    ("federation.flower_server", "federation.flower_client", "federation.flower_worker"),
    ("federation.flower_answers",),
    ("federation.flower_site",),
    ("running", "plan", "pretrain"),
    ("federation.flower_link",),
    ("federation.flower_launch",),
    ("running.result", "running.workbench"),
    ("running.simulated",),
    ("config",),
    ("federation",),
    ("evaluation",),
    ("costs",),
    ("algorithms",),
    ("costs.room",),
    ("costs.work",),
    ("costs.devices", "costs.stopwatch"),
    ("costs.depth",),
    ("costs.dry_run",),
    ("costs.known_shapes",),
    ("training",),
    ("models",),
    ("data", "moe"),
    ("messages", "disk_tensors"),
    ("tensors",),
    ("doctor",),
    ("integrity",),
    ("site_seals",),
    ("client_folder", "releases"),
    ("seals",),
    (
        "running.environment",
        "running.progress",
        "run_directory",
        "process_memory",
        "processes",
        "seeds",
        "shared_file",
    ),
    ("plugins",),
    ("errors",),
)
"""A module imports lower rows and its own package; of two names that fit a module the longer counts."""

REPORT_MAY_IMPORT = {"report", "run_directory", "seals", "errors"}
ABOVE_REPORT = {
    "api",
    "cli.commands",
    "running.checking",
    "running.predicted_clock",
    "running.predicted_roles",
    "running.suite",
    "running.tensorboard",
}
"""The command line and the API make reports; a check shows its tables as the report's are shown; TensorBoard
gets the numbers that a report reads."""


def module_of(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def imports_of(tree, *, top_only=False):
    """(module, names) of every import; with ``top_only`` those that run when the module is imported."""
    nodes = tree.body if top_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.ImportFrom):
            yield node.module or "", tuple(alias.name for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from ((alias.name, ()) for alias in node.names)


TREES = {module_of(path): ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}


def own(name):
    """``moe.seam`` for ``fedexperts.moe.surgery.seam``; None for what is not ours."""
    return name.removeprefix("fedexperts").removeprefix(".") if name.split(".")[0] == "fedexperts" else None


def place(module):
    """Row and the name in it that fits the module best."""
    fitting = [
        (len(name), row, name)
        for row, names in enumerate(ROWS)
        for name in names
        if f"{module}.".startswith(f"{name}.")
    ]
    assert fitting, f"{module} is in no row: give it a place in ROWS"
    _, row, name = max(fitting)
    return row, name


OURS = sorted(module for module in TREES if module and module.split(".")[0] not in {"report", "assets"})


@pytest.mark.parametrize("module", OURS)
def test_a_module_imports_downwards_only(module):
    row, name = place(module)
    for imported, _ in imports_of(TREES[module]):
        target = own(imported)
        if target and target.split(".")[0] != "report":
            other_row, other_name = place(target)
            assert other_row > row or other_name == name, f"{module} imports {target}"
        elif target:
            assert module in ABOVE_REPORT, f"{module} imports {target}"


def test_every_name_in_the_rows_is_a_module():
    assert [name for names in ROWS for name in names if name not in TREES] == []


def test_report_reads_run_directories_and_nothing_else():
    for module, tree in TREES.items():
        if module.split(".")[0] == "report":
            targets = {own(name).split(".")[0] for name, _ in imports_of(tree) if own(name)}
            assert targets <= REPORT_MAY_IMPORT, module


def test_no_module_takes_more_from_the_package_itself_than_its_version():
    for module, tree in TREES.items():
        if not module:
            continue
        names = {name for imported, names in imports_of(tree) if imported == "fedexperts" for name in names}
        assert names <= {"__version__"}, module


def reachable(module):
    """All of ours that are imported when ``module`` is."""
    seen, waiting = set(), [module]
    while waiting:
        current = waiting.pop()
        if current in TREES and current not in seen:
            seen.add(current)
            for imported, names in imports_of(TREES[current], top_only=True):
                if own(imported) is not None:
                    waiting += [own(imported), *(f"{own(imported)}.{name}" for name in names)]
                    waiting += [".".join(own(imported).split(".")[:1])]
    return seen


def importers_of(library, modules, *, top_only=False):
    return {
        module
        for module in modules
        for imported, _ in imports_of(TREES[module], top_only=top_only)
        if imported.split(".")[0] == library
    }


@pytest.mark.parametrize(
    ("module", "library"),
    [
        ("", "torch"),
        ("cli", "torch"),
        ("cli", "rich"),
        ("report.write", "torch"),
        ("report.write", "matplotlib"),
        ("running.progress", "torch"),
        ("run_directory", "torch"),
        ("running.experiment", "flwr"),
        ("running.suite", "flwr"),
        ("running.checking", "flwr"),
        ("running.export", "flwr"),
        ("config.load", "flwr"),
        ("running.experiment", "datasets"),
    ],
)
def test_importing_a_module_does_not_import_a_library(module, library):
    assert importers_of(library, reachable(module), top_only=True) == set()


def test_the_test_above_would_see_torch():
    assert "tensors" in importers_of("torch", reachable("running.experiment"), top_only=True)


def test_flower_stays_in_federation():
    assert {module.split(".")[0] for module in importers_of("flwr", TREES)} <= {"federation"}


def test_the_insides_of_transformers_stay_at_the_seam_and_in_models():
    for module, tree in TREES.items():
        inside = {name for name, _ in imports_of(tree) if name.startswith("transformers.")}
        public = {"transformers.utils"}
        assert inside <= public or module == "moe.surgery.seam" or module.startswith("models."), (
            module,
            inside,
        )


def test_imports_are_absolute_and_at_the_top():
    lazy = {"", "cli.commands"}
    for module, tree in TREES.items():
        inner = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        ours = [name for function in inner for name, _ in imports_of(function) if own(name) is not None]
        assert module in lazy or ours == [], module
        relative = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
        assert relative == [], module


METHODS = {name: cls.__module__.rpartition(".")[2] for name, cls in ALGORITHMS.items()}
NAMED_ELSEWHERE = {
    "plan.settings": {"flex", "flux"},
    "api": {"fedavg"},
    "report.pairing": {"local_graft", "local_only", "fedavg"},
}
"""Methods that a plan is made for and suggests, the one that loading a model without any takes, and the
simple rivals that a report compares with."""


def texts_in(tree):
    return {
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    }


def test_a_method_is_one_file_one_line_and_one_page():
    """No other file of the package names a method or imports its module, so a new one changes none."""
    docs = ROOT.parents[1] / "docs" / "algorithms"
    pages = {page.stem: page.read_text() for page in docs.glob("*.md")}
    for module, tree in TREES.items():
        if module.split(".")[0] != "algorithms":
            imported = {(own(name) or "").removeprefix("algorithms.") for name, _ in imports_of(tree)}
            assert not imported & set(METHODS.values()), module
            assert texts_in(tree) & set(METHODS) <= NAMED_ELSEWHERE.get(module, set()), module
    registry = (ROOT / "algorithms" / "__init__.py").read_text()
    for name, module in METHODS.items():
        assert f"algorithms.{module}" in TREES, f"{name} has no file"
        assert len(re.findall(rf'^    "{name}": ', registry, re.MULTILINE)) == 1, (
            f"{name} has no line of its own"
        )
        assert any(re.search(rf"\b{name}\b", text) for text in pages.values()), f"{name} is on no page"
