"""`data check` and `data preview` without a command line: every number against a hand count."""

from __future__ import annotations

import base64
import gc
import io
import weakref
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from mmgraft.data import checking
from mmgraft.data.chat.labels import supervise_row
from mmgraft.data.chat.preview import preview_row
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.checking import Checker
from mmgraft.data.rows import BadRow, Row
from mmgraft.errors import UsageError
from mmgraft.vision.images import BadImage
from text_tokenizers import KINDS, template, text_tokenizer

PATCHES = 4


def processor_of(kind: str = "byte_bpe", name: str | None = "smollm2") -> GraftProcessor:
    if name is None:
        return GraftProcessor(text_tokenizer(kind), PATCHES, 4, "plain")
    return GraftProcessor(text_tokenizer(kind, template(name)), PATCHES, 4)


def row(name: str, *images: Any, ask: str = "What?", answer: str | None = "A cat.") -> Row:
    parts: list[dict[str, Any]] = [{"type": "image", "image": str(image)} for image in images]
    content: Any = [*parts, {"type": "text", "text": ask}] if images else ask
    messages = [{"role": "user", "content": content}]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    return Row(name, messages, "d.jsonl", f"line {name}")


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    for width in (5, 40):
        Image.effect_noise((width, 30), 50).save(tmp_path / f"{width}.png")
    whole = bytearray((tmp_path / "40.png").read_bytes())
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])
    whole[whole.index(b"IDAT") + 6] ^= 255
    (tmp_path / "spoilt.png").write_bytes(whole)
    return tmp_path


def test_every_fault_is_found_and_named_once(pictures: Path, monkeypatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    Image.new("1", (40, 40)).save(pictures / "bomb.png")
    rows = [
        row("1", pictures / "5.png", pictures / "40.png"),
        row("2", pictures / "none.png", answer=None),  # two faults are one bad row
        row("3", pictures / "none.png"),
        row("4", pictures / "short.png"),
        row("5", pictures / "spoilt.png"),
        row("6", pictures / "bomb.png"),
        row("7", "https://example.org/a.png"),
        row("8", pictures / "5.png", ask="What? " * 60),
        row("9"),
    ]
    unread = [BadRow("/d.jsonl", "line 10", None, "row", "d.jsonl, line 10: not JSON")]
    report = Checker(processor_of(), max_length=100).check(rows, unread)
    found = [(bad.place, bad.fault) for bad in report.bad]
    assert found == [
        ("line 10", "row"), ("line 2", "empty"), ("line 3", "missing"), ("line 4", "broken"),
        ("line 5", "broken"), ("line 6", "enormous"), ("line 7", "row"), ("line 8", "empty"),
    ]  # fmt: skip
    assert all(bad.reason.startswith(f"d.jsonl, {bad.place}") for bad in report.bad)
    assert sum(report.faults().values()) == 8
    assert (report.rows, report.text_rows, report.images, report.files) == (10, 1, 9, 7)
    assert report.largest == (40, 30, str(pictures / "40.png"))
    assert len(report.lengths) == 2
    quick = Checker(quick=True).check(rows)
    assert [bad.place for bad in quick.bad if bad.fault == "broken"] == ["line 4"]


def test_a_broken_picture_is_not_held_in_memory(monkeypatch) -> None:
    """An error keeps what its functions held, which may be a picture that is half decoded."""

    class Pixels:
        pass

    held: list[weakref.ref[Pixels]] = []

    def look(image: Any, where: str) -> Any:
        pixels = Pixels()
        held.append(weakref.ref(pixels))
        raise BadImage(f"{image} is broken")

    monkeypatch.setattr(checking, "check_image", look)
    checker = Checker(quick=True)
    report = checker.check([row("1", "a.png"), row("2", "a.png")])
    gc.collect()
    assert [bad.fault for bad in report.bad] == ["broken", "broken"]
    assert len(held) == 1  # looked at once
    assert held[0]() is None


def test_lengths_are_those_of_the_rows_as_they_are_trained(pictures: Path) -> None:
    processor = processor_of()
    rows = [row(str(n), pictures / "5.png", answer="A cat. " * n) for n in range(1, 21)]
    report = Checker(processor, max_length=100).check(rows)
    encoded = [supervise_row(processor, one) for one in rows]
    lengths = [len(one) for one in encoded]
    numbers = report.positions()
    assert numbers is not None
    assert (numbers["shortest"], numbers["longest"]) == (lengths[0], lengths[-1])
    assert numbers["median"] == (lengths[9] + lengths[10]) / 2
    assert numbers["p95"] == lengths[18]
    assert numbers["all"] == sum(lengths)
    assert numbers["of_images"] == 20 * PATCHES
    assert numbers["learned"] == sum(label != -100 for one in encoded for label in one.labels)
    assert report.longest[0] == (lengths[-1], rows[-1].where)
    assert len(report.longest) == 10
    wanted = [one.where for one, length in zip(rows, lengths, strict=True) if length > 100]
    assert report.cut == wanted
    assert 0 < len(wanted) < 20
    assert Checker().check(rows).positions() is None


def test_rows_that_come_twice_and_text_rows(pictures: Path, monkeypatch) -> None:
    rows = [
        row("1", pictures / "5.png"),
        row("2", pictures / "40.png"),  # another picture
        row("3", pictures / "5.png"),
        row("1", answer=None),
        row("4", pictures / "5.png", ask="what?"),
    ]
    opened: list[str] = []
    original = checking.open_image
    monkeypatch.setattr(
        checking, "open_image", lambda name, where: opened.append(name) or original(name, where)
    )
    report = Checker(skip_text=True).check(rows)
    assert report.twice == [(rows[2].where, rows[0].where)]
    assert report.ids_twice == 1
    assert report.bad == []  # the text row is left out, so it needs no answer
    assert len(opened) == 2  # each picture once
    assert [bad.place for bad in Checker().check(rows).bad] == ["line 1"]


def test_a_data_uri_is_a_picture_too(pictures: Path, monkeypatch) -> None:
    data = base64.b64encode((pictures / "40.png").read_bytes()).decode()
    rows = [row("1", f"data:image/png;base64,{data}")]
    report = Checker().check(rows)
    assert report.largest == (40, 30, "a data URI")
    assert report.bad == []
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 700)  # Pillow would only warn
    assert [bad.fault for bad in Checker().check(rows).bad] == ["enormous"]


# One row


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["smollm2", None])
def test_a_preview_has_every_position_and_every_character(kind: str, name: str | None) -> None:
    processor = processor_of(kind, name)
    messages = [
        {"role": "user", "content": [{"type": "image", "image": "a.png"},
                                     {"type": "image", "image": "b.png"},
                                     {"type": "text", "text": "which one?"}]},
        {"role": "assistant", "content": "the red \u00e9\U0001f600 one"},
        {"role": "user", "content": "and now?"},
        {"role": "assistant", "content": "none"},
    ]  # fmt: skip
    one = Row("x", messages, "d.jsonl", "line 1")
    encoded = supervise_row(processor, one)
    shown = preview_row(processor, one)
    assert shown.count() == shown.whole == len(encoded)
    images = [piece for piece in shown.pieces if piece.kind == "image"]
    assert [(piece.text, piece.positions) for piece in images] == [("a.png", 4), ("b.png", 4)]
    learned = [piece for piece in shown.pieces if piece.kind == "learned"]
    assert sum(piece.positions for piece in learned) == sum(x != -100 for x in encoded.labels)
    assert len(learned) == 2
    ids = [x for x, kind in zip(encoded.input_ids, encoded.kinds, strict=True) if not kind]
    text = processor.tokenizer.decode(ids, clean_up_tokenization_spaces=False)
    assert "".join(piece.text for piece in shown.pieces if piece.kind != "image") == text


def test_a_preview_ends_where_the_row_is_cut() -> None:
    processor = processor_of()
    long = row("1", "a.png", answer="A cat. " * 30)
    shown = preview_row(processor, long, 100)
    assert shown.count() == 100
    assert shown.whole == len(supervise_row(processor, long)) > 100
    assert shown.as_dict()["before_cut"] == shown.whole
    with pytest.raises(UsageError, match=r"line 1 \(id 1\): .* nothing to learn"):
        preview_row(processor, long, 10)


def test_an_image_in_the_row_itself_has_a_short_name() -> None:
    stream = io.BytesIO()
    Image.effect_noise((40, 40), 50).save(stream, "PNG")
    uri = "data:image/png;base64," + base64.b64encode(stream.getvalue()).decode()
    shown = preview_row(processor_of(), row("1", uri))
    (piece,) = [piece for piece in shown.pieces if piece.kind == "image"]
    assert len(piece.text) < 60
