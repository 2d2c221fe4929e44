"""Forget a digit in a classifier with a sparse update: saliency_mask and MaskedAdam in a training loop of your own.

A small network learns the digits of scikit-learn. Then one step after the other raises the loss on the digit to forget,
confined to the most salient 2 % of the weights; all other weights stay bit-identical.
"""

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import pecker_fast as pf

FORGET = 3


def main() -> None:
    torch.manual_seed(0)
    digits = load_digits()
    images = torch.tensor(digits.data, dtype=torch.float32) / 16
    labels = torch.tensor(digits.target)
    forgotten = labels == FORGET

    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    optimizer = pf.MaskedAdam(model.named_parameters(), lr=3e-3)
    for _ in range(200):
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()  # without a mask: torch.optim.Adam
        optimizer.zero_grad()

    def accuracy(chosen: torch.Tensor) -> float:
        with torch.no_grad():
            return (model(images[chosen]).argmax(1) == labels[chosen]).float().mean().item()

    print(f"before: digit {FORGET} {accuracy(forgotten):.1%}, others {accuracy(~forgotten):.1%}")

    # Which weights matter for the digit: the largest gradients of its loss.
    F.cross_entropy(model(images[forgotten]), labels[forgotten]).backward()
    mask = pf.saliency_mask(model, density=0.02)
    optimizer.zero_grad()
    print(mask)

    before = [param.detach().clone() for param in model.parameters()]
    optimizer = pf.MaskedAdam(model.named_parameters(), lr=1e-2, betas=(0.0, 0.999))
    for _ in range(30):
        retain = F.cross_entropy(model(images[~forgotten]), labels[~forgotten])
        # Uniform predictions for the digit to forget.
        log_probabilities = F.log_softmax(model(images[forgotten]), dim=1)
        forget = F.kl_div(log_probabilities, torch.full_like(log_probabilities, 0.1), reduction="batchmean")
        (retain + forget).backward()
        optimizer.step(mask=mask)
        optimizer.zero_grad()

    changed = sum((old != new).sum().item() for old, new in zip(before, model.parameters(), strict=True))
    total = sum(param.numel() for param in model.parameters())
    print(f"after:  digit {FORGET} {accuracy(forgotten):.1%}, others {accuracy(~forgotten):.1%}")
    print(f"{changed} of {total} weights changed ({changed / total:.1%})")
    assert changed <= mask.count


if __name__ == "__main__":
    main()
