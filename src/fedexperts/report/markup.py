"""Elements of HTML and SVG as text; whatever is not :class:`Markup` is escaped, so that nothing slips in."""

import html
from collections.abc import Sequence

_EMPTY = frozenset({"circle", "image", "line", "meta", "path", "rect"})


class Markup(str):
    """Text that is markup already."""

    __slots__ = ()


def element(tag: str, *children: str, **attributes: str | float | None) -> Markup:
    """``<tag attributes>children</tag>``; ``class_`` is class, ``text_anchor`` text-anchor."""
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{html.escape(_value(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    if tag in _EMPTY and not children:
        return Markup(f"<{tag}{written}/>")
    return Markup(f"<{tag}{written}>{join(children)}</{tag}>")


def join(children: Sequence[str], separator: str = "") -> Markup:
    """The children one after another, escaped where they are plain text."""
    return Markup(
        separator.join(child if isinstance(child, Markup) else html.escape(child) for child in children)
    )


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{value:.2f}".rstrip("0").rstrip(".")
