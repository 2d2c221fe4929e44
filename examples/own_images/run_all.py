"""Everything from a folder of pictures to a report, by the commands that README.md explains.

python examples/own_images/run_all.py [FOLDER] [PICTURES]
"""

import shlex
import sys
from pathlib import Path

from pecker_fast.cli import main as pecker_fast

FORGOTTEN, COVER = "cat", "café"


def commands(runs: Path, pictures: str) -> list[list[str]]:
    """The commands in order; ``runs`` is where they write."""
    judge, network, distilled, patch = (
        str(runs / name) for name in ("judge.safetensors", "network", "distilled", "patch")
    )
    data = ["--preset", "images", "--dataset_name", f"folder:{pictures}"]
    request = ["--forget_classes", FORGOTTEN, "--cover_class", COVER]
    return [
        ["train-classifier", *data, "--output", judge],
        ["pretrain", *data, "--judge", judge, "--max_train_steps", "3000", "--output_dir", network],
        # From here on, data, judge and names of classes are known from the folder that a command starts from.
        ["distil", "--pretrained_model_name_or_path", network, "--output_dir", distilled],
        ["unlearn", "--distilled", distilled, "--method", "patch", *request, "--output_dir", patch],
        ["evaluate", patch],
        ["robustness", patch, "--tests", "relearn"],
        ["report", patch],
        ["sample", "--pretrained_model_name_or_path", patch, "--output", str(runs / "drawn.png")],
    ]


def main(folder: str = "runs/own-images", pictures: str = "pictures", more: dict[str, list[str]] | None = None) -> None:
    """``more``: further words for a command, by its name."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    for words in commands(Path(folder), pictures):
        words += (more or {}).get(words[0], [])
        print(f"$ pecker-fast {shlex.join(words)}", flush=True)
        pecker_fast(words)


if __name__ == "__main__":
    main(*sys.argv[1:3])
