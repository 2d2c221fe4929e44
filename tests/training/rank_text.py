"""One process of a run of several on a Stable Diffusion, started with torchrun's variables: the command line,
once whole and once resumed from its first iteration.

Arguments: folder, the port of the second run, and the words of ``pecker-fast unlearn`` but for --output_dir. Writes
``rank-R.safetensors`` and ``again-R.safetensors`` into the folder: the trained weights and the last mask of process R.
"""

import os
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from pecker_fast.cli import main
from pecker_fast.runs.running import Running
from pecker_fast.sharding import whole


def keep(path: Path) -> None:
    """Makes later runs write this process's final tensors to ``path``."""
    train = keep.train

    def watched(self: Running, *args, **options):
        progress = train(self, *args, **options)
        phase = self.phases[-1]
        with phase.averaged() as averaged:
            tensors = {
                f"kept.{key}": value.clone(memory_format=torch.contiguous_format)
                for key, value in averaged.state_dict().items()
            }
        if hasattr(phase, "score"):
            tensors |= {f"score.{key}": whole(value).clone() for key, value in phase.score.state_dict().items()}
        if phase.last_mask() is not None:
            tensors["mask"] = phase.last_mask().words
        save_file(tensors, path)
        return progress

    Running.train = watched


keep.train = Running.train


def both(folder: str, port: str, *words: str) -> None:
    torch.set_num_threads(1)
    place, rank = Path(folder), os.environ.get("RANK", "0")
    first, again = place / "run", place / "again"
    keep(place / f"rank-{rank}.safetensors")
    main([*words, "--output_dir", str(first)])
    if rank == "0":
        # The other process waits for this one when the next run starts.
        shutil.copytree(first, again)
        for later in list((again / "checkpoints").iterdir()):
            if later.name != "checkpoint-1":
                shutil.rmtree(later)
    os.environ["MASTER_PORT"] = port
    keep(place / f"again-{rank}.safetensors")
    main([*words, "--output_dir", str(again), "--resume_from_checkpoint", "latest"])


if __name__ == "__main__":
    both(*sys.argv[1:])
