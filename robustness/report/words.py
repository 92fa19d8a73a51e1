"""What the rows say, in sentences: what survived, what did not, and what nobody can tell."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from robustness.metrics import PAIRS
from robustness.report.results import UNPROTECTED, Cell, Results, Verdict, View, direction, handled
from robustness.report.tables import number
from shields.errors import ShieldsError
from shields.protectors import PROTECTORS

__all__ = ["Card", "Finding", "Judgement", "cards", "overall"]

#: fewer photos than this make an interval that promises too much: what is called 95 % holds the
#: mean of normal numbers in 75 % of cases for 4 photos, 86 % for 6, 90 % for 10
_FEW = 10


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What is shown about one protector after one handling."""

    attack: str
    verdict: Verdict
    #: share of the unhandled change that is left; None where that cannot be said
    left: float | None

    @property
    def text(self) -> str:
        """The verdict in a word or a number."""
        if self.verdict == "holds":
            return "✓" if self.left is None else f"{100 * self.left:.0f} %"
        return {"not shown": "not shown", "harms": "worse", "unknown": "open"}[self.verdict]

    @property
    def percent(self) -> int:
        """How full its bar is."""
        share = 1.0 if self.left is None else self.left
        return round(100 * min(max(share, 0), 1)) if self.verdict == "holds" else 0


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """One protector against one network that forges."""

    view: View
    sentence: str
    findings: tuple[Finding, ...]

    @property
    def decided(self) -> bool:
        """Whether anything at all is shown."""
        return any(finding.verdict != "unknown" for finding in self.findings)

    def of(self, verdict: Verdict) -> list[str]:
        """The handlings of which this is shown, with what is left."""
        return [
            f"{handled(finding.attack)} ({finding.text})" if verdict == "holds"
            else handled(finding.attack)
            for finding in self.findings
            if finding.verdict == verdict
        ]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Card:
    """All that is said about one protector."""

    protector: str
    #: place among the protectors, for its looks
    place: int
    cost: str
    judgements: tuple[Judgement, ...]


def _count(number_of: int, one: str, many: str = "") -> str:
    return f"{number_of} {one if number_of == 1 else many or one + 's'}"


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else "".join(names)


def _measured(cell: Cell) -> str:
    """A mean with its interval."""
    if cell.mean is None:
        return "absent"
    if cell.low is None or cell.high is None:
        return number(cell.mean)
    return f"{number(cell.mean)} [{number(cell.low)}, {number(cell.high)}]"


def overall(results: Results) -> list[str]:
    """The run in a few sentences; they say no more than the rows do."""
    if not results.rows:
        return ["This run has no rows: there is nothing to report."]
    sentences = [_extent(results)]
    if len(results.missing) == len(results.rows):
        return [*sentences, "Nothing could be measured. The reasons are listed under Absent."]
    if results.missing:
        sentences.append(
            f"{_count(len(results.missing), 'number')} of {len(results.rows)} could not be "
            "computed; where one is absent the page says so, and why."
        )
    if not results.judged:
        return [*sentences, "No metric here tells which side it is good for, so nothing is "
                "said about what survives."]  # fmt: skip
    sentences.append(_yardstick(results, results.headlines[0]))
    for view in results.headlines:
        sentences += _standing(results, view)
    return [*sentences, *_insiders(results), *_cautions(results)]


def _extent(results: Results) -> str:
    handlings = [name for name in results.attacks if name != UNPROTECTED]
    protections = [name for name in results.protectors if name != UNPROTECTED]
    forged = f"forged by {_listed(results.forgers)}" if results.forgers else "nothing forged"
    return (
        f"{_count(len(results.photos), 'photo')}, {_count(len(protections), 'protection')}, "
        f"{_count(len(handlings), 'handling')} beside none, {forged}."
    )


def _yardstick(results: Results, view: View) -> str:
    """What the sentences that follow judge by."""
    facts = results.facts(view.metric)
    parts = [f"Judged by {view.metric}", facts.summary.rstrip(".")]
    if view.pair in PAIRS:
        parts.append(f"It compares {PAIRS[view.pair]}")
    parts.append(f"{direction(facts)} for the person in the photo".capitalize())
    return ". ".join(part for part in parts if part) + "."


def _forged(view: View) -> str:
    return f"Forged by {view.manipulator}" if view.manipulator != UNPROTECTED else "Unforged"


def _standing(results: Results, view: View) -> list[str]:
    """Who does best in the worst case, and which handling leaves the fewest standing."""
    names = [name for name in results.protectors if name != UNPROTECTED]
    worst = {name: results.worst(view, name) for name in names}
    means = {name: cell.mean for name, cell in worst.items() if cell.mean is not None}
    if not means:
        return []
    best = (max if results.facts(view.metric).higher else min)(means, key=lambda name: means[name])
    bare = results.worst(view, UNPROTECTED)
    beside = "" if bare.mean is None else f", against {_measured(bare)} unprotected"
    lead = f"{best} does best" if len(means) > 1 else f"{best} comes to this"
    first = (
        f"{_forged(view)}, in the worst case of each photo {lead}: "
        f"{_measured(worst[best])}{beside}."
    )
    standing = {
        attack: [results.verdict(view, name, attack) for name in names]
        for attack in results.attacks
    }
    decided = {attack: found for attack, found in standing.items() if set(found) - {"unknown"}}
    if not decided:
        return [first]
    counts = {attack: found.count("holds") for attack, found in decided.items()}
    fewest = min(counts.values())
    hardest = [attack for attack, count in counts.items() if count == fewest]
    if fewest == len(names):
        return [first, "Every protection is shown to hold after every handling that was judged."]
    after = _listed([handled(attack) for attack in hardest[:3]])
    others = f" (and {len(hardest) - 3} more)" if len(hardest) > 3 else ""
    those = f"{fewest} of {len(names)} {'is' if fewest == 1 else 'are'} shown to hold"
    if fewest == 0:
        those = "it is not shown to hold" if len(names) == 1 else "none is shown to hold"
    return [first, f"Hardest to withstand: {after}{others}; there {those}."]


def _insiders(results: Results) -> list[str]:
    """Say which protections were made with the networks that forge and judge here."""
    judge = results.headlines[0].metric.rpartition("@")[0].partition(":")[2].partition(",")[0]
    here = {judge: "judges", **dict.fromkeys(results.forgers, "forges")}
    sentences = []
    for entry in results.run.settings.get("protectors", ()):
        known = _made_with(entry) & set(here)
        if known and entry["label"] in results.protectors:
            named = ", and ".join(f"{name}, which {here[name]} here" for name in sorted(known))
            sentences.append(
                f"{entry['label']} was made against {named}: this says nothing of networks that it "
                "does not know."
            )
    return sentences


def _made_with(entry: Mapping[str, Any]) -> set[str]:
    """Names of the networks of a protector, the method's own where no others are asked for."""
    defaults: Mapping[str, str] = {}
    with suppress(ShieldsError):  # of another's making, or gone by now
        defaults = PROTECTORS[entry["method"]].NETWORKS if entry.get("method") else {}
    return {
        name.removeprefix("features:")
        for name in {**defaults, **entry.get("networks", {})}.values()
    }


def _cautions(results: Results) -> list[str]:
    photos = len(results.photos)
    if photos == 1:
        return ["One photo allows no statement about others: no interval is given."]
    if photos < _FEW:
        return [f"With {photos} photos the intervals promise more than they can keep."]
    return []


def cards(results: Results) -> list[Card]:
    """One for each protection."""
    return [
        Card(
            protector=name,
            place=place,
            cost=_cost(results, name),
            judgements=tuple(_judgement(results, view, name) for view in results.headlines),
        )
        for place, name in enumerate(results.protectors)
        if name != UNPROTECTED
    ]


def _cost(results: Results, protector: str) -> str:
    parts = []
    for view in results.fidelity:
        cell = results.cell(view, protector, UNPROTECTED)
        unit = results.facts(view.metric).unit if cell.mean is not None else ""
        parts.append(f"{view.metric} {_measured(cell)}{' ' + unit if unit else ''}")
    return f"Cost to the photo: {', '.join(parts)}." if parts else ""


def _judgement(results: Results, view: View, protector: str) -> Judgement:
    findings = []
    for attack in results.attacks:
        verdict = results.verdict(view, protector, attack)
        left = results.left(view, protector, attack)
        # That the protection holds unhandled is where the shares start from.
        if attack != UNPROTECTED or verdict != "holds":
            findings.append(Finding(attack=attack, verdict=verdict, left=left))
    sentence = _sentence(results, view, protector)
    return Judgement(view=view, sentence=sentence, findings=tuple(findings))


def _sentence(results: Results, view: View, protector: str) -> str:
    bare = results.cell(view, UNPROTECTED, UNPROTECTED)
    plain = results.cell(view, protector, UNPROTECTED)
    worst = results.worst(view, protector)
    parts = []
    if plain.mean is not None:
        beside = "" if bare.mean is None else f", against {_measured(bare)} unprotected"
        parts.append(f"{_measured(plain)} unhandled{beside}")
    if worst.mean is not None:
        parts.append(
            f"in each photo's worst case, most often {handled(worst.attack)}, {_measured(worst)}"
        )
    return f"{_forged(view)}: {'; '.join(parts) or 'absent'}."
