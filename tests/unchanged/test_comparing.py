"""Check what a comparison tells: a recording that hides a difference would hold nothing to it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from unchanged.comparing import differences, dump, tensor_hash


def told(recorded: Any, now: Any, exact: bool = True) -> list[str]:
    return list(differences(recorded, now, exact))


@pytest.mark.parametrize("exact", [True, False])
def test_what_is_gone_new_or_another_is_told_by_its_place(exact: bool) -> None:
    recorded = {"run": {"a.json": {"x": 1}, "b.json": [1, 2]}}
    assert told(recorded, {"run": {"a.json": {"x": 1}}}, exact) == ["run/b.json is gone"]
    assert told({"run": {}}, recorded, exact) == ["run/a.json is new", "run/b.json is new"]
    now = {"run": {"a.json": {"x": 2}, "b.json": [1, 2, 3]}}
    assert told(recorded, now, exact) == [
        "run/a.json/x was 1 and is 2",
        "run/b.json has 3 entries, not 2: [1, 2, 3]",
    ]
    assert told({"a": None}, {"a": 0}, exact) == ["a was None and is 0"]
    assert told({"a": True}, {"a": 1}, exact) == ["a was True and is 1"]
    assert told({"a": "x"}, {"a": {"x": 1}}, exact)
    assert told(recorded, json.loads(dump(recorded)), exact) == []


def test_the_last_bit_and_hashes_count_under_the_same_conditions_only() -> None:
    recorded = {"loss": 6.5, "tensors sha256": {"w": "aa"}, "of another package": 1}
    now = {"loss": 6.500000000000001, "tensors sha256": {"w": "bb"}, "of another package": 2}
    assert len(told(recorded, now)) == 3
    assert told(recorded, now, exact=False) == []
    assert told({"loss": 6.5}, {"loss": 6.501}, exact=False) == ["loss was 6.5 and is 6.501"]
    assert told({"loss": 0.0}, {"loss": float("nan")}, exact=False)
    assert told(recorded, {"loss": 6.5}, exact=False) == [
        "of another package is gone",
        "tensors sha256 is gone",
    ]


def test_a_hash_knows_one_bit_and_the_type() -> None:
    one = torch.tensor([1.0, 2.0])
    assert tensor_hash(one) == tensor_hash(one.clone())
    assert tensor_hash(one) != tensor_hash(torch.nextafter(one, one + 1))
    assert tensor_hash(one) != tensor_hash(one.to(torch.bfloat16))
