"""Published one-step generators: known by their names, read from their files, drawn as their pages say."""

import pytest
import torch
from safetensors.torch import save_file

from pecker_fast.models import (
    KNOWN,
    Prediction,
    known_generator,
    one_step_of,
    read_stable_diffusion,
    resolve_text,
    resolve_text_unet,
    save_text_pipeline,
)
from pecker_fast.models.hub import split_hub_file
from tests.diffusion.tiny_sdxl import tiny_xl_unet, turbo_scheduler, write_sdxl


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    torch.manual_seed(torch.initial_seed())
    return write_sdxl(tmp_path_factory.mktemp("sdxl") / "base")


@pytest.mark.parametrize(
    ("path", "key"),
    [
        ("stabilityai/sdxl-turbo", "sdxl-turbo"),
        ("hub/models--stabilityai--sdxl-turbo/snapshots/abc", "sdxl-turbo"),
        ("hub/models--stabilityai--sdxl-turbo/snapshots/abc/unet", "sdxl-turbo"),
        ("files/sd_xl_turbo_1.0_fp16.safetensors", "sdxl-turbo"),
        ("sdxl_lightning_1step_unet_x0.safetensors", "sdxl-lightning"),
        ("ByteDance/SDXL-Lightning/sdxl_lightning_1step_unet_x0.safetensors", "sdxl-lightning"),
        ("dmd2_sdxl_1step_unet_fp16.bin", "dmd2"),
        ("SID_LSG", None),
        ("stabilityai/stable-diffusion-xl-base-1.0", None),
    ],
)
def test_names(path, key):
    assert known_generator(path) == key
    expected = {
        "sdxl-turbo": (999, "epsilon", False),
        "sdxl-lightning": (999, "sample", False),
        "dmd2": (399, "epsilon", True),
    }
    one_step = one_step_of(path)
    assert (one_step is None) == (key is None)
    if one_step is not None:
        kind = one_step.prediction
        assert (one_step.t_init, kind.prediction_type, kind.unit_noise) == expected[key]
        assert one_step_of(path, "plain") is None and str(one_step.t_init) in str(KNOWN[key])
        assert "licence" in str(KNOWN[key])


def test_generators_for_several_steps_are_refused():
    for name in ("sdxl_lightning_4step_unet.safetensors", "dmd2_sdxl_4step_unet_fp16.bin"):
        with pytest.raises(ValueError, match=f"{name} is made for several steps"):
            one_step_of(name)
    with pytest.raises(ValueError, match="generator_kind is 'other', expected one of auto, plain, sdxl-turbo"):
        one_step_of("x", "other")


def test_a_saved_generator_says_how_it_draws(base, tmp_path):
    source, kind = read_stable_diffusion(base), Prediction("sample")
    # By its own record, whatever it is called.
    folder = tmp_path / "sdxl-turbo"
    save_text_pipeline(folder, source.load_unet(), source, 321, kind)
    for path in (folder, folder / "unet"):
        assert one_step_of(path).t_init == 321 and one_step_of(path).prediction == kind
    model = resolve_text(folder / "unet", base=base)
    assert model.prediction == kind and model.t_init == 321


def test_unets_in_files(base, tmp_path):
    from diffusers import UNet2DConditionModel

    parts = read_stable_diffusion(base)
    unet = tiny_xl_unet()
    state = {name: value.half() for name, value in unet.state_dict().items()}
    light, dmd = tmp_path / "sdxl_lightning_1step_unet_x0.safetensors", tmp_path / "dmd2_sdxl_1step_unet_fp16.bin"
    save_file(state, light)
    torch.save(state, dmd)
    for path, t_init in ((light, 999), (dmd, 399)):
        result = resolve_text_unet(path, parts=parts, name="initial_generator")
        assert isinstance(result, UNet2DConditionModel) and not result.training
        assert all(torch.equal(value, state[name].float()) for name, value in result.state_dict().items())
        model = resolve_text(path, base=base)
        assert model.t_init == t_init and model.prediction == one_step_of(path).prediction
        assert torch.equal(model.load_unet().conv_in.weight, result.conv_in.weight)
    # Code in a file is not run, and weights of another model are refused.
    save_file({"conv_in.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"initial_generator is .*other.safetensors.*of another architecture"):
        resolve_text_unet(tmp_path / "other.safetensors", parts=parts, name="initial_generator")
    with pytest.raises(ValueError, match=r"there is no config\.json"):
        resolve_text_unet(light)


def test_a_turbo_folder_is_known_by_its_name(tmp_path):
    folder = write_sdxl(tmp_path / "sdxl-turbo", turbo_scheduler())
    assert resolve_text(folder).t_init == 999 and resolve_text(folder).prediction == Prediction()


def test_names_on_the_hub(base, monkeypatch, tmp_path):
    import huggingface_hub

    light = tmp_path / "sdxl_lightning_1step_unet_x0.safetensors"
    save_file(tiny_xl_unet().state_dict(), light)
    asked = []

    def fetch(name, allow_patterns, revision=None):
        asked.append((name, allow_patterns))
        return str(tmp_path if name == "ByteDance/SDXL-Lightning" else base)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fetch)
    parts = read_stable_diffusion(base)
    name = f"ByteDance/SDXL-Lightning/{light.name}"
    assert split_hub_file(name) == ("ByteDance/SDXL-Lightning", light.name) and split_hub_file("a/b") is None
    resolve_text_unet(name, parts=parts)
    assert asked == [("ByteDance/SDXL-Lightning", [light.name])]
    resolve_text_unet("stabilityai/sdxl-turbo", parts=parts)
    # No text encoder and no VAE.
    assert all("unet" in pattern for pattern in asked[-1][1] if "safetensors" in pattern)
    with pytest.raises(ValueError, match=r"has no file other\.safetensors"):
        resolve_text_unet("ByteDance/SDXL-Lightning/other.safetensors", parts=parts)
