"""The plugin with two processes that share a model, and with torch.compile: rows are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmgraft.export.vllm import export_vllm
from tiny_exports import change_record, make_base, make_graft
from vllm_engine import SIZES, Graft, Messages, answers, engine, for_vllm, greedy, image

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # of vLLM itself

MODES: dict[str, dict[str, Any]] = {
    "two processes": {"tensor_parallel_size": 2, "distributed_executor_backend": "mp"},
    "torch.compile": {"enforce_eager": False},
}
TEXT: Messages = [{"role": "user", "content": "One, two, three: what comes next?"}]


def look(seed: int) -> Messages:
    parts = [{"type": "image", "image": image(16, seed)}, {"type": "text", "text": "What is it?"}]
    return [{"role": "user", "content": parts}]


def ask(llm: Any, row: Messages, name: str, always: bool = False) -> Any:
    asked = {"workflow": name, **({"always": True} if always else {})}
    return answers(llm.chat([for_vllm(row)], greedy(), mm_processor_kwargs=asked, use_tqdm=False))[
        0
    ]


@pytest.mark.parametrize("mode", MODES)
def test_rows_are_what_generate_gives(tmp_path: Path, mode: str) -> None:
    """Own embedding and head are split by rows, layers by heads, gates not at all."""
    options = {"max_num_batched_tokens": 32, "max_model_len": 128, **MODES[mode]}
    make_base(tmp_path, "llama", **{**SIZES, "num_key_value_heads": 2})
    runs = {
        "c": make_graft(tmp_path, "llama", "siglip", name="c", layers=[0, 3]),
        # From the first layer on, whose input is the embedding itself.
        "a": make_graft(tmp_path, "llama", "siglip", name="a", layers=[0, 2], structure="a"),
    }
    for name, run in runs.items():
        change_record(run, workflow=name)
    export_vllm(list(runs.values()), tmp_path / "out")
    grafts = {name: Graft(run) for name, run in runs.items()}
    with engine(tmp_path / "out", **options) as llm:
        for _ in range(2):  # the second time from the cache
            for name, graft in grafts.items():
                for row, always in ((look(1), False), (TEXT, True), (TEXT, False)):
                    ids, likely = ask(llm, row, name, always)
                    wanted, its = graft.answer(row, workflow=name if always else None)
                    assert ids == wanted
                    assert likely == pytest.approx(its, abs=2e-5)
