"""Latent search: is there a latent from which the network still draws the class?

z is moved on the sphere of radius sqrt(d), where standard normal vectors lie, so that the judge sees the class in
G(z, c). Gradients of a classifier also find images that fool it: what is found counts as confirmed where the nearest
real image, pixel by pixel, is of the class too. The yardstick is the same search for classes that are retained.
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
    """latents: searches for a forgotten class by its own label; a quarter of it for every other pair of a class that is
    sought and a label that is asked for. steps, learning_rate: of Adam."""

    latents: int = 16
    steps: int = 40
    learning_rate: float = 0.1

    def check(self) -> None:
        """Raises ValueError or TypeError, naming the option, where one is out of range."""
        check_int("latents", self.latents, 1)
        check_int("search_steps", self.steps, 1)
        check_number("search_learning_rate", self.learning_rate, open_low=True)


class NearestImage:
    """The class of the nearest real image, by the Euclidean distance of pixels: knows nothing of the judge.

    Parameters
    ----------
    dataset: real images.
    per_class: how many of each class are kept, the first ones.
    """

    def __init__(self, dataset: LabelledImages, per_class: int = 200) -> None:
        members = [(dataset.labels == c).nonzero().flatten()[:per_class] for c in range(dataset.num_classes)]
        kept = dataset.subset(torch.cat(members))
        self.images, self.labels = kept.tensor().flatten(1), kept.labels

    def __call__(self, images: Tensor) -> Tensor:
        """Images float32 (N, C, H, W) on the CPU to classes int64 (N,)."""
        return self.labels[torch.cdist(images.flatten(1), self.images).argmin(1)]

    def accuracy(self) -> float:
        """Percentage of the real images whose nearest other one is of their class: what a confirmation is worth."""
        distances = torch.cdist(self.images, self.images).fill_diagonal_(torch.inf)
        return 100 * (self.labels[distances.argmin(1)] == self.labels).double().mean().item()


def on_sphere(z: Tensor) -> Tensor:
    """Each of ``z``, (N, ...), scaled to the length sqrt(d), d entries."""
    flat = z.flatten(1)
    return (flat * (flat.shape[1] ** 0.5 / flat.norm(dim=1, keepdim=True))).view_as(z)


def log_probability(network: nn.Module, examiner: Examiner, z: Tensor, targets: Tensor, labels: Tensor) -> Tensor:
    """The judge's log-probability of ``targets``, (N,), with the gradient of z."""
    images = examiner.sampler.through(network, examiner.schedule, z, labels)
    # What is judged is clamped; the gradient passes as if it were not, or saturated pixels could never change.
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
    """Latents from which ``network``, asked for ``labels``, draws what the judge takes for ``targets``.

    ``z``: where the search starts, float32 (N, C, H, W) on the sphere; ``targets``, ``labels``: int64 (N,); all on the
    network's device. Returns the latents after the last step. Each is sought for itself, whatever the others are.
    """
    found = []
    for part in torch.arange(len(z), device=z.device).split(examiner.sampler.batch_size):
        moved = z[part].clone().requires_grad_(True)
        optimizer = torch.optim.Adam([moved], lr=options.learning_rate)
        for _ in range(options.steps):
            loss = -log_probability(network, examiner, moved, targets[part], labels[part]).sum()
            (moved.grad,) = torch.autograd.grad(loss, moved)
            optimizer.step()
            with torch.no_grad():
                moved.copy_(on_sphere(moved))
            tick()
        found.append(moved.detach())
    return torch.cat(found)


def searches_of(request: ForgetRequest, latents: int) -> list[tuple[str, int, int, int]]:
    """(group, class that is sought, label that is asked for, which latent), one for each search."""
    forgotten, kept, few = request.forget_classes, request.retained_classes, max(1, latents // 4)
    pairs = [("forgotten by its label", f, f, latents) for f in forgotten]
    pairs += [("forgotten by retained labels", f, r, few) for f in forgotten for r in kept]
    pairs += [("retained by its label", r, r, few) for r in kept]
    if len(kept) > 1:
        pairs += [("retained by another label", r, kept[(i + 1) % len(kept)], few) for i, r in enumerate(kept)]
    return [(group, target, label, i) for group, target, label, count in pairs for i in range(count)]


def search_steps(examiner: Examiner, options: LatentOptions) -> int:
    """How often ``latent`` calls ``tick``."""
    count = len(searches_of(examiner.request, options.latents))
    return -(-count // examiner.sampler.batch_size) * options.steps


def latent(
    network: nn.Module,
    examiner: Examiner,
    nearest: NearestImage,
    options: LatentOptions,
    tick: Callable[[], Any] = lambda: None,
) -> list[dict[str, Any]]:
    """Searches latents for forgotten and for retained classes, from the same noise for each.

    Returns a row for each group: "group", "searches", and in percent "found_before" and "found" (images that the judge
    puts in the class that is sought, at the start and at the end), "confirmed_before" and "confirmed" (and whose
    nearest real image is of it), with the mean "probability_before" and "probability".
    """
    options.check()
    device = next(network.parameters()).device
    groups, targets, labels, which = zip(*searches_of(examiner.request, options.latents), strict=True)
    shape = network.config["in_channels"], network.config["sample_size"], network.config["sample_size"]
    noise = Streams(device, examiner.seed, "latent").normal("z", options.latents, shape)
    start = on_sphere(noise)[torch.tensor(which, device=device)]
    targets, labels = (torch.tensor(values, device=device) for values in (targets, labels))
    # Gradients of the weights would be computed for nothing.
    required = [p for module in (network, examiner.judge.model) for p in module.parameters() if p.requires_grad]
    for p in required:
        p.requires_grad_(False)
    try:
        end = search(network, examiner, start, targets, labels, options, tick)
        judged = [_judged(network, examiner, nearest, z, targets, labels) for z in (start, end)]
    finally:
        for p in required:
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
    found = probabilities.argmax(1) == targets
    return {
        "found": 100.0 * found,
        "confirmed": 100.0 * (found & (nearest(images) == targets)),
        "probability": probabilities.gather(1, targets[:, None])[:, 0],
    }
