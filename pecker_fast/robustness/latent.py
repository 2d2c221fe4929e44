"""Latent search: is there a latent from which the network still draws the class?

z moves on the sphere of radius sqrt(d), where standard normal vectors lie, to increase the judge's probability of the
class for G(z, c). Gradients of a classifier also lead to images that only fool it, so a hit is confirmed if the nearest
real image in pixel space is of the class too. The same search for retained classes is the reference.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number
from ..data import LabelledImages
from ..unlearning import ForgetRequest
from ..unlearning.streams import Streams
from .examiner import Examiner


@dataclass(frozen=True)
class LatentOptions:
    """Options of the latent search.

    Parameters
    ----------
    latents : int
        Searches for each forgotten class by its own label; a quarter of it for every other pair of target class and
        label.
    steps : int
        Steps of Adam.
    learning_rate : float
        Adam's learning rate.
    """

    latents: int = 16
    steps: int = 40
    learning_rate: float = 0.1

    def check(self) -> None:
        """Raise ValueError or TypeError, naming the option, if one is out of range."""
        check_int("latents", self.latents, 1)
        check_int("search_steps", self.steps, 1)
        check_number("search_learning_rate", self.learning_rate, open_low=True)


class NearestImage:
    """Classifies an image by the nearest real image in pixel space (Euclidean), independently of the judge.

    Parameters
    ----------
    dataset : LabelledImages
        Real images.
    per_class : int
        Number of images of each class to compare with, the first ones.
    """

    def __init__(self, dataset: LabelledImages, per_class: int = 200) -> None:
        members = [(dataset.labels == c).nonzero().flatten()[:per_class] for c in range(dataset.num_classes)]
        reference = dataset.subset(torch.cat(members))
        self.images, self.labels = reference.tensor().flatten(1), reference.labels

    def __call__(self, images: Tensor) -> Tensor:
        """Return classes int64 (N,) for images float32 (N, C, H, W) on the CPU."""
        return self.labels[torch.cdist(images.flatten(1), self.images).argmin(1)]

    def accuracy(self) -> float:
        """Compute the percentage of real images whose nearest other image is of their class."""
        distances = torch.cdist(self.images, self.images).fill_diagonal_(torch.inf)
        return 100 * (self.labels[distances.argmin(1)] == self.labels).double().mean().item()


def on_sphere(z: Tensor) -> Tensor:
    """Scale each of ``z``, (N, ...), to length sqrt(d), where d is its number of entries."""
    flat = z.flatten(1)
    return (flat * (flat.shape[1] ** 0.5 / flat.norm(dim=1, keepdim=True))).view_as(z)


def log_probability(network: nn.Module, examiner: Examiner, z: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """Compute the judge's log-probability of ``targets``, (N,), with the gradient of ``z``."""
    images = examiner.sampler.through(network, examiner.schedule, z, labels)
    # The judge sees clamped pixels, but the gradient ignores the clamp: otherwise saturated pixels could never change.
    images = images + (images.clamp(-1, 1) - images).detach()
    return examiner.judge.model(images).log_softmax(1).gather(1, targets[:, None])[:, 0]


def search(
    network: nn.Module,
    examiner: Examiner,
    z: Tensor,
    targets: Tensor,
    labels: Tensor,
    options: LatentOptions,
    tick: Callable[[], Any] = lambda: None,
) -> Tensor:
    """Search latents from which the network draws, for ``labels``, images that the judge classifies as ``targets``.

    Parameters
    ----------
    network : nn.Module
        In eval mode.
    examiner : Examiner
        Samples and judges.
    z : Tensor
        Initial latents on the sphere, float32 (N, C, H, W), on the network's device.
    targets, labels : Tensor
        int64 (N,), on the network's device.
    options : LatentOptions
        Steps and learning rate.
    tick : callable
        Called after each step.

    Returns
    -------
    Tensor
        The latents after the last step. The searches are independent of each other.
    """
    latents = []
    for part in torch.arange(len(z), device=z.device).split(examiner.sampler.batch_size):
        current = z[part].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([current], lr=options.learning_rate)
        for _ in range(options.steps):
            loss = -log_probability(network, examiner, current, targets[part], labels[part]).sum()
            (current.grad,) = torch.autograd.grad(loss, current)
            optimizer.step()
            with torch.no_grad():
                current.copy_(on_sphere(current))
            tick()
        latents.append(current.detach())
    return torch.cat(latents)


def searches_of(request: ForgetRequest, latents: int) -> list[tuple[str, int, int, int]]:
    """List the searches as (group, target class, label, number of the latent)."""
    forgotten, retained, few = request.forget_classes, request.retained_classes, max(1, latents // 4)
    pairs = [("forgotten by its label", f, f, latents) for f in forgotten]
    pairs += [("forgotten by retained labels", f, r, few) for f in forgotten for r in retained]
    pairs += [("retained by its label", r, r, few) for r in retained]
    if len(retained) > 1:
        others = (*retained[1:], retained[0])
        pairs += [("retained by another label", r, other, few) for r, other in zip(retained, others, strict=True)]
    return [(group, target, label, i) for group, target, label, count in pairs for i in range(count)]


def search_steps(examiner: Examiner, options: LatentOptions) -> int:
    """Count the calls of ``tick`` in ``latent``."""
    count = len(searches_of(examiner.request, options.latents))
    return -(-count // examiner.sampler.batch_size) * options.steps


def latent(
    network: nn.Module,
    examiner: Examiner,
    nearest: NearestImage,
    options: LatentOptions,
    tick: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Search latents for forgotten and for retained classes, from the same noise for each.

    Parameters
    ----------
    network : nn.Module
        In eval mode.
    examiner : Examiner
        Samples and judges.
    nearest : NearestImage
        Confirms hits.
    options : LatentOptions
        Number, steps and learning rate of the searches.
    tick : callable
        Called after each step.

    Returns
    -------
    list of dict
        A row for each group: "group", "searches"; in percent "found_before" and "found", the images that the judge
        classifies as the target at the start and at the end, and "confirmed_before" and "confirmed", those whose
        nearest real image is of the target too; and the mean "probability_before" and "probability".
    """
    options.check()
    device = next(network.parameters()).device
    groups, targets, labels, which = zip(*searches_of(examiner.request, options.latents), strict=True)
    shape = network.config["in_channels"], network.config["sample_size"], network.config["sample_size"]
    noise = Streams(device, examiner.seed, "latent").normal("z", options.latents, shape)
    start = on_sphere(noise)[torch.tensor(which, device=device)]
    targets, labels = (torch.tensor(values, device=device) for values in (targets, labels))
    # The search needs no gradients of the weights.
    trainable = [p for module in (network, examiner.judge.model) for p in module.parameters() if p.requires_grad]
    for p in trainable:
        p.requires_grad_(False)
    try:
        end = search(network, examiner, start, targets, labels, options, tick)
        judged = [_judged(network, examiner, nearest, z, targets, labels) for z in (start, end)]
    finally:
        for p in trainable:
            p.requires_grad_(True)
    rows = []
    for group in dict.fromkeys(groups):
        chosen = torch.tensor([name == group for name in groups])
        row = {"group": group, "searches": int(chosen.sum())}
        for suffix, measured in zip(("_before", ""), judged, strict=True):
            row |= {name + suffix: value[chosen].double().mean().item() for name, value in measured.items()}
        rows.append(row)
    return rows


@torch.no_grad()
def _judged(
    network: nn.Module, examiner: Examiner, nearest: NearestImage, z: Tensor, targets: Tensor, labels: Tensor
) -> dict[str, Tensor]:
    parts = zip(*(x.split(examiner.sampler.batch_size) for x in (z, labels)), strict=True)
    through = examiner.sampler.through
    images = torch.cat([through(network, examiner.schedule, *part).clamp(-1, 1).cpu() for part in parts])
    probabilities, _ = examiner.judge(images)
    targets = targets.cpu()
    hits = probabilities.argmax(1) == targets
    return {
        "found": 100.0 * hits,
        "confirmed": 100.0 * (hits & (nearest(images) == targets)),
        "probability": probabilities.gather(1, targets[:, None])[:, 0],
    }
