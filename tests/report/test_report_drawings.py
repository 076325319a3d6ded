"""Axes, lines and heat maps."""

import re
import zlib

import pytest

from fedexperts.report import charts, heatmaps
from fedexperts.report.heatmaps import HeatMap
from fedexperts.report.markup import Markup, element
from fedexperts.report.quantities import Spread, plain_spread, points_spread


def value(mean, std=None):
    return Spread(mean=mean, std=std, num_values=1 if std is None else 3)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.5, 0.52, [0.5, 0.505, 0.51, 0.515, 0.52]),
        (3, 3, [2.6, 2.8, 3, 3.2, 3.4]),
    ],
)
def test_ticks_are_round_and_enclose_the_values(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_rounds_have_whole_ticks():
    assert charts.ticks(1, 3, whole=True) == [1, 2, 3]


def test_a_score_near_100_has_no_axis_beyond_100():
    line = charts.Series(name="flex", style=0, points=((1, value(0.97, 0.05)), (2, value(0.99, 0.05))))
    drawing = charts.line_chart([line], title="t", x_title="round", text=points_spread, points=True)
    numbers = [float(text) for text in re.findall(r">([\d.]+)</text>", drawing)]
    assert max(numbers) == 100


def test_a_band_goes_with_the_spread():
    points = tuple((float(x), value(1.0 / x, 0.1)) for x in (1, 2, 3))
    with_band = charts.Series(name="a", style=0, points=points)
    without = charts.Series(name="b", style=1, points=tuple((x, value(v.mean)) for x, v in points))
    drawing = charts.line_chart(
        [with_band, without], title="t", x_title="round", text=plain_spread, points=False
    )
    assert drawing.count('class="band s0"') == 1
    assert "band s1" not in drawing


def test_a_bar_without_value_is_left_out():
    bars = [charts.Bar(name="000", before=None, after=value(0.5))]
    drawing = charts.bar_chart(
        bars, title="t", style=0, top=0.5, x_title="client", text=points_spread, points=True
    )
    assert 'class="bar full s0"' in drawing
    assert "bar pale" not in drawing


def heat(values, **other):
    rows, columns = len(values), len(values[0])
    return HeatMap(
        title="t",
        row_title="row",
        column_title="column",
        row_names=tuple(map(str, range(rows))),
        column_names=tuple(map(str, range(columns))),
        values=tuple(map(tuple, values)),
        text="{:g}".format,
        **other,
    )


def opacities(drawing):
    return [float(text) for text in re.findall(r'fill-opacity="([\d.]+)"', drawing)]


def test_a_cell_is_as_dark_as_its_share_of_the_range():
    drawing = heatmaps.heat_map(heat([[0, 1], [2, 4]]), low=0, high=4, show_text=True)
    assert opacities(drawing) == [0, 0.25, 0.5, 1]


def test_where_less_is_better_less_is_darker():
    drawing = heatmaps.heat_map(heat([[0, 4]], darker_is_less=True), low=0, high=4, show_text=True)
    assert opacities(drawing) == [1, 0]


def test_equal_values_are_not_all_dark():
    assert opacities(heatmaps.heat_map(heat([[0, 0]]), low=0, high=0, show_text=True)) == [0, 0]


def test_a_missing_value_is_an_empty_cell():
    drawing = heatmaps.heat_map(heat([[None, 4]]), low=0, high=4, show_text=True)
    assert "no value" in drawing
    assert opacities(drawing) == [1]


def test_a_png_holds_the_levels_as_they_are():
    image = heatmaps.opacity_png([b"\x00\x10", b"\x20\xff"])
    assert image.startswith(b"\x89PNG\r\n\x1a\n")
    start = image.index(b"IDAT") + 4
    length = int.from_bytes(image[start - 8 : start - 4], "big")
    assert zlib.decompress(image[start : start + length]) == b"\0\x00\x10\0\x20\xff"


def test_names_on_an_axis_do_not_touch():
    for longest, step in ((3, 4.0), (3, 26.0), (20, 6.0), (20, 60.0)):
        width = 17.0 if charts.is_crowded(longest, step) else 6.6 * longest
        assert charts.name_every(longest, step) * step >= width - 3


def test_plain_text_is_escaped_and_markup_is_not():
    assert element("p", "<b>", Markup("<i>"), title='"') == '<p title="&quot;">&lt;b&gt;<i></p>'
