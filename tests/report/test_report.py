"""Pictures and texts of runs, pixel by pixel and figure by figure."""

import json
import sys

import pytest
import torch
from PIL import Image

from pecker_fast.report import (
    RunRecord,
    comparison_table,
    save_before_after,
    save_grid,
    write_comparison,
    write_run_report,
)
from pecker_fast.report.grids import GAP, LABEL_WIDTH, MARKED
from pecker_fast.report.run_report import sections
from tests.report.test_render import check_page

METRICS = {
    "method": "pecker", "seed": 7, "ua": 98.75, "retain_accuracy": 97.125, "frechet_distance": 1.25,
    "frechet_real_split": 0.625, "diversity": 0.875, "iterations": 40, "seconds": 12.25, "peak_memory_bytes": 1234567,
    "before_forget_accuracy": 99.5, "feature_extractor": "some-judge-64", "ua_last_half_min": 96.5,
}  # fmt: skip


def make_run(folder, method="pecker", masked=True, evaluations=3, **changes):
    (folder / "samples").mkdir(parents=True)
    (folder / "metrics.json").write_text(json.dumps({**METRICS, "method": method, **changes}))
    config = {"method": method, "preset": "digits", "seed": 7, "forget_classes": [0, 3], "cover_class": None}
    (folder / "config.json").write_text(json.dumps(config))
    mask = {"mask_density": 0.5, "mask_iou": 0.71, "mask_touched_ever": 0.625}
    mask["mask_density_by_module"] = {f"down_blocks.{i}": 0.125 * (i + 1) for i in range(6)}
    lines = [
        {"step": 10 * i, "seconds": i, "loss_distill": 2.0 / i, "loss_forget": -i} | (mask if masked else {})
        for i in range(1, 5)
    ]
    (folder / "train.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5')
    lines = [
        {
            "step": 10 * i,
            "seconds": i,
            **{k: METRICS[k] for k in ("ua", "retain_accuracy", "frechet_distance", "diversity")},
        }
        for i in range(1, evaluations + 1)
    ]
    (folder / "evaluation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def assert_drawn(path) -> None:
    with Image.open(path) as image:
        image.load()
        assert min(image.size) > 200 and len(image.convert("L").getcolors(10**6)) > 20


@pytest.mark.parametrize("channels", [1, 3])
def test_grid_pixels_are_the_images(tmp_path, channels):
    images = torch.rand(5, channels, 8, 8) * 2.4 - 1.2
    labels = torch.tensor([2, 0, 2, 1, 0])
    save_grid(tmp_path / "g.png", images, labels, ("a", "b", "c"), highlight=(1,))
    sheet = Image.open(tmp_path / "g.png")
    expected = ((images.clamp(-1, 1) + 1) * 127.5).round()
    # Rows by class, images of a class in their order, magnified four times.
    for index, (row, column) in enumerate([(2, 0), (0, 0), (2, 1), (1, 0), (0, 1)]):
        left, top = LABEL_WIDTH + GAP + column * (32 + GAP), GAP + row * (32 + GAP)
        for y, x in ((0, 0), (3, 5), (7, 7)):
            pixel = sheet.getpixel((left + 4 * x + 2, top + 4 * y + 2))
            assert pixel == tuple(int(v) for v in expected[index, :, y, x].expand(3)), (index, y, x)
    assert sheet.getpixel((LABEL_WIDTH, GAP + 32 + GAP)) == MARKED
    save_before_after(tmp_path / "b.png", images, -images, labels, ("a", "b", "c"))
    assert Image.open(tmp_path / "b.png").width == 2 * sheet.width + 12


def test_a_distillation_forgets_nothing(tmp_path):
    """Its report and its card do not speak of forgetting."""
    folder = make_run(tmp_path / "run", "distil", masked=False, ua=None)
    save_grid(folder / "samples" / "before_after.png", torch.zeros(2, 1, 8, 8), torch.arange(2), ("0", "1"))
    (folder / "evaluation.jsonl").write_text('{"step": 1, "retain_accuracy": 90.0}\n')
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"forget_classes": []}))
    (folder / "model_index.json").write_text("{}")
    text = write_run_report(folder).read_text()
    card = (folder / "README.md").read_text()
    assert "Right: the one-step generator." in text and "Right: the one-step generator." in card
    for word in ("Framed", "Unlearning accuracy", "images of the class to forget", "bring the class back", "bars of"):
        assert word not in text and word not in card
    assert "unlearning" not in card.lower() and "concept-erasure" not in card
    assert_drawn(folder / "report.png")


def test_a_method_that_trains_nothing(tmp_path):
    folder = make_run(tmp_path / "run", "relabel", masked=False, parameters_changed=0.0268)
    (folder / "train.jsonl").write_text("")
    text = write_run_report(folder).read_text()
    assert "No mask: rows of the class embedding are replaced, and nothing is trained" in text
    assert "| Parameters changed | 0.03 % |" in text
    assert_drawn(folder / "report.png")


def test_wrong_grids(tmp_path):
    with pytest.raises(ValueError, match="images has shape"):
        save_grid(tmp_path / "g.png", torch.zeros(2, 2, 8, 8), torch.zeros(2, dtype=torch.int64), ("a",))
    with pytest.raises(ValueError, match="labels has classes"):
        save_grid(tmp_path / "g.png", torch.zeros(1, 1, 8, 8), torch.ones(1, dtype=torch.int64), ("a",))
    assert list(tmp_path.iterdir()) == []


def test_report_contains_the_measurements(tmp_path):
    path = write_run_report(make_run(tmp_path / "r"))
    text = path.read_text()
    for figure in ("98.8 %", "97.1 %", "1.25", "0.62", "0.88", "96.5 %", "12.2 s", "0.00 GiB", "some-judge-64"):
        assert figure in text, figure
    assert "forget class 0, 3" in text and "a random retained class" in text
    assert "| Unlearning accuracy | 98.8 % | higher | Images requested as" in text and "| Peak memory |" in text
    assert "keeps 50.0% of the parameters; 62.5% were salient" in text and "| down_blocks.2 | 37.5% |" in text
    assert "before_after.png is missing" in text
    assert_drawn(tmp_path / "r" / "report.png")


def test_report_of_a_minimal_run(tmp_path):
    folder = make_run(tmp_path / "r", method="sfd", masked=False, evaluations=0)
    for name in ("config.json", "train.jsonl", "evaluation.jsonl"):
        (folder / name).unlink()
    (folder / "metrics.json").write_text("{}")
    text = write_run_report(folder).read_text()
    assert "config.json is missing" in text and "No mask" in text and "evaluation.jsonl is missing" in text
    assert "nan" not in text and "None" not in text
    check_page((folder / "report.html").read_text())
    (folder / "metrics.json").unlink()
    with pytest.raises(ValueError, match=r"no metrics\.json"):
        write_run_report(folder)


def test_comparison(tmp_path):
    runs = {
        "pecker": make_run(tmp_path / "pecker"),
        "sfd": make_run(tmp_path / "sfd", "sfd", masked=False, evaluations=1, ua=50.25, frechet_distance=2.5),
    }
    text = write_comparison(tmp_path, runs).read_text()
    assert "| Unlearning accuracy | 98.8 % | 50.2 % |" in text and "[The run's own report](sfd/report.md)" in text
    assert_drawn(tmp_path / "report.png")
    compared = json.loads((tmp_path / "compare.json").read_text())
    assert compared["seed"] == 7 and compared["preset"] == "digits" and list(compared["methods"]) == ["pecker", "sfd"]
    assert compared["methods"]["sfd"]["ua"] == 50.25
    # Files in other folders are compared but not linked.
    (tmp_path / "other").mkdir()
    text = write_comparison(tmp_path / "other", runs).read_text()
    assert (
        "| Unlearning accuracy | 98.8 % | 50.2 % |" in text and "own report" not in text and str(tmp_path) not in text
    )
    lines = comparison_table({**compared["methods"], "none": {}}).splitlines()
    assert lines[1].split() == ["pecker", "98.8", "97.1", "1.25", "2.00", "0.88", "12.2"]
    assert lines[2].split()[1:5] == ["50.2", "97.1", "2.50", "4.00"] and lines[3].split() == ["none", *"------"]


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    monkeypatch.setitem(sys.modules, "matplotlib.backends.backend_agg", None)
    with pytest.raises(ImportError, match=r"pecker-fast\[train\]"):
        write_run_report(make_run(tmp_path / "r"))


def test_report_of_everything(tmp_path):
    folder = make_run(tmp_path / "r", fid=5.8125, protocol={"judge": {"name": "some"}, "evaluation": {
        "measured": ["fid"], "samples": {"seed": 11}, "image_quality": {"rng_seed": 2020}}})  # fmt: skip
    Image.new("RGB", (40, 20), (1, 2, 3)).save(folder / "samples" / "before_after.png")
    layer = {"parameters": 1234, "changed": 0.25, "drift": 0.0625, "salient": 0.5}
    drift = {"total": {**layer, "parameters": 99999}, "modules": {"conv_in": layer},
             "layers": {"conv_in.x": {**layer, "drift": None}}}  # fmt: skip
    hashes = {f"{letter}.bin": {"bytes": 4567, "sha256": 64 * letter} for letter in "ab"}
    more = {
        "drift": drift,
        "hashes": hashes,
        "robustness": {
            "summary": {"relearn_forget_ua_50": 12.5, "unheard_of": 3},
            "relearning": {"images": 16, "rows": [{"step": 20, "share": 0.77}]},
        },
        "profile": {"joules_per_image": 2.5, "images_per_second": 30.0},
        "environment": {"python": "3.99", "backends": {"cpu": {"cuda": "no GPU", "cpu": None}}},
    }
    for name, value in more.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    markdown = write_run_report(folder, changed=["b.bin"]).read_text()
    page = check_page((folder / "report.html").read_text())
    # The samples, and each panel of the curves: four figures, the losses and the mask.
    assert len(page.pictures) == 1 + 6
    for words in (
        "5.81", "rng_seed", "2020", "samples.seed", "99,999", "0.0625", "25.0%", "a.bin", "4,567", "relearning.images",
        "UA after relearning, 50 steps", "12.5 %", "summary.unheard_of", "0.77", "2.5", "3.99",
        "backends.cpu.cuda", "no GPU", "available", "forget class 0, 3", "down_blocks.2",
    ):  # fmt: skip
        assert words in page.text and words in markdown, words
    assert markdown.count("CHANGED") == 1 and f"| b.bin | 4,567 | {64 * 'b'} | CHANGED |" in markdown
    assert "| conv_in.x | 1,234 | - | 25.00% | 50.0% |" in markdown
    # The same sections in both.
    titles = [line[3:] for line in markdown.splitlines() if line.startswith("## ")]
    assert titles == [s.title for s in sections(RunRecord.read(folder))] and page.tags.count("h2") == len(titles)
    assert titles[0] == "Verdict" and "After 50 steps of fine-tuning on images of the class, UA is 12.5 %." in markdown
    # What is drawn again without anything to draw is removed.
    for name in ("train.jsonl", "evaluation.jsonl"):
        (folder / name).write_text("")
    write_run_report(folder)
    assert not (folder / "report.png").exists()


def make_prompt_run(folder, **metrics):
    """The files of a run on a text-to-image model."""
    folder.mkdir(parents=True)
    config = {
        "method": "pecker", "preset": "sd15-celebrity", "seed": 0, "task": "celebrity", "concept": "brad pitt",
        "cover": "a man", "pretrained_model_name_or_path": "/models/sd15", "options": {"t_init": 625},
        "prompts": {"retain": 3, "forget": ["brad pitt eats"], "cover": ["a man eats"], "pictured": ["x", 'a "dog"']},
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    basic = {"method": "pecker", "seed": 0, "pretrained": "/models/sd15", "sampler": "one_step", "sampling_steps": 1}
    (folder / "metrics.json").write_text(json.dumps({**basic, "images": 16, "seconds": 2.0, **metrics}))
    return folder


def test_a_run_on_prompts_has_its_own_figures(tmp_path):
    folder = make_prompt_run(tmp_path / "r")
    text = write_run_report(folder).read_text()
    # There are no class figures, and the report tells how to get those of the concept.
    assert "Unlearning accuracy" not in text and "pecker-fast evaluate-concept does that" in text
    assert "| Training images | 16 |" in text and "| prompts to preserve | 3 |" in text
    protocol = {"concept": {"measured": ["gcd_score", "other"], "detectors": {"kind": "stand-in"}}}
    measured = {"gcd_score": 0.25, "near_gcd_score": None, "protocol": protocol}
    (folder / "samples").mkdir()
    Image.new("RGB", (40, 20), (1, 2, 3)).save(folder / "samples" / "concept.png")
    metrics = json.loads((folder / "metrics.json").read_text())
    (folder / "metrics.json").write_text(json.dumps({**metrics, **measured}))
    text = write_run_report(folder).read_text()
    assert "| GCD score | 0.250 | lower |" in text and "| GCD score, other celebrities" not in text
    assert "not been measured" not in text and "othing was measured" not in text
    assert "by pecker-fast evaluate-concept: GCD score, other." in text and "| detectors.kind | stand-in |" in text
    assert "(samples/concept.png)" in text and "samples/near.png" not in text and "/models" not in text
    # Nothing was logged: there are no curves.
    assert len(check_page((folder / "report.html").read_text()).pictures) == 1 and "report.png" not in text
    assert "nothing to draw" in text and "Unlearning accuracy" not in text
