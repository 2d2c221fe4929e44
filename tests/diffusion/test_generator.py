"""Noise prediction with and without guidance, and G_theta(z, c)."""

import numpy as np
import pytest
import torch
from torch import nn

from pecker_fast.diffusion import NoiseSchedule, OneStepGenerator, predict

from .toy import AffineNetwork, assert_close, double, tiny_unet

SCHEDULE = NoiseSchedule.linear()


def test_one_step_generator_and_its_gradient():
    schedule = NoiseSchedule.linear()
    network = AffineNetwork()
    z = torch.randn(3, 1, 2, 2, requires_grad=True)
    labels = torch.tensor([1, 0, 1])
    x = OneStepGenerator(schedule, 440)(network, z, labels)
    a, b = (double(v(440)) for v in (schedule.signal, schedule.noise))
    w, v = network.parts(labels)
    x_init = b * double(z)
    eps = w * x_init + v + network.s * 440
    assert_close(x, (x_init - b * eps) / a, (np.abs(x_init) + np.abs(eps)).max() / a.item())
    output_grad = torch.randn(3, 1, 2, 2)
    x.backward(output_grad)
    terms = -b / a * double(output_grad) * x_init
    assert_close(network.w.grad, terms.sum(), np.abs(terms).sum())
    assert z.grad is None
    (call,) = network.calls
    assert_close(call[0], x_init)
    assert call[1].tolist() == [440, 440, 440] and call[2].tolist() == [1, 0, 1]


def test_guidance():
    network = AffineNetwork()
    x, labels, t = torch.randn(3, 1, 2, 2), torch.tensor([1, 0, 2]), torch.tensor([5, 50, 500])
    plain = predict(network, SCHEDULE, x, t, labels, guidance_scale=1.0, null_label=3)
    assert len(network.calls) == 1 and network.calls[0][0].shape[0] == 3
    guided = predict(network, SCHEDULE, x, t, labels, guidance_scale=4.5, null_label=3)
    assert len(network.calls) == 2 and network.calls[1][0].shape[0] == 6
    assert labels.tolist() == [1, 0, 2]
    w, v = network.parts(labels)
    _, null = network.parts([3])
    base = w * double(x) + network.s * double(t).reshape(-1, 1, 1, 1)
    assert_close(plain, base + v, np.abs(base).max() + np.abs(v).max())
    assert_close(guided, base + null + 4.5 * (v - null), np.abs(base).max() + 10 * np.abs(v).max())


def test_guidance_of_a_unet_uses_its_null_label():
    unet = tiny_unet(null_label=True)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 2])
    with torch.no_grad():
        cond = unet(x, 10, class_labels=labels).sample
        null = unet(x, 10, class_labels=torch.tensor([3, 3])).sample
        guided = predict(unet, SCHEDULE, x, 10, labels, guidance_scale=2.5)
        unconditional = predict(unet, SCHEDULE, x, 10, labels, guidance_scale=0.0)
    assert not torch.allclose(cond, null)
    # Matrix products of batches of 2 and of 4 may sum in different orders.
    assert_close(guided, double(null + 2.5 * (cond - null)), factor=1000)
    assert_close(unconditional, double(null), factor=1000)


def test_mode_dtype_and_wrappers():
    unet = tiny_unet(dropout=0.5)
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    wrapper = nn.Module()
    wrapper.module = unet
    wrapper.forward = unet.forward
    expected = predict(unet, SCHEDULE, x, 10, labels)
    assert torch.equal(predict(wrapper, SCHEDULE, x, torch.tensor([10, 10]), labels.int()), expected)
    assert not unet.training
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = predict(unet, SCHEDULE, x, 10, labels)
    assert mixed.dtype == torch.float32 and torch.allclose(mixed, expected, atol=0.1, rtol=0.1)
    unet.train()
    assert not torch.equal(predict(unet, SCHEDULE, x, 10, labels), expected)
    assert all(module.training for module in unet.modules())
    half = predict(unet.eval().to(torch.bfloat16), SCHEDULE, x, 10, labels)
    assert half.dtype == torch.float32 and torch.allclose(half, expected, atol=0.1, rtol=0.1)


def test_bad_arguments():
    schedule = NoiseSchedule.linear()
    unet = tiny_unet()
    x, labels = torch.randn(2, 1, 8, 8), torch.tensor([0, 1])
    for t_init in (-1, 1000):
        with pytest.raises(ValueError, match=f"t_init is {t_init}, expected from 0 to 999"):
            OneStepGenerator(schedule, t_init)
    with pytest.raises(TypeError, match="t_init"):
        OneStepGenerator(schedule, 1.5)
    with pytest.raises(TypeError, match="schedule"):
        OneStepGenerator(None, 3)
    generator = OneStepGenerator(schedule, 440)
    for bad, message in (([0, 3], "labels has 3, expected values from 0 to 2"), ([-1, 0], "labels has -1")):
        with pytest.raises(ValueError, match=message):
            generator(unet, x, torch.tensor(bad))
    with pytest.raises(ValueError, match=r"labels has shape \(1,\), expected \(2,\)"):
        generator(unet, x, labels[:1])
    with pytest.raises(TypeError, match=r"labels is torch\.float32"):
        generator(unet, x, labels.float())
    with pytest.raises(TypeError, match="labels is list"):
        generator(unet, x, [0, 1])
    with pytest.raises(TypeError, match="labels is NoneType"):
        generator(unet, x, None)
    with pytest.raises(ValueError, match="z is on cpu, the schedule on meta"):
        generator.to("meta")(unet, x, labels)
    with pytest.raises(ValueError, match="null_label is None"):
        predict(unet, SCHEDULE, x, 3, labels, 2.0)
    with pytest.raises(ValueError, match="null_label is 3, expected from 0 to 2"):
        predict(unet, SCHEDULE, x, 3, labels, 2.0, null_label=3)
    with pytest.raises(ValueError, match=r"t has shape \(3,\)"):
        predict(unet, SCHEDULE, x, torch.tensor([1, 2, 3]), labels)
