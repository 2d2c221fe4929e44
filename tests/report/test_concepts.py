"""The table of models that have forgotten a concept."""

import csv
import json

from PIL import Image

from pecker_fast.report import PROMPTS, RunRecord, read_across, text_table, write_across


def run(folder, **metrics) -> RunRecord:
    return RunRecord(folder, {}, metrics, [], [])


def test_steps_are_those_of_the_images_that_were_measured(tmp_path):
    """A run that draws in 50 steps by itself was measured on images of three."""

    def measured(**samples):
        return run(tmp_path, seed=0, gcd_score=0.5, sampling_steps=50, protocol={"concept": {"samples": samples}})

    runs = {
        "esd": [measured(sampler="ddim", num_inference_steps=3)],
        "pecker": [measured(sampler="one_step", num_inference_steps=1)],
        "unmeasured": [run(tmp_path, seed=0, sampling_steps=50)],
    }
    write_across(tmp_path, runs, asked="", command="", shown=PROMPTS)
    with open(tmp_path / "compare.csv", newline="") as file:
        assert [row["sampling_steps"] for row in csv.DictReader(file)] == ["3", "1", "50"]
    assert "| esd | 0.500 | 3 |" in (tmp_path / "report.md").read_text()


def test_rows_of_trained_and_of_sampled_models(tmp_path):
    runs = {
        "sd": [run(tmp_path, seed=None, gcd_score=0.9, no_face_share=0.0, near_gcd_score=0.8)],
        "pecker": [
            run(tmp_path, seed=0, gcd_score=0.1, no_face_share=0.25, near_gcd_score=0.7, images=800),
            run(tmp_path, seed=1, gcd_score=0.3, no_face_share=0.35, near_gcd_score=0.7, images=800),
        ],
        "sfd": [run(tmp_path, seed=0, gcd_score=None, no_face_share=1.0), run(tmp_path, seed=1, gcd_score=0.5)],
    }
    table = text_table(runs, shown=PROMPTS)
    lines = {line.split()[0]: line for line in table.splitlines()}
    assert "0.200 ± 0.141" in lines["pecker"] and "0.900" in lines["sd"] and "±" not in lines["sd"]
    # One of two seeds had no face at all: the table says so.
    assert "0.500 (1 of 2)" in lines["sfd"]
    assert "FID" not in table and "unsafe" not in table
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    facts = {name: {"trained": "no" if name == "sd" else "yes"} for name in runs}
    words = {"asked": "Forget “x”.", "command": "pecker-fast compare", "facts": facts}
    path = write_across(tmp_path, runs, **words, pictures=[("a.png", "shown")], shown=PROMPTS)
    text = path.read_text()
    assert "| sd | no | 0.000 | 0.900 |" in text and "![shown](a.png)" in text and "| GCD | GCD score | lower |" in text
    assert "0.200 ± 0.141" in (tmp_path / "report.html").read_text()
    with open(tmp_path / "compare.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["gcd_score"]) for row in rows[:3]] == [
        ("sd", "", "0.9"),
        ("pecker", "0", "0.1"),
        ("pecker", "1", "0.3"),
    ]
    keys = ["method", "seed", "no_face_share", "gcd_score", "near_no_face_share", "near_gcd_score"]
    assert list(rows[0])[:6] == keys and "trained" not in rows[0]
    assert json.loads((tmp_path / "compare.json").read_text())["methods"]["sfd"][1]["gcd_score"] == 0.5
    assert "seeds 0, 1" in text and not (tmp_path / "report.png").exists()
    # The report can be made again from compare.json.
    again, arguments = read_across(tmp_path / "compare.json")
    (tmp_path / "again").mkdir()
    assert text.startswith(write_across(tmp_path / "again", again, **arguments, shown=PROMPTS).read_text())
