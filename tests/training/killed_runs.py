"""Runs one unlearning job again and again, killing it at random moments, until it ends by itself.

Arguments: folder of the network, folder of the run, seed of the moments, method, and 0 to never kill it. Prints
a JSON line: how often it was killed, and how often before the first checkpoint. This process computes nothing, so that
it can fork; each child is a run as a user would start it.
"""

import json
import os
import random
import signal
import sys
import time
from pathlib import Path

# Both are imported once, before the children.
import diffusers  # noqa: F401
import torch

import pecker_fast.runs.classes.task  # noqa: F401
from pecker_fast.runs.arguments import UnlearnArguments
from pecker_fast.runs.task import unlearn_arguments
from pecker_fast.runs.unlearn import unlearn


def arguments(network: str, folder: str, method: str, resume: str | None) -> UnlearnArguments:
    small = {"max_train_steps": 12, "train_batch_size": 3, "forget_batch_size": 2}
    if method != "sfd":
        small |= {"mask_refresh_steps": 3, "saliency_batch_size": 4}
    options = {
        "pretrained_model_name_or_path": network,
        "output_dir": folder,
        "overwrite_output_dir": resume is None,
        "evaluate": False,
        "progress_bar": False,
        "logging_steps": 3,
        "checkpointing_steps": 2,
        "checkpoints_total_limit": 3,
        "resume_from_checkpoint": resume,
    }
    return unlearn_arguments("digits", method, {**options, **small})


def child(network: str, folder: str, method: str, resume: str | None) -> int:
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        torch.set_num_threads(1)
        unlearn(arguments(network, folder, method, resume))
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
    os._exit(code)


def main(network: str, folder: str, seed: str, method: str, kill: str = "1") -> None:
    moments = random.Random(int(seed))
    kills = early = 0
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline:
        checkpoints = list(Path(folder, "checkpoints").glob("checkpoint-*"))
        process = child(network, folder, method, "latest" if checkpoints else None)
        # Longer each time, so that the run ends even on a busy machine.
        wait = moments.uniform(0.1, 0.4 * 1.3**kills) if kill == "1" else 400
        end = time.monotonic() + wait
        status = None
        while time.monotonic() < end:
            pid, code = os.waitpid(process, os.WNOHANG)
            if pid:
                status = code
                break
            time.sleep(0.002)
        if status is None:
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            kills += 1
            early += not checkpoints
            continue
        print(json.dumps({"kills": kills, "early": early, "status": os.waitstatus_to_exitcode(status)}))
        return
    raise SystemExit("the run did not end")


if __name__ == "__main__":
    main(*sys.argv[1:])
