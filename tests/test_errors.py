from __future__ import annotations

import pytest

from mmgraft.errors import MMGraftError, UsageError, did_you_mean, nearest

KNOWN = ["qwen2-7b", "qwen2-0.5b", "smollm2-135m"]


def test_exit_codes_tell_failure_from_wrong_use() -> None:
    assert MMGraftError.exit_code == 1
    assert UsageError.exit_code == 2
    assert issubclass(UsageError, MMGraftError)


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("qwen2-7", "qwen2-7b"),
        ("Qwen2-7B", "qwen2-7b"),
        ("smol", "smollm2-135m"),  # a beginning is close, however much is missing
        ("qwen", "qwen2-7b"),  # the shortest of several
        ("zebra", None),
        ("q", None),  # one letter says nothing
    ],
)
def test_nearest(word: str, expected: str | None) -> None:
    assert nearest(word, KNOWN) == expected


def test_nearest_gives_the_name_as_it_is_written() -> None:
    assert nearest("iaaconfig", ["IAAConfig"]) == "IAAConfig"


def test_did_you_mean_lists_all_when_none_is_close() -> None:
    assert did_you_mean("smollm", KNOWN) == "did you mean 'smollm2-135m'?"
    assert did_you_mean("zebra", ["a", "b"]) == "known: a, b"
    assert did_you_mean("zebra", []) == "none is known"
