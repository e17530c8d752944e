"""Pictures and paths of strangers: every kind of file refuses the same ones, by name."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import struct
import tarfile
import warnings
import zlib
from base64 import b64encode
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmgraft.data.formats.sources import read_rows
from mmgraft.data.images import open_images
from mmgraft.errors import UsageError
from mmgraft.evaluation.items.files import read_items
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.training.stage_data import check_images
from mmgraft.vision.images import BadImage

EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\nshowpage\n%%EOF\n"


def bomb(side: int) -> bytes:
    """A PNG of a few hundred bytes that says it is `side` pixels wide and high."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        ends = struct.pack(">I", len(data)), struct.pack(">I", zlib.crc32(kind + data))
        return ends[0] + kind + data + ends[1]

    head = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    pixels = zlib.compress(bytes(1 << 16), 9)
    chunks = {b"IHDR": head, b"IDAT": pixels, b"IEND": b""}
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*one) for one in chunks.items())


def cut() -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(stream, "PNG")
    return stream.getvalue()[:300]


def thin() -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (3000, 1)).save(stream, "PNG")
    return stream.getvalue()


def depths() -> bytes:
    """Floats that are neither 0 to 1 nor whole numbers."""
    stream = io.BytesIO()
    Image.new("F", (4, 4), -2.5).save(stream, "TIFF")
    return stream.getvalue()


PICTURES: dict[str, tuple[bytes, str]] = {
    "warned.png": (bomb(10_000), "enormous"),  # Pillow itself only warns of it
    "refused.png": (bomb(60_000), "enormous"),
    "cut.png": (cut(), "broken"),
    "page.png": (b"<html>not found</html>", "broken"),
    "drawing.png": (EPS, "broken"),
    "empty.png": (b"", "broken"),
    "thin.png": (thin(), "enormous"),
    "depths.png": (depths(), "broken"),
}
OUTSIDE = [
    "../secret.png",
    "in/../../secret.png",
    "{parent}/secret.png",
    "file://{parent}/secret.png",
]


def turns(image: str) -> list[dict[str, Any]]:
    asked = [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]
    return [{"role": "user", "content": asked}, {"role": "assistant", "content": "no"}]


def llava(image: str) -> dict[str, Any]:
    said = [{"from": "human", "value": "<image> what?"}, {"from": "gpt", "value": "no"}]
    return {"id": "one", "image": image, "conversations": said}


def lines(path: Path, row: dict[str, Any]) -> Path:
    path.write_text(json.dumps(row) + "\n")
    return path


def read_llava(folder: Path, image: str) -> list[Any]:
    return list(read_rows(lines(folder / "rows.jsonl", llava(image)), folder / "images"))


def read_messages(folder: Path, image: str) -> list[Any]:
    row = {"id": "one", "messages": turns(image)}
    return list(read_rows(lines(folder / "rows.jsonl", row), folder / "images"))


def read_table(folder: Path, image: str) -> list[Any]:
    datasets = pytest.importorskip("datasets")
    path = folder / "rows.parquet"
    row = {"id": "one", "messages": json.dumps(turns(image))}
    datasets.Dataset.from_list([row]).to_parquet(str(path))
    return list(read_rows(path, folder / "images"))


def items(folder: Path, path: Path, **more: Any) -> list[Any]:
    spec = {"name": "s", "metric": "exact", "path": str(path), "images": str(folder / "images")}
    return list(read_items(SetSpec.parse({**spec, **more}, "s")))


def read_item_lines(folder: Path, image: str) -> list[Any]:
    row = {"id": "one", "question": "what?", "answer": "no", "image": image}
    return items(folder, lines(folder / "items.jsonl", row))


def read_item_csv(folder: Path, image: str) -> list[Any]:
    path = folder / "items.csv"
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([["question", "answer", "image"], ["what?", "no", image]])
    return items(folder, path)


def read_boxes(folder: Path, image: str) -> list[Any]:
    row = {"id": "one", "question": "it", "box": [0, 0, 1, 1], "image": image}
    return items(folder, lines(folder / "boxes.jsonl", row), metric="box", boxes="pixel")


READERS: list[Callable[[Path, str], list[Any]]] = [
    read_llava, read_messages, read_table, read_item_lines, read_item_csv, read_boxes,
]  # fmt: skip
readers = pytest.mark.parametrize("read", READERS, ids=lambda one: one.__name__)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "images" / "in").mkdir(parents=True)
    for name, (data, _) in PICTURES.items():
        (tmp_path / "images" / name).write_bytes(data)
    Image.new("RGB", (8, 6)).save(tmp_path / "secret.png")
    Image.new("RGB", (8, 6)).save(tmp_path / "images" / "in" / "good.png")
    return tmp_path


def shown(found: list[Any]) -> list[Any]:
    """The images of rows or items."""
    contents = [turn["content"] for one in found for turn in one.messages]
    return [
        part["image"]
        for content in contents
        if isinstance(content, list)
        for part in content
        if part["type"] == "image"
    ]


@readers
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_that_cannot_be_used(folder: Path, read: Any, name: str) -> None:
    """Refuse it where its bytes are read, at the latest; memory stays free."""

    def use() -> None:
        warnings.simplefilter("ignore")  # a warning alone would let it pass
        for one in read(folder, name):
            open_images(shown([one]), f"{one.file}, {one.place}")

    with warnings.catch_warnings(), pytest.raises(BadImage) as caught:
        use()
    assert caught.value.fault == PICTURES[name][1]
    assert re.search(rf"(line|row) [12]\b.*{name}", str(caught.value))


@pytest.mark.parametrize(
    "read", [read_llava, read_messages, read_table], ids=lambda one: one.__name__
)
@pytest.mark.parametrize("name", PICTURES)
def test_a_training_looks_at_it_before_it_begins(folder: Path, read: Any, name: str) -> None:
    found = read(folder, name)
    with pytest.raises(BadImage, match=name) as caught:
        check_images(found)
    assert caught.value.fault == PICTURES[name][1]


@readers
@pytest.mark.parametrize("image", OUTSIDE)
def test_a_path_that_leaves_the_folder(folder: Path, read: Any, image: str) -> None:
    with pytest.raises(BadImage, match="lies outside of the image folder") as caught:
        read(folder, image.format(parent=folder))
    assert caught.value.fault == "outside"


@readers
@pytest.mark.parametrize("image", ["gone.png", "in", "x" * 5000 + ".png", "nul\0.png", "pipe"])
def test_what_is_no_file_is_missing_and_never_waited_for(
    folder: Path, read: Any, image: str
) -> None:
    os.mkfifo(folder / "images" / "pipe")
    if read is read_item_csv and "\0" in image:
        pytest.skip("a CSV file holds no such character")
    with pytest.raises(BadImage, match="not found") as caught:
        read(folder, image)
    assert caught.value.fault == "missing"


@readers
def test_an_address_is_not_fetched(folder: Path, read: Any) -> None:
    with pytest.raises(UsageError, match="is an address"):
        read(folder, "http://127.0.0.1:9/x.png")


@readers
def test_a_link_of_the_folder_s_owner_is_followed(folder: Path, read: Any) -> None:
    """Rows come from strangers; the folder, and the links that lie in it, are one's own."""
    (folder / "images" / "link.png").symlink_to(folder / "secret.png")
    (one,) = shown(read(folder, "link.png"))
    assert open_images([one], "row")[0].size == (8, 6)


@pytest.mark.parametrize("read", [read_llava, read_messages], ids=lambda one: one.__name__)
@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_written_into_its_row(folder: Path, read: Any, name: str) -> None:
    data, fault = PICTURES[name]
    found = read(folder, "data:image/png;base64," + b64encode(data).decode())
    with pytest.raises(BadImage, match=r"rows\.jsonl, line 1") as caught:
        check_images(found)
    assert caught.value.fault == fault


@pytest.mark.parametrize("name", PICTURES)
def test_a_picture_in_a_shard(tmp_path: Path, name: str) -> None:
    data, fault = PICTURES[name]
    path = tmp_path / "in" / "it" / "shard.tar"
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w") as tar:
        for member, content in ((name, data), (name.replace(".png", ".txt"), b"A caption.")):
            entry = tarfile.TarInfo(f"../../{member}")  # never unpacked, so it can leave nothing
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))
    with pytest.raises(BadImage, match=name) as caught:
        check_images(read_rows(path))
    assert caught.value.fault == fault
    assert [one for one in tmp_path.rglob("*") if one.is_file()] == [path]
