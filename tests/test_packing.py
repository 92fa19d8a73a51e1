"""Packing: bad photos are named, an interrupted pack goes on, labels come from fields."""

from __future__ import annotations

import io
import json
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from PIL import Image as PILImage
from safetensors import safe_open
from safetensors.torch import save_file
from skimage.data import astronaut
from typer.testing import CliRunner

from shields.errors import ConfigError, ImageError, OutputError
from tests import tiny
from tests.photos import chunk
from trainers.cli_pack import pack as command
from trainers.data import FacePack, FacePacks
from trainers.draft import Draft
from trainers.pack import Attribute, Cutter, fill, pack
from trainers.sources import Entry, Source

#: the face of the picture, small enough to be found quickly
FACE = np.ascontiguousarray(astronaut()[20:220, 130:310])


def encoded(pixels: np.ndarray, kind: str = "PNG") -> bytes:
    stream = io.BytesIO()
    PILImage.fromarray(pixels).save(stream, kind)
    return stream.getvalue()


def contents(path: Path) -> tuple[dict[str, list[int]], dict[str, str]]:
    """Tensors as lists, and metadata, whose order in the file is nobody's."""
    with safe_open(path, "pt") as archive:
        names = list(archive.keys())
        tensors = {name: archive.get_tensor(name).flatten().tolist() for name in names}
        return tensors, dict(archive.metadata())


def bomb() -> bytes:
    """A PNG of few bytes that announces 40,000 x 40,000 pixels."""
    header = struct.pack(">IIBBBBB", 40_000, 40_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def large() -> bytes:
    """One that Pillow itself would still decode."""
    header = struct.pack(">IIBBBBB", 12_000, 12_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


BAD = {
    "bomb.png": (bomb(), "decompression bomb"),
    "empty.jpg": (b"", "empty"),
    "large.png": (large(), "too large: 12000x12000"),
    "meadow.png": (encoded(np.full((60, 60, 3), 90, np.uint8)), "no face"),
    "noise.webp": (bytes(range(256)), "no photo; read are JPEG"),
    "sliver.png": (encoded(np.full((2, 900, 3), 90, np.uint8)), "too small"),
    "text.jpg": (b"<html>404</html>", "no photo; read are JPEG"),
    "tiny.png": (encoded(np.zeros((1, 1, 3), np.uint8)), "too small: 1x1"),
    "truncated.jpg": (encoded(FACE, "JPEG")[:3000], "truncated"),
}


class TestBadPhotos:
    def test_they_are_counted_and_named_and_the_rest_is_packed(self, tmp_path: Path) -> None:
        folder = tmp_path / "photos"
        folder.mkdir()
        for name, (content, _) in BAD.items():
            (folder / name).write_bytes(content)
        (folder / "folder.jpg").mkdir()
        # A grey photo with an orientation, which is a good one.
        exif = PILImage.Exif()
        exif[274] = 6
        grey = PILImage.fromarray(FACE).convert("L").transpose(PILImage.Transpose.ROTATE_90)
        grey.save(folder / "grey.jpg", exif=exif)
        output = tmp_path / "pack.safetensors"
        app = typer.Typer()
        app.command()(command)
        result = CliRunner().invoke(app, [str(folder), str(output)])
        assert result.exit_code == 0, result.output
        assert "1 faces of 1 people" in result.output
        for name, (_, reason) in BAD.items():
            assert f"left out {name}: " in result.output
            line = next(line for line in result.output.splitlines() if f"left out {name}" in line)
            assert reason in line
        assert f"left out {len(BAD)} in all" in result.output
        assert not output.with_name("pack.safetensors.part").exists()


class TestDraft:
    FRAME = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)

    def draft(self, folder: Path, **settings: object) -> Draft:
        return Draft(folder / "out.safetensors", {"size": 8} | settings, 8)

    def test_torn_ends_are_cut_off(self, tmp_path: Path) -> None:
        draft = self.draft(tmp_path)
        for number in range(3):
            draft.add(f"{number}.jpg", self.FRAME + number, None, {"labels": [number]})
        draft.skip("bad.jpg", "no face")
        with (draft.folder / "journal.jsonl").open("a") as stream:
            stream.write('{"name": "4.jpg", "lab')
        with draft.faces.path.open("ab") as stream:
            stream.write(b"half a face")
        again = self.draft(tmp_path)
        assert [row["name"] for row in again.rows] == ["0.jpg", "1.jpg", "2.jpg", "bad.jpg"]
        assert again.faces.count == 3
        again.add("4.jpg", self.FRAME + 4, None, {"labels": [4]})
        assert torch.equal(again.faces.tensor()[3], torch.from_numpy(self.FRAME + 4))
        # Faces that never reached the disk: their photos are done again.
        again.faces.cut(1)
        assert [row["name"] for row in self.draft(tmp_path).rows] == ["0.jpg"]

    def test_another_pack_in_the_way_is_not_overwritten(self, tmp_path: Path) -> None:
        self.draft(tmp_path).add("a.jpg", self.FRAME, None, {})
        with pytest.raises(ConfigError, match="another margin"):
            self.draft(tmp_path, margin=2)
        assert len(self.draft(tmp_path).rows) == 1

    def test_a_place_that_cannot_be_written_is_said(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(OutputError, match="cannot write into"):
            self.draft(tmp_path / "file")

    def test_an_interrupted_pack_goes_on_and_ends_alike(self, tmp_path: Path) -> None:
        content = encoded(FACE)
        calls: list[str] = []
        mirrored = encoded(np.ascontiguousarray(FACE[:, ::-1]))

        def source(*, cut: bool) -> Source:
            def reader(name: str) -> bytes:
                calls.append(name)
                if name == "c.png" and cut:
                    raise KeyboardInterrupt
                return {"b.png": b"broken", "c.png": mirrored}.get(name, content)

            entries = [
                Entry(name=name, identity=name, read=lambda name=name: reader(name))
                for name in ("a.png", "b.png", "c.png")
            ]
            return Source(entries=entries, total=3)

        cutter = Cutter(48, 1.8)

        def run(folder: Path, *, cut: bool) -> Draft:
            with Draft(folder / "out.safetensors", {}, 48) as draft:
                fill(draft, source(cut=cut), cutter)
                draft.finish({"faces": draft.faces.tensor()}, {"rows": draft.rows})
            return draft

        run(tmp_path / "through", cut=False)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "halves", cut=True)
        output = tmp_path / "halves" / "out.safetensors"
        assert not output.exists()
        calls.clear()
        run(tmp_path / "halves", cut=False)
        assert calls == ["c.png"]
        assert contents(output) == contents(tmp_path / "through" / "out.safetensors")
        assert [path.name for path in output.parent.iterdir()] == ["out.safetensors"]

    def test_photos_that_changed_in_between_are_noticed(self, tmp_path: Path) -> None:
        draft = self.draft(tmp_path)
        draft.add("a.jpg", self.FRAME, None, {})
        entry = Entry(name="b.jpg", identity="b", read=bytes)
        with pytest.raises(ConfigError, match="begun with other photos"):
            fill(draft, Source(entries=[entry], total=1), Cutter(8, 1.8))


def test_labels_come_from_the_fields_of_a_source(tmp_path: Path) -> None:
    files = {"0.png": encoded(FACE), "0.json": b'{"smile": true}', "1.png": encoded(FACE)}
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as archive:
        for name, content in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    output = tmp_path / "out.safetensors"
    pack(path, output, size=32, attributes=[Attribute.parse("Smiling=smile:true|false")])
    with safe_open(output, "pt") as archive:
        assert archive.get_tensor("labels").tolist() == [[1], [-1]]
    with pytest.raises(ConfigError, match="no field 'mood'; it has: smile"):
        pack(path, output, attributes=[Attribute.parse("Happy=mood:1|0")])
    assert not output.with_name("out.safetensors.part").exists()


class TestDamagedPacks:
    @pytest.fixture
    def packed(self, tmp_path: Path) -> Path:
        """Six faces of three people; the second, third and fourth are damaged."""
        landmarks = tiny.landmarks(6, 16)
        landmarks[1, 2, 0] = float("nan")
        landmarks[2, 0] = landmarks[2, 1]
        path = tmp_path / "faces.safetensors"
        notes = {"identities": ["a", "b", "c"], "files": [f"{n}.jpg" for n in range(6)]}
        save_file(
            {
                "faces": torch.zeros(6, 16, 16, 3, dtype=torch.uint8),
                "landmarks": landmarks,
                "identity": torch.tensor([0, 0, 1, 9, 2, 2]),
            },
            path,
            metadata={key: json.dumps(value) for key, value in notes.items()},
        )
        return path

    def test_damaged_entries_are_left_out_and_named(
        self, packed: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        pack = FacePack(packed, validation=False, share=0.0)
        assert pack.index.tolist() == [0, 4, 5]
        assert pack.damaged == 3
        assert "left out 3 damaged faces: 1.jpg, 2.jpg, 3.jpg" in caplog.text

    @pytest.mark.parametrize("name", ["faces", "landmarks", "identity"])
    def test_a_pack_that_lacks_something_is_none(self, packed: Path, name: str) -> None:
        tensors, notes = {}, {}
        with safe_open(packed, "pt") as archive:
            notes = archive.metadata()
            tensors = {key: archive.get_tensor(key).clone() for key in archive.keys()}  # noqa: SIM118
        short = packed.with_name("short.safetensors")
        save_file(tensors | {name: tensors[name][:4]}, short, metadata=notes)
        del tensors[name]
        save_file(tensors, packed, metadata=notes)
        for path in (packed, short):
            with pytest.raises(ImageError, match="is no face pack"):
                FacePack(path, validation=False)

    def test_a_pack_cut_short_is_none(self, packed: Path) -> None:
        packed.write_bytes(packed.read_bytes()[:-100])
        with pytest.raises(ImageError, match="is no face pack"):
            FacePack(packed, validation=False)

    def test_a_pack_of_strangers_only_says_so(self, packed: Path) -> None:
        with pytest.raises(ImageError, match="no usable face"):
            FacePacks([packed], share=1.0).train_dataloader()


def test_packs_made_before_are_read() -> None:
    path = Path(__file__).parents[1] / ".data" / "portraits.safetensors"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    pack = FacePack(path, validation=False)
    assert pack.damaged == 0
    assert pack[0].keys() == {"face", "landmarks", "identity"}
