"""Networks inside their wrappers."""

from torch import nn


def unwrap(network: nn.Module) -> nn.Module:
    """Return the module inside wrappers of data parallelism (``.module``) and compilation (``._orig_mod``)."""
    while True:
        inner = getattr(network, "_orig_mod", None) or getattr(network, "module", None)
        if not isinstance(inner, nn.Module):
            return network
        network = inner


def embedding_count(network: nn.Module) -> int | None:
    """Count the labels that a network takes, including the null label: rows of its class embedding or prompt table.

    None if it has neither.
    """
    network = unwrap(network)
    own = getattr(network, "num_conditions", None)
    return getattr(getattr(network, "class_embedding", None), "num_embeddings", None) if own is None else own
