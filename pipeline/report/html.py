"""HTML of which everything is escaped but what this file made."""

from __future__ import annotations

import html
from collections.abc import Iterable, Sequence
from typing import Any

MARK = "protoshard report"  # in the head of each page, by which one is known for what may be written over
# No script, no other file: not even a page that was tampered with loads anything.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
STYLE = """
:root { color-scheme: light; --line: #d0d5dc; --soft: #f5f6f8; --dim: #555c66 }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 1180px; padding: 24px 28px 64px; background: #fff; color: #16191d;
  font: 15px/1.5 system-ui, "Segoe UI", "DejaVu Sans", sans-serif }
h1 { font-size: 26px; line-height: 1.25; margin: 0 0 4px; overflow-wrap: anywhere }
h2 { font-size: 20px; margin: 40px 0 10px; padding-top: 12px; border-top: 2px solid #16191d; overflow-wrap: anywhere }
h3 { font-size: 16px; margin: 24px 0 6px; overflow-wrap: anywhere }
p { margin: 6px 0; max-width: 85ch; overflow-wrap: anywhere }
a { color: #0b5394 }
nav { margin: 14px 0; font-size: 14px } nav a { margin-right: 14px; white-space: nowrap }
.dim, figcaption, caption { color: var(--dim); font-size: 13px }
.lead { font-size: 17px }
.scroll { overflow-x: auto; margin: 8px 0 }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums }
caption { caption-side: bottom; text-align: left; padding-top: 4px; max-width: 85ch }
th, td { padding: 4px 12px 4px 0; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) }
th { font-weight: 600; max-width: 40ch; overflow-wrap: anywhere } tbody th { min-width: 14ch }
thead th { border-bottom: 2px solid #8a929d; vertical-align: bottom }
td.n, th.n { text-align: right } td.n { white-space: nowrap } th.n { max-width: 16ch; overflow-wrap: break-word }
td { overflow-wrap: anywhere; max-width: 60ch }
td small { color: var(--dim); display: block }
td.best { background: #e8f3ec } td.first { background: var(--soft) }
.figures { display: grid; grid-template-columns: repeat(auto-fill, minmax(340px, 1fr)); gap: 14px 18px; margin: 10px 0 }
.wide { grid-template-columns: repeat(auto-fill, minmax(480px, 1fr)) }
figure { margin: 0 } figure img { width: 100%; height: auto; display: block }
.pairs { display: grid; grid-template-columns: repeat(auto-fill, minmax(240px, 1fr)); gap: 12px 16px }
.pairs img { border: 1px solid var(--line) }
.pairs figcaption { line-height: 1.3; overflow-wrap: anywhere }
.key { display: flex; flex-wrap: wrap; gap: 4px 22px; margin: 8px 0; padding: 0; list-style: none; font-size: 14px }
.key img { width: 34px; height: 10px; margin-right: 6px; vertical-align: middle }
.beside { display: flex; flex-wrap: wrap; gap: 0 44px } .beside tbody th { min-width: 8ch }
details { margin: 8px 0 } summary { cursor: pointer; color: #0b5394 }
ul { margin: 6px 0; padding-left: 22px } li { overflow-wrap: anywhere }
@media print {
  @page { size: A4; margin: 14mm }
  body { max-width: none; padding: 0; font-size: 10pt } nav { display: none }
  h2 { margin-top: 22px; break-after: avoid } h3 { break-after: avoid } figure, tr, .key { break-inside: avoid }
  table { font-size: 8.5pt } th, td { padding-right: 8px } td.n small { white-space: normal } .scroll { overflow: visible }
  .figures { grid-template-columns: 1fr 1fr } .pairs { grid-template-columns: repeat(4, 1fr) } .pairs img { width: 100% }
  td.best, td.first { print-color-adjust: exact }
}
"""


class Safe(str):
    """Text that is HTML already."""


def text(value: Any) -> Safe:
    """Of anything, so that a browser shows it as it is. What is Safe stays."""
    return value if isinstance(value, Safe) else Safe(html.escape(str(value), quote=True))


def tag(name: str, *inner: Any, **attributes: Any) -> Safe:
    """<name attributes>inner</name>; attributes of the value None are left out, `class_` is class."""
    given = "".join(f' {key.rstrip("_")}="{text(value)}"' for key, value in attributes.items() if value is not None)
    return Safe(f"<{name}{given}>{''.join(map(text, inner))}</{name}>")


def joined(parts: Iterable[Any], between: str = "\n") -> Safe:
    return Safe(between.join(map(text, parts)))


def image(address: str, alt: str) -> Safe:
    return Safe(f'<img src="{text(address)}" alt="{text(alt)}">')


def table(head: Sequence[Any], rows: Iterable[Sequence[Any]], caption: Any = None, numbers: bool = True) -> Safe:
    """The first column names its row; others are aligned as `numbers` or as words. Cells of tag("td", ...) are taken as they are."""
    kind = "n" if numbers else None

    def cell(value: Any, place: int) -> Safe:
        if isinstance(value, Safe) and value.startswith("<td"):
            return value
        return tag("td", value, class_=kind) if place else tag("th", value, scope="row")

    top = tag("thead", tag("tr", *(tag("th", name, scope="col", class_=kind if place else None) for place, name in enumerate(head))))
    body = [tag("tr", *(cell(value, place) for place, value in enumerate(row))) for row in rows]
    note = tag("caption", caption) if caption else ""
    return tag("div", tag("table", note, top, tag("tbody", joined(body))), class_="scroll")


def bullets(items: Iterable[Any]) -> Safe:
    return tag("ul", *(tag("li", item) for item in items))


def page(title: str, *sections: Any) -> str:
    head = joined(
        [
            Safe('<meta charset="utf-8">'),
            Safe(f'<meta name="generator" content="{MARK}">'),
            Safe(f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'),
            Safe('<meta name="viewport" content="width=device-width, initial-scale=1">'),
            tag("title", title),
            tag("style", Safe(STYLE)),
        ]
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>\n{joined(sections)}\n</body>\n</html>\n'
