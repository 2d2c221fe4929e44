"""Checkpoints of the public DDPM code: the same function after conversion, and files that are refused."""

import os
import pickle
import random

import pytest
import torch

from pecker_fast.diffusion import NoiseSchedule, null_label, num_classes, predict
from pecker_fast.models import load_ancestor, load_network, save_network
from tests.models.ancestor_model import AncestorUNet

SCHEDULE = NoiseSchedule.linear()
SHAPES = {32: (1, 2, 2), 64: (1, 2, 2, 1)}


def ancestor(size: int = 32, seed: int = 0, **options) -> AncestorUNet:
    torch.manual_seed(seed)
    model = AncestorUNet(size, mult=SHAPES[size], **options).eval()
    with torch.no_grad():
        for param in model.parameters():
            # Norms start as identities and biases near 0: make every parameter matter.
            param.add_(0.1 * torch.randn_like(param))
    return model


def shadow(model: AncestorUNet) -> dict[str, torch.Tensor]:
    """The average by parameter name, as in their code."""
    return {name: param.detach().clone() for name, param in model.named_parameters()}


def wrapped(model: AncestorUNet) -> dict[str, torch.Tensor]:
    return {f"module.{name}": value for name, value in model.state_dict().items()}


def optimizer_state(model: AncestorUNet) -> dict:
    optimizer = torch.optim.Adam(model.parameters())
    sum(param.sum() for param in model.parameters()).backward()
    optimizer.step()
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()})
    return optimizer.state_dict()


def same_function(model: AncestorUNet, unet, size: int) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, 3, size, size, generator=generator)
    t = torch.tensor([0, 440, 999])
    labels = torch.tensor([0, 9, 4])
    with torch.no_grad():
        for theirs, ours in ((labels, labels), (None, torch.full((3,), 10))):
            expected, eps = model(x, t, theirs), predict(unet, SCHEDULE, x, t, ours)
            assert (eps - expected).abs().max() <= 1e-5 * expected.abs().max()
        # Their w is our guidance scale minus 1.
        expected = 3 * model(x, t, labels) - 2 * model(x, t, None)
        eps = predict(unet, SCHEDULE, x, t, labels, guidance_scale=3.0)
    assert (eps - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize(("size", "mult", "count"), [(32, (1, 2, 2, 2), 38632323), (64, (1, 2, 2, 2, 4), 83159683)])
def test_reimplementation_has_as_many_parameters_as_the_public_models(size, mult, count):
    with torch.device("meta"):
        model = AncestorUNet(size, width=128, mult=mult)
    assert sum(param.numel() for param in model.parameters()) == count


@pytest.mark.parametrize("size", [32, 64])
def test_outputs_equal_the_original(tmp_path, size):
    model = ancestor(size)
    torch.save(model.state_dict(), tmp_path / "plain.pth")
    unet, schedule = load_ancestor(tmp_path / "plain.pth")
    assert (unet.config["sample_size"], num_classes(unet), null_label(unet)) == (size, 10, 10)
    assert unet.config["dropout"] == 0.1 and not unet.training
    betas = torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64)
    assert torch.allclose(schedule.alphas_cumprod, (1 - betas).cumprod(0).float())
    same_function(model, unet, size)
    save_network(tmp_path / "saved", unet, schedule)
    again, _ = load_network(tmp_path / "saved")
    assert num_classes(again) == 10
    same_function(model, again, size)


def test_choice_of_weights(tmp_path):
    live, averaged, score = (ancestor(seed=seed) for seed in range(3))
    optimizer = optimizer_state(live)
    torch.save([wrapped(live), optimizer, 7, shadow(averaged)], tmp_path / "ckpt.pth")
    torch.save([wrapped(live), optimizer, 7], tmp_path / "live.pth")
    torch.save([score.state_dict(), {}, wrapped(live), optimizer, 7, shadow(averaged)], tmp_path / "sfd.pth")
    torch.save([None, None, live.state_dict(), None, 7, shadow(averaged)], tmp_path / "early.pth")
    for name, state, model in (
        ("ckpt", "auto", averaged), ("ckpt", "ema", averaged), ("ckpt", "model", live), ("live", "auto", live),
        ("sfd", "auto", averaged), ("sfd", "model", live), ("sfd", "score", score), ("early", "auto", averaged),
    ):  # fmt: skip
        unet, _ = load_ancestor(tmp_path / f"{name}.pth", state)
        bias = unet.state_dict()["conv_in.bias"]
        assert torch.equal(bias, model.conv_in.bias.detach()), (name, state)
    for name, state in (("live", "ema"), ("ckpt", "score"), ("early", "score")):
        with pytest.raises(ValueError, match=f"no weights {state}"):
            load_ancestor(tmp_path / f"{name}.pth", state)
    with pytest.raises(ValueError, match="checkpoint_state"):
        load_ancestor(tmp_path / "ckpt.pth", "best")
    # A file with one network's weights does not say which they are.
    torch.save(live.state_dict(), tmp_path / "plain.pth")
    for state in ("ema", "model", "score"):
        with pytest.raises(ValueError, match=f"checkpoint_state is '{state}', expected auto"):
            load_ancestor(tmp_path / "plain.pth", state)


class Touch:
    """An object whose unpickling runs a command."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_code_is_not_run(tmp_path):
    state = shadow(ancestor())
    for name, write in (
        ("in_zip", torch.save),
        ("bare", lambda tree, path: path.write_bytes(pickle.dumps(tree, protocol=2))),
    ):
        trap = tmp_path / f"trap-{name}"
        write([state if name == "in_zip" else {}, Touch(trap), 1], tmp_path / f"{name}.pth")
        with pytest.raises(ValueError, match=r"it refers to \S*mkdir, and code in it is not run") as info:
            load_ancestor(tmp_path / f"{name}.pth")
        # Without torch's advice to load it unsafely.
        assert "weights_only" not in str(info.value) and len(str(info.value).splitlines()) == 1
        assert not trap.exists()


def test_damaged_and_foreign_files(tmp_path):
    model = ancestor()
    path = tmp_path / "ckpt.pth"
    torch.save(model.state_dict(), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"ckpt\.pth"):
        load_ancestor(path)
    path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"ckpt\.pth"):
        load_ancestor(path)
    for tree, message in (
        ([], "list of 0"),
        (3, "int"),
        ({"epoch": 3}, "not a tensor"),
        (torch.nn.Linear(2, 2).state_dict(), "another architecture"),
        ([None, {}, 3], "no weights"),
    ):
        torch.save(tree, path)
        with pytest.raises(ValueError, match=message):
            load_ancestor(path)


def small_checkpoint(path, zipped: bool) -> bytes:
    model = AncestorUNet(32, mult=(1, 1), blocks=1)
    tree = [model.state_dict(), {}, 3, shadow(model)]
    torch.save(tree, path, _use_new_zipfile_serialization=zipped)
    return path.read_bytes()


def test_flipped_bit_in_a_weight(tmp_path):
    path = tmp_path / "ckpt.pth"
    model = ancestor()
    torch.save(model.state_dict(), path)
    whole = bytearray(path.read_bytes())
    place = whole.index(model.conv_in.weight.detach().numpy().tobytes())
    whole[place + 5] ^= 16
    path.write_bytes(whole)
    with pytest.raises(ValueError, match="checksum"):
        load_ancestor(path)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.filterwarnings("ignore")
def test_damaged_files_raise_only_value_errors(tmp_path, zipped):
    """Overwrite bytes of the structure, at the head (the old format) and at the end (the directory of a zip)."""
    path = tmp_path / "ckpt.pth"
    whole = small_checkpoint(path, zipped)
    refused = 0
    for _ in range(60):
        damaged = bytearray(whole)
        for _ in range(5):
            place = random.randrange(8000)
            damaged[place if random.random() < 0.5 else -1 - place] = random.randrange(256)
        path.write_bytes(damaged)
        try:
            load_ancestor(path)
        except ValueError as error:
            refused += 1
            assert str(path) in str(error)
    assert refused >= 10


def test_other_architectures(tmp_path):
    path = tmp_path / "ckpt.pth"

    def refused(message: str, **changes) -> None:
        state = dict(ancestor().state_dict())
        for name, value in changes.items():
            name = name.replace("__", ".")
            if value is None:
                del state[name]
            else:
                state[name] = value
        torch.save(state, path)
        with pytest.raises(ValueError, match=message):
            load_ancestor(path)

    refused("no down.1.block.0.conv1.weight", down__1__block__0__conv1__weight=None)
    refused("missing: down_blocks.1.resnets.1.conv1.weight", down__1__block__1__conv1__weight=None)
    refused("missing: conv_out.bias", conv_out__bias=None)
    refused("unknown: logvar", logvar=torch.zeros(1000))
    refused("of another shape: conv_norm_out.bias", norm_out__bias=torch.zeros(5))
    refused("null_classes_emb", null_classes_emb=None)
    refused(r"null_classes_emb has shape \(7,\), expected \(32,\)", null_classes_emb=torch.zeros(7))
    for name, shape in (
        ("temb.dense.0.weight", (128, 7)),
        ("temb.dense.1.weight", (128, 7)),
        ("cemb.dense.0.weight", (5, 32)),
        ("cemb.dense.1.bias", (7,)),
        ("classes_emb.weight", (10, 7)),
    ):
        refused(f"{name} has shape", **{name.replace(".", "__"): torch.zeros(shape)})
    refused("conv_in.bias twice", module__conv_in__bias=torch.zeros(32))
    state = {name: value for name, value in ancestor().state_dict().items() if "attn" not in name}
    torch.save(state, path)
    with pytest.raises(ValueError, match="sample_size"):
        load_ancestor(path)
