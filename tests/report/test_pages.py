"""Report pages in a real browser: laid out at 1200 and 400 pixels, and printed."""

import json
import unicodedata

import pytest
import torch
from PIL import Image

from pecker_fast.report import (
    CLASSES,
    RunRecord,
    save_before_after,
    write_across,
    write_robustness_report,
    write_run_report,
)
from pecker_fast.report.panels import cut
from tests.report import browser
from tests.report.test_render import Page
from tests.report.test_report import make_prompt_run, make_run

WIDTHS = (1200, 400)
# Latin, Greek, Cyrillic, signs of mathematics.
NAMES = ("Öl", "γάτα", "кошка", "θ₀ ≥ 98 %", "naïveté déjà vu, a rather long name of a class", *"56789")
SHA = "0123456789abcdef" * 4


def everything(folder):
    """A run with every kind of section, whose classes have names of several alphabets."""
    rows = [
        {"class": name, "role": "forgotten" if i in (0, 3) else "retained", "images": 50, "accuracy": 97.0 - 30 * i % 7,
         "probability": 0.5, "called": NAMES[(i + 1) % 10], "called_share": 3.0, "accuracy_before": 99.0}
        for i, name in enumerate(NAMES)
    ]  # fmt: skip
    drawn = [{"class": NAMES[i], "shares": dict.fromkeys(NAMES, 10.0)} for i in (0, 3)]
    protocol = {"judge": {"name": "some", "accuracy": 0.9, "sha256": SHA}, "samples": {"samples_per_class": 50}}
    make_run(folder, by_class={"classes": rows, "drawn_as": drawn}, protocol=protocol, weights_sha256=SHA)
    labels = torch.arange(10).repeat_interleave(8)
    images = torch.rand(80, 1, 8, 8) * 2 - 1
    save_before_after(folder / "samples" / "before_after.png", images, -images, labels, NAMES, highlight=(0, 3))
    layer = {"parameters": 1234, "changed": 0.25, "drift": 1.6e-5, "salient": 0.5}
    name = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0"
    files = {
        "drift.json": {"total": layer, "modules": {"down_blocks.0": layer}, "layers": {name: layer}},
        "hashes.json": {"unet/diffusion_pytorch_model.safetensors": {"bytes": 4567, "sha256": SHA}},
        "environment.json": {"python": "3.99", "backends": {"cpu": {"cuda": "no GPU", "cpu": None}}},
    }
    for file, value in files.items():
        (folder / file).write_text(json.dumps(value))
    command = ["pecker-fast", "unlearn", "--preset", "digits", "--output_dir", "runs/" + "a_long_name_" * 12]
    event = {"event": "started", "date": "2026-01-02T03:04:05+00:00", "step": 0, "command": command, "version": "1",
             "commit": SHA[:40], "python": "3", "torch": "2"}  # fmt: skip
    (folder / "history.jsonl").write_text(json.dumps(event) + "\n")
    return write_run_report(folder).with_suffix(".html")


def of_prompts(folder):
    detector = {"gcd_score": 0.25, "no_face_share": 0.5}
    prompts = [{"prompt": f"prompt {i} " * 9, "images": 3, **detector, "clip_score": 21.5} for i in range(12)]
    protocol = {"concept": {"measured": ["gcd_score"], "detectors": {"kind": "stand-in"}}}
    measured = {"by_prompt": {"concept": prompts, "near": prompts}, "protocol": protocol, "measured_images": 36}
    make_prompt_run(folder, **detector, **measured)
    (folder / "samples").mkdir()
    Image.new("RGB", (900, 300), (1, 2, 3)).save(folder / "samples" / "before_after.png")
    return write_run_report(folder).with_suffix(".html")


def comparison(folder):
    """As many columns as there are, of four methods."""
    folder.mkdir()
    runs = {}
    for i, name in enumerate(("pecker", "sfd", "selective_amnesia", "größe")):
        lines = [
            {"step": s, "images": 10 * s, "seconds": s, **dict.fromkeys(CLASSES.curves, 90.0 - s)} for s in range(1, 5)
        ]
        values = {key: 12345.678 + 1000 * i + j for j, key in enumerate(CLASSES.columns)}
        runs[name] = [
            RunRecord(folder / f"{name}-{seed}", {}, {**values, "seed": seed}, [], lines) for seed in range(3)
        ]
    facts = {name: {"data-free": "yes", "sampler": "one step"} for name in runs}
    path = write_across(folder, runs, asked="Forget “кошка”.", command="pecker-fast compare", facts=facts)
    return path.with_suffix(".html")


def robustness(folder):
    """Five attacks: fifteen panels."""
    folder.mkdir()
    rows = [
        {"network": "run", "data": "forgotten", "attack": attack, "sampler": "one step", "step": step, "images": step,
         "ua": 100.0 - step, "retain_accuracy": 90.0, "forget_frechet": 5.0 - step / 50}
        for attack in ("full", "embedding", "inversion", "inversion_random", "adapter") for step in (0, 20, 50)
    ]  # fmt: skip
    protocol = {"sampler": "one step", "seed": 0, "judge": {"name": "some"},
                "relearn": {"images": 16, "learning_rate": 1e-3, "pretrained": {}}}  # fmt: skip
    result = {"method": "pecker", "forget_classes": [0], "seconds": 1.0, "protocol": protocol, "relearn": rows}
    (folder / "robustness.json").write_text(json.dumps(result))
    return write_robustness_report(folder).with_suffix(".html")


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pages")
    made = {"run": everything, "prompts": of_prompts, "comparison": comparison, "robustness": robustness}
    return {name: make(folder / name) for name, make in made.items()}


@pytest.fixture(scope="module")
def chromium():
    if browser.find() is None:
        pytest.skip(f"there is no Chromium ({', '.join(browser.NAMES)}, or {browser.VARIABLE})")
    try:
        assert "<html" in browser.start("--dump-dom", "about:blank")
    except OSError as error:
        pytest.skip(f"Chromium does not start here: {error}")


@pytest.fixture(scope="module")
def laid_out(chromium, pages, tmp_path_factory):
    return browser.laid_out(pages, WIDTHS, tmp_path_factory.mktemp("laid-out"))


@pytest.mark.slow
def test_pages_fit_their_window(laid_out, pages):
    assert set(laid_out) == {(name, width) for name in pages for width in WIDTHS}
    for place, page in laid_out.items():
        assert page["width"] == place[1], place
        assert page["page"] <= place[1] and page["outside"] == [], place
        # Whatever scrolls can be reached by the keyboard, and has a name.
        assert all(tab == 0 and role == "region" and name for tab, role, name in page["scrolls"]), place


@pytest.mark.slow
def test_wide_tables_become_cards_on_a_narrow_screen(laid_out):
    for (name, width), page in laid_out.items():
        assert (page["cards"] > 0) == (width == 400), (name, width)
        # Nothing is left to scroll where rows are cards.
        assert width != 400 or page["scrolls"] == [], name
    assert laid_out["comparison", 1200]["scrolls"] == [[0, "region", "Result"]]


@pytest.mark.slow
def test_no_character_is_an_empty_box(laid_out):
    for place, page in laid_out.items():
        assert page["missing"] == [], place


@pytest.mark.slow
def test_panels_can_be_read(laid_out):
    """Letters of 10 points at 110 dots an inch are 15 pixels high in the file."""
    for place, page in laid_out.items():
        for name, scale, _ in page["images"]:
            # The prompts beside samples are also listed in words.
            assert 15 * scale >= 8 or name.startswith("Samples of prompts"), (place, name, scale)
    names = [name for name, *_ in laid_out["robustness", 400]["images"]]
    assert len(names) == 16 and names[0] == "Legend" and "embedding" in " ".join(names)


def test_a_character_without_a_glyph_is_noticed(chromium, tmp_path):
    """The check of the pages can fail: a private character, a table that is too wide, a picture too small."""
    page = tmp_path / "bad.html"
    page.write_text("<!DOCTYPE html><html><body>\U0010fff0<p style='width:900px'>wide</p></body></html>")
    (record,) = browser.laid_out({"bad2": page}, (400,), tmp_path).values()
    assert record["missing"] == ["\U0010fff0"] and record["page"] > 400 and record["outside"]


def squeezed(text: str) -> str:
    """Without spaces, and with the letters of ligatures."""
    return "".join(unicodedata.normalize("NFKC", text).split())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["run", "comparison"])
def test_print_has_every_column(chromium, pages, tmp_path, name):
    pypdf = pytest.importorskip("pypdf", reason="pypdf reads the PDF: pip install pypdf")
    reader = pypdf.PdfReader(browser.printed(pages[name], tmp_path / "p.pdf"))
    texts = []
    for sheet in reader.pages:
        width = float(sheet.mediabox.width)
        # A4, in points.
        assert (width, float(sheet.mediabox.height)) == pytest.approx((595, 842), abs=1)

        def inside(text, cm, tm, _font, _size, width=width):
            x = cm[0] * tm[4] + cm[2] * tm[5] + cm[4]
            assert not text.strip() or -1 <= x <= width, (text, x)

        texts.append(sheet.extract_text(visitor_text=inside))
    text = squeezed("".join(texts))
    for word in squeezed_words(pages[name]):
        assert word in text, word
    assert len(reader.pages) < 30


def squeezed_words(page) -> list[str]:
    """The text of every cell of a page."""

    class Cells(Page):
        def handle_starttag(self, tag, attrs):
            super().handle_starttag(tag, attrs)
            if tag in ("td", "th"):
                self.cells.append("")

        def handle_data(self, data):
            super().handle_data(data)
            if {"td", "th"} & set(self.open):
                self.cells[-1] += data

        def __init__(self, text):
            self.cells = []
            super().__init__(text)

    return [squeezed(cell) for cell in Cells(page.read_text()).cells]


def test_panels_are_cut_where_they_were_drawn(tmp_path):
    parts = cut(robustness(tmp_path / "robustness").parent / "robustness.png")
    assert len(parts) == 16 and all(data.startswith(b"\x89PNG") for _, data in parts)
    Image.new("RGB", (4, 4)).save(tmp_path / "plain.png")
    assert cut(tmp_path / "plain.png") == [("", (tmp_path / "plain.png").read_bytes())]
