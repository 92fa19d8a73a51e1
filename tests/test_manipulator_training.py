"""Manipulators and their judges on a sliver of data: labels, learning, resuming, exporting."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import pytorch_lightning as pl
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from skimage.data import astronaut
from skimage.io import imsave
from torch import Tensor
from typer.testing import CliRunner

from shields import models
from shields.errors import ConfigError, ImageError, UnknownName
from shields.weights import Card, WeightStore
from tests import tiny
from tests.training import PowerCut, trainer
from trainers.adversaries import adversarial_loss, fooling_loss, gradient_penalty
from trainers.attribute_classifier import AttributeClassifierTraining
from trainers.cli import app
from trainers.data import FacePack, FacePacks
from trainers.manipulator import ManipulatorTraining
from trainers.manipulator_measure import draw_sheet, held_out_faces, measure
from trainers.pack import Attribute, pack, read_labels
from trainers.scheme import seen_attributes
from trainers.star import StarScheme

# Lightning speaks to people at a terminal; its advice is not a fault of ours.
pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
KINDS = pytest.mark.parametrize("kind", ["stargan", "aggan", "fpgan"])


@pytest.fixture
def packed(tmp_path: Path) -> Path:
    """Twenty faces of ten people; the labelled ones are light (1) or dark (0), the last unknown."""
    path = tmp_path / "faces.safetensors"
    labels = torch.arange(20).remainder(2).to(torch.int8)[:, None]
    faces = tiny.faces_image(20, 48) * 0.4 + 0.5 * labels[..., None, None]
    labels = torch.cat([labels, 1 - labels], dim=1)
    labels[-1] = -1
    save_file(
        {
            "faces": (faces * 255).byte().permute(0, 2, 3, 1).contiguous(),
            "landmarks": tiny.landmarks(20, 48),
            "identity": torch.arange(20) // 2,
            "labels": labels,
        },
        path,
        metadata={
            "identities": json.dumps([f"person {i}" for i in range(10)]),
            "attributes": json.dumps(["Light", "Dark"]),
        },
    )
    return path


@pytest.fixture
def judge(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A classifier of lightness with a card, as a teacher and as a judge."""
    folder = tmp_path / "cards"
    pl.seed_everything(0, verbose=False)
    module = AttributeClassifierTraining(("Light",), size=16, widths=(4, 8), warmup=1)
    trainer(tmp_path / "judge", max_steps=40).fit(module, packs(packed, 40))
    state, _ = module.export()
    folder.mkdir()
    save_file({key: value.contiguous() for key, value in state.items()},
              folder / "light.safetensors")  # fmt: skip
    (folder / "light.toml").write_text(
        'name = "light"\nrole = "classifier"\narchitecture = "attribute-classifier"\n'
        'file = "light.safetensors"\n[config]\nattributes = ["Light"]\nsize = 16\nwidths = [4, 8]\n'
    )
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(folder))
    return "light"


def packs(path: Path, batches: int) -> FacePacks:
    return FacePacks([path], batch=4, batches=batches, share=0.4, attributes=("Light",))


def small(kind: str, **settings: object) -> ManipulatorTraining:
    pl.seed_everything(0, verbose=False)
    losses = {"blocks": 2, "adversary_width": 4, "adversary_depth": 2, "teacher": ""}
    losses |= settings.pop("settings", {})  # type: ignore[arg-type]
    return ManipulatorTraining(
        kind, attributes=("Light",), size=16, width=4, settings=losses, head_start=0, **settings
    )


class TestLabels:
    def test_a_table_becomes_labels(self, tmp_path: Path) -> None:
        (tmp_path / "one").mkdir()
        imsave(tmp_path / "one" / "a.png", astronaut(), check_contrast=False)
        imsave(tmp_path / "one" / "b.png", astronaut()[:, ::-1], check_contrast=False)
        imsave(tmp_path / "one" / "c.png", astronaut()[2:], check_contrast=False)
        table = tmp_path / "labels.csv"
        table.write_text("file,expression\nb.png,happiness\na.png,neutral\nc.png,anger\n")
        attribute = Attribute.parse("Smiling=expression:happiness|neutral")
        output = tmp_path / "pack.safetensors"
        pack(tmp_path / "one", output, size=64, labels=table, attributes=[attribute])
        with safe_open(output, "pt") as archive:
            assert archive.get_tensor("labels").tolist() == [[0], [1], [-1]]
            assert json.loads(archive.metadata()["attributes"]) == ["Smiling"]
            assert json.loads(archive.metadata()["files"]) == ["a.png", "b.png", "c.png"]

    def test_wrong_tables_and_attributes_say_so(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match=r"NAME=COLUMN:YES\|NO"):
            Attribute.parse("Smiling")
        table = tmp_path / "labels.csv"
        table.write_text("file,mood\na.png,good\n")
        wanted = [Attribute.parse("Smiling=expression:happiness|neutral")]
        with pytest.raises(ConfigError, match="lacks the column 'expression'; it has: file, mood"):
            read_labels(table, wanted)
        table.write_text("file,expression\none/a.png,happiness\ntwo/a.png,neutral\n")
        with pytest.raises(ConfigError, match=r"names 'a\.png' twice"):
            read_labels(table, wanted)
        with pytest.raises(ConfigError, match="cannot be read"):
            read_labels(tmp_path / "absent.csv", wanted)
        for half in ({"labels": table}, {"attributes": wanted}):
            with pytest.raises(ConfigError, match="both a table and the attributes"):
                pack(tmp_path, tmp_path / "pack.safetensors", **half)

    def test_a_file_that_is_no_pack_says_so(self, tmp_path: Path) -> None:
        path = tmp_path / "no-pack.safetensors"
        path.write_bytes(b"not safetensors")
        with pytest.raises(ImageError, match="is no face pack"):
            FacePack(path, validation=True)
        save_file({"faces": torch.zeros(1)}, path)
        with pytest.raises(ImageError, match="is no face pack; make one"):
            held_out_faces(path, ["Light"])

    def test_faces_without_a_label_are_left_out_and_columns_chosen(self, packed: Path) -> None:
        train = FacePack(packed, validation=False, attributes=("Dark", "Light"))
        held = FacePack(packed, validation=True, attributes=("Dark", "Light"))
        assert len(train) + len(held) == 19
        for index in range(len(train)):
            sample = train[index]
            light = sample["face"].float().mean() > 140
            assert sample["labels"].tolist() == [int(not light), int(light)]

    def test_absent_labels_say_how_to_get_them(self, packed: Path) -> None:
        with pytest.raises(ImageError, match=r"no labels for Smiling \(it has: Light, Dark\)"):
            FacePack(packed, validation=False, attributes=("Smiling",))


class TestDiscriminator:
    def test_losses_in_closed_form(self) -> None:
        real, fake = torch.tensor([2.0, 0.5]), torch.tensor([-3.0, 0.0])
        assert adversarial_loss("hinge", real, fake) == 0.25 + 0.5
        assert adversarial_loss("wgan-gp", real, fake) == -1.5 - 1.25
        assert fooling_loss("hinge", fake) == fooling_loss("wgan-gp", fake) == 1.5
        even = torch.zeros(2)
        assert adversarial_loss("logistic", even, even) == pytest.approx(2 * math.log(2))
        assert fooling_loss("logistic", even) == pytest.approx(math.log(2))

    @pytest.mark.parametrize("slope", [0.0, 1.0, 3.0])
    def test_penalty_of_a_linear_score(self, slope: float) -> None:
        direction = torch.ones(1, 3, 4, 4) * slope / 48**0.5

        def score(image: Tensor) -> Tensor:
            return (image * direction).sum(dim=(1, 2, 3))

        rng = torch.Generator().manual_seed(0)
        faces = tiny.faces_image(2, 4)
        found = gradient_penalty(score, faces, faces.flip(0), rng)
        torch.testing.assert_close(found, torch.tensor((slope - 1) ** 2))


class TestTraining:
    @KINDS
    @pytest.mark.parametrize("adversarial", ["logistic", "hinge", "wgan-gp"])
    def test_every_parameter_learns_and_the_average_follows(
        self, kind: str, adversarial: str, packed: Path, tmp_path: Path
    ) -> None:
        module = small(kind, settings={"adversarial": adversarial}, rate=1e-2)
        before = {name: value.clone() for name, value in module.named_parameters()}
        trainer(tmp_path, max_epochs=1).fit(module, packs(packed, 3))
        still = [name for name, value in module.named_parameters()
                 if torch.equal(value, before[name])]  # fmt: skip
        assert still == []

    def test_a_generator_learns_what_its_teacher_sees(
        self, packed: Path, tmp_path: Path, judge: str
    ) -> None:
        losses = {"cycle": 0.0, "identity": 0.0, "teacher": judge, "classification": 10.0}
        module = small("stargan", rate=1e-2, average=0.5, settings=losses)
        trainer(tmp_path, max_epochs=1).fit(module, packs(packed, 60))
        face, _, own = held_out_faces(packed, ["Light"], size=16)
        teacher = models.load("classifier", judge, store=WeightStore(), device=torch.device("cpu"))
        forged = module.scheme.forge(module.averaged, face * 2 - 1, own.float(), 1 - own.float())
        assert torch.equal((teacher(face) > 0.5).long(), own)
        assert torch.equal((teacher((forged + 1) / 2) > 0.5).long(), 1 - own)

    def test_the_discriminator_gets_its_head_start(self, packed: Path, tmp_path: Path) -> None:
        module = small("stargan")
        module.head_start = 2
        before = [value.clone() for value in module.generator.parameters()]
        trainer(tmp_path, max_epochs=1).fit(module, packs(packed, 2))
        after = list(module.generator.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
        trainer(tmp_path, max_epochs=1).fit(module, packs(packed, 3))
        assert not torch.equal(before[0], next(module.generator.parameters()))

    def test_stop_and_resume_equals_going_through(self, packed: Path, tmp_path: Path) -> None:
        through = small("stargan")
        trainer(tmp_path / "through", max_epochs=2).fit(through, packs(packed, 2))
        first = trainer(tmp_path / "half", max_epochs=2)
        first.callbacks.append(PowerCut())
        with pytest.raises(ConnectionError):
            first.fit(small("stargan"), packs(packed, 2))
        resumed = small("stargan")
        trainer(tmp_path / "half", max_epochs=2).fit(
            resumed, packs(packed, 2), ckpt_path=tmp_path / "half" / "last.ckpt"
        )
        for name, value in through.state_dict().items():
            assert torch.equal(value, resumed.state_dict()[name]), name

    def test_unknown_settings_and_architectures_say_what_there_is(self) -> None:
        with pytest.raises(ConfigError, match=r"no setting cycles; there are: .*cycle"):
            small("stargan", settings={"cycles": 1.0})
        with pytest.raises(UnknownName, match="stargan"):
            small("stargun")
        with pytest.raises(ConfigError, match="`adversarial` must be one of logistic, hinge"):
            small("stargan", settings={"adversarial": "lsgan"})
        with pytest.raises(ConfigError, match="multiple of 4"):
            StarScheme(size=30)

    def test_a_teacher_is_asked_for_what_it_knows_at_its_own_size(self, judge: str) -> None:
        face = torch.rand(2, 3, 24, 24, generator=torch.Generator().manual_seed(0)) * 2 - 1
        store = WeightStore()
        network = models.load("classifier", judge, store=store, device=torch.device("cpu"))
        seen = seen_attributes(judge, ("Light",), face)
        torch.testing.assert_close(seen.sigmoid(), network((face + 1) / 2))
        with pytest.raises(ConfigError, match="does not know Male but Light"):
            seen_attributes(judge, ("Male",), face)


class TestClassifier:
    def test_it_learns_to_tell_light_from_dark(self, packed: Path, tmp_path: Path) -> None:
        pl.seed_everything(0, verbose=False)
        module = AttributeClassifierTraining(("Light",), size=16, widths=(4, 8), warmup=1)
        watch = trainer(tmp_path, max_steps=40, limit_val_batches=None)
        watch.fit(module, packs(packed, 40))
        assert watch.callback_metrics["val_accuracy"] > 0.9


class TestExport:
    def test_command_measures_and_the_card_loads(
        self, packed: Path, tmp_path: Path, judge: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            ManipulatorTraining, "JUDGES",
            {"classifier": judge, "recognizer": "face-embedder"},
        )  # fmt: skip
        module = small("fpgan")
        trainer(tmp_path / "run", max_epochs=1).fit(module, packs(packed, 2))
        arguments = [
            "manipulator", "export", str(tmp_path / "run" / "last.ckpt"), "--name", "fpgan-light",
            "--pack", str(packed), "--to", str(tmp_path / "out"),
        ]  # fmt: skip
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0, result.output
        card = Card.read(tmp_path / "out" / "fpgan-light.toml")
        assert card.training["steps"] == 2
        assert (card.architecture, card.results["faces"]) == ("fpgan", 2)
        model = models.load(
            "manipulator", "fpgan-light", store=WeightStore(tmp_path / "out"),
            device=torch.device("cpu"),
        )  # fmt: skip
        assert model.conditions == ("light", "not_light")
        face = held_out_faces(packed, ["Light"], size=16)[0]
        wanted = module.scheme.forge(
            module.averaged, face * 2 - 1, torch.zeros(1, 1), torch.ones(len(face), 1)
        )
        torch.testing.assert_close(model(face, "light"), (wanted + 1) / 2, atol=5e-3, rtol=0)
        sheet = draw_sheet([model], packed, "Light", people=2, side=32)
        assert sheet.size == (130 + 2 * 36, 2 * 36)

    def test_numbers_of_a_manipulator_that_does_nothing(self, packed: Path, judge: str) -> None:
        class Nothing(models.manipulation.Manipulator):
            conditions = ("light", "not_light")

            def _run(self, image, condition):
                return image, None

        found = measure(
            Nothing(), packed, "Light", classifier=judge, recognizer="face-embedder", size=16
        )
        assert found["identity"] == pytest.approx(1, abs=1e-5)
        assert found["reconstruction_psnr"] > 90
        # The output moves as far as the input: 6.375 levels are 0.05 in [-1, 1], squared 0.0025.
        assert found["alpha"] == pytest.approx(0.0025, rel=0.2)
        assert found["disturbed"] == 0
        image, _, labels = held_out_faces(packed, ["Light"], size=16)
        store = WeightStore()
        network = models.load("classifier", judge, store=store, device=torch.device("cpu"))
        wrong = ((network(image) > 0.5).long() != labels).float().mean()
        assert found["success"] == pytest.approx(float(wrong))
