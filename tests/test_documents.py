"""The documents agree with the repository: links, paths, counts, settings and figures."""

import json
import re
import statistics
from functools import partial
from pathlib import Path

import pytest

from fedexperts.algorithms import ALGORITHMS
from fedexperts.config.load import load_config
from fedexperts.models.tiny import FAMILIES

ROOT = Path(__file__).parent.parent
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *ROOT.glob("experiments/*/README.md")])
LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)?(?:#([^)\s]+))?\)")
CODE_PATH = re.compile(r"`((?:\w+/)+\w+\.(?:py|md))`")


def name_of(page):
    return page.relative_to(ROOT).as_posix()


def anchors_of(page):
    titles = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_link_leads_to_a_file_and_a_heading(page):
    for path, anchor in LINK.findall(page.read_text()):
        target = page.parent / path if path else page
        assert target.exists(), path
        assert not anchor or anchor in anchors_of(target), f"{path}#{anchor}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_path_that_is_named_exists(page):
    roots = (ROOT, ROOT / "src/fedexperts", page.parent)
    paths = CODE_PATH.findall(page.read_text())
    assert [path for path in paths if not any((root / path).exists() for root in roots)] == []


def test_all_pages_give_one_number_of_families():
    told = {name_of(page): set(re.findall(r"(\d+) families", page.read_text())) for page in PAGES}
    assert {name: numbers for name, numbers in told.items() if numbers - {str(len(FAMILIES))}} == {}
    assert told["README.md"] == told["docs/families.md"] == {str(len(FAMILIES))}


def test_the_table_of_families_has_them_all():
    rows = re.findall(
        r"^\| `(\w+)` \| `\w+ForCausalLM`", (ROOT / "docs/families.md").read_text(), re.MULTILINE
    )
    assert rows == list(FAMILIES)


def test_the_readme_fits_its_length_and_names_every_method():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    methods = text[text.index("## Methods") : text.index("## Where things are")]
    assert set(ALGORITHMS) - set(re.findall(r"`(\w+)`", methods)) == set()


@pytest.mark.parametrize("page", ["README.md", "docs/algorithms/flex.md"])
def test_the_experiment_on_a_page_loads(page, tmp_path):
    (experiment,) = re.findall("```toml\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    (tmp_path / "mine.toml").write_text(experiment)
    assert isinstance(load_config(tmp_path / "mine.toml").algorithm, ALGORITHMS["flex"])


MEASURED = json.loads((ROOT / "experiments/methods/results.json").read_text())
METHODS = {run["name"].split("-")[1] for run in MEASURED}
FACTS = ["mean.own_facts_after", "mean.shared_facts_after", "mean.style_after"]
RETENTION = ["exam.personalised", "retention.exam_free.personalised", "retention.neutral_rougeL.personalised"]


def numbers_of(world, method, quantity):
    return [run["numbers"][quantity] for run in MEASURED if run["name"].startswith(f"{world}-{method}-seed-")]


def in_points(world, method, quantity):
    """Mean ± standard deviation over the seeds, as the pages write it."""
    own = [100 * number for number in numbers_of(world, method, quantity)]
    return f"{statistics.mean(own):.1f} ± {statistics.stdev(own):.1f}"


def upload_of(world, method):
    """Bytes of a client and round, which the results hold to six digits."""
    return {f"{size:.6g}" for size in numbers_of(world, method, "bytes.upload_per_client_round")}


def rows_of(page, start, end):
    """Cells of each row between two lines, by its method; bytes to six digits, as a set of one."""
    text = (ROOT / page).read_text()
    lines = text[text.index(start) : text.index(end)].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")]
    return {
        method.strip("`"): [*cells, {f"{float(size.removesuffix(' B').replace(',', '')):.6g}"}]
        for method, *cells, size in rows
    }


def test_the_readme_s_table_is_what_was_measured():
    columns = [("share", "mean.shared_facts_after"), ("both", "mean.shared_facts_after")]
    columns += [("disagree", "mean.rougeL_after")]
    assert rows_of("README.md", "## Results", "## Methods") == {
        method: [*(in_points(world, method, name) for world, name in columns), upload_of("both", method)]
        for method in METHODS
    }


@pytest.mark.parametrize(
    ("world", "start", "end"),
    [
        ("disagree", "**The houses disagree, and", "**The houses agree, and"),
        ("share", "**The houses agree, and", "**Both**"),
        ("both", "**Both**", "What they show:"),
    ],
)
def test_the_tables_of_the_three_worlds_are_what_was_measured(world, start, end):
    def cells(method):
        facts = ["–"] * 3 if world == "disagree" else [in_points(world, method, name) for name in FACTS]
        retention = [in_points(world, method, name) for name in RETENTION]
        return [
            "5",
            in_points(world, method, "mean.rougeL_after"),
            *facts,
            *retention,
            upload_of(world, method),
        ]

    assert rows_of("docs/results.md", start, end) == {method: cells(method) for method in METHODS}


FLUX = json.loads((ROOT / "experiments/flux/results.json").read_text())
ASYNCHRONOUS = json.loads((ROOT / "experiments/asynchronous/results.json").read_text())
PROMPT = json.loads((ROOT / "experiments/prompt_gate/results.json").read_text())
PLUS = json.loads((ROOT / "experiments/plus_gate/results.json").read_text())
CLOSED = json.loads((ROOT / "experiments/closed_gates/results.json").read_text())
EXTRACTION = json.loads((ROOT / "experiments/extraction/results.json").read_text())
EIGHT = json.loads((ROOT / "experiments/eight_clients/results.json").read_text())
GATE, GATE_START, GATE_STEPS = (
    json.loads((ROOT / f"experiments/{name}/results.json").read_text())
    for name in ("gate", "gate_start", "gate_steps")
)
FLUX_PARTS = json.loads((ROOT / "experiments/flux_parts/results.json").read_text())
MAP = json.loads((ROOT / "experiments/map/results.json").read_text())
MORE = json.loads((ROOT / "experiments/more_methods/results.json").read_text())
PARTS = json.loads((ROOT / "experiments/flex_parts/results.json").read_text())
PRIVACY = json.loads((ROOT / "experiments/privacy/results.json").read_text())


def seeds_of(measured, variant):
    """Return the numbers of a variant's runs."""
    return [run["numbers"] for run in measured if run["name"].startswith(f"{variant}-seed-")]


def told(runs, quantity, factor=100, digits=1):
    """Return mean ± standard deviation over the seeds that have a quantity, or nothing if none has it."""
    own = [factor * run[quantity] for run in runs if quantity in run]
    return f"{statistics.mean(own):.{digits}f} ± {statistics.stdev(own):.{digits}f}" if own else ""


def to_six_digits(cell):
    """Return a number of bytes as results hold it; any other cell as it is."""
    number = cell.removesuffix(" B")
    return cell if number == cell else f"{float(number.replace(',', '')):.6g}"


def flux_cells(method):
    """Return the cells after the memory."""
    runs = seeds_of(FLUX, method)
    turns = [{k.rpartition(".")[2]: s for k, s in run.items() if "seconds_by_phase" in k} for run in runs]
    transfers = [turn["download"] + turn["upload"] for turn in turns]
    work = [turn["total"] - transfer for turn, transfer in zip(turns, transfers, strict=True)]
    num_bytes = told(runs, "clock.bytes_to_target", 1e-6, 0)
    return [
        told(runs, "mean.rougeL_before"),
        told(runs, "mean.shared_facts_after"),
        told(runs, "retention.exam_free.personalised"),
        told(runs, "clock.seconds_to_target", 1, 3) or "never",
        f"{num_bytes} MB" if num_bytes else "–",
        f"{1000 * statistics.mean(work):.1f} ms",
        f"{1000 * statistics.mean(transfers):.0f} ms",
    ]


def flux_part_cells(variant):
    """Return the cells after what differs."""
    runs = seeds_of(FLUX_PARTS, variant)
    upload = statistics.mean(run["bytes.upload_per_client_round"] for run in runs)
    names = ("mean.rougeL_before", "mean.rougeL_after", *FACTS[:2], RETENTION[1])
    return [*(told(runs, name) for name in names), f"{upload / 1000:,.1f} kB"]


def closed_cells(measured, run):
    """Return the cells after what a run does; facts are asked for where some are shared."""
    runs = seeds_of(measured, run)
    facts = ["–"] * 2 if run.startswith("disagree") else [told(runs, name) for name in FACTS[:2]]
    return [told(runs, "mean.rougeL_after"), *facts, *(told(runs, name) for name in RETENTION)]


def test_the_map_s_table_is_what_was_measured():
    text = (ROOT / "docs/results.md").read_text()
    lines = text[text.index("## A map") : text.index("## The other methods")].splitlines()
    head, *rows = [
        [cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines if "| `" in line
    ]
    assert len(rows) * (len(head) - 2) * 3 == len(MAP)
    for cell, _, *scores in rows:
        examples, disagreement, share = cell.split("-")
        where = f"{examples}-disagreement-{disagreement}-common_share-{share}"
        for method, score in zip(head[2:], scores, strict=True):
            runs = seeds_of(MAP, f"{method}-examples_per_client-{where}")
            assert score == told(runs, "mean.rougeL_after"), (cell, method)


def more_cells(measured, method):
    """Return the cells after what travels, or what a run does."""
    runs = seeds_of(measured, method)
    upload = statistics.mean(run["bytes.upload_per_client_round"] for run in runs)
    names = ("mean.rougeL_after", *FACTS, *RETENTION[:2])
    return [*(told(runs, name) for name in names), f"{upload / 1000:,.1f} kB"]


def privacy_cells(variant):
    """Return the cells after the noise."""
    runs = seeds_of(PRIVACY, variant)
    names = (
        "mean.rougeL_before",
        "mean.rougeL_after",
        "mean.style_after",
        "retention.exam_free.personalised",
    )
    return [told(runs, name) for name in names]


def extraction_cells(run):
    """Return the cells after the noise."""
    runs, cells = seeds_of(EXTRACTION, run), []
    for model in ("personal", "server"):
        cells.append(told(runs, f"extraction.{model}.planted_rate", 100, 0))
        cells.append(told(runs, f"extraction.{model}.planted_mean_best_similarity", 1, 2))
    return [*cells, told(runs, "mean.rougeL_before"), told(runs, "mean.rougeL_after")]


def eight_cells(run):
    """Return the cells after what is trained."""
    runs = seeds_of(EIGHT, run)
    (upload,) = {run["bytes.upload_per_client_round"] for run in runs}
    return [
        *(told(runs, f"mean.rougeL_{when}") for when in ("before", "after")),
        told(runs, "mean.loss_after", 1, 3),
        *(told(runs, name) for name in ("mean.exact_match_after", "exam.global", *RETENTION)),
        told(runs, "expert_balance_std.personalised", 1, 0),
        f"{upload:.6g}",
    ]


def start_cells(graft):
    """Return the cells after the graft, of the model before any training."""
    runs = seeds_of(GATE_START, graft)
    return [told(runs, "mean.loss_before", 1, 3), told(runs, "mean.rougeL_before")]


def gate_cells(measured, run):
    """Return the cells after what the gate is."""
    runs = seeds_of(measured, run)
    scores = [told(runs, "mean.loss_after", 1, 3), told(runs, "mean.rougeL_after")]
    return [*scores, *(told(runs, name) for name in RETENTION)]


def asynchronous_cells(server):
    """Return the cells after the uploads of a step."""
    runs = seeds_of(ASYNCHRONOUS, server)
    num_reached = sum("clock.seconds_to_target" in run for run in runs)
    return [
        told(runs, "clock.seconds", 1, 2),
        told(runs, "mean.loss_before", 1, 3),
        told(runs, "clock.seconds_to_target", 1, 2)
        if num_reached == len(runs)
        else f"{num_reached} of {len(runs)}",
    ]


@pytest.mark.parametrize(
    ("start", "end", "measured", "cells_of"),
    [
        ("## The other methods", "## Parts of FLEx", MORE, partial(more_cells, MORE)),
        ("## Parts of FLEx", "## Gates that close", PARTS, partial(more_cells, PARTS)),
        ("## Gates that close", "## A gate that looks", CLOSED, partial(closed_cells, CLOSED)),
        ("## A gate that looks", "## FLEx plus with", PROMPT, partial(closed_cells, PROMPT)),
        ("## FLEx plus with", "## Flux beside", PLUS, partial(closed_cells, PLUS)),
        ("## Flux beside", "## Parts of Flux", FLUX, flux_cells),
        ("## Parts of Flux", "## Differential privacy", FLUX_PARTS, flux_part_cells),
        ("## Differential privacy", "## Memorised", PRIVACY, privacy_cells),
        ("## Memorised", "## Asynchronous", EXTRACTION, extraction_cells),
        ("## Asynchronous", "## Eight clients", ASYNCHRONOUS, asynchronous_cells),
        ("## Eight clients", "## The gate", EIGHT, eight_cells),
        ("### At the start", "### After training", GATE_START, start_cells),
        ("### After training", "### By steps", GATE, partial(gate_cells, GATE)),
        ("### By steps", "## Not measured", GATE_STEPS, partial(gate_cells, GATE_STEPS)),
    ],
)
def test_a_table_of_variants_is_what_was_measured(start, end, measured, cells_of):
    text = (ROOT / "docs/results.md").read_text()
    table = text[text.index(start) : text.index(end)].splitlines()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table if line.startswith("| `")]
    shown = {variant.strip("`"): [to_six_digits(cell) for cell in cells] for variant, _, *cells in rows}
    assert shown == {one: cells_of(one) for one in {run["name"].split("-seed-")[0] for run in measured}}
