"""Comparing ways to forget a concept: methods that train, and models that only sample in another way."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ...files import write_json
from ...hashing import weights_hash
from ...models import TextModel, one_step_of, resolve_text
from ...records import read_object
from ...report import PROMPTS, RunRecord, portable, text_table, write_across
from ...run_records import read_file
from ...unlearning import method_class, method_names
from ..arguments import UnlearnArguments
from ..compare import CompareArguments, Plan, fields_of
from ..evaluate import evaluate
from ..fisher_file import load_fisher
from ..presets import prompt_preset
from ..several import command_line
from .evaluation import PromptEvaluation
from .measure import DetectorArguments, MeasureArguments
from .sheets import save_sheets_of_all
from .task import PromptTask

# Rows that train nothing: how they sample.
SAMPLED: dict[str, dict[str, Any]] = {
    "sd": {"sampler": "ddim"},
    "sid-lsg": {"sampler": "one_step", "t_init": 625},
    **{f"sld-{name}": {"sampler": "sld", "sld": name} for name in ("weak", "medium", "strong", "max")},
}
AMNESIA, RELABEL = "selective_amnesia", "relabel"
# The published Table 3, and the yardstick that trains nothing.
ROWS = ("sd", "sld-max", "esd", RELABEL, "sfd", "pecker")
# Options of the comparison that its runs take, under the same names.
OF_RUNS = ("concept", "cover", "retain_prompts")


@dataclass(frozen=True, kw_only=True)
class PromptComparison(CompareArguments):
    """Options of a comparison of ways to forget a concept."""

    preset: str = "sd15-celebrity"
    """sd15-celebrity, sd15-nudity, sdxl-celebrity or sdxl-nudity."""
    methods: tuple[str, ...] = ()
    """Methods of pecker-fast unlearn, and rows that train nothing: sd (the model, 50 steps of DDIM), sid-lsg (the
    one-step generator of --sid_lsg), sld-weak, sld-medium, sld-strong and sld-max. Default: sd, sld-max, esd, relabel,
    sfd, pecker, and selective_amnesia with --fisher."""
    seeds: int = 1
    """Number of seeds that each method is trained on."""
    pretrained_model_name_or_path: str | None = None
    """The Stable Diffusion 1.x, 2.x or XL: a folder, or a name on the Hugging Face hub."""
    concept: str | None = None
    """Name of what to forget. Default: the preset's."""
    cover: str | None = None
    """What to draw in its place. Default: the preset's."""
    sid_lsg: str | None = None
    """Folder or file of the U-Net of a one-step generator: one-step methods start from it, and sid-lsg samples it."""
    fisher: str | None = None
    """For selective_amnesia: file with the Fisher information of the model, which pecker-fast fisher makes."""
    retain_prompts: str = "retain"
    """File of prompts to keep, for the training."""
    set: tuple[str, ...] = ()
    """Options for all methods that have them, as name=value, such as generator_learning_rate=1e-6; also those of memory
    (weights_dtype=bfloat16) and of samples (sample_steps=20)."""
    images: MeasureArguments = field(default_factory=MeasureArguments)
    """What is drawn for the measurement."""
    detectors: DetectorArguments = field(default_factory=DetectorArguments)
    """What measures it."""

    @property
    def names(self) -> list[str]:
        default = [*ROWS, *([] if self.fisher is None else [AMNESIA])]
        names = super().names if self.methods else default
        for name in names:
            self.trains(name)
        if "sid-lsg" in names and self.sid_lsg is None:
            raise ValueError("sid_lsg is not given: the row sid-lsg needs the folder of its U-Net")
        if AMNESIA in names and self.fisher is None:
            raise ValueError(f"fisher is not given: the row {AMNESIA} needs the file that pecker-fast fisher makes")
        if AMNESIA not in names and self.fisher is not None:
            raise ValueError(f"fisher is {self.fisher!r}, but {AMNESIA} is not among the methods: expected it, or None")
        return names

    def trains(self, name: str) -> bool:
        trainable = [method for method in method_names() if method_class(method).forgets_prompts]
        if name not in SAMPLED and name not in trainable:
            raise ValueError(f"methods has {name!r}, expected some of {', '.join([*SAMPLED, *trainable])}")
        return name not in SAMPLED

    def options(self, name: str) -> dict[str, Any]:
        # Methods that sample in one step start from the one-step generator.
        one_step = "t_init" in {item.name for item in dataclasses.fields(method_class(name).Options)}
        own: dict[str, Any] = {}
        if name == RELABEL and self.sid_lsg is not None:
            own["t_init"] = self._t_init
        return {
            **fields_of(self, OF_RUNS),
            **own,
            "resolution": self.images.resolution,
            "initial_generator": self.sid_lsg if one_step else None,
            "fisher": self.fisher if name == AMNESIA else None,
        }

    def check(self, plan: Plan) -> None:
        model = self._model
        if self.fisher is not None:
            # It is read again when its run starts, which may be days later.
            unet = model.load_unet()
            load_fisher(self.fisher, unet, weights_hash(unet), plan[AMNESIA][0].options.loss_reduction)
        for runs in plan.values():
            runs[0].options.check(model.parts.schedule.num_train_timesteps)
            PromptTask.check(runs[0])
        self.images.resolved(prompt_preset(self.preset).subject, self._concept, None)

    @cached_property
    def _model(self) -> TextModel:
        return resolve_text(self.pretrained_model_name_or_path)

    @property
    def _t_init(self) -> int:
        """Timestep of the one-step generator: as its folder or its name says, otherwise SiD-LSG's."""
        one_step = one_step_of(self.sid_lsg)
        return SAMPLED["sid-lsg"]["t_init"] if one_step is None else one_step.t_init

    @property
    def _concept(self) -> str | None:
        return self.concept or prompt_preset(self.preset).concept

    def measure(self, name: str, folder: Path, args: UnlearnArguments | None) -> None:
        how = dict(SAMPLED.get(name, {}))
        base = str(self._model.parts.folder)
        model = base if args is None else str(folder)
        if name == "sid-lsg":
            model, how = self.sid_lsg, {**how, "base": base, "t_init": self._t_init}
        result = folder / "evaluation.json"
        settings = {**dataclasses.asdict(self.images), **dataclasses.asdict(self.detectors), **how}
        settings |= {"model": model, "concept": self._concept}
        if read_file(folder, "evaluation").get("asked") == json.loads(json.dumps(settings)):
            return
        print(f"measuring: {folder.name}")
        folder.mkdir(parents=True, exist_ok=True)
        evaluate(
            PromptEvaluation(
                run=model,
                task=prompt_preset(self.preset).subject,
                concept=self._concept,
                images=self.images,
                detectors=self.detectors,
                device=self.device,
                output=str(result),
                progress_bar=self.progress_bar,
                # The plain model is a row.
                measure_before=False,
                **how,
            )
        )
        record = read_object(result)
        if args is None:
            steps = 1 if how["sampler"] == "one_step" else self.images.num_inference_steps
            row = {"method": name, "seed": None, "sampling_steps": steps, **record}
            write_json(folder / "metrics.json", {**row, "protocol": {"concept": record["protocol"]}})
        # Written last: a result with "asked" is complete.
        write_json(result, {**record, "asked": settings})

    def report(self, runs: Mapping[str, Sequence[RunRecord]], plan: Plan) -> tuple[Path, str]:
        subject, concept = prompt_preset(self.preset).subject, self._concept
        prompts, *_ = self.images.resolved(subject, concept, None)
        save_sheets_of_all(self.folder, {name: several[0].folder for name, several in runs.items()}, prompts)
        source = self._model.source
        what = f"“{concept}”" if subject == "celebrity" else "nudity"
        report = write_across(
            self.folder,
            runs,
            asked=f"Preset {self.preset}: forget {what}, of {portable(source)}; protocol {self.images.protocol}.",
            command=command_line("compare"),
            facts={name: {"trained": "yes" if name in plan else "no"} for name in runs},
            pictures=[
                ("concept.png", "Prompts of the concept, with the same noise for every method."),
                ("near.png", "Prompts of near concepts, which should be preserved."),
            ],
            shown=PROMPTS,
        )
        return report, text_table(runs, shown=PROMPTS)
