"""Options by name in groups, and back into words of the command line."""

from dataclasses import fields, is_dataclass, replace

import pytest

from pecker_fast.names import option_names
from pecker_fast.options import UsageError
from pecker_fast.parsing import early_option, parse_options
from pecker_fast.runs.arguments import option_groups, option_words, with_options
from pecker_fast.runs.evaluate import evaluation_class
from pecker_fast.runs.presets import PRESETS, ClassPreset, class_preset, preset, prompt_preset
from pecker_fast.runs.task import task_class, unlearn_arguments
from pecker_fast.unlearning import method_class, method_names


def test_options_are_assigned_to_groups():
    base = unlearn_arguments("digits", "pecker")
    args = unlearn_arguments("digits", "pecker", {"density": 0.25, "seed": 7, "forget_classes": [3], "output_dir": "x"})
    assert (args.options.density, args.compute.seed, args.request.forget_classes) == (0.25, 7, (3,))
    assert str(args.folder) == "x" and replace(args, options=base.options, compute=base.compute).loop == base.loop
    assert option_groups(args)["preset"] is None and option_groups(args)["data_root"] == "resources"
    with pytest.raises(TypeError, match="no option 'forget_clases'; the nearest is 'forget_classes'"):
        with_options(base, {"forget_clases": (1,)})


@pytest.mark.parametrize("name", PRESETS)
def test_words_round_trip_to_options(name):
    """The command printed to resume a run that was started from Python."""
    for method in method_names():
        if not isinstance(preset(name), ClassPreset) and not method_class(method).forgets_prompts:
            continue
        base = unlearn_arguments(name, method)
        changes = {"seed": 3, "progress_bar": False, "torch_compile": True, "device": "cpu"}
        # relabel trains nothing.
        changes |= {} if method == "relabel" else {"max_train_steps": 7}
        args = with_options(base, {**changes, "pretrained_model_name_or_path": "a b", "checkpoints_total_limit": None})
        assert parse_options(base, option_words(args, base), "unlearn", "") == args
    assert option_words(base, base) == []


def test_no_name_is_in_two_groups():
    """Options are flat on the command line."""
    for name in PRESETS:
        for method in method_names():
            if isinstance(preset(name), ClassPreset) or method_class(method).forgets_prompts:
                args = unlearn_arguments(name, method)
                groups = [value for value in vars(args).values() if is_dataclass(value)]
                names = [item.name for group in groups for item in fields(group)]
                assert len(groups) == 6 and len(names) == len({*names}), (name, method)


def test_presets_are_one_catalogue():
    of_classes = {"digits", "cifar10", "stl10", "digits16", "mnist", "images", "imagenet64"}
    models = ("sd15", "sdxl", "sd3", "sana", "sana-sprint")
    assert {*PRESETS} == of_classes | {f"{model}-{task}" for model in models for task in ("celebrity", "nudity")}
    assert task_class("digits").__name__ == "ClassTask" and task_class("sd15-nudity").__name__ == "PromptTask"
    with pytest.raises(ValueError, match=r"preset is 'svhn', expected one of digits.*sd15-nudity"):
        preset("svhn")
    with pytest.raises(ValueError, match=r"expected one of digits.*mnist.*images.* \(sd15-nudity is for text-to-image"):
        class_preset("sd15-nudity")
    with pytest.raises(ValueError, match=r"expected one of sd15-celebrity.*\(digits is for class-conditional"):
        prompt_preset("digits")


def test_words_that_select_the_available_options():
    words = ["--seed", "1", "--preset=a", "--preset", "b", "--no-progress-bar"]
    assert early_option(words, "preset") == "b" and early_option(words, "method") is None
    assert early_option(["--preset-name", "c"], "preset_name") == "c"
    for words_after in ([], ["--seed", "1"]):
        with pytest.raises(UsageError, match="preset has no value"):
            early_option(["--preset", *words_after], "preset")
    assert {"seed", "preset", "progress_bar"} <= option_names(words)


def test_evaluation_class_follows_from_the_source(tmp_path):
    def kind(*paths, **options):
        return evaluation_class([str(path) for path in paths], **options).__name__

    assert kind() == kind(tmp_path) == "ClassEvaluation"
    assert kind(preset_name="sd15-nudity") == kind(tmp_path, options=["concept"]) == "PromptEvaluation"
    assert kind(tmp_path, options=["seed", "judge"]) == "ClassEvaluation"
    (tmp_path / "sd" / "text_encoder").mkdir(parents=True)
    assert kind("5", tmp_path / "sd") == "PromptEvaluation"
    for name, extra in {
        "c": '"forget_classes": [0]',
        "p": '"prompts": {"forget": [], "cover": [], "retain": 0}',
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"options": {{}}, {extra}}}')
    assert (kind(tmp_path / "c"), kind(tmp_path / "p")) == ("ClassEvaluation", "PromptEvaluation")
