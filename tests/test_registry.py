"""Tables of names, and how a protector is put together from one."""

import dataclasses
import subprocess
import sys

import pytest
import torch

from shields import models
from shields.errors import ConfigError, MissingPackage, UnknownName
from shields.protectors import PROTECTORS, load
from shields.protectors.base import Protector
from shields.protectors.facelock import CvlConfig, FaceLockConfig
from shields.protectors.gradient import PgdProtectorConfig
from shields.registry import Registry, did_you_mean
from shields.weights import WeightStore
from tests import tiny


@pytest.fixture
def table():
    return Registry("toy", {"comma": "fractions:Fraction", "gone": "shields.errors:Nothing"})


class TestRegistry:
    def test_an_entry_is_imported_when_it_is_asked_for(self, table):
        from fractions import Fraction

        assert table["comma"] is Fraction
        assert list(table) == ["comma", "gone"]
        assert len(table) == 2
        assert "comma" in table

    def test_an_empty_table_says_so(self):
        assert did_you_mean("anything", []) == "there is none"

    def test_an_unknown_name_gets_its_neighbours(self, table):
        with pytest.raises(UnknownName, match=r"no toy is called 'coma'; did you mean comma\?"):
            table["coma"]
        with pytest.raises(KeyError):
            table["xyzzy"]

    def test_a_name_is_not_taken_twice_and_can_be_taken_out(self, table):
        table.add("mine", dict)
        assert table["mine"] is dict
        with pytest.raises(ConfigError, match="already"):
            table.add("mine", list)
        table.remove("mine")
        assert "mine" not in list(table)
        with pytest.raises(UnknownName):
            table.remove("mine")

    def test_a_missing_package_is_named_with_the_line_that_installs_it(self):
        table = Registry("toy", {"far": "a_package_that_is_not_there.part:Thing"})
        with pytest.raises(MissingPackage, match="pip install a_package_that_is_not_there"):
            table["far"]

    def test_a_fault_of_our_own_modules_is_not_hidden(self):
        table = Registry("toy", {"broken": "shields.no_such_module:Thing"})
        with pytest.raises(ModuleNotFoundError, match="no_such_module"):
            table["broken"]

    def test_without_neighbours_all_names_are_listed(self):
        assert did_you_mean("zzz", ["facelock", "mist"]) == "there are: facelock, mist"


class TestTable:
    def test_names_stand_in_the_order_in_which_they_are_listed(self):
        first = [
            "facelock", "cvl", "cvl-d", "cvl-dp", "photoguard", "photoguard-eot",
            "photoguard-diffusion", "encoder", "vae", "cw", "advdm", "mist", "sds", "sdst",
            "editshield", "fgsm", "ifgsm", "pgd",
        ]  # fmt: skip
        assert [name for name in PROTECTORS if name in first] == first
        assert next(iter(PROTECTORS)) == "facelock"

    @pytest.mark.parametrize("name", PROTECTORS)
    def test_every_entry_is_a_protector_of_its_own(self, name):
        cls = PROTECTORS[name]
        assert issubclass(cls, Protector)
        assert [other for other in PROTECTORS if PROTECTORS[other] is cls] == [name]
        assert cls.Config().levels > 0
        assert set(cls.roles(cls.Config())) <= set(cls.NETWORKS)

    def test_a_table_and_all_pgd_protectors_load_no_heavy_package(self):
        code = (
            "import sys\n"
            "from shields.protectors import PROTECTORS\n"
            "for name in PROTECTORS:\n"
            "    PROTECTORS[name]\n"
            "heavy = {'diffusers', 'transformers', 'lightning', 'pytorch_lightning', 'lpips',"
            " 'facenet_pytorch', 'kornia', 'torchmetrics'}\n"
            "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


class TestLoad:
    @pytest.fixture
    def loaded(self, monkeypatch):
        """Small networks instead of those on disk, and a list of what was asked for."""
        asked = []

        def stand_in(role, name, *, store, device):
            asked.append((role, name))
            return getattr(tiny, role)()

        monkeypatch.setattr(models, "load", stand_in)
        return asked

    def build(self, name, config=None, tmp_path=None, **networks):
        store = WeightStore(tmp_path)
        return load(name, config, networks=networks, store=store, device=torch.device("cpu"))

    def test_the_defaults_of_the_roles_in_use_are_loaded_and_no_others(self, loaded):
        self.build("facelock")
        assert sorted(loaded) == [("autoencoder", "portrait-ae"), ("recognizer", "face-embedder")]

    def test_a_term_with_weight_brings_its_network(self, loaded):
        self.build("facelock", FaceLockConfig.paper())
        assert ("perceptual", "features:portrait-ae") in loaded

    def test_a_role_that_is_switched_off_is_not_loaded_even_when_it_is_named(self, loaded):
        protector = self.build("cvl", autoencoder="taef2", recognizer="mobilefacenet")
        assert loaded == [("recognizer", "mobilefacenet")]
        assert len(protector.networks) == 1

    def test_gradient_protectors_load_what_their_objective_runs(self, loaded):
        self.build("pgd", PgdProtectorConfig(objective="identity"))
        self.build("fgsm")
        assert [role for role, _ in loaded] == ["recognizer", "autoencoder"]

    def test_the_config_is_the_one_given_or_the_default(self, loaded):
        config = dataclasses.replace(CvlConfig(), levels=3.0)
        assert self.build("cvl", config).config == config
        assert self.build("cvl").config == CvlConfig()

    def test_a_role_that_the_method_has_not_is_an_error(self, loaded):
        with pytest.raises(ConfigError, match=r"'encoder' has no network for the role 'diffusion'"):
            self.build("encoder", diffusion="stable-diffusion-1-5")
        assert loaded == []

    def test_a_config_of_another_method_is_an_error(self, loaded):
        with pytest.raises(ConfigError, match=r"'facelock' needs a FaceLockConfig, got a Pgd"):
            self.build("facelock", PgdProtectorConfig())

    def test_an_unknown_method_gets_its_neighbours(self):
        with pytest.raises(UnknownName, match="did you mean facelock"):
            self.build("facelok")
