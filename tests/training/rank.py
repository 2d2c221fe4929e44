"""One process of a run of several, started with torchrun's variables: a few iterations on a small network.

Arguments: folder, method, iterations, and "name=value" for options of the method, "resume=1", "slow=1" (so that there
is time to kill it) and "signal=R" (the process of rank R sends itself SIGTERM in its third iteration). Writes
``rank-R.safetensors``: the trained weights, the last mask, the step at which it ended.
"""

import json
import os
import signal
import sys
import time
from dataclasses import fields
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from pecker_fast.diffusion import NoiseSchedule
from pecker_fast.models import load_network
from pecker_fast.parallel import world
from pecker_fast.training.loop import Loop, LoopOptions
from pecker_fast.unlearning import Compute, ForgetRequest, Problem, Setting, method_class
from tests.unlearning.test_methods import training_images

SMALL = {"train_batch_size": 12, "forget_batch_size": 6, "t_init": 250, "ema_decay": 0.5}
FAST = {"score_learning_rate": 1e-3, "generator_learning_rate": 1e-3, "learning_rate": 1e-3}
MASKED = {"saliency_batch_size": 12, "mask_refresh_steps": 2}


def measured(network: nn.Module, step: int) -> dict[str, float]:
    return {"size": sum(float(param.double().square().sum()) for param in network.parameters())}


def main(folder: str, name: str, iterations: str, *assignments: str) -> None:
    torch.set_num_threads(1)
    values = dict(item.split("=") for item in assignments)
    resume, slow, killed = (values.pop(key, None) for key in ("resume", "slow", "signal"))
    kind = method_class(name)
    known = {item.name for item in fields(kind.Options)}
    options = {key: value for key, value in {**SMALL, **FAST, **MASKED}.items() if key in known}
    options |= {"max_train_steps": int(iterations), **{key: json.loads(value) for key, value in values.items()}}
    with world(torch.device("cpu"), 20) as processes:
        network, schedule = load_network(Path(folder, "network"))
        assert isinstance(schedule, NoiseSchedule)
        request = ForgetRequest.of(network, [0], "random")
        images = training_images(each=8)
        problem = Problem(network, schedule, request, training_images=images)
        setting = Setting(problem, Compute(world=processes))
        method = kind(setting, kind.Options(**{**options, **kind.defaults}))
        phase = method.phases[-1]
        step = phase.step

        def watched(iteration: int):
            if slow:
                time.sleep(0.2)
            if killed and processes.rank == int(killed) and iteration == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(iteration)

        phase.step = watched
        loop_options = LoopOptions(
            logging_steps=1,
            checkpointing_steps=2,
            validation_steps=2,
            resume_from_checkpoint="latest" if resume else None,
        )
        Path(folder, "run").mkdir(exist_ok=True)
        loop = Loop(
            method.phases,
            Path(folder, "run"),
            loop_options,
            {},
            # As on the command line, only the main process evaluates.
            evaluate=measured if processes.is_main else None,
            export=lambda network, target: save_file(network.state_dict(), target / "averaged.safetensors"),
            show_progress=False,
            world=processes,
        )
        progress = loop.run()
        with phase.averaged() as averaged:
            tensors = {f"ema.{key}": value.clone() for key, value in averaged.state_dict().items()}
        if hasattr(method, "score"):
            tensors |= {f"score.{key}": value.clone() for key, value in method.score.state_dict().items()}
        mask = getattr(getattr(phase, "masker", phase), "mask", None)
        if mask is not None:
            tensors["mask"] = mask.words
        tensors["step"] = torch.tensor(progress.step)
        save_file(tensors, Path(folder, f"rank-{processes.rank}.safetensors"))


if __name__ == "__main__":
    main(*sys.argv[1:])
