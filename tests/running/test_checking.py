"""The tables of ``fedexperts check`` on a terminal."""

import io

import pytest
from rich.console import Console

from fedexperts.running.checking import check_experiment


@pytest.mark.parametrize("width", [60, 100])
def test_every_client_label_and_number_can_be_read(make_config, width):
    report = check_experiment(make_config("flex"))
    console = Console(file=io.StringIO(), width=width)
    console.print(*report.render(), sep="\n")
    shown = console.file.getvalue()
    assert max(map(len, shown.splitlines())) <= width
    assert "…" not in shown
    words = shown.replace(",", " ").split()
    for client_id, facts in report.as_json()["clients"].items():
        assert client_id in words
        for label, count in facts["labels"].items():
            assert count == 0 or {label, str(count)} <= set(words)
    upload = report.as_json()["bytes_by_client_of_round_1"][0]["upload"]
    assert f"{upload:,} bytes" in shown
