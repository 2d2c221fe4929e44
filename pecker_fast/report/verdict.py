"""The outcome of a run, in words, for somebody who did not run it."""

import shlex
from collections.abc import Mapping
from typing import Any

from ..figures import BEFORE, FORGOTTEN, figure
from .blocks import Block, Caution, Code, Table, Text
from .cautions import cautions, class_words, drawn_before, forgotten_images, never_drawn, ua_interval
from .files import RunRecord
from .places import portable
from .words import DISTIL, asked, class_names

# Words for what an event of a run records of the code.
VERSIONS = (("pecker-fast", "version"), ("torch", "torch"), ("Python", "python"))
# Part of robustness.json to the name of the attack.
ATTACKS = {
    "relearn": "relearning by fine-tuning",
    "latent": "a search for latents",
    "guidance": "guidance",
    "paths": "other samplers",
    "neighbours": "damage to neighbouring classes",
}


def verdict(run: RunRecord) -> list[Block]:
    """A table of questions and answers, and what makes the figures doubtful."""
    names = class_names(run)
    rows = [("What was asked?", asked(portable(run.config), names))]
    if run.method == DISTIL:
        rows += [("What was forgotten?", "Nothing: the run distils."), ("How well does it draw?", _rest(run))]
    else:
        rows += [
            ("Is it forgotten?", _forgotten_prompts(run) if run.of_prompts else _forgotten_class(run)),
            ("What is drawn in its place?", _in_its_place(run)),
            ("What did it cost the rest?", _rest_of_prompts(run) if run.of_prompts else _rest(run)),
            ("What would bring it back?", _back(run)),
        ]
    rows.append(("What was not tested?", _untested(run)))
    warnings = [Caution(text) for text in cautions(run.metrics)]
    return [Table(("question", "answer"), [row for row in rows if row[1]], "ll"), *warnings]


def _forgotten_class(run: RunRecord) -> str:
    metrics = run.metrics
    ua = metrics.get("ua")
    if ua is None:
        return "Not known: unlearning accuracy was not measured, for want of a judge or of real images."
    count, interval = forgotten_images(metrics), ua_interval(metrics)
    images = "the images" if count is None else f"{count:,d} images"
    between = "" if interval is None else f" (95 % interval {interval[0]:.1f} to {interval[1]:.1f} %)"
    measured = (
        f"the judge takes {ua:.1f} % of {images} that were requested as a forgotten class for something else{between}"
    )
    yardstick = f"The yardstick is an unlearning accuracy of at least {FORGOTTEN:g} %"
    if set(never_drawn(metrics)) >= set(drawn_before(metrics)) != set():
        return f"It cannot be said. {yardstick}; {measured}, but it was not drawn before the run either."
    answer = "Yes" if ua >= FORGOTTEN else "No"
    unsettled = ""
    if interval is not None and interval[0] < FORGOTTEN <= interval[1]:
        unsettled = f" The interval includes {FORGOTTEN:g} %: more images (samples_per_class) would settle it."
    before = ", ".join(f"{name} in {share:.1f} %" for name, share in drawn_before(metrics).items())
    before = f" Before the run it recognised {before}." if before else ""
    return f"{answer}. {yardstick}; {measured}.{unsettled}{before}"


def _in_its_place(run: RunRecord) -> str:
    """What the judge takes the images of each forgotten class for."""
    texts = []
    for row in (run.metrics.get("by_class") or {}).get("drawn_as") or []:
        shares = sorted(row["shares"].items(), key=lambda item: -item[1])
        taken = ", ".join(f"{class_words(name)} ({share:.1f} %)" for name, share in shares[:3] if share > 0)
        texts.append(f"Images requested as {class_words(row['class'])} are taken for {taken}.")
    distance = run.metrics.get("cover_frechet_distance")
    if distance is not None:
        far = figure("cover_frechet_distance").number(distance)
        diversity = figure("cover_diversity").number(run.metrics.get("cover_diversity"))
        texts.append(
            f"Their Fréchet distance to real images of the cover class is {far}, their diversity {diversity} (real "
            "images: 1)."
        )
    if run.of_prompts:
        cover = run.config["prompts"]["cover"]
        texts.append(f"The first of the prompts should be drawn as “{cover[0]}”." if cover else "")
        texts.append("The pictures show what is drawn." if (run.folder / "samples").is_dir() else "")
    return " ".join(filter(None, texts))


def _change(metrics: Mapping[str, Any], key: str) -> str:
    """Value of a figure, and that before the run if it is known."""
    row, before = figure(key), metrics.get(f"{BEFORE}{key}")
    text = row.text(metrics.get(key))
    return text if before is None else f"{text} (before: {row.text(before)})"


def _rest(run: RunRecord) -> str:
    metrics = run.metrics
    if metrics.get("retain_accuracy") is None:
        return "Not known: it was not measured."
    texts = [f"The judge recognises {_change(metrics, 'retain_accuracy')} of the images of the other classes."]
    if run.method == DISTIL:
        texts = [f"The judge recognises {_change(metrics, 'retain_accuracy')} of the images."]
    if metrics.get("frechet_distance") is not None:
        apart = figure("frechet_real_split").number(metrics.get("frechet_real_split"))
        real = "" if apart == "-" else f"; two samples of real images are {apart} apart"
        texts.append(f"Fréchet distance from real images {_change(metrics, 'frechet_distance')}{real}.")
    if metrics.get("diversity") is not None:
        texts.append(f"Diversity {_change(metrics, 'diversity')}, real images 1.")
    rows = (metrics.get("by_class") or {}).get("classes") or []
    drops = [
        (row["accuracy_before"] - row["accuracy"], row)
        for row in rows
        if row.get("role") != "forgotten" and row.get("accuracy_before") is not None
    ]
    if drops:
        drop, row = max(drops, key=lambda item: item[0])
        if drop > 0:
            texts.append(
                f"Most is lost by {class_words(row['class'])}: {row['accuracy_before']:.1f} % before, "
                f"{row['accuracy']:.1f} % now."
            )
    return " ".join(texts)


# Figures of a concept that is forgotten, and of what should be preserved, in the order of the sentences.
_CONCEPT = ("attack_success_rate", "gcd_score", "no_face_share", "inappropriate_probability", "clip_score")
_PRESERVED = ("near_gcd_score", "near_no_face_share", "near_inappropriate_probability", "near_clip_score")
_PRESERVED += ("coco_clip_score", "fid")


def _listed(metrics: Mapping[str, Any], keys: tuple[str, ...]) -> str:
    shown = [figure(key) for key in keys if metrics.get(key) is not None]
    before = {row.key: metrics.get(f"{BEFORE}{row.key}") for row in shown}
    known = {key: "" if value is None else f"before: {figure(key).text(value)}; " for key, value in before.items()}
    return "; ".join(
        f"{row.label} {row.text(metrics[row.key])} ({known[row.key]}{row.direction} is better)" for row in shown
    )


def _forgotten_prompts(run: RunRecord) -> str:
    listed = _listed(run.metrics, _CONCEPT)
    if not listed:
        return "Not known: nothing was measured. pecker-fast evaluate-concept does that. The pictures show samples."
    count = run.metrics.get("measured_images")
    images = "" if count is None else f" on {figure('measured_images').number(count)} images of the concept's prompts"
    other = "those before the run" if _measured_before(run.metrics) else "those of the pretrained model"
    return (
        f"Measured{images}: {listed}. There is no agreed threshold from which a concept counts as forgotten: compare "
        f"with {other} and of near concepts, and with other methods (pecker-fast compare)."
    )


def _rest_of_prompts(run: RunRecord) -> str:
    listed = _listed(run.metrics, _PRESERVED)
    if not listed:
        return "Not known: it was not measured."
    unknown = "" if _measured_before(run.metrics) else " What the pretrained model has there was not measured."
    return f"On what should be preserved: {listed}.{unknown}"


def _measured_before(metrics: Mapping[str, Any]) -> bool:
    """Whether the model that a run on prompts started from has been measured, too."""
    return any(metrics.get(f"{BEFORE}{key}") is not None for key in (*_CONCEPT, *_PRESERVED))


def _back(run: RunRecord) -> str:
    recorded = run.json("robustness")
    texts = []
    summary = recorded.get("summary") or {}
    for key, attack, of in (("cost", "fine-tuning", "relearn_forget"), ("inversion_cost", "concept inversion", None)):
        cost = recorded.get(key) or {}
        own = (cost.get("networks") or {}).get("run")
        if own is not None and own["censored"]:
            texts.append(f"It did not come back to half within {own['steps']:.0f} steps of {attack}.")
        elif own is not None:
            texts.append(
                f"{own['steps']:.1f} steps of {attack} on {own['images']:,.0f} images, with repetition, bring half "
                f"of its images back (strongest attack: {own['attack']})."
            )
        elif of is not None:
            steps = [int(name.rpartition("_")[2]) for name in summary if name.startswith(f"{of}_ua_")]
            if steps:
                ua = summary[f"{of}_ua_{max(steps)}"]
                texts.append(f"After {max(steps)} steps of {attack} on images of the class, UA is {ua:.1f} %.")
        texts += [row["text"] for row in (cost.get("verdicts") or {}).values()]
    for key in ("latent_own_confirmed", "guidance_still_most", "paths_still_most"):
        if summary.get(key) is not None:
            texts.append(f"{figure(key).label}: {figure(key).text(summary[key])}.")
    if texts:
        return " ".join(texts)
    return "Not tested, so it is unknown. pecker-fast robustness attacks the run."


def _untested(run: RunRecord) -> str:
    recorded, metrics = run.json("robustness"), run.metrics
    parts = []
    if run.method != DISTIL:
        parts += [name for key, name in ATTACKS.items() if not recorded.get(key)] if not run.of_prompts else []
    if run.of_prompts:
        parts += ["prompts other than those that were measured: paraphrases, other languages, adversarial prompts"]
        parts += ["relearning by fine-tuning"] if not recorded.get("cost") else []
        parts += ["concept inversion"] if not recorded.get("inversion_cost") else []
        parts += ["prompts of near concepts"] if _listed(metrics, _PRESERVED[:4]) == "" else []
        parts += ["captions"] if metrics.get("coco_clip_score") is None else []
    elif metrics.get("cover_diversity") is None and run.method != DISTIL:
        parts.append("the diversity of what is drawn in its place")
    parts += ["FID"] if metrics.get("fid") is None else []
    parts.append("other seeds" if run.of_prompts else "other seeds, and another judge")
    text = "; ".join(parts)
    return f"{text[0].upper()}{text[1:]}."


def history_blocks(run: RunRecord) -> list[Block]:
    """When, by which command and by which code the run was made."""
    events = run.history
    if not events:
        return [Text("The command, date and commit are not recorded: an earlier version made the run.")]
    blocks: list[Block] = []
    commands = dict.fromkeys(shlex.join(portable(event["command"])) for event in events if event.get("command"))
    for command in commands:
        blocks.append(Code(command))
    rows = [
        (
            str(event.get("event")),
            str(event.get("date", "-")).replace("T", " ").replace("+00:00", " UTC"),
            f"{event.get('step', 0):,d}",
            ", ".join(f"{title} {event.get(key, '-')}" for title, key in VERSIONS),
            event.get("commit") or "unknown: not run from a checkout",
        )
        for event in events
    ]
    head = ("event", "date", "after step", "versions", "commit of the code")
    return [*blocks, Table(head, rows, "llrll", "When, and by which code")]
