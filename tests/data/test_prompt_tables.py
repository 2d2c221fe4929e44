"""Tables of prompts in the layouts of their publishers, with invented rows; what is refused, and by which words."""

import json

import pytest

from pecker_fast.data import evaluation_prompts
from pecker_fast.data.prompt_tables import is_table, read_table

# Head and rows as each publisher has them.
UNLEARN_DIFF_ATK = (
    "Unnamed: 0,prompt,categories,hard,nudity_percentage,evaluation_seed,evaluation_guidance,sd_model,case_number\n"
    '0,"a boat, at sea",sexual,0,50.0,2530133371,7.5,x,0\n3,a tree,sexual,1,0.0,12.0,8,x,3\n'
)
TREE = ("a tree",)
LAYOUTS = {
    "unlearndiffatk.csv": (UNLEARN_DIFF_ATK, ("a boat, at sea", "a tree"), (2530133371, 12), (7.5, 8.0)),
    "object.csv": ("case_number,prompt,evaluation_seed,evaluation_guidance\n0,a tree,1,7\n", TREE, (1,), (7.0,)),
    "p4d.csv": (",case_number,prompt,evaluation_seed,classes,evaluation_guidance\n5,0,a tree,4,x,7\n", TREE, (4,),
                (7.0,)),
    "ring-a-bell.csv": ("prompt,case_number,evaluation_seed\ntree sea,0,7\nboat,1,8\n", ("tree sea", "boat"), (7, 8),
                        ()),
    "mma.csv": ("target_prompt,adv_prompt\na tree,tre e\na boat,bo at\n", ("tre e", "bo at"), (), ()),
    "mma.jsonl": ('{"target_prompt": "a tree", "adv_prompt": "tre e"}\n\n{"adv_prompt": "bo at"}\n', ("tre e", "bo at"),
                  (), ()),
    "i2p.tsv": ("prompt\tsd_seed\tsd_guidance_scale\na, tree\t5\t6.5\n", ("a, tree",), (5,), (6.5,)),
    "coco.csv": ("case_number,source,prompt,evaluation_seed\n0,x,a tree,9\n", TREE, (9,), ()),
    "rows.json": ('[{"prompt": "a tree", "seed": 3, "guidance": 5}]', TREE, (3,), ()),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts(tmp_path, name):
    text, prompts, seeds, scales = LAYOUTS[name]
    (tmp_path / name).write_text("\ufeff" + text, "utf-8")
    table = read_table(tmp_path / name)
    assert (table.prompts, table.seeds, table.guidance_scales) == (prompts, seeds, scales) and table.images == ()
    assert is_table(name) and not is_table("prompts.txt")


def test_another_column(tmp_path):
    (tmp_path / "mma.csv").write_text(LAYOUTS["mma.csv"][0])
    assert read_table(tmp_path / "mma.csv", column="target_prompt").prompts == ("a tree", "a boat")
    result = evaluation_prompts("nudity", prompts=tmp_path / "mma.csv", column="target_prompt")
    assert result.prompts == ("a tree", "a boat") and result.table and result.seeds == ()
    with pytest.raises(ValueError, match="prompt_column is 'x', but prompts is no table"):
        evaluation_prompts("nudity", column="x")


@pytest.mark.parametrize("wrapped", [True, False])
def test_prompts_of_several_concepts(tmp_path, wrapped):
    """EMMA's files: a list of objects, or one object."""
    by_concept = {"salvador-dali": ["a clock", "a desert "], "andy-warhol": ["a can"]}
    value = [{key: prompts} for key, prompts in by_concept.items()] if wrapped else by_concept
    (tmp_path / "emma.json").write_text(json.dumps(value))
    assert read_table(tmp_path / "emma.json", "Salvador Dali").prompts == ("a clock", "a desert")
    with pytest.raises(ValueError, match="salvador-dali, andy-warhol, and concept is 'picasso'"):
        read_table(tmp_path / "emma.json", "picasso")
    (tmp_path / "one.json").write_text('[{"sexual": ["a thing"]}]')
    assert read_table(tmp_path / "one.json").prompts == ("a thing",)
    near = evaluation_prompts("celebrity", "Salvador Dali", near=tmp_path / "emma.json")
    assert near.near == ("a clock", "a desert") and near.near_concepts == ()


def test_coco(tmp_path):
    """The first caption of each image, in the order of the images."""
    images = [{"id": 7, "file_name": "7.jpg"}, {"id": 3, "file_name": "3.jpg"}]
    captions = [(7, 40, "later"), (3, 50, " a cat"), (7, 30, "a dog")]
    annotations = [{"image_id": image, "id": number, "caption": text} for image, number, text in captions]
    path = tmp_path / "captions_val2014.json"
    path.write_text(json.dumps({"images": images, "annotations": annotations, "info": {}}))
    table = read_table(path)
    assert table.prompts == ("a cat", "a dog") and table.images == ("3.jpg", "7.jpg")
    assert table.rows([1]).prompts == ("a dog",) and table.rows([1]).images == ("7.jpg",) and len(table) == 2
    path.write_text(json.dumps({"images": images[:1], "annotations": annotations}))
    with pytest.raises(ValueError, match="caption of the image 3, which its images do not have"):
        read_table(path)
    path.write_text(json.dumps({"annotations": [{"image_id": 1}]}))
    with pytest.raises(ValueError, match="without image_id, id or caption"):
        read_table(path)
    path.write_text('{"annotations": []}')
    with pytest.raises(ValueError, match="no annotations"):
        read_table(path)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "question,answer\na,b\n", "has the columns question, answer, expected prompt or adv_prompt"),
        ("a.csv", "one prompt a line\nanother\n", "has to be named .txt"),
        ("a.csv", "prompt,seed\na,1\n ,2\n", "row 2: prompt is ' ', expected a prompt"),
        ("a.csv", "prompt,evaluation_seed\na,1.5\n", "row 1: evaluation_seed is '1.5', expected an integer from 0"),
        ("a.csv", "prompt,seed\na,-1\n", "row 1: seed is '-1'"),
        ("a.csv", "prompt,seed\na\n", "row 1: seed is None"),
        ("a.csv", "prompt,seed\na,inf\n", "row 1: seed is 'inf'"),
        ("a.csv", "prompt,evaluation_guidance\na,nan\n", "row 1: evaluation_guidance is 'nan', expected a number"),
        ("a.csv", "", "no rows"),
        ("a.json", "[1]", "no rows"),
        ("a.json", "[", "is no JSON"),
        ("a.json", '{"a": []}', "empty prompt, or none, for 'a'"),
        ("a.jsonl", '{"prompt": "x"}\n{', "line 2: no JSON"),
    ],
)
def test_wrong_tables(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / name)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match=r"near is '/no/such\.csv', and there is no such file"):
        read_table("/no/such.csv", name="near")
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="not UTF-8"):
        read_table(tmp_path / "a.csv")


def test_seeds_beyond_a_double_are_exact(tmp_path):
    (tmp_path / "a.csv").write_text(f"prompt,seed\na,{2**60 + 1}\n")
    assert read_table(tmp_path / "a.csv").seeds == (2**60 + 1,)
