"""A report as one HTML page that needs nothing but itself: no script, no font, no request."""

from fedexperts.report.content import Content, Section
from fedexperts.report.figures import Figure
from fedexperts.report.markup import Markup, element, join
from fedexperts.report.style_sheet import STYLE_SHEET
from fedexperts.report.tables import Table

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
_SHORT = 36


def page(content: Content) -> str:
    """The whole page as text."""
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("title", f"{content.title} · FedExperts"),
        element("style", Markup(STYLE_SHEET)),
    )
    sections = [_section(section, is_first=number == 0) for number, section in enumerate(content.sections)]
    footer = element(
        "footer", "Made by FedExperts from the run directories alone; REPORT.md has the same as text."
    )
    body = element("body", _top(content), element("main", *sections), footer)
    return f"<!doctype html>\n{element('html', head, body, lang='en')}\n"


def _top(content: Content) -> Markup:
    parts = [element("h1", content.title), element("p", content.what_ran, class_="ran")]
    if content.warnings:
        tables = [_table(content.failures)] if content.failures else []
        parts.append(_box("Read this first", content.warnings, "warn", *tables))
    if content.glance:
        parts.append(_box("At a glance", content.glance, "glance"))
    parts.append(element("div", *(element("p", text) for text in content.simulated), class_="box soft"))
    links = [element("a", section.title, href=f"#{_anchor(section)}") for section in content.sections]
    parts.append(element("nav", join(links, " "), aria_label="Sections"))
    return element("header", *parts, class_="top")


def _box(head: str, sentences: tuple[str, ...], kind: str, *more: Markup) -> Markup:
    items = element("ul", *(element("li", text) for text in sentences))
    return element("div", element("strong", head, class_="head"), items, *more, class_=f"box {kind}")


def _anchor(section: Section) -> str:
    return section.title.lower().replace(" ", "-")


def _section(section: Section, *, is_first: bool) -> Markup:
    shown = [table for table in section.tables if not table.is_drawn]
    open_tables = [_table(table) for table in shown if not table.is_folded]
    folded = [_folded(table.caption, _table(table, has_caption=False)) for table in shown if table.is_folded]
    sentences = [element("p", text, class_="note") for text in section.sentences]
    parts = [*(_figure(figure) for figure in section.figures), *open_tables, *sentences, *folded]
    heading = element("h2", section.title)
    return element("section", heading, *parts, id=_anchor(section), class_="headline" if is_first else None)


def _folded(summary: str, inside: Markup) -> Markup:
    return element("details", element("summary", summary), inside)


def _figure(figure: Figure) -> Markup:
    panels = [
        element("div", element("h4", title), drawing, class_=_panel_class(drawing))
        for title, drawing in figure.panels
    ]
    inside = element(
        "figure",
        element("figcaption", figure.note),
        figure.legend,
        element("div", *panels, class_="panels"),
    )
    if figure.is_folded:
        return _folded(figure.title, inside)
    return join([element("h3", figure.title), inside]) if figure.title else inside


def _panel_class(drawing: Markup) -> str:
    return "panel" if drawing.startswith("<svg") else "panel bars-panel"


def _table(table: Table, *, has_caption: bool = True) -> Markup:
    first = 1 if table.is_grouped else 0
    heads = [
        element("th", column.title, scope="col", class_="num" if column.is_number else None)
        for column in table.columns[first:]
    ]
    caption = [element("caption", table.caption)] if has_caption else []
    inside = [*caption, element("thead", element("tr", *heads)), element("tbody", *_rows(table, first))]
    return element("div", element("table", *inside), class_="wide")


def _rows(table: Table, first: int) -> list[Markup]:
    rows = []
    group = None
    for number, row in enumerate(table.rows):
        if table.is_grouped and row[0] != group:
            group = row[0]
            span = str(len(table.columns) - first)
            rows.append(element("tr", element("th", group, scope="rowgroup", colspan=span, class_="group")))
        cells = [_cell(table, number, place, row[place]) for place in range(first, len(row))]
        rows.append(element("tr", *cells))
    return rows


def _cell(table: Table, row: int, place: int, text: str) -> Markup:
    if not table.columns[place].is_number:
        return element("td", text, class_="text short" if len(text) <= _SHORT else "text")
    value, sign, std = text.partition(" ± ")
    children = [value, element("span", f" ± {std}", class_="std")] if sign else [text]
    return element("td", *children, class_="num best" if (row, place) in table.marked else "num")
