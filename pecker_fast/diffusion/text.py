"""Text-conditional latent diffusion: a U-Net whose class labels are numbers of prompts.

Prompts are encoded once, so a run needs neither the text encoder nor the tokenizer. Everything written for class labels
(guidance, one-step generator, samplers, saliency) then works for prompts too.
"""

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..checks import check_int
from .architectures import ARCHITECTURES, UNET, architecture_name, time_scale
from .conditioning import EMBEDDINGS, POOLED, Conditioning, PromptTable
from .parametrisation import Parametrisation

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel

# SDXL's kind of U-Net, which is also told a pooled embedding and six sizes: original, crop, target.
TEXT_TIME, SIZES = "text_time", 6


class TextConditioned(nn.Module):
    """A U-Net or transformer of diffusers whose ``class_labels`` are prompts of a table.

    Its parameters and state dict are the U-Net's, with the same names, so masks, optimizer states and files fit the
    U-Net. Its own parametrisation says what it is given and returns.

    Parameters
    ----------
    unet : nn.Module
        A ``UNet2DConditionModel``, or a transformer in ``ARCHITECTURES``. It is trained in place.
    table : PromptTable
        What the U-Net is told about the prompts.
    schedule : Parametrisation
        The schedule that the U-Net was trained on.
    prediction_type : {"epsilon", "v_prediction", "sample"}, optional
        What the U-Net returns on a variance-preserving schedule if it is not what ``schedule`` says; "sample" is x_0.
    sample_size : int, optional
        Height and width of latents; from the U-Net's configuration by default.
    unit_noise : bool, optional
        Whether the U-Net is a one-step generator that expects noise z of variance 1 in place of b z; as ``schedule``
        says by default.

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
        schedule: Parametrisation,
        prediction_type: str | None = None,
        sample_size: int | None = None,
        unit_noise: bool | None = None,
    ) -> None:
        super().__init__()
        check_text_conditional(unet)
        _check_conditioning(unet, table.conditioning)
        size = unet.config["sample_size"] if sample_size is None else sample_size
        check_int("sample_size", size, 1)
        self.unet, self.table, self.training = unet, table, unet.training
        self.schedule = schedule.returning(prediction_type, unit_noise)
        self._sample, self._time_scale = ARCHITECTURES[architecture_name(unet)].sample, time_scale(unet.config)
        self.config = {"in_channels": unet.config["in_channels"], "sample_size": size}

    @property
    def prediction_type(self) -> str:
        """What the U-Net returns."""
        return self.schedule.predicts

    @property
    def unit_noise(self) -> bool:
        """Whether it expects noise of variance 1."""
        return getattr(self.schedule, "unit_noise", False)

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
        condition = self.table[class_labels].to(dtype=dtype).keywords()
        if self._time_scale != 1:
            timestep = self._time_scale * timestep
        if self._sample is None:
            return self.unet(sample.to(dtype), timestep, **condition, return_dict=False)
        condition |= {self._sample: sample.to(dtype), "timestep": timestep}
        return self.unet(**condition, return_dict=False)

    def _apply(self, fn: Any, recurse: bool = True) -> "TextConditioned":
        super()._apply(fn, recurse)
        device = next(self.unet.parameters()).device
        self.table.to(device)
        self.schedule = self.schedule.to(device)
        return self

    def __deepcopy__(self, memo: dict) -> "TextConditioned":
        unet = copy.deepcopy(self.unet, memo)
        return self.like(unet)

    def like(
        self, unet: "UNet2DConditionModel", prediction_type: str | None = None, unit_noise: bool | None = None
    ) -> "TextConditioned":
        """Another U-Net with the same prompts, schedule and size, and by default the same kind of prediction."""
        return TextConditioned(unet, self.table, self.schedule, prediction_type, self.config["sample_size"], unit_noise)

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
    """Raise ValueError unless ``unet`` is conditional on a text alone: a ``UNet2DConditionModel`` as those of Stable
    Diffusion 1.x, 2.x and XL are, or a transformer in ``ARCHITECTURES``."""
    name = architecture_name(unet)
    if name is None:
        raise ValueError(f"unet is a {type(unet).__name__}, expected a {' or a '.join(ARCHITECTURES)}")
    config = unet.config
    if name != UNET:
        ARCHITECTURES[name].check(name, config)
        return
    for name in ("class_embed_type", "num_class_embeds", "time_cond_proj_dim"):
        if config.get(name) is not None:
            raise ValueError(f"unet has {name}, which no Stable Diffusion has: another kind of model")
    added = config.get("addition_embed_type")
    if added not in (None, TEXT_TIME):
        raise ValueError(f"unet has addition_embed_type {added!r}, expected None or {TEXT_TIME!r}")
    if config["in_channels"] != config["out_channels"]:
        raise ValueError(
            f"unet has {config['in_channels']} input and {config['out_channels']} output channels: it edits images, "
            "expected a U-Net that draws from text alone"
        )
    if not isinstance(config["cross_attention_dim"], int):
        raise ValueError(f"unet has cross_attention_dim {config['cross_attention_dim']}, expected a single integer")


def pooled_width(config: Mapping[str, Any]) -> int:
    """Width of the pooled embedding that SDXL's U-Net takes beside six sizes, from its configuration."""
    return config["projection_class_embeddings_input_dim"] - SIZES * config["addition_time_embed_dim"]


def _check_conditioning(unet: nn.Module, conditioning: Conditioning) -> None:
    """Raise ValueError unless the conditioning fits the network."""
    config, name = unet.config, architecture_name(unet)
    width = config[ARCHITECTURES[name].width]
    if conditioning.embeddings.shape[2] != width:
        raise ValueError(
            f"embeddings have width {conditioning.embeddings.shape[2]}, expected the U-Net's {width}: they are another "
            "text encoder's"
        )
    if name != UNET:
        expected = ARCHITECTURES[name].shapes(config, conditioning.embeddings.shape[1])
        actual = {key: tuple(value.shape[1:]) for key, value in conditioning.items() if key != EMBEDDINGS}
        if actual != expected:
            raise ValueError(f"a {name} is told {actual} of each prompt beside embeddings, expected {expected}")
        return
    pooled = conditioning.tensors.get(POOLED)
    if config.get("addition_embed_type") is None:
        if pooled is not None:
            raise ValueError("there are pooled embeddings, which this U-Net does not take: expected SDXL's")
    elif pooled is None or pooled.shape[1] != pooled_width(config):
        shape = "missing" if pooled is None else f"{pooled.shape[1]} wide"
        raise ValueError(f"pooled embeddings are {shape}, expected the width of the U-Net's, {pooled_width(config)}")


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
    unet.add_adapter(
        LoraConfig(r=rank, lora_alpha=rank, target_modules=list(ARCHITECTURES[architecture_name(unet)].adapted))
    )
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
    masked = getattr(text_encoder.config, "use_attention_mask", False)
    text_encoder.eval()
    rows = []
    for ids, mask in _token_batches(tokenizer, text_encoder, prompts, batch_size):
        rows.append(text_encoder(ids, attention_mask=mask if masked else None)[0].cpu())
    return torch.cat(rows), truncated_prompts(tokenizer, prompts)


@torch.no_grad()
def encode_prompts_xl(
    encoders: Iterable[tuple[Any, nn.Module]], prompts: Sequence[str], batch_size: int = 64
) -> tuple[Conditioning, list[str]]:
    """Encode prompts as SDXL's pipeline does.

    Parameters
    ----------
    encoders : iterable of pairs
        CLIPTokenizer and text encoder: a CLIPTextModel, then a CLIPTextModelWithProjection. Their devices and dtypes
        are used. Each is done with before the next is asked for.
    prompts : sequence of str
        N prompts.
    batch_size : int
        Prompts in a call of an encoder.

    Returns
    -------
    conditioning : Conditioning
        On the CPU: the last hidden states but one of all encoders side by side, (N, tokens, width), and the pooled
        projection of the last encoder, (N, width).
    truncated : list of str
        Prompts with more tokens than the encoders take.
    """
    hidden, pooled, truncated = [], None, []
    for tokenizer, encoder in encoders:
        encoder.eval()
        states, projections = [], []
        for ids, _ in _token_batches(tokenizer, encoder, prompts, batch_size):
            # It has the hidden states of all layers, so it is dropped after each batch.
            output = encoder(ids, output_hidden_states=True)
            states.append(output.hidden_states[-2].cpu())
            projections.append(output[0].cpu())
            del output
        hidden.append(torch.cat(states))
        pooled = torch.cat(projections)
        truncated = truncated_prompts(tokenizer, prompts)
        del encoder
    if pooled is None or pooled.ndim != 2:
        raise ValueError("the last text encoder gives no pooled embedding: expected a CLIPTextModelWithProjection")
    return Conditioning({EMBEDDINGS: torch.cat(hidden, dim=2), POOLED: pooled}), truncated


def _token_batches(
    tokenizer: Any, text_encoder: nn.Module, prompts: Sequence[str], batch_size: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Tokens and attention mask of prompts, padded, int64 (B, tokens), on the encoder's device, in batches."""
    check_int("batch_size", batch_size, 1)
    device, length = next(text_encoder.parameters()).device, tokenizer.model_max_length
    for start in range(0, len(prompts), batch_size):
        texts = list(prompts[start : start + batch_size])
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        yield tokens.input_ids.to(device), tokens.attention_mask.to(device)


def truncated_prompts(tokenizer: Any, prompts: Sequence[str]) -> list[str]:
    """Prompts with more tokens than the encoder takes."""
    every = tokenizer(list(prompts)).input_ids
    return [text for text, ids in zip(prompts, every, strict=True) if len(ids) > tokenizer.model_max_length]
