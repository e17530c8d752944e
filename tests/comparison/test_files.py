"""Check what a comparison's folder remembers: phases, their sessions and their settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from mmgraft.comparison.files import (
    PhaseRecord,
    Session,
    first_difference,
    phase_file,
    phases_done,
    read_comparison,
    read_phase,
    write_phase,
)
from mmgraft.errors import UsageError


def session(seconds: float, peak: float | None) -> Session:
    return Session(began="x", seconds=seconds, cpu_seconds=2 * seconds, peak_memory_mb=peak)


def test_times_add_up_and_memory_is_the_largest() -> None:
    record = PhaseRecord(phase="train", sessions=[session(1, 5), session(2.5, None), session(3, 4)])
    assert (record.seconds, record.cpu_seconds, record.peak_memory_mb) == (6.5, 13, 5)
    empty = PhaseRecord(phase="train")
    assert (empty.seconds, empty.peak_memory_mb) == (0, None)


def test_a_phase_is_done_when_its_last_session_says_so(tmp_path: Path) -> None:
    assert read_phase(tmp_path, "text") is None
    assert phases_done(tmp_path) == []
    record = PhaseRecord(phase="text", settings={"a": [1]}, sessions=[session(1, 2)])
    write_phase(tmp_path, record)
    assert read_phase(tmp_path, "text") == record
    assert phases_done(tmp_path) == []
    write_phase(tmp_path, PhaseRecord(phase="graft", done=True))
    after = record.after(session(2, 1), done=True)
    assert after.sessions == [session(1, 2), session(2, 1)]
    write_phase(tmp_path, after)
    assert read_phase(tmp_path, "text") == after
    assert phases_done(tmp_path) == ["graft", "text"]


def test_sessions_of_an_earlier_version_are_read() -> None:
    earlier = PhaseRecord(phase="train", sessions=[session(1, 2)]).model_dump(mode="json")
    earlier["sittings"] = earlier.pop("sessions")
    assert PhaseRecord.model_validate(earlier).sessions == [session(1, 2)]


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
