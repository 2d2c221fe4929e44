"""Kill storms, damaged files, full disks and two writers at once: how often something is lost, wrong or unreported.

``python -m pecker_fast.benchmarks.storm --cases 20 --json benchmarks/results/storm/digits.json``. The number of a
case is its seed, so an existing file is continued: cases that it has are not run again. What is counted:

* kills: a run that is killed at random moments (SIGKILL) and resumed until it ends, against one that was never killed;
* writers: two processes that resume one run at the same moment;
* files: files of runs, masks, patches, judges, checkpoints and archives of torch with changed bytes or values;
* full: writes that fail after a random number of bytes, as on a full disk.
"""

import argparse
import contextlib
import json
import os
import random
import resource
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from pecker_fast.archives import load_mapping
from pecker_fast.diffusion import NoiseSchedule, UNetConfig, build_unet
from pecker_fast.locks import LockedError
from pecker_fast.mask import SaliencyMask
from pecker_fast.metrics import Judge, load_judge
from pecker_fast.models import resolve, save_network
from pecker_fast.patches import Patch
from pecker_fast.report import RunRecord
from pecker_fast.runs.arguments import UnlearnArguments
from pecker_fast.runs.task import unlearn_arguments
from pecker_fast.runs.unlearn import unlearn
from pecker_fast.training.checkpoints import Checkpoints

from .run import conditions, save

NETWORK = UNetConfig(
    sample_size=8,
    num_classes=10,
    in_channels=1,
    block_out_channels=(4, 8),
    layers_per_block=1,
    attention_resolutions=(),
    norm_num_groups=2,
)
STEPS, LAST = 8, "checkpoint-8"
# Files that are the same, byte for byte, however often a run was killed.
SAME = ("unet/diffusion_pytorch_model.safetensors", f"checkpoints/{LAST}/unet/config.json")


class WrongError(AssertionError):
    """A case ended in another way than it may."""


def arguments(place: Path, name: str, *, resume: bool) -> UnlearnArguments:
    """A run of a few seconds, or its continuation."""
    return unlearn_arguments(
        "digits",
        "pecker",
        {
            "pretrained_model_name_or_path": str(place / "network"),
            "output_dir": str(place / name),
            "overwrite_output_dir": not resume,
            "resume_from_checkpoint": "latest" if resume else None,
            "device": "cpu",
            "evaluate": False,
            "progress_bar": False,
            "logging_steps": 1,
            "checkpointing_steps": 2,
            "checkpoints_total_limit": 2,
            "max_train_steps": STEPS,
            "train_batch_size": 2,
            "forget_batch_size": 2,
            "mask_refresh_steps": 2,
            "saliency_batch_size": 2,
        },
    )


def forked(work: Callable[[], object], log: Path) -> int:
    """The number of a process that does ``work``, with its output in ``log``. Status 0 if it succeeds."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        torch.set_num_threads(1)
        with open(log, "w") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
            try:
                work()
                status = 0
            except BaseException as error:
                print(f"{type(error).__name__}: {error}", flush=True)
    finally:
        os._exit(status)


def wait(process: int, seconds: float) -> int | None:
    """The status of a process, None if it has not ended by then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        number, status = os.waitpid(process, os.WNOHANG)
        if number:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.005)
    return None


def has_checkpoint(folder: Path) -> bool:
    return any((folder / "checkpoints").glob("checkpoint-*"))


def leftovers(folder: Path) -> list[str]:
    """Temporary files and locks in a run's folder."""
    return [path.name for path in folder.rglob(".*") if not path.name.startswith("..")]


def whole_run(place: Path) -> Path:
    """A run that was never killed."""
    folder = place / "whole"
    if not (folder / "metrics.json").is_file():
        unlearn(arguments(place, "whole", resume=False))
    return folder


def kills(place: Path, draw: random.Random) -> dict[str, int]:
    """One run, killed until it ends by itself."""
    whole, folder = whole_run(place), place / "killed"
    shutil.rmtree(folder, ignore_errors=True)
    counts: Counter[str] = Counter()
    while True:
        resume = has_checkpoint(folder)
        work = lambda resume=resume: unlearn(arguments(place, "killed", resume=resume))  # noqa: E731
        process = forked(work, place / "log")
        status = wait(process, draw.uniform(0.2, 2.5 * 1.2 ** counts["kills"]))
        if status is not None:
            break
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)
        counts["kills"] += 1
    if status != 0:
        raise WrongError(f"a resumed run ended with {status}: {(place / 'log').read_text()[-300:]}")
    for name in SAME:
        if (folder / name).read_bytes() != (whole / name).read_bytes():
            raise WrongError(f"{name} of the killed run differs")
    # Its threshold is not: a run that was resumed after its last refresh does not know it.
    if not SaliencyMask.load(folder / "mask.safetensors").equal(SaliencyMask.load(whole / "mask.safetensors")):
        raise WrongError("the mask of the killed run differs")
    counts["identical_runs"] += 1
    counts["leftovers"] += len(leftovers(folder))
    return counts


def writers(place: Path, draw: random.Random) -> dict[str, int]:
    """Two processes resume one run at the same moment."""
    folder, counts = place / "twice", Counter[str]()
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(whole_run(place), folder)
    # Something is left to do.
    shutil.rmtree(folder / "checkpoints" / LAST)
    logs = [place / f"log{number}" for number in range(2)]

    def resume() -> None:
        unlearn(arguments(place, "twice", resume=True))

    first = forked(resume, logs[0])
    time.sleep(draw.uniform(0, 0.3))
    second = forked(resume, logs[1])
    statuses = [wait(process, 600) for process in (first, second)]
    refused = [log.read_text() for log, status in zip(logs, statuses, strict=True) if status != 0]
    # The second may have begun after the first had ended.
    if len(refused) > 1 or any(LockedError.__name__ not in text or "process " not in text for text in refused):
        raise WrongError(f"of two writers {len(refused)} were refused: {refused}")
    steps = [line["step"] for line in RunRecord.read(folder).log]
    if steps != list(range(1, STEPS + 1)):
        raise WrongError(f"the log has the steps {steps}")
    counts["refused" if refused else "one_after_the_other"] += 1
    return counts


def damaged(content: bytes, draw: random.Random) -> bytes:
    """The content with changed, removed or added bytes."""
    data, kind = bytearray(content), draw.randrange(4)
    if kind == 0:
        for _ in range(draw.choice((1, 1, 4))):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 1:
        del data[draw.randrange(len(data)) :]
    elif kind == 2:
        begin = draw.randrange(len(data))
        data[begin : begin + draw.randrange(1, 64)] = draw.randbytes(draw.randrange(64))
    else:
        data += draw.randbytes(draw.randrange(1, 64))
    return bytes(data)


def same_weights(path: Path, network: Path) -> None:
    """Read an archive of a network's weights. Bytes between its parts may change, weights may not."""
    weights, expected = load_mapping(path), resolve(network).network.state_dict()
    if weights.keys() != expected.keys() or any(not torch.equal(weights[name], expected[name]) for name in expected):
        raise WrongError("the weights differ")


def readers(place: Path) -> dict[str, tuple[Path, Callable[[], object]]]:
    """Each kind of file, and what reads it."""
    folder = place / "fuzzed"
    if not folder.exists():
        shutil.copytree(whole_run(place), folder)
        base, result = (resolve(path).network.state_dict() for path in (place / "network", folder))
        Patch.between(base, result).save(folder / "patch.safetensors")
        load_judge().save(folder / "judge.safetensors")
        torch.save(base, folder / "weights.pth")
    checkpoints = Checkpoints(folder / "checkpoints", None, {})
    record = lambda: RunRecord.read(folder)  # noqa: E731
    return {
        "mask": (folder / "mask.safetensors", lambda: SaliencyMask.load(folder / "mask.safetensors")),
        "patch": (folder / "patch.safetensors", lambda: Patch.load(folder / "patch.safetensors")),
        "judge": (folder / "judge.safetensors", lambda: Judge.load(folder / "judge.safetensors")),
        "archive": (folder / "weights.pth", lambda: same_weights(folder / "weights.pth", place / "network")),
        "network": (folder / "unet" / "config.json", lambda: resolve(folder)),
        "schedule": (folder / "unet" / "scheduler" / "scheduler_config.json", lambda: resolve(folder)),
        "weights": (folder / SAME[0], lambda: resolve(folder)),
        "manifest": (checkpoints.path(STEPS) / "checkpoint.json", lambda: checkpoints.verify(checkpoints.path(STEPS))),
        "state": (checkpoints.path(STEPS) / "state.safetensors", lambda: checkpoints.verify(checkpoints.path(STEPS))),
        "config": (folder / "config.json", record),
        "metrics": (folder / "metrics.json", record),
        "log": (folder / "train.jsonl", record),
    }


# These files have a hash or a size of everything, so that every change has to be refused.
HASHED = ("mask", "patch", "manifest", "state")


def files(place: Path, draw: random.Random, each: int = 20) -> dict[str, int]:
    """Damaged files of every kind: refused in one line, or read."""
    counts: Counter[str] = Counter()
    for kind, (path, read) in readers(place).items():
        content = path.read_bytes()
        try:
            for _ in range(each):
                changed = damaged(content, draw)
                if changed == content:
                    continue
                path.write_bytes(changed)
                try:
                    read()
                except ValueError as error:
                    counts[f"{kind}_refused"] += 1
                    if len(str(error).splitlines()) != 1:
                        raise WrongError(f"{kind}: a message of several lines: {error}") from error
                    continue
                except Exception as error:
                    raise WrongError(f"{kind}: {type(error).__name__}: {error}") from error
                counts[f"{kind}_read"] += 1
                if kind in HASHED:
                    raise WrongError(f"{kind}: changed content was read")
        finally:
            path.write_bytes(content)
    return counts


def full(place: Path, draw: random.Random) -> dict[str, int]:
    """A run on which no file may have more than a random number of bytes; it goes on when there is room again."""
    folder, counts = place / "full", Counter[str]()
    shutil.rmtree(folder, ignore_errors=True)
    limit = draw.randrange(200, 60_000)

    def narrow() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        unlearn(arguments(place, "full", resume=False))

    if wait(forked(narrow, place / "log"), 600) == 0:
        counts["fitted"] += 1
    else:
        counts["failed"] += 1
        last_line = (place / "log").read_text().splitlines()[-1]
        if not last_line.startswith(("OSError: ", "ValueError: output_dir")):
            raise WrongError(f"a full disk ends with {last_line}")
    checkpoints = Checkpoints(folder / "checkpoints", None, {})
    for step in checkpoints.steps():
        checkpoints.verify(checkpoints.path(step))
        counts["whole_checkpoints"] += 1
    resume = has_checkpoint(folder)
    if wait(forked(lambda: unlearn(arguments(place, "full", resume=resume)), place / "log"), 600) != 0:
        raise WrongError(f"the run did not go on: {(place / 'log').read_text()[-300:]}")
    if (folder / SAME[0]).read_bytes() != (whole_run(place) / SAME[0]).read_bytes():
        raise WrongError("the weights differ")
    counts["leftovers"] += len(leftovers(folder))
    return counts


STORMS: dict[str, Callable[[Path, random.Random], dict[str, int]]] = {
    "kills": kills,
    "writers": writers,
    "files": files,
    "full": full,
}


def run(path: Path, cases: int, names: list[str], progress: Callable[[str], object] = print) -> dict[str, Any]:
    """Run the cases that a file lacks, and write it after each.

    Parameters
    ----------
    path : Path
        The file of results.
    cases : int
        How many of each storm it is to have.
    names : list of str
        The storms.
    progress : callable
        Called with a line after each case.

    Returns
    -------
    dict
        What the file holds: for each storm its number of cases, its counts, and what went wrong.
    """
    results = (
        json.loads(path.read_text()) if path.is_file() else {"about": conditions(torch.device("cpu")), "storms": {}}
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            save_network(place / "network", build_unet(NETWORK), NoiseSchedule.linear())
        for storm in names:
            row = results["storms"].setdefault(storm, {"cases": 0, "counts": {}, "wrong": []})
            for number in range(row["cases"], cases):
                try:
                    counts = Counter(row["counts"]) + Counter(STORMS[storm](place, random.Random(f"{storm} {number}")))
                    row["counts"] = dict(sorted(counts.items()))
                except WrongError as error:
                    row["wrong"].append(f"case {number}: {error}")
                row["cases"] = number + 1
                save(results, path)
                progress(f"{storm} {number + 1} of {cases}: {row['counts']}, wrong: {len(row['wrong'])}")
    return results


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, required=True, help="file of the results, which is continued")
    parser.add_argument("--cases", type=int, default=10, help="cases of each storm")
    parser.add_argument("--storms", nargs="+", choices=list(STORMS), default=list(STORMS))
    args = parser.parse_args(words)
    # Processes are forked.
    torch.set_num_threads(1)
    results = run(args.json, args.cases, args.storms)
    wrong = [f"{name}: {text}" for name, row in results["storms"].items() for text in row["wrong"]]
    print("\n".join(wrong) or "nothing was lost or wrong")
    raise SystemExit(bool(wrong))


if __name__ == "__main__":
    main()
