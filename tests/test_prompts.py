"""FaceLock's prompts: counts, categories, spellings, the paper's own table; seeds of edits."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shields.errors import UnknownName
from shields.models.prompts import FACELOCK_PROMPTS, edit_seed, facelock_category, facelock_prompts

PAPER = Path(__file__).parents[1].parent / "shared" / "papers" / "facelock.txt"


def test_there_are_25_different_prompts_in_three_categories():
    assert {name: len(prompts) for name, prompts in FACELOCK_PROMPTS.items()} == {
        "face": 10,
        "accessory": 8,
        "background": 7,
    }
    assert len(set(facelock_prompts())) == 25


def test_a_category_is_a_part_of_the_whole_in_order():
    parts = [facelock_prompts(name) for name in ("face", "accessory", "background")]
    assert sum(parts, ()) == facelock_prompts()


def test_the_published_spelling_differs_in_two_prompts_alone():
    pairs = zip(facelock_prompts(), facelock_prompts(spelling="published"), strict=True)
    assert [(right, published) for right, published in pairs if right != published] == [
        ("Let the person have a tattoo", "Let the person have a tatto"),
        ("Let the person grow a mustache", "Let the person grow a mustach"),
    ]


@pytest.mark.parametrize("spelling", ["corrected", "published"])
def test_every_prompt_knows_its_category_in_either_spelling(spelling):
    for name in FACELOCK_PROMPTS:
        for prompt in facelock_prompts(name, spelling=spelling):
            assert facelock_category(prompt) == name


def test_unknown_categories_and_prompts_are_named_with_what_is_near():
    with pytest.raises(UnknownName, match="did you mean background"):
        facelock_prompts("backgrounds")
    with pytest.raises(UnknownName, match="did you mean Let the person turn bald"):
        facelock_category("Let the person turn blad")


@pytest.mark.skipif(not PAPER.is_file(), reason="the paper's text is not beside this checkout")
def test_the_table_is_that_of_the_paper():
    table = PAPER.read_text(encoding="utf-8").partition("Category\tPrompts\n")[2]
    for name, line in zip(FACELOCK_PROMPTS, table.splitlines(), strict=False):
        listed = re.split("[❶-❿]", line.partition("\t")[2].replace("\u2019", "'"))[1:]
        assert tuple(prompt.strip(" ;.") for prompt in listed) == FACELOCK_PROMPTS[name]


def test_each_photo_and_prompt_has_a_seed_of_its_own():
    seeds = {edit_seed(photo, prompt) for photo in "abcd" for prompt in facelock_prompts()}
    assert len(seeds) == 100
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert edit_seed("ab", "c") != edit_seed("a", "bc")
    assert edit_seed("a", "b", 1) != edit_seed("a", "b", 2)
    # Stored reports depend on it: it must never change.
    assert edit_seed("ann.png", "Let it be snowy") == 147144930229930594
