"""Rows with images: the text between them as transformers' LlavaProcessor tokenises it."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AddedToken, CLIPImageProcessorPil, LlavaProcessor

from mmgraft.data.batches.sequences import pad
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import Template
from mmgraft.errors import UsageError
from text_tokenizers import KINDS, SPARE, template, text_tokenizer

PATCHES = 4
PLACEHOLDER = 4  # the id of SPARE
PICTURE = Image.new("RGB", (4, 4), (200, 30, 30))


def _image(value: object = PICTURE) -> dict:
    return {"type": "image", "image": value}


def _text(text: str) -> dict:
    return {"type": "text", "text": text}


def _preprocess(images: list[Image.Image]) -> torch.Tensor:
    return torch.stack([torch.full((3, 4, 4), float(image.width)) for image in images])


@cache
def _processor(kind: str, name: str) -> GraftProcessor:
    tokenizer = text_tokenizer(kind, template(name))
    return GraftProcessor(tokenizer, PATCHES, PLACEHOLDER, preprocess=_preprocess)


@cache
def _stock(kind: str, sentinel: str) -> LlavaProcessor:
    tokenizer = text_tokenizer(kind)
    tokenizer.add_tokens(
        [AddedToken(sentinel, special=True, normalized=False)], special_tokens=True
    )
    size = {"height": 4, "width": 4}
    return LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=tokenizer,
        patch_size=2,
        vision_feature_select_strategy="full",
        image_token=sentinel,
    )


def _stock_ids(kind: str, sentinel: str, text: str, images: int) -> list[int]:
    stock = _stock(kind, sentinel)
    encoding = stock(text=[text], images=[PICTURE] * images, add_special_tokens=False)
    ids = encoding["input_ids"][0]
    return [PLACEHOLDER if index == stock.image_token_id else index for index in ids]


pieces = st.lists(
    st.one_of(
        st.sampled_from(
            ["<image>", "[image]", "<", "<im", SPARE, "</s>", "\n", " ", "cat", "日本", "<|user|>"]
        ),
        st.text(max_size=4),
    ),
    max_size=4,
).map("".join)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["smollm2", "zephyr", "llama2"])
@settings(max_examples=20, deadline=None)
@given(
    parts=st.lists(st.one_of(st.none(), pieces), min_size=1, max_size=5).filter(
        lambda parts: None in parts
    )
)
def test_ids_around_images_are_stock_llavas(kind: str, name: str, parts: list[str | None]) -> None:
    processor = _processor(kind, name)
    content = [_image() if part is None else _text(part) for part in parts]
    messages = [{"role": "user", "content": content}, {"role": "assistant", "content": "A cat"}]
    sentinel = processor.transcript(messages).sentinel
    text = processor.prompt(messages, add_generation_prompt=False)
    encoded = processor.encode(messages, add_generation_prompt=False)
    images = parts.count(None)
    assert encoded.input_ids == _stock_ids(kind, sentinel, text, images)
    assert sum(encoded.kinds) == images * PATCHES
    assert len(encoded.images) == images


def _flat(content: list) -> str:
    return _processor("byte_bpe", "llama3").prompt([{"role": "user", "content": content}])


def _user(text: str) -> str:
    return (
        f"<s><|start_header_id|>user<|end_header_id|>\n\n{text}<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([_image(), _text("What?")], "<image>\nWhat?"),
        ([_image(), _text("\nWhat?")], "<image>\nWhat?"),
        ([_text("What?"), _image()], "What?<image>"),
        ([_text("What?\n"), _image()], "What?\n<image>"),
        ([_image(), _image(), _text("Both?")], "<image><image>\nBoth?"),
        ([_image(), _text(""), _text("a"), _text("b")], "<image>\nab"),
        ([_image()], "<image>"),
        ([{"type": "image_url", "image_url": {"url": "a.png"}}, _text("W")], "<image>\nW"),
    ],
)
def test_a_list_of_parts_becomes_one_text(content: list, text: str) -> None:
    assert _flat(content) == _user(text)


def test_words_that_look_like_an_image_take_another_sentinel() -> None:
    messages = [{"role": "user", "content": [_image(), _text("Is <image> or [image] a tag?")]}]
    processor = _processor("byte_bpe", "smollm2")
    assert processor.transcript(messages).sentinel not in ("<image>", "[image]")
    encoded = processor.encode(messages)
    assert sum(encoded.kinds) == PATCHES
    text = [i for i, kind in zip(encoded.input_ids, encoded.kinds, strict=True) if kind == 0]
    assert "Is <image> or [image] a tag?" in processor.decode(text)
    assert max(encoded.input_ids) < len(processor.tokenizer)


def test_two_texts_that_join_to_the_sentinel_do_not_become_an_image() -> None:
    messages = [{"role": "user", "content": [_image(), _text("<im"), _text("age>")]}]
    encoded = _processor("byte_bpe", "smollm2").encode(messages)
    assert sum(encoded.kinds) == PATCHES


def test_a_word_of_a_tool_that_is_the_sentinel_is_no_image() -> None:
    tools = [{"type": "function", "function": {"name": "<image>"}}]
    messages = [{"role": "user", "content": [_image(), _text("Look")]}]
    encoded = _processor("byte_bpe", "qwen2_5").encode(messages, tools=tools)
    assert sum(encoded.kinds) == PATCHES


def test_the_text_of_the_placeholder_is_text() -> None:
    messages = [{"role": "user", "content": [_image(), _text(SPARE)]}]
    encoded = _processor("byte_bpe", "smollm2").encode(messages)
    assert encoded.input_ids.count(PLACEHOLDER) == PATCHES + 1
    assert sum(encoded.kinds) == PATCHES


def test_a_base_that_has_an_image_token_keeps_it_for_its_text() -> None:
    tokenizer = text_tokenizer("byte_bpe", template("smollm2"))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    processor = GraftProcessor(tokenizer, PATCHES, PLACEHOLDER)
    messages = [{"role": "user", "content": [_image(), _text("cat")]}]
    assert processor.transcript(messages).sentinel != "<image>"
    assert tokenizer.convert_tokens_to_ids("<image>") not in processor.encode(messages).input_ids


def test_a_token_that_swallows_the_sentinels_start_is_met_by_another_sentinel() -> None:
    tokenizer = text_tokenizer("byte_bpe", template("smollm2"))
    tokenizer.add_tokens(["!<"])
    processor = GraftProcessor(tokenizer, PATCHES, PLACEHOLDER)
    messages = [{"role": "user", "content": [_text("Look!"), _image()]}]
    assert sum(processor.encode(messages).kinds) == PATCHES


def test_a_template_that_drops_an_image_is_refused() -> None:
    tokenizer = text_tokenizer("byte_bpe", template("mistral_v0_3"))
    processor = GraftProcessor(tokenizer, PATCHES, PLACEHOLDER)
    messages = [
        {"role": "system", "content": [_image()]},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Ho"},
    ]
    with pytest.raises(UsageError, match="row 7: the template does not write every image exactly"):
        processor.encode(messages, add_generation_prompt=False, where="row 7")


@pytest.mark.parametrize("literal", ["", "<image>"])
def test_words_do_not_stand_in_for_an_image_that_is_dropped(literal: str) -> None:
    # Counting sentinels alone would take the word "<image>" for the image of the system turn.
    text = literal + "{% for m in messages if m.role == 'user' %}{{ m.content }}{% endfor %}"
    processor = GraftProcessor(
        text_tokenizer("byte_bpe"), PATCHES, PLACEHOLDER, Template("file", text)
    )
    said = "An <image> tag" if not literal else "Hi"
    messages = [{"role": "system", "content": [_image()]}, {"role": "user", "content": said}]
    with pytest.raises(UsageError, match="does not write every image"):
        processor.encode(messages)


def test_unknown_parts_and_empty_images_are_refused_by_turn() -> None:
    processor = _processor("byte_bpe", "smollm2")
    with pytest.raises(UsageError, match="turn 1: a content part of type 'video'"):
        processor.encode([{"role": "user", "content": [_image(), {"type": "video"}]}])
    with pytest.raises(UsageError, match="turn 1: an image part without an image"):
        processor.encode([{"role": "user", "content": [{"type": "image"}]}])


def test_plain_puts_the_caption_after_the_image_and_the_tokenizers_start_before() -> None:
    processor = GraftProcessor(text_tokenizer("unigram_first"), PATCHES, PLACEHOLDER, "plain")
    base = text_tokenizer("unigram_first")
    caption = [{"role": "user", "content": [_image()]}, {"role": "assistant", "content": "A cat"}]
    encoded = processor.encode(caption)
    assert processor.prompt(caption) == "<image>A cat</s>"
    assert encoded.kinds[:6] == [0, 1, 1, 1, 1, 0]
    assert encoded.input_ids[0] == base.bos_token_id
    assert encoded.input_ids[-1] == base.eos_token_id
    assert encoded.input_ids.count(base.eos_token_id) == 1


@pytest.mark.parametrize(
    ("messages", "text"),
    [
        (["What?", "A cat"], "What? A cat</s>"),
        (["What? ", "A cat"], "What? A cat</s>"),
        ([[_image(), _text("What?")], "A cat", "And?", "Two"],
         "<image>\nWhat? A cat</s>And? Two</s>"),
        (["Once upon a time"], "Once upon a time"),
    ],
)  # fmt: skip
def test_plain_keeps_texts_apart_and_ends_answers(messages: list, text: str) -> None:
    processor = GraftProcessor(text_tokenizer("byte_bpe"), PATCHES, PLACEHOLDER, "plain")
    turns = [
        {"role": ["user", "assistant"][i % 2], "content": said} for i, said in enumerate(messages)
    ]
    assert processor.prompt(turns) == text


def test_a_batch_has_images_in_order_and_padding_on_the_side_asked_for() -> None:
    processor = _processor("byte_bpe", "smollm2")
    small, large = Image.new("L", (2, 2)), Image.new("RGBA", (7, 7))
    batch = [
        [{"role": "user", "content": [_image(small), _text("One"), _image(large)]}],
        [{"role": "user", "content": "No image here"}],
        [{"role": "user", "content": [_image(PICTURE)]}],
    ]
    left = processor(batch)
    assert left["pixel_values"][:, 0, 0, 0].tolist() == [2, 7, 4]
    rows = [processor.encode(messages) for messages in batch]
    for at, row in enumerate(rows):
        assert left["input_ids"][at, -len(row) :].tolist() == row.input_ids
        assert left["attention_mask"][at].sum() == len(row)
        assert left["mm_token_type_ids"][at, -len(row) :].tolist() == row.kinds
    right = processor(batch, padding_side="right")
    assert right["input_ids"][1, : len(rows[1])].tolist() == rows[1].input_ids
    assert right["mm_token_type_ids"].sum() == 3 * PATCHES
    assert "pixel_values" not in processor([batch[1]])
    assert processor(batch[2])["input_ids"].shape == (1, len(rows[2]))


def test_images_that_cannot_be_opened_name_the_conversation() -> None:
    processor = _processor("byte_bpe", "smollm2")
    row = [{"role": "user", "content": [_image("nowhere.png")]}]
    good = [{"role": "user", "content": "Hi"}]
    with pytest.raises(UsageError, match=r"conversation 2: .*nowhere\.png"):
        processor([good, row])
    with pytest.raises(UsageError, match="download it first"):
        processor([[{"role": "user", "content": [_image("https://x.org/a.png")]}]])
    with pytest.raises(UsageError, match="give at least one"):
        processor([])


def test_padding_rounds_the_length_up() -> None:
    assert pad([[1], [1, 2, 3]], 9, "left", 4).tolist() == [[9, 9, 9, 1], [9, 1, 2, 3]]
    assert pad([[1], [1, 2, 3]], 9, "right").tolist() == [[1, 9, 9], [1, 2, 3]]
