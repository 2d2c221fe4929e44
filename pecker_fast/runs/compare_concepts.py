"""``pecker-fast compare`` on text-to-image models: rows that are trained, and rows that only draw in another way."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from ..files import write_json
from ..hashing import weights_hash
from ..models import resolve_text
from ..parallel import started_by_torchrun
from ..report import Run, concept_table, portable, write_concepts
from ..training.text_presets import text_preset
from ..unlearning import method_class, method_names
from .concept_arguments import DetectorArguments, MeasureArguments
from .evaluate_concept import evaluate_concept, save_pictures_of_all
from .fisher_file import load_fisher
from .several import assignment, command_line, ended, going_on
from .unlearn_text import UnlearnTextArguments, unlearn_text

# Rows that train nothing: how they draw.
SAMPLED: dict[str, dict[str, Any]] = {
    "sd": {"sampler": "ddim"},
    "sid-lsg": {"sampler": "one_step", "t_init": 625},
    **{f"sld-{name}": {"sampler": "sld", "sld": name} for name in ("weak", "medium", "strong", "max")},
}
# The published Table 3, by default.
ROWS = ("sd", "sld-max", "esd", "sfd", "pecker")
AMNESIA = "selective_amnesia"
# What else makes two runs the same one.
MORE = ("concept", "cover", "retain_prompts", "resolution", "weights_dtype", "master_weights", "teacher_dtype")
MORE += ("score_lora_rank", "fisher")
# Arguments of the samples that a run draws while it is under way.
SAMPLES = ("samples_per_prompt", "sample_steps", "sample_guidance_scale")


def compare_concepts(
    pretrained_model_name_or_path: str,
    preset: str = "sd15-celebrity",
    methods: tuple[str, ...] = (),
    concept: str | None = None,
    cover: str | None = None,
    sid_lsg: str | None = None,
    fisher: str | None = None,
    retain_prompts: str = "retain",
    seeds: int = 1,
    first_seed: int = 0,
    output_dir: str | None = None,
    max_train_steps: int | None = None,
    set: tuple[str, ...] = (),
    keep_checkpoints: bool = False,
    measure: Annotated[MeasureArguments, tyro.conf.arg(name="")] = MeasureArguments(),  # noqa: B008
    detectors: Annotated[DetectorArguments, tyro.conf.arg(name="")] = DetectorArguments(),  # noqa: B008
    device: str | None = None,
    progress_bar: bool = True,
) -> None:
    """Compares ways to forget a concept, as the published Table 3 does, and writes a table and pictures.

    Methods are those of pecker-fast unlearn, and rows that train nothing: sd (the model, 50 steps of DDIM), sid-lsg
    (the one-step generator of --sid-lsg), sld-weak, sld-medium, sld-strong and sld-max. The same command again goes on
    where it was interrupted; what has ended is read, not repeated.

    Args:
        pretrained_model_name_or_path: The Stable Diffusion 1.x or 2.x: a folder, or a name on the Hugging Face hub.
        preset: sd15-celebrity or sd15-nudity.
        methods: Names of methods, with spaces or commas between; by default sd, sld-max, esd, sfd, pecker, and
            selective_amnesia where --fisher is given.
        concept: What is to be forgotten, by name; the preset's by default.
        cover: What is to be drawn in its place; the preset's by default.
        sid_lsg: Folder of the U-Net of a one-step generator: one-step methods start from it, and sid-lsg draws with it.
        fisher: File with the Fisher information of the model, which pecker-fast fisher makes, for selective_amnesia.
        retain_prompts: File of prompts of what is to stay, for the training.
        seeds: How many seeds each method is trained on.
        first_seed: The first of them.
        output_dir: Folder of the comparison; runs/compare-<preset> by default.
        max_train_steps: Iterations of each method; the method's by default.
        set: Options for all methods that have them, as name=value, such as generator_learning_rate=1e-6; those of
            memory (weights_dtype=bfloat16) and of samples (sample_steps=20) too.
        keep_checkpoints: Keep the checkpoints of runs that have ended.
        measure: What is drawn.
        detectors: What it is measured with.
        device: cpu, cuda, cuda:1...; a GPU where there is one by default.
        progress_bar: Show a progress bar.
    """
    if started_by_torchrun():
        raise ValueError("compare runs in one process: pecker-fast unlearn is the command for torchrun")
    names = [name for item in methods for name in item.split(",") if name]
    if not methods:
        names = [*ROWS, *([] if fisher is None else [AMNESIA])]
    if not names or len({*names}) < len(names):
        raise ValueError(f"methods is {', '.join(names) or 'empty'}, expected each method once")
    trainable = [name for name in method_names() if method_class(name).forgets_prompts]
    for name in names:
        if name not in SAMPLED and name not in trainable:
            raise ValueError(f"methods has {name!r}, expected some of {', '.join([*SAMPLED, *trainable])}")
    if seeds < 1:
        raise ValueError(f"seeds is {seeds}, expected at least 1")
    if "sid-lsg" in names and sid_lsg is None:
        raise ValueError("sid_lsg is not given: the row sid-lsg needs the folder of its U-Net")
    if (AMNESIA in names) != (fisher is not None):
        if fisher is None:
            raise ValueError(f"fisher is not given: the row {AMNESIA} needs the file that pecker-fast fisher makes")
        raise ValueError(f"fisher is {fisher!r}, but {AMNESIA} is not among the methods: expected it, or no fisher")
    found = text_preset(preset)
    folder = Path(output_dir or f"runs/compare-{preset}")
    given = dict(assignment(item) for item in set)
    if max_train_steps is not None:
        given["max_train_steps"] = max_train_steps
    request = {
        "pretrained_model_name_or_path": pretrained_model_name_or_path,
        "concept": concept,
        "cover": cover,
        "retain_prompts": retain_prompts,
        "fisher": fisher,
        "resolution": measure.resolution,
        "progress_bar": progress_bar,
        "overwrite_output_dir": True,
    }
    plan: dict[str, list[UnlearnTextArguments]] = {}
    # All of them are made before the first is run: what is wrong is said at once.
    for name in names:
        if name not in SAMPLED:
            plan[name] = [
                _arguments(preset, name, seed, folder / f"{name}-seed{seed}", request, given, sid_lsg, device)
                for seed in range(first_seed, first_seed + seeds)
            ]
    unknown = [key for key in given if not any(_takes(of[0], key) for of in plan.values())]
    if unknown:
        raise ValueError(f"set has {unknown[0]}, which is an option of none of {', '.join(names)}")
    model = resolve_text(pretrained_model_name_or_path)
    if fisher is not None:
        # It is read again when its turn comes, which may be days later.
        unet = model.load_unet()
        load_fisher(fisher, unet, weights_hash(unet), plan[AMNESIA][0].options.loss_reduction)
        del unet
    concept = concept or found.concept
    for several in plan.values():
        several[0].options.check(model.parts.schedule.num_train_timesteps)
        several[0].prompts()
        for args in several:
            ended(args, MORE)
    asked, *_ = measure.asked(found.task, concept, None)
    base = str(model.parts.folder)
    try:
        for name in names:
            for args in plan.get(name, ()):
                _train(args, keep_checkpoints)
            for run in _folders(folder, name, plan):
                how = dict(SAMPLED.get(name, {}))
                drawn = str(run) if name in plan else base
                if name == "sid-lsg":
                    drawn, how["base"] = sid_lsg, base
                _measure(run, name, drawn, how, found.task, concept, measure, detectors, device, progress_bar)
    except SystemExit:
        print("the same command again goes on here")
        raise
    runs = {name: [Run.read(run) for run in _folders(folder, name, plan)] for name in names}
    save_pictures_of_all(folder, {name: of[0].folder for name, of in runs.items()}, asked)
    what = f"“{concept}”" if found.task == "celebrity" else "nudity"
    report = write_concepts(
        folder,
        runs,
        asked=f"Preset {preset}: forget {what}, of {portable(model.source)}; protocol {measure.protocol}.",
        command=command_line("compare"),
        facts={name: {"trained": "yes" if name in plan else "no"} for name in names},
        pictures=[
            ("concept.png", "Prompts of the concept, the same noise for every method."),
            ("near.png", "Prompts of near concepts, which are to stay."),
        ],
    )
    print(concept_table(runs))
    print(f"report: {report}")


def _arguments(
    preset: str,
    name: str,
    seed: int,
    folder: Path,
    request: dict[str, Any],
    given: dict[str, Any],
    sid_lsg: str | None,
    device: str | None,
) -> UnlearnTextArguments:
    base = UnlearnTextArguments.defaults(preset, name)
    options = dataclasses.replace(base.options, **{k: v for k, v in given.items() if hasattr(base.options, k)})
    memory = dataclasses.replace(base.memory, **{k: v for k, v in given.items() if hasattr(base.memory, k)})
    samples = {key: given[key] for key in SAMPLES if key in given}
    # Methods that draw in one step.
    start = sid_lsg if hasattr(options, "t_init") else None
    fisher = request["fisher"] if name == AMNESIA else None
    given_request = {**request, **samples, "output_dir": str(folder), "initial_generator": start, "fisher": fisher}
    request = dataclasses.replace(base.request, **given_request)
    compute = dataclasses.replace(base.compute, seed=seed, device=device)
    return dataclasses.replace(base, options=options, memory=memory, request=request, compute=compute)


def _takes(args: UnlearnTextArguments, key: str) -> bool:
    return hasattr(args.options, key) or hasattr(args.memory, key) or key in SAMPLES


def _folders(folder: Path, name: str, plan: dict[str, list[UnlearnTextArguments]]) -> list[Path]:
    """Of each seed; rows that train nothing have one."""
    return [args.output_dir for args in plan[name]] if name in plan else [folder / name]


def _train(args: UnlearnTextArguments, keep_checkpoints: bool) -> None:
    if ended(args, MORE):
        return
    print(f"training: {args.method}, seed {args.compute.seed}")
    unlearn_text(going_on(args))
    if not keep_checkpoints:
        shutil.rmtree(args.output_dir / "checkpoints", ignore_errors=True)


def _measure(
    folder: Path,
    name: str,
    model: str,
    how: dict[str, Any],
    task: Literal["celebrity", "nudity"],
    concept: str | None,
    measure: MeasureArguments,
    detectors: DetectorArguments,
    device: str | None,
    progress_bar: bool,
) -> None:
    """Measures a model, unless it has been in the same way, and leaves what was found in the folder's metrics.json."""
    result = folder / "evaluation.json"
    asked = {**dataclasses.asdict(measure), **dataclasses.asdict(detectors), **how, "model": model, "concept": concept}
    if result.is_file() and json.loads(result.read_text()).get("asked") == json.loads(json.dumps(asked)):
        return
    print(f"measuring: {folder.name}")
    folder.mkdir(parents=True, exist_ok=True)
    evaluate_concept(
        model,
        task=task,
        concept=concept,
        measure=measure,
        detectors=detectors,
        device=device,
        output=str(result),
        progress_bar=progress_bar,
        **how,
    )
    found = json.loads(result.read_text())
    if name in SAMPLED:
        steps = 1 if how["sampler"] == "one_step" else measure.num_inference_steps
        row = {"method": name, "seed": None, "sampling_steps": steps, **found}
        write_json(folder / "metrics.json", {**row, "protocol": {"concept": found["protocol"]}})
    # Written last: what is asked for again has been measured wholly.
    write_json(result, {**found, "asked": asked})
