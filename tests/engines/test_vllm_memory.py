"""Weights of a base and two workflows beside it: as vLLM holds them, and from shapes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mmgraft.export.vllm import export_vllm
from tiny_exports import change_record, make_base, make_graft
from vllm_engine import SIZES

sys.path.append(str(Path(__file__).resolve().parents[2] / "benchmarks"))
from vllm_text import LLAMA_3_8B, MEMORY_GOAL, held, share, weights

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # of vLLM itself

SHAPE = {**SIZES, "intermediate_size": 96, "num_hidden_layers": 4, "vocab_size": 512}


def test_the_shapes_give_what_vllm_holds(tmp_path: Path) -> None:
    """Each weight once; towers and projectors are not in the shapes."""
    sizes = {name: size for name, size in SHAPE.items() if name != "num_hidden_layers"}
    make_base(tmp_path, "llama", **sizes, tie_word_embeddings=False)
    runs = [make_graft(tmp_path, name=name, layers=[1, 3]) for name in ("a", "b")]
    for run in runs:
        change_record(run, workflow=run.name)
    export_vllm(runs, tmp_path / "out")
    assert held(tmp_path / "llama") == weights(SHAPE, 0)
    assert held(tmp_path / "out") == weights(SHAPE, 2, inserted=2)


def test_two_workflows_on_a_large_base_take_less_than_three_models() -> None:
    three = 3 * weights(LLAMA_3_8B, 0)
    assert three == 3 * 8_030_261_248, "Llama-3-8B as published"
    assert share(LLAMA_3_8B) == pytest.approx(weights(LLAMA_3_8B, 2) / three)
    assert share(LLAMA_3_8B) == pytest.approx(0.565, abs=5e-4)
    assert share(LLAMA_3_8B) <= MEMORY_GOAL
