"""When does a mask pay? Patches of a distilled generator against dense rules and adapters, on the digits, over seeds.

``python -m pecker_fast.benchmarks.studies.patch --workers 1`` makes all missing runs, the most valuable first;
``--summary`` only summarises the finished runs; ``--relearn`` makes the attacks instead.
"""

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from pecker_fast.parsing import parse_options
from pecker_fast.records import read_lines

from .patch_conditions import CONDITIONS, PLACES, SEEDS, Condition, Job, Place, plan, relearning_plan
from .patch_report import write_summary

PROGRAM = "python -m pecker_fast.benchmarks.studies.patch"
RESULTS = Path(__file__).resolve().parents[1] / "results" / "patch"


@dataclass(frozen=True)
class SharedArguments:
    """Options of this study, and of others that are made of the same parts."""

    workers: int = 1
    """Processes that make runs at the same time, each on one thread."""
    seeds: tuple[int, ...] = tuple(SEEDS)
    """Seeds of each condition."""
    places: tuple[str, ...] = ()
    """Preset and pair of classes, such as digits:0-1; all by default."""
    conditions: tuple[str, ...] = ()
    """Names of conditions; all by default."""
    limit: int | None = None
    """Make at most this many runs."""
    summary: bool = False
    """Make no run: print the tables and draw the pictures of those that are there."""
    plan: bool = False
    """Make no run: list those that are missing, in order."""
    results: str = str(RESULTS)
    """Folder of the records, a line each run."""
    cache: str = "runs/patch-study"
    """Folder of the distilled generators that the runs start from."""


@dataclass(frozen=True)
class StudyArguments(SharedArguments):
    """Options of the study."""

    relearn: bool = False
    """Attack generators instead: train them again, and measure how soon fine-tuning brings the class back."""


def records_path(results: Path, job: Job, relearn: bool) -> Path:
    """The file that a job's record belongs to."""
    preset, pair, *_ = job.key
    return results / f"{'relearn-' if relearn else ''}{preset}-{pair}.jsonl"


def read_records(results: Path, relearn: bool = False) -> list[dict[str, Any]]:
    """All records of runs, or of attacks."""
    names = sorted(path for path in results.glob("*.jsonl") if path.name.startswith("relearn-") == relearn)
    return [record for path in names for record in read_lines(path)]


def key_of(record: dict[str, Any]) -> tuple[str, str, str, int]:
    """``Job.key`` of a record."""
    return record["preset"], record["pair"], record["condition"], record["seed"]


def missing_jobs(args: StudyArguments) -> list[Job]:
    """The jobs without a record, in order. Raises as ``missing``."""
    records = read_records(Path(args.results), args.relearn)
    return missing(args, PLACES, relearning_plan if args.relearn else plan, CONDITIONS, records)


def missing(
    args: SharedArguments,
    all_places: Sequence[Place],
    plan: Callable[[Sequence[int], Sequence[Place]], Iterable[Job]],
    conditions: Sequence[Condition],
    records: Sequence[dict[str, Any]],
) -> list[Job]:
    """The jobs of a plan without a record, in order.

    Parameters
    ----------
    args : SharedArguments
        Seeds, places and conditions to make.
    all_places : sequence of Place
        Presets and pairs of the study.
    plan : callable
        Seeds and places to jobs.
    conditions : sequence of Condition
        Whose options are those of today.
    records : sequence of dict
        Runs that were made.

    Raises
    ------
    ValueError
        If there is no such place or condition, or a record has other options than its condition.
    """
    known = {f"{preset}:{pair[0]}-{pair[1]}": (preset, pair) for preset, pair in all_places}
    for name in args.places:
        if name not in known:
            raise ValueError(f"places has {name!r}, expected some of {', '.join(known)}")
    places = [known[name] for name in args.places or known]
    jobs = list(plan(args.seeds, places))
    names = dict.fromkeys(job.condition.name for job in jobs)
    for name in args.conditions:
        if name not in names:
            raise ValueError(f"conditions has {name!r}, expected some of {', '.join(names)}")
    options = {condition.name: json.loads(json.dumps(condition.options)) for condition in conditions}
    by_key = {key_of(record): record for record in records}
    for key, record in by_key.items():
        if key[2] in options and record["options"] != options[key[2]]:
            raise ValueError(f"{args.results} has a run of {key[2]!r} with other options: choose another folder")
    chosen = [job for job in jobs if not args.conditions or job.condition.name in args.conditions]
    return [job for job in chosen if job.key not in by_key]


def _start_worker() -> None:
    torch.set_num_threads(1)


def run(job: Job, cache: str) -> dict[str, Any]:
    """Make a run in this process."""
    from .patch_runs import run_job

    return run_job(job, Path(cache))


def attack(job: Job, cache: str) -> dict[str, Any]:
    """Make an attack in this process."""
    from .patch_relearn import relearn_job

    return relearn_job(job, Path(cache))


def results_of(
    jobs: Iterable[Job], args: SharedArguments, work: Callable[[Job, str], dict[str, Any]]
) -> Iterator[tuple[Job, dict[str, Any]]]:
    """The records of jobs as they are made by ``work`` (job, folder of generators), in this process or by several."""
    if args.workers == 1:
        _start_worker()
        for job in jobs:
            yield job, work(job, args.cache)
        return
    # Set before the processes start, so that no library opens threads of its own.
    os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1")
    waiting = iter(jobs)
    with ProcessPoolExecutor(args.workers, mp_context=get_context("spawn"), initializer=_start_worker) as pool:
        running: dict[Future, Job] = {}
        while True:
            for job in islice(waiting, args.workers - len(running)):
                running[pool.submit(work, job, args.cache)] = job
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                yield running.pop(future), future.result()


def make(
    args: SharedArguments,
    jobs_of: Callable[[], list[Job]],
    work: Callable[[Job, str], dict[str, Any]],
    path_of: Callable[[Job], Path],
) -> bool:
    """Make missing runs, and append a line for each; with ``args.plan`` list them instead.

    Parameters
    ----------
    args : SharedArguments
        What to do.
    jobs_of : callable
        Returns the missing jobs.
    work : callable
        Makes the record of a job, as for ``results_of``.
    path_of : callable
        The file that a job's record belongs to.

    Returns
    -------
    bool
        Whether there is something to summarise: False for a list.
    """
    if args.workers < 1:
        raise ValueError(f"workers is {args.workers}, expected at least 1")
    if args.summary:
        return True
    jobs = jobs_of()[: args.limit]
    if args.plan:
        print(*(job.title for job in jobs), f"{len(jobs)} runs", sep="\n")
        return False
    if jobs and args.workers > 1:
        from .patch_runs import distilled

        # Made once, not by each process.
        for preset in {job.preset for job in jobs}:
            distilled(preset, Path(args.cache))
    Path(args.results).mkdir(parents=True, exist_ok=True)
    for i, (job, record) in enumerate(results_of(jobs, args, work), 1):
        with open(path_of(job), "a") as file:
            file.write(json.dumps(record) + "\n")
        print(f"[{i} of {len(jobs)}] {job.title}: {record['line']}", flush=True)
    return True


def study(args: StudyArguments) -> None:
    """Make the missing runs, append a line for each, and write the summary."""
    results = Path(args.results)
    work = attack if args.relearn else run
    if not make(args, lambda: missing_jobs(args), work, lambda job: records_path(results, job, args.relearn)):
        return
    report = write_summary(results, read_records(results), read_records(results, relearn=True))
    if args.summary:
        print(report.read_text())
    print(f"report: {report}")


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command. Wrong input ends with one line on stderr and exit status 2."""
    call(StudyArguments, study, PROGRAM, arguments)


def call(kind: type, study: Callable[[Any], None], program: str, arguments: Sequence[str] | None) -> None:
    """Parse the options of a study and make it. Wrong input ends with one line on stderr and exit status 2."""
    try:
        words = sys.argv[1:] if arguments is None else arguments
        # Names of conditions have commas.
        study(parse_options(kind(), words, "", kind.__doc__, program=program, commas=False))
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"{program.rpartition('.')[2]}: {error}", file=sys.stderr)
        raise SystemExit(2) from error


if __name__ == "__main__":
    main()
