"""WebDataset shards: rows and captions beside their pictures, read by place and never unpacked."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmgraft.data.checking import Checker
from mmgraft.data.formats.sources import Checks, Source, index_rows, read_rows
from mmgraft.data.images import check_image, open_image
from mmgraft.data.rows import BadRow
from mmgraft.errors import UsageError
from mmgraft.vision.images import BadImage, StoredImage


def png(width: int = 4) -> bytes:
    stream = io.BytesIO()
    Image.effect_noise((width, 3), 50).save(stream, "PNG")
    return stream.getvalue()


def pack(path: Path, members: dict[str, bytes | str | dict[str, Any]], kind: int = 1) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members.items():
            if isinstance(data, dict):
                data = json.dumps(data)
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def turns(*values: str) -> dict[str, Any]:
    speakers = ("human", "gpt")
    return {
        "conversations": [
            {"from": speakers[at % 2], "value": value} for at, value in enumerate(values)
        ]
    }


def asked(content: Any) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": content},
            {"role": "assistant", "content": "Yes"},
        ]
    }


def shown(row) -> list[Any]:
    return [
        str(part["image"]).rpartition(".tar/")[2] if part["type"] == "image" else part["text"]
        for message in row.messages
        if isinstance(message["content"], list)
        for part in message["content"]
    ]


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_samples_are_rows_in_every_spelling(tmp_path: Path, kind: int) -> None:
    long = "a-folder-with-a-name/" * 5 + "e"  # longer than a head has room for
    path = pack(
        tmp_path / "shard.tar",
        {
            "a.json": turns("<image>\nWhat?", "Red"),
            "a.png": png(5),
            "deep/b.left.png": png(6),
            "deep/b.right.png": png(7),
            "deep/b.json": asked([{"type": "image"}, {"type": "text", "text": "or"},
                                  {"type": "image"}]),
            "./c.txt": "A caption.\n",
            "./c.jpeg": png(8),
            "d.json": {**asked([{"type": "image", "image": "right.png"},
                                {"type": "image", "image": "d.left.png"}]), "id": 7},
            "d.left.png": png(9),
            "d.right.png": png(10),
            f"{long}.json": asked("Only text?"),
        },
        kind,
    )  # fmt: skip
    rows = index_rows(Source(str(path)))
    assert [row.id for row in rows] == ["a", "b", "c", "7", "e"]
    assert [row.messages for row in rows] == [row.messages for row in read_rows(path)]
    assert shown(rows[0]) == ["a.png", "\nWhat?"]
    assert shown(rows[1]) == ["deep/b.left.png", "or", "deep/b.right.png"]
    assert rows[2].messages[1]["content"] == "A caption."
    assert shown(rows[2]) == ["./c.jpeg"]
    assert shown(rows[3]) == ["d.right.png", "d.left.png"]
    assert rows[4].messages[0]["content"] == "Only text?"
    assert rows[3].where == f"{path}, sample 4 (id 7)"
    assert rows.facts.images.tolist() == [1, 2, 1, 2, 0]
    widths = [
        [open_image(part["image"], "w").width for part in row.messages[0]["content"]
         if part["type"] == "image"]
        for row in rows[:4]
    ]  # fmt: skip
    assert widths == [[5], [6, 7], [8], [10, 9]]
    assert list(tmp_path.iterdir()) == [path]  # nothing was unpacked


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ({"b.png": png()}, r"sample 2 \(b\): neither a \.json nor a \.txt in it but b\.png"),
        ({"b.txt": "alone"}, r"sample 2 \(b\): a caption without an image"),
        ({"b.json": "{"}, r"sample 2 \(b\): its json is not JSON"),
        ({"b.json": {"caption": "x"}}, r"sample 2 \(id b\): no 'conversations' or 'messages'"),
        ({"b.json": {"caption": "x"}, "b.txt": b"\xff", "b.png": png()}, "txt is not UTF-8"),
        ({"b.json": turns("Hi", "Ho"), "b.png": png()}, "images are listed, but <image> occurs 0"),
        ({"b.json": asked([{"type": "image"}] * 2), "b.png": png()}, "part without an image"),
        ({"b.json": {**turns("<image>", "Ho"), "image": "../a.png"}, "b.png": png()},
         r"no image \.\./a\.png lies beside this record \(.*shard\.tar/b\.png\)"),
        ({"b.json": {**turns("<image>", "Ho"), "image": "/etc/hostname"}}, r"\(none\)"),
    ],
)  # fmt: skip
def test_samples_that_are_no_rows_are_named_or_left_out(tmp_path, members, says) -> None:
    good = {"a.txt": "A.", "a.png": png()}
    path = pack(tmp_path / "shard.tar", {**good, **members, "z.txt": "Z.", "z.png": png()})
    with pytest.raises(UsageError, match=rf"shard\.tar, .*{says}"):
        index_rows(Source(str(path)))
    bad: list[BadRow] = []
    rows = index_rows(Source(str(path)), Checks(on_bad=bad.append))
    assert [row.id for row in rows] == ["a", "z"]
    assert [one.place for one in bad] == ["sample 2"]
    left = index_rows(Source(str(path)), Checks(leave_out={bad[0].key}))
    assert [left.key(at) for at in range(2)] == [rows.key(at) for at in range(2)]


def test_a_shard_that_is_cut_damaged_or_compressed_is_no_shorter_set(tmp_path: Path) -> None:
    path = pack(tmp_path / "shard.tar", {f"{n}.{e}": d for n in range(3)
                                         for e, d in (("txt", "A."), ("png", png()))})  # fmt: skip
    whole = path.read_bytes()
    wrong = bytearray(whole)
    wrong[4 * 512 + 10] ^= 1  # in the head of the second sample
    for data, says in (
        (whole[: 9 * 512 + 30], r"no whole tar|damaged"),
        (whole[: 8 * 512], "cut short at byte 4096"),  # between two samples
        (bytes(wrong), r"damaged at byte 2048|no whole tar"),
        (b"not a tar", "no whole tar"),
    ):
        path.write_bytes(data)
        with pytest.raises(UsageError, match=rf"shard\.tar.*({says})"):
            index_rows(Source(str(path)))
    packed = tmp_path / "shard.tar.gz"
    packed.write_bytes(whole)
    with pytest.raises(UsageError, match=r"shard\.tar\.gz is compressed"):
        index_rows(Source(str(packed)))


@pytest.mark.parametrize(
    ("members", "says"),
    [
        ([("b.txt", "B."), ("b.png", png()), ("b.png", png())], r"two of its members .* b\.png"),
        ([("b.one.json", "{}"), ("b.two.json", "{}")], r"may be b\.one\.json or b\.two\.json"),
    ],
)
def test_a_sample_that_may_mean_two_things_is_named(tmp_path: Path, members, says) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for name, data in [("a.txt", "A."), ("a.png", png()), *members]:
            data = data.encode() if isinstance(data, str) else data
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    with pytest.raises(UsageError, match=rf"shard\.tar, sample 2 \(b\): .*{says}"):
        index_rows(Source(str(path)))
    bad: list[BadRow] = []
    assert [row.id for row in index_rows(Source(str(path)), Checks(on_bad=bad.append))] == ["a"]
    assert len(bad) == 1


def test_what_stands_beside_a_row_is_not_taken_for_it(tmp_path: Path) -> None:
    row = {**turns("<image> and <image>", "Yes"), "image": ["left.png", "right.png"]}
    members = {
        "._a.json": b"\0", "./v1.0/a.json": row, "./v1.0/a.meta.json": {"messages": []},
        "./v1.0/._a.left.png": b"\0", "./v1.0/a.left.png": png(5), "./v1.0/a.right.png": png(6),
    }  # fmt: skip
    (found,) = index_rows(Source(str(pack(tmp_path / "shard.tar", members))))
    assert shown(found) == ["./v1.0/a.left.png", " and ", "./v1.0/a.right.png"]


def test_a_member_with_holes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w", format=tarfile.GNU_FORMAT) as tar:
        member = tarfile.TarInfo("a.png")
        member.type = tarfile.GNUTYPE_SPARSE  # holes that are said to be a terabyte
        tar.addfile(member)
    head = bytearray(path.read_bytes())
    head[483:495] = b"%011o\0" % 2**32
    head[148:156] = b"%06o\0 " % (sum(head[:148]) + 8 * 32 + sum(head[156:512]))
    path.write_bytes(head)
    with pytest.raises(UsageError, match=r"its member a\.png is a link, a device or sparse"):
        index_rows(Source(str(path)))


def test_links_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "shard.tar"
    with tarfile.open(path, "w") as tar:
        member = tarfile.TarInfo("a.png")
        member.type, member.linkname = tarfile.SYMTYPE, "/etc/hostname"
        tar.addfile(member)
    with pytest.raises(UsageError, match=r"its member a\.png is a link"):
        index_rows(Source(str(path)))


def test_a_shard_that_changed_is_not_read_on(tmp_path: Path) -> None:
    path = pack(tmp_path / "shard.tar", {"a.txt": "A.", "a.png": png()})
    rows = index_rows(Source(str(path)))
    image = rows[0].messages[0]["content"][0]["image"]
    pack(path, {"0.txt": "B.", "0.png": png(), "a.txt": "A.", "a.png": png()})
    with pytest.raises(UsageError, match=r"shard\.tar has changed since"):
        rows[0]
    path.write_bytes(b"")
    with pytest.raises(BadImage, match=r"row 1: .*a\.png.*shorter than it was"):
        open_image(image, "row 1")


def test_pictures_in_a_shard_go_through_the_same_safety(tmp_path: Path, monkeypatch) -> None:
    path = pack(
        tmp_path / "shard.tar",
        {"a.txt": "A.", "a.png": b"no picture", "b.txt": "B.", "b.png": png(90)[:120],
         "c.txt": "C.", "c.png": png(590)},
    )  # fmt: skip
    images = [row.messages[0]["content"][0]["image"] for row in index_rows(Source(str(path)))]
    assert all(isinstance(image, StoredImage) for image in images)
    assert check_image(images[2], "w") == (590, 3)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    for image, fault in zip(images, ("broken", "broken", "enormous"), strict=True):
        for look in (open_image, check_image):
            with pytest.raises(BadImage, match=rf"row 1: .*{image.name}") as raised:
                look(image, "row 1")
            assert raised.value.fault == fault


def test_a_check_of_shards_finds_rows_that_show_the_same_bytes(tmp_path: Path) -> None:
    one, other = png(5), png(6)
    for name, data in (("1", one), ("2", other)):
        pack(
            tmp_path / f"{name}.tar",
            {"a.txt": "A.", "a.png": data, "b.txt": "A.", "b.png": one, "c.txt": "C.",
             "c.png": b"GIF89a"},
        )  # fmt: skip
    rows = index_rows(Source(str(tmp_path)))
    report = Checker().check(rows)
    first = f"{tmp_path}/1.tar, sample 1 (id a)"
    assert report.twice == [
        (f"{tmp_path}/1.tar, sample 2 (id b)", first),
        (f"{tmp_path}/2.tar, sample 2 (id b)", first),
        (f"{tmp_path}/2.tar, sample 3 (id c)", f"{tmp_path}/1.tar, sample 3 (id c)"),
    ]
    assert [(bad.place, bad.fault) for bad in report.bad] == [("sample 3", "broken")] * 2
    assert (report.rows, report.images, report.files, report.ids_twice) == (6, 6, 6, 3)
    assert report.largest == (6, 3, f"{tmp_path}/2.tar/a.png")
