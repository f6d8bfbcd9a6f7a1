"""Markdown tables."""


def markdown(heads, rows):
    """Lines of a table, from its heads and rows of cells."""
    lines = ["| " + " | ".join(map(str, cells)) + " |" for cells in (heads, *rows)]
    return [lines[0], "|---" * len(heads) + "|", *lines[1:]]
