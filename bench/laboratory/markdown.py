"""Formats tables for the reports."""


def table(head: list[str], rows: list[list[str]], right: bool = False) -> str:
    """A Markdown table. right: right-align all columns but the first."""
    lines = [head, ["---", *["---:" if right else "---"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
