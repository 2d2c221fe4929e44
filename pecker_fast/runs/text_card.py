"""README.md of a text-to-image run: what it is, how to draw, what it does not promise."""

from pathlib import Path
from typing import Any

from ..files import write_text
from ..report import portable

# Ends a card that was written here; one without it is the user's own.
MARK = "<!-- written by pecker-fast -->\n"
CARD = """---
library_name: diffusers
pipeline_tag: text-to-image
license: other
{base}tags:
- machine-unlearning
- concept-erasure
{tag}- method:{method}
---

# {name}

A text-to-image {kind} has been made to forget {what}. It is the U-Net of {source} after
`{method}` (preset `{preset}`, seed {seed}, {steps} iterations), with that model's text encoder and autoencoder. The
licence of the result follows from that of the model it was made of.

![before and after](samples/before_after.png)

Left: the pretrained model, {sample_steps} steps of DDIM. Right: this {short}. Framed: what was to be forgotten.

{prompts}

## How to draw

{how}
    images = pipe("{example}", generator=torch.Generator().manual_seed(0)).images

## Caution

Nothing here was measured: `pecker-fast evaluate-concept` does that. Forgetting is shown for prompts like those that
were trained on; paraphrases, other languages, adversarial prompts and fine-tuning may bring back what was forgotten.
Prompts beside those of the retain list may have suffered.
"""
ONE_STEP = """    import torch
    from diffusers import DiffusionPipeline

    # The folder holds the pipeline's code, pipeline.py: read it before you trust it.
    folder = "{name}"
    pipe = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)"""
MANY_STEPS = """    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained("{name}")"""


def write_text_card(folder: Path, config: dict[str, Any], source: str) -> Path | None:
    """Writes README.md from what config.json holds and returns its path; None, and nothing is written, where a
    README.md is there that was not written here."""
    path = folder / "README.md"
    if path.exists() and not path.read_text(encoding="utf-8").endswith(MARK):
        return None
    concept, cover = config["concept"], config["cover"]
    if concept is not None:
        what = f"“{concept}”" + (f" (in its place: “{cover}”)" if cover else "")
    else:
        what = f"{len(config['prompts']['forget'])} prompts, such as “{config['prompts']['forget'][0]}”"
    pictured, one_step = config["prompts"]["pictured"], "t_init" in config["options"]
    name = folder.resolve().name
    text = CARD.format(
        base=f"base_model: {source.removeprefix('hub:')}\n" if source.startswith("hub:") else "",
        name=name,
        tag="- one-step\n" if one_step else "",
        kind="generator that draws in one step and" if one_step else "model that",
        short="generator" if one_step else "model",
        how=(ONE_STEP if one_step else MANY_STEPS).format(name=name),
        source=portable(source.removeprefix("hub:")),
        what=what,
        steps=config["options"].get("max_train_steps", "?"),
        prompts="\n".join(f"{i}. {prompt}" for i, prompt in enumerate(pictured, 1)),
        example=pictured[-1].replace('"', "'"),
        **{name: config[name] for name in ("method", "preset", "seed", "sample_steps")},
    )
    write_text(path, text + MARK)
    return path
