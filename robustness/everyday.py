"""What survives what, for people: a table for the terminal, and sentences."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from rich.table import Table

from robustness.purifiers import PURIFIERS
from robustness.rows import Row
from shields.cli_common import plain

__all__ = ["Survival", "phrase", "sentences", "survivals", "table"]

_POSTS = {"facebook": "Facebook", "instagram": "Instagram", "x": "X", "whatsapp": "WhatsApp",
          "wechat": "WeChat", "weibo": "Weibo", "telegram": "Telegram"}  # fmt: skip
_CODECS = {"jpeg": "JPEG", "webp": "WebP", "avif": "AVIF", "heic": "HEIC"}
_WORDS = {
    "blur": "a blur", "gaussian": "a blur", "crop": "a crop", "rotate": "a slight turn",
    "jitter": "a change of colours", "screenshot": "a screenshot",
    "screenshot-desktop": "a screenshot", "screenshot-phone": "a screenshot on a phone",
    "osn": "a post on a social network", "cr": "JPEG and a half-size share",
}  # fmt: skip


def phrase(attack: str) -> str:
    """What happens to a photo, in plain words.

    Example:
        >>> phrase("resize:0.5"), phrase("jpeg:75+tip-rsr")
        ('a half-size share', 'saving as JPEG 75 and then purifying by tip-rsr')
    """
    return " and then ".join(_link(part) for part in attack.split("+"))


def _link(text: str) -> str:
    name, _, settings = text.strip().partition(":")
    first = settings.partition(",")[0]
    if name in _CODECS:
        return f"saving as {_CODECS[name]} {first}".rstrip()
    if name in _POSTS:
        return f"a post on {_POSTS[name]}"
    if name == "resize" and (settings in {"", "0.5"}):
        return "a half-size share"
    if name == "vae":
        return f"a round trip through {first or 'an autoencoder'}"
    if name in PURIFIERS:
        return f"purifying by {text}"
    return _WORDS.get(name, text) if not settings else text


@dataclass(frozen=True, kw_only=True)
class Survival:
    """What is left of a protection after an attack, for one manipulator and recogniser."""

    protector: str
    attack: str
    manipulator: str
    condition: str
    recognizer: str
    #: mean cosine of the face with the clean photo's, protected and not
    likeness: float | None
    unprotected: float | None
    #: photos whose face is recognised, protected and not, of so many
    recognised: int
    recognised_unprotected: int
    photos: int
    #: unprotected photos that could be measured
    photos_unprotected: int
    error: str = ""


def survivals(rows: Sequence[Row]) -> list[Survival]:
    """Gather likeness and recognition, `fr:…@source` and `recognised:…@source`, from rows."""
    found: dict[tuple[str, str, str, str, str], dict[str, list[Row]]] = {}
    for row in rows:
        name, _, recognizer = row.metric.partition("@")[0].partition(":")
        if not row.metric.endswith("@source") or name not in {"fr", "recognised"}:
            continue
        key = (row.protector, row.attack, row.manipulator, row.condition, recognizer)
        found.setdefault(key, {}).setdefault(name, []).append(row)
    results = []
    for key, numbers in found.items():
        if key[0] != "none":
            results.append(_survival(key, numbers, found.get(("none", *key[1:]), {})))
    return results


def _survival(
    key: tuple[str, str, str, str, str],
    ours: dict[str, list[Row]],
    theirs: dict[str, list[Row]],
) -> Survival:
    known, bare = _values(ours, "recognised"), _values(theirs, "recognised")
    errors = [row.error for part in ours.values() for row in part if row.error]
    return Survival(
        protector=key[0], attack=key[1], manipulator=key[2], condition=key[3], recognizer=key[4],
        likeness=_mean(_values(ours, "fr")), unprotected=_mean(_values(theirs, "fr")),
        recognised=sum(value > 0 for value in known),
        recognised_unprotected=sum(value > 0 for value in bare),
        photos=len(known), photos_unprotected=len(bare),
        error=errors[0] if errors and not known else "",
    )  # fmt: skip


def _values(numbers: dict[str, list[Row]], name: str) -> list[float]:
    return [row.value for row in numbers.get(name, []) if row.value is not None]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _answer(survival: Survival) -> str:
    if survival.error or not survival.photos:
        return "not known"
    if survival.photos == 1:
        return "yes" if survival.recognised else "no"
    return f"{survival.recognised} of {survival.photos}"


def table(found: Sequence[Survival]) -> Table:
    """The table for the terminal."""
    result = Table(title=_title(found), title_justify="left")
    several = len({survival.protector for survival in found}) > 1
    heads = ["protected by"] if several else []
    for head in [*heads, "what happens to the file"]:
        result.add_column(head)
    for head in ("likeness", "unprotected", "recognised"):
        result.add_column(head, justify="right")
    for survival in found:
        label = [plain(survival.protector)] if several else []
        what = "as saved" if survival.attack == "none" else survival.attack
        numbers = (_number(survival.likeness), _number(survival.unprotected), _answer(survival))
        result.add_row(*label, plain(what), *numbers)
    return result


def _title(found: Sequence[Survival]) -> str:
    judges = {f"{s.recognizer} after {s.manipulator}" for s in found}
    return plain(f"The forged face beside the real one, seen by {', '.join(sorted(judges))}")


def sentences(found: Sequence[Survival]) -> list[str]:
    """Say in words what survives what, attack by attack, and whose judgement it is."""
    saved = {_judge(survival): survival for survival in found if survival.attack == "none"}
    many = len(saved) > 1
    said = [_sentence(survival, saved.get(_judge(survival)), many=many) for survival in found]
    judges = dict.fromkeys(survival.recognizer for survival in found)
    if said:
        said.append(
            f"Judged by {' and '.join(judges)}: a protection that was made against the judge looks "
            "better here than to others; ask one more with --metric fr:NAME@source."
        )
    return said


def _judge(survival: Survival) -> tuple[str, str, str, str]:
    return survival.protector, survival.manipulator, survival.condition, survival.recognizer


def _sentence(survival: Survival, saved: Survival | None, *, many: bool) -> str:
    head = "As saved" if survival.attack == "none" else f"After {phrase(survival.attack)}"
    if many:
        head = f"{survival.protector}, {survival.manipulator}, {survival.recognizer}: {head}"
    if survival.error or not survival.photos:
        return f"{head}, nothing is known: {survival.error or 'no photo could be measured'}."
    return f"{head}, {_said(survival, saved)} (likeness {_number(survival.likeness)})."


def _said(survival: Survival, saved: Survival | None) -> str:
    again = saved is not None and saved is not survival and saved.photos > 0
    before = saved.recognised if again and saved is not None else 0
    if survival.photos > 1:
        count = f"{survival.recognised} of {survival.photos} faces are recognised"
        return f"{count} ({before} as saved)" if again else count
    if not survival.recognised:
        if survival.photos_unprotected and not survival.recognised_unprotected:
            return "the face is not recognised, but neither is that of the unprotected photo"
        still = again and not before
        return "the face is still not recognised" if still else "the face is not recognised"
    if again and not before:
        return "the face is recognised again"
    return "the face is recognised"
