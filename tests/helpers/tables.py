"""Markdown tables in printed text."""


def markdown_tables(text):
    """The tables of a text: for each table its rows, the header's first, for each row its cells."""
    tables = [[]]
    for line in text.splitlines():
        if not line.startswith("|"):
            tables.append([])
        elif not line.startswith("| ---"):
            tables[-1].append(line[2:-2].split(" | "))
    return [rows for rows in tables if rows]
