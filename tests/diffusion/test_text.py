"""The text-conditional network: prompts by label, v-prediction, and the U-Net inside."""

import copy

import pytest
import torch

from pecker_fast.diffusion import (
    OneStepGenerator,
    PromptTable,
    TextConditioned,
    encode_prompts,
    null_label,
    predict,
    sample_ddim,
    sample_one_step,
)
from tests.diffusion import toy
from tests.diffusion.tiny_sd import SIZE, WIDTH, tiny_schedule, tiny_text_network, tiny_unet, write_stable_diffusion


def levels(t: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """a_t and b_t of Stable Diffusion's schedule in float64, (B, 1, 1, 1)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    alphas = torch.cumprod(1 - betas, 0)[t].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


def inputs(count: int = 4, prompts: int = 5):
    return torch.randn(count, 4, SIZE, SIZE), torch.randint(1000, (count,)), torch.randint(prompts, (count,))


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("scale", [1.0, 4.5])
def test_predictions_are_those_of_the_unet_with_the_prompt_embeddings(kind, scale):
    network = tiny_text_network(prediction_type=kind)
    x, t, labels = inputs()
    nulls = torch.tensor([0, 3, 0, 1])
    unet = copy.deepcopy(network.unet).double()

    def eps_of(labels):
        text = network.table.embeddings[labels].double()
        output = unet(x.double(), t, encoder_hidden_states=text).sample
        a, b = levels(t)
        return output if kind == "epsilon" else a * output + b * x

    with torch.no_grad():
        eps = predict(network, network.schedule, x, t, labels, scale, nulls)
        expected = eps_of(labels)
        if scale != 1:
            expected = eps_of(nulls) + scale * (expected - eps_of(nulls))
    assert eps.dtype == torch.float32
    # diffusers rounds the schedule to float32, which limits the accuracy.
    assert (eps - expected).abs().max() <= 2e-5 * expected.abs().max()
    # The default null label is the empty prompt's.
    with torch.no_grad():
        default = predict(network, network.schedule, x, t, labels, scale)
        zeros = predict(network, network.schedule, x, t, labels, scale, torch.zeros(4, dtype=torch.int64))
    assert torch.allclose(default, zeros, atol=1e-6)


def test_v_prediction_recovers_the_noise_of_a_perfect_network():
    # A perfect network predicts v = a eps - b x_0.
    network = tiny_text_network(prediction_type="v_prediction")
    x0, eps = torch.randn(2, 3, 4, SIZE, SIZE).unbind()
    t = torch.tensor([5, 500, 990])
    a, b = network.schedule.signal(t), network.schedule.noise(t)

    class Perfect(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.unused = torch.nn.Parameter(torch.zeros(1))

        def forward(self, x, t, encoder_hidden_states, return_dict):
            return (a * eps - b * x0,)

    network.unet = Perfect()
    prediction = predict(network, network.schedule, a * x0 + b * eps, t, torch.zeros(3, dtype=torch.int64))
    assert torch.allclose(prediction, eps, atol=1e-5)


def test_names_and_state_dicts_are_those_of_the_unet():
    network = tiny_text_network()
    plain = network.unet
    assert [n for n, _ in network.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert network.state_dict().keys() == plain.state_dict().keys()
    assert null_label(network) == 0 and network.num_conditions == 5
    other = copy.deepcopy(network)
    assert other.table is network.table and not other.training
    with torch.no_grad():
        for param in other.parameters():
            param.add_(1)
    assert not torch.equal(next(other.parameters()), next(network.parameters()))
    other.load_state_dict(network.state_dict())
    x, t, labels = inputs()
    with torch.no_grad():
        assert torch.equal(other(x, t, labels)[0], network(x, t, labels)[0])
    assert next(other.to(torch.bfloat16).parameters()).dtype == torch.bfloat16
    assert network.table.embeddings.dtype == torch.float32
    with torch.no_grad():
        # Only the U-Net has low precision; inputs and outputs of the wrapper do not.
        assert predict(other, other.schedule, x, t, labels).dtype == torch.float32


def test_gradient_checkpointing_changes_no_gradient():
    network = tiny_text_network()
    x, t, labels = inputs()
    network(x, t, labels)[0].square().sum().backward()
    plain = [p.grad.clone() for p in network.parameters()]
    network.zero_grad()
    network.enable_gradient_checkpointing()
    calls = []
    network.unet.mid_block.register_forward_hook(lambda *_: calls.append(1))
    network(x, t, labels)[0].square().sum().backward()
    assert len(calls) == 1 and network.unet.is_gradient_checkpointing
    for grad, expected in zip((p.grad for p in network.parameters()), plain, strict=True):
        assert torch.allclose(grad, expected, rtol=1e-4, atol=1e-5)


def test_samples_are_latents_without_bounds():
    network = tiny_text_network()
    with torch.no_grad():
        network.unet.conv_out.bias.add_(50)
    one = sample_one_step(network, OneStepGenerator(tiny_schedule(), 625), [1, 2], seed=3)
    assert one.shape == (2, 4, SIZE, SIZE) and one.abs().max() > 1
    many = sample_ddim(network, tiny_schedule(), [1, 2], 4, seed=3, clip_sample=False, guidance_scale=2.0)
    assert many.shape == one.shape and many.abs().max() > 1
    wide = TextConditioned(network.unet, network.table, tiny_schedule(), sample_size=16)
    assert sample_one_step(wide, OneStepGenerator(tiny_schedule(), 625), [1]).shape == (1, 4, 16, 16)
    with pytest.raises(ValueError, match="labels has 5"):
        sample_one_step(network, OneStepGenerator(tiny_schedule(), 625), [5])


def test_encoding_against_the_pipeline(tmp_path):
    from diffusers import StableDiffusionPipeline

    folder = write_stable_diffusion(tmp_path / "sd")
    pipe = StableDiffusionPipeline.from_pretrained(folder)
    prompts = ["", "a dog", "A man and a dog", "x" * 200]
    embeddings, truncated = encode_prompts(pipe.tokenizer, pipe.text_encoder, prompts, batch_size=3)
    expected = torch.cat([pipe.encode_prompt(p, "cpu", 1, False)[0] for p in prompts])
    assert embeddings.shape == (4, 77, WIDTH) and torch.allclose(embeddings, expected, atol=1e-5)
    assert not torch.allclose(embeddings[1], embeddings[2], atol=1e-2) and truncated == ["x" * 200]
    assert torch.equal(embeddings, encode_prompts(pipe.tokenizer, pipe.text_encoder.train(), prompts)[0])


def test_invalid_networks_and_tables():
    schedule, table = tiny_schedule(), PromptTable(torch.randn(3, 7, WIDTH))
    with pytest.raises(ValueError, match="UNet2DConditionModel"):
        TextConditioned(toy.tiny_unet(), table, schedule)
    with pytest.raises(ValueError, match="width 9"):
        TextConditioned(tiny_unet(), PromptTable(torch.randn(3, 7, 9)), schedule)
    with pytest.raises(ValueError, match="9 input and 4 output"):
        TextConditioned(tiny_unet(in_channels=9), table, schedule)
    with pytest.raises(ValueError, match="prediction_type is 'flow'"):
        TextConditioned(tiny_unet(), table, schedule, "flow")
    with pytest.raises(ValueError, match="num_class_embeds"):
        TextConditioned(tiny_unet(num_class_embeds=3), table, schedule)
    with pytest.raises(ValueError, match=r"shape \(3, 7\)"):
        PromptTable(torch.randn(3, 7))
    with pytest.raises(TypeError, match="floating"):
        PromptTable(torch.zeros(3, 7, 8, dtype=torch.int64))
    with pytest.raises(ValueError, match="null_label is 3"):
        PromptTable(torch.randn(3, 7, WIDTH), 3)
