"""Text rows: ids and prompts of the base's untouched tokenizer, whatever the text says."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import Template
from text_tokenizers import KINDS, SPARE, template, text_tokenizer
from tiny_tokenizer import tiny_tokenizer

PLACEHOLDER = 4  # the id of SPARE, whose text is among the fragments

FRAGMENTS = [
    "<image>", "[image]", "\ue000image\ue001", "<image", ">", "<", SPARE, "<s>", "</s>", "<pad>",
    "<|im_start|>", "<|im_end|>", "<|user|>", "<think>", "</think>", "\n", "\n\n", " ", "  ", "\t",
    "An <image> tag", "été", "日本", "👩‍🚀", "▁", "##ing", "{{ x }}", "{% if %}",
]  # fmt: skip

texts = st.lists(
    st.one_of(st.sampled_from(FRAGMENTS), st.text(max_size=5)), min_size=0, max_size=6
).map("".join)


@st.composite
def conversations(draw: st.DrawFn) -> list[dict]:
    turns = draw(st.lists(texts, min_size=1, max_size=4))
    roles = ["user", "assistant"]
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]


_SEEN = [
    {
        "role": "user",
        "content": [{"type": "image", "image": "a.png"}, {"type": "text", "text": "<image>?"}],
    }
]


@cache
def _pair(kind: str, name: str) -> tuple[GraftProcessor, object]:
    """A processor that has seen images, and the base's tokenizer that has never met one."""
    processor = GraftProcessor(text_tokenizer(kind, template(name)), 4, PLACEHOLDER)
    processor.encode(_SEEN)
    return processor, text_tokenizer(kind, template(name))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["smollm2", "qwen3", "gemma3", "llama2"])
@settings(max_examples=25, deadline=None)
@given(messages=conversations(), prompt=st.booleans())
def test_chat_ids_are_the_bases(kind: str, name: str, messages: list[dict], prompt: bool) -> None:
    processor, base = _pair(kind, name)
    expected = base.apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=True, return_dict=True
    )
    encoded = processor.encode(messages, add_generation_prompt=prompt)
    assert encoded.input_ids == expected["input_ids"]
    assert encoded.kinds == [0] * len(encoded.input_ids)
    assert encoded.images == []
    text = base.apply_chat_template(messages, add_generation_prompt=prompt, tokenize=False)
    assert processor.prompt(messages, add_generation_prompt=prompt) == text
    assert base.get_vocab() == processor.tokenizer.get_vocab()


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=25, deadline=None)
@given(text=texts)
def test_plain_text_is_the_tokenizers_own(kind: str, text: str) -> None:
    processor = GraftProcessor(text_tokenizer(kind), 4, PLACEHOLDER, "plain")
    processor.encode(_SEEN)
    messages = [{"role": "user", "content": text}]
    assert processor.encode(messages).input_ids == text_tokenizer(kind)(text)["input_ids"]
    assert processor.prompt(messages) == text


def test_a_template_file_is_used_as_the_bases_own_would_be() -> None:
    processor = GraftProcessor(
        text_tokenizer("byte_bpe"), 4, PLACEHOLDER, Template("file", template("zephyr"))
    )
    base = text_tokenizer("byte_bpe", template("zephyr"))
    messages = [{"role": "user", "content": "An <image> tag"}]
    expected = base.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert processor.encode(messages).input_ids == expected["input_ids"]


def test_text_parts_go_untouched_to_a_template_that_reads_parts() -> None:
    # Gemma 3 trims every part by itself, so that flattening first would give other ids.
    processor, base = _pair("byte_bpe", "gemma3")
    messages = [
        {
            "role": "user",
            "content": [{"type": "text", "text": " a "}, {"type": "text", "text": " b "}],
        }
    ]
    expected = base.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
    assert processor.encode(messages).input_ids == expected["input_ids"]
    assert processor.prompt(messages).count("ab") == 1


def test_text_parts_are_joined_for_a_template_that_reads_texts() -> None:
    processor, base = _pair("byte_bpe", "smollm2")
    parts = [{"type": "text", "text": "An <im"}, {"type": "text", "text": "age> tag"}]
    expected = base.apply_chat_template(
        [{"role": "user", "content": "An <image> tag"}],
        add_generation_prompt=True,
        return_dict=True,
    )
    encoded = processor.encode([{"role": "user", "content": parts}])
    assert encoded.input_ids == expected["input_ids"]


def test_tools_and_other_keys_reach_the_template() -> None:
    processor, base = _pair("byte_bpe", "qwen2_5")
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": "<image>"}}}
    messages = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Look."},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "a cat"},
    ]
    expected = base.apply_chat_template(
        messages, tools=tools, add_generation_prompt=True, return_dict=True
    )
    assert processor.encode(messages, tools=tools).input_ids == expected["input_ids"]


def test_options_reach_the_template() -> None:
    base = text_tokenizer("byte_bpe", template("qwen3"))
    processor = GraftProcessor(base, 4, PLACEHOLDER, options={"enable_thinking": False})
    messages = [{"role": "user", "content": "Hi"}]
    assert processor.prompt(messages).endswith("<think>\n\n</think>\n\n")
    assert "</think>" in processor.decode(processor.encode(messages).input_ids)
    assert "</think>" in processor.prompt(_SEEN)


def test_the_tiny_tokenizers_text_stays_too() -> None:
    processor = GraftProcessor(tiny_tokenizer(), 4, 5)
    ids = processor.encode([{"role": "user", "content": "An <image> tag"}]).input_ids
    processor.encode(_SEEN)
    assert processor.encode([{"role": "user", "content": "An <image> tag"}]).input_ids == ids
    assert max(ids) < len(tiny_tokenizer())
