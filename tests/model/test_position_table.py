"""Generation with a base that has a table of positions: what leaves it is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from grafting import CONFIGS, batch, graft_on, row, text_of
from mmgraft.errors import UsageError
from mmgraft.model.modeling import GraftedModel

TABLE = 128


@pytest.fixture(scope="module")
def model() -> GraftedModel:
    made = graft_on("gpt2", CONFIGS["iaa-c"]).eval()
    assert made.anatomy.position_table == TABLE
    return made


@pytest.mark.parametrize("kind", ["image", "text"])
def test_tokens_up_to_the_end_of_the_table_and_not_one_more(model: GraftedModel, kind: str) -> None:
    inputs: dict[str, Any] = batch([row("tiiiit")])
    inputs = text_of(inputs) if kind == "text" else inputs
    prompt = inputs["input_ids"].shape[1]
    most = TABLE - prompt + 1

    def generate(count: int, **more: Any) -> Any:
        return model.generate(**inputs, min_new_tokens=count, do_sample=False, **more)

    assert generate(most, max_new_tokens=most).shape[1] == TABLE + 1
    for given in (
        {"max_new_tokens": most + 1},
        {"max_length": TABLE + 2},
        {"generation_config": GenerationConfig(max_new_tokens=most + 1)},
        {"generation_config": GenerationConfig(max_length=TABLE + 2)},
    ):
        with pytest.raises(UsageError, match=f"give max_new_tokens of {most} at most"):
            generate(most + 1, **given)
    with pytest.raises(IndexError):  # what the base itself says
        model.base.generate(  # pyright: ignore
            **text_of(inputs), min_new_tokens=most + 1, max_new_tokens=most + 1, do_sample=False
        )


def test_a_prompt_beyond_the_table(model: GraftedModel) -> None:
    with pytest.raises(UsageError, match="the prompt has 129 positions") as caught:
        model.generate(torch.full((1, TABLE + 1), 7), max_new_tokens=1)
    assert "a table of 128" in str(caught.value)
    assert model.generate(torch.full((1, TABLE), 7), max_new_tokens=1).shape == (1, TABLE + 1)


def test_a_base_that_computes_positions_has_no_end() -> None:
    model = graft_on("llama", CONFIGS["iaa-c"]).eval()
    with torch.no_grad():
        out = model.generate(torch.full((1, 126), 7), max_new_tokens=8, min_new_tokens=8)
    assert out.shape == (1, 134)
