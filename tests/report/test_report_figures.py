"""Lines, bars and heat maps."""

import base64
import io
import re
from xml.etree import ElementTree

import pytest
from PIL import Image

from fedexperts.report import drawing
from fedexperts.report.figures import cells
from fedexperts.report.quantities import Spread, spread
from fedexperts.report.tables import number_table


def table_of(rows, *, path="rougeL", titles=None):
    width = len(next(iter(rows.values())))
    titles = titles or ["row / column", *map(str, range(width))]
    return number_table("caption", titles, path, rows)


def texts(svg):
    """All that is written in a drawing, which must be whole XML."""
    return [
        "".join(one.itertext())
        for one in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")
    ]


def numbers(svg):
    return [
        float(one.replace("\N{MINUS SIGN}", "-"))
        for one in texts(svg)
        if re.fullmatch(r"[\N{MINUS SIGN}\d.]+", one)
    ]


def opacities(svg):
    """The opacity of each cell of a heat map, 0 to 255."""
    encoded = re.findall(r'base64,\s*([^"]+)" id="\w+" width="2" height="1"', svg)
    return [*Image.open(io.BytesIO(base64.b64decode(encoded[0]))).getchannel("A").tobytes()]


def test_equal_tables_give_equal_bytes_and_other_salt_other_ids():
    rows = {"1": cells([0.5]), "2": cells([0.7])}
    first, again, other = (drawing.line_chart(table_of(rows), [0], salt) for salt in ("a", "a", "b"))
    assert first == again
    assert not set(re.findall(r'id="([mp]\w{10})"', first)) & set(re.findall(r'id="([mp]\w{10})"', other))


@pytest.mark.parametrize(("low", "high"), [(0.98, 0.99), (0.5, 0.5), (0.0, 0.01)])
def test_a_change_of_one_point_does_not_fill_the_axis(low, high):
    svg = drawing.line_chart(table_of({"1": cells([low]), "2": cells([high])}), [0], "")
    marks = numbers(svg)[2:]
    assert max(marks) - min(marks) >= 4
    assert min(marks) >= 0
    assert max(marks) <= 100


def test_a_line_of_one_point_is_a_mark_with_its_value():
    rows = {"3": [spread([0.871]), spread([0.5])], "5": [None, spread([0.6])]}
    assert "87.1" in texts(drawing.line_chart(table_of(rows, titles=["round", "a", "b"]), [0, 1], ""))


def paths(svg, style):
    """The corners of each path drawn in a style."""
    found = re.findall(rf'<path d="([^"]+)"[^>]*style="[^"]*{style}', svg)
    return [
        [tuple(map(float, pair.split())) for pair in re.split("[MLz]", one) if pair.strip()] for one in found
    ]


def test_a_line_goes_through_its_means():
    rows = {"1": cells([0.2]), "2": cells([0.3]), "4": cells([0.7])}
    ((a, b, c),) = paths(drawing.line_chart(table_of(rows), [0], ""), "stroke: #0072b2; stroke-width: 1.5")
    assert (c[0] - b[0]) / (b[0] - a[0]) == pytest.approx(2, rel=1e-4), "six digits in the file"
    assert (c[1] - b[1]) / (b[1] - a[1]) == pytest.approx(4, rel=1e-4)


def test_bars_are_as_long_as_their_means_side_by_side_or_stacked():
    table = table_of({"x": cells([0.25, 0.5]), "y": cells([1.0, None])})
    looks = [("#0072b2", 1.0), ("#d55e00", 1.0)]
    for ends in ((), ("x", "y")):
        svg = drawing.bar_chart(table, looks, "", ends=ends)
        bars = [paths(svg, f"fill: {colour}") for colour, _ in looks]
        (x, y), (other, none) = [[(bar[0][0], bar[1][0]) for bar in own] for own in bars]
        unit = y[1] - y[0]
        assert (x[1] - x[0]) / unit == pytest.approx(0.25, rel=1e-4)
        assert (other[1] - other[0]) / unit == pytest.approx(0.5, rel=1e-4)
        assert none[1] == none[0]
        assert other[0] == (x[1] if ends else x[0])


def test_a_band_goes_with_the_spread():
    value = Spread(mean=1.0, std=0.1, num_values=3)
    rows = {"1": [value, spread([1.0])], "2": [value, spread([2.0])]}
    svg = drawing.line_chart(table_of(rows, path="loss"), [0, 1], "")
    assert svg.count("fill-opacity: 0.16") == 1


def test_whiskers_stand_on_bars_with_a_spread_and_a_missing_bar_is_none():
    rows = {"a": [Spread(mean=0.5, std=0.1, num_values=2), None]}
    svg = drawing.bar_chart(table_of(rows), [("#0072b2", 1.0), ("#d55e00", 1.0)], "")
    assert svg.count('id="LineCollection_') == 2
    assert "nan" not in svg


def test_a_cell_is_as_dark_as_its_share_of_the_range_and_less_can_be_darker():
    table = table_of({"a": cells([1, 4])}, path="loss")
    assert opacities(drawing.heat_map(table, limits=(0.0, 4.0), salt="")) == [pytest.approx(64, abs=1), 255]
    flipped = drawing.heat_map(table, limits=(0.0, 4.0), less_is_darker=True, salt="")
    assert opacities(flipped) == [pytest.approx(191, abs=1), 0]


def test_equal_values_are_not_all_dark_and_a_missing_one_is_empty():
    table = table_of({"a": cells([2, None])}, path="loss")
    svg = drawing.heat_map(table, limits=(2.0, 2.0), has_text=True, salt="")
    assert opacities(svg) == [0, 0]
    assert texts(svg).count("2.000") == 2


@pytest.mark.parametrize("name", ["$x_1$", "<b>&", "客户", "x" * 200])
def test_a_name_of_any_letters_is_text(name):
    row = {name: cells([0.5, 0.6])}
    for svg in (
        drawing.heat_map(table_of(row), limits=(0.0, 1.0), salt=""),
        drawing.bar_chart(table_of(row), [("#0072b2", 1.0)] * 2, ""),
    ):
        assert any(one and name.startswith(one.rstrip("…")) for one in texts(svg))
