"""Weight strategies against closed forms, brute force and formulae worked out by hand."""

import math

import pytest
import torch

from shields.errors import ConfigError, ShieldsError
from shields.models.manipulation import wrap
from trainers.weighting import (
    STRATEGIES,
    DynamicPriority,
    Equal,
    HardestFirst,
    IndicatorWeights,
    MinimumNorm,
    Prior,
    TaskReport,
    estimate_prior,
    minimum_norm,
    orders_of_magnitude,
    urgency,
)


def report(*indicators, gradients=None):
    return TaskReport(indicators=torch.tensor(indicators), gradients=gradients)


def built(name):
    arguments = {"prior": [(1, 10, 100)], "dtp": [3], "kpi": [(1, 10, 100)]}
    return STRATEGIES[name](*arguments.get(name, []))


@pytest.mark.parametrize("name", STRATEGIES)
def test_weights_lie_on_the_simplex(name):
    rng = torch.Generator().manual_seed(0)
    strategy = built(name)
    for _ in range(5):
        indicators = torch.rand(3, generator=rng)
        gradients = torch.randn(3, 7, generator=rng)
        weights = strategy(TaskReport(indicators=indicators, gradients=gradients))
        assert weights.shape == (3,)
        assert weights.min() >= 0
        assert float(weights.sum()) == pytest.approx(1, abs=1e-6)


def test_equal_and_prior_ignore_the_indicators():
    assert Equal()(report(0.1, 0.9)).tolist() == [0.5, 0.5]
    torch.testing.assert_close(Prior((1, 3))(report(0.1, 0.9)), torch.tensor([0.25, 0.75]))


def test_hard_model_mining_leaves_only_the_least_disrupted():
    assert HardestFirst()(report(0.5, 0.1, 0.9)).tolist() == [0, 1, 0]
    assert HardestFirst(2)(report(0.5, 0.1, 0.9)).tolist() == [0.5, 0.5, 0]


def test_urgency_falls_and_is_bounded():
    values = urgency(torch.linspace(0, 2, 401))
    assert bool((values[1:] <= values[:-1]).all())
    assert float(values[0]) == pytest.approx((1 - 1e-4) * math.log(1e4), rel=1e-5)
    assert float(values[200:].abs().max()) == 0


def test_dynamic_priority_is_focal_on_the_running_mean():
    strategy = DynamicPriority(2, momentum=0.75, focus=2.0)
    strategy(report(0.2, 0.6))
    weights = strategy(report(0.6, 0.2))
    means = (0.75 * 0.2 + 0.25 * 0.6, 0.75 * 0.6 + 0.25 * 0.2)
    by_hand = torch.tensor([-((1 - mean) ** 2) * math.log(mean) for mean in means])
    torch.testing.assert_close(weights, by_hand / by_hand.sum())


def test_strategy_two_weighs_by_prior_first_and_then_by_the_step_before():
    strategy = IndicatorWeights((1, 10))
    torch.testing.assert_close(strategy(report(0.5, 0.1)), torch.tensor([1.0, 10]) / 11)
    by_hand = torch.tensor([-0.5 * math.log(0.5), -10 * 0.9 * math.log(0.1)])
    torch.testing.assert_close(strategy(report(0.9, 0.9)), by_hand / by_hand.sum())


def test_strategy_two_may_use_the_step_itself():
    by_hand = torch.tensor([-0.5 * math.log(0.5), -10 * 0.9 * math.log(0.1)])
    weights = IndicatorWeights((1, 10), delayed=False)(report(0.5, 0.1))
    torch.testing.assert_close(weights, by_hand / by_hand.sum())


def test_where_all_are_broken_all_count_the_same():
    assert IndicatorWeights((1, 10), delayed=False)(report(1.5, 2.0)).tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", ["dtp", "kpi"])
def test_a_history_survives_saving(name):
    first, second = built(name), built(name)
    first(report(0.2, 0.5, 0.8))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(report(0.3, 0.3, 0.3)), second(report(0.3, 0.3, 0.3)))


@pytest.mark.parametrize(
    ("gradients", "wanted"),
    [
        ([[1.0, 0.0], [0.0, 1.0]], [0.5, 0.5]),
        ([[2.0, 0.0], [0.0, 1.0]], [0.2, 0.8]),
        ([[1.0, 0.0], [3.0, 1.0]], [1.0, 0.0]),
        ([[1.0, 1.0], [1.0, 1.0]], None),
        ([[1.0, 0.0], [-3.0, 0.0]], [0.75, 0.25]),
    ],
)
def test_two_gradients_have_the_closed_form(gradients, wanted):
    weights = MinimumNorm()(report(0.1, 0.1, gradients=torch.tensor(gradients)))
    if wanted is None:  # equal gradients: any weights will do
        assert float(weights.sum()) == pytest.approx(1)
    else:
        torch.testing.assert_close(weights, torch.tensor(wanted), rtol=0, atol=1e-6)


def test_three_gradients_match_a_search_over_the_whole_simplex():
    ticks = torch.linspace(0, 1, 201, dtype=torch.float64)
    first, second = torch.meshgrid(ticks, ticks, indexing="ij")
    inside = first + second <= 1 + 1e-12
    grid = torch.stack([first[inside], second[inside], 1 - (first + second)[inside]], dim=1)
    for seed in range(5):
        rng = torch.Generator().manual_seed(seed)
        rows = torch.randn(3, 4, generator=rng, dtype=torch.float64) + 0.5
        found = minimum_norm(rows @ rows.T)
        best = float((grid @ rows).square().sum(dim=1).min())
        reached = float((found @ rows).square().sum())
        assert reached <= best + 1e-9
        assert reached >= best - 0.02 * float(rows.square().sum(dim=1).max())


@pytest.mark.parametrize("seed", range(5))
def test_the_solution_of_five_meets_the_conditions_of_an_optimum(seed):
    rng = torch.Generator().manual_seed(seed)
    rows = torch.randn(5, 30, generator=rng, dtype=torch.float64)
    rows *= 10 ** torch.randn(5, 1, generator=rng, dtype=torch.float64)
    weights = minimum_norm(rows @ rows.T)
    combined = weights @ rows
    along = rows @ combined
    length = float(combined.square().sum())
    size = float(rows.square().sum(dim=1).mean())
    # Along it no task loses, and those that count all gain the same.
    assert float(along.min()) >= length - 1e-7 * size
    torch.testing.assert_close(
        along[weights > 1e-6], torch.full_like(along[weights > 1e-6], length),
        rtol=0, atol=1e-7 * size,
    )  # fmt: skip


def test_normalised_gradients_forget_their_lengths():
    gradients = torch.tensor([[100.0, 0.0], [0.0, 0.01]])
    assert MinimumNorm(normalised=True)(report(0.1, 0.1, gradients=gradients)).tolist() == [0.5] * 2


def test_missing_or_broken_gradients_are_named():
    with pytest.raises(ConfigError, match="must hold them"):
        MinimumNorm()(report(0.1, 0.1))
    with pytest.raises(ShieldsError, match="not finite"):
        MinimumNorm()(report(0.1, 0.1, gradients=torch.full((2, 3), math.nan)))


@pytest.mark.parametrize("prior", [(), (1, 0), (1, -1), (math.inf, 1)])
def test_a_prior_is_checked(prior):
    with pytest.raises(ConfigError, match="`prior`"):
        Prior(prior)


def test_a_prior_of_another_length_is_refused():
    with pytest.raises(ConfigError, match="2 tasks, there are 3"):
        IndicatorWeights((1, 10))(report(0.1, 0.2, 0.3))


@pytest.mark.parametrize("wrong", [{"momentum": 1.0}, {"focus": -1.0}])
def test_settings_of_dynamic_priority_are_checked(wrong):
    with pytest.raises(ConfigError, match="momentum"):
        DynamicPriority(2, **wrong)


def test_orders_of_magnitude_start_at_one_and_end_somewhere():
    distances = torch.tensor([0.592, 0.298, 0.635, 0.06, 0.0006, 0.0])
    assert orders_of_magnitude(distances).tolist() == [1, 1, 1, 10, 1000, 10_000]
    with pytest.raises(ConfigError, match="no manipulator moved"):
        orders_of_magnitude(torch.zeros(2))


def test_the_prior_follows_how_far_manipulators_let_themselves_be_moved():
    # Squared distances of an attack on a * image go with a squared.
    manipulators = [wrap(lambda image, a=a: a * image, native_range="unit") for a in (1, 0.1, 0.3)]
    images = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 0.5 + 0.25
    rng = torch.Generator().manual_seed(1)
    assert estimate_prior(manipulators, images, rng=rng).tolist() == [1, 100, 10]
