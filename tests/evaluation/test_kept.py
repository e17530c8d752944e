"""Use kept answers for the same question alone: every part of a question is changed, one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from mmgraft.evaluation import kept as keeping
from mmgraft.evaluation.identity import Untouched
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.kept import Kept
from mmgraft.evaluation.likelihood.perplexity import TextScore, WindowScore
from mmgraft.evaluation.metrics.answers import ChoiceScore

ITEMS = [
    Item(
        str(n), [{"role": "user", "content": f"{n}?"}], f"{n}?", answers=("a",), options=("a", "b")
    )
    for n in range(3)
]
OTHERS = [*ITEMS[:2], Item("2", [], "another?", answers=("a",), options=("a", "b"))]
GRAFT: dict[str, Any] = {
    "sha256": "one", "dtype": torch.float32, "quantized": None, "options": {}, "template": "chatml",
}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of items in each call of a model."""
    calls: list[int] = []

    def stub(make: Callable[[Any], Any]) -> Callable[..., None]:
        def run(model: Any, processor: Any, items: Sequence[Any], **given: Any) -> None:
            calls.append(len(items))
            given["on_result"](range(len(items)), [make(item) for item in items])

        return run

    monkeypatch.setattr(keeping, "answer", stub(lambda item: "said"))
    monkeypatch.setattr(
        keeping, "score_choices", stub(lambda item: ChoiceScore(item.id, (-1.0,), (1,), (1,)))
    )
    window = (WindowScore(1, -1.0, -1.0, 0.0),)
    monkeypatch.setattr(keeping, "score_texts", stub(lambda item: TextScore(item.id, 1, 1, window)))
    monkeypatch.setattr(keeping, "source_of", lambda template, tokenizer: template.text)
    return calls


def made(run: Path, batch_size: int = 2, base: str = "base", **changes: Any) -> Kept:
    given = {**GRAFT, **changes}
    config = SimpleNamespace(quantization_config=given["quantized"])
    template = SimpleNamespace(kind="own", text=given["template"])
    processor: Any = SimpleNamespace(options=given["options"], template=template, tokenizer=None)
    model: Any = SimpleNamespace(base=SimpleNamespace(config=config, dtype=given["dtype"]))
    untouched = Untouched(model=model, tokenizer=processor, fingerprint=base)
    return Kept(model, processor, run, {"sha256": given["sha256"]}, batch_size, base=untouched)


def answers(
    kept: Kept, items: Sequence[Item] = ITEMS, workflow: str = "mm", tokens: int = 8
) -> Any:
    return kept.answers("set", items, workflow, tokens)


def seen(kept: Kept, items: Sequence[Item] = ITEMS, workflow: str = "mm", letters: bool = False):
    return kept.choices("set", items, workflow, letters)


def read(kept: Kept, items: Sequence[Item] = ITEMS, chat: bool = True, letters: bool = False):
    return kept.choices("set", items, "text", letters, chat=chat)


def texts(kept: Kept, items: Sequence[Item] = ITEMS, chat: bool = True, same: bool = False) -> Any:
    return kept.texts("set", items, chat, same)


@pytest.mark.parametrize("ask", [answers, seen, read, texts])
def test_a_batch_size_asks_nothing_anew(tmp_path: Path, asked: list[int], ask) -> None:
    first = ask(made(tmp_path))
    assert ask(made(tmp_path, batch_size=3)) == first
    assert asked == [3, 0]


@pytest.mark.parametrize(
    ("ask", "graft", "call"),
    [
        *((ask, {"sha256": "two"}, {}) for ask in (answers, seen, read, texts)),
        *((ask, {"dtype": torch.float16}, {}) for ask in (answers, seen, read, texts)),
        *((ask, {"quantized": "nf4"}, {}) for ask in (answers, seen, read, texts)),
        *((ask, {"options": {"brief": True}}, {}) for ask in (answers, seen, read, texts)),
        *((ask, {}, {"items": OTHERS}) for ask in (answers, seen, read, texts)),
        *((ask, {}, {"workflow": "grounding"}) for ask in (answers, seen)),
        *((ask, {}, {"letters": True}) for ask in (seen, read)),
        *((ask, {"template": "plain"}, {}) for ask in (read, texts)),
        *((ask, {}, {"chat": False}) for ask in (read, texts)),
        (answers, {}, {"tokens": 9}),
        (texts, {"base": "other"}, {}),
        (texts, {}, {"same": True}),
    ],
)
def test_whatever_else_differs_is_asked_anew(
    tmp_path: Path, asked: list[int], ask, graft: dict[str, Any], call: dict[str, Any]
) -> None:
    ask(made(tmp_path))
    ask(made(tmp_path, **graft), **call)
    assert asked == [3, 3]
    assert len(list((tmp_path / "results/predictions").iterdir())) == 2  # one is put aside
