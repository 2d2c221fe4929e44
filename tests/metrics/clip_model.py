"""A CLIP model with random weights in a folder of transformers."""

from pathlib import Path

from tests.diffusion.tiny_sd import write_tokenizer

WIDTH, IMAGE = 8, 32


def save_clip(folder: Path) -> Path:
    """Write the model, its tokenizer and its processor to the new ``folder``, and return it."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    size = write_tokenizer(folder)
    common = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "intermediate_size": 16}
    special = {"bos_token_id": size - 2, "eos_token_id": size - 1, "pad_token_id": size - 1}
    config = CLIPConfig(
        text_config={**common, **special, "vocab_size": size},
        vision_config={**common, "image_size": IMAGE, "patch_size": 16},
        projection_dim=WIDTH,
    )
    CLIPModel(config).save_pretrained(folder)
    CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=IMAGE).save_pretrained(folder)
    return folder
