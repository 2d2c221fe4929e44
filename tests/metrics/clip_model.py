"""A CLIP model with random weights and a tokenizer of single bytes, in a folder as transformers saves them."""

import json
from pathlib import Path

WIDTH, IMAGE = 8, 32


def byte_vocabulary() -> dict[str, int]:
    """CLIP's vocabulary without merges: the 256 bytes as signs, these at the end of a word, and two special tokens."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    signs = [chr(byte) for byte in printable] + [chr(256 + i) for i in range(len(others))]
    tokens = signs + [f"{sign}</w>" for sign in signs] + ["<|startoftext|>", "<|endoftext|>"]
    return {token: index for index, token in enumerate(tokens)}


def save_tokenizer(folder: Path, longest: int = 77) -> int:
    """Writes a tokenizer; returns the size of its vocabulary."""
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = byte_vocabulary()
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=longest).save_pretrained(folder)
    return len(vocabulary)


def save_clip(folder: Path) -> Path:
    """Writes the model and its processor; returns the folder."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    size = save_tokenizer(folder)
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
