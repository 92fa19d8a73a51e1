"""Means with their intervals, and the worst that handling does, from rows."""

import math

import numpy as np
import pytest

from robustness.metrics import Facts, bootstrap
from robustness.rows import Row
from robustness.summary import summarise, worst_case
from shields.errors import ConfigError

UP = Facts(higher=True, low=0, high=1, summary="More is better.")
DOWN = Facts(higher=False, low=0, high=1, summary="Less is better.")


def row(photo, value, *, protector="p", attack="none", metric="m@edits", condition="", seed=0):
    return Row(
        photo=photo, protector=protector, attack=attack, manipulator="g", condition=condition,
        seed=seed, metric=metric, value=value, error="" if value is not None else "why",
        seconds=2.0,
    )  # fmt: skip


def test_rows_are_averaged_by_the_fields_asked_for_in_their_order():
    rows = [
        row("a", 1.0, attack="blur"), row("b", 3.0, attack="blur"),
        row("a", 10.0), row("b", 20.0), row("c", 60.0),
    ]  # fmt: skip
    blur, none = summarise(rows, ["protector", "attack"])
    assert blur.group == {"protector": "p", "attack": "blur"}
    assert (blur.mean, blur.n, blur.missing, blur.infinite) == (2, 2, 0, 0)
    assert (none.mean, none.n, none.seconds) == (30, 3, 2)
    assert (none.mean, none.low, none.high) == bootstrap([10.0, 20.0, 60.0])
    assert summarise([], ["attack"]) == []
    with pytest.raises(ConfigError, match="got 'atack'"):
        summarise(rows, ["atack"])


def test_what_is_absent_or_infinite_is_counted_and_never_averaged():
    rows = [row("a", 30.0), row("b", math.inf), row("c", None), row("d", 40.0)]
    (summary,) = summarise(rows, ["metric"])
    assert (summary.mean, summary.n, summary.missing, summary.infinite) == (35, 2, 1, 1)
    (equal,) = summarise([row("a", math.inf)], ["metric"])
    assert (equal.mean, equal.n) == (math.inf, 0)
    assert math.isnan(equal.low)
    (nothing,) = summarise([row("a", None)], ["metric"])
    assert math.isnan(nothing.mean)
    assert nothing.missing == 1


def test_edits_of_one_photo_make_the_mean_no_surer():
    values = {"a": 0.1, "b": 0.5, "c": 0.9}
    once = [row(photo, value) for photo, value in values.items()]
    often = [row(photo, value, seed=s) for photo, value in values.items() for s in range(20)]
    (short,), (long,) = summarise(once, ["metric"]), summarise(often, ["metric"])
    assert (short.n, long.n, short.photos, long.photos) == (3, 60, 3, 3)
    assert (long.mean, long.low, long.high) == pytest.approx((short.mean, short.low, short.high))


def test_a_number_about_all_photos_has_no_interval():
    (summary,) = summarise([row("*", 12.0, metric="fid@edits")], ["metric"])
    assert summary.mean == 12
    assert math.isnan(summary.low)


@pytest.mark.parametrize(("facts", "worst"), [(UP, (0.1 + 0.4) / 2), (DOWN, (0.9 + 0.5) / 2)])
def test_the_worst_attack_is_chosen_for_every_photo(facts, worst):
    rows = [
        row("a", 0.1), row("a", 0.9, attack="jpeg"),
        row("b", 0.5), row("b", 0.4, attack="jpeg"),
        row("a", 0.0, metric="other@edits"),
    ]  # fmt: skip
    (summary,) = worst_case(rows, "m@edits", facts)
    assert summary.group == {"protector": "p", "metric": "m@edits"}
    assert summary.mean == pytest.approx(worst)
    assert (summary.n, summary.photos) == (2, 2)


def test_the_worst_case_never_beats_any_attack_and_stands_apart_per_protector():
    rng = np.random.default_rng(0)
    rows = [
        row(photo, float(rng.random()), protector=protector, attack=attack, seed=seed)
        for photo in "abcd"
        for protector in ("none", "p")
        for attack in ("none", "jpeg", "blur")
        for seed in (0, 1)
    ]
    for facts, no_better in ((UP, np.less_equal), (DOWN, np.greater_equal)):
        summaries = worst_case(rows, "m@edits", facts)
        assert [summary.group["protector"] for summary in summaries] == ["none", "p"]
        for summary in summaries:
            own = [r for r in rows if r.protector == summary.group["protector"]]
            assert all(no_better(summary.mean, each.mean) for each in summarise(own, ["attack"]))
            assert summary.n == 8


def test_attacks_that_failed_are_told_and_the_others_count():
    rows = [
        row("a", 0.3), row("a", None, attack="jpeg"),
        row("b", None), row("b", None, attack="jpeg"),
    ]  # fmt: skip
    (summary,) = worst_case(rows, "m@edits", DOWN)
    assert (summary.mean, summary.n, summary.missing) == (0.3, 1, 3)


def test_a_metric_without_a_good_direction_has_no_worst_case():
    with pytest.raises(ConfigError, match="has no worst case"):
        worst_case([row("a", 1.0)], "m@edits", Facts(higher=None, low=0, high=1, summary="It is."))


# --- the bootstrap -------------------------------------------------------------------------------


def test_the_interval_is_the_normal_one_where_there_are_many_values():
    values = np.random.default_rng(0).normal(5, 2, 1000)
    mean, low, high = bootstrap(values.tolist())
    wide = 1.96 * values.std(ddof=1) / math.sqrt(1000)
    assert mean == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((mean - wide, mean + wide), abs=0.1 * wide)
    assert bootstrap(values.tolist()) == (mean, low, high)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(200):
        _, low, high = bootstrap(rng.normal(0, 1, 40).tolist(), draws=400)
        hits += low <= 0 <= high
    assert 0.9 <= hits / 200 <= 0.98


def test_values_of_one_group_do_not_pass_for_independent_ones():
    single = [1.0, 2.0, 3.0, 4.0]
    repeated = [value for value in single for _ in range(25)]
    groups = [value for value in single for _ in range(25)]
    assert bootstrap(repeated, groups=groups) == pytest.approx(bootstrap(single))
    narrow = bootstrap(repeated)
    assert narrow[2] - narrow[1] < 0.5 * (bootstrap(single)[2] - bootstrap(single)[1])


def test_too_little_has_no_interval():
    mean, low, high = bootstrap([3.0, 5.0], groups=["a", "a"])
    assert (mean, math.isnan(low), math.isnan(high)) == (4, True, True)
    assert all(map(math.isnan, bootstrap([])))
    with pytest.raises(ConfigError, match="finite"):
        bootstrap([1.0, math.inf])
