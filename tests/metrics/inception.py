"""A file of random Inception weights, for tests that do not depend on the values."""

from pathlib import Path

import torch
from torch import nn
from torch_fidelity import feature_extractor_inceptionv3 as inception


def random_inception(folder: Path) -> Path:
    """Write weights for ``feature_extractor_weights_path`` with which signals neither vanish nor explode."""

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
            # Zero mean, because inputs after a ReLU have a positive mean, which would accumulate.
            weight -= weight.flatten(1).mean(1).view(-1, *(1,) * (weight.ndim - 1))
            module.weight.copy_(weight * (3 / weight[0].numel()) ** 0.5)
    network.fc.bias.zero_()
    torch.save(network.state_dict(), path)
    return path
