"""What a comparison's folder remembers: phases, their sittings, and what they were done with."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmgraft.comparison.files import (
    PhaseRecord,
    Sitting,
    first_difference,
    is_done,
    phase_file,
    read_comparison,
    read_phase,
    write_phase,
)
from mmgraft.errors import UsageError


def sitting(seconds: float, peak: float | None) -> Sitting:
    return Sitting(began="x", seconds=seconds, cpu_seconds=2 * seconds, peak_memory_mb=peak)


def test_times_add_up_and_memory_is_the_largest() -> None:
    record = PhaseRecord(phase="train", sittings=[sitting(1, 5), sitting(2.5, None), sitting(3, 4)])
    assert (record.seconds, record.cpu_seconds, record.peak_memory_mb) == (6.5, 13, 5)
    empty = PhaseRecord(phase="train")
    assert (empty.seconds, empty.peak_memory_mb) == (0, None)


def test_a_phase_is_done_only_with_just_these_settings(tmp_path: Path) -> None:
    assert read_phase(tmp_path, "text") is None
    assert not is_done(tmp_path, "text", {})
    record = PhaseRecord(phase="text", settings={"a": [1]}, sittings=[sitting(1, 2)])
    write_phase(tmp_path, record)
    assert not is_done(tmp_path, "text", {"a": [1]})
    write_phase(tmp_path, record.model_copy(update={"done": True}))
    assert read_phase(tmp_path, "text") == record.model_copy(update={"done": True})
    assert is_done(tmp_path, "text", {"a": [1]})
    assert not is_done(tmp_path, "text", {"a": [1, 2]})
    assert not is_done(tmp_path, "vision", {"a": [1]})


def test_a_damaged_record_says_what_to_do(tmp_path: Path) -> None:
    write_phase(tmp_path, PhaseRecord(phase="graft"))
    phase_file(tmp_path, "graft").write_text("{")
    with pytest.raises(UsageError, match=r"is damaged.*remove"):
        read_phase(tmp_path, "graft")


def test_a_folder_without_a_comparison(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="mmgraft compare"):
        read_comparison(tmp_path)


@pytest.mark.parametrize(
    ("one", "two", "says"),
    [
        ({"a": 1, "b": {"c": [1]}}, {"b": {"c": [1]}, "a": 1}, None),
        ({"a": 1}, {"a": 2}, "a: 1 before, 2 now"),
        ({"a": {"b": None}}, {"a": {}}, None),
        ({"a": {}}, {"a": {"b": 1}}, "a.b: null before, 1 now"),
        ({"a": {"b": 1}}, {}, 'a: {"b": 1} before, null now'),
        ({"s": [{"name": "x", "lr": 1}]}, {"s": [{"name": "x", "lr": 2}]}, "s.x.lr: 1 before"),
        ({"s": [1, 2]}, {"s": [1, 3]}, "s.1: 2 before, 3 now"),
        ({"s": [1, 2]}, {"s": [1]}, "s: [1, 2] before, [1] now"),
        ({"a": 0}, {"a": None}, "a: 0 before, null now"),
    ],
)
def test_the_first_difference_has_its_key_and_both_values(one, two, says) -> None:
    found = first_difference(one, two)
    assert found == says or (says is not None and found is not None and found.startswith(says))
