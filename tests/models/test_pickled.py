"""Pickled modules are read without running any code in them."""

import copy
import os
import pickle
import random

import pytest
import torch
from torch import nn

from pecker_fast.models import load_text_unet
from pecker_fast.models.pickled import Stub, config_of, read_pickle, state_of
from pecker_fast.runs.convert import convert
from tests.diffusion.tiny_sd import tiny_unet
from tests.inputs import same_bits


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        self.register_buffer("saved", torch.arange(3))
        self.register_buffer("unsaved", torch.ones(2), persistent=False)
        self.table = nn.Parameter(torch.randn(4, 6)[:, ::2].to(torch.bfloat16))
        self.nothing = None


class Malicious:
    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def write(value, path, how: int | str):
    if how == "torch":
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value, protocol=how))


@pytest.mark.parametrize("how", ["torch", 2, 4, 5])
def test_state_is_the_state_dict_of_the_module(how, tmp_path):
    network = Network()
    write({"ema": network, "step": 3}, tmp_path / "net.pkl", how)
    content = read_pickle(tmp_path / "net.pkl")
    assert isinstance(content["ema"], Stub) and content["step"] == 3 and content["ema"].qualified.endswith("Network")
    state, expected = state_of(content["ema"]), network.state_dict()
    assert state.keys() == expected.keys()
    assert all(same_bits(state[name].contiguous(), expected[name].contiguous()) for name in state)
    assert state_of(dict(expected)).keys() == expected.keys()


@pytest.mark.parametrize("how", ["torch", 0, 2, 4])
@pytest.mark.parametrize("place", ["alone", "beside", "within"])
def test_code_is_not_run(how, place, tmp_path):
    sign = tmp_path / "sign"
    bad = Malicious(sign)
    network = Network()
    if place == "within":
        network.bad = bad
    write({"ema": network, "bad": bad} if place != "alone" else bad, tmp_path / "bad.pkl", how)
    content = read_pickle(tmp_path / "bad.pkl")
    assert not sign.exists()
    if place != "alone":
        assert state_of(content["ema"]).keys() == Network().state_dict().keys()
    # The plain unpickler does run it.
    if how != "torch":
        pickle.loads((tmp_path / "bad.pkl").read_bytes())
        assert sign.exists()


@pytest.mark.parametrize(
    "code", [b'cbuiltins\neval\n(S\'open("PATH", "w")\'\ntR.', b"cos\nsystem\n(S'touch PATH'\ntR."]
)
def test_builtins_are_not_called(code, tmp_path):
    path = tmp_path / "bad.pkl"
    path.write_bytes(code.replace(b"PATH", str(tmp_path / "sign").encode()))
    assert isinstance(read_pickle(path), Stub) and not (tmp_path / "sign").exists()


def test_tensors_cannot_reach_beyond_their_storage(tmp_path):
    class Wide:
        def __reduce__(self):
            return torch._utils._rebuild_tensor_v2, (torch.zeros(4).storage(), 2, (9,), (1,), False, {})

    write(Wide(), tmp_path / "wide.pkl", 2)
    with pytest.raises(ValueError, match="larger than its storage"):
        read_pickle(tmp_path / "wide.pkl")


def test_damaged_files(tmp_path):
    path = tmp_path / "net.pkl"
    write({"ema": Network()}, path, 4)
    data = path.read_bytes()
    for _ in range(30):
        cut = bytearray(data[: random.randrange(1, len(data) - 1)])
        path.write_bytes(cut)
        with pytest.raises(ValueError, match="cannot be read"):
            read_pickle(path)
    network = Network()
    write({"ema": network}, path, "torch")
    data = path.read_bytes()
    at = data.index(network.layers[0].weight.detach().numpy().tobytes()) + 5
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])
    with pytest.raises(ValueError, match="cannot be read"):
        read_pickle(path)
    with pytest.raises(ValueError, match="no file"):
        read_pickle(tmp_path / "none")
    with pytest.raises(ValueError, match="not a module"):
        state_of(Stub())


@pytest.mark.parametrize("how", ["torch", 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_converted_network_has_the_same_weights(how, dtype, tmp_path):
    unet = tiny_unet()
    write({"ema": copy.deepcopy(unet).to(dtype), "bad": Malicious(tmp_path / "sign")}, tmp_path / "lsg.pkl", how)
    assert config_of(read_pickle(tmp_path / "lsg.pkl")["ema"])["cross_attention_dim"] == 16
    convert(str(tmp_path / "lsg.pkl"), str(tmp_path / "out"))
    again = load_text_unet(tmp_path / "out")
    assert not (tmp_path / "sign").exists()
    for a, b in zip(again.parameters(), unet.parameters(), strict=True):
        assert torch.equal(a, b.to(dtype).float())
    # A state dict with the configuration of another folder.
    write({"model": {f"module.{k}": v for k, v in unet.state_dict().items()}}, tmp_path / "weights.pkl", how)
    with pytest.raises(ValueError, match="--like"):
        convert(str(tmp_path / "weights.pkl"), str(tmp_path / "other"))
    convert(str(tmp_path / "weights.pkl"), str(tmp_path / "other"), like=str(tmp_path / "out"))
    assert all(
        torch.equal(a, b)
        for a, b in zip(load_text_unet(tmp_path / "other").parameters(), unet.parameters(), strict=True)
    )


def test_invalid_conversions(tmp_path):
    unet = tiny_unet()
    write({"ema": unet}, tmp_path / "net.pkl", 4)
    unet.save_pretrained(tmp_path / "unet")
    tiny_unet(block_out_channels=(8, 24)).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="exists already"):
        convert(str(tmp_path / "net.pkl"), str(tmp_path / "unet"))
    with pytest.raises(ValueError, match="key is 'G'"):
        convert(str(tmp_path / "net.pkl"), str(tmp_path / "out"), key="G")
    with pytest.raises(ValueError, match="of another architecture"):
        convert(str(tmp_path / "net.pkl"), str(tmp_path / "out"), like=str(tmp_path / "other"))
    with pytest.raises(ValueError, match="like is"):
        convert(str(tmp_path / "net.pkl"), str(tmp_path / "out"), like=str(tmp_path / "none"))
    write({"ema": [1, 2]}, tmp_path / "list.pkl", 4)
    with pytest.raises(ValueError, match="not a module"):
        convert(str(tmp_path / "list.pkl"), str(tmp_path / "out"), like=str(tmp_path / "unet"))
    assert not (tmp_path / "out").exists()
