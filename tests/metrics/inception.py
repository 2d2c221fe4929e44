"""Inception with random weights, as a file: for tests of what is done with its numbers, which mean nothing."""

from pathlib import Path

import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception


def random_inception(folder: Path) -> Path:
    """A file of weights as ``feature_extractor_weights_path`` takes it; signals neither vanish nor grow in it."""

    class Unloaded(inception.FeatureExtractorInceptionV3):
        def load_state_dict(self, *_args, **_kwargs):
            return None

    path = folder / "random-inception.pth"
    torch.save({}, path)
    network = Unloaded("random", ["2048"], feature_extractor_weights_path=str(path))
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight = torch.randn(module.weight.shape, generator=generator)
            # Without a mean, so that what comes after a ReLU, which has one, does not drift off.
            weight -= weight.flatten(1).mean(1).view(-1, *(1,) * (weight.ndim - 1))
            module.weight.copy_(weight * (3 / weight[0].numel()) ** 0.5)
    network.fc.bias.zero_()
    torch.save(network.state_dict(), path)
    return path
