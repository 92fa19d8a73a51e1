"""Cards, the places weights are looked for, and what is refused."""

from __future__ import annotations

import hashlib
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file
from torch import nn

from shields import models
from shields.errors import UnknownName, WeightsError
from shields.weights import Card, WeightStore, build, digest, load_strictly, read_state_dict

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared"
CARDS = sorted((ROOT / "checkpoints").glob("*.toml"))

MINIMAL = 'name = "one"\nrole = "autoencoder"\narchitecture = "taef2"\nfile = "one.safetensors"\n'


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Every place of the store inside a temporary folder, all of them empty."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("SHIELDS_CHECKPOINTS", str(tmp_path / "variable"))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    for name in ("given", "variable"):
        (tmp_path / name).mkdir()
    return tmp_path


def write_card(folder: Path, text: str = MINIMAL, name: str = "one") -> Card:
    path = folder / f"{name}.toml"
    path.write_text(text)
    return Card.read(path)


def write_weights(path: Path, value: float = 1.0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"weight": torch.full((2, 2), value)}, path)
    return path


@pytest.mark.parametrize("path", CARDS, ids=lambda path: path.stem)
def test_shipped_card_is_whole_and_its_architecture_is_known(path):
    card = Card.read(path)
    tables = {
        "autoencoder": models.AUTOENCODERS,
        "recognizer": models.RECOGNIZERS,
        "perceptual": models.PERCEPTUAL,
        "diffusion": models.DIFFUSIONS,
    }
    assert card.licence
    assert card.source
    assert card.summary
    if card.role in tables:
        assert card.architecture in tables[card.role]


def test_all_weights_of_the_issue_have_a_card():
    names = {path.stem for path in CARDS}
    assert names >= {
        "taef2", "mobilefacenet", "facenet-vggface2", "facenet-casia-webface", "sd-vae",
        "instruct-pix2pix-vae", "sdxl-vae", "taesd", "flux2-vae", "lpips-vgg", "lpips-alex",
        "lpips-squeeze", "stable-diffusion-1-5", "instruct-pix2pix",
    }  # fmt: skip


def test_card_reads_tables_and_defaults(tmp_path):
    card = write_card(
        tmp_path, MINIMAL + "bytes = 12\n[config]\nwidth = 8\n[results]\npsnr = 3.5\n"
    )
    assert (card.name, card.bytes, card.licence) == ("one", 12, "")
    assert card.config == {"width": 8}
    assert card.results == {"psnr": 3.5}


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ('licens = "MIT"\n', "licence"),
        ('sha256 = "XYZ"\n', "sha256"),
        ('sha256 = "abcdef"\n', "8 to 64"),
        ("bytes = true\n", "bytes"),
        ("summary = 3\n", "summary"),
        ('url = "http://example.org/one"\n', "https"),
        ('url = "https://example.org/one"\nrepository = "a/b"\n', "exclude"),
        ('revision = "main"\n', "revision"),
        ("[config\n", "read"),
    ],
)
def test_card_with_a_mistake_is_refused_by_name(tmp_path, extra, said):
    with pytest.raises(WeightsError, match=f"(?s)one.*{said}"):
        write_card(tmp_path, MINIMAL + extra)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"autoencoder"', '"autoencodr"', "did you mean autoencoder"),
        ('name = "one"\n', 'name = "two"\n', "calls itself 'two'"),
        ('architecture = "taef2"\n', "", "lacks architecture"),
        ('file = "one.safetensors"\n', "", "must be given"),
        ('file = "one.safetensors"', 'file = "../one.safetensors"', "bare name"),
        ('file = "one.safetensors"', 'repository = "a/b"\nsha256 = "01234567"', "none is given"),
    ],
)
def test_card_that_contradicts_itself_is_refused(tmp_path, old, new, said):
    with pytest.raises(WeightsError, match=said):
        write_card(tmp_path, MINIMAL.replace(old, new))


@pytest.mark.parametrize(
    ("fields", "address"),
    [
        ({"file": "f", "url": "https://example.org/f"}, "https://example.org/f"),
        ({"repository": "a/b", "subfolder": "vae"}, "https://huggingface.co/a/b"),
        (
            {"file": "f.pt", "repository": "a/b", "revision": "v1", "subfolder": "c"},
            "https://huggingface.co/a/b/resolve/v1/c/f.pt",
        ),
        ({"file": "f"}, ""),
    ],
)
def test_address_is_where_a_person_would_look(fields, address):
    card = Card(name="one", role="recognizer", architecture="mobilefacenet", **fields)
    assert card.address == address


def test_unknown_card_names_its_neighbours(home):
    write_card(home / "given")
    with pytest.raises(UnknownName, match="did you mean one"):
        WeightStore(home / "given").card("onee")


def test_cards_of_the_folder_given_are_listed_and_come_first(home):
    write_card(home / "variable", MINIMAL + 'summary = "variable"\n')
    assert WeightStore().card("one").summary == "variable"
    write_card(home / "given", MINIMAL + 'summary = "given"\n')
    store = WeightStore(home / "given")
    assert store.card("one").summary == "given"
    assert {"one", "taef2"} <= set(store.names())


def test_places_are_searched_in_the_promised_order(home):
    card = write_card(home / "given")
    store = WeightStore(home / "given")
    cache = write_weights(home / "cache" / "shields" / card.file, 3)
    assert store.find(card) == cache
    variable = write_weights(home / "variable" / card.file, 2)
    assert store.find(card) == variable
    given = write_weights(home / "given" / card.file, 1)
    assert store.find(card) == given
    assert torch.equal(store.state_dict(card)["weight"], torch.ones(2, 2))


def test_missing_weights_list_every_place_tried(home):
    card = write_card(home / "given")
    with pytest.raises(WeightsError) as caught:
        WeightStore(home / "given").find(card)
    for place in (home / "given", home / "variable", ROOT / "checkpoints", home / "cache/shields"):
        assert str(place / "one.safetensors") in str(caught.value)


def test_file_in_the_cache_of_torch_hub_is_found_where_the_card_has_an_address(home):
    card = write_card(home / "given", MINIMAL + 'url = "https://example.org/one.safetensors"\n')
    path = write_weights(home / "torch" / "hub" / "checkpoints" / card.file)
    assert WeightStore().find(card) == path


def test_folder_in_the_cache_of_hugging_face_is_found(home):
    repository = home / "hub" / "models--a--b"
    snapshot = repository / "snapshots" / ("0" * 40)
    write_weights(snapshot / "vae" / "diffusion_pytorch_model.safetensors")
    (snapshot / "vae" / "config.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    card = Card(
        name="b", role="autoencoder", architecture="diffusers", repository="a/b", subfolder="vae"
    )
    assert WeightStore().find(card) == snapshot / "vae"
    assert WeightStore().verify(card) == snapshot / "vae"
    elsewhere = replace(card, subfolder="other")
    with pytest.raises(WeightsError, match="cache of Hugging Face"):
        WeightStore().find(elsewhere)


def test_folder_of_the_cards_name_in_a_place_comes_before_any_cache(home):
    folder = home / "given" / "b"
    write_weights(folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text("{}")
    card = Card(name="b", role="autoencoder", architecture="diffusers", repository="a/b")
    assert WeightStore(home / "given").find(card) == folder


def test_digest_is_that_of_the_content_even_after_it_changed(tmp_path):
    path = tmp_path / "file"
    for content in (b"first", b"other"):
        path.write_bytes(content)
        os.utime(path, ns=(0, len(content) + content[0]))
        assert digest(path) == hashlib.sha256(content).hexdigest()


@pytest.mark.parametrize("digits", [64, 8])
def test_weights_must_have_the_digest_of_their_card(home, digits):
    path = write_weights(home / "given" / "one.safetensors")
    right = hashlib.sha256(path.read_bytes()).hexdigest()[:digits]
    card = write_card(home / "given", MINIMAL + f'sha256 = "{right}"\n')
    store = WeightStore(home / "given")
    assert store.find(card) == path
    wrong = replace(card, sha256="0" * digits)
    with pytest.raises(WeightsError, match=r"one.*sha256"):
        store.find(wrong)


def test_verify_compares_the_size(home):
    path = write_weights(home / "given" / "one.safetensors")
    card = write_card(home / "given", MINIMAL + f"bytes = {path.stat().st_size}\n")
    store = WeightStore(home / "given")
    assert store.verify(card) == path
    with pytest.raises(WeightsError, match="bytes"):
        store.verify(replace(card, bytes=1))


class Bomb:
    """Writes a file when it is unpickled carelessly."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_pickle_with_code_is_refused_and_not_run(tmp_path):
    trace = tmp_path / "ran"
    torch.save({"weight": torch.ones(1), "bomb": Bomb(trace)}, tmp_path / "bad.pth")
    with pytest.raises(WeightsError, match=r"bad\.pth.*more than tensors"):
        read_state_dict(tmp_path / "bad.pth")
    assert not trace.exists()


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("keep", [0, 20, -4])
def test_truncated_file_is_a_clear_error(tmp_path, suffix, keep):
    path = tmp_path / f"cut{suffix}"
    state = {"weight": torch.ones(64)}
    save_file(state, path) if suffix == ".safetensors" else torch.save(state, path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(WeightsError, match=f"cut{suffix} is damaged"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ({"weight": torch.tensor([1.0, float("nan")])}, "weight.*not finite"),
        ({"weight": torch.tensor([1.0, float("inf")])}, "weight.*not finite"),
        ({"weight": torch.ones(1), "epoch": 3}, "epoch.*int"),
        ([torch.ones(1)], "list"),
        ({}, "no state dict"),
    ],
)
def test_what_is_no_sound_state_dict_is_refused(tmp_path, content, said):
    torch.save(content, tmp_path / "odd.pth")
    with pytest.raises(WeightsError, match=said):
        read_state_dict(tmp_path / "odd.pth")


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ({"state_dict": {"a": torch.ones(1)}}, ["a"]),
        ({"module.a": torch.ones(1), "module.b": torch.ones(1)}, ["a", "b"]),
        ({"module.a": torch.ones(1), "b": torch.ones(1)}, ["module.a", "b"]),
    ],
)
def test_wrappings_are_taken_off(tmp_path, content, keys):
    torch.save(content, tmp_path / "wrapped.pth")
    assert list(read_state_dict(tmp_path / "wrapped.pth")) == keys


def test_half_precision_is_read_as_float32_and_whole_numbers_stay(tmp_path):
    save_file(
        {"half": torch.tensor([0.5]).half(), "brain": torch.ones(1).bfloat16(),
         "count": torch.tensor(3)}, tmp_path / "mixed.safetensors",
    )  # fmt: skip
    state = read_state_dict(tmp_path / "mixed.safetensors")
    assert {key: value.dtype for key, value in state.items()} == {
        "half": torch.float32,
        "brain": torch.float32,
        "count": torch.int64,
    }


@pytest.mark.parametrize(
    ("state", "said"),
    [
        ({"weight": torch.ones(2, 2)}, r"1 missing \(bias\)"),
        (
            {"weight": torch.ones(2, 2), "bias": torch.ones(2), "extra": torch.ones(1)},
            r"1 unexpected \(extra\)",
        ),
        ({"weight": torch.ones(3, 2), "bias": torch.ones(2)}, r"weight is \(3, 2\), not \(2, 2\)"),
    ],
)
def test_loading_is_strict_and_names_the_keys(state, said):
    network = nn.Linear(2, 2)
    before = network.weight.clone()
    with pytest.raises(WeightsError, match=said):
        load_strictly(network, state, "one")
    assert torch.equal(network.weight, before)


def test_building_leaves_global_random_state_alone():
    card = Card(
        name="one", role="recognizer", architecture="x", file="f",
        config={"in_features": 2, "out_features": 3},
    )  # fmt: skip
    before = torch.get_rng_state()
    assert build(nn.Linear, card).weight.shape == (3, 2)
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(WeightsError, match=r"'one'.*Linear.*widht"):
        build(nn.Linear, replace(card, config={"widht": 3}))


def at(address: str, file: str = "one.safetensors", sha256: str = "") -> Card:
    card = Card(name="one", role="recognizer", architecture="x", file=file, sha256=sha256)
    # Cards take https alone; a file: address makes the same transfer without a network.
    object.__setattr__(card, "url", address)
    return card


def test_pull_puts_the_file_into_the_user_cache(home):
    source = write_weights(home / "server" / "one.safetensors")
    card = at(source.as_uri(), sha256=hashlib.sha256(source.read_bytes()).hexdigest())
    store = WeightStore()
    with pytest.raises(WeightsError, match="shields models pull one"):
        store.find(card)
    assert store.pull(card) == home / "cache" / "shields" / "one.safetensors"
    assert store.find(card).read_bytes() == source.read_bytes()


def test_find_fetches_only_where_that_was_allowed(home):
    source = write_weights(home / "server" / "one.safetensors")
    found = WeightStore(download=True).find(at(source.as_uri()))
    assert found.read_bytes() == source.read_bytes()


@pytest.mark.parametrize("fault", ["another file", "nothing there"])
def test_failed_pull_says_what_to_do_by_hand_and_leaves_nothing(home, fault):
    source = write_weights(home / "server" / "one.safetensors")
    card = at(source.as_uri(), sha256="0" * 64)
    if fault == "nothing there":
        source.unlink()
    with pytest.raises(WeightsError) as caught:
        WeightStore().pull(card)
    cache = home / "cache" / "shields"
    assert source.as_uri() in str(caught.value)
    assert str(cache / "one.safetensors") in str(caught.value)
    assert list(cache.iterdir()) == []


def test_pull_from_hugging_face_without_a_network_is_one_clear_error(home, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    card = Card(name="b", role="autoencoder", architecture="diffusers", repository="a/b")
    with pytest.raises(WeightsError, match=r"'b' could not be fetched.*by hand") as caught:
        WeightStore().pull(card)
    assert "\n" not in str(caught.value)


def test_weights_trained_here_have_no_address_to_pull_from(home):
    card = write_card(home / "given", MINIMAL + 'source = "trained by this project"\n')
    with pytest.raises(WeightsError, match=r"no address.*trained by this project"):
        WeightStore().pull(card)


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/weights")
@pytest.mark.parametrize("name", ["taef2", "mobilefacenet"])
def test_shared_weights_are_those_of_their_cards(name):
    store = WeightStore(SHARED / "weights")
    assert store.verify(store.card(name)).parent == SHARED / "weights"
