"""Draw a heat map of shares as a self-contained SVG."""

from collections.abc import Collection, Mapping, Sequence
from html import escape

LEFT, TOP, CELL, ROW = 150, 10, 26, 24
STYLE = """
text { font: 12px system-ui, sans-serif; fill: #24292f } .axis { font-weight: 600 }
.cell { fill: #1f6fb2 } .outline { fill: none; stroke: #bc4c00; stroke-width: 2 }
"""


def heat_map(
    title: str,
    rows: Mapping[str, Sequence[float]],
    columns: Sequence[str],
    column_title: str,
    outlined: Collection[tuple[int, int]] = (),
) -> str:
    """Return the map: darkest at the largest share, exact on hover; ``outlined`` are (row, column)."""
    width = LEFT + CELL * len(columns) + 20
    bottom = TOP + ROW * len(rows)
    is_long = max(map(len, columns)) > 3
    height = bottom + (90 if is_long else 50)
    largest = max(share for shares in rows.values() for share in shares)
    middle = LEFT + CELL * len(columns) / 2
    label = f'<text class="axis" x="{middle:g}" y="{height - 6}" text-anchor="middle">'
    parts = [f"{label}{escape(column_title)}</text>"]
    for row, (name, shares) in enumerate(rows.items()):
        y = TOP + ROW * row
        parts.append(f'<text x="{LEFT - 8}" y="{y + 16}" text-anchor="end">{escape(name)}</text>')
        parts += [
            f'<rect class="cell" x="{LEFT + CELL * column}" y="{y}" width="{CELL - 1}" height="{ROW - 1}" '
            f'fill-opacity="{share / largest:.3f}">'
            f"<title>{escape(name)}, {escape(columns[column])}: {share:.0%}</title></rect>"
            for column, share in enumerate(shares)
        ]
    for column, name in enumerate(columns):
        x, y = LEFT + CELL * column + CELL / 2, bottom + 16
        turned = (
            f' transform="rotate(-45 {x:g} {y})" text-anchor="end"' if is_long else ' text-anchor="middle"'
        )
        parts.append(f'<text x="{x:g}" y="{y}"{turned}>{escape(name)}</text>')
    parts += [
        f'<rect class="outline" x="{LEFT + CELL * column}" y="{TOP + ROW * row}" width="{CELL - 1}" '
        f'height="{ROW - 1}"/>'
        for row, column in sorted(outlined)
    ]
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img">'
    ground = '<rect width="100%" height="100%" fill="#ffffff"/>'
    return "\n".join(
        (head, f"<title>{escape(title)}</title>", f"<style>{STYLE}</style>", ground, *parts, "</svg>\n")
    )
