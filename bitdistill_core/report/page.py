"""The document as one HTML page: style inside, plots inline, no script, nothing fetched."""

from html import escape

from bitdistill_core.report.document import Document, Figure, Section, Table

STYLE = """
:root { color-scheme: light dark; --ink: #1f2328; --soft: #59636e; --line: #d1d9e0; --page: #ffffff; --tint: #f6f8fa;
  --mark: #0072b2; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --soft: #9aa4af; --line: #3d444d; --page: #0f1318;
  --tint: #181d24; --mark: #56b4e9; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink);
  font: 1rem/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
main { max-width: 66rem; margin: 0 auto; padding: clamp(1rem, 4vw, 3rem); }
h1 { margin: 0; font-size: clamp(1.5rem, 5vw, 2.1rem); line-height: 1.2; overflow-wrap: anywhere; }
h2 { margin: 3rem 0 0.75rem; padding-top: 1rem; border-top: 1px solid var(--line); font-size: 1.25rem; }
p { max-width: 46rem; margin: 0.5rem 0; }
.subtitle, p.note, figcaption, caption { color: var(--soft); font-size: 0.9rem; overflow-wrap: anywhere; }
.verdict { margin: 1.5rem 0; padding: 0.9rem 1.1rem; border-left: 4px solid var(--mark); background: var(--tint);
  font-size: 1.08rem; max-width: 52rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.95rem; }
caption { caption-side: bottom; text-align: left; padding-top: 0.5rem; }
th, td { padding: 0.45rem 0.8rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; padding-left: 0; }
thead th { border-bottom: 2px solid var(--line); vertical-align: bottom; }
tbody th { font-weight: 500; }
td small { display: block; color: var(--soft); }
.figures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 20rem), 1fr)); gap: 1.5rem; }
figure { margin: 1rem 0 0; max-width: 34rem; min-width: 0; }
figure svg { display: block; width: 100%; height: auto; }
figcaption { margin-top: 0.25rem; }
details { border-bottom: 1px solid var(--line); padding: 0.4rem 0; }
summary { cursor: pointer; }
pre { overflow-x: auto; padding: 0.8rem; background: var(--tint); font-size: 0.85rem; }
tbody th { overflow-wrap: anywhere; min-width: 5.5rem; }
@media (min-width: 40rem) { td small { white-space: nowrap; } }
@media (max-width: 40rem) { th, td { padding: 0.4rem 0.3rem; } table { font-size: 0.82rem; } }
"""


def render_page(document: Document) -> str:
    """index.html."""
    return "\n".join([
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(document.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>",
        f'<h1>{escape(document.title)}</h1>\n<p class="subtitle">{escape(document.subtitle)}</p>',
        f'<p class="verdict">{escape(document.verdict)}</p>',
        *(_section(section) for section in document.sections),
        "</main>\n</body>\n</html>\n",
    ])  # fmt: skip


def _section(section: Section) -> str:
    figures = "\n".join(_figure(figure) for figure in section.figures)
    return "\n".join([
        f"<section>\n<h2>{escape(section.title)}</h2>",
        *(_table(table) for table in section.tables),
        *(f'<p class="note">{escape(text)}</p>' for text in section.paragraphs),
        f'<div class="figures">\n{figures}\n</div>' if figures else "",
        *(_listing(title, text) for title, text in section.listings),
        "</section>",
    ])  # fmt: skip


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col">{escape(column)}</th>' for column in table.columns)
    rows = "\n".join(
        f'<tr><th scope="row">{escape(first)}</th>' + "".join(f"<td>{_cell(cell)}</td>" for cell in cells) + "</tr>"
        for first, *cells in table.rows
    )
    caption = f"<caption>{escape(table.caption)}</caption>" if table.caption else ""
    body = f"{caption}<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>"
    return f'<div class="scroll"><table>{body}</table></div>'


def _cell(text: str) -> str:
    value, _, small = text.partition("\n")
    return escape(value) + (f"<small>{escape(small)}</small>" if small else "")


def _figure(figure: Figure) -> str:
    svg = figure.svg.replace('role="img"', f'role="img" aria-label="{escape(figure.description)}"', 1)
    return f"<figure>\n{svg}\n<figcaption>{escape(figure.caption)}</figcaption>\n</figure>"


def _listing(title: str, text: str) -> str:
    return f"<details><summary>{escape(title)}</summary>\n<pre>{escape(text)}</pre>\n</details>"
