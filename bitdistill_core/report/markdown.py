"""The document as Markdown, with links to images/*.png."""

import re

from bitdistill_core.report.document import Document, Section, Table


def render_markdown(document: Document) -> str:
    """report.md."""
    blocks = [f"# {escaped(document.title)}", escaped(document.subtitle), f"**{escaped(document.verdict)}**"]
    for section in document.sections:
        blocks += _section(section)
    return "\n\n".join(blocks) + "\n"


def escaped(text: str) -> str:
    """Text on one line that Markdown shows as it is, in a table cell too."""
    text = re.sub(r"([\\`*\[\]<>|#~]|(?<!\w)_|_(?!\w))", r"\\\1", " ".join(text.split()))
    return text.replace("&", "&amp;")


def _section(section: Section) -> list[str]:
    blocks = [f"## {escaped(section.title)}"]
    blocks += [_table(table) for table in section.tables]
    blocks += [escaped(text) for text in section.paragraphs]
    for figure in section.figures:
        blocks.append(f"![{escaped(figure.description)}](images/{figure.name}.png)\n\n{escaped(figure.caption)}")
    for title, text in section.listings:
        blocks.append(f"<details><summary>{escaped(title)}</summary>\n\n```json\n{text}\n```\n\n</details>")
    return blocks


def _table(table: Table) -> str:
    lines = [_line(table.columns), _line(["---", *(["---:"] * (len(table.columns) - 1))], raw=True)]
    lines += [_line(row) for row in table.rows]
    return "\n".join(lines) + (f"\n\n{escaped(table.caption)}" if table.caption else "")


def _line(cells: list[str], *, raw: bool = False) -> str:
    return "| " + " | ".join(cell if raw else _cell(cell) for cell in cells) + " |"


def _cell(text: str) -> str:
    value, _, small = text.partition("\n")
    return escaped(value) + (f" ({escaped(small)})" if small else "")
