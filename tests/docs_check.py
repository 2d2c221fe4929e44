"""``python -m tests.docs_check``: runs every command and every Python block of README, docs, CONTRIBUTING, examples and
``--help``, and prints for each whether it ran or why it was only parsed. Ends with status 1 if one fails.

Commands run as they stand, in one scratch folder, page after page, with three changes. The presets have runs of two
steps (``docs_stand_ins.SHORT``). Models, data and detectors that cannot be had are small random ones under the same
names (``docs_stand_ins.write_all``, and ``NAMES`` below). Options that no preset has are appended (``APPENDED``).

Words after the command, such as ``docs/training.md``, choose what is run by its page or text. Pages use runs of earlier
pages: ``--folder FOLDER`` keeps the scratch folder, and later checks in it find them.
"""

import argparse
import contextlib
import importlib
import io
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from pecker_fast.cli import COMMANDS, main
from tests.documented import ROOT, Documented, documented

# What stands for a name, on a page or everywhere.
NAMES: dict[str, str] = {
    "RUN": "runs/digits-pecker-seed0",
    "NAME": "brad pitt",
    "runs/a": "runs/digits-patch-seed0",
    "S/request-3-forget-7": "runs/sequence-digits-patch-seed0/request-3-forget-7",
    "S/request-3-forget-7/patch.safetensors": "runs/sequence-digits-patch-seed0/request-3-forget-7/patch.safetensors",
    "runs/sdxl-celebrity-patch-seed0": "runs/sdxl-celebrity-sfd-seed0",
    "a.safetensors": "first.safetensors",
    "b.safetensors": "second.safetensors",
}
NAMES_ON_PAGES: dict[str, dict[str, str]] = {
    "docs/benchmarks.md": {"NAME": "saliency_mask", "docs/benchmarks.md": "benchmarks.md"},
    # What the benchmark before it writes.
    "docs/speed.md": {"quick.json": "benchmarks/results/cpu-avx2-20261126-train-step-digits.json"},
    "pecker-fast evaluate --help": {
        "JUDGE": "JUDGE-OF-CIFAR10",
        "WEIGHTS": "weights-inception-2015-12-05-6726825d.pth",
    },
    "pecker-fast evaluate-concept --help": {"MODEL": "NUDENET"},
    "pecker-fast pretrain --help": {"JUDGE": "pictures-judge.safetensors"},
}
# Programs of the system.
TOOLS = ("cp", "mkdir")
QUIET = ("--no-progress_bar",)
TRAINED = (*QUIET, "--overwrite_output_dir")
FEW_PROMPTS = ("--prompts", "few-prompts.txt", "--near", "few-names.txt")
FEW_SCENES = ("--prompts", "few-scenes.txt", "--near", "few-scenes.txt")
FEW_IMAGES = ("--images_per_prompt", "1", "--near_images_per_prompt", "1", "--num_inference_steps", "2", *QUIET)
FACES = ("--face_detector", "tests.docs_stand_ins:whole")
ATTACK = (
    *("--relearn_images", "2", "--relearn_steps", "1", "--forget_samples", "4"),
    *("--retain_samples", "2", "--num_inference_steps", "2", "--latents", "2", "--search_steps", "1", *QUIET),
)
TEXT_ATTACK = (
    *("--relearn_images", "2", "--relearn_steps", "1", "--inversion_steps", "1", "--images_per_prompt", "1"),
    *("--num_inference_steps", "2", *QUIET),
)
# What is appended to a command whose text begins or goes on so; all that match count.
APPENDED: tuple[tuple[str, tuple[str, ...]], ...] = (
    (r"pecker-fast (unlearn|distil|fisher) ", TRAINED),
    (r"pecker-fast pretrain ", (*TRAINED, "--samples_per_class", "3")),
    (r"pecker-fast (unlearn|fisher) .*--preset s(d|ana)", ("--sample_steps", "2", "--samples_per_prompt", "1")),
    (r"pecker-fast train-classifier ", QUIET),
    (r"pecker-fast train-classifier (?!--preset mnist)", ("--epochs", "1")),
    (r"pecker-fast train-classifier --preset images ", ("--batch_size", "16")),
    (r"pecker-fast train-classifier --preset cifar10 --data_root", ("--resize", "64")),
    (r"pecker-fast evaluate runs/(?!sd15)|pecker-fast evaluate (RUN|--preset)", (*QUIET,)),
    (r"pecker-fast evaluate runs/cifar10", ("--samples_per_class", "2")),
    (r"pecker-fast evaluate .*--samples_per_class", ("--samples_per_class", "3")),
    # A few digits: Inception takes half a second for an image.
    (
        r"pecker-fast evaluate (?!runs/cifar10).*inception",
        ("--dataset_name", "folder:few-digits", "--samples_per_class", "2"),
    ),
    (r"pecker-fast evaluate(-concept)? (runs/sd15|SD15)", FEW_IMAGES),
    (r"pecker-fast evaluate(-concept)? (runs/sd15-celebrity|SD15_FOLDER --task celebrity)", FEW_PROMPTS),
    (r"pecker-fast evaluate-concept (runs/sd15-nudity|SD15_FOLDER --task nudity)", FEW_SCENES),
    (r"pecker-fast evaluate-concept .*--coco_captions", ("--coco_count", "4")),
    (r".*--celebrity.detector", FACES),
    (r"pecker-fast robustness (?!runs/sd)", ATTACK),
    # Other methods of a comparison have no one-step generator.
    (r"pecker-fast robustness (?!runs/(sd|compare))", ("--attacks", "regression")),
    (r"pecker-fast robustness runs/sd", (*TEXT_ATTACK, *FEW_PROMPTS)),
    (r"pecker-fast compare .*--preset sd15-celebrity", (*FEW_IMAGES, *FEW_PROMPTS, "--set", "sample_steps=2")),
    (r"pecker-fast compare (?!.*(--preset sd15|--runs))", ("--seeds", "1", "--samples_per_class", "3", *QUIET)),
    (r"pecker-fast sequence ", QUIET),
    (r"pecker-fast sequence .*--preset sd15", (*FEW_IMAGES, *FEW_PROMPTS, "--set", "sample_steps=2")),
    (r"pecker-fast bench (?!--list)", ("--size", "tiny", "--repeats", "3", "--max_seconds", "0.05")),
)
# Folders and files that a command writes only if they do not exist; those of earlier commands are removed.
FRESH = (
    r"pecker-fast convert \S+ (\S+)",
    r"pecker-fast (?:compare|demo|sequence) .*--output_dir (\S+)",
    r"pecker-fast patch (?:make|apply|revert|export) .*--output (\S+)",
)
# Why a command is only parsed: the first pattern that its text begins with.
PARSED: tuple[tuple[str, str], ...] = (
    (r"make ", "installs a virtual environment; its target is in the Makefile"),
    (r"pip ", "installs packages; the extras it names are in pyproject.toml"),
    (r"python -m tests\.docs_check", "this check"),
    (r"tensorboard ", "serves pages until it is stopped"),
    (r"torchrun ", "several processes; tests/training/test_distributed*.py run torchrun"),
    (r"python -m \S+\.(ablate|patch|requests|destroy)(?! --(summary|runs|study mask --runs))", "a study of hours"),
    (r"python -m \S+\.(train_step|precision|sd_step|storm|patch_files)", "a benchmark of minutes to hours"),
    (r"python -m \S+\.full_size_memory(?! --table)", "takes up to 15 GiB of memory"),
)
# Python that continues what the page has told in words: it is compiled, and a test runs the same calls.
FRAGMENTS = {
    "docs/networks.md": "two lines for a pipe of the page; tests/models/test_transformers.py draws so",
}
# The folder of a run that a Python block calls ``folder``.
FOLDERS = {
    "docs/sdxl.md": "runs/sdxl-celebrity-sfd-seed0",
    "docs/stable_diffusion.md": "runs/sd15-celebrity-pecker-seed0",
    "docs/training.md": "runs/digits-pecker-seed0",
}


@dataclass(frozen=True)
class Result:
    """What became of something documented.

    Parameters
    ----------
    item : Documented
    reason : str or None
        Why it was only parsed; None if it ran.
    error : str or None
        Why it failed.
    seconds : float
    """

    item: Documented
    reason: str | None
    error: str | None
    seconds: float


def why_parsed(item: Documented) -> str | None:
    """Why something is only parsed; None if it runs."""
    if item.kind == "python":
        return FRAGMENTS.get(item.page)
    words = item.words
    if item.kind == "quoted" and (len(words) < 3 or {"NAME", "FILE", "..."} & {*words[2:]}):
        return "the name of a command in a sentence" if words[0] != "make" else PARSED[0][1]
    for pattern, reason in PARSED:
        if re.match(pattern, shlex.join(words)) or re.match(pattern, item.text):
            return reason
    missing = [name for name in ("wandb", "skimage") if _needs(item, name) and find_spec(name) is None]
    return f"{missing[0]} is not installed" if missing else None


def _needs(item: Documented, package: str) -> bool:
    return {"wandb": "--report_to wandb", "skimage": "make_pictures.py"}[package] in item.text


def words_of(item: Documented) -> list[str]:
    """The words of a command with stand-ins for its names, and with what is appended."""
    names = {**NAMES, **NAMES_ON_PAGES.get(item.page, {})}
    words = [names.get(word, word) for word in item.words]
    for pattern, more in APPENDED:
        if re.match(pattern, item.text.removeprefix("WANDB_MODE=offline ")):
            if "--dry_run" in words and more == TRAINED:
                more = ("--overwrite_output_dir",)
            # Numbers take the place of those of the command, files do not.
            for name, *values in options_of(more):
                if name not in ("--prompts", "--near") or name not in words:
                    words += [name, *values]
    return words


def options_of(words: Sequence[str]) -> list[list[str]]:
    """Words of the command line, an option and its values at a time."""
    starts = [i for i, word in enumerate(words) if word.startswith("--")]
    return [[*words[i:j]] for i, j in zip(starts, [*starts[1:], len(words)], strict=True)]


def parse(item: Documented, asks: bool = True) -> None:
    """Check a command that is not run: the program, its options, the files of an installation.

    ``asks``: whether a module is asked for its options, which takes a process.
    """
    if item.kind == "python":
        compile(item.text, item.page, "exec")
        return
    program, *words = item.words
    if program == "make":
        targets = re.findall(r"^([a-z-]+(?: [a-z-]+)*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in words if "=" not in word} <= {name for row in targets for name in row.split()}, words
    elif program == "pip":
        assert words[0] == "install", words
        extras = re.findall(r"\.\[([\w,-]+)\]", " ".join(words))
        known = (ROOT / "pyproject.toml").read_text()
        for extra in (name for group in extras for name in group.split(",")):
            assert re.search(rf"^{extra} = \[", known, re.MULTILINE), f"there is no extra {extra}"
    elif program == "torchrun":
        assert words[:2] == ["--nproc_per_node", words[1]] and words[2:4] == ["-m", "pecker_fast"], words
        parse_words([word for word in words[4:] if word != "..."])
    elif program == "python" and words[0] == "-m":
        assert find_spec(words[1]) is not None, words[1]
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        if options and asks:
            text = _python([*words[:2], "--help"])
            unknown = [option for option in options if option not in text]
            assert not unknown, f"{words[1]} has no option {unknown[0]}"
    elif program == "pecker-fast":
        parse_words(words)
    elif program == "python":
        assert (ROOT / words[0]).is_file(), words[0]
    else:
        assert shutil.which(program) or program == "tensorboard", program


def parse_words(words: list[str]) -> None:
    """Check the words of a subcommand as the command line does, without running it."""
    assert words[0] in COMMANDS or words[0].startswith("-"), words[0]
    if len(words) == 1 or {"NAME", "FILE", "RUN"} & {*words[1:]}:
        return  # a command by its name, or an option of it
    parse_command = importlib.import_module(f"pecker_fast.commands.{words[0].replace('-', '_')}").parse
    try:
        parse_command(words[1:])
    except SystemExit as stop:
        assert stop.code in (0, None), words


def _python(words: Sequence[str], folder: Path | None = None) -> str:
    """What a Python process prints, which has to end well. It runs in ``folder``, by default the current one."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))}
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, env=environment, cwd=folder)
    assert done.returncode == 0, done.stderr.strip().splitlines()[-1:]
    return done.stdout


def run(item: Documented) -> None:
    """Run something documented in the current folder."""
    if item.kind == "python":
        run_python(item)
        return
    for pattern in FRESH:
        for path in map(Path, re.findall(pattern, item.text)):
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
    program, *words = words_of(item)
    if program in TOOLS:
        subprocess.run([program, *words], check=True)
    elif program == "pecker-fast":
        with contextlib.suppress(_Ended):
            _main(words)
    elif words[0] == "-m":
        # Tests run in the checkout.
        _python(words, ROOT if words[1] == "pytest" else None)
    else:
        run_example(ROOT / words[0], words[1:])


class _Ended(Exception):
    """A command ended with status 0 by itself, such as one that prints its help."""


def _main(words: list[str]) -> None:
    try:
        main(words)
    except SystemExit as stop:
        if stop.code in (0, None):
            raise _Ended from None
        raise


def run_python(item: Documented) -> None:
    """Run a Python block; ``pf`` is imported, and ``folder`` is a run of the page."""
    import pecker_fast as pf

    short = {"max_train_steps": 2, "samples_per_class": 4, "progress_bar": False, "overwrite_output_dir": True}
    unlearn = pf.unlearn
    pf.unlearn = lambda *args, **options: unlearn(*args, **{**options, **short})
    try:
        names = {"__name__": "__main__", "pf": pf, "folder": FOLDERS.get(item.page)}
        exec(compile(item.text, item.page, "exec"), names)
    finally:
        pf.unlearn = unlearn


def run_example(script: Path, words: list[str]) -> None:
    """Run a script of examples/ in a folder of its own; its commands do as little as they can."""
    from tests.commands.test_own_images import SHORT

    Path("example").mkdir(exist_ok=True)
    with contextlib.chdir("example") if sys.version_info >= (3, 11) else _inside("example"):
        example = runpy.run_path(str(script))["main"]
        if script.name == "make_pictures.py":
            example(*words, 8)
        else:
            if not Path("pictures").is_dir():
                shutil.copytree("../pictures", "pictures")
            example(*words, SHORT)


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def prepare_patches() -> None:
    """Two patches of README's runs, the second of which was made on top of the first."""
    import pecker_fast as pf

    first, second = "runs/digits-patch-seed0", "runs/digits-pecker-seed0"
    if not Path("second.safetensors").exists() and all(Path(run, "report.md").is_file() for run in (first, second)):
        pf.make_patch(first, output="first.safetensors")
        pf.make_patch(first, second, output="second.safetensors")


def check(item: Documented) -> Result:
    """Run or parse something documented."""
    start, reason, error, output = time.perf_counter(), why_parsed(item), None, io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
            if reason is None:
                run(item)
            else:
                parse(item)
    except (Exception, SystemExit) as problem:
        lines = [line for line in output.getvalue().strip().splitlines() if line.strip()]
        error = lines[-1] if isinstance(problem, SystemExit) and lines else f"{type(problem).__name__}: {problem}"
        if not isinstance(problem, (SystemExit, AssertionError)):
            error += "\n" + traceback.format_exc()
    return Result(item, reason, error, time.perf_counter() - start)


def check_all(items: Sequence[Documented]) -> list[Result]:
    """Check all of it; a command that stands in several places is run once."""
    results: dict[tuple[str, bool], Result] = {}
    for item in items:
        key = (item.text, item.page in NAMES_ON_PAGES)
        if key in results and item.kind != "python":
            continue
        results[key] = result = check(item)
        print(line_of(result), flush=True)
        prepare_patches()
    return list(results.values())


def line_of(result: Result) -> str:
    text = result.item.text.splitlines()[0] + (" [Python]" if result.item.kind == "python" else "")
    did = "FAILED" if result.error else "ran" if result.reason is None else "parsed only"
    why = result.error or result.reason
    return f"{did:<12}{result.seconds:6.1f} s  {result.item.page}: {text}" + (f"  ({why})" if why else "")


def chosen(items: Sequence[Documented], words: Sequence[str]) -> list[Documented]:
    """The items whose page or text has one of the words."""
    return [item for item in items if not words or any(word in f"{item.page} {item.text}" for word in words)]


def prepare_folder() -> None:
    """Fill the scratch folder, unless an earlier check did."""
    from tests.docs_stand_ins import write_all

    if any(Path().iterdir()):
        return
    quiet = io.StringIO()
    try:
        with contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            write_all(Path())
    except BaseException:
        print(quiet.getvalue(), file=sys.stderr)
        raise
    shutil.copy(ROOT / "docs" / "benchmarks.md", "benchmarks.md")
    for name in ("benchmarks", "docs", "examples"):
        os.symlink(ROOT / name, name)


def check_documentation(words: Sequence[str] = (), scratch: str | None = None) -> int:
    """Run and parse everything, print a table, and return the number of failures.

    ``scratch``: the folder in which the commands run; None: a temporary one.
    """
    from tests.docs_stand_ins import in_place

    os.environ.setdefault("WANDB_MODE", "offline")
    if scratch is not None:
        Path(scratch).mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="pecker-fast-docs-") as folder, _inside(scratch or folder):
        prepare_folder()
        with in_place(Path.cwd()):
            results = check_all(chosen(documented(), words))
    ran = sum(result.reason is None for result in results)
    failed = sum(result.error is not None for result in results)
    seconds = sum(result.seconds for result in results)
    counts = f"{ran} run, {len(results) - ran} parsed only, {failed} failed"
    print(f"\n{len(results)} commands and blocks: {counts}; {seconds:.0f} s")
    return failed


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*", help="check only what has one of these words in its page or text")
    parser.add_argument("--folder", help="a new folder, or one of an earlier check; it is kept")
    options = parser.parse_args()
    sys.exit(1 if check_documentation(options.words, options.folder) else 0)
