"""Reports as Markdown and as a self-contained HTML page, both rendered from the same sections."""

import base64
import json
import re
from collections.abc import Sequence
from pathlib import Path

from ..files import write_text
from . import panels
from .blocks import Block, Caution, Code, Items, Link, Picture, Section, Text

# No scripts, fonts or other external resources. Colours follow the reader's preference; prints are white. On a narrow
# screen the rows of a table with more than two columns become cards, in print those of a table that is too wide for it.
PAGE = """\
{%- macro cards(table) %}
  {{ table }}, {{ table }} caption:not(.hidden), {{ table }} tbody { display: block; }
  {{ table }} thead { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
  {{ table }} tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 13rem), 1fr));
    gap: 0 1.2rem; padding: .4rem .6rem; margin: 0 0 .6rem; border: 1px solid var(--line); break-inside: avoid; }
  {{ table }} tbody th { display: block; grid-column: 1 / -1; padding: 0; border: 0; font-weight: 700; }
  {{ table }} td { display: flex; justify-content: space-between; gap: .8rem; padding: .1rem 0; border: 0;
    max-width: none; white-space: normal; }
  {{ table }} td.l { text-align: left; }
  {{ table }} td:empty { display: none; }
  {{ table }} td.long { grid-column: 1 / -1; display: block; }
  {{ table }} td::before { content: attr(data-label); content: attr(data-label) / ""; color: var(--faint);
    text-align: left; }
  {{ table }} td.long::before { display: block; }
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --line: #d0d0d4; --soft: #f4f4f6; --link: #0059b3;
  --faint: #55555c; --warn: #fff4d6; --edge: #b36b00; --shade: rgba(0, 0, 0, .25); }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e9; --paper: #17171a; --line: #44444a; --soft: #232328; --link: #7db8ff;
    --faint: #a9a9b2; --warn: #33280f; --edge: #e0a030; --shade: rgba(255, 255, 255, .3); }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, "Noto Sans", "DejaVu Sans", sans-serif; overflow-wrap: break-word; }
a { color: var(--link); }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
h1, h2 { line-height: 1.25; overflow-wrap: anywhere; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.hidden { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); }
.warning { padding: .5rem .8rem; background: var(--warn); border-left: .3rem solid var(--edge); }
.table { margin: 1rem 0; }
/* A shadow marks the edge behind which a wide table goes on. */
.scroll { overflow-x: auto; background: linear-gradient(to right, var(--paper) 40%, transparent) left / 3rem 100%,
  linear-gradient(to left, var(--paper) 40%, transparent) right / 3rem 100%,
  linear-gradient(to right, var(--shade), transparent) left / .8rem 100%,
  linear-gradient(to left, var(--shade), transparent) right / .8rem 100%;
  background-repeat: no-repeat; background-attachment: local, local, scroll, scroll; }
.scroll:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
th { font-weight: 600; }
tbody th { font-weight: 500; }
/* Words that are longer than a column, such as hashes. */
.break { overflow-wrap: anywhere; }
td.l { max-width: 44rem; }
.r { text-align: right; }
td.r { white-space: nowrap; }
.pair tbody th { width: 24%; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; padding: .3rem; box-sizing: border-box; }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 18rem), 1fr)); gap: .4rem;
  align-items: start; }
.legend { grid-column: 1 / -1; }
.two { grid-template-columns: repeat(auto-fill, minmax(min(100%, 22rem), 1fr)); }
figcaption { font-size: .9rem; }
pre { padding: .8rem; background: var(--soft); font-size: .85rem; white-space: pre-wrap; overflow-wrap: anywhere; }
@media (max-width: 40rem) {
  body { padding: .8rem; }
  th, td { padding: .25rem .4rem; }
{{- cards(".more") }}
}
@page { size: A4; margin: 1.5cm; }
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --line: #aaa; --soft: #f4f4f6; --link: #000;
    --faint: #444; --warn: #fff; --edge: #000; --shade: transparent; }
  body { max-width: none; padding: 0; font-size: 10pt; }
  nav { display: none; }
  .scroll { overflow: visible; background: none; }
  figure, tr, .warning { break-inside: avoid; }
  h2, caption { break-after: avoid; }
{{- cards(".many") }}
}
</style>
</head>
<body>
<main>
<h1>{{ title }}</h1>
<nav aria-label="Sections"><ul>
{%- for section in sections %}
<li><a href="#s{{ loop.index }}">{{ section.title }}</a></li>
{%- endfor %}
</ul></nav>
{%- for section in sections %}
<section aria-labelledby="s{{ loop.index }}">
<h2 id="s{{ loop.index }}">{{ section.title }}</h2>
{%- for kind, block in section.blocks %}
{%- if kind == "Text" %}
<p>{{ block.text | tied }}</p>
{%- elif kind == "Caution" %}
<p class="warning" role="note"><strong>Caution:</strong> {{ block.text | tied }}</p>
{%- elif kind == "Items" %}
<ol>
{%- for item in block["items"] %}
<li>{{ item }}</li>
{%- endfor %}
</ol>
{%- elif kind == "Code" %}
<pre><code>{{ block.text }}</code></pre>
{%- elif kind == "Link" %}
<p><a href="{{ block.path }}.html">{{ block.text }}</a></p>
{%- elif kind == "Picture" %}
<figure>
{%- if block.panels | length > 1 %}
<div class="panels{{ " two" if block.panels | length == 2 }}" role="group" aria-label="{{ block.alt }}">
{%- endif %}
{%- for name, data in block.panels %}
{%- set kind = ' class="legend"' if name == LEGEND else "" %}
<img{{ kind | safe }} src="data:image/png;base64,{{ data }}" alt="{{ name or block.alt }}">
{%- endfor %}
{%- if block.panels | length > 1 %}
</div>
{%- endif %}
{%- if block.caption %}
<figcaption>{{ block.caption }}</figcaption>
{%- endif %}
</figure>
{%- else %}
{%- set columns = block.head | length %}
{%- if columns > WIDE %}
<div class="table scroll" role="region" aria-label="{{ block.caption or section.title }}" tabindex="0">
{%- else %}
<div class="table">
{%- endif -%}
<table role="table" class="{{ "pair" if columns == 2 else "more many" if columns > TOO_WIDE else "more" }}">
<caption{% if not block.caption %} class="hidden"{% endif %}>{{ block.caption or section.title }}</caption>
<thead role="rowgroup"><tr role="row">
{%- for cell in block.head -%}
<th role="columnheader" scope="col" class="{{ block.align[loop.index0] }}">{{ cell }}</th>
{%- endfor -%}
</tr></thead>
<tbody role="rowgroup">
{%- for row in block.rows %}
<tr role="row">
{%- for cell in row -%}
{%- set break, align = " break" if cell is unbroken else "", block.align[loop.index0] -%}
{%- if loop.first -%}<th role="rowheader" scope="row" class="l{{ break }}">{{ cell | tied }}</th>
{%- else -%}<td role="cell" class="{{ align }}{{ break }}{{ " long" if align == "l" and cell | length > 20 }}" {# -#}
data-label="{{ block.head[loop.index0] }}">{{ cell | tied }}</td>{%- endif -%}
{%- endfor -%}
</tr>
{%- endfor %}
</tbody>
</table></div>
{%- endif %}
{%- endfor %}
</section>
{%- endfor %}
</main>
</body>
</html>
"""
# A table with more columns than the first scrolls on a screen that is too narrow for it; with more than the second it
# is printed as cards.
WIDE, TOO_WIDE = 6, 8
# Letters of a word that may be broken anywhere.
LONGEST = 20
# A number and its unit, which stay in one line.
UNIT = re.compile(r"(\d) (%|GiB|s\b|nats\b)")


def to_html(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The sections as one page, with the pictures of ``folder`` embedded."""
    # A dependency of torch.
    from jinja2 import Environment, StrictUndefined

    def shown(block: Block) -> tuple[str, object]:
        if isinstance(block, Picture):
            file = folder / block.path
            if not file.is_file():
                return "Text", Text(_missing(block))
            parts = [(name, base64.b64encode(data).decode()) for name, data in panels.cut(file)]
            return "Picture", {"panels": parts, "alt": block.alt, "caption": block.caption}
        return type(block).__name__, block

    environment = Environment(autoescape=True, undefined=StrictUndefined)
    environment.filters["tied"] = lambda text: UNIT.sub("\\1\u00a0\\2", text)
    environment.tests["unbroken"] = lambda text: any(len(word) > LONGEST for word in text.split())
    page = environment.from_string(PAGE)
    described = [{"title": s.title, "blocks": [shown(block) for block in s.blocks]} for s in sections]
    return page.render(title=title, sections=described, WIDE=WIDE, TOO_WIDE=TOO_WIDE, LEGEND=panels.LEGEND) + "\n"


def _missing(picture: Picture) -> str:
    return f"{picture.path} is missing."


def _escaped(text: str) -> str:
    for mark in "\\*[]<`":
        text = text.replace(mark, f"\\{mark}")
    return text


def _cell(text: str) -> str:
    return " ".join(_escaped(text).replace("|", "\\|").split())


def _row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(map(_cell, cells)) + " |"


def _markdown(block: Block, folder: Path) -> list[str]:
    if isinstance(block, Text):
        return [_escaped(block.text), ""]
    if isinstance(block, Caution):
        return [f"> **Caution:** {_escaped(block.text)}", ""]
    if isinstance(block, Items):
        return [*(f"{i}. {_escaped(item)}" for i, item in enumerate(block.items, 1)), ""]
    if isinstance(block, Code):
        # The fence must be longer than any run of backticks in the text.
        fence = "```"
        while fence in block.text:
            fence += "`"
        return [f"{fence}{block.language}", block.text, fence, ""]
    if isinstance(block, Link):
        return [f"[{_escaped(block.text)}]({block.path}.md)", ""]
    if isinstance(block, Picture):
        if not (folder / block.path).is_file():
            return [_missing(block), ""]
        caption = [_escaped(block.caption), ""] if block.caption else []
        return [f"![{_escaped(block.alt)}]({block.path})", "", *caption]
    caption = [f"{_escaped(block.caption)}:", ""] if block.caption else []
    rule = "| " + " | ".join("---:" if side == "r" else "---" for side in block.align) + " |"
    return [*caption, _row(block.head), rule, *map(_row, block.rows), ""]


def to_markdown(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The sections as Markdown with GitHub's tables; pictures are linked by their path from ``folder``."""
    lines = [f"# {_escaped(title)}", ""]
    for section in sections:
        lines += [f"## {_escaped(section.title)}", ""]
        for block in section.blocks:
            lines += _markdown(block, folder)
    return "\n".join(lines)


def write_document(folder: Path, title: str, sections: Sequence[Section], name: str = "report") -> Path:
    """Writes ``name``.md and ``name``.html. Returns the path of ``name``.md."""
    for ending, text in (("html", to_html(title, sections, folder)), ("md", to_markdown(title, sections, folder))):
        write_text(folder / f"{name}.{ending}", text)
    return folder / f"{name}.md"


def json_code(value: object) -> Code:
    """A JSON value as indented code."""
    return Code(json.dumps(value, indent=1), "json")
