"""A headless Chromium, started with a page: what it lays out, and the PDF that it prints."""

import json
import os
import re
import shutil
import subprocess
import tempfile
from html import unescape
from pathlib import Path

# The variable names another program.
VARIABLE = "PECKER_FAST_BROWSER"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome-headless-shell")
OPTIONS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
OPTIONS += ["--disable-extensions", "--disable-background-networking", "--hide-scrollbars"]

# Runs in the page, and tells the page around it what was laid out.
SCRIPT = """
addEventListener("load", () => {
  const width = document.documentElement.clientWidth, outside = [], scrolls = [];
  for (const element of document.body.querySelectorAll("*")) {
    const box = element.getBoundingClientRect();
    if (getComputedStyle(element).overflowX === "auto" && element.scrollWidth > element.clientWidth + 1)
      scrolls.push([element.tabIndex, element.getAttribute("role"), element.getAttribute("aria-label")]);
    const hidden = element.closest(".hidden, thead");
    if (!hidden && !element.closest(".scroll") && (box.right > width + 1 || box.left < -1))
      outside.push(element.tagName + " " + element.textContent.slice(0, 60));
  }
  // A character without a glyph is drawn as this one, which no font has.
  const canvas = Object.assign(document.createElement("canvas"), {width: 60, height: 60}).getContext("2d");
  const drawn = character => {
    canvas.clearRect(0, 0, 60, 60);
    canvas.font = "40px " + getComputedStyle(document.body).fontFamily;
    canvas.fillText(character, 5, 45);
    return canvas.getImageData(0, 0, 60, 60).data.join();
  };
  const nothing = drawn("\\u{10FFFE}");
  const characters = [...new Set(document.body.innerText)].filter(x => x.trim());
  const images = [...document.images].map(x => [x.alt, x.clientWidth / x.naturalWidth, x.clientWidth]);
  parent.postMessage(JSON.stringify({
    name: window.name, width, page: document.documentElement.scrollWidth, outside, scrolls, images,
    missing: characters.filter(x => drawn(x) === nothing),
    cards: [...document.querySelectorAll("tbody tr")].filter(x => getComputedStyle(x).display === "grid").length,
  }), "*");
});
"""
AROUND = """<!DOCTYPE html><html><body><pre id="told"></pre><script>
const told = [];
addEventListener("message", message => {{
  told.push(JSON.parse(message.data));
  document.getElementById("told").textContent = JSON.stringify(told);
}});
</script>{frames}</body></html>"""


def find() -> str | None:
    """The program; None if there is none."""
    wanted = os.environ.get(VARIABLE)
    return wanted or next(filter(None, map(shutil.which, NAMES)), None)


def start(*arguments: str) -> str:
    """Run the browser once, in a profile of its own, and return what it prints.

    Raises
    ------
    OSError
        If it does not start, or fails.
    """
    with tempfile.TemporaryDirectory(prefix="pecker-fast-browser-", ignore_cleanup_errors=True) as profile:
        command = [find(), *OPTIONS, f"--user-data-dir={profile}", *arguments]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=180, check=True)
        except subprocess.SubprocessError as error:
            raise OSError(f"{command[0]} failed: {error}; {getattr(error, 'stderr', '')!s:.300}") from error
    return done.stdout


def laid_out(pages: dict[str, Path], widths: tuple[int, ...], folder: Path) -> dict[tuple[str, int], dict]:
    """How the browser lays out pages in windows of several widths, by name and width: see ``SCRIPT``."""
    frames = []
    for name, page in pages.items():
        copy = folder / f"{name}.html"
        copy.write_text(page.read_text().replace("</body>", f"<script>{SCRIPT}</script></body>"))
        for width in widths:
            frame = f'<iframe name="{name} {width}" src="{copy.name}" style="width:{width}px;height:900px;border:0">'
            frames.append(f"{frame}</iframe>")
    around = folder / "around.html"
    around.write_text(AROUND.format(frames="".join(frames)))
    text = start("--virtual-time-budget=30000", "--window-size=1400,1000", "--dump-dom", around.as_uri())
    told = json.loads(unescape(re.search(r'<pre id="told">(.*?)</pre>', text, re.DOTALL)[1]))
    results = {}
    for record in told:
        name, width = record["name"].rsplit(" ", 1)
        results[name, int(width)] = record
    return results


def printed(page: Path, target: Path) -> Path:
    """The page as a PDF."""
    start("--no-pdf-header-footer", f"--print-to-pdf={target}", page.as_uri())
    return target
