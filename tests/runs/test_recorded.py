"""Options from files: a run's own config.json, and YAML written by hand."""

import json

import pytest

from pecker_fast.commands import distil, pretrain, unlearn
from pecker_fast.parsing import UsageError, early_option, parse_options
from pecker_fast.runs.arguments import with_options
from pecker_fast.runs.distilled import distil_arguments
from pecker_fast.runs.presets import PRESETS, ClassPreset, class_preset, preset
from pecker_fast.runs.pretrain import PretrainArguments
from pecker_fast.runs.recorded import options_of_record
from pecker_fast.runs.task import task_of, unlearn_arguments
from pecker_fast.unlearning import method_class, method_names

FACTS = {"pretrained_sha256": "12ab", "fisher_sha256": "34cd", "training_images": 1797, "num_processes": 1}
CHANGES = {"seed": 3, "output_dir": "some where/x", "torch_compile": True, "checkpoints_total_limit": None}


def parsed(module, monkeypatch, words):
    """The arguments that a command would run with."""
    seen = []
    monkeypatch.setattr(module, "run", seen.append)
    module.parse(words)()
    return seen[0]


@pytest.mark.parametrize("name", PRESETS)
def test_the_config_of_a_run_makes_the_same_run(name, tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    methods = [x for x in method_names() if isinstance(preset(name), ClassPreset) or method_class(x).forgets_prompts]
    for method in methods:
        changes = dict(CHANGES)
        if isinstance(preset(name), ClassPreset):
            changes |= {"forget_classes": ("2", "5"), "cover_class": "random" if method == "sfd" else "3"}
        args = unlearn_arguments(name, method, changes)
        config = task_of(args).describe(args)
        path.write_text(json.dumps({**config, "resume_from_checkpoint": "latest", **FACTS}))
        again = parsed(unlearn, monkeypatch, ["--config", str(path)])
        assert (again.method, again.preset) == (method, name) and again.loop.resume_from_checkpoint is None
        assert json.dumps(task_of(again).describe(again)) == json.dumps(config)
        # The command line comes first, wherever it stands.
        again = parsed(unlearn, monkeypatch, ["--seed", "7", f"--config={path}", "--output_dir", "y"])
        assert (again.compute.seed, str(again.folder), again.compute.torch_compile) == (7, "y", True)
    args = distil_arguments(name, CHANGES)
    config = task_of(args).describe(args)
    path.write_text(json.dumps({**config, **FACTS}))
    again = parsed(distil, monkeypatch, ["--config", str(path)])
    assert json.dumps(task_of(again).describe(again)) == json.dumps(config)
    if isinstance(preset(name), ClassPreset):
        args = with_options(PretrainArguments.defaults(name), CHANGES)
        path.write_text(json.dumps({**args.describe(), **FACTS}))
        assert json.dumps(parsed(pretrain, monkeypatch, ["--config", str(path)]).describe()) == json.dumps(
            args.describe()
        )


def test_the_usual_folder_follows_the_options(tmp_path, monkeypatch):
    """The config of a run in its usual folder, with another seed, makes a run beside it."""
    path = tmp_path / "config.json"
    args = unlearn_arguments("digits", "sfd", {"seed": 3})
    path.write_text(json.dumps({**task_of(args).describe(args), **FACTS}))
    assert str(parsed(unlearn, monkeypatch, ["--config", str(path)]).folder) == "runs/digits-sfd-seed3"
    other = parsed(unlearn, monkeypatch, ["--config", str(path), "--seed", "1"])
    assert (str(other.folder), other.compute.seed) == ("runs/digits-sfd-seed1", 1)
    args = with_options(PretrainArguments.defaults("digits"), {"seed": 3})
    path.write_text(json.dumps({**args.describe(), **FACTS}))
    other = parsed(pretrain, monkeypatch, ["--config", str(path), "--seed", "1"])
    assert str(other.folder) == "runs/digits-pretrain-seed1"


def test_yaml(tmp_path, monkeypatch):
    path = tmp_path / "run.yaml"
    path.write_text(
        "preset: digits16\nmethod: patch\nforget-classes: [0, 3]\ncover_class: 1\ndensity: 1e-1\n"
        "mixed_precision: no\nprogress_bar: false\nema_decay: null\noutput_dir: a, b\n"
    )
    args = parsed(unlearn, monkeypatch, ["--config", str(path)])
    assert (args.preset, args.method, args.request.forget_classes, args.request.cover_class) == (
        "digits16", "patch", ("0", "3"), "1",
    )  # fmt: skip
    assert (args.options.density, args.compute.mixed_precision, args.output.progress_bar) == (0.1, "no", False)
    assert args.options.ema_decay is None and args.output.output_dir == "a, b"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.yaml", "densty: 0.1", "a.yaml has 'densty', which is no option of unlearn; the nearest is 'density'"),
        ("a.yaml", "density: much", "density is 'much', expected a number"),
        ("a.yaml", "density: [1, 2]", "density is .1, 2., expected one value"),
        ("a.yaml", "seed: {a: 1}", "seed is .*, expected an integer"),
        ("a.yaml", "- 1", "expected options with their values"),
        ("a.yaml", "a: [", "is no YAML"),
        ("a.json", "{", "is no JSON"),
        ("a.json", "[" * 100_000, "is no JSON: maximum recursion depth"),
        ("a.json", '{"density": 0.1, "density": 0.2}', "is no JSON: it has 'density' twice"),
        ("a.yaml", "density: 0.1\ndensity: 0.2", "is no YAML: it has 'density' twice"),
        ("a.yaml", "options:\n  density: 0.1\n  density: 0.2", "is no YAML: it has 'density' twice"),
        ("a.json", '{"options": {"granularity": "row"}, "num_processes": 1}', "has 'granularity', which is no option"),
    ],
)
def test_wrong_files(tmp_path, monkeypatch, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(UsageError, match=message):
        parsed(unlearn, monkeypatch, ["--config", str(tmp_path / name)])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"config is '.*nowhere', which cannot be read"):
        early_option(["--config", str(tmp_path / "nowhere")], "preset")


def test_old_records_are_read():
    """A retired option with its old default is left out."""
    record = {"options": {"granularity": "entry", "density": 0.3}, "num_processes": 1, "cover_class": None}
    assert options_of_record(record) == {"density": 0.3, "cover_class": "random"}


def test_lists_are_separated_by_commas_or_blanks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    base = unlearn_arguments("digits", "pecker")

    def classes(*words):
        return parse_options(base, words, "unlearn", "").request.forget_classes

    for words in (["0", "3", "7"], ["0,3,7"], ["0,3", "7"], ["0,", "3,", "7"]):
        assert (
            classes("--forget_classes", *words) == classes("--forget-classes", *words, "--seed", "1") == ("0", "3", "7")
        )
    assert classes("--forget_classes=0,3") == ("0", "3")
    assert class_preset("digits").forget_class == 0 and classes() == ("0",)
    (tmp_path / "a,b").write_text("")

    patch = unlearn_arguments("digits", "patch")

    def act_on(*words):
        return parse_options(patch, ["--act_on", *words], "unlearn", "").options.act_on

    # An assignment, and a path that exists, is one item.
    assert act_on("x,y", "z") == ("x", "y", "z") and act_on("a,b", "k=[1,2]") == ("a,b", "k=[1,2]")
