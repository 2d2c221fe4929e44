"""Which parameters a method trains: all, those that see the condition first, or the rest."""

from typing import Literal, TypeAlias

from torch import nn

# x: the parameters that see the condition first, x-strict: of the cross attention its keys and values alone, u: all
# others but those of the time embedding and of the output.
Trained: TypeAlias = Literal["x", "x-strict", "u", "all"]
OUTSIDE_U = ("time_embedding", "conv_norm_out", "conv_out")


def sees_condition(name: str, text: bool = False) -> bool:
    """Whether the condition reaches the parameter ``name`` first.

    Parameters
    ----------
    name : str
        Of a parameter of a UNet2DModel, which takes a class label; with ``text``, of a UNet2DConditionModel, which
        takes a prompt.
    text : bool
        Whether the condition is a prompt.
    """
    return ".attn2." in name if text else "class_embedding" in name or "time_emb_proj" in name


def is_trained(name: str, trained: Trained, text: bool = False) -> bool:
    """Whether the choice ``trained`` includes the parameter ``name``; ``text`` as in ``sees_condition``."""
    if trained == "x-strict":
        return text and (".attn2.to_k." in name or ".attn2.to_v." in name)
    if trained == "all" or sees_condition(name, text):
        return trained != "u"
    return trained == "u" and name.split(".")[0] not in OUTSIDE_U


def choose_trained(network: nn.Module, trained: Trained, text: bool) -> None:
    """Freeze all parameters of a network but the chosen ones, in place.

    Parameters
    ----------
    network : nn.Module
        A U-Net, or a ``TextConditioned`` one.
    trained : {"x", "x-strict", "u", "all"}
        The choice.
    text : bool
        Whether the network's condition is a prompt.

    Raises
    ------
    ValueError
        If the network has no such parameters.
    """
    count = 0
    for name, param in network.named_parameters():
        param.requires_grad_(is_trained(name, trained, text))
        count += param.requires_grad
    if count == 0:
        raise ValueError(f"trained is {trained!r}, but the network has no such parameters")
