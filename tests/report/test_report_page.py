"""The page and the Markdown."""

import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from statistics import fmean, stdev
from xml.etree import ElementTree

import pytest
from synthetic_runs import make_result, write_run, write_suite, write_unfinished

from fedexperts.report import write_report
from fedexperts.report.markdown import markdown
from fedexperts.report.reading import read_suite
from fedexperts.report.sections import content_of

EVIL = "<script>alert('&')</script>|**x**"


class Outline(HTMLParser):
    """Checks that elements close in order, and keeps headings and addresses."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.headings: list[str] = []
        self.addresses: list[str] = []
        self.ids: list[str] = []

    def handle_starttag(self, tag, attrs):
        self.handle_startendtag(tag, attrs)
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name in {"src", "href", "xlink:href"}]
        self.ids += [value for name, value in attrs if name == "id"]

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


def text_of(directory):
    """REPORT.md alone, for what the page and it have from one content."""
    return markdown(content_of(read_suite(directory)))


def read_report(directory):
    return tuple(path.read_text(encoding="utf-8") for path in write_report(directory))


@pytest.fixture(scope="module")
def report(suite_directory):
    return read_report(suite_directory)


def test_the_page_has_every_section(report):
    assert outline_of(report[0]).headings == [
        "Results",
        "Equal terms",
        "Retention",
        "Rounds",
        "Paired differences",
        "Score against bytes",
        "Clients",
        "Personalisation",
        "Measured by the algorithm",
        "Experts",
        "Data",
        "Bytes",
        "Time",
        "Settings and environment",
    ]


def test_the_page_asks_for_nothing_outside_itself(report):
    page = report[0]
    assert all(address.startswith(("#", "data:")) for address in outline_of(page).addresses)
    assert not re.search(r"<script|<link|@import|url\((?!#)|https?:", page)


def test_every_drawing_is_whole_and_described(report):
    drawings = re.findall(r"<svg.*?</svg>", report[0], flags=re.DOTALL)
    assert len(drawings) > 20
    for drawing in drawings:
        assert ElementTree.fromstring(drawing.replace("xlink:href", "href")).get("aria-label")
    assert not re.search(r"\b(nan|inf)\b", "".join(drawings))


def test_an_id_stands_once_and_what_refers_to_one_finds_it(report):
    outline = outline_of(report[0])
    assert len(outline.ids) == len(set(outline.ids))
    references = {address[1:] for address in outline.addresses if address.startswith("#")}
    assert references | set(re.findall(r"url\(#(\w+)\)", report[0])) <= set(outline.ids)


def test_every_figure_has_its_numbers_behind_it(report):
    figures = re.findall(r"<figure>.*?</figure>", report[0], flags=re.DOTALL)
    assert len(figures) > 8
    for figure in figures:
        assert re.search(r"<details>.*<td", figure, flags=re.DOTALL)


def test_the_numbers_behind_the_clients_are_the_results(suite_directory, report):
    paths = [suite_directory / "runs" / f"flex-seed{seed}" / "result.json" for seed in range(3)]
    scores = [json.loads(path.read_text())["clients"]["client-003"]["rougeL_after"] for path in paths]
    cell = f"{100 * fmean(scores):.1f} ± {100 * stdev(scores):.1f}"
    assert re.search(rf"\| client-003 \| [^|]+ \| {cell} \|", report[1])


def figures_of(directory, section):
    (found,) = (one for one in content_of(read_suite(directory)).sections if one.title == section)
    return found.figures


def test_the_exam_s_curve_goes_from_the_untouched_model_to_the_result(run_directory):
    result = json.loads((run_directory / "result.json").read_text())
    (figure,) = figures_of(run_directory, "Rounds")
    exam = figure.tables[-1]
    assert exam.rows[0] == ("0", f"{100 * result['exam']['base']:.1f}")
    assert exam.rows[-1] == ("4", f"{100 * result['exam']['global']:.1f}")


def test_routing_is_the_share_of_a_model_s_tokens_and_the_choice_is_outlined(run_directory):
    result = json.loads((run_directory / "result.json").read_text())
    (figure,) = figures_of(run_directory, "Experts")
    tokens = result["routing"]["tokens_per_expert"]["client-002"][1]
    names = [row[0] for row in figure.panels[1].table.rows]
    assert names[:3] == ["base", "global", "000"]
    row = figure.panels[1].table.rows[names.index("002")]
    assert row[1:] == tuple(f"{100 * count / sum(tokens):.1f}" for count in tokens)
    expert = result["clients"]["client-002"]["algorithm"]["chosen_experts"][1]
    outlined = figure.panels[1].draw.keywords["outlined"]
    assert [place for place in outlined if place[0] == names.index("002")] == [(names.index("002"), expert)]


def test_colours_are_the_style_sheet_s_so_that_dark_ground_can_change_them(report):
    assert "var(--c0)" in report[0]
    drawings = "".join(re.findall(r"<svg.*?</svg>", report[0], flags=re.DOTALL))
    assert set(re.findall(r"#[0-9a-f]{6}\b", drawings)) <= {"#ffffff"}


@pytest.mark.slow
def test_the_same_directories_give_the_same_bytes(run_directory):
    assert read_report(run_directory) == read_report(run_directory)


def test_both_files_have_the_same_headline(report):
    row = next(line for line in report[1].splitlines() if line.startswith("| flex | 3 |"))
    for cell in (cell.strip(" *") for cell in row.split("|")[3:-1]):
        assert cell.replace(" ± ", '<span class="std"> ± ') in report[0]


def test_what_is_simulated_is_said_at_the_top(report):
    for text in report:
        assert text.index("Simulated: one process on one machine") < text.index("Mean over clients")


def test_a_run_over_flower_with_a_connection_is_not_called_simulated(tmp_path):
    result = make_result() | {"transport": "flower", "simulated": False}
    text = text_of(write_run(tmp_path / "run", result))
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
    text = text_of(directory)
    start = text[text.index("Read this first") : text.index("At a glance")]
    for words in (
        "flex-seed2 is in no table: unfinished, 4 of 10 rounds done.",
        "1 turn of clients lost or refused",
        "flex, seed 0, round 3, client-002: non-finite loss",
        "0 to 7 examples a run truncated",
        "0 to 1 examples a run left out",
        "uploaded bytes differ from the prediction in 1 run.",
        "frozen parameters of the base model changed",
    ):
        assert words in start


def test_a_clean_run_has_nothing_to_read_first(run_directory):
    assert "Read this first" not in text_of(run_directory)


def test_fewer_than_three_seeds_are_no_finding(tmp_path, report):
    results = [make_result(method, seed) for method in ("flex", "fedavg") for seed in range(2)]
    text = text_of(write_suite(tmp_path, results))
    assert "Fewer than three seeds for all methods" in text
    assert "fewer than three seeds: no finding yet" in text
    assert "Fewer than three" not in report[0]


def test_counted_and_predicted_bytes_are_compared_in_words(report):
    for text in report:
        assert "✓ All 432 messages in clients.jsonl have the bytes that were predicted." in text


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
        "Retention",
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


@pytest.mark.slow
def test_two_hundred_clients_fit(tmp_path):
    result = make_result("flex", num_clients=200, rounds=1)
    page, _ = read_report(write_run(tmp_path / "run", result))
    outline_of(page)
    assert len(page) < 1_500_000


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
    text = text_of(directory)
    assert "| flex | training.lr=0.003 | **65.0 ± 7.1** | chosen |" in text
    assert "| flex | training.lr=0.001 | 45.0 ± 7.1 |  |" in text
    assert "| **65.0 ± 7.1** | chosen, at an end of the grid of training.lr |" in text


def test_a_report_loads_a_plotting_library_only_to_draw():
    code = "import sys, fedexperts.report; print({'torch', 'matplotlib', 'numpy'} & {*sys.modules})"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_new_algorithm_s_measurements_are_shown_without_knowing_it(tmp_path):
    result = make_result("fedavg", 0, num_clients=2, rounds=2)
    for number, client in enumerate(result["clients"].values()):
        client["algorithm"] = {
            "drift": 0.25 + 0.5 * number,
            "norms": [1.0, 2.0 + number],
            "tuned_experts": [[3, 5], [number]],
            "utility": [[0.5, 1.5], [2.5]],
        }
    directory = write_run(tmp_path / "run", result)
    lines = [
        {"round": r, "client": client, "algorithm": {"lambda": 0.1 * r, "by_layer": [1.0 * r, 3.0]}}
        for r in (1, 2)
        for client in result["clients"]
    ]
    (directory / "clients.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page, text = read_report(directory)
    outline_of(page)
    section = page[page.index('<section id="measured') : page.index('<section id="experts')]
    assert re.findall("<h3>(.*)</h3>", section) == [
        "Over rounds",
        "By layer",
        "Norms",
        "Tuned experts",
        "Utility",
    ]
    assert "| fedavg | 0.500 ± 0.354 |" in text
    assert "| client-000 | 0 | 3, 5 | 0 |" in text
    plain = " ".join(re.sub("<.*?>", " ", section).split())
    assert " 1 0.100 2 0.200 " in plain, "a number by round"
    assert " 1 2.000 2 2.500 " in plain, "the mean over layers by round"
    assert " 0 1.000 2.000 1 3.000 3.000 " in plain, "layers by rounds, and by clients"
    assert " 0 0.500 1.500 1 2.500 – " in plain, "lists of lists, the mean over clients"
    assert "Outlined: tuned experts." in page


def test_a_client_without_a_score_is_a_dash_and_counted(tmp_path):
    result = make_result("flex", 0)
    for name in ("rougeL_before", "rougeL_after"):
        del result["clients"]["client-002"][name]
    text = text_of(write_run(tmp_path / "run", result))
    assert "1 of 8 clients without ROUGE-L after: means are over the others." in text
    assert re.search(r"\| client-002 \| – \| – \|", text)


def test_layers_may_differ_in_experts_and_lists_in_depth(tmp_path):
    result = make_result("fedavg", 0, num_clients=2, rounds=1)
    for tokens in result["routing"]["tokens_per_expert"].values():
        tokens[3] = tokens[3][:5]
    first, second = result["clients"].values()
    first["algorithm"] = {"mixed": [[1.0, 2.0], 3.0], "empty": [], "word": "text"}
    second["algorithm"] = {"mixed": [4.0], "late": [1.0, 2.0, 3.0]}
    result["matrix"]["rougeL"] = result["matrix"]["rougeL"][:1]
    page, text = read_report(write_run(tmp_path / "run", result))
    outline_of(page)
    assert "layer 3" in page
    assert "A client's model on its own test examples" in text
