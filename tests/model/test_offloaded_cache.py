"""Offloading, played on the CPU: every slot is fetched back before it is used.

transformers moves slots with CUDA streams. Here the streams do nothing, and a slot that was sent
away is marked, so that one which is used without a prefetch is found without a card.
"""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from grafting import batch, grafted, rows


class _Stream(contextlib.nullcontext):
    def wait_stream(self, other: Any) -> None:
        """Nothing runs beside anything here."""


@pytest.fixture
def played(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    moves: list[int] = []
    update = DynamicLayer.update

    def used(self: Any, *args: Any, **kwargs: Any) -> Any:
        assert not getattr(self, "away", False), "a slot is used that was not fetched back"
        return update(self, *args, **kwargs)

    def offload(self: Any) -> None:
        self.away = self.is_initialized
        moves.append(1)

    monkeypatch.setattr(torch.cuda, "default_stream", lambda device=None: _Stream())
    monkeypatch.setattr(DynamicLayer, "offload", offload)
    monkeypatch.setattr(DynamicLayer, "prefetch", lambda self: setattr(self, "away", False))
    monkeypatch.setattr(DynamicLayer, "update", used)
    return moves


@pytest.mark.parametrize("method", ["iaa-a", "iaa-c", "wings", "llava", "lora", "xattn"])
def test_every_slot_is_fetched_before_it_is_used(method: str, played: list[int]) -> None:
    model = grafted("llama", method)
    inputs = batch(rows("ttiiiitt", "tiiiittt"), "left")
    cache = DynamicCache(config=model.base.config, offloading=True)
    cache.prefetch_stream = _Stream()
    plain = DynamicCache(config=model.base.config)
    with torch.no_grad():
        given = model(**inputs, past_key_values=cache, use_cache=True).logits
        wanted = model(**inputs, past_key_values=plain, use_cache=True).logits
        assert torch.equal(given, wanted)
        for token in (7, 8, 9):
            step = {"input_ids": torch.full((2, 1), token), "use_cache": True}
            given = model(**step, past_key_values=cache).logits
            wanted = model(**step, past_key_values=plain).logits
            assert torch.equal(given, wanted)
    assert played, "nothing was sent away"
