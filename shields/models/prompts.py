"""The editing instructions of published evaluations, and the seed that goes with each edit.

Source:
    Edit Away and My Face Will not Stay (Wang et al., 2025), https://arxiv.org/abs/2411.16832,
    known as FaceLock: Table A3 of its appendix, 25 instructions in three categories.

Differs:
    The paper's table spells every word right, the authors' program misspells two. A text encoder
    reads other tokens then, so both lists are kept: results of the paper go with "published".
    The apostrophe is the plain one, as in their program; the paper prints a typographic one.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from shields.errors import UnknownName
from shields.registry import did_you_mean

__all__ = ["FACELOCK_PROMPTS", "Spelling", "edit_seed", "facelock_category", "facelock_prompts"]

#: "corrected" as the paper prints them, "published" as the authors' program has them
Spelling = Literal["corrected", "published"]

#: category -> instructions, in the authors' order, spelled right
FACELOCK_PROMPTS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "face": (
            "Turn the person's hair pink",
            "Let the person turn bald",
            "Let the person have a tattoo",
            "Let the person wear purple makeup",
            "Let the person grow a mustache",
            "Turn the person into a zombie",
            "Change the skin color to Avatar blue",
            "Add elf-like ears",
            "Add large vampire fangs",
            "Apply Goth style makeup",
        ),
        "accessory": (
            "Let the person wear a police suit",
            "Let the person wear a bowtie",
            "Let the person wear a helmet",
            "Let the person wear sunglasses",
            "Let the person wear earrings",
            "Let the person smoke a cigar",
            "Place a headband in the hair",
            "Place a tiara on the top of the head",
        ),
        "background": (
            "Let it be snowy",
            "Change the background to a beach",
            "Add a city skyline background",
            "Add a forest background",
            "Change the background to a desert",
            "Set the background in a library",
            "Let the person stand under the moon",
        ),
    }
)

#: spelled right -> as the authors' program has it
_MISSPELT = {
    "Let the person have a tattoo": "Let the person have a tatto",
    "Let the person grow a mustache": "Let the person grow a mustach",
}
_SPELT_RIGHT = {wrong: right for right, wrong in _MISSPELT.items()}


def edit_seed(photo: str, prompt: str, base: int = 0) -> int:
    """Give every photo and prompt a seed of its own, the same on every machine and in every run.

    Args:
        photo: What names the photo, whatever is done to it: its file name, or the digest of the
            **clean** file. Edits of the clean and of the protected photo then start from the same
            noise, so that what differs between them is the protection's doing.
        prompt: The instruction, letter by letter.
        base: Another number for another repetition.

    Returns:
        0 up to 2⁶³ - 1.

    Example:
        >>> edit_seed("ann.png", "Let it be snowy") == edit_seed("ann.png", "Let it be snowy", 1)
        False
    """
    # Lengths keep ("a", "bc") and ("ab", "c") apart.
    told = f"{base}|{len(photo)}|{photo}|{prompt}".encode()
    return int.from_bytes(hashlib.sha256(told).digest()[:8], "big") >> 1


def facelock_prompts(category: str = "", *, spelling: Spelling = "corrected") -> tuple[str, ...]:
    """Return FaceLock's instructions, all 25 or those of one category.

    Args:
        category: "face", "accessory" or "background"; all three in this order where left empty.
        spelling: "published" for the two words as the authors' program misspells them.

    Raises:
        UnknownName: There is no such category.

    Example:
        >>> len(facelock_prompts()), len(facelock_prompts("background"))
        (25, 7)
        >>> facelock_prompts("face", spelling="published")[2]
        'Let the person have a tatto'
    """
    if category and category not in FACELOCK_PROMPTS:
        hint = did_you_mean(category, FACELOCK_PROMPTS)
        raise UnknownName(f"no category of prompts is called {category!r}; {hint}")
    categories = (category,) if category else tuple(FACELOCK_PROMPTS)
    prompts = tuple(prompt for name in categories for prompt in FACELOCK_PROMPTS[name])
    if spelling == "corrected":
        return prompts
    return tuple(_MISSPELT.get(prompt, prompt) for prompt in prompts)


def facelock_category(prompt: str) -> str:
    """Name the category of one of the 25 instructions, in either spelling.

    Raises:
        UnknownName: It is none of them.

    Example:
        >>> facelock_category("Let the person grow a mustach")
        'face'
    """
    prompt = _SPELT_RIGHT.get(prompt, prompt)
    for category, prompts in FACELOCK_PROMPTS.items():
        if prompt in prompts:
            return category
    hint = did_you_mean(prompt, facelock_prompts())
    raise UnknownName(f"{prompt!r} is no prompt of FaceLock; {hint}")
