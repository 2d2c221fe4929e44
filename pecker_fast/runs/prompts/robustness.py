"""Attacks on a text-to-image run: how much it takes to bring back the concept that it has forgotten."""

import hashlib
import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ...data.prompts import names_concept, override
from ...diffusion import Sampler
from ...environment import environment
from ...files import write_json
from ...hashing import weights_hash
from ...locks import PATIENCE, locked
from ...metrics import ConceptMeter, to_uint8
from ...records import RecordError, read_object
from ...report import PROMPT_WIDTH, portable, save_side_by_side, write_prompt_robustness_report
from ...robustness import (
    INVERSION,
    WORD,
    TextAdversary,
    TextExaminer,
    TextRelearnOptions,
    attack_text,
    text_attacks_on,
)
from ...run_records import read_file
from ...unlearning.streams import derived_seed
from ..arguments import device_of
from ..audit import update_metrics
from ..robustness import Attacked, names_in
from ..robustness_figures import costs_of_prompts
from ..samples import SampleCache
from .measure import MeasureArguments, image_files, real_image
from .parts import Concept, Part, covered, near_alternatives, prompts_of
from .robustness_arguments import PromptRobustnessArguments
from .sampling import PromptSampler, SamplerOptions
from .sheets import small
from .subject import PromptSubject

# What costs are of.
KINDS = {"cost": "Fine-tuning", "inversion_cost": "Concept inversion"}
# Prompts in the pictures of an attack.
PICTURED = 6
# What prompts with a name that is not to be replaced have: "..., <learned>".
JOINED = "{prompt}, {word}"


@dataclass(frozen=True, eq=False)
class Judges:
    """What tells whether an image shows the concept, and what the images of near concepts show.

    Parameters
    ----------
    own, near : dict
        Arguments of ``ConceptMeter`` for the concept's prompts and for those of near concepts.
    """

    own: dict[str, Any]
    near: dict[str, Any]

    def concept(self, images: Tensor, _rows: Sequence[int]) -> dict[str, float | None]:
        """UA in percent, of images of all prompts."""
        meter = ConceptMeter(**self.own)
        meter.add(images)
        return {"ua": meter.ua()}

    def others(self, images: Tensor, _rows: Sequence[int]) -> dict[str, float | None]:
        """The figures of near concepts."""
        meter = ConceptMeter(**self.near)
        meter.add(images)
        return {f"near_{name}": value for name, value in meter.result().items() if isinstance(value, float)}


@dataclass(frozen=True, eq=False)
class _Attack:
    """Everything that is made once for all networks."""

    args: PromptRobustnessArguments
    subject: PromptSubject
    recipe: TextRelearnOptions
    attacks: tuple[str, ...]
    sampler: Sampler
    by_ddim: Sampler
    judges: Judges
    texts: tuple[str, ...]
    trained: tuple[str, ...]
    device: torch.device

    def label(self, text: str) -> int:
        return self.texts.index(text)

    @property
    def concept(self) -> list[int]:
        return self._labels(self.judges.own)

    @property
    def near(self) -> list[int]:
        return self._labels(self.judges.near)

    def _labels(self, meter: dict[str, Any]) -> list[int]:
        return [self.label(text) for text in meter["prompts"] for _ in range(meter["images_per_prompt"])]


def attack_prompts(args: PromptRobustnessArguments) -> Attacked:
    """Attack a text-to-image run by relearning and by concept inversion.

    Writes robustness.json, robustness.md, robustness.html and robustness.png into the folder of the run, and the main
    figures into its metrics.json. An attack that is complete is kept in evaluation/: an interrupted command continues
    with the next one. One network is in memory at a time.

    Parameters
    ----------
    args : PromptRobustnessArguments
        The run and the options.

    Returns
    -------
    Attacked
        The main figures, verdicts in words, and the report.

    Raises
    ------
    ValueError, TypeError
        If an option is wrong, nothing tells whether an image shows the concept, or the folder is not that of a run of
        unlearning on prompts. Nothing has been written then.
    """
    start = time.perf_counter()
    attack = _prepare(args)
    subject = attack.subject
    conditioning, _ = subject.parts.encode(attack.texts, attack.device)
    images = _adversary_images(attack)
    latents = subject.parts.encode_images(images.float() / 127.5 - 1, attack.device, args.batch_size)
    adversary = _adversary(attack, latents)
    vae = subject.parts.load_vae().to(attack.device)

    def decode(latents: Tensor) -> Tensor:
        return to_uint8(subject.parts.decode(latents, attack.device, args.batch_size, vae=vae))

    bf16 = args.mixed_precision == "bf16" or (args.mixed_precision == "auto" and attack.device.type == "cuda")
    autocast = partial(torch.autocast, attack.device.type, torch.bfloat16) if bf16 else nullcontext
    examiner = TextExaminer(
        subject.parts.schedule.to(attack.device),
        attack.sampler,
        attack.by_ddim,
        attack.concept,
        attack.near,
        decode,
        attack.judges.concept,
        attack.judges.others,
        subject.seed,
        autocast,
    )
    key = _key_of_all(attack, adversary, conditioning)
    make = partial(_network, attack, conditioning)
    rows: list[dict[str, Any]] = []
    hashes: dict[str, str] = {}
    total = sum(attack.recipe.work(name) for name in attack.attacks) * len(subject.networks)
    pretrained = _pretrained(attack, examiner, make, key)
    with tqdm(total=total, desc="robustness", unit="step", disable=not args.progress_bar, dynamic_ncols=True) as bar:
        for network in subject.networks:
            for name in attack.attacks:
                digest = hashes.get(network)
                part, hashes[network] = _attacked(attack, examiner, adversary, make, key, network, name, digest, bar)
                rows += part
    protocol = {
        "seed": subject.seed,
        "sampler": attack.sampler.name,
        "judge": ConceptMeter(**attack.judges.own).describe(),
        "decided_by": ConceptMeter(**attack.judges.own).judge,
        "samples": {
            "images of the concept": len(attack.concept),
            "images of near concepts": len(attack.near),
        },
        "relearn": {
            **asdict(attack.recipe),
            "images_are": "drawn by the pretrained model" if args.concept_images is None else "given",
            "images_shown_ua": _ua_of(attack, images),
            "pretrained": pretrained,
        },
        "initial_word": adversary.initial_word,
        "control": args.control,
        "relabel": args.relabel,
        "notes": list(subject.notes),
        "weights_sha256": hashes,
    }
    return _write(attack, protocol, rows, time.perf_counter() - start)


def _prepare(args: PromptRobustnessArguments) -> _Attack:
    """Read the run, and check all options."""
    args.check()
    device = device_of(args.device)
    subject = PromptSubject.read(Path(args.run[0]), args.control, args.relabel, args.seed)
    config, steps = subject.config, args.num_inference_steps
    schedule = subject.parts.schedule
    sizes = {"batch_size": args.batch_size}
    by_ddim = Sampler("ddim", num_inference_steps=steps, guidance_scale=args.guidance_scale, **sizes)
    sampler = by_ddim if subject.t_init is None else Sampler("one_step", t_init=subject.t_init, **sizes)
    for used in (sampler, by_ddim):
        used.check(schedule.num_train_timesteps)
    chosen = names_in("attacks", args.attacks, text_attacks_on(Sampler("one_step", t_init=0))) if args.attacks else None
    attacks = text_attacks_on(sampler, chosen)
    if not subject.parts.learns_words:
        if chosen and INVERSION in chosen:
            raise ValueError(f"attacks has {INVERSION!r}, but {subject.parts.name} has text encoders other than CLIP's")
        attacks = tuple(name for name in attacks if name != INVERSION)
    concept = _concept(args, config)
    trained = tuple(
        text for text in config["prompts"]["forget"] if concept.name is None or names_concept(text, concept.name)
    ) or tuple(config["prompts"]["forget"])
    measured = MeasureArguments(
        prompts=args.prompts,
        near=args.near,
        images_per_prompt=args.images_per_prompt,
        near_images_per_prompt=args.near_images_per_prompt,
    )
    task = config.get("task") or ("celebrity" if concept.name else "nudity")
    prompts, parts, count, _ = prompts_of(measured, task, [concept], config["prompts"]["forget"])
    judges = _judges(args, task, device, prompts, parts, count)
    learned = [_learned(text, concept.name) for text in (*trained, *prompts.prompts)] if INVERSION in attacks else []
    texts = tuple(dict.fromkeys(["", *trained, *prompts.prompts, *prompts.near, *learned]))
    return _Attack(args, subject, args.recipe, attacks, sampler, by_ddim, judges, texts, trained, device)


def _concept(args: PromptRobustnessArguments, config: dict[str, Any]) -> Concept:
    """The concept that is brought back, and its cover. ValueError if it is not one of the run's."""
    several = {name: cover for name, cover in config.get("concepts") or ()}
    if several:
        if args.concept not in several:
            raise ValueError(f"concept is {args.concept!r}, expected one of those of the run: {', '.join(several)}")
        return Concept(args.concept, several[args.concept])
    if args.concept not in (None, config.get("concept")):
        raise ValueError(f"concept is {args.concept!r}, expected that of the run, {config.get('concept')!r}")
    return Concept(config.get("concept"), config.get("cover"))


def _judges(
    args: PromptRobustnessArguments, task: str, device: torch.device, prompts: Any, parts: list[Part], count: int
) -> Judges:
    """What judges images. ValueError if nothing tells whether an image shows the concept."""
    detectors = args.detectors.load(task, device)
    named = detectors.get("celebrities") is not None
    covered = [text for part in parts for text in part.alternatives]
    if not (named or detectors.get("unsafe") or (detectors["clip"] is not None and covered)):
        raise ValueError(
            "clip is not given, and no other detector is: expected something that tells whether an image shows the "
            "concept, --clip with a cover, --celebrity_detector, or NudeNet for nudity"
        )
    names = [part.concept.name for part in parts for _ in part.rows] if named else ()
    own = {"prompts": prompts.prompts, "images_per_prompt": count, "names": names, "alternatives": covered, **detectors}
    meter = ConceptMeter(**own)
    if meter.unknown:
        raise ValueError(f"the celebrity detector does not know {meter.unknown[0]!r}")
    near = {
        "prompts": prompts.near,
        "images_per_prompt": args.near_images_per_prompt,
        "names": prompts.near_concepts if named else (),
        "alternatives": near_alternatives(parts),
        **detectors,
    }
    return Judges(own, near)


def _learned(text: str, name: str | None) -> str:
    """A prompt with the new word in place of the concept's name, or behind it."""
    if name is not None and names_concept(text, name):
        return override([text], name, WORD)[0]
    return JOINED.format(prompt=text, word=WORD)


def _adversary_images(attack: _Attack) -> Tensor:
    """The adversary's images, uint8 (n, 3, H, W)."""
    args, subject, count = attack.args, attack.subject, attack.recipe.images
    seed = derived_seed(subject.seed, "relearn images")
    size = subject.parts.vae_scale_factor * subject.parts.latent_size(subject.resolution)
    if args.concept_images is not None:
        files = image_files(args.concept_images)
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:count]
        return torch.stack([real_image(files[i], size) for i in sorted(order.tolist())])
    options = SamplerOptions("ddim", resolution=subject.resolution)
    texts = _texts_of_images(attack)
    sampler = PromptSampler(subject.pretrained, options, texts, attack.device, "auto", args.batch_size)
    items = torch.tensor([(i, seed + i) for i in range(count)])
    described = {**sampler.describe(texts), "seed": seed}
    cache = SampleCache(subject.folder / "evaluation", described, sampler.drawing(texts), args.batch_size)
    return cache.samples(items, seed, args.progress_bar)


def _texts_of_images(attack: _Attack) -> list[str]:
    """The prompt of each of the adversary's images: those that the run was trained to forget, spread and in turn."""
    count, texts = attack.recipe.images, attack.trained
    spread = texts[:: max(1, len(texts) // count)]
    return [spread[i % len(spread)] for i in range(count)]


def _adversary(attack: _Attack, latents: Tensor) -> TextAdversary:
    texts = _texts_of_images(attack)
    labels = torch.tensor([attack.label(text) for text in texts], device=attack.device)
    word = attack.args.initial_word
    concept = _concept(attack.args, attack.subject.config)
    word = (concept.cover or "person") if word is None else word
    if INVERSION not in attack.attacks:
        return TextAdversary(latents.to(attack.device), labels, initial_word=word)
    learned = {text: _learned(text, concept.name) for text in (*texts, *attack.judges.own["prompts"])}
    numbers = {text: attack.label(new) for text, new in learned.items()}
    measured = [numbers[attack.texts[label]] for label in attack.concept]
    own = torch.tensor([numbers[text] for text in texts], device=attack.device)
    by_label = {numbers[text]: new for text, new in learned.items()}
    return TextAdversary(latents.to(attack.device), labels, by_label, own, measured, word)


def _network(attack: _Attack, conditioning: Any, name: str) -> tuple[Any, str]:
    """A network of the subject on the device with its prompts, and the hash of its weights."""
    subject = attack.subject
    if name == "pretrained":
        unet, prediction = subject.pretrained.load_unet(), subject.pretrained.prediction
        subject.check_pretrained(unet)
    else:
        unet, prediction = subject.load(name), subject.networks[name].prediction
    digest = weights_hash(unet)
    return subject.parts.network(conditioning, subject.resolution, unet, prediction).to(attack.device), digest


def _key_of_all(attack: _Attack, adversary: TextAdversary, conditioning: Any) -> dict[str, Any]:
    """What the rows of all attacks depend on besides the network and the attack, as JSON."""
    digest = hashlib.sha256()
    for tensor in (adversary.latents, *(rows for _, rows in conditioning.items())):
        digest.update(tensor.cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return {
        "recipe": asdict(attack.recipe),
        "texts": attack.texts,
        "labels": [attack.concept, attack.near, adversary.labels.tolist()],
        "inputs_sha256": digest.hexdigest(),
        "judge": ConceptMeter(**attack.judges.own).describe(),
        "alternatives": [attack.judges.own["alternatives"], attack.judges.near["alternatives"]],
        "samplers": [attack.sampler.describe(), attack.by_ddim.describe()],
        "initial_word": adversary.initial_word,
        "seed": attack.subject.seed,
        "mixed_precision": attack.args.mixed_precision,
        "resolution": attack.subject.resolution,
    }


def _cached(attack: _Attack, key: dict[str, Any]) -> tuple[Path, dict[str, Any] | None]:
    """Where the result of an attack is kept, and the result if it is there."""
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    path = attack.subject.folder / "evaluation" / f"robustness-{name}.json"
    try:
        return path, read_object(path)
    except RecordError:
        return path, None


def _pretrained(attack: _Attack, examiner: TextExaminer, make: Any, key: dict[str, Any]) -> dict[str, Any]:
    """What the pretrained model draws, by DDIM: how far a revival can go."""
    path, kept = _cached(attack, {**key, "network": attack.subject.config["pretrained_sha256"], "attack": None})
    if kept is None:
        network, _ = make("pretrained")
        figures, _ = examiner.measure(network, attack.by_ddim)
        kept = {attack.by_ddim.name: figures}
        path.parent.mkdir(exist_ok=True)
        write_json(path, kept)
    return kept


def _attacked(
    attack: _Attack,
    examiner: TextExaminer,
    adversary: TextAdversary,
    make: Any,
    key: dict[str, Any],
    name: str,
    kind: str,
    digest: str | None,
    bar: tqdm,
) -> tuple[list[dict[str, Any]], str]:
    """The rows of an attack on one of the networks, from an earlier call if it has been made; and its hash.

    ``digest``: the hash, if it is known, so that a network whose attack has been made is not loaded.
    """
    network, digest = make(name) if digest is None else (None, digest)
    path, kept = _cached(attack, {**key, "network": digest, "attack": kind})
    picture = attack.subject.folder / "samples" / f"relearn-{name}-{kind}.png"
    if kept is not None and picture.is_file():
        bar.update(attack.recipe.work(kind))
        return [{"network": name, "data": "forgotten", **row} for row in kept["rows"]], digest
    if network is None:
        network, _ = make(name)
    # By sampler, and by the number of steps.
    sheets: dict[str, dict[int, Tensor]] = {}
    each = attack.judges.own["images_per_prompt"]
    shown = range(0, min(PICTURED * each, len(attack.concept)), each)

    def show(step: int, sampler: Sampler, images: Tensor) -> None:
        sheets.setdefault(sampler.name, {})[step] = small(images[list(shown)])

    parts = attack.subject.parts
    rows = attack_text(
        network,
        examiner,
        adversary,
        kind,
        attack.recipe,
        lambda: parts.load_encoders(attack.device),
        parts.embed,
        show,
        bar.update,
    )
    # Fine-tuning as a diffusion model shows in many steps, which come last.
    by_step = list(sheets.values())[-1]
    ends = {f"{step} steps": by_step[step] for step in (min(by_step), max(by_step))}
    picture.parent.mkdir(exist_ok=True)
    titles = [attack.judges.own["prompts"][i // each] for i in shown]
    save_side_by_side(picture, ends, torch.arange(len(titles)), titles, names_width=PROMPT_WIDTH)
    path.parent.mkdir(exist_ok=True)
    write_json(path, {"rows": rows})
    return [{"network": name, "data": "forgotten", **row} for row in rows], digest


def _ua_of(attack: _Attack, images: Tensor) -> float | None:
    """UA of the adversary's images themselves by the same judge: what it takes for the concept."""
    own, texts = attack.judges.own, _texts_of_images(attack)
    concept = _concept(attack.args, attack.subject.config)
    named = [concept.name] * len(texts)
    own = {**own, "prompts": texts, "images_per_prompt": 1, "names": named if own["names"] else ()}
    own["alternatives"] = covered(texts, named, concept.cover)
    meter = ConceptMeter(**own)
    meter.add(images)
    return meter.ua()


def _write(attack: _Attack, protocol: dict[str, Any], rows: list[dict[str, Any]], seconds: float) -> Attacked:
    subject, config = attack.subject, attack.subject.config
    costs, figures = costs_of_prompts(rows)
    record = {
        "method": config.get("method"),
        "task": config.get("task"),
        "concept": attack.args.concept or config.get("concept"),
        "cover": config.get("cover"),
        "summary": figures,
        "relearn": rows,
        **costs,
        "seconds": seconds,
        "asked": attack.args.asked,
        "protocol": {**protocol, "environment": environment()},
    }
    folder = subject.folder
    with locked(folder, PATIENCE):
        write_json(folder / "robustness.json", portable(record))
        metrics = read_file(folder, "metrics")
        report = write_prompt_robustness_report(folder)
        update_metrics(folder, {**metrics, **figures})
    words = [f"{KINDS[key]}: {verdict['text']}" for key, cost in costs.items() for verdict in cost["verdicts"].values()]
    return Attacked(figures, [*words, *subject.notes], report)
