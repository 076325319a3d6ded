"""Print a prompt per category and an answer per style: ``python -m fedexperts.data.tinyworld``."""

from fedexperts.data.tinyworld import CATEGORIES, STYLES, make_example, num_prompts, restyle


def _categories() -> str:
    lines = ["| category | prompts | instruction | context | neutral answer |", "|---|---|---|---|---|"]
    for category in CATEGORIES:
        example = make_example(seed=0, category=category, index=0)
        cells = (example.instruction, example.context, example.response)
        lines.append(f"| {category} | {num_prompts(category):,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _styles() -> str:
    example = make_example(seed=0, category="open_qa", index=0)
    lines = [f"Prompt: {example.instruction}", "", "| style | answer |", "|---|---|"]
    lines += [f"| {style} | {restyle(example, style).response} |" for style in ("neutral", *STYLES)]
    return "\n".join(lines)


if __name__ == "__main__":
    print(f"{_categories()}\n\n{_styles()}")
