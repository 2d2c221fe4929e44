"""Prompt lists: the package's lists, covers, keywords, disjointness, and the user's files."""

import csv
import random
from collections import Counter

import pytest

from pecker_fast.data import prompts as p


def test_lists_of_the_package():
    counts = {name: len(p.load_prompts(name)) for name in p.shipped_prompts()}
    assert counts["celebrity-train"] == counts["celebrity-eval"] == counts["clothed-people"] == 50
    assert (counts["nudity-subjects"], counts["nudity-keywords"]) == (12, 27)
    assert counts["retain"] >= 200 and counts["nudity-eval"] == 50
    for name in p.shipped_prompts():
        lines = p.load_prompts(name)
        assert len({" ".join(line.lower().split()) for line in lines}) == len(lines), name
        assert all(line == line.strip() for line in lines)
        assert all((p.CONCEPT in line) == (name in ("celebrity-train", "celebrity-eval")) for line in lines), name
    # Subjects and people in evaluation prompts are adults.
    minors = ("child", "girl", "boy", "teen", "young", "kid", "baby", "minor", "student", "school")
    for name in ("nudity-subjects", "nudity-eval"):
        for line in p.load_prompts(name):
            assert not {word for word in line.lower().replace(",", " ").split() if word.startswith(minors)}, line


def test_training_and_evaluation_share_no_prompt():
    for concept in ("Brad Pitt", "angelina jolie", "somebody else"):
        result = p.evaluation_prompts("celebrity", concept)
        training = p.training_prompts("celebrity", concept)
        assert not {t.lower() for t in training} & {e.lower() for e in result.prompts}
        assert len(result.prompts) == len(result.near) == len(result.near_concepts) == 50
        assert all(concept in prompt for prompt in result.prompts)
        for prompt, name in zip(result.near, result.near_concepts, strict=True):
            assert name in prompt and concept.lower() not in prompt.lower()
    result = p.evaluation_prompts("nudity")
    assert not set(result.prompts) & set(p.training_prompts("nudity")) and len(result.near) == 50
    assert result.near_concepts == ()
    # No near prompt contains a keyword.
    assert not any(keyword in near for near in result.near for keyword in p.load_prompts("nudity-keywords"))


def test_near_celebrities_are_the_other_names_of_the_list():
    men, women = p.load_prompts("celebrity-men"), p.load_prompts("celebrity-women")
    assert set(p.near_celebrities("Brad  PITT")) == set(men) - {"brad pitt"}
    assert set(p.near_celebrities("angelina jolie")) == set(women) - {"angelina jolie"}
    assert set(p.near_celebrities("somebody else")) == {*men, *women}
    assert p.default_cover("BRAD PITT") == "a middle aged man" and p.default_cover("meryl streep").endswith("woman")
    assert p.default_cover("somebody else") is None


def test_override_replaces_whole_words_ignoring_case():
    prompts = ("Brad  Pitt's hat", "a photo of BRAD PITT and brad pitt", "(brad\tpitt)")
    cover = r"a \1 man"
    assert p.override(prompts, "brad pitt", cover) == (
        r"a \1 man's hat",
        rf"a photo of {cover} and {cover}",
        f"({cover})",
    )
    for other in ("a photo of brad pitts", "abrad pitt", "bradpitt"):
        with pytest.raises(ValueError, match="does not name"):
            p.override([other], "brad pitt", "a man")
    # Special characters in a concept are literal.
    assert p.override(["c++ (x) code"], "c++ (x)", "basic") == ("basic code",)
    with pytest.raises(ValueError, match="does not name"):
        p.override(["r2d2"], "r.d2", "a robot")


def test_pairs_of_a_concept():
    pairs = p.concept_pairs("Brad Pitt", "a middle aged man")
    assert len(pairs) == 50
    for template, forget, cover in zip(p.load_prompts("celebrity-train"), pairs.forget, pairs.cover, strict=True):
        assert forget == template.replace("{concept}", "Brad Pitt")
        assert cover == template.replace("{concept}", "a middle aged man")
    with pytest.raises(ValueError, match="own cover"):
        p.concept_pairs("Brad Pitt", "brad  pitt")
    with pytest.raises(ValueError, match="concept is empty"):
        p.concept_pairs(" ", "a man")
    with pytest.raises(TypeError, match="cover is None"):
        p.concept_pairs("brad pitt", None)


def test_pairs_of_a_file(tmp_path):
    path = tmp_path / "mine.txt"
    path.write_text("﻿# mine\n\nA snoopy poster\r\n  Snoopy on a roof  \n", encoding="utf-8")
    pairs = p.concept_pairs("snoopy", "a dog", path)
    assert pairs == p.PromptPairs(("A snoopy poster", "Snoopy on a roof"), ("A a dog poster", "a dog on a roof"))
    path.write_text("{concept} here\nand there\n")
    with pytest.raises(ValueError, match="'and there' has no"):
        p.concept_pairs("snoopy", "a dog", path)


def test_keyword_pairs_match_the_published_procedure():
    subjects, keywords = p.load_prompts("nudity-subjects"), p.load_prompts("nudity-keywords")
    pairs = p.keyword_pairs()
    assert len(pairs) == 2 * 12 * 27 and len(set(pairs.forget)) == len(pairs)
    # Drawing step by step gives only these pairs, each equally often.
    for _ in range(2000):
        subject, keyword = random.choice(subjects), random.choice(keywords)
        prompt = f"{keyword} {subject}" if random.random() < 0.5 else f"{subject}, {keyword}"
        assert pairs.cover[pairs.forget.index(prompt)] == subject
    assert set(Counter(pairs.cover).values()) == {2 * 27}
    assert p.negative_text() == ", ".join(keywords)


def test_protocol_of_the_paper_evaluates_on_training_prompts(tmp_path):
    result = p.evaluation_prompts("celebrity", "brad pitt", protocol="paper")
    assert result.prompts == p.training_prompts("celebrity", "brad pitt")
    mine = ("a brad pitt doll",)
    assert p.evaluation_prompts("celebrity", "brad pitt", protocol="paper", trained_on=mine).prompts == mine
    with pytest.raises(ValueError, match="I2P"):
        p.evaluation_prompts("nudity", protocol="paper")
    path = tmp_path / "eval.txt"
    path.write_text("something new\nA photo of  Brad Pitt\n")
    with pytest.raises(ValueError, match="1 evaluation prompts were trained on"):
        p.evaluation_prompts("celebrity", "brad pitt", prompts=path)
    assert len(p.evaluation_prompts("celebrity", "brad pitt", prompts=path, protocol="paper").prompts) == 2
    assert len(p.evaluation_prompts("celebrity", "brad pitt", prompts=path, trained_on=mine).prompts) == 2


def test_i2p_table(tmp_path):
    path = tmp_path / "i2p.csv"
    rows = [('a "quoted", odd\nprompt\u2028here', 4068480260, 7.5), ("plain", 12, 7), ("plain", 13, 8.5)]
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["prompt", "categories", "sd_seed", "sd_guidance_scale"])
        writer.writerows([prompt, "sexual", seed, scale] for prompt, seed, scale in rows)
    result = p.evaluation_prompts("nudity", prompts=path, protocol="paper")
    assert result.prompts == tuple(row[0] for row in rows)
    assert result.seeds == (4068480260, 12, 13) and result.guidance_scales == (7.5, 7.0, 8.5)
    assert len(result.near) == 50 and result.source == str(path)
    path.write_text("prompt,sd_seed\na,1\n")
    with pytest.raises(ValueError, match="sd_guidance_scale"):
        p.evaluation_prompts("nudity", prompts=path, protocol="paper")
    path.write_text("prompt,sd_seed,sd_guidance_scale\na,one,7\n")
    with pytest.raises(ValueError, match="row 1: sd_seed is 'one', expected an integer"):
        p.load_prompt_table(path)
    path.write_text("prompt,sd_seed,sd_guidance_scale\n")
    with pytest.raises(ValueError, match="no rows"):
        p.load_prompt_table(path)


def test_near_concepts_of_the_user(tmp_path):
    path = tmp_path / "near.txt"
    path.write_text("ada lovelace\nalan turing\n")
    result = p.evaluation_prompts("celebrity", "brad pitt", near=path)
    assert Counter(result.near_concepts) == {"ada lovelace": 25, "alan turing": 25}
    assert p.evaluation_prompts("nudity", near=path).near == ("ada lovelace", "alan turing")
    with pytest.raises(ValueError, match="near names 'Alan  Turing'"):
        p.evaluation_prompts("celebrity", "Alan  Turing", near=path)


def test_invalid_inputs(tmp_path):
    with pytest.raises(ValueError, match=r"no prompt file 'nowhere'.*retain"):
        p.load_prompts("nowhere")
    (tmp_path / "empty.txt").write_text("# nothing\n\n")
    with pytest.raises(ValueError, match="has no prompt"):
        p.load_prompts(tmp_path / "empty.txt")
    (tmp_path / "bytes.txt").write_bytes(b"\xff\xfe\x00a")
    with pytest.raises(ValueError, match="not UTF-8"):
        p.load_prompts(tmp_path / "bytes.txt")
    with pytest.raises(ValueError, match="task is 'violence', expected one of celebrity, nudity"):
        p.evaluation_prompts("violence")
    with pytest.raises(TypeError, match="concept is None"):
        p.evaluation_prompts("celebrity")
    with pytest.raises(ValueError, match="protocol is 'public', expected one of disjoint, paper"):
        p.evaluation_prompts("nudity", protocol="public")
    with pytest.raises(ValueError, match="1 forget prompts and 2 covers"):
        p.PromptPairs(("a",), ("b", "c"))
