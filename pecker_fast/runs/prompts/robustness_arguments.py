"""Options of the attacks on a text-to-image run."""

import json
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ...checks import check_int, check_literals, check_number
from ...report import portable
from ...robustness import TextRelearnOptions
from ...unlearning.trained import Trained
from ..robustness import NEUTRAL
from .measure import DetectorArguments, image_files


@dataclass(frozen=True, kw_only=True)
class PromptRobustnessArguments:
    """Options of the attacks on a text-to-image run."""

    run: tuple[str, ...]
    """Folder of a run of unlearning that has ended."""
    attacks: tuple[str, ...] = ()
    """Some of regression, matching, denoising (fine-tuning) and inversion (a learned word). Default: all that apply."""
    concept: str | None = None
    """Which of several concepts. Default: that of the run."""
    concept_images: str | None = None
    """Folder of the adversary's images of the concept. Default: the pretrained model draws them."""
    relearn_images: int = 16
    """Images that the adversary has."""
    relearn_steps: tuple[int, ...] = (5, 10, 20, 50, 100)
    """Steps of fine-tuning after which the model is measured, ascending."""
    learning_rate: float = 1e-5
    """Of the fine-tuning."""
    relearn_trained: Trained = "all"
    """What is fine-tuned: all; x: the cross attention, x-strict: its keys and values, u: the rest. The optimizer takes
    16 bytes for each of these weights."""
    inversion_steps: tuple[int, ...] = (50, 100, 200, 500)
    """Steps of inversion after which the model is measured, ascending."""
    inversion_learning_rate: float = 5e-3
    """Learning rate of the word's embedding."""
    initial_word: str | None = None
    """What the word starts from. Default: the cover, or "person"."""
    control: str | None = None
    """A model that never saw the concept, to be attacked in the same way."""
    relabel: str | None = None
    """Run of relabel to compare with. Default: what the run started from, edited in closed form."""
    prompts: str | None = None
    """File of prompts to measure on, in place of the list that comes with the package."""
    near: str | None = None
    """File of near concepts: names, or prompts (nudity)."""
    images_per_prompt: int = 2
    """Images of each prompt of the concept in a measurement."""
    near_images_per_prompt: int = 1
    """Images of each prompt of a near concept."""
    num_inference_steps: int = 25
    """Steps of DDIM."""
    guidance_scale: float = 7.5
    """Guidance of DDIM."""
    detectors: DetectorArguments = field(default_factory=DetectorArguments)
    """What tells whether an image shows the concept."""
    batch_size: int = 4
    """Images in a call of the network. Gradients of all images are summed in every step."""
    mixed_precision: Literal["auto", "no", "bf16"] = "auto"
    """Precision of calls of the network; its weights are float32. auto: bf16 on a GPU, otherwise no."""
    device: str | None = None
    """cpu, cuda, cuda:1, ... Default: a GPU if there is one."""
    seed: int | None = None
    """Seed of everything random. Default: the run's."""
    progress_bar: bool = True
    """Show a progress bar."""

    @property
    def asked(self) -> dict[str, Any]:
        """The options that determine the result for a run, as JSON."""
        values = {name: value for name, value in asdict(self).items() if name not in NEUTRAL}
        return portable(json.loads(json.dumps(values)))

    @property
    def recipe(self) -> TextRelearnOptions:
        """The recipe of the attacks. ValueError or TypeError if an option is out of range."""
        recipe = TextRelearnOptions(
            images=self.relearn_images,
            steps=tuple(self.relearn_steps),
            learning_rate=self.learning_rate,
            embedding_learning_rate=self.inversion_learning_rate,
            inversion_steps=tuple(self.inversion_steps),
            trained=self.relearn_trained,
            batch_size=self.batch_size,
        )
        recipe.check()
        return recipe

    def check(self) -> None:
        """Check what needs no run. ValueError or TypeError, naming the option, if one is wrong."""
        check_literals(self)
        check_int("num_inference_steps", self.num_inference_steps, 1)
        check_number("guidance_scale", self.guidance_scale)
        if len(self.run) != 1:
            raise ValueError(f"run has {len(self.run)} folders, expected one: text-to-image runs are attacked singly")
        if self.concept_images is not None and len(image_files(self.concept_images)) < self.relearn_images:
            raise ValueError(
                f"concept_images is {self.concept_images!r}, expected a folder with at least the {self.relearn_images} "
                "images of relearn_images"
            )
        self.recipe  # noqa: B018  (raises)
