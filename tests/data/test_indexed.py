"""Rows that stay on disk: the same rows as in memory, few bytes for each, facts without reading."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmgraft.data.batches.sampler import Part, mix
from mmgraft.data.chat.turns import images_of_all
from mmgraft.data.formats.indexed import Joined, Selected, facts_of, key_at, select
from mmgraft.data.formats.sources import Checks, Source, index_rows, is_there, read_rows, row_at
from mmgraft.data.rows import BadRow, Row, key_of
from mmgraft.errors import UsageError


def record(number: int) -> dict[str, Any]:
    parts = [{"type": "image", "image": f"{number}-{one}.png"} for one in range(number % 3)]
    asked = [*parts, {"type": "text", "text": "?" * number}]
    turns = [{"role": "user", "content": asked if parts else "?" * number}]
    if number % 5:
        turns.append({"role": "assistant", "content": "yes"})
    return {"id": f"r{number}", "messages": turns}


def write(path: Path, numbers: range) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(json.dumps(record(number)) for number in numbers) + "\n\n")
    return path


LOOSE = Checks(images=False)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Twelve rows in three shards of a folder, one of which is a list."""
    write(tmp_path / "s" / "part-08.jsonl", range(1, 5))
    write(tmp_path / "s" / "part-09.jsonl", range(5, 6))
    listed = [record(number) for number in range(6, 13)]
    (tmp_path / "s" / "part-10.json").write_text(json.dumps(listed, indent=1))
    (tmp_path / "s" / "notes.txt").write_text("not a shard")
    return tmp_path / "s"


def ids(rows: Any) -> list[str]:
    return [row.id for row in rows]


ALL = [f"r{number}" for number in range(1, 13)]


def test_a_set_is_a_file_a_folder_a_pattern_or_a_range(shards: Path) -> None:
    for name, wanted in {
        "": ALL, "part-*.json*": ALL, "../s/**/*.jsonl": ALL[:5], "part-{08..09}.jsonl": ALL[:5],
        "part-{8..9}.jsonl": None, "part-{07..09}.jsonl": None, "part-08.jsonl": ALL[:4],
        "part-1?.json": ALL[5:], "none-*": None,
    }.items():  # fmt: skip
        path = str(shards / name)
        if wanted is None:
            with pytest.raises(UsageError, match=r"no data file .*hub:OWNER/NAME|1 of its files"):
                index_rows(Source(path), LOOSE)
            continue
        assert is_there(path)
        rows = index_rows(Source(path), LOOSE)
        assert ids(rows) == wanted
        assert len(rows) == len(wanted)
        assert [row.messages for row in rows] == [
            row.messages for row in read_rows(path, check_images=False)
        ]
    (shards / "empty").mkdir()
    with pytest.raises(UsageError, match="holds no shards"):
        index_rows(Source(str(shards / "empty")))
    assert ids(index_rows(Source(str(shards / "part-*{0..1}*")), LOOSE)) == ALL  # both find 10
    (shards / "._part-08.jsonl").write_bytes(b"\0")  # hidden, as a pattern has it
    assert ids(index_rows(Source(str(shards)), LOOSE)) == ALL
    (shards / "part-08.jsonl.gz").write_bytes(b"")  # of one that is there unpacked
    assert ids(index_rows(Source(str(shards)), LOOSE)) == ALL
    (shards / "part-11.jsonl.gz").write_bytes(b"")
    with pytest.raises(
        UsageError, match=r"part-11\.jsonl\.gz is compressed, and would be left out"
    ):
        index_rows(Source(str(shards)))
    (shards / "part-11.jsonl.gz").unlink()
    odd = write(shards / "a[1].jsonl", range(3))  # a name that is a pattern as well
    assert ids(index_rows(Source(str(odd)), LOOSE)) == ["r0", "r1", "r2"]


def test_a_limit_and_a_number_count_over_all_shards(shards: Path) -> None:
    for limit in (1, 4, 5, 7, 99):
        rows = index_rows(Source(str(shards), limit=limit), LOOSE)
        assert ids(rows) == ALL[:limit]
        assert ids(read_rows(shards, limit=limit, check_images=False)) == ALL[:limit]
    assert row_at([Source(str(shards))], 6).where.endswith("part-10.json, row 1 (id r6)")
    with pytest.raises(UsageError, match="has 12 rows, so none is number 13"):
        row_at([Source(str(shards))], 13)


def test_a_number_counts_over_all_entries_in_order(shards: Path, tmp_path: Path) -> None:
    one, other = write(tmp_path / "one.jsonl", range(3)), write(tmp_path / "other.jsonl", range(2))
    entries = [Source(str(one), limit=2), Source(str(other))]
    found = [row_at(entries, number).where for number in range(1, 5)]
    assert [where.partition(" (")[0] for where in found] == [
        f"{file}, line {line}" for file in (one, other) for line in (1, 2)
    ]
    with pytest.raises(UsageError, match=r"one\.jsonl, .*other\.jsonl have 4 rows"):
        row_at(entries, 5)


def test_facts_keys_and_places_are_those_of_the_rows(shards: Path) -> None:
    rows = index_rows(Source(str(shards)), LOOSE)
    held = list(rows)
    draw = np.random.default_rng(0).integers(0, 12, 30)
    views = {
        "all": (rows, held),
        "drawn": (Selected(rows, draw), [held[at] for at in draw]),
        "drawn twice": (Selected(Selected(rows, draw), draw[:9] % 12), None),
        "joined": (Joined([rows, held[:3], Selected(rows, draw)]), None),
        "of a list": (select(held, np.array([5, 2])), [held[5], held[2]]),
    }
    for view, wanted in views.values():
        found = list(pickle.loads(pickle.dumps(view)))  # as processes that load rows have them
        assert wanted is None or found == wanted
        assert [view[at] for at in range(-len(view), 0)] == found
        assert list(view[1:-1:2]) == found[1:-1:2]
        assert [key_at(view, at) for at in range(len(view))] == [key_of(row) for row in found]
        facts, slow = facts_of(view), facts_of(found)
        assert facts.images.tolist() == [len(list(images_of_all(row.messages))) for row in found]
        for name in ("characters", "images", "answers"):
            assert getattr(facts, name).tolist() == getattr(slow, name).tolist()
        with pytest.raises(IndexError):
            view[len(view)]
    assert facts_of(held).characters.tolist() == [n + 3 * bool(n % 5) for n in range(1, 13)]
    assert facts_of(held).answers.tolist() == [bool(n % 5) for n in range(1, 13)]
    assert select(rows, np.ones(12, dtype=bool)) is rows
    assert ids(select(rows, facts_of(rows).with_image)) == [i for i in ALL if int(i[1:]) % 3]


def test_a_source_of_bad_rows_alone_says_what_is_wrong_with_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}\n')
    bad: list[BadRow] = []
    with pytest.raises(
        UsageError, match=r"not one of its rows can be used; the first: .*line 1 .*"
    ):
        index_rows(Source(str(path)), Checks(on_bad=bad.append))
    assert len(bad) == 2
    assert len(index_rows(Source(str(path)), Checks(on_bad=bad.append, one=False))) == 0
    assert len(bad) == 4
    path.write_text("\n")
    with pytest.raises(UsageError, match="has no rows"):
        index_rows(Source(str(path)), Checks(on_bad=bad.append, one=False))


def test_bad_rows_are_left_out_and_stay_so(shards: Path) -> None:
    path = shards / "part-08.jsonl"
    path.write_text(path.read_text().replace('"r2"', '"r2').replace('"user"', '"nobody', 1))
    bad: list[BadRow] = []
    rows = index_rows(Source(str(shards)), Checks(images=False, on_bad=bad.append))
    assert ids(rows) == ALL[2:]
    assert [one.place for one in bad] == ["line 1", "line 2"]
    write(path, range(1, 5))  # mended
    again = Checks(images=False, leave_out={one.key for one in bad})
    assert ids(index_rows(Source(str(shards)), again)) == ALL[2:]


def test_rows_cost_a_few_bytes_each(tmp_path: Path) -> None:
    """A million within 150 MB leaves 150 bytes a row, for all of its copies and its order."""
    counts = (100, 2100)
    held = []
    for count in counts:
        path = write(tmp_path / f"{count}.jsonl", range(1))
        path.write_text((json.dumps(record(4)) + "\n") * count)
        mixed = mix([Part(index_rows(Source(str(path)), LOOSE), 1.5)], seed=1)
        kept = select(mixed, facts_of(mixed).with_image)
        held.append(len(pickle.dumps([mixed, kept])))
        assert len(kept) == count * 1.5
    assert (held[1] - held[0]) / (counts[1] - counts[0]) < 40


# Mixtures


def plain(name: str, count: int, images: int) -> list[Row]:
    image = [{"type": "image", "image": "a.png"}]
    return [
        Row(f"{name}{at}", [{"role": "user", "content": image if at < images else "Hi"}])
        for at in range(count)
    ]


@pytest.mark.parametrize("share", [0.05, 0.25, 0.5, 0.9])
def test_a_share_of_image_rows_is_kept_to(share: float) -> None:
    parts = [Part(plain("a", 30, 10), 2), Part(plain("b", 40, 40))]
    drawn = mix(parts, seed=1, image_share=share)
    assert len(drawn) == 100
    shown = [row.has_image for row in drawn]
    assert sum(shown) == round(share * 100)
    assert facts_of(drawn).with_image.tolist() == shown
    assert ids(drawn) == ids(mix(parts, seed=1, image_share=share))
    assert ids(drawn) != ids(mix(parts, seed=2, image_share=share))
    times = {row.id: ids(drawn).count(row.id) for part in parts for row in part.rows}
    # Within a kind, a row of weight 2 comes about twice as often as one of weight 1.
    for kind in (range(10), range(10, 30)):
        counts = [times[f"a{at}"] for at in kind]
        assert max(counts) - min(counts) <= 2
    spread = [times[f"b{at}"] for at in range(40)]
    assert max(spread) - min(spread) <= 1
    assert 0.3 < shown[:50].count(True) / max(1, sum(shown)) < 0.7  # shuffled


def test_a_share_of_rows_that_are_not_there_is_refused() -> None:
    for rows, kind in ((plain("a", 4, 4), "without an image"), (plain("a", 4, 0), "with an image")):
        with pytest.raises(UsageError, match=rf"image_share: 0.5 wants 2 of 4 rows {kind}"):
            mix([Part(rows)], image_share=0.5)


def test_a_mixture_without_a_share_is_what_it_was() -> None:
    """The order of runs that are half done: as drawn by the first release."""
    parts = [Part(plain("a", 5, 0), 1.4), Part(plain("b", 3, 0))]
    assert ids(mix(parts, seed=7)) == [
        "a2", "b2", "a4", "a0", "a3", "a0", "a3", "a1", "b0", "b1",
    ]  # fmt: skip
