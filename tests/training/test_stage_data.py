"""Rows of stages: read once, mixed the same, their paths and their images checked."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest
import torch

from mmgraft.data.features import fill_cache, open_cache
from mmgraft.data.formats.indexed import FileRows
from mmgraft.data.formats.sources import Source, index_rows
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.recipes.recipe import DataEntry, Recipe
from mmgraft.training import stage_data
from mmgraft.training.stage_data import (
    StageData,
    absolute,
    check_images,
    check_rows,
    fingerprint,
    refuse_other_rows,
    source_of,
)
from tiny_towers import tiny_tower


def entry(parts: Path, **values) -> DataEntry:
    return DataEntry(path=str(parts / "rows.jsonl"), images=str(parts / "images"), **values)


def test_a_file_is_read_once_for_all_stages(parts, monkeypatch):
    calls = []
    original = stage_data.index_rows
    monkeypatch.setattr(
        stage_data, "index_rows", lambda *args: calls.append(args) or original(*args)
    )
    reader = StageData()
    first = reader.rows([entry(parts)], seed=1)
    assert [row.id for row in reader.rows([entry(parts)], seed=1)] == [row.id for row in first]
    assert len(calls) == 1
    assert len(reader.rows([entry(parts, limit=5)], seed=1)) == 5
    assert len(calls) == 2


def test_weights_show_rows_more_or_less_often(parts):
    rows = StageData().rows([entry(parts, weight=2), entry(parts, weight=0.5, limit=4)], seed=0)
    assert len(rows) == 26


def test_paths_are_absolute_and_templates_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.jinja").write_text("{{ messages }}")
    stage = {
        "name": "s",
        "train": ["projector"],
        "lr": 1,
        "template": "own.jinja",
        "data": [{"path": "b.json"}],
    }
    recipe = Recipe.model_validate(
        {
            "name": "r",
            "method": "llava",
            "feature_cache": "cache",
            "data": [{"path": "a.json", "images": "pics"}],
            "stages": [stage, {**stage, "name": "t", "template": "chat", "data": None}],
        }
    )
    moved = absolute(recipe)
    assert moved.data[0].path == str(tmp_path / "a.json")
    assert moved.data[0].images == str(tmp_path / "pics")
    assert moved.feature_cache == str(tmp_path / "cache")
    assert moved.stages[0].template == str(tmp_path / "own.jinja")
    assert moved.stages[0].data[0].path == str(tmp_path / "b.json")
    assert moved.stages[0].data[0].images is None
    assert moved.stages[1].template == "chat"
    assert moved.stages[1].data is None


def test_a_set_of_the_hub_keeps_its_name_and_shards_get_whole_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    stage = {"name": "s", "train": ["projector"], "lr": 1}
    data = [
        {"path": "hub:me/set", "split": "test", "subset": "x", "revision": "v1", "limit": 3},
        {"path": "s/{0..3}.tar"},
        {"path": "~/rows/*.jsonl"},
    ]
    recipe = Recipe.model_validate(
        {"name": "r", "method": "llava", "data": data, "stages": [stage]}
    )
    hub, shards, home = absolute(recipe).data
    assert source_of(hub) == Source("hub:me/set", limit=3, split="test", subset="x", revision="v1")
    assert shards.path == str(tmp_path / "s/{0..3}.tar")
    assert home.path == source_of(recipe.data[2]).path == str(Path.home() / "rows/*.jsonl")


def test_rows_without_an_image_are_counted(parts):
    rows = StageData().rows([entry(parts)], seed=0)
    assert check_rows(rows, "s", "skip") == 3
    assert check_rows(rows, "s", "graft") == 0
    texts = [row for row in rows if not row.has_image]
    with pytest.raises(UsageError, match="text_rows: graft"):
        check_rows(texts, "s", "skip")
    assert check_rows(texts, "s", "base") == 0


def test_pictures_are_looked_at_in_an_even_sample_of_rows_that_are_read(
    parts, tmp_path, monkeypatch
):
    lines = [line for line in (parts / "rows.jsonl").read_text().splitlines() if "png" in line]
    (tmp_path / "rows.jsonl").write_text("\n".join(lines * 20))  # 180 rows show 9 pictures
    source = Source(str(tmp_path / "rows.jsonl"), str(parts / "images"))
    rows = index_rows(source)
    read: list[int] = []
    original = FileRows.row
    monkeypatch.setattr(FileRows, "row", lambda self, at: read.append(at) or original(self, at))
    assert check_images(rows, most=20) == 9
    assert set(read) == set(range(180))
    read.clear()
    assert check_images(rows, most=3) == 3
    assert set(read) == set(range(0, 180, 6))


# The feature cache


def test_features_of_all_images_are_computed_once(parts, tmp_path, monkeypatch):
    tower = tiny_tower()
    rows = StageData().rows([entry(parts)], seed=0)
    assert fill_cache(open_cache(tower, tmp_path), tower, rows) == 9
    monkeypatch.setattr(type(tower), "forward", lambda *_: pytest.fail("computed again"))
    cache = open_cache(tower, tmp_path)
    assert fill_cache(cache, tower, rows) == 9


def test_ranks_compute_a_part_of_the_features_each(parts, tmp_path, monkeypatch):
    tower = tiny_tower()
    rows = StageData().rows([entry(parts)], seed=0)
    counts = [fill_cache(open_cache(tower, tmp_path), tower, rows, share=(r, 2)) for r in (0, 1)]
    assert sum(counts) == 9
    assert min(counts) > 0
    monkeypatch.setattr(type(tower), "forward", lambda *_: pytest.fail("computed again"))
    assert fill_cache(open_cache(tower, tmp_path), tower, rows) == 9


def test_a_split_of_a_file_and_a_cache_in_one_are_refused(parts: Path):
    with pytest.raises(UsageError, match=r"split: test is of a set.*leave split out"):
        StageData().rows([entry(parts, split="test")], seed=0)
    with pytest.raises(UsageError, match=r"rows\.jsonl is a file; write true, or a folder"):
        open_cache(tiny_tower(), parts / "rows.jsonl")


def test_features_are_kept_in_the_towers_precision(tmp_path):
    tower = tiny_tower()
    assert open_cache(tower, tmp_path).dtype == torch.float32
    assert open_cache(tower.to(torch.bfloat16), tmp_path).dtype == torch.bfloat16


def test_an_image_inside_a_row_has_no_file_to_be_found_by(parts, tmp_path):
    data = base64.b64encode((parts / "images" / "0.png").read_bytes()).decode()
    part = {"type": "image", "image": f"data:image/png;base64,{data}"}
    row = Row("r1", [{"role": "user", "content": [part]}], "f.jsonl", "line 1")
    tower = tiny_tower()
    with pytest.raises(UsageError, match=r"f\.jsonl, line 1.*feature_cache: false"):
        fill_cache(open_cache(tower, tmp_path), tower, [row])


def test_sets_to_evaluate_on_get_whole_paths_where_one_is_found(tmp_path, monkeypatch):
    """Else a run could be evaluated from the folder it was trained in alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "test.jsonl").write_text("{}")
    stage = {"name": "s", "train": ["projector"], "lr": 1}
    sets = [
        {"name": "asked", "metric": "exact", "path": "test.jsonl", "train": "gone.jsonl"},
        {"name": "mmlu", "metric": "choice", "modality": "text", "path": "mmlu"},
    ]
    recipe = Recipe.model_validate(
        {"name": "r", "method": "llava", "stages": [stage], "evaluation": sets}
    )
    asked, packaged = absolute(recipe).evaluation
    assert asked.path == str(tmp_path / "test.jsonl")
    assert asked.train == "gone.jsonl"
    assert packaged.path == "mmlu"


def rows_of(*texts: str, pictures: int = 1) -> list[Row]:
    parts = [{"type": "image", "image": "a.png"}] * pictures
    return [
        Row(str(at), [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}])
        for at, text in enumerate(texts)
    ]


def test_rows_are_known_again_and_a_few_may_be_mended(tmp_path):
    texts = ["x" * (at * 7 % 50 + 1) for at in range(200)]
    begun = json.loads(json.dumps(fingerprint(rows_of(*texts))))
    assert begun["rows"] == 200
    assert len(begun["pieces"]) == 64

    def refused(rows: list[Row]) -> str | None:
        try:
            refuse_other_rows(rows, begun, "align", tmp_path)
        except UsageError as error:
            return str(error)
        return None

    assert refused(rows_of(*texts)) is None
    mended = [text + "!" * (at in (3, 90)) for at, text in enumerate(texts)]
    assert refused(rows_of(*mended)) is None
    assert "stage 'align' now has 199 rows, and the run was begun with 200" in str(
        refused(rows_of(*texts[1:]))
    )
    for others in (texts[1:] + texts[:1], [text + "!" for text in texts]):
        assert "now has other rows" in str(refused(rows_of(*others)))
    assert "other rows" in str(refused(rows_of(*texts, pictures=2)))
    refuse_other_rows(rows_of("a"), None, "align", tmp_path)  # a run of an older version
    assert fingerprint([]) == {"rows": 0, "pieces": [fingerprint([])["pieces"][0]]}
