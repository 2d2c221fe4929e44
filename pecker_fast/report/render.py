"""Reports as Markdown and as a self-contained HTML page, both rendered from the same sections."""

import base64
import json
from collections.abc import Sequence
from pathlib import Path

from ..files import write_text
from .blocks import Block, Code, Link, Picture, Section, Text

# No scripts, fonts or other external resources. Colours follow the reader's preference; prints are white.
PAGE = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{{ title }}</title>
<style>
:root { color-scheme: light dark; --ink: #1d1d1f; --paper: #fff; --line: #d0d0d4; --soft: #f4f4f6; --link: #0059b3; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e9; --paper: #17171a; --line: #44444a; --soft: #232328; --link: #7db8ff; }
}
@media print {
  :root { color-scheme: light; --ink: #000; --paper: #fff; --line: #aaa; --soft: #f4f4f6; }
  nav { display: none; }
  figure, tr { break-inside: avoid; }
  h2 { break-after: avoid; }
  pre { white-space: pre-wrap; }
  td { overflow-wrap: anywhere; }
}
body { margin: 0 auto; padding: 1.5rem; max-width: 62rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
a { color: var(--link); }
nav ul { padding: 0; list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1rem; }
h2 { margin-top: 2.2rem; border-bottom: 1px solid var(--line); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 1rem 0; font-variant-numeric: tabular-nums; }
caption { text-align: left; font-weight: 600; padding: .2rem 0; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top;
  overflow-wrap: break-word; }
th { font-weight: 600; }
tbody th { font-weight: 500; }
td.l { max-width: 44rem; }
.r { text-align: right; white-space: nowrap; }
figure { margin: 1rem 0; }
img { max-width: 100%; height: auto; background: #fff; padding: .3rem; box-sizing: border-box; }
figcaption { font-size: .9rem; }
pre { padding: .8rem; overflow-x: auto; background: var(--soft); font-size: .85rem; }
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
<p>{{ block.text }}</p>
{%- elif kind == "Code" %}
<pre><code>{{ block.text }}</code></pre>
{%- elif kind == "Link" %}
<p><a href="{{ block.path }}.html">{{ block.text }}</a></p>
{%- elif kind == "Picture" %}
<figure>
<img src="data:image/png;base64,{{ block.data }}" alt="{{ block.alt }}">
{%- if block.caption %}
<figcaption>{{ block.caption }}</figcaption>
{%- endif %}
</figure>
{%- else %}
<div class="wide"><table>
{%- if block.caption %}
<caption>{{ block.caption }}</caption>
{%- endif %}
<thead><tr>
{%- for cell in block.head -%}
<th scope="col" class="{{ block.align[loop.index0] }}">{{ cell }}</th>
{%- endfor -%}
</tr></thead>
<tbody>
{%- for row in block.rows %}
<tr>
{%- for cell in row -%}
{%- if loop.first -%}<th scope="row">{{ cell }}</th>
{%- else -%}<td class="{{ block.align[loop.index0] }}">{{ cell }}</td>{%- endif -%}
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


def to_html(title: str, sections: Sequence[Section], folder: Path) -> str:
    """The sections as one page, with the pictures of ``folder`` embedded."""
    # A dependency of torch.
    from jinja2 import Environment, StrictUndefined

    def shown(block: Block) -> tuple[str, object]:
        if isinstance(block, Picture):
            file = folder / block.path
            if not file.is_file():
                return "Text", Text(_missing(block))
            data = base64.b64encode(file.read_bytes()).decode()
            return "Picture", {"data": data, "alt": block.alt, "caption": block.caption}
        return type(block).__name__, block

    page = Environment(autoescape=True, undefined=StrictUndefined).from_string(PAGE)
    described = [{"title": s.title, "blocks": [shown(block) for block in s.blocks]} for s in sections]
    return page.render(title=title, sections=described) + "\n"


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
