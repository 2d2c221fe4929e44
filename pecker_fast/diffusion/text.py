"""Text-conditional latent diffusion: a U-Net whose class labels are numbers of prompts.

Prompts are encoded once, so a run needs neither the text encoder nor the tokenizer. Everything written for class labels
(guidance, one-step generator, samplers, saliency) then works for prompts too.
"""

import copy
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import check_int

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# Layers that get a low-rank update.
ADAPTED = ("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
# Larger tables stay on the CPU, and only the batch's rows are copied to the GPU.
MAX_DEVICE_BYTES = 2 << 30


class PromptTable:
    """Text embeddings of prompts, by label. Copies of a network share one table.

    Parameters
    ----------
    embeddings : Tensor
        Floating (N, tokens, width), row i for prompt i.
    null_label : int or None
        Label of the empty prompt, which means "no condition"; None if the table does not have it.

    Raises
    ------
    ValueError, TypeError
        If the shape or dtype is another, or ``null_label`` is out of range.
    """

    def __init__(self, embeddings: Tensor, null_label: int | None = 0) -> None:
        if not isinstance(embeddings, Tensor) or not embeddings.is_floating_point():
            raise TypeError("embeddings is not a floating tensor")
        if embeddings.ndim != 3 or len(embeddings) == 0:
            raise ValueError(f"embeddings has shape {tuple(embeddings.shape)}, expected (N, tokens, width) with N >= 1")
        if null_label is not None:
            check_int("null_label", null_label, 0, len(embeddings))
        self.embeddings, self.null_label = embeddings.detach(), null_label

    def __len__(self) -> int:
        return len(self.embeddings)

    def __deepcopy__(self, _memo: dict) -> "PromptTable":
        return self

    def to(self, device: torch.device) -> None:
        """Move the table in place, unless it is too large for a GPU."""
        size = self.embeddings.numel() * self.embeddings.element_size()
        if device.type == "cpu" or size <= MAX_DEVICE_BYTES:
            self.embeddings = self.embeddings.to(device)

    def __getitem__(self, labels: Tensor) -> Tensor:
        """Return the embeddings (B, tokens, width) of labels (B,), on the labels' device."""
        return self.embeddings[labels.to(self.embeddings.device)].to(labels.device)


class TextConditioned(nn.Module):
    """A ``UNet2DConditionModel`` whose ``class_labels`` are prompts of a table.

    Its parameters and state dict are the U-Net's, with the same names, so masks, optimizer states and files fit the
    U-Net. What it predicts is the schedule's to say (``Parametrisation``).

    Parameters
    ----------
    unet : UNet2DConditionModel
        The U-Net. It is trained in place.
    table : PromptTable
        Embeddings of the prompts.
    sample_size : int, optional
        Height and width of latents; from the U-Net's configuration by default.

    Attributes
    ----------
    num_conditions : int
        Number of labels.
    null_label : int or None
        Label of the empty prompt.
    draws_latents : bool
        True: samples have no bounds.
    config : dict
        "in_channels" and "sample_size".

    Raises
    ------
    ValueError
        If the U-Net is of another architecture, or an argument does not fit it.
    """

    draws_latents = True

    def __init__(
        self,
        unet: "UNet2DConditionModel",
        table: PromptTable,
        sample_size: int | None = None,
    ) -> None:
        super().__init__()
        check_text_conditional(unet)
        width = unet.config["cross_attention_dim"]
        if table.embeddings.shape[2] != width:
            raise ValueError(
                f"embeddings have width {table.embeddings.shape[2]}, expected the U-Net's {width}: they are another "
                "text encoder's"
            )
        size = unet.config["sample_size"] if sample_size is None else sample_size
        check_int("sample_size", size, 1)
        self.unet, self.table, self.training = unet, table, unet.training
        self.config = {"in_channels": unet.config["in_channels"], "sample_size": size}

    @property
    def num_conditions(self) -> int:
        return len(self.table)

    @property
    def null_label(self) -> int | None:
        return self.table.null_label

    def forward(
        self, sample: Tensor, timestep: Tensor, class_labels: Tensor, return_dict: bool = False
    ) -> tuple[Tensor]:
        """Return the U-Net's output, floating (B, C, H, W), as a tuple of one.

        ``sample`` is floating (B, C, H, W), ``timestep`` a number for each sample (B,), ``class_labels`` int (B,).
        """
        # The dtype of the first layer: adapters may have another.
        dtype = next(self.unet.parameters()).dtype
        text = self.table[class_labels].to(dtype)
        return self.unet(sample.to(dtype), timestep, encoder_hidden_states=text, return_dict=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "TextConditioned":
        super()._apply(fn, recurse)
        self.table.to(next(self.unet.parameters()).device)
        return self

    def __deepcopy__(self, memo: dict) -> "TextConditioned":
        unet = copy.deepcopy(self.unet, memo)
        return TextConditioned(unet, self.table, self.config["sample_size"])

    def enable_gradient_checkpointing(self) -> None:
        """Recompute the activations of the U-Net's blocks in the backward pass."""
        self.unet.enable_gradient_checkpointing()

    # ---- names without the prefix "unet."

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        return self.unet.named_parameters(*args, **kwargs)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        return self.unet.state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        return self.unet.load_state_dict(*args, **kwargs)


def check_text_conditional(unet: nn.Module) -> None:
    """Raise ValueError unless ``unet`` is a ``UNet2DConditionModel`` that is conditional on one text only."""
    # By name, because importing diffusers takes seconds.
    if not any(base.__name__ == "UNet2DConditionModel" for base in type(unet).__mro__):
        raise ValueError(f"unet is a {type(unet).__name__}, expected a UNet2DConditionModel")
    config = unet.config
    for name in ("class_embed_type", "num_class_embeds", "addition_embed_type", "time_cond_proj_dim"):
        if config.get(name) is not None:
            raise ValueError(f"unet has {name}, which Stable Diffusion 1.x and 2.x do not have: another kind of model")
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"unet has {config['in_channels']} input and {config['out_channels']} output channels: it edits images, "
            "expected a U-Net that draws from text alone"
        )
    if not isinstance(config["cross_attention_dim"], int):
        raise ValueError(f"unet has cross_attention_dim {config['cross_attention_dim']}, expected a single integer")


def add_adapter(network: nn.Module, rank: int) -> None:
    """Freeze the U-Net of a ``TextConditioned`` network and add low-rank updates (LoRA, arXiv 2106.09685).

    They change the linear layers of its attention, are float32, start as zero, and are the only parameters that require
    grad. Their initial values are drawn from torch's global generator.

    Parameters
    ----------
    network : nn.Module
        A ``TextConditioned`` network, changed in place.
    rank : int
        Rank of the updates.

    Raises
    ------
    ValueError
        If peft is not installed, the network is of another class, or ``rank`` is below 1.
    """
    if not isinstance(network, TextConditioned):
        raise ValueError(f"score_lora_rank is {rank}, but a {type(network).__name__} takes no adapter: expected 0")
    check_int("score_lora_rank", rank, 1)
    try:
        from peft import LoraConfig
    except ImportError as error:
        raise ValueError("score_lora_rank needs peft, which is not installed: pip install peft") from error
    unet = network.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ADAPTED)))
    for param in unet.parameters():
        if param.requires_grad:
            param.data = param.data.float()


def tokenize_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[list[int]]:
    """Split prompts into tokens as ``encode_prompts`` does.

    Parameters
    ----------
    tokenizer : CLIPTokenizer
        As in ``transformers``.
    prompts : sequence of str
        N prompts.

    Returns
    -------
    list of list of int
        N lists without padding; the first and the last token of each mark the start and the end of the text.
    """
    return tokenizer(list(prompts), max_length=tokenizer.model_max_length, truncation=True).input_ids


@torch.no_grad()
def encode_prompts(
    tokenizer: Any, text_encoder: nn.Module, prompts: Sequence[str], batch_size: int = 64
) -> tuple[Tensor, list[str]]:
    """Encode prompts as Stable Diffusion's pipeline does.

    Parameters
    ----------
    tokenizer : CLIPTokenizer
        As in ``transformers``.
    text_encoder : CLIPTextModel
        As in ``transformers``; its device and dtype are used.
    prompts : sequence of str
        N prompts.
    batch_size : int
        Prompts in a call of the encoder.

    Returns
    -------
    embeddings : Tensor
        Floating (N, tokens, width) on the CPU.
    truncated : list of str
        Prompts with more tokens than the encoder takes.
    """
    check_int("batch_size", batch_size, 1)
    device, length = next(text_encoder.parameters()).device, tokenizer.model_max_length
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    text_encoder.eval()
    rows, truncated = [], []
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        mask = tokens.attention_mask.to(device) if masked else None
        rows.append(text_encoder(tokens.input_ids.to(device), attention_mask=mask)[0].cpu())
        truncated += [text for text, ids in zip(texts, tokenizer(texts).input_ids, strict=True) if len(ids) > length]
    return torch.cat(rows), truncated
