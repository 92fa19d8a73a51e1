"""Protectors that know the purifier: what a suite hands to their loop."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image as PillowImage

from robustness.purifiers.in_the_loop import PurifierTransform
from robustness.suite import Protection
from robustness.tools import CellError, Tools
from shields.models.ars_network import ArsGenerator
from shields.weights import WeightStore
from tests import cards, suites, tiny


@pytest.fixture
def photos(tmp_path):
    return suites.write_photos(tmp_path / "photos", count=1)


def protection(**changes):
    return Protection.read({**suites.QUICK, **changes}, Path())


def test_a_purifier_stands_in_the_loop_of_a_hardened_protector(store) -> None:
    tools = Tools(WeightStore(store.folder), torch.device("cpu"))
    protector = tools.shield(protection(aware=["median:3"]), 0).protector
    assert protector.config.robust
    members = protector.handling.members
    assert [m.purifier.config.window for m in members if isinstance(m, PurifierTransform)] == [3]
    assert tools.shield(protection(), 0).protector.handling is None


def test_knowing_a_purifier_makes_another_image(tmp_path, photos, store) -> None:
    plain = {**suites.QUICK, "robust": True, "label": "plain"}
    aware = {**suites.QUICK, "aware": "median:3", "label": "aware"}
    what = suites.suite(photos, protectors=[plain, aware], manipulators=[], metrics=["psnr@photo"])
    _, rows = suites.run(what, tmp_path, store)
    values = {row.protector: row.value for row in rows if not row.error}
    assert values["plain"] != values["aware"]


def test_a_method_without_a_loop_says_so(tmp_path) -> None:
    config = "widths = [4, 8]\nencoder = [4, 4]\nchannels = 8"
    network = ArsGenerator((4, 8), (4, 4), 8)
    cards.save_file_model(tmp_path, "small-ars", "generator", "ars", network, config)
    tools = Tools(WeightStore(tmp_path), torch.device("cpu"))
    learned = {"method": "ars", "aware": "median:3", "networks": {"generator": "small-ars"}}
    with pytest.raises(CellError, match="its loop is not ours"):
        tools.shield(Protection.read(learned, tmp_path), 0)


def test_small_faces_are_looked_for_at_a_larger_size(store) -> None:
    from skimage.data import astronaut

    face = PillowImage.fromarray(astronaut()[:256, 96:352])
    small = np.asarray(face.resize((72, 72), PillowImage.Resampling.LANCZOS))
    tools = Tools(WeightStore(store.folder), torch.device("cpu"))

    def points(pixels):
        image = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255
        return tools.landmarks(image, str(pixels.sum()) + str(pixels.shape))

    large = points(np.asarray(face))
    assert (points(small) / 72 - large / 256).abs().max() < 0.02
    assert points(np.zeros((72, 72, 3), np.uint8)).isnan().all()
    assert tiny.landmarks(1, 72).shape == large.shape
