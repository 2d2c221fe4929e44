"""Hooks of mkdocs: the home page is README.md, and pictures and reports of benchmarks are part of the site."""

import re
from pathlib import Path

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
RESULTS = "benchmarks/results"


def on_files(files: Files, config) -> Files:
    """Adds README.md as the home page, and the results that pages link to."""
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    # Links of README.md start at the root of the repository.
    readme = readme.replace("](docs/)", "](training.md)").replace("](docs/", "](")
    readme = re.sub(r"\[([^\]]+)\]\((?:examples/|CONTRIBUTING\.md|CHANGELOG\.md|CITATION\.cff)\)", r"\1", readme)
    files.append(File.generated(config, "index.md", content=readme))
    for path in sorted((ROOT / RESULTS).rglob("*.png")) + sorted((ROOT / RESULTS).rglob("*.md")):
        files.append(File.generated(config, path.relative_to(ROOT).as_posix(), abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, **_) -> str:
    """Links from docs/ to results of benchmarks."""
    return markdown.replace(f"](../{RESULTS}/", f"]({RESULTS}/")
