"""Patch files of runs and models on disk and in memory, the command line, and other formats."""

import json
import re
import shutil
import tarfile
import warnings
from pathlib import Path

import pytest
import safetensors.torch
import torch

import pecker_fast as pf
from pecker_fast.cli import main
from pecker_fast.hashing import state_hash
from pecker_fast.models import find_weight_files, shipped_network
from pecker_fast.runs.patch_exports import choose_rank
from tests.commands.case import fails
from tests.diffusion.tiny_sd import tiny_unet, write_stable_diffusion
from tests.models.test_weight_files import write as write_weights
from tests.patches.states import same, write_delta

ROOT = Path(__file__).resolve().parents[2]
WEIGHTS = "diffusion_pytorch_model"


def weights_of(folder, variant=None):
    return find_weight_files(folder, variant)[0].weights


def moved(state, share=0.1):
    return {
        name: torch.where(torch.rand(value.shape) < share, value + 0.25, value) if value.is_floating_point() else value
        for name, value in state.items()
    }


def content(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.fixture(scope="module")
def stable_diffusion(tmp_path_factory) -> Path:
    torch.manual_seed(1)
    return write_stable_diffusion(tmp_path_factory.mktemp("sd") / "base")


@pytest.fixture
def model(stable_diffusion, tmp_path) -> Path:
    return shutil.copytree(stable_diffusion, tmp_path / "model")


@pytest.fixture
def patch(model, tmp_path) -> Path:
    """A patch of the one-step model at t_init 625."""
    path = tmp_path / "p.safetensors"
    pf.make_patch(model, moved(weights_of(model)), output=path, license="CC0-1.0")
    return path


def test_a_pipelines_folder(model, tmp_path):
    before, base, patch = content(model), dict(weights_of(model)), tmp_path / "p.safetensors"
    result = moved(base)
    pf.make_patch(model, result, output=patch)
    assert pf.verify_patch(patch, model) == "base"
    made = pf.apply_patch(model, patch, output=tmp_path / "forgot")
    assert made == tmp_path / "forgot" and same(weights_of(made), result) and content(model) == before
    after = content(made)
    assert {name for name in after if after[name] != before[name]} == {f"unet/{WEIGHTS}.safetensors"}
    assert after.keys() == before.keys() and pf.verify_patch(patch, made) == "result"
    # In place, in the folder of the U-Net: reverting restores the original files.
    assert pf.revert_patch(made / "unet", patch, in_place=True) == made / "unet" and content(made) == before
    for options, error in (
        ({}, "one of output, a new folder or file, and in_place"),
        ({"output": tmp_path / "x", "in_place": True}, "one of output"),
        ({"output": made}, "exists already"),
        ({"output": model / "new"}, "outside of the model's folder"),
        ({"output": tmp_path / "no" / "x"}, "no folder"),
        ({"output": tmp_path / "x", "variant": "fp16"}, "no weights of the variant 'fp16'"),
    ):
        with pytest.raises(ValueError, match=error):
            pf.apply_patch(model, patch, **options)
    with pytest.raises(ValueError, match="expected a folder or a safetensors file on disk"):
        pf.apply_patch("owner/name", patch, in_place=True)
    with pytest.raises(ValueError, match="it is already reverted"):
        pf.revert_patch(model, patch, in_place=True)
    assert content(model) == before


@pytest.mark.parametrize("shards", [1, 3])
def test_shards_and_variants(model, tmp_path, shards):
    unet, plain = model / "unet", dict(weights_of(model))
    half = {name: value.half() for name, value in plain.items()}
    write_weights(unet, shards, "fp16", half)
    (unet / f"{WEIGHTS}.bin").touch()
    config = (model / "unet" / "config.json").read_bytes()
    before, result = content(model), moved(half)
    patch = tmp_path / "p.safetensors"
    made = pf.make_patch(model, result, output=patch, variant="fp16")
    assert {tensor.dtype for tensor in made.tensors} == {"float16"}
    with pytest.warns(UserWarning, match="is left as it is") as noted:
        pf.apply_patch(model, patch, in_place=True)
    assert len(noted) == 2
    assert same(weights_of(model, "fp16"), result) and same(weights_of(model, ""), plain)
    assert (model / "unet" / "config.json").read_bytes() == config
    with pytest.warns(UserWarning):
        pf.revert_patch(model, patch, in_place=True, variant="fp16")
    assert content(model) == before


def test_two_variants_of_one_dtype(model, tmp_path):
    """The variant with the matching hash is used."""
    ema = moved(weights_of(model), 1.0)
    write_weights(model / "unet", 1, "ema", ema)
    result = moved(ema)
    pf.make_patch(model, result, output=tmp_path / "p.safetensors", variant="ema")
    with pytest.warns(UserWarning, match=rf"^{WEIGHTS}\.safetensors is left"):
        pf.apply_patch(model, tmp_path / "p.safetensors", in_place=True)
    assert same(weights_of(model, "ema"), result)


def test_a_base_in_a_smaller_dtype(model, tmp_path):
    """A run reads the base as float32, so the copy of the folder is in float32."""
    narrow = {name: value.bfloat16() for name, value in weights_of(model).items()}
    safetensors.torch.save_file(narrow, model / "unet" / f"{WEIGHTS}.safetensors", {"format": "pt"})
    wide = {name: value.float() for name, value in narrow.items()}
    result, patch = moved(wide), tmp_path / "p.safetensors"
    with pytest.raises(ValueError, match="is float32, in the base bfloat16"):
        pf.make_patch(model, result, output=patch)
    assert {t.dtype for t in pf.make_patch(model, result, output=patch, dtype="result").tensors} == {"float32"}
    assert pf.verify_patch(patch, model) == "base"
    with pytest.warns(UserWarning, match="written in float32"):
        made = pf.apply_patch(model, patch, output=tmp_path / "forgot")
    assert same(weights_of(made), result)
    assert same(weights_of(pf.revert_patch(made, patch, output=tmp_path / "again")), wide)
    with pytest.raises(ValueError, match="in another dtype than the patch"):
        pf.apply_patch(model, patch, in_place=True)
    # Alternatively the result is rounded, and the file has half the size.
    size, patch = patch.stat().st_size, tmp_path / "rounded.safetensors"
    pf.make_patch(model, result, output=patch, dtype="base")
    assert patch.stat().st_size < 0.7 * size
    pf.apply_patch(model, patch, in_place=True)
    assert same(weights_of(model), {name: value.bfloat16() for name, value in result.items()})


def test_a_single_file(tmp_path):
    base = {"a": torch.randn(50), "b": torch.randn(3, 4)}
    path, patch = tmp_path / "base.safetensors", tmp_path / "p.safetensors"
    safetensors.torch.save_file(base, path)
    before = path.read_bytes()
    result = moved(base, 0.5)
    pf.make_patch(path, result, output=patch)
    pf.apply_patch(path, patch, output=tmp_path / "result.safetensors")
    assert same(weights_of(tmp_path / "result.safetensors"), result) and path.read_bytes() == before
    pf.revert_patch(tmp_path / "result.safetensors", patch, in_place=True)
    assert (tmp_path / "result.safetensors").read_bytes() == before


def test_several_patches_on_disk_and_in_memory(model, tmp_path):
    steps = [dict(weights_of(model))]
    files = [tmp_path / f"{i}.safetensors" for i in range(3)]
    for file in files:
        steps.append(moved(steps[-1]))
        pf.make_patch(steps[-2], steps[-1], output=file)
    made = pf.apply_patch(model, *files, output=tmp_path / "all")
    assert same(weights_of(made), steps[3])
    with pytest.raises(ValueError, match="last one first"):
        pf.revert_patch(made, *files, in_place=True)
    with pytest.raises(ValueError, match="revert those first, the last one first"):
        pf.revert_patch(made, files[1], in_place=True)
    pf.revert_patch(made, files[2], files[1], in_place=True)
    assert same(weights_of(made), steps[1])
    unet = tiny_unet()
    unet.load_state_dict(steps[0])
    with pytest.raises(ValueError, match="order in which they were made"):
        pf.apply_patch(unet, *files[::-1])
    assert pf.apply_patch(unet, *files) is unet and same(unet.state_dict(), steps[3])
    state = dict(unet.state_dict())
    assert pf.revert_patch(state, *files[::-1]) is state and same(unet.state_dict(), steps[0])


def test_a_pipeline_in_memory(model, patch):
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(model, safety_checker=None)
    base = {name: value.clone() for name, value in pipe.unet.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert pf.apply_patch(pipe, patch) is pipe
    assert state_hash(pipe.unet.state_dict()) == pf.inspect_patch(patch).result
    assert pf.verify_patch(patch, pipe) == "result"
    pf.revert_patch(pipe, patch)
    assert same(pipe.unet.state_dict(), base)
    with pytest.raises(ValueError, match="changed itself"):
        pf.apply_patch(pipe, patch, output="x")
    with pytest.raises(ValueError, match=r"torch\.float16, the patch is for"):
        pf.apply_patch(pipe.unet.half(), patch)


# ---- runs


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(ROOT / "tests" / "fixtures" / "old_runs.tar.xz") as archive:
        archive.extractall(folder, **({"filter": "data"} if hasattr(tarfile, "data_filter") else {}))
    return folder


@pytest.fixture
def runs(unpacked, tmp_path, monkeypatch) -> Path:
    shutil.copytree(unpacked, tmp_path / "runs")
    monkeypatch.chdir(tmp_path / "runs")
    return tmp_path / "runs"


def test_the_patch_of_a_run_on_classes(runs, capsys):
    main(["patch", "make", "compare/pecker-seed0", "--output", "p.safetensors", "--license", "CC-BY-4.0"])
    assert re.search(r"[\d,]+ of [\d,]+ entries changed .*bytes: p\.safetensors", capsys.readouterr().out)
    patch, run = pf.inspect_patch("p.safetensors"), pf.Run("compare/pecker-seed0")
    known = patch.metadata
    assert known["request"] == {"forget_classes": [0], "cover_class": 1}
    assert known["sampler"] == {"kind": "one_step", "t_init": 250, "steps": 1}
    assert (known["method"], known["preset"], known["seed"]) == ("pecker", "digits", 0)
    assert known["base_model"] == "network" and known["license"] == "CC-BY-4.0"
    assert known["metrics"]["ua"] == run.metrics["ua"]
    assert (patch.base, patch.result) == (run.config["pretrained_sha256"], run.metrics["weights_sha256"])
    assert 100 * patch.density == pytest.approx(run.metrics["parameters_changed"])
    # The base does not say that it draws in one step.
    main(["patch", "apply", "p.safetensors", "--model", "network", "--output", "forgot"])
    assert "note: the result draws in one step at t_init 250, the model does not say so" in capsys.readouterr().out
    assert same(weights_of("forgot"), weights_of("compare/pecker-seed0"))
    # The run's pipeline without its records, which do not apply to the base.
    pf.revert_patch(run.folder, "p.safetensors", output="base")
    assert {path.name for path in Path("base").iterdir()} == {"model_index.json", "pipeline.py", "scheduler", "unet"}
    assert same(weights_of("base"), weights_of("network"))
    # A run is its folder, whose records would not be true of changed weights.
    assert pf.verify_patch("p.safetensors", run) == "result"
    assert pf.revert_patch(run, "p.safetensors", output="base-of-run") == Path("base-of-run")
    with pytest.raises(ValueError, match="expected one of output"):
        pf.revert_patch(run, "p.safetensors")
    with pytest.raises(ValueError, match="model is a int: it has no U-Net"):
        pf.apply_patch(3, "p.safetensors")
    error = fails(capsys, "patch", "revert", "p.safetensors", "--model", "compare/pecker-seed0", "--in_place")
    assert "the folder of a run, whose records would no longer be true: give an output" in error


def test_base_of_a_run(runs):
    config = json.loads(Path("text/config.json").read_text())
    patch = pf.make_patch("text", output="p.safetensors")
    assert patch.base == config["pretrained_sha256"]
    assert patch.metadata["request"] == {"concept": "Brad Pitt", "cover": "a middle aged man"}
    # A run that started from a generator has that as its base.
    shutil.copytree("text/unet", "generator")
    generator = moved(weights_of("generator"))
    safetensors.torch.save_file(generator, f"generator/{WEIGHTS}.safetensors")
    config |= {"initial_generator": "generator", "initial_generator_sha256": state_hash(generator)}
    Path("text/config.json").write_text(json.dumps(config))
    patch = pf.make_patch(pf.Run("text"), output="q.safetensors")
    assert patch.base == state_hash(generator) and patch.metadata["base_model"] == "generator"
    safetensors.torch.save_file(moved(generator), f"generator/{WEIGHTS}.safetensors")
    with pytest.raises(ValueError, match="not those that the run started from"):
        pf.make_patch("text", output="r.safetensors")
    shutil.copytree("text", "half", ignore=shutil.ignore_patterns("metrics.json"))
    with pytest.raises(ValueError, match="half has not ended: continue it"):
        pf.make_patch("half", output="r.safetensors")
    shutil.rmtree("generator")
    with pytest.raises(ValueError, match="'generator', which is not there: give BASE and RESULT"):
        pf.make_patch("text", output="r.safetensors")
    with pytest.raises(ValueError, match="expected the folder of a run"):
        pf.make_patch("network", output="r.safetensors")
    with pytest.raises(ValueError, match="result is not given, and run is a dict"):
        pf.make_patch({}, output="r.safetensors")


def test_a_run_on_a_distilled_generator(runs):
    """Its files may be in a smaller dtype: the patch refers to the weights as the run read them, in float32."""
    config, run = json.loads(Path("compare/pecker-seed0/config.json").read_text()), Path("compare/pecker-seed0")
    narrow = {name: value.bfloat16() for name, value in moved(weights_of("network")).items()}
    wide = {name: value.float() for name, value in narrow.items()}
    shutil.copytree("network", "distilled/unet")
    safetensors.torch.save_file(narrow, f"distilled/unet/{WEIGHTS}.safetensors")
    facts = {"method": "distil", "options": {"t_init": 250}, "pretrained_sha256": config["pretrained_sha256"]}
    Path("distilled/config.json").write_text(json.dumps(facts))
    Path("distilled/metrics.json").write_text("{}")
    config |= {"distilled": "distilled", "initial_generator_sha256": state_hash(wide)}
    (run / "config.json").write_text(json.dumps(config))
    patch = pf.make_patch(run, output="p.safetensors")
    assert patch.base == state_hash(wide) and patch.metadata["base_model"] == "distilled"
    with pytest.warns(UserWarning) as noted:
        pf.apply_patch("distilled", "p.safetensors", output="forgot")
    texts = [str(warning.message) for warning in noted]
    assert "written in float32" in texts[0] and "in one step at t_init 250, the model does not say so" in texts[1]
    assert same(weights_of("forgot"), weights_of(run))
    # The records of the distillation do not apply to the copy.
    assert [path.name for path in Path("forgot").iterdir()] == ["unet"]


def test_networks_that_come_with_the_package(tmp_path, monkeypatch, capsys):
    """By the names that patches record of their base."""
    monkeypatch.chdir(tmp_path)
    name, folder = "shipped:digits/distilled", shipped_network("digits").with_name("distilled")
    result = moved({key: value.float() for key, value in weights_of(folder).items()})
    safetensors.torch.save_file(result, "result.safetensors")
    patch = pf.make_patch(name, "result.safetensors", output="p.safetensors", dtype="result")
    assert patch.metadata["base_model"] == name and pf.verify_patch("p.safetensors", name) == "base"
    before = content(folder)
    main(["patch", "apply", "p.safetensors", "--model", name, "--output", "forgot"])
    assert same(weights_of("forgot"), result) and content(folder) == before
    for model, options, error in (
        (name, ["--in_place"], "which comes with the package: give an output"),
        ("digits", ["--output", "x"], "expected the base"),
        ("shipped:digits/score", ["--output", "x"], "expected a folder or a safetensors file on disk"),
        ("result.safetensors", ["--output", "x.bin"], "ends with .safetensors, as the model"),
    ):
        assert error in fails(capsys, "patch", "apply", "p.safetensors", "--model", model, *options)


def test_no_file_is_overwritten(tmp_path):
    """Least of all the network that the patch is of."""
    networks = [tmp_path / "a.safetensors", tmp_path / "b.safetensors"]
    for path in networks:
        safetensors.torch.save_file({"a": torch.randn(5)}, path)
    before = content(tmp_path)
    with pytest.raises(ValueError, match=r"^output is .*b\.safetensors', which exists already"):
        pf.make_patch(*networks, output=networks[1])
    assert content(tmp_path) == before


def test_delta_files_become_patches(tmp_path):
    base = weights_of(shipped_network("digits"))
    result = moved(base)
    write_delta(tmp_path / "d.safetensors", base, result)
    patch = pf.make_patch("digits", tmp_path / "d.safetensors", output=tmp_path / "p.safetensors")
    assert (patch.base, patch.result) == (state_hash(base), state_hash(result))
    assert patch.metadata["base_model"] == "shipped:digits"


# ---- the command line


def test_commands(model, patch, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    second = tmp_path / "second.safetensors"
    pf.make_patch(model, moved(weights_of(model)), output=second)

    def run(*words) -> str:
        main(["patch", *map(str, words)])
        return capsys.readouterr().out

    assert f"{patch} is whole" in run("verify", patch)
    assert f"{model} is the base of {patch}: the patch can be applied" in run("verify", patch, "--model", model)
    text = run("inspect", patch)
    assert "license: CC0-1.0" in text and "changed" in text and "conv_in.weight" in text
    values = json.loads(run("inspect", patch, "--json_output"))
    known = pf.inspect_patch(patch)
    assert values["changed"] == known.count and values["tensors"]["conv_in.weight"]["shape"] == [8, 4, 3, 3]
    text = run("diff", patch, second)
    assert "in both" in text and "intersection over union 0.0" in text
    applied = run("apply", patch, "--model", model, "--output", "forgot")
    assert applied == "applied, sha256 verified: forgot\n"
    text = run("diff", model, "forgot")
    assert f"{known.count}" in text.splitlines()[-1]
    assert run("revert", patch, "--model", "forgot", "--in_place") == "reverted, sha256 verified: forgot\n"
    assert same(weights_of("forgot"), weights_of(model))


def test_wrong_words(model, patch, capsys):
    assert "no action is given, expected one of make, inspect" in fails(capsys, "patch")
    assert "there is no action 'merge'" in fails(capsys, "patch", "merge")
    assert "models is a, b, c, expected" in fails(capsys, "patch", "make", "a", "b", "c", "--output", "x.safetensors")
    assert "ends with .safetensors" in fails(capsys, "patch", "make", "digits", "digits16", "--output", "x")
    assert "different kinds" in fails(capsys, "patch", "diff", str(patch), str(model))
    assert "names" in fails(capsys, "patch", "diff", "digits", str(model))
    assert "is not a patch file" in fails(capsys, "patch", "inspect", str(model / "model_index.json"))
    with pytest.raises(SystemExit) as stop:
        main(["patch", "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and "can undo the forgetting" in text and "export" in text


# ---- without this package, and other formats


def test_the_documented_code(model, tmp_path):
    """The functions of docs/patch_files.md on a patch of floats, of other dtypes, and of dense changes."""
    text = (ROOT / "docs" / "patch_files.md").read_text()
    (block,) = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    names: dict = {}
    exec(compile(block, "patch_files.md", "exec"), names)
    patch = tmp_path / "all-dtypes.safetensors"
    base = dict(weights_of(model)) | {
        "half": torch.randn(200).half(),
        "long": torch.arange(9),
        "one": torch.tensor(1.0),
    }
    result = moved(base) | {"one": torch.tensor(2.0), "half": base["half"] + 1, "long": torch.arange(9) // 8}
    made = pf.make_patch(base, result, output=patch)
    weights = {name: value.clone() for name, value in base.items()}
    assert names["sha256"](weights) == made.base
    names["switch"](weights, str(patch))
    assert same(weights, result) and names["sha256"](weights) == made.result
    names["switch"](weights, str(patch))
    assert same(weights, base)


def test_one_file_with_the_network(model, patch, tmp_path, capsys):
    from diffusers import UNet2DConditionModel

    path = tmp_path / "unet.safetensors"
    main(["patch", "export", str(patch), "--model", str(model), "--output", str(path)])
    unet = UNet2DConditionModel.from_single_file(str(path), config=str(model), subfolder="unet", local_files_only=True)
    assert state_hash(unet.state_dict()) == pf.inspect_patch(patch).result
    assert "exists already" in fails(
        capsys, "patch", "export", str(patch), "--model", str(model), "--output", str(path)
    )


def test_shira_adapter(model, patch, tmp_path, capsys):
    """PEFT reads it; its linear layers have the result's weights up to rounding."""
    peft = pytest.importorskip("peft")
    base = dict(weights_of(model))
    result = moved(base)
    for name, value in result.items():
        # The difference is no short binary fraction, so that sums are rounded.
        result[name] = torch.where(base[name] == value, value, value * 1.1)
    patch = tmp_path / "rounded.safetensors"
    pf.make_patch(base, result, output=patch)
    main(["patch", "export", str(patch), "--model", str(model), "--output", str(tmp_path / "a"), "--format", "shira"])
    text = capsys.readouterr().out
    unet = tiny_unet()
    unet.load_state_dict(base)
    adapted = peft.PeftModel.from_pretrained(unet, str(tmp_path / "a")).merge_and_unload()
    merged = adapted.state_dict()
    layers = [name for name in base if not torch.equal(merged[name], base[name])]
    linear = {n for n, m in tiny_unet().named_modules() if isinstance(m, torch.nn.Linear)}
    assert layers and {name.removesuffix(".weight") for name in layers} <= linear
    exact = entries = 0
    for name in layers:
        changed = base[name] != result[name]
        assert torch.equal(merged[name][~changed], base[name][~changed])
        # Half a unit in the last place of the difference plus half a unit of the sum.
        error = (merged[name].double() - result[name].double()).abs()
        difference = (result[name].double() - base[name].double()).abs()
        assert (error <= 2**-24 * 1.001 * (difference + result[name].double().abs())).all()
        entries += int(changed.sum())
        exact += int((merged[name] == result[name])[changed].sum())
    numbers = re.search(r"of (\d+) linear layers, r \d+: ([\d,]+) of ([\d,]+) changed entries, ([\d,]+) of them", text)
    total = pf.inspect_patch(patch).count
    assert [int(n.replace(",", "")) for n in numbers.groups()] == [len(layers), entries, total, exact]
    assert f"left out: {total - entries:,d} entries" in text


def test_the_rank_of_an_adapter():
    assert choose_rank({"a": (30, (10, 10)), "b": (5, (10, 10))}) == (2, ["a", "b"])
    # a needs r 10, for which b is too small.
    assert choose_rank({"a": (900, (50, 50)), "b": (5, (4, 4))}) == (9, ["a"])
    with pytest.raises(ValueError, match="no linear layer fits"):
        choose_rank({"a": (9, (3, 3))})
