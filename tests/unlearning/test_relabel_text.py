"""Relabel on prompts: the closed form against the normal equations in numpy, tokens, and a run on the command line."""

import copy
import json

import numpy as np
import pytest
import torch

from pecker_fast import unlearn
from pecker_fast.cli import main
from pecker_fast.diffusion import NoiseSchedule, PromptTable, TextConditioned
from pecker_fast.models import StableDiffusion, resolve_text
from pecker_fast.unlearning import PromptRequest, Setting, method_class
from pecker_fast.unlearning.closed_form import ClosedFormOptions, edit_matrix, last_token, own_token
from pecker_fast.unlearning.relabel import PromptRelabelOptions, RelabelOptions
from tests.commands.case import fails
from tests.diffusion.tiny_sd import WIDTH, tiny_schedule, tiny_unet, write_stable_diffusion
from tests.inputs import same_bits
from tests.unlearning.settings import setting_of
from tests.unlearning.test_prompts import Prompted

# In pairs of one row for a token, and places in the prompt.
REQUEST = PromptRequest(("a dog", "a cat on a mat"), ("brad pitt smiles", "pitt"), ("a man smiles", "man"))
# Tokens of its prompts: start 90, end 91.
TOKENS = {
    "": [90, 91],
    "a dog": [90, 1, 2, 91],
    "a cat on a mat": [90, 1, 3, 4, 1, 5, 91],
    "brad pitt smiles": [90, 6, 7, 8, 91],
    "pitt": [90, 7, 91],
    "a man smiles": [90, 1, 9, 8, 91],
    "man": [90, 9, 91],
}
# The place of "pitt" and of "man" in each pair.
PLACES = [((3, 2), (5, 2)), ((4, 1), (6, 1))]
LAST = {"a dog": 2, "a cat on a mat": 5}


@pytest.fixture
def network() -> TextConditioned:
    # As of a text encoder: about 1 in every dimension.
    table = PromptTable(torch.randn(len(REQUEST.prompts), 9, WIDTH))
    return TextConditioned(tiny_unet(), table, tiny_schedule())


def make(network, tokens=True, **options):
    problem = {"prompt_tokens": [TOKENS[text] for text in REQUEST.prompts]} if tokens else {}
    setting = setting_of(teacher=network, schedule=tiny_schedule(), request=REQUEST, **problem)
    return method_class("relabel")(setting, PromptRelabelOptions(eval_sampler="ddim", num_inference_steps=2, **options))


def projections(network) -> dict[str, np.ndarray]:
    return {
        name: value.detach().double().numpy()
        for name, value in network.state_dict().items()
        if ".attn2.to_k." in name or ".attn2.to_v." in name
    }


def vectors_by_hand(network, edited: str, preserved: str):
    """c_i, c_i* and c_j, float64 arrays of rows."""
    table = network.table.embeddings.double().numpy()
    label = {text: i for i, text in enumerate(REQUEST.prompts)}
    assert list(label) == list(TOKENS)
    if edited == "last":
        c = [table[forget] for forget, _ in PLACES]
        target = [table[cover] for _, cover in PLACES]
    else:
        pairs = [(text, cover, place) for text, cover in zip(REQUEST.forget, REQUEST.cover, strict=True)
                 for place in range(9)]  # fmt: skip
        c = [table[label[text], place] for text, _, place in pairs]
        target = [table[label[cover], place] for _, cover, place in pairs]
    keep = [*table[label[""]]]
    for text, place in LAST.items():
        keep += [table[label[text], place]] if preserved == "last" else [*table[label[text]]]
    return np.array(c), np.array(target), np.array(keep)


@pytest.mark.parametrize(("edited", "preserved"), [("last", "last"), ("last", "all"), ("all", "last"), ("all", "all")])
def test_normal_equations(network, edited, preserved):
    old = projections(network)
    scales = {"erase_scale": 0.7, "preserve_scale": 1.6, "regularization": 0.3}
    method = make(network, edited_tokens=edited, preserved_tokens=preserved, **scales)
    c, target, keep = vectors_by_hand(network, edited, preserved)
    phase = method.phases[0]
    phase.start(None)
    assert phase.step(0) == {}
    new = projections(method.network)
    assert len(old) == len(new) > 2
    # sum over single vectors, as the paper has it.
    left, right = np.zeros((WIDTH, WIDTH)), 0.3 * np.eye(WIDTH)
    for one, other in zip(c, target, strict=True):
        left += 0.7 * np.outer(other, one)
        right += 0.7 * np.outer(one, one)
    for one in keep:
        left += 1.6 * np.outer(one, one)
        right += 1.6 * np.outer(one, one)
    left += 0.3 * np.eye(WIDTH)
    for name, weight in new.items():
        # W M = W_old (...): both sides of the normal equations, up to the rounding of the stored weights.
        np.testing.assert_allclose(weight @ right, old[name] @ left, rtol=0, atol=1e-5 * np.abs(right).max())
        direct = old[name] @ left @ np.linalg.inv(right)
        np.testing.assert_allclose(weight, direct, rtol=0, atol=2e-6)
        # The objective cannot exceed its value at the old weights, where only the erased vectors count.
        moved = (weight - old[name]) @ keep.T
        assert 1.6 * (moved**2).sum() <= 0.7 * ((old[name] @ (target - c).T) ** 2).sum() * (1 + 1e-6)
    assert method.network.unet.config.cross_attention_dim == WIDTH
    record = phase.describe()
    missed, change, outputs, kept = 0.0, 0.0, 0.0, 0.0
    for name, weight in new.items():
        missed += ((weight @ c.T - old[name] @ target.T) ** 2).sum()
        outputs += ((old[name] @ target.T) ** 2).sum()
        change += (((weight - old[name]) @ keep.T) ** 2).sum()
        kept += ((old[name] @ keep.T) ** 2).sum()
    assert record["edit_error"] == pytest.approx(np.sqrt(missed / outputs), rel=1e-3)
    assert record["preserve_change"] == pytest.approx(np.sqrt(change / kept), rel=1e-3)


def test_only_keys_and_values_change_and_the_state_resumes(network):
    before = {name: value.clone() for name, value in network.state_dict().items()}
    method, other = make(network), make(network)
    method.phases[0].step(0)
    other.phases[0].load_state_dict(copy.deepcopy(method.phases[0].state_dict()))
    assert other.phases[0].describe() == method.phases[0].describe() != {}
    edited = set(projections(network))
    for name, value in method.network.state_dict().items():
        assert same_bits(value, before[name]) == (name not in edited), name
        assert same_bits(value, other.network.state_dict()[name])
    assert all(same_bits(value, before[name]) for name, value in network.state_dict().items())
    trained = {name for name, param in method.network.named_parameters() if param.requires_grad}
    assert trained == edited and method.phases[0].is_finite()
    state = method.phases[0].state_dict()
    with pytest.raises(ValueError, match="another network"):
        other.phases[0].load_state_dict({**state, next(iter(edited)): torch.zeros(1)})


def test_independent_vectors_are_mapped_exactly():
    """Fewer vectors than dimensions, and hardly any regularization: the edit and the preservation are both exact."""
    draw = np.random.default_rng(0)
    c, target, keep = (torch.from_numpy(draw.standard_normal((n, WIDTH))) for n in (3, 3, 8))
    weight = torch.from_numpy(draw.standard_normal((5, WIDTH)))
    options = ClosedFormOptions(regularization=1e-9)
    new = weight @ edit_matrix(c, target, [keep[:5], keep[5:]], options)
    torch.testing.assert_close(new @ c.T, weight @ target.T, rtol=0, atol=1e-6)
    torch.testing.assert_close(new @ keep.T, weight @ keep.T, rtol=0, atol=1e-6)
    # Where they conflict, the larger weight wins.
    same = c[:1]
    for erase, preserve, wanted in ((1e7, 1.0, target[:1]), (1.0, 1e7, same)):
        scales = ClosedFormOptions(erase_scale=erase, preserve_scale=preserve, regularization=1e-3)
        new = weight @ edit_matrix(same, target[:1], [same], scales)
        torch.testing.assert_close(new @ same.T, weight @ wanted.T, rtol=0, atol=1e-5)


def test_all_tokens_make_the_prompt_its_cover(network):
    method = make(network, edited_tokens="all", erase_scale=1e6, preserve_scale=0.0, regularization=1e-6)
    # 2 prompts of 9 vectors span the 16 dimensions, so this is a least-squares fit; one prompt alone is exact.
    forget, cover = REQUEST.labels([REQUEST.forget[0], REQUEST.cover[0]])
    method.phases[0].step(0)
    error = method.phases[0].describe()["edit_error"]
    assert 0 < error < 1
    single = PromptRequest(("a dog",), (REQUEST.forget[0],), (REQUEST.cover[0],))
    table = PromptTable(torch.randn(len(single.prompts), 9, WIDTH))
    own = TextConditioned(network.unet, table, tiny_schedule())
    setting = setting_of(teacher=own, schedule=tiny_schedule(), request=single)
    options = {"edited_tokens": "all", "preserved_tokens": "all", "preserve_scale": 0.0, "regularization": 1e-9}
    method = method_class("relabel")(
        setting, PromptRelabelOptions(eval_sampler="ddim", num_inference_steps=2, **options)
    )
    method.phases[0].step(0)
    x, t = torch.randn(1, 4, 8, 8), torch.tensor([500])
    forget, cover = single.labels([single.forget[0], single.cover[0]])
    with torch.no_grad():
        (now,) = method.network(x, t, torch.tensor([forget]))
        (covered,) = own(x, t, torch.tensor([cover]))
        (before,) = own(x, t, torch.tensor([forget]))
    torch.testing.assert_close(now, covered, rtol=0, atol=1e-4)
    assert (before - covered).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("text", "other", "places"),
    [
        ("brad pitt smiles", "a man smiles", (2, 2)),
        ("pitt", "man", (1, 1)),
        # The concept is left out: the cover's last token.
        ("a cat on a mat", "a mat", (4, 2)),
        ("", "pitt", (1, 1)),
        ("a dog", "a dog", (2, 2)),
    ],
)
def test_last_token_of_the_concept(text, other, places):
    tokens = {**TOKENS, "a mat": [90, 1, 5, 91]}
    assert own_token(tokens[text], tokens[other]) == places[0]
    assert own_token(tokens[other], tokens[text]) == places[1]
    assert last_token(tokens[""]) == 1 and last_token(tokens["pitt"]) == 1 and last_token(tokens["a dog"]) == 2


def test_wrong_inputs(network):
    for name, value in (
        ("erase_scale", 0.0), ("preserve_scale", -1.0), ("regularization", float("nan")), ("edited_tokens", "first"),
        ("preserved_tokens", "none"), ("eval_guidance_scale", -1.0), ("t_init", 1000),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=name):
            make(network, **{name: value})
    with pytest.raises(ValueError, match="prompt_tokens is not given"):
        make(network, tokens=False)
    assert make(network, tokens=False, edited_tokens="all", preserved_tokens="all").phases
    with pytest.raises(ValueError, match=r"regularization is 0, and the vectors .* do not span all 16 dimensions"):
        make(network, regularization=0.0)
    with pytest.raises(ValueError, match="t_init is 625, but there is no one-step generator"):
        make(network, t_init=625)
    with pytest.raises(ValueError, match="no cross attention"):
        toy = Prompted(classes=len(REQUEST.prompts))
        setting = setting_of(teacher=toy, schedule=NoiseSchedule.linear(), request=REQUEST)
        method_class("relabel")(setting, PromptRelabelOptions())
    with pytest.raises(TypeError, match="expected PromptRelabelOptions"):
        method_class("relabel")(setting_like(network), RelabelOptions())


def setting_like(network) -> Setting:
    return setting_of(teacher=network, schedule=tiny_schedule(), request=REQUEST)


def arguments(base, folder, retain, *more: str) -> list[str]:
    return [
        "unlearn", "--preset", "sd15-celebrity", "--method", "relabel", "--pretrained_model_name_or_path", str(base),
        "--retain_prompts", str(retain), "--num_inference_steps", "2", "--sample_steps", "2", "--samples_per_prompt",
        "1", "--no-progress_bar", "--device", "cpu", "--output_dir", str(folder), *more,
    ]  # fmt: skip


def test_a_run(tmp_path, capsys):
    from diffusers import StableDiffusionPipeline

    base, retain = write_stable_diffusion(tmp_path / "base"), tmp_path / "retain.txt"
    retain.write_text("a dog\na cat\n")
    run = tmp_path / "run"
    main(arguments(base, run, retain))
    output = capsys.readouterr().out
    assert str(run / "report.md") in output
    config, metrics = (json.loads((run / name).read_text()) for name in ("config.json", "metrics.json"))
    defaults = {"edited_tokens": "last", "preserved_tokens": "last", "erase_scale": 1.0, "preserve_scale": 1.0}
    assert defaults.items() <= config["options"].items() and config["options"]["regularization"] == 0.1
    assert (metrics["images"], metrics["iterations"], metrics["sampler"]) == (0, 1, "ddim")
    assert metrics["seconds"] < 5 and metrics["guidance_scale"] == 7.5
    log = json.loads((run / "train.jsonl").read_text())
    # What the command line did is what the equation says, with the tokens of this tokenizer.
    model = resolve_text(base).parts
    pairs = (f"a photo of {name}" for name in ("brad pitt", "a middle aged man"))
    forget, cover = model.tokenize(tuple(pairs))
    names = [model.load_tokenizer().convert_ids_to_tokens(ids) for ids in (forget, cover)]
    assert (names[0][own_token(forget, cover)], names[1][own_token(cover, forget)]) == ("t</w>", "man</w>")
    assert 0 < log["edit_error"] < 1 and 0 < log["preserve_change"] < 1
    old, new = (StableDiffusion(folder).load_unet().state_dict() for folder in (base, run))
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed and changed == {name for name in old if ".attn2.to_k." in name or ".attn2.to_v." in name}
    pipe = StableDiffusionPipeline.from_pretrained(run, safety_checker=None)
    assert len(pipe("a dog", num_inference_steps=1).images) == 1
    card, report = ((run / name).read_text() for name in ("README.md", "report.md"))
    assert "StableDiffusionPipeline" in card and "without training" in card and "?" not in card.split("##")[1]
    assert "the keys and values of the cross attention are edited" in report
    # The same from Python, and all tokens; then wrong options on the command line.
    options = {"retain_prompts": str(retain), "num_inference_steps": 2, "sample_steps": 2, "samples_per_prompt": 1}
    options |= {"progress_bar": False, "device": "cpu", "edited_tokens": "all", "preset": "sd15-celebrity"}
    other = unlearn(base, "relabel", forget="brad pitt", output_dir=str(tmp_path / "all"), **options)
    assert other.metrics["weights_sha256"] != metrics["weights_sha256"] and other.pipeline is not None
    capsys.readouterr()
    assert "erase_scale is 0.0" in fails(capsys, *arguments(base, tmp_path / "no", retain, "--erase_scale", "0"))
    assert "edited_tokens" in fails(capsys, *arguments(base, tmp_path / "no", retain, "--edited_tokens", "first"))
    assert "erase_scale" in fails(capsys, "unlearn", "--preset", "digits", "--method", "relabel", "--erase_scale", "2")
    assert not (tmp_path / "no" / "config.json").exists()


def test_a_one_step_generator_is_edited(tmp_path):
    from diffusers import DiffusionPipeline

    base, retain = write_stable_diffusion(tmp_path / "base"), tmp_path / "retain.txt"
    retain.write_text("a dog\na cat\n")
    tiny_unet().save_pretrained(tmp_path / "one-step")
    more = ["--initial_generator", str(tmp_path / "one-step"), "--t_init", "625"]
    main(arguments(base, tmp_path / "run", retain, *more))
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert (metrics["sampler"], metrics["sampling_steps"]) == ("one_step", 1)
    pipe = DiffusionPipeline.from_pretrained(
        tmp_path / "run", custom_pipeline=str(tmp_path / "run"), trust_remote_code=True
    )
    assert pipe.config.t_init == 625 and len(pipe("a dog").images) == 1
