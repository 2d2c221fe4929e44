"""One report, two renderings: the same content, escaped marks, embedded pictures."""

import base64
import re
from html.parser import HTMLParser

import pytest
from PIL import Image

from pecker_fast.report.blocks import Code, Link, Picture, Section, Table, Text, blocks_of, value_text
from pecker_fast.report.render import to_html, to_markdown, write_document

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """Fails if tags do not match; gathers text, pictures and references."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open, self.words, self.pictures, self.references, self.tags = [], [], [], [], []
        self.ids: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"not closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        if tag == "img":
            assert attrs.get("alt"), "a picture without words"
            self.pictures.append(attrs["src"])
        if "id" in attrs:
            assert attrs["id"] not in self.ids
            self.ids.append(attrs["id"])
        self.references += [attrs[name] for name in ("src", "href", "action", "data", "srcset") if name in attrs]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())


def check_page(text: str) -> Page:
    """Well-formed, and complete in itself."""
    page = Page(text)
    for reference in page.references:
        inside = reference.startswith(("data:image/png;base64,", "#"))
        # Reports of runs are linked to, not fetched.
        assert inside or re.fullmatch(r"[\w./-]+\.html", reference), reference
        assert not reference.startswith("#") or reference[1:] in page.ids
    for word in ("http://", "https://", "@import", "url(", "<script", "javascript:"):
        assert word not in text, word
    assert text.startswith("<!DOCTYPE html>") and '<html lang="en">' in text
    assert "prefers-color-scheme: dark" in text and "@media print" in text
    assert page.tags.count("title") == page.tags.count("h1") == page.tags.count("main") == 1
    return page


@pytest.fixture
def sections(tmp_path):
    Image.new("RGB", (3, 2), (200, 10, 30)).save(tmp_path / "p.png")
    return [
        Section(
            "First & <second>",
            [
                Text("a <b>bold</b> claim & `code` *star*"),
                Table(("name", "x|y"), [("<script>", "1|2"), ("long\nline", "3")], "lr", "what <it> is"),
                Picture("p.png", 'red "square"', "a <caption>"),
                Picture("nowhere.png", "nothing"),
            ],
        ),
        Section("Third", [Code("```\n<i>x</i>\n```", "json"), Link("the run", "run/report")]),
    ]


def test_html_content(tmp_path, sections):
    page = check_page(to_html('T "<i>"', sections, tmp_path))
    for words in (
        'T "<i>"', "First & <second>", "a <b>bold</b> claim & `code` *star*", "<script>", "1|2", "what <it> is",
        "a <caption>", "nowhere.png is missing.", "``` <i>x</i> ```", "the run",
    ):  # fmt: skip
        assert words in page.text, words
    (picture,) = page.pictures
    data = base64.b64decode(picture.partition(",")[2])
    assert data == (tmp_path / "p.png").read_bytes()
    assert "run/report.html" in page.references
    # Row and column titles are marked as header cells.
    assert page.tags.count("th") == 2 + 2 and page.tags.count("td") == 2 and page.tags.count("caption") == 1


def test_markdown_content(tmp_path, sections):
    text = to_markdown("T", sections, tmp_path)
    assert "## First & \\<second>" in text and "a \\<b>bold\\</b> claim & \\`code\\` \\*star\\*" in text
    lines = text.splitlines()
    head = lines.index("| name | x\\|y |")
    assert lines[head + 1 : head + 4] == ["| --- | ---: |", "| \\<script> | 1\\|2 |", "| long line | 3 |"]
    assert '![red "square"](p.png)' in lines and "nowhere.png is missing." in lines
    assert "````json" in lines and "[the run](run/report.md)" in lines


def test_documents_are_written_together(tmp_path, sections):
    path = write_document(tmp_path, "T", sections)
    assert path == tmp_path / "report.md" and (tmp_path / "report.html").read_text().count("<h2") == 2


def test_any_json_becomes_tables():
    value = {
        "seed": 3,
        "probe": {"kind": "relearn", "ok": True, "none": None, "steps": [1, 2]},
        "inner": {"rows": [{"step": 1, "ua": 99.5, "note": "a"}, {"step": 2, "ua": None, "more": 1e-7}]},
        "empty": {},
    }
    first, second = blocks_of(value, "caption")
    assert first.rows == [
        ("seed", "3"), ("probe.kind", "relearn"), ("probe.ok", "yes"), ("probe.none", "-"), ("probe.steps", "1, 2"),
    ]  # fmt: skip
    assert first.caption == "caption" and second.caption == "inner.rows"
    assert list(second.head) == ["step", "ua", "note", "more"] and second.align == "rrlr"
    assert second.rows == [["1", "99.5", "a", "-"], ["2", "-", "-", "1e-07"]]
    assert blocks_of({}) == [] and value_text({"a": {"b": 1}}) == "a: b: 1"
