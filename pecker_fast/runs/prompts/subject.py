"""The text-to-image run that is attacked, and the models that it is compared with. One network is loaded at a time."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ... import run_records
from ...checks import check_int
from ...hashing import weights_hash
from ...models import Prediction, StableDiffusion, TextModel, one_step_of, resolve_text, resolve_text_unet
from ...records import RecordError
from ...unlearning import Problem
from ...unlearning.relabel import PromptPhase, PromptRelabelOptions
from ..distilled import Distilled
from ..presets import prompt_preset
from .request import PromptRequestArguments, resolve_prompts
from .task import resolution_of

RELABEL_MISSING = (
    "There is no relabelled model to compare with: the run did not start from a one-step generator that could be "
    "edited (--relabel names the run of one)."
)
CONTROL_MISSING = (
    "The control is missing: a model that never saw the concept (--control names it). Without it these figures do not "
    "tell what relearning is from what any model learns anew."
)


@dataclass(frozen=True)
class Loadable:
    """A network that is loaded on request.

    Parameters
    ----------
    load : callable
        Returns the U-Net, float32 on the CPU.
    prediction : Prediction
        What it predicts.
    source : str
        Where it comes from.
    """

    load: Callable[[], nn.Module]
    prediction: Prediction
    source: str


@dataclass(frozen=True, eq=False)
class PromptSubject:
    """A run on prompts that has ended.

    Parameters
    ----------
    folder, config
        Of the run.
    parts : StableDiffusion
        Text encoders, VAE and scheduler.
    pretrained : TextModel
        The model that the run started from.
    t_init : int or None
        Timestep at which the run draws in one step.
    networks : dict
        "run", and "relabel" (the network that the run started from, edited in closed form) and "control" (one that
        never saw the concept) if there are such.
    resolution : int or None
        Of images in pixels; None: what the model was trained for.
    seed : int
        Of the attacks.
    notes : tuple of str
        What the networks to compare with lack, in words.
    """

    folder: Path
    config: dict[str, Any]
    parts: StableDiffusion
    pretrained: TextModel
    t_init: int | None
    networks: dict[str, Loadable]
    resolution: int | None
    seed: int
    notes: tuple[str, ...]

    @classmethod
    def read(cls, folder: Path, control: str | None, relabel: str | None, seed: int | None) -> "PromptSubject":
        """Read a run. Weights are not read yet.

        Raises
        ------
        ValueError
            If there is no such run, its pretrained model is gone, or a network to compare with draws in another way.
        """
        config = read_prompt_config(folder)
        seed = config["seed"] if seed is None else seed
        check_int("seed", seed, 0)
        run = resolve_text(folder, name="run")
        pretrained = resolve_text(config["pretrained_model_name_or_path"])
        t_init = config["options"].get("t_init")
        request, names = _request(config), {"control": control, "relabel": relabel}
        networks = {"run": Loadable(run.load_unet, run.prediction, str(folder))}
        for name, path in names.items():
            if path is not None:
                networks[name] = _other(name, path, t_init)
        notes = []
        if relabel is None:
            try:
                edited = _relabelled(config, request, pretrained, t_init)
            except ValueError as error:
                edited, reason = None, f" {error}"
            else:
                reason = ""
            if edited is None:
                notes.append(RELABEL_MISSING + reason)
            else:
                networks["relabel"] = edited
        if control is None:
            notes.append(CONTROL_MISSING)
        # In the order in which reports have them.
        networks = {name: networks[name] for name in ("run", "relabel", "control") if name in networks}
        resolution = resolution_of(request, pretrained.parts)
        return cls(folder, config, run.parts, pretrained, t_init, networks, resolution, seed, tuple(notes))

    def load(self, name: str) -> nn.Module:
        """Load one of ``networks``. ValueError if it is of another architecture than the run's."""
        unet = self.networks[name].load()
        expected = self.parts.config("unet")
        for key in ("block_out_channels", "cross_attention_dim", "in_channels", "num_layers", "attention_head_dim"):
            own = unet.config.get(key)
            if key in expected and own is not None and _plain(own) != _plain(expected[key]):
                raise ValueError(f"{name} is {self.networks[name].source!r}, a network of another architecture")
        return unet

    def check_pretrained(self, unet: nn.Module) -> None:
        """Raise ValueError if the weights of the pretrained model are not those that the run started from."""
        if weights_hash(unet) != self.config["pretrained_sha256"]:
            raise ValueError(f"run is {str(self.folder)!r}, whose pretrained model has changed since the run started")


def read_prompt_config(folder: Path) -> dict[str, Any]:
    """config.json of a run of unlearning on prompts. ValueError if the folder is not that of one."""
    try:
        config = run_records.read_config(folder)
    except RecordError as error:
        raise ValueError(f"run is {str(folder)!r}, expected the folder of a run of unlearning: {error}") from error
    if "options" not in config or not config.get("prompts", {}).get("forget"):
        raise ValueError(f"run is {str(folder)!r}, whose config.json is not that of a run of unlearning on prompts")
    return config


def _plain(value: Any) -> Any:
    return tuple(value) if isinstance(value, (list, tuple)) else value


def _request(config: dict[str, Any]) -> PromptRequestArguments:
    """What the run was asked for, from its config.json."""
    names = [item.name for item in dataclasses.fields(PromptRequestArguments)]
    values = {name: config[name] for name in names if name in config}
    if config.get("concepts"):
        # A list of pairs, in place of the file's name.
        values |= {"concepts": None}
    return PromptRequestArguments(**values)


def _other(name: str, path: str, t_init: int | None) -> Loadable:
    """A model to compare with. ValueError if it is not sampled as the run is."""
    model = resolve_text(path, name=name)
    if model.t_init != t_init:
        how = ["in many steps" if t is None else f"in one step at {t}" for t in (model.t_init, t_init)]
        raise ValueError(f"{name} is {path!r}, which draws {how[0]}: expected {how[1]}, as the run does")
    return Loadable(model.load_unet, model.prediction, path)


def _relabelled(
    config: dict[str, Any], request: PromptRequestArguments, pretrained: TextModel, t_init: int | None
) -> Loadable | None:
    """The network that the run started from, edited in closed form when it is loaded; None if it is gone."""
    start, prediction, source = _start(config, pretrained, t_init)
    if start is None:
        return None
    if config.get("concepts"):
        raise ValueError("A run on several concepts is not edited again.")
    prompts = resolve_prompts(request, prompt_preset(config["preset"]), config["seed"]).request
    # Raises now for models without the cross attention that is edited.
    tokens = pretrained.parts.tokenize(prompts.prompts)

    # Computed once: the keys and values of the cross attention are a small part of the network.
    edited: dict[str, Tensor] = {}

    def load() -> nn.Module:
        unet = start()
        if not edited:
            conditioning, _ = pretrained.parts.encode(prompts.prompts)
            network = pretrained.parts.network(conditioning, unet=unet, prediction=prediction)
            problem = Problem(network, pretrained.parts.schedule, prompts, prompt_tokens=tokens)
            phase = PromptPhase(problem, PromptRelabelOptions(), network)
            phase.step(0)
            edited.update({name: param.detach().clone() for name, param in phase.edited.items()})
        with torch.no_grad():
            for name, param in unet.named_parameters():
                if name in edited:
                    param.copy_(edited[name])
        return unet

    return Loadable(load, prediction, source)


def _start(
    config: dict[str, Any], pretrained: TextModel, t_init: int | None
) -> tuple[Callable[[], nn.Module] | None, Prediction, str]:
    """What the run started from, if it draws as the run does, how it predicts, and its name."""
    if t_init is None:
        return pretrained.load_unet, pretrained.prediction, pretrained.source
    distilled, name = config.get("distilled"), config.get("initial_generator")
    kind = config.get("generator_kind", "auto")
    if distilled is not None:
        name, kind = Distilled.read(distilled).networks["initial_generator"], "auto"
    if name is None:
        return None, pretrained.prediction, ""
    one_step = one_step_of(name, kind)
    prediction = pretrained.prediction if one_step is None else one_step.prediction
    load = lambda: resolve_text_unet(name, parts=pretrained.parts, name="initial_generator")  # noqa: E731
    return load, prediction, str(name)
