"""The check of a plugged-in manipulator: it passes an honest one and finds each broken promise."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from shields.errors import ConfigError, UnknownName
from shields.models.inspection import Inspection, inspect
from shields.models.manipulation import Condition, Manipulator, wrap
from shields.types import Image
from tests import tiny


def look(manipulator: Manipulator, *, size: int = 32, batch: int = 2) -> Inspection:
    return inspect(manipulator, size=size, batch=batch, rng=torch.Generator().manual_seed(0))


def failures(inspection: Inspection) -> list[str]:
    return [check.name for check in inspection.checks if not check.passed]


def unit(network: Callable[..., object]) -> Manipulator:
    return wrap(network, native_range="unit")


def test_an_honest_manipulator_passes() -> None:
    manipulator = tiny.manipulator()
    inspection = look(manipulator, size=64, batch=3)
    assert failures(inspection) == []
    assert inspection.passed
    assert inspection.name == manipulator.name
    assert 0 < inspection.seconds < 60
    assert inspection.memory > 10_000_000  # what Python and torch alone take
    assert "3, 64x64, cpu, condition black_hair" in inspection.checks[0].detail


def test_rows_are_plain_triples() -> None:
    name, passed, detail = look(unit(lambda image: image)).checks[0]
    assert (name, passed) == ("it runs", True)
    assert "32x32" in detail


def test_the_condition_asked_for_is_used() -> None:
    def act(image: Tensor, name: str) -> Tensor:
        return image if name == "keep" else image * 300

    manipulator = wrap(act, conditions=["keep", "burn"], native_range="unit")
    rng = torch.Generator().manual_seed(0)
    assert inspect(manipulator, size=16, rng=rng, condition="keep").passed
    assert not inspect(manipulator, size=16, rng=rng, condition="burn").passed
    with pytest.raises(UnknownName, match="did you mean burn"):
        inspect(manipulator, size=16, rng=rng, condition="burm")


class Counting(nn.Module):
    """Has state: each call moves it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, image: Tensor) -> Tensor:
        self.calls += 1
        return image * 0.5


def spoil(image: Tensor) -> Tensor:
    result = image * 0.5
    image.data.mul_(0.9)
    return result


def half_zero_gradient(image: Tensor) -> Tensor:
    return torch.cat([image[:1], image[1:].detach()])


def root(image: Tensor) -> Tensor:
    return (image - image.detach()).sqrt() + image.detach()


BROKEN: list[tuple[Manipulator, str]] = [
    (unit(lambda image: image * 255), "the result lies about in [0, 1]"),
    (unit(lambda image: image * 2 - 1), "the result lies about in [0, 1]"),
    (unit(lambda image: image * torch.nan), "the result lies about in [0, 1]"),
    (unit(lambda image: image.double()), "shape and type are kept"),
    (unit(lambda image: image.detach()), "a gradient reaches every image"),
    (unit(half_zero_gradient), "a gradient reaches every image"),
    (unit(lambda image: image.round()), "a gradient reaches every image"),
    (unit(root), "a gradient reaches every image"),
    (unit(lambda image: image * torch.rand(1)), "two calls give the same"),
    (
        unit(lambda image: image - image.mean() + 0.5),
        "a batch gives what its photos give one by one",
    ),
    (unit(spoil), "the input is not modified"),
    (unit(Counting()), "the buffers stay as they were"),
]


@pytest.mark.parametrize(("manipulator", "name"), BROKEN)
def test_a_broken_promise_is_found(manipulator: Manipulator, name: str) -> None:
    with torch.random.fork_rng(devices=[]):
        inspection = look(manipulator)
    assert name in failures(inspection)
    assert not inspection.passed


def test_batch_normalisation_in_training_mode_is_found_out() -> None:
    network = nn.Sequential(nn.BatchNorm2d(3), nn.Sigmoid()).train()
    found = failures(look(unit(network)))
    assert "a batch gives what its photos give one by one" in found
    assert "the buffers stay as they were" in found
    assert look(unit(network.eval())).passed


class Trainable(Manipulator):
    """Forgot to freeze."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 1)

    def _run(self, image: Image, condition: Condition) -> tuple[Image, Tensor | None]:
        return torch.sigmoid(self.layer(image)), None


def test_parameters_that_ask_for_gradients_are_named() -> None:
    manipulator = Trainable()
    check = next(check for check in look(manipulator).checks if not check.passed)
    assert check.name == "no parameter asks for a gradient"
    assert "2 parameters do, such as layer.weight" in check.detail
    assert all(value.grad is None for value in manipulator.parameters())
    manipulator.freeze()
    assert look(manipulator).passed


@pytest.mark.parametrize(
    ("features", "kept"),
    [
        (lambda native: native[:, :1, ::2, ::2], True),
        (lambda native: native.mean(dim=(2, 3)), False),
        (lambda native: native.detach(), False),
        (lambda native: native / 0, False),
    ],
)
def test_the_feature_map_is_checked(features: Callable[[Tensor], Tensor], *, kept: bool) -> None:
    manipulator = wrap(lambda image: image, native_range="unit", features=features)
    assert look(manipulator).passed == kept


def test_what_cannot_run_gets_one_row_that_says_why() -> None:
    def fail(image: Tensor) -> Tensor:
        raise ValueError("no such layer\nand more")

    inspection = look(unit(fail))
    assert inspection.checks == (("it runs", False, "ValueError: no such layer"),)
    assert (inspection.seconds, inspection.memory) == (0, 0)
    illegal = look(wrap(lambda image: image, multiple=7), size=32)
    assert "nearest such size is 35x35" in illegal.checks[0].detail


@pytest.mark.parametrize(("size", "batch"), [(4, 2), (32, 1)])
def test_sizes_that_show_nothing_are_refused(size: int, batch: int) -> None:
    with pytest.raises(ConfigError, match="batch >= 2 and size >= 8"):
        look(unit(lambda image: image), size=size, batch=batch)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_memory_of_a_gpu_is_that_of_the_pass() -> None:
    inspection = look(tiny.manipulator().to("cuda"), size=64)
    assert inspection.passed
    assert 64 * 64 * 3 * 4 * 2 < inspection.memory < 10**9
