"""The report as a tree of plain text, tables and figures, from which HTML and Markdown are written. No numbers here."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Table:
    """Cells are plain text; a line break in one sets its second line small."""

    columns: list[str]
    rows: list[list[str]]
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot: images/NAME.png, and the same as SVG for the page."""

    name: str
    svg: str
    description: str  # for readers who do not see it
    caption: str


@dataclass(frozen=True)
class Section:
    """A heading and what stands below it, in this order."""

    title: str
    paragraphs: list[str] = field(default_factory=list)
    tables: list[Table] = field(default_factory=list)
    figures: list[Figure] = field(default_factory=list)
    listings: list[tuple[str, str]] = field(default_factory=list)  # (title, preformatted text), folded


@dataclass(frozen=True)
class Document:
    """The whole report."""

    title: str
    subtitle: str
    verdict: str
    sections: list[Section]
