"""The verdict of a report, and when it says that figures mean nothing."""

import json

import pytest

from pecker_fast.records import RecordError
from pecker_fast.report import RunRecord, cautions, write_run_report
from pecker_fast.report.cautions import forgotten_images, never_drawn, ua_interval
from pecker_fast.report.run_report import sections
from pecker_fast.report.verdict import history_blocks, verdict
from tests.report.test_report import make_prompt_run, make_run

JUDGE = {"judge": {"name": "some", "accuracy": 0.99}, "samples": {"samples_per_class": 100}, "forget_classes": [0]}
GOOD = {"ua": 99.0, "before_forget_accuracy": 100.0, "retain_accuracy": 97.0, "before_retain_accuracy": 98.0}
GOOD |= {"cover_diversity": 0.9, "diversity": 1.0, "protocol": JUDGE}


def classes(before=100.0, count=100, **after):
    rows = [
        {
            "class": name,
            "role": role,
            "images": count,
            "accuracy": accuracy,
            "accuracy_before": before_,
            "probability": 0.5,
            "called": None,
            "called_share": 0.0,
        }
        for name, role, accuracy, before_ in (("plane", "forgotten", 1.0, before), ("ship", "cover", 90.0, 99.0))
    ]
    return {"classes": rows, "drawn_as": [{"class": "plane", "shares": {"plane": 1.0, "ship": 97.0, "cat": 2.0}}]}


def test_good_figures_need_no_caution():
    assert cautions(GOOD) == [] and cautions({**GOOD, "by_class": classes()}) == [] and cautions({}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"before_forget_accuracy": 2.0}, "says nothing: before the run the judge recognised the class in 2.0 %"),
        ({"before_forget_accuracy": 2.1}, "says little"),
        ({"by_class": classes(before=0.0)}, "recognised class “plane” in 0.0 %"),
        ({"cover_diversity": 0.12}, "now drawn for the forgotten class are nearly alike (0.12"),
        ({"diversity": 0.3}, "images of the retained classes are nearly alike (0.30"),
        ({"protocol": {**JUDGE, "judge": {"accuracy": 0.94}}}, "recognises only 94.0 % of real images"),
        ({"protocol": {**JUDGE, "judge": {"accuracy": None}}}, "is not recorded"),
        ({"protocol": {}}, "is not recorded"),
        ({"by_class": classes(count=20)}, "rests on 20 images"),
        ({"retain_accuracy": 88.0}, "recognised in 88.0 % of their images, 98.0 % before"),
    ],
)
def test_what_makes_a_figure_meaningless(changes, words):
    (text,) = cautions({**GOOD, **changes})
    assert words in text


def test_faces_are_few():
    found = cautions({"no_face_share": 0.9, "gcd_score": 0.5, "measured_images": 50, "near_no_face_share": 0.1})
    assert len(found) == 2 and "90 % of 50 images of the concept's prompts have no face" in found[0]
    assert "rest on 50 images" in found[1]


def test_the_interval_is_of_the_images_that_were_requested():
    # Wilson's interval of 99 in 100, from tables.
    assert ua_interval(GOOD) == pytest.approx((94.55, 99.82), abs=0.01)
    assert forgotten_images({**GOOD, "by_class": classes(count=7)}) == 7 and ua_interval({"ua": 99.0}) is None
    assert never_drawn({"before_forget_accuracy": 1.9}) == ["the class"] and never_drawn(GOOD) == []


def answers(folder) -> dict[str, str]:
    return dict(verdict(RunRecord.read(folder))[0].rows)


def test_names_of_classes_that_were_not_measured(tmp_path):
    folder = make_run(tmp_path / "r", ua=None)
    config = json.loads((folder / "config.json").read_text()) | {"class_names": ["plane", "ship", "cat", "dog"]}
    (folder / "config.json").write_text(json.dumps(config))
    assert "forget class 0 (“plane”), 3 (“dog”) of" in answers(folder)["What was asked?"]
    assert "| classes to forget | 0 (“plane”), 3 (“dog”) |" in write_run_report(folder).read_text()


def test_the_verdict_on_a_class(tmp_path):
    folder = make_run(tmp_path / "r", **GOOD, by_class=classes(), frechet_real_split=0.5)
    config = json.loads((folder / "config.json").read_text()) | {"forget_classes": [0], "cover_class": 1}
    (folder / "config.json").write_text(json.dumps(config))
    found = answers(folder)
    # Numbers with the names of the classes.
    assert "forget class 0 (“plane”)" in found["What was asked?"] and "class 1 (“ship”)" in found["What was asked?"]
    assert found["Is it forgotten?"].startswith("Yes. The yardstick is an unlearning accuracy of at least 98 %; ")
    assert "99.0 % of 100 images" in found["Is it forgotten?"] and "would settle it" in found["Is it forgotten?"]
    assert "class “ship” (97.0 %), class “cat” (2.0 %)" in found["What is drawn in its place?"]
    assert "97.0 % (before: 98.0 %)" in found["What did it cost the rest?"]
    assert "class “ship”: 99.0 % before, 90.0 % now" in found["What did it cost the rest?"]
    assert found["What would bring it back?"].startswith("Not tested")
    assert "Relearning by fine-tuning; a search for latents" in found["What was not tested?"]
    cost = {"attack": "full, one step", "steps": 4.25, "images": 68.0, "censored": False}
    robust = {"cost": {"networks": {"run": cost}, "by_attack": {}, "verdicts": {"relabel": {"text": "Sooner."}}}}
    (folder / "robustness.json").write_text(json.dumps({**robust, "relearn": [{"step": 0}]}))
    found = answers(folder)
    assert found["What would bring it back?"].startswith("4.2 steps of fine-tuning on 68 images")
    assert "full, one step). Sooner." in found["What would bring it back?"]
    assert "elearning" not in found["What was not tested?"]


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"ua": 97.9}, "No. "),
        ({"ua": 100.0, "by_class": classes(before=1.0)}, "It cannot be said. "),
        ({"ua": None}, "Not known"),
    ],
)
def test_not_forgotten_or_not_known(tmp_path, changes, answer):
    folder = make_run(tmp_path / "r", **{**GOOD, **changes})
    assert answers(folder)["Is it forgotten?"].startswith(answer)
    text = write_run_report(folder).read_text()
    assert ("> **Caution:** Unlearning accuracy says nothing" in text) == (answer == "It cannot be said. ")
    assert ('<p class="warning" role="note">' in (folder / "report.html").read_text()) == (
        answer == "It cannot be said. "
    )


def test_the_verdict_on_a_concept(tmp_path):
    folder = make_prompt_run(tmp_path / "r")
    assert "nothing was measured" in answers(folder)["Is it forgotten?"]
    assert "“a man eats”" in answers(folder)["What is drawn in its place?"]
    prompts = [{"prompt": f"scene {i}", "images": 2, "gcd_score": i / 100, "clip_score": None} for i in range(60)]
    near = [{"prompt": "the neighbour", "images": 1, "gcd_score": 0.75}]
    metrics = json.loads((folder / "metrics.json").read_text())
    protocol = {"concept": {"measured": ["gcd_score", "by_prompt"]}}
    metrics |= {"gcd_score": 0.25, "near_gcd_score": 0.75, "measured_images": 120, "protocol": protocol}
    (folder / "metrics.json").write_text(json.dumps({**metrics, "by_prompt": {"concept": prompts, "near": near}}))
    found = answers(folder)
    assert (
        "on 120 images" in found["Is it forgotten?"]
        and "GCD score 0.250 (lower is better)" in found["Is it forgotten?"]
    )
    assert "0.750 (higher is better)" in found["What did it cost the rest?"]
    text = write_run_report(folder).read_text()
    # Each prompt with its figures: of many those that show the concept most.
    lines = [line for line in text.splitlines() if line.startswith("| scene ")]
    assert len(lines) == 50 and lines[0] == "| scene 59 | 2 | 0.590 |" and "50 of 60" in text
    assert "| the neighbour | 1 | 0.750 |" in text and "1. x" in text and "by_prompt" not in text.split("## Config")[0]


def places(value, place=()):
    """The place of every value inside a JSON value."""
    if place:
        yield place
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*place, key))


@pytest.mark.parametrize("name", ["metrics.json", "robustness.json", "history.jsonl"])
def test_damaged_files_are_refused_in_a_line(tmp_path, name):
    """Whatever a value is replaced with: the sections of a report, or an error that names the file."""
    folder = make_run(tmp_path / "r", **GOOD, by_class=classes(), by_prompt={"near": [{"prompt": "x", "images": 1}]})
    cost = {"attack": "full", "steps": 4.25, "images": 68.0, "censored": False}
    costs = {"networks": {"run": cost}, "by_attack": {}, "verdicts": {"relabel": {"text": "Sooner."}}}
    files = {
        "metrics.json": json.loads((folder / "metrics.json").read_text()),
        "robustness.json": {"summary": {"relearn_forget_ua_50": 1.0, "paths_still_most": 2.0}, "cost": costs},
        "history.jsonl": {"event": "started", "date": "2026", "step": 0, "command": ["a", "b"], "version": "1"},
    }
    for file, value in files.items():
        (folder / file).write_text(json.dumps(value) + "\n")
    refused = total = 0
    for place in places(files[name]):
        for new in (None, True, -1, 1.5, 2**62, "x", [], [1], {}, {"a": 1}):
            value = json.loads(json.dumps(files[name]))
            inner = value
            for key in place[:-1]:
                inner = inner[key]
            inner[place[-1]] = new
            (folder / name).write_text(json.dumps(value) + "\n")
            total += 1
            try:
                assert sections(RunRecord.read(folder)), place
            except RecordError as error:
                refused += 1
                assert name in str(error)
            except Exception as error:
                raise AssertionError(f"{place} = {new!r}") from error
    assert 0 < refused < total


def test_command_date_and_commit(tmp_path):
    folder = make_run(tmp_path / "r")
    assert "are not recorded" in history_blocks(RunRecord.read(folder))[0].text
    command = ["pecker-fast", "unlearn", "--judge", "/home/me/my judge.st"]
    events = [
        {"event": "started", "date": "2026-01-02T03:04:05+00:00", "step": 0, "command": command, "version": "0.1",
         "commit": "abc", "python": "3.11", "torch": "2.8"},
        {"event": "ended", "date": "2026-01-02T04:00:00+00:00", "step": 40, "version": "0.1", "commit": None},
    ]  # fmt: skip
    (folder / "history.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
    text = write_run_report(folder).read_text()
    assert "pecker-fast unlearn --judge 'my judge.st'" in text and "/home/me" not in text
    versions = "pecker-fast 0.1, torch 2.8, Python 3.11"
    assert f"| started | 2026-01-02 03:04:05 UTC | 0 | {versions} | abc |" in text
    assert "| ended | 2026-01-02 04:00:00 UTC | 40 |" in text and "unknown: not run from a checkout" in text
