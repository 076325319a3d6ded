"""The benchmarks run, count right, and what the document says is what was measured."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from benchmarks.matmul_roof import Product, ProductCounter
from benchmarks.registry import BENCHMARKS, document_text, write_into
from benchmarks.tables import marks, put_into
from benchmarks.timing import in_turns, paired_ratio

ROOT = Path(__file__).parent.parent
NAMES = tuple(BENCHMARKS)
MEASURED = sorted(path.stem for path in (ROOT / "benchmarks" / "results").glob("*.json"))


def test_products_are_counted_forward_and_backward():
    weight, input = torch.randn(5, 3, requires_grad=True), torch.randn(7, 3)
    with ProductCounter() as counter:
        torch.nn.functional.linear(input, weight).sum().backward()
    assert counter.counts == {Product(1, 7, 3, 5): 1, Product(1, 5, 7, 3): 1}
    assert counter.flops == 2 * (2 * 7 * 3 * 5)


def test_grouped_products_and_attention_are_counted():
    tokens, experts = torch.randn(8, 4, requires_grad=True), torch.randn(2, 4, 12)
    offsets = torch.tensor([3, 8], dtype=torch.int32)
    query = torch.randn(2, 3, 5, 4, requires_grad=True)
    with ProductCounter() as counter:
        torch.nn.functional.grouped_mm(tokens, experts, offs=offsets).square().sum().backward()
    assert counter.flops == 2 * (2 * 8 * 4 * 12)
    with ProductCounter() as counter:
        torch.nn.functional.scaled_dot_product_attention(query, query, query).square().sum().backward()
    assert counter.flops == (2 + 5) * (2 * 2 * 3 * 5 * 5 * 4)


def test_rivals_take_turns_after_a_run_that_does_not_count():
    order = []

    def rival(name):
        return lambda: order.append(name) or float(len(order))

    seconds = in_turns({"a": rival("a"), "b": rival("b")}, repeats=2)
    assert order == ["a", "b", "a", "b", "a", "b"]
    assert seconds == {"a": [3.0, 5.0], "b": [4.0, 6.0]}
    assert paired_ratio(seconds["b"], seconds["a"])["values"] == [4 / 3, 6 / 5]


@pytest.mark.parametrize("name", MEASURED)
def test_the_document_has_the_figures_of_the_committed_results(name):
    record = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    documents = [path.read_text() for path in (ROOT / "docs").glob("*.md")]
    (document,) = (each for each in documents if marks(name)[0] in each)
    assert put_into(document, name, document_text(name, record)) == document


@pytest.mark.parametrize("name", NAMES)
def test_each_benchmark_has_its_marks_on_one_page(name):
    pages = [path for path in (ROOT / "docs").rglob("*.md") if marks(name)[0] in path.read_text()]
    assert len(pages) == 1
    begin, end = map(pages[0].read_text().index, marks(name))
    assert begin < end


def test_a_page_without_a_benchmark_s_marks_is_left_as_it_is(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("nothing")
    record = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
    assert not write_into(page, "memory", record)
    assert page.read_text() == "nothing"
    page.write_text("\n".join(marks("memory")))
    assert write_into(page, "memory", record)
    assert document_text("memory", record) in page.read_text()


@pytest.mark.slow
def test_the_command_measures_everything_and_fills_a_document(tiny_checkpoint, tmp_path):
    pytest.importorskip("trl")
    document = tmp_path / "benchmarks.md"
    document.write_text("\n".join(line for name in BENCHMARKS for line in marks(name)))
    command = [sys.executable, "-m", "benchmarks", "--quick", "--model", str(tiny_checkpoint)]
    places = ["--results", str(tmp_path), "--docs", str(document)]
    done = subprocess.run([*command, *places], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for name in BENCHMARKS:
        record = json.loads((tmp_path / f"{name}.json").read_text())
        assert document_text(name, record) in document.read_text()


@pytest.mark.slow
def test_the_server_s_memory_does_not_depend_on_the_number_of_clients():
    few, many = (
        float(_out("benchmarks.server_memory", "fedexperts", number, "24")) for number in ("3", "12")
    )
    assert many == pytest.approx(few, rel=0.05)


def _out(*arguments):
    command = [sys.executable, "-m", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
