"""The report of attacks on a text-to-image run."""

import json

import pytest
from PIL import Image

from pecker_fast.report import save_grid, write_prompt_robustness_report
from pecker_fast.runs.robustness_figures import costs_of_prompts
from tests.report.test_render import check_page
from tests.runs.test_robustness_figures import curve


@pytest.fixture
def result(tmp_path):
    rows = [
        *curve("run", "matching", {0: 100, 50: 80, 100: 20}),
        *curve("run", "inversion", {0: 100, 200: 60, 400: 55}),
        *curve("relabel", "matching", {0: 100, 50: 30, 100: 0}),
        *curve("relabel", "inversion", {0: 100, 200: 0, 400: 0}),
    ]
    rows = [{**row, "near_clip_score": 25.0 - row["step"] / 100} for row in rows]
    costs, summary = costs_of_prompts(rows)
    recipe = {"images": 16, "learning_rate": 1e-5, "embedding_learning_rate": 5e-3, "trained": "all"}
    recipe |= {"images_are": "given", "images_shown_ua": 6.25}
    recipe |= {"pretrained": {"DDIM, 25 steps": {"ua": 2.0, "near_clip_score": 26.0}}}
    protocol = {
        "sampler": "one step at 625",
        "seed": 3,
        "decided_by": "clip",
        "relearn": recipe,
        "notes": ["No control."],
    }
    head = {"method": "patch", "task": "celebrity", "concept": "Brad Pitt", "cover": "a man", "seconds": 61.0}
    record = {**head, "summary": summary, "relearn": rows, **costs, "protocol": protocol}
    (tmp_path / "robustness.json").write_text(json.dumps(record))
    return record


def test_it_leads_with_the_costs(result, tmp_path):
    import torch

    (tmp_path / "samples").mkdir()
    save_grid(tmp_path / "samples" / "relearn-run-matching.png", torch.zeros(1, 3, 8, 8), torch.zeros(1).long(), ["x"])
    path = write_prompt_robustness_report(tmp_path)
    text = path.read_text()
    titles = ["What it costs to bring the concept back", "By fine-tuning", "By inversion", "## Request", "## Attacks"]
    places = [text.index(title) for title in (*titles, "## Pictures", "## Figures")]
    assert places == sorted(places)
    for key in ("cost", "inversion_cost"):
        assert result[key]["verdicts"]["relabel"]["text"] in text
    assert text.count("No control.") == 1 and "> 400" in text and "UA is 6.2 %" in text
    # A cell has UA and the figure of near concepts, and columns are the attack's own steps.
    assert (
        "| matching, one step at 625 | 0 | 50 | 100 |" in text and "| this run | 100.0 / 25.00 | 80.0 / 24.50 |" in text
    )
    assert "| inversion, one step at 625 | 0 | 200 | 400 |" in text and "DDIM, 25 steps: 2.0 / 26.00" in text
    assert "CLIP finds the image nearer to the prompt with the cover" in text and "class" not in text
    page = check_page((tmp_path / "robustness.html").read_text())
    assert page.tags.count("figure") == 2 and page.tags.count("table") == 7
    # Two attacks, two panels each, with something drawn.
    picture = Image.open(tmp_path / "robustness.png").convert("L")
    assert picture.size[0] > 600 and len(picture.getcolors(256) or range(257)) > 20


def test_a_damaged_file(tmp_path):
    (tmp_path / "robustness.json").write_text('{"relearn": [{}]}')
    with pytest.raises(ValueError, match=r"robustness\.json"):
        write_prompt_robustness_report(tmp_path)
