"""A small real use: a digit classifier forgets one class, and everything outside the mask stays bit for bit."""

import time

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .optim import MaskedAdam
from .saliency import SaliencyAccumulator


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """scikit-learn's handwritten digits: images [n, 1, 8, 8] in [0, 1] and labels [n], for training and for testing."""
    try:
        from sklearn.datasets import load_digits as sklearn_digits
    except ImportError as error:
        raise RuntimeError("the demo needs scikit-learn: pip install 'pecker-fast[demo]'") from error
    data = sklearn_digits()
    images = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(data.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    return images[:1297], labels[:1297], images[1297:], labels[1297:]


def make_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(64 * 4 * 4, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def train(model: nn.Module, images: Tensor, labels: Tensor, steps: int) -> None:
    optimizer = MaskedAdam(model.parameters(), lr=2e-3)
    for _ in range(steps):
        batch = torch.randint(len(labels), (64,))
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return (model(images).argmax(1) == labels).float().mean().item()


def forget_loss(model: nn.Module, images: Tensor) -> Tensor:
    """Smallest where the model finds all classes equally likely."""
    return F.cross_entropy(model(images), torch.full((len(images), 10), 0.1))


def demo(forget: int = 0, density: float = 0.05, steps: int = 60, seed: int = 0) -> None:
    """Trains a small network on real digits, lets it forget one class in masked steps, and shows what moved.

    Args:
        forget: The class to forget, 0 to 9.
        density: Share of the parameters that may move, in (0, 1].
        steps: Unlearning steps.
        seed: Of the weights and the batches.
    """
    if not 0 <= forget <= 9:
        raise ValueError(f"forget is {forget}, expected a class from 0 to 9")
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}, expected a share in (0, 1]")
    if steps < 1:
        raise ValueError(f"steps is {steps}, expected at least 1")
    images, labels, test_images, test_labels = load_digits()
    torch.manual_seed(seed)
    start = time.perf_counter()
    model = make_model()
    train(model, images, labels, steps=400)
    chosen, test_chosen = labels == forget, test_labels == forget

    def report() -> tuple[float, float]:
        return (
            accuracy(model, test_images[test_chosen], test_labels[test_chosen]),
            accuracy(model, test_images[~test_chosen], test_labels[~test_chosen]),
        )

    before = report()
    # Saliency: where the loss of the class to forget is steepest, summed over its images.
    saliency = SaliencyAccumulator(model, reduce="sum")
    for batch in images[chosen].split(32):
        model.zero_grad()
        F.cross_entropy(model(batch), torch.full((len(batch),), forget)).backward()
        saliency.add()
    mask = saliency.mask(density=density)

    original = {name: param.detach().clone() for name, param in model.named_parameters()}
    optimizer = MaskedAdam(model.named_parameters(), lr=1e-3, packed=True)
    for _ in range(steps):
        optimizer.zero_grad()
        kept = torch.randint(int((~chosen).sum()), (64,))
        loss = forget_loss(model, images[chosen][torch.randint(int(chosen.sum()), (32,))])
        loss = loss + F.cross_entropy(model(images[~chosen][kept]), labels[~chosen][kept])
        loss.backward()
        optimizer.step(mask=mask)
    after = report()

    moved = frozen_moved = 0
    for name, param in model.named_parameters():
        changed = param.detach().view(torch.int32) != original[name].view(torch.int32)
        moved += int(changed.sum())
        frozen_moved += int((changed & ~mask[name]).sum())
    print(f"Digit {forget} forgotten in {steps} masked steps, {time.perf_counter() - start:.1f} s in all\n")
    print(f"{'accuracy on test images':32}{'before':>10}{'after':>10}")
    print(f"{f'the forgotten class {forget}':32}{before[0]:10.1%}{after[0]:10.1%}")
    print(f"{'the nine others':32}{before[1]:10.1%}{after[1]:10.1%}\n")
    print(mask.summary())
    print(f"\nparameters that moved: {moved} of {mask.numel} ({moved / mask.numel:.1%})")
    print(f"parameters outside the mask that moved: {frozen_moved} (compared bit for bit)")
    if frozen_moved:
        raise RuntimeError("entries outside the mask have moved: this is a bug")
