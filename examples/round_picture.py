"""Draw one round of FLEx as SVG: ``python -m examples.round_picture`` writes docs/images/round.svg."""

import argparse
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WIDTH, HEIGHT = 880, 402
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #24292f }
.title { font-weight: 600 } .small { font-size: 12px }
.frame { fill: #f6f8fa; stroke: #d0d7de } .frozen { fill: #eaeef2; stroke: #8c959f }
.shared { fill: #ddf4ff; stroke: #1f6fb2 } .private { fill: #fff1e5; stroke: #bc4c00 }
.arrow { stroke: #1f6fb2; stroke-width: 2; fill: none; marker-end: url(#tip) } .tip { fill: #1f6fb2 }
"""


def main() -> None:
    """Write the picture into the folder named on the command line."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder with images/")
    images = options.parse_args().docs / "images"
    images.mkdir(exist_ok=True)
    (images / "round.svg").write_text(picture())


def picture() -> str:
    """Return the whole picture."""
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img">',
        "<title>One round of FLEx: only LoRA travels; grafts, gates and data stay with the client</title>",
        f"<style>{STYLE}</style>",
        '<defs><marker id="tip" markerWidth="10" markerHeight="8" refX="8" refY="4" orient="auto">'
        '<path class="tip" d="M0,0 L10,4 L0,8 z"/></marker></defs>',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
        *_server(),
        *(line for number, left in enumerate((20, 460)) for line in _client(f"client-00{number}", left)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _server() -> list[str]:
    return [
        _box("frame", 20, 16, 840, 76),
        _text("server", 36, 38, "title"),
        _box("shared", 36, 48, 808, 32),
        _text(
            "LoRA on non-expert parameters: weighted mean of the uploads, by number of training examples",
            52,
            69,
        ),
    ]


def _client(name: str, left: int) -> list[str]:
    middle = left + 200
    return [
        _arrow(middle - 40, 92, middle - 40, 150),
        _text("1. download", middle - 128, 126, "small"),
        _arrow(middle + 40, 150, middle + 40, 92),
        _text("4. upload", middle + 50, 126, "small"),
        _box("frame", left, 152, 400, 234),
        _text(name, left + 16, 174, "title"),
        _text("its own training, validation and test data", left + 100, 174, "small"),
        _box("shared", left + 16, 186, 368, 32),
        _text("LoRA: the server's tensors, then 3. trained", left + 32, 207),
        _box("frozen", left + 16, 228, 178, 142),
        _text("pretrained MoE layer", left + 32, 252),
        _text("router, experts and", left + 32, 276, "small"),
        _text("shared expert are frozen", left + 32, 294, "small"),
        _text("M(x)", left + 32, 352),
        _box("private", left + 206, 228, 178, 142),
        _text("graft, kept by the client", left + 218, 252),
        _text("2. copy of the expert that", left + 218, 276, "small"),
        _text("best reconstructs the layer", left + 218, 294, "small"),
        _text("3. trained with its gate", left + 218, 312, "small"),
        _text("+ σ(g·x + b) · S(x)", left + 218, 352),
    ]


def _box(kind: str, x: int, y: int, width: int, height: int) -> str:
    return f'<rect class="{kind}" x="{x}" y="{y}" width="{width}" height="{height}" rx="6"/>'


def _text(content: str, x: int, y: int, kind: str = "") -> str:
    return f'<text x="{x}" y="{y}"{f" class={kind!r}" if kind else ""}>{content}</text>'


def _arrow(x1: int, y1: int, x2: int, y2: int) -> str:
    return f'<path class="arrow" d="M{x1},{y1} L{x2},{y2}"/>'


if __name__ == "__main__":
    main()
