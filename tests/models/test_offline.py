"""Folders that are not what they seem: one line each, and never a request to a network."""

import json
import shutil
import socket

import pytest
import torch
from safetensors.torch import load_file, save_file

import pecker_fast as pf
from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.hashing import weights_hash
from pecker_fast.models import (
    StableDiffusion,
    conditioning_of,
    find_weight_files,
    load_network,
    resolve,
    resolve_text,
    resolve_text_unet,
    save_network,
    save_one_step_pipeline,
)
from pecker_fast.models.offline import loading, offline
from tests.diffusion.tiny_sd import write_stable_diffusion
from tests.diffusion.toy import tiny_unet

WEIGHTS = "diffusion_pytorch_model.safetensors"


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    """Whoever opens a connection, or looks up a name, fails the test, even if the error is caught."""
    tried = []

    def refuse(*arguments, **_):
        tried.append(arguments)
        raise OSError("a network was asked")

    for name in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, name, refuse)
    for name in ("getaddrinfo", "create_connection", "gethostbyname"):
        monkeypatch.setattr(socket, name, refuse)
    yield tried
    assert tried == []


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("originals")
    save_network(folder / "network", tiny_unet(), NoiseSchedule.linear())
    save_one_step_pipeline(folder / "pipeline", tiny_unet(), NoiseSchedule.linear(), 250)
    write_stable_diffusion(folder / "sd", "epsilon")
    return folder


@pytest.fixture
def place(originals, tmp_path):
    for name in ("network", "pipeline", "sd"):
        shutil.copytree(originals / name, tmp_path / name)
    return tmp_path


def refused(read, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        read()
    text = str(error.value)
    assert len(text.splitlines()) == 1 and len(text) < 900, text


def change(path, **fields) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


def read_everything(place) -> None:
    """Whatever reads the parts of a Stable Diffusion; raises the first error."""
    model = StableDiffusion(place / "sd")
    model.load_unet()
    model.load_other_parts()
    model.load_scheduler()


def test_the_guard_guards_and_whole_folders_are_read(place, no_network):
    with pytest.raises(OSError, match="a network was asked"):
        socket.create_connection(("example.org", 80))
    assert no_network == [(("example.org", 80),)]
    no_network.clear()
    load_network(place / "network")
    read_everything(place)


@pytest.mark.parametrize("content", ['"x"', '"owner/model"', "[1]", "5", "null", "{", "", "\ufeff{}"])
@pytest.mark.parametrize(
    "name",
    [
        "unet/config.json",
        "vae/config.json",
        "text_encoder/config.json",
        "scheduler/scheduler_config.json",
        "tokenizer/tokenizer_config.json",
    ],
)
def test_a_configuration_that_is_no_object_is_refused(place, name, content):
    """diffusers takes a text for a name on the hub and sends requests for half a minute."""
    (place / "sd" / name).write_text(content)
    refused(lambda: read_everything(place), name.split("/")[1].replace(".", r"\."))


@pytest.mark.parametrize("content", ['"x"', "[1]", "{", "\ufeff{}"])
@pytest.mark.parametrize("name", ["config.json", "scheduler/scheduler_config.json"])
def test_class_conditional_networks(place, name, content):
    (place / "network" / name).write_text(content)
    for read in (load_network, resolve):
        refused(lambda read=read: read(place / "network"), name.split("/")[-1].replace(".", r"\."))
    if name == "config.json":
        refused(lambda: conditioning_of(str(place / "network")), r"config\.json is damaged")


def test_an_index_of_a_pipeline_that_is_damaged(place):
    for content in ('"x"', "[]", '{"t_init": "250"}', '{"t_init": -1}', '{"t_init": 2.5}', '{"t_init": [1]}'):
        (place / "pipeline" / "model_index.json").write_text(content)
        refused(lambda: resolve(place / "pipeline"), r"model_index\.json")
    assert resolve(place / "network").metadata == {}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sample_size": None}, "has no sample_size: set it to the height and width"),
        ({"sample_size": "8"}, 'sample_size is "8"'),
        ({"sample_size": 0}, "sample_size is 0"),
        ({"out_channels": 2}, "also predicts variances, which is not supported; expected out_channels 1"),
        ({"block_out_channels": 4}, "block_out_channels is 4, expected a list"),
        ({"block_out_channels": [4, "x"]}, r"block_out_channels\[1\]"),
        ({"block_out_channels": [1 << 62, 1 << 62]}, "no weights that can be read"),
        ({"down_block_types": 1.5}, "down_block_types is 1.5, expected a list"),
        ({"down_block_types": [1.5]}, r"down_block_types\[0\] is 1.5, expected a text"),
        ({"down_block_types": ["Nonsense", "Nonsense"]}, "no weights that can be read"),
        ({"layers_per_block": "x"}, "layers_per_block"),
        ({"num_class_embeds": "x"}, "num_class_embeds"),
        ({"in_channels": 1 << 63}, "9223372036854775808 is beyond 64 bits"),
        ({"norm_num_groups": 0}, "no weights that can be read"),
        ({"_class_name": 5}, "_class_name is 5, expected a text"),
        ({"_class_name": "AutoencoderKL"}, "has a AutoencoderKL, expected a UNet2DModel"),
    ],
)
def test_configurations_of_networks(place, fields, message):
    change(place / "network" / "config.json", **fields)
    refused(lambda: resolve(place / "network"), message)


def weights_of(place) -> dict:
    return load_file(place / "network" / WEIGHTS)


def write_weights(place, weights, metadata=None) -> None:
    save_file(weights, place / "network" / WEIGHTS, {"format": "pt"} if metadata is None else metadata)


def test_weights(place):
    weights = weights_of(place)
    name = sorted(weights)[3]
    read = lambda: resolve(place / "network")  # noqa: E731
    for value in (float("nan"), float("inf")):
        damaged = {**weights, name: torch.full_like(weights[name], value)}
        write_weights(place, damaged)
        refused(read, f"inf or NaN, such as {name}".replace(".", r"\."))
    write_weights(place, {f"module.{key}": value for key, value in weights.items()})
    refused(read, r"names that begin with module\., the wrapper of DataParallel")
    write_weights(place, {key: value for key, value in weights.items() if key != name})
    refused(read, f"1 missing keys, such as {name}".replace(".", r"\."))
    write_weights(place, {**weights, name: torch.zeros(*weights[name].shape, 2), "other": torch.zeros(1)})
    refused(read, r"weights that do not fit its configuration: .*")
    write_weights(place, {f"{key}x": value for key, value in weights.items()})
    refused(read, "missing keys")
    (place / "network" / WEIGHTS).write_bytes(b"\x08\0\0\0\0\0\0\0garbage!")
    refused(read, "cannot be read")
    (place / "network" / WEIGHTS).unlink()
    refused(read, "no safetensors weights")
    torch.save(weights, place / "network" / "diffusion_pytorch_model.bin")
    refused(read, r"diffusion_pytorch_model\.bin is a pickle, save it with safe_serialization")


def test_files_of_this_package_that_are_no_weights(place, tmp_path):
    network = tiny_unet()
    for param in network.parameters():
        param.grad = torch.randn_like(param)
    pf.saliency_mask(network, density=0.5).save(place / "network" / WEIGHTS)
    refused(lambda: resolve(place / "network"), "it is the file of a saliency mask")
    (files,) = find_weight_files(place / "network" / WEIGHTS)
    refused(lambda: files.weights, "it is the file of a saliency mask")


@pytest.mark.parametrize("variant", ["fp16", "bf16"])
def test_a_folder_with_one_variant_alone_is_read(place, variant):
    dtype = torch.float16 if variant == "fp16" else torch.bfloat16
    halves = {name: value.to(dtype) for name, value in weights_of(place).items()}
    target = place / "network" / WEIGHTS.replace("model.", f"model.{variant}.")
    save_file(halves, target, {"format": "pt"})
    plain = weights_hash(load_network(place / "network")[0])
    (place / "network" / WEIGHTS).unlink()
    network = load_network(place / "network")[0]
    assert {param.dtype for param in network.parameters()} == {torch.float32} and weights_hash(network) != plain
    assert all(torch.equal(value, halves[name].float()) for name, value in network.state_dict().items())
    save_file(halves, target.with_name(WEIGHTS.replace("model.", "model.other.")), {"format": "pt"})
    refused(lambda: load_network(place / "network"), r"variants \w+, \w+ only: keep one")


def test_text_models(place):
    change(place / "sd" / "unet" / "config.json", sample_size=None)
    refused(lambda: resolve_text_unet(place / "sd"), "has no sample_size")
    change(place / "sd" / "unet" / "config.json", sample_size=8, out_channels=8)
    refused(lambda: resolve_text_unet(place / "sd"), "also predicts variances")
    vae = place / "sd" / "vae" / WEIGHTS
    weights = load_file(vae)
    save_file({name: value for name, value in weights.items() if "decoder" in name}, vae, {"format": "pt"})
    refused(resolve_text(place / "sd").parts.load_vae, "missing keys")
    (place / "sd" / "text_encoder" / "model.safetensors").write_bytes(b"garbage")
    refused(resolve_text(place / "sd").parts.load_text_encoder, "no text encoder that can be read")


def test_a_tokenizer_without_a_length_takes_that_of_its_text_encoder(place):
    path = place / "sd" / "tokenizer" / "tokenizer_config.json"
    whole = StableDiffusion(place / "sd").encode(["a dog"])[0]
    config = json.loads(path.read_text())
    del config["model_max_length"]
    path.write_text(json.dumps(config))
    model = StableDiffusion(place / "sd")
    length = model.config("text_encoder")["max_position_embeddings"]
    assert model.load_tokenizer().model_max_length == length == whole.tensors["encoder_hidden_states"].shape[1]
    again = model.encode(["a dog"])[0].tensors["encoder_hidden_states"]
    assert torch.equal(again, whole.tensors["encoder_hidden_states"])
    assert len(model.tokenize(["dog " * 200])[0]) == length
    change(place / "sd" / "text_encoder" / "config.json", max_position_embeddings=None)
    refused(StableDiffusion(place / "sd").load_tokenizer, "set model_max_length in tokenizer/tokenizer_config.json")


def test_the_client_of_the_hub_is_offline_while_parts_are_loaded(tmp_path):
    from huggingface_hub import HfApi, constants

    before = constants.HF_HUB_OFFLINE

    def ask() -> None:
        with loading(tmp_path, "model"):
            HfApi().model_info("owner/model")

    refused(ask, "has no model that can be read: .*offline")
    assert before == constants.HF_HUB_OFFLINE
    with pytest.raises(KeyError), offline():
        raise KeyError
    assert before == constants.HF_HUB_OFFLINE
