"""Photos to pack from folders, tars, WebDatasets, tables and CelebAMask-HQ; bad ones are named."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pyarrow
import pytest
from PIL import Image as PILImage
from pyarrow import parquet
from safetensors import safe_open
from skimage.data import astronaut

from shields.errors import ConfigError, ImageError
from shields.masks import CLASSES
from trainers.celebamask import celebamask, label_map
from trainers.pack import pack
from trainers.sources import Source, expand, gather

#: the face of the picture, small enough to be found quickly
FACE = np.ascontiguousarray(astronaut()[20:220, 130:310])


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    PILImage.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def write_tar(path: Path, files: dict[str, bytes], mode: str = "w") -> Path:
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def read(source: Source) -> dict[str, tuple[str, bytes, dict[str, str]]]:
    """Name -> identity, content, fields; what cannot be read is left out."""
    found = {}
    for entry in source.entries:
        try:
            found[entry.name] = (entry.identity, entry.read(), dict(entry.fields))
        except (ImageError, tarfile.TarError):
            continue
    return found


def reasons(source: Source) -> dict[str, str]:
    """Name -> why it cannot be read."""
    found = {}
    for entry in source.entries:
        try:
            entry.read()
        except (ImageError, tarfile.TarError) as error:
            found[entry.name] = str(error)
    return found


class TestNames:
    def test_braces_and_stars_name_shards(self, tmp_path: Path) -> None:
        for number in range(3):
            (tmp_path / f"s-{number:03d}.tar").touch()
        names = ["s-000.tar", "s-001.tar", "s-002.tar"]
        for pattern in ("s-{000..002}.tar", "s-*.tar", "s-{000,001,002}.tar"):
            assert [path.name for path in expand(tmp_path / pattern)] == names
        assert [path.name for path in expand("{a,b}{8..10}")] == [
            "a8", "a9", "a10", "b8", "b9", "b10",
        ]  # fmt: skip

    def test_a_file_that_is_called_like_a_pattern_is_itself(self, tmp_path: Path) -> None:
        path = tmp_path / "odd{1,2}.tar"
        path.touch()
        assert expand(path) == [path]

    @pytest.mark.parametrize("pattern", ["none.tar", "none-{0..3}.tar", "none-*.tar"])
    def test_what_is_not_there_is_said(self, tmp_path: Path, pattern: str) -> None:
        with pytest.raises(ConfigError, match="there is no"):
            gather([tmp_path / pattern])


class TestFolders:
    def test_folders_are_people_and_hidden_files_are_none(self, tmp_path: Path) -> None:
        for name in ("Ada/one.jpg", "Ada/two.png", "alone.webp", ".trash/x.jpg", "notes.txt"):
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_bytes(name.encode())
        source = gather([tmp_path])
        assert source.total == 3
        people = {name: found[0] for name, found in read(source).items()}
        assert people == {"Ada/one.jpg": "Ada", "Ada/two.png": "Ada", "alone.webp": "alone"}

    def test_several_sources_keep_their_strangers_apart(self, tmp_path: Path) -> None:
        for folder in ("a", "b"):
            (tmp_path / folder).mkdir()
            (tmp_path / folder / "0.jpg").write_bytes(folder.encode())
        found = read(gather([tmp_path / "a", tmp_path / "b"]))
        assert {name: value[:2] for name, value in found.items()} == {
            "a/0.jpg": ("a/0", b"a"), "b/0.jpg": ("b/0", b"b"),
        }  # fmt: skip


SHARD = {
    "000.jpg": b"zero", "000.json": b'{"person": "Ada", "smile": true, "age": 36}',
    "001.jpg": b"one", "001.json": b'{"person": "Bob", "smile": false, "age": 40}',
    "001.mask.png": b"mask", "001.cls": b"7\n", "001.txt": b"a man",
}  # fmt: skip


class TestWebDataset:
    @pytest.mark.parametrize("mode", ["w", "w:gz"])
    def test_fields_stand_beside_the_photos(self, tmp_path: Path, mode: str) -> None:
        source = gather([write_tar(tmp_path / "s.tar", SHARD, mode)], identity="person")
        assert source.has_fields
        assert source.total == 2
        found = read(source)
        assert found["000.jpg"] == ("Ada", b"zero", {"person": "Ada", "smile": "true", "age": "36"})
        assert found["001.jpg"][:2] == ("Bob", b"one")
        assert found["001.jpg"][2] | {"cls": "7", "txt": "a man"} == found["001.jpg"][2]

    def test_a_tar_without_companions_is_a_folder(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "t.tar", {"l/Ada_L/b.c.jpg": b"x", "l/Ada_L/a.jpg": b"y"})
        source = gather([path])
        assert not source.has_fields
        assert list(read(source)) == ["l/Ada_L/a.jpg", "l/Ada_L/b.c.jpg"]
        assert {found[0] for found in read(source).values()} == {"Ada_L"}

    def test_damaged_companions_and_shards_are_named(self, tmp_path: Path) -> None:
        write_tar(tmp_path / "0.tar", SHARD | {"001.json": b"{no json"})
        cut = write_tar(tmp_path / "1.tar", {"002.jpg": b"two" * 3000, "003.jpg": b"three" * 3000})
        cut.write_bytes(cut.read_bytes()[:12_000])
        (tmp_path / "2.tar").write_bytes(b"no tar at all")
        (tmp_path / "3.tar").write_bytes(b"")
        source = gather([tmp_path / "{0..3}.tar"])
        assert set(read(source)) == {"0.tar/000.jpg", "1.tar/002.jpg"}
        bad = reasons(source)
        assert "stands beside" in bad["0.tar/001.jpg"]
        assert "neither a folder, a tar" in bad["2.tar"]
        assert {"0.tar/001.jpg", "2.tar", "3.tar"} < set(bad)
        assert any(name.startswith("1.tar") for name in bad)
        assert source.total == len(read(source)) + len(bad)

    def test_a_photo_without_the_field_that_was_asked_for_is_named(self, tmp_path: Path) -> None:
        path = write_tar(tmp_path / "s.tar", SHARD | {"002.jpg": b"two"})
        assert list(reasons(gather([path], identity="person"))) == ["002.jpg"]


class TestTables:
    @staticmethod
    def table() -> pyarrow.Table:
        image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
        rows = [{"bytes": b"zero", "path": "z.png"}, {"bytes": None, "path": None},
                {"bytes": b"two", "path": None}]  # fmt: skip
        columns = {
            "image": pyarrow.array(rows, image),
            "label": pyarrow.array([1, 0, 1]),
            "who": pyarrow.array(["Ada", "Bob", "Ada"]),
        }
        note = {"info": {"features": {"label": {"names": ["no", "yes"], "_type": "ClassLabel"}}}}
        table = pyarrow.table(columns)
        return table.replace_schema_metadata({"huggingface": json.dumps(note)})

    @pytest.fixture(params=["parquet", "arrow"])
    def folder(self, tmp_path: Path, request: pytest.FixtureRequest) -> Path:
        """As a data set is published, and as `save_to_disk` writes it."""
        (tmp_path / "train").mkdir()
        table = self.table()
        if request.param == "parquet":
            parquet.write_table(table, tmp_path / "train" / "0.parquet")
            return tmp_path
        (tmp_path / "train" / "dataset_info.json").write_text("{}")
        for name in ("data-0.arrow", "cache-1.arrow"):
            with pyarrow.OSFile(str(tmp_path / "train" / name), "wb") as sink, \
                    pyarrow.ipc.new_stream(sink, table.schema) as writer:  # fmt: skip
                writer.write_table(table)
        return tmp_path

    def test_images_and_fields_come_from_columns(self, folder: Path) -> None:
        source = gather([folder], identity="who")
        assert source.total == 3
        found = list(read(source).items())
        assert [name.split("/")[-1].split(":")[-1] for name, _ in found] == ["z.png", "2"]
        assert [value for _, value in found] == [
            ("Ada", b"zero", {"label": "yes", "who": "Ada"}),
            ("Ada", b"two", {"label": "yes", "who": "Ada"}),
        ]
        assert list(reasons(source).values()) == ["the row holds no image"]

    def test_a_column_that_is_not_there_is_said(self, folder: Path) -> None:
        with pytest.raises(ConfigError, match="'person'; it has: image, label, who"):
            gather([folder], identity="person")

    def test_a_damaged_table_harms_no_other(self, folder: Path) -> None:
        good = next(path for path in folder.rglob("*") if path.suffix in {".parquet", ".arrow"}
                    and not path.name.startswith("cache-"))  # fmt: skip
        good.with_name(f"x{good.suffix}").write_bytes(b"PAR1 nothing")
        source = gather([folder])
        assert len(read(source)) == 2
        assert any("damaged" in reason for reason in reasons(source).values())

    def test_a_table_without_images_says_what_it_has(self, tmp_path: Path) -> None:
        parquet.write_table(pyarrow.table({"age": [3]}), tmp_path / "t.parquet")
        with pytest.raises(ImageError, match=r"no column of images.*it has: age"):
            gather([tmp_path / "t.parquet"])


@pytest.fixture
def celeba(tmp_path: Path) -> Path:
    """Two photos in CelebAMask-HQ's layout; masks have half the photo's sides."""
    folder = tmp_path / "CelebAMask-HQ"
    masks = folder / "CelebAMask-HQ-mask-anno" / "0"
    (folder / "CelebA-HQ-img").mkdir(parents=True)
    masks.mkdir(parents=True)
    for number in (0, 10):
        (folder / "CelebA-HQ-img" / f"{number}.jpg").write_bytes(encoded(FACE, "JPEG"))
        for name, rows in (("skin", slice(0, 80)), ("l_eye", slice(20, 30)), ("hair", slice(0, 9))):
            mask = np.zeros((100, 90, 3), np.uint8)
            mask[rows] = 255
            PILImage.fromarray(mask).save(masks / f"{number:05d}_{name}.png")
    (folder / "CelebAMask-HQ-attribute-anno.txt").write_text(
        "2\nMale Smiling Young\n0.jpg  -1  1 -1\n10.jpg 1 -1 -1\n"
    )
    (folder / "CelebA-HQ-to-CelebA-mapping.txt").write_text(
        "idx    orig_idx    orig_file\n0  5  000006.jpg\n10  8  000009.jpg\n"
    )
    return folder


class TestCelebaMask:
    def test_masks_lie_over_each_other_as_they_should(self, celeba: Path) -> None:
        labels = label_map(celeba / "CelebAMask-HQ-mask-anno", 10)
        assert labels.shape == (100, 90)
        named = [CLASSES[labels[row, 0]] for row in (0, 8, 9, 19, 20, 29, 30, 79, 80, 99)]
        assert named == ["hair", "hair", "skin", "skin", "l_eye", "l_eye", "skin", "skin",
                         "background", "background"]  # fmt: skip

    def test_people_and_attributes_come_from_the_lists(self, celeba: Path) -> None:
        entries = list(celebamask(celeba).entries)
        assert [entry.name for entry in entries] == ["0.jpg", "10.jpg"]
        assert [entry.identity for entry in entries] == ["000006.jpg", "000009.jpg"]
        assert entries[1].fields == {"Male": "1", "Smiling": "-1", "Young": "-1"}
        (celeba / "identity_CelebA.txt").write_text("000006.jpg 77\n000009.jpg 77\n")
        assert {entry.identity for entry in celebamask(celeba).entries} == {"celeba-77"}

    def test_a_damaged_list_is_said(self, celeba: Path) -> None:
        path = celeba / "CelebAMask-HQ-attribute-anno.txt"
        path.write_text(path.read_text() + "11.jpg 1 -1\n")
        with pytest.raises(ConfigError, match=r"the line of 11\.jpg"):
            gather([celeba])

    def test_masks_are_cut_as_the_faces_are(self, celeba: Path, tmp_path: Path) -> None:
        masks = celeba / "CelebAMask-HQ-mask-anno" / "0"
        (masks / "00010_skin.png").write_bytes(b"\x89PNG no more")
        # The mask of the other photo is its own brightness, so that the cut can be compared.
        bright = FACE.mean(axis=2) > 128
        for name in ("l_eye", "hair", "skin"):
            (masks / f"00000_{name}.png").unlink()
        PILImage.fromarray((bright * 255).astype(np.uint8)).save(masks / "00000_nose.png")
        output = tmp_path / "pack.safetensors"
        report = pack(celeba, output, size=96, masks="source")
        assert list(report.skipped) == ["10.jpg"]
        assert "00010_skin.png is damaged" in report.skipped["10.jpg"]
        with safe_open(output, "pt") as archive:
            face, parts = archive.get_tensor("faces")[0], archive.get_tensor("parts")[0]
            assert json.loads(archive.metadata()["attributes"]) == ["Male", "Smiling", "Young"]
            assert archive.get_tensor("labels").tolist() == [[0, 1, 0]]
        assert set(parts.unique().tolist()) == {0, CLASSES.index("nose")}
        agreeing = (face.float().mean(dim=2) > 128) == (parts > 0)
        assert agreeing.float().mean() > 0.95
