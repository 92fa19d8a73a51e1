"""ARS in training: what happens to photos, the objectives, resuming, exporting."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
import yaml
from safetensors.torch import save_file
from torch import Tensor

from shields.errors import ConfigError, UnknownName
from shields.models.generators import ArsModel
from shields.models.networks import PortraitAutoencoder
from shields.models.round_trip import RoundTrip, load_manipulator
from shields.models.star_networks import StarGenerator
from shields.transforms import Identity, parse
from shields.weights import Card, WeightStore
from tests import cards, tiny
from tests.training import PowerCut, trainer
from trainers import TRAINERS
from trainers.ars import VARIANTS, ArsTraining
from trainers.ars_targets import Task, distance, gradient_of
from trainers.data import FacePacks
from trainers.export import export_checkpoint
from trainers.sheets import sample_sheet

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Twelve faces of six people, and beside them cards of two small manipulators."""
    path = tmp_path / "faces.safetensors"
    save_file(
        {
            "faces": (tiny.faces_image(12, 40) * 255).byte().permute(0, 2, 3, 1).contiguous(),
            "landmarks": tiny.landmarks(12, 40),
            "identity": torch.arange(12) // 2,
        },
        path,
        metadata={"identities": json.dumps([f"person {i}" for i in range(6)])},
    )
    folder = tmp_path / "cards"
    folder.mkdir()
    with tiny.seeded(0):
        cards.save_file_model(
            folder, "small-ae", "autoencoder", "portrait-ae",
            PortraitAutoencoder(fine=8, coarse=8, blocks=1, latent_channels=4),
            "[config]\nfine = 8\ncoarse = 8\nblocks = 1\nlatent_channels = 4\n",
        )  # fmt: skip
        cards.save_file_model(
            folder, "small-gan", "manipulator", "stargan", StarGenerator(1, width=8, blocks=1),
            '[config]\nattributes = ["Smiling"]\n',
        )  # fmt: skip
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(folder))
    return path


def small(**settings: object) -> ArsTraining:
    pl.seed_everything(0, verbose=False)
    defaults: dict[str, object] = {
        "manipulators": ("small-ae", "small-gan"), "widths": (8, 8), "channels": 8, "size": 16,
        "adversary_widths": (8, 8), "rate": 1e-2,
    }  # fmt: skip
    return ArsTraining(**(defaults | settings))  # type: ignore[arg-type]


def packs(path: Path, batches: int) -> FacePacks:
    return FacePacks([path], batch=2, batches=batches, share=0.4)


class TestTargets:
    def test_goals_in_closed_form(self) -> None:
        clean, view = torch.full((2, 3, 4, 4), 0.25), torch.full((2, 3, 4, 4), 0.5)

        def shortfall(goal: str, margin: float = 0.5) -> float:
            same = RoundTrip(tiny.autoencoder())
            same._run = lambda image, _: (image, None)  # type: ignore[method-assign]
            task = Task(manipulator=same, condition="", goal=goal, margin=margin)  # type: ignore[arg-type]
            return float(task.shortfall(view, clean))

        # Distances are taken in [-1, 1]: twice those in [0, 1], squared.
        assert shortfall("white") == shortfall("black") == 1.0
        assert shortfall("grey") == 0.0
        assert shortfall("negative") == 0.25
        assert shortfall("away") == 0.5 - 0.25
        assert shortfall("away", 0.2) == 0.0

    def test_graphs_one_by_one_give_the_gradient_of_the_mean(self) -> None:
        image = tiny.faces_image(2, 8).requires_grad_()
        objectives = [lambda x: x.square().sum(), lambda x: x.sin().sum(), lambda x: x[0].sum()]
        value = gradient_of(image * 3, objectives)
        plain = torch.stack([objective(image * 3) for objective in objectives]).mean()
        torch.testing.assert_close(value, plain)
        found, wanted = (torch.autograd.grad(total, image)[0] for total in (value, plain))
        torch.testing.assert_close(found, wanted)

    def test_autoencoders_count_as_manipulators(self, packed: Path) -> None:
        store, face = WeightStore(), tiny.faces_image(1, 20)
        model = load_manipulator("small-ae", store)
        assert model.name == "small-ae"
        wanted = model.autoencoder.reconstruct(face[..., :16, :16])
        assert torch.equal(model(face[..., :16, :16]).clamp(0, 1), wanted)
        assert load_manipulator("small-gan", store).conditions == ("smiling", "not_smiling")
        with pytest.raises(UnknownName, match="small-gan"):
            load_manipulator("small-gam", store)

    def test_settings_that_make_no_sense_are_explained(self, packed: Path) -> None:
        with pytest.raises(ConfigError, match="did you mean small-ae"):
            small(targets={"small-a": "white"})
        with pytest.raises(ConfigError, match=r"must be one of white, .* got 'blue'"):
            small(targets={"small-ae": "blue"})
        with pytest.raises(ConfigError, match="no variant is called 'arse'; did you mean ars"):
            small(variant="arse")
        with pytest.raises(ConfigError, match="multiples of 2 pixels, got 17"):
            small(size=17)


def terms_of(module: ArsTraining, *, basic: bool = True) -> Iterator[tuple[str, Tensor]]:
    """The terms of one step of the generator, on one batch without losses."""
    face = tiny.faces_image(2, 16)
    tasks = module.tasks(rng())
    clean = module._forgeries(tasks, face)
    shape = module.generator.shape(face, 8.0)
    if basic:
        yield from module.basic_terms(tasks, face, shape * 8 / 255, clean).items()
        return
    given = shape if module.joint else shape.detach()
    final = module.generator.robust(face, given, 8.0) * 8 / 255
    view = (face + final).clamp(0, 1)
    yield from module.robust_terms(tasks, view, final, clean).items()


def reached(module: ArsTraining, total: Tensor) -> set[str]:
    """Parts of the module that a number's gradient reaches, all of their parameters."""
    module.zero_grad()
    total.backward()
    parts: dict[str, list[bool]] = {}
    for name, value in module.named_parameters():
        part = ".".join(name.split(".")[:2])
        there = value.grad is not None and bool((value.grad != 0).any())
        parts.setdefault(part, []).append(there)
    assert all(all(there) or not any(there) for there in parts.values()), parts
    return {part.removeprefix("generator.") for part, there in parts.items() if all(there)}


class TestObjectives:
    def test_without_losses_eq_10_is_eleven_times_its_first_term(self, packed: Path) -> None:
        module = small()
        torch.nn.init.zeros_(module.adversary.unet.last.weight)
        terms = dict(terms_of(module, basic=False))
        torch.testing.assert_close(terms["cleaned"], 10 * terms["direct"])
        face = tiny.faces_image(2, 16)
        final = module.generator(face, 8.0)[1]
        torch.testing.assert_close(terms["size"], 10 * (2 * final).square().mean())
        tasks = module.tasks(rng())
        outputs = [task.forge((face + final).clamp(0, 1)) for task in tasks]
        white = torch.stack([(2 * output - 2).square().mean() for output in outputs]).mean()
        torch.testing.assert_close(terms["direct"], white)

    @pytest.mark.parametrize("goal", ["white", "away"])
    def test_each_term_reaches_what_it_shall(self, packed: Path, goal: str) -> None:
        second = {"stage1", "encoder", "stage2"}
        settings = {"targets": {"small-ae": goal, "small-gan": goal}, "channels": 8}
        module = small(**settings)
        assert reached(module, sum(dict(terms_of(module)).values())) == {"basic"}
        assert reached(module, sum(dict(terms_of(module, basic=False)).values())) == second
        joint = small(joint=True, **settings)
        total = sum(dict(terms_of(joint, basic=False)).values())
        assert reached(joint, total) == second | {"basic"}
        face = tiny.faces_image(2, 16)
        tasks = module.tasks(rng())
        total = module.adversary_terms(tasks, face, module._forgeries(tasks, face))["restored"]
        module.adversary.requires_grad_(True)
        assert reached(module, total) == {"adversary.unet"}
        for network in module._manipulators:
            assert all(value.grad is None for value in network.parameters())

    def test_a_step_meets_as_many_manipulators_as_asked(self, packed: Path) -> None:
        module, generator = small(per_step=1, conditions={"small-gan": ["smiling"]}), rng()
        met = [module.tasks(generator) for _ in range(40)]
        assert {len(tasks) for tasks in met} == {1}
        assert {(t[0].manipulator.name, t[0].condition) for t in met} == {
            ("small-ae", "reconstruct"), ("small-gan", "smiling"),
        }  # fmt: skip
        assert len(small().tasks(rng())) == 2


class TestTraining:
    @pytest.mark.parametrize("variant", VARIANTS)
    def test_what_takes_part_learns_and_nothing_else(
        self, packed: Path, tmp_path: Path, variant: str
    ) -> None:
        module = small(variant=variant, extra=("jpeg:50..95", "rotate:-9..9"), budgets=(6.0, 12.75))
        before = {name: value.clone() for name, value in module.named_parameters()}
        frozen = [v.clone() for net in module._manipulators for v in net.parameters()]
        trainer(tmp_path, max_epochs=1).fit(module, packs(packed, 2))
        still = {name.partition(".")[0] for name, value in module.named_parameters()
                 if torch.equal(value, before[name])}  # fmt: skip
        assert still == (set() if VARIANTS[variant].adversary else {"adversary"})
        after = [value for net in module._manipulators for value in net.parameters()]
        assert all(torch.equal(a, b) for a, b in zip(after, frozen, strict=True))

    def test_it_learns_to_disrupt(self, packed: Path, tmp_path: Path) -> None:
        module = small(
            manipulators=("small-gan",), targets={"small-gan": "away"}, levels=40.0, average=0.5,
            variant="non-lossy", penalty=0.0,
        )  # fmt: skip
        watch = trainer(tmp_path, max_epochs=1)
        watch.validate(module, packs(packed, 1), verbose=False)
        before = float(watch.callback_metrics["val_mse"])
        watch.fit(module, packs(packed, 30))
        assert watch.callback_metrics["val_mse"] > 1.5 * before

    def test_the_penalty_makes_perturbations_small(self, packed: Path, tmp_path: Path) -> None:
        module = small(penalty=1e4, variant="non-lossy", average=0.5, rate=1e-2)
        face = tiny.faces_image(2, 16)
        before = [made.square().mean() for made in module.averaged(face, 8.0)]
        trainer(tmp_path, max_epochs=1).fit(module, packs(packed, 20))
        after = [made.square().mean() for made in module.averaged(face, 8.0)]
        assert all(late < early / 2 for late, early in zip(after, before, strict=True))

    def test_the_basic_way_gets_its_head_start(self, packed: Path, tmp_path: Path) -> None:
        module = small(head_start=2)
        before = {name: value.clone() for name, value in module.generator.named_parameters()}
        trainer(tmp_path, max_epochs=1).fit(module, packs(packed, 2))
        moved = {name.partition(".")[0] for name, value in module.generator.named_parameters()
                 if not torch.equal(value, before[name])}  # fmt: skip
        assert moved == {"basic"}

    def test_rates_fall_where_steps_are_limited_and_two_optimizers_take_them(
        self, packed: Path, tmp_path: Path
    ) -> None:
        run = trainer(tmp_path, max_epochs=None, max_steps=8, limit_val_batches=0)
        run.fit(small(), packs(packed, 9))
        assert run.fit_loop.epoch_loop.batch_progress.total.processed == 4
        # The last step begins when seven of eight are over.
        assert run.optimizers[0].param_groups[0]["lr"] == pytest.approx(1e-2 * 2 / 8)

    def test_stop_and_resume_equals_going_through(self, packed: Path, tmp_path: Path) -> None:
        settings = {"extra": ("jpeg:50..95",), "per_step": 1, "head_start": 1}
        through = small(**settings)
        trainer(tmp_path / "through", max_epochs=2).fit(through, packs(packed, 2))
        first = trainer(tmp_path / "half", max_epochs=2)
        first.callbacks.append(PowerCut())
        with pytest.raises(ConnectionError):
            first.fit(small(**settings), packs(packed, 2))
        resumed = small(**settings)
        trainer(tmp_path / "half", max_epochs=2).fit(
            resumed, packs(packed, 2), ckpt_path=tmp_path / "half" / "last.ckpt"
        )
        for name, value in through.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name


class TestValidation:
    def test_numbers_are_those_of_saved_photos(self, packed: Path, tmp_path: Path) -> None:
        module = small(levels=40.5, validation_size=24)
        watch = trainer(tmp_path, limit_val_batches=None)
        watch.validate(module, FacePacks([packed], batch=3, share=0.4), verbose=False)
        held = FacePacks([packed], batch=99, share=0.4).val_dataloader()
        face = next(iter(held))["face"].float() / 255
        face = torch.nn.functional.interpolate(face, (24, 24), mode="bilinear", antialias=True)
        face = (face * 255).round() / 255
        protected = module.protect(face, 40.5)
        moved = (protected - face) * 255
        assert moved.abs().max() <= 40.001
        torch.testing.assert_close(moved, moved.round(), atol=1e-3, rtol=0)
        errors = []
        for network in module._manipulators:
            for condition in network.conditions:
                before, after = (network(x, condition).clamp(0, 1) for x in (face, protected))
                errors.append(distance(after, before))
        found = watch.callback_metrics
        torch.testing.assert_close(found["val_mse_small-ae"], errors[0].mean())
        gan = torch.cat(errors[1:])
        torch.testing.assert_close(found["val_mse_small-gan"], gan.mean())
        torch.testing.assert_close(found["val_mse"], (errors[0].mean() + gan.mean()) / 2)
        assert found["val_success_small-gan"] == pytest.approx(float((gan > 0.05).float().mean()))
        both = (found["val_success"] + found["val_success_handled"]) / 2
        torch.testing.assert_close(found["val_success_mean"], both)

    def test_the_card_names_the_budget_that_was_measured(self, packed: Path) -> None:
        module = small(levels=16, budgets=(4, 16), validation_levels=12.75, validation_size=24)
        assert "at 24 pixels and 12.75 levels" in module.CARD["data"]
        assert "at 16 pixels and 16 levels" in small(levels=16).CARD["data"]

    def test_the_sheet_reaches_tensorboard(self, packed: Path, tmp_path: Path) -> None:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        board = pl.loggers.TensorBoardLogger(tmp_path, name="", version="")
        trainer(tmp_path, logger=board).validate(small(), packs(packed, 1), verbose=False)
        board.experiment.flush()
        events = EventAccumulator(str(tmp_path)).Reload()
        assert events.Tags()["images"] == ["sheet/small-ae", "sheet/small-gan"]
        drawn = events.Images("sheet/small-ae")[0]
        assert (drawn.height, drawn.width) == (5 * 16, 2 * 16)

    def test_rows_of_the_sheet(self) -> None:
        flat = [torch.full((2, 3, 4, 4), value) for value in (0.25, 0.5, 0.75, 1.5)]
        sheet = sample_sheet(flat[0], flat[0] + 0.03, flat[2], flat[3])
        assert sheet.shape == (3, 20, 8)
        torch.testing.assert_close(sheet[0, ::4, 0], torch.tensor([0.25, 0.28, 0.8, 0.75, 1.0]))


class TestExport:
    @pytest.mark.parametrize("variant", ["ars", "basic-robust"])
    def test_the_shipped_file_makes_the_same_perturbation(
        self, packed: Path, tmp_path: Path, variant: str
    ) -> None:
        module = small(variant=variant, levels=6.375)
        trainer(tmp_path / "run", max_epochs=1).fit(module, packs(packed, 1))
        name = f"ars-{variant}-test"
        TRAINERS.add(name, ArsTraining)
        try:
            path = export_checkpoint(
                name, tmp_path / "run" / "last.ckpt", packed, tmp_path, Path("recipe.yaml"),
                remarks="tiny",
            )  # fmt: skip
        finally:
            TRAINERS.remove(name)
        card = Card.read(path)
        assert (card.role, card.architecture, card.training["steps"]) == ("generator", "ars", 1)
        assert 0 <= card.results["success_handled"] <= 1
        model = ArsModel.load(tmp_path / card.file, card)
        face = tiny.faces_image(1, 32)
        found = model.perturb(face, levels=6.375, rng=rng())
        module.averaged.half().float()
        with torch.no_grad():
            wanted = module.averaged(face, 6.375)[1]
        torch.testing.assert_close(found, wanted, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", ["ars-latent", "ars-smile"])
def test_recipes_name_settings_that_exist(name: str) -> None:
    path = Path(__file__).parents[1] / "trainers" / "configs" / f"{name}.yaml"
    recipe = yaml.safe_load(path.read_text())
    assert set(recipe["model"]) <= set(inspect.signature(ArsTraining).parameters)
    assert set(recipe["data"]) <= set(inspect.signature(FacePacks).parameters)
    parts = [parse(text) for text in recipe["model"].get("extra", [])]
    assert Identity() not in parts
