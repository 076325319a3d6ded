"""The page and the Markdown."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest
from synthetic_runs import make_result, write_run, write_suite, write_unfinished

from fedexperts.report import write_report

EVIL = "<script>alert('&')</script>|**x**"


class Outline(HTMLParser):
    """Checks that elements close in order, and keeps headings and addresses."""

    EMPTY = frozenset({"meta", "image", "path", "rect", "line", "circle"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.addresses: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in {"src", "href"}]
        if tag not in self.EMPTY or not (self.get_starttag_text() or "").endswith("/>"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in {"src", "href"}]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)


def outline_of(page: str) -> Outline:
    outline = Outline()
    outline.feed(page)
    outline.close()
    assert outline.open == []
    return outline


def read_report(directory):
    return tuple(path.read_text(encoding="utf-8") for path in write_report(directory))


@pytest.fixture(scope="module")
def report(suite_directory):
    return read_report(suite_directory)


def test_the_page_has_every_section(report):
    assert outline_of(report[0]).headings == [
        "Results",
        "Rounds",
        "Clients",
        "Personalisation",
        "Experts",
        "Data",
        "Bytes",
        "Time",
        "Settings and environment",
    ]


def test_the_page_asks_for_nothing_outside_itself(report):
    page = report[0]
    assert all(address.startswith(("#", "data:")) for address in outline_of(page).addresses)
    assert not re.search(r"<script|<link|@import|url\(|https?:", page)


def test_every_drawing_is_well_formed_and_described(report):
    drawings = re.findall(r"<svg.*?</svg>", report[0], flags=re.DOTALL)
    assert len(drawings) > 20
    for drawing in drawings:
        svg = ElementTree.fromstring(drawing)
        assert svg.get("aria-label") or svg.get("aria-hidden") == "true"


def test_no_number_of_a_drawing_is_not_finite(report):
    assert not re.search(r"\b(nan|inf)\b", report[0])


def test_the_same_directories_give_the_same_bytes(suite_directory, report):
    assert read_report(suite_directory) == report


def test_both_files_have_the_same_headline(report):
    row = next(line for line in report[1].splitlines() if line.startswith("| flex | 3 |"))
    for cell in (cell.strip(" *") for cell in row.split("|")[3:-1]):
        assert cell.replace(" ± ", '<span class="std"> ± ') in report[0]


def test_what_is_simulated_is_said_at_the_top(report):
    for text in report:
        assert text.index("Simulated: one process on one machine") < text.index("Mean over clients")


def test_a_run_over_flower_with_a_connection_is_not_called_simulated(tmp_path):
    result = make_result() | {"transport": "flower", "simulated": False}
    for text in read_report(write_run(tmp_path / "run", result)):
        assert "Clients were processes of their own" in text
        assert "Simulated" not in text


def test_text_from_outside_is_escaped_everywhere(tmp_path):
    result = make_result(rounds=2)
    result["name"] = EVIL
    result["settings"]["data"]["source"] = EVIL
    result["failures"] = [{"round": 1, "client": EVIL, "reason": EVIL}]
    result["clients"] = {f"{EVIL}-{name}": client for name, client in result["clients"].items()}
    for client in result["clients"].values():
        client["labels"] = {EVIL: 3}
    page, text = read_report(write_run(tmp_path / "run", result))
    outline_of(page)
    assert "<script" not in page
    assert "<script" not in text.replace("\\<script", "")
    for line in text.splitlines():
        if line.startswith("|") and "---" in line:
            num_columns = line.count("|")
        elif line.startswith("| "):
            last_row = line
    assert len(re.findall(r"(?<!\\)\|", last_row)) == num_columns


def test_what_went_wrong_comes_first(tmp_path):
    lost = make_result("flex", 0)
    lost["failures"] = [{"round": 3, "client": "client-002", "reason": "non-finite loss"}]
    lost["clients"]["client-001"]["num_truncated"] = 7
    lost["clients"]["client-003"]["num_without_label"] = 1
    lost["bytes"]["upload_counted"] += 5
    lost["frozen_unchanged"] = False
    directory = write_suite(tmp_path, [lost, make_result("flex", 1)])
    write_unfinished(directory / "runs" / "flex-seed2", rounds=10, done=4)
    for text in read_report(directory):
        start = text[text.index("Read this first") : text.index("At a glance")]
        for words in (
            "flex-seed2 is in no table: unfinished, 4 of 10 rounds done.",
            "1 turn of clients lost or refused",
            "non-finite loss",
            "0 to 7 examples a run truncated",
            "0 to 1 examples a run left out",
            "uploaded bytes differ from the prediction in 1 runs",
            "frozen parameters of the base model changed",
        ):
            assert words in start


def test_a_clean_run_has_nothing_to_read_first(run_directory):
    for text in read_report(run_directory):
        assert "Read this first" not in text


def test_fewer_than_three_seeds_are_no_finding(tmp_path, report):
    results = [make_result(method, seed) for method in ("flex", "fedavg") for seed in range(2)]
    for text in read_report(write_suite(tmp_path, results)):
        assert "Fewer than three seeds for all methods" in text
        assert "fewer than three seeds: no finding yet" in text
    assert "Fewer than three" not in report[0]


def test_counted_and_predicted_bytes_are_compared_in_words(report):
    for text in report:
        assert "✓ in 3 of 3 runs" in text
        assert "✓ All 576 messages in clients.jsonl have the bytes that were predicted." in text


def test_optional_parts_may_be_null(tmp_path):
    result = make_result("local_only")
    for key in ("matrix", "exam", "routing", "bytes", "parameters", "failures", "seconds"):
        result[key] = None
    result["expert_balance_std"] = result["routing_entropy"] = None
    result["mean"] = {"loss_after": 1.25}
    for client in result["clients"].values():
        del client["rougeL_before"], client["rougeL_after"], client["labels"]
        client["loss_before"] = None
    directory = write_run(tmp_path / "run", make_result("local_only"))
    (directory / "result.json").write_text(json.dumps(result))
    page, text = read_report(directory)
    assert outline_of(page).headings == [
        "Results",
        "Rounds",
        "Clients",
        "Data",
        "Bytes",
        "Settings and environment",
    ]
    assert "1.250" in text


def test_a_run_of_nobody_still_has_a_report(tmp_path):
    directory = tmp_path / "run"
    directory.mkdir()
    result = make_result() | {"clients": {}, "mean": {}, "matrix": None, "routing": None}
    (directory / "result.json").write_text(json.dumps(result))
    outline_of(read_report(directory)[0])


def test_two_hundred_clients_fit(tmp_path):
    result = make_result("flex", num_clients=200, rounds=1)
    page, _ = read_report(write_run(tmp_path / "run", result))
    outline_of(page)
    assert "data:image/png;base64," in page
    assert len(page) < 1_000_000


def test_the_search_before_the_runs_is_shown_with_its_choice(tmp_path):
    directory = write_suite(tmp_path, [make_result("flex", seed) for seed in range(3)])
    tried = [
        {"values": {"training.lr": 1e-3}, "scores": [0.4, 0.5], "mean": 0.45},
        {"values": {"training.lr": 3e-3}, "scores": [0.6, 0.7], "mean": 0.65},
    ]
    chosen = {"chosen": {"training.lr": 3e-3}, "tried": tried}
    groups = {"flex": chosen, "edgy": chosen | {"at_edge": ["training.lr"]}}
    search = {"metric": "validation_rougeL_after", "seeds": [100, 101], "groups": groups}
    (directory / "search.json").write_text(json.dumps(search))
    text = read_report(directory)[1]
    assert "| flex | training.lr=0.003 | **65.0 ± 7.1** | chosen |" in text
    assert "| flex | training.lr=0.001 | 45.0 ± 7.1 |  |" in text
    assert "| **65.0 ± 7.1** | chosen, at an end of the grid of training.lr |" in text


def test_a_report_loads_neither_torch_nor_a_plotting_library():
    heavy = ("torch", "matplotlib", "numpy")
    code = f"import sys, fedexperts.report; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
