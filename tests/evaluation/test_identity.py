from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.evaluation.identity import PROMPTS, load_untouched, text_identity
from mmgraft.grafts.iaa.config import IAAConfig
from mmgraft.model.modeling import GraftedModel
from tiny import save_base, tiny_tower
from tiny_tokenizer import CHATML, tiny_tokenizer


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("base"), "llama")


@pytest.fixture
def grafted(base: Path) -> tuple[GraftedModel, GraftProcessor]:
    tower = tiny_tower()
    model = GraftedModel.graft(str(base), tower, IAAConfig(layers=[1, 2]))
    torch.manual_seed(0)
    for parameter in model.workflow().parameters():
        parameter.data.normal_()
    return model, GraftProcessor(tiny_tokenizer(), tower.num_patches, 5)


def test_a_graft_leaves_text_as_it_was(grafted, base: Path) -> None:
    model, processor = grafted
    report = text_identity(model, processor, *load_untouched(base, model.base))
    assert report.identical
    assert report.first_difference is None
    assert report.max_difference == 0
    assert report.grafted == report.base
    assert report.prompts == len(PROMPTS)
    ids = [
        processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for prompt in PROMPTS
    ]
    assert report.positions == sum(map(len, ids))
    assert report.identical is True


def test_a_base_that_was_touched_is_found_out(grafted, base: Path) -> None:
    model, processor = grafted
    untouched = load_untouched(base, model.base)
    weight = model.base.get_parameter("model.layers.3.mlp.down_proj.weight")
    weight.data[0, 0] += 1e-3
    report = text_identity(model, processor, *untouched)
    assert not report.identical
    assert 0 < report.max_difference < 1
    assert report.first_difference == "logits of prompts 1 to 4"
    assert report.grafted != report.base


def test_a_negative_zero_is_a_difference(grafted, base: Path) -> None:
    """Bit for bit, not merely equal: 0.0 == -0.0."""
    model, processor = grafted
    other, tokenizer = load_untouched(base, model.base)
    for one, sign in ((model.base, 1.0), (other, -1.0)):
        one.get_output_embeddings().weight.data.zero_()
        one.get_output_embeddings().register_forward_hook(
            lambda module, given, out, sign=sign: out * 0.0 * sign
        )
    report = text_identity(model, processor, other, tokenizer)
    assert report.max_difference == 0
    assert not report.identical


def test_other_ids_are_a_difference_even_with_equal_logits(grafted, base: Path) -> None:
    model, processor = grafted
    other, tokenizer = load_untouched(base, model.base)
    tokenizer.chat_template = CHATML.replace("assistant", "model")
    report = text_identity(model, processor, other, tokenizer, prompts=["hello"])
    assert not report.identical
    assert report.first_difference == "the ids of 'hello'"


def test_a_base_without_a_template_is_compared_by_its_plain_ids(base: Path) -> None:
    model = GraftedModel.graft(str(base), tiny_tower(), IAAConfig(layers=[1]))
    tokenizer = tiny_tokenizer(chat_template=False)
    processor = GraftProcessor(tokenizer, 4, 5, "plain")
    other, _ = load_untouched(base, model.base)
    assert text_identity(model, processor, other, tokenizer, prompts=["a dog", "two"]).identical


def test_what_cannot_be_compared_is_refused(grafted, base: Path) -> None:
    model, processor = grafted
    other, tokenizer = load_untouched(base, model.base)
    with pytest.raises(UsageError, match="no prompts"):
        text_identity(model, processor, other, tokenizer, prompts=[])
    with pytest.raises(UsageError, match="same dtype"):
        text_identity(model, processor, other.to(torch.bfloat16), tokenizer)


def test_the_untouched_base_is_loaded_like_the_grafted_one(base: Path) -> None:
    model = GraftedModel.graft(str(base), tiny_tower(), IAAConfig(layers=[1]), dtype="bfloat16")
    other, tokenizer = load_untouched(base, model.base)
    assert other.dtype == torch.bfloat16
    assert not other.training
    assert type(other) is type(model.base)
    assert tokenizer.chat_template == CHATML
