"""Small pieces of HTML. Whatever is text is escaped here, and nowhere else is HTML put together."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from html import escape

STYLE = """
:root { --ink: #2b2f36; --soft: #616874; --line: #dfe2e7; --paper: #ffffff; --back: #f5f6f8; --accent: #1f4e79; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 24px 60px; }
header h1 { margin: 0; font-size: 28px; line-height: 1.25; overflow-wrap: anywhere; }
header p { margin: 4px 0 0; color: var(--soft); overflow-wrap: anywhere; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 18px 22px 20px;
  margin-top: 20px; }
h2 { margin: 0 0 4px; font-size: 18px; color: var(--accent); }
.note { margin: 0 0 12px; color: var(--soft); font-size: 13.5px; max-width: 90ch; }
section table { margin: 6px 0 14px; }
.warning { border-left: 4px solid #c8690f; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(190px, 1fr)); gap: 12px; margin-top: 20px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 12px 14px; }
.card .name { color: var(--soft); font-size: 12.5px; }
.card .value { font-size: 22px; font-weight: 650; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
.card .more { color: var(--soft); font-size: 12.5px; }
.card.main { background: var(--accent); border-color: var(--accent); color: #fff; }
.card.main .name, .card.main .more { color: #d4e0ec; }
.figures { display: grid; grid-template-columns: repeat(3, 1fr); gap: 16px 18px; margin-top: 10px; }
.figures.two { grid-template-columns: 1fr 1fr; }
img { display: block; width: 100%; height: auto; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13.5px; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 14px 4px 0; text-align: right; border-bottom: 1px solid var(--line); }
th { color: var(--soft); font-weight: 600; }
th:first-child, td:first-child { text-align: left; }
table.facts td { text-align: left; overflow-wrap: anywhere; vertical-align: top; }
table.facts td:first-child { color: var(--soft); white-space: nowrap; }
tr.strong td { font-weight: 650; }
details { margin-top: 8px; }
summary { cursor: pointer; color: var(--accent); font-weight: 600; }
pre { background: var(--back); border: 1px solid var(--line); border-radius: 8px; padding: 12px 14px; overflow-x: auto;
  font: 12.5px/1.45 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
footer { color: var(--soft); font-size: 12.5px; margin-top: 22px; }
@media (max-width: 900px) { .figures { grid-template-columns: 1fr 1fr; } }
@media (max-width: 600px) { main { padding: 16px 12px; } .figures, .figures.two { grid-template-columns: 1fr; } }
@media print {
  @page { margin: 14mm; }
  body { background: #fff; font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  section { border: 0; padding: 8px 0; }
  .cards { grid-template-columns: repeat(5, 1fr); gap: 8px; }
  .card .value { font-size: 15pt; }
  img, .card, table { break-inside: avoid; }
  h2, .note { break-after: avoid; }
  details::details-content { content-visibility: visible; height: auto; }
  pre { white-space: pre-wrap; }
}
"""


STRONG_ROW = '<tr class="strong">'


def page(title: str, subtitle: str, parts: Sequence[str], footer: str) -> str:
    """A whole document from ready pieces of HTML; title, subtitle and footer are text."""
    return "\n".join(
        [
            "<!DOCTYPE html>",
            '<html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>{escape(title)}</title><style>{STYLE}</style></head><body><main>",
            f"<header><h1>{escape(title)}</h1><p>{escape(subtitle)}</p></header>",
            *parts,
            f"<footer>{escape(footer)}</footer>",
            "</main></body></html>\n",
        ]
    )


def cards(items: Sequence[tuple[str, str, str]]) -> str:
    """Name, value and a small remark of each number of the summary; the first stands out."""
    boxes = [
        f'<div class="card{" main" if index == 0 else ""}"><div class="name">{escape(name)}</div>'
        f'<div class="value">{escape(value)}</div><div class="more">{escape(more)}</div></div>'
        for index, (name, value, more) in enumerate(items)
    ]
    return f'<div class="cards">{"".join(boxes)}</div>'


def section(title: str, *parts: str, note: str = "", kind: str = "") -> str:
    """``parts`` are HTML, the rest is text. ``kind`` is a class of the style sheet."""
    lead = f'<p class="note">{escape(note)}</p>' if note else ""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return f"<section{attribute}><h2>{escape(title)}</h2>{lead}{''.join(parts)}</section>"


def paragraph(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def svg(content: bytes, alt: str) -> str:
    """An SVG file as an image: its identifiers and scripts cannot meet those of the page."""
    return _image("image/svg+xml", content, alt)


def png(content: bytes, alt: str) -> str:
    return _image("image/png", content, alt)


def figures(images: Sequence[str], kind: str = "") -> str:
    """Images side by side where there is room: three, or two with kind "two"."""
    return f'<div class="figures {escape(kind)}">{"".join(images)}</div>' if images else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], strong_last: bool = False) -> str:
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    body = "".join(
        (STRONG_ROW if strong_last and index == len(rows) - 1 else "<tr>")
        + "".join(f"<td>{escape(cell)}</td>" for cell in row)
        + "</tr>"
        for index, row in enumerate(rows)
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
    """A table of names and values."""
    body = "".join(f"<tr><td>{escape(name)}</td><td>{escape(value)}</td></tr>" for name, value in rows)
    return f'<div class="scroll"><table class="facts"><tbody>{body}</tbody></table></div>'


def collapsed(summary: str, text: str) -> str:
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def _image(kind: str, content: bytes, alt: str) -> str:
    data = base64.b64encode(content).decode("ascii")
    return f'<img alt="{escape(alt)}" src="data:{kind};base64,{data}">'
