"""An exported template and tokenizer write and number every conversation as the graft does."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
from PIL import Image
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerBase

from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import Template
from mmgraft.export.llava.processor import image_template, image_tokenizer
from text_tokenizers import KINDS, template, text_tokenizer
from tiny_tokenizer import CHATML, tiny_tokenizer

PLACEHOLDER = 4
PICTURE = Image.new("RGB", (4, 4), (200, 30, 30))
IMAGE = {"type": "image", "image": PICTURE}

NAMES = [
    "chatml_marked", "command_r", "deepseek_r1_distill", "falcon", "gemma2", "gemma3", "glm4",
    "llama2", "llama3", "llama3_2", "mistral_v0_2", "mistral_v0_3", "openchat", "phi3", "qwen2_5",
    "qwen3", "smollm2", "vicuna", "zephyr",
]  # fmt: skip


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def user(*parts: dict[str, Any] | str) -> dict[str, Any]:
    content = parts[0] if isinstance(parts[0], str) else list(parts)
    return {"role": "user", "content": content}


ANSWER = {"role": "assistant", "content": "A cat"}

CONVERSATIONS = {
    "image first": [user(IMAGE, text("What?"))],
    "image last": [user(text("What? "), IMAGE)],
    "image alone": [user(IMAGE)],
    "two together": [user(IMAGE, IMAGE, text("Both?"))],
    "its own line": [user(IMAGE, text("\nWhat?"), text(""), text("now"))],
    "dialogue": [user(IMAGE, text("What?")), ANSWER, user(text("And "), IMAGE, text("this?"))],
    "later image": [user("Hi"), ANSWER, user(IMAGE, text("What?"))],
    "mixed parts": [user(text("Hi")), ANSWER, user(IMAGE)],
    "text": [user("What is  this?\n")],
    "text in parts": [user(text("One, "), text("two")), ANSWER, user(text("three"))],
    "text dialogue": [user("Hi"), ANSWER, user("And this?")],
}


def both(
    tokenizer: PreTrainedTokenizerBase, chosen: Template
) -> tuple[GraftProcessor, LlavaProcessor]:
    """mmgraft's processor and the stock one that an export writes."""
    size = {"height": 4, "width": 4}
    clone, token = image_tokenizer(tokenizer, chosen)
    stock = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(size=size, crop_size=size),
        tokenizer=clone,
        patch_size=2,
        vision_feature_select_strategy="full",
        image_token=token,
        chat_template=clone.chat_template,
    )
    return GraftProcessor(tokenizer, 4, PLACEHOLDER, chosen), stock


def assert_same(
    graft: GraftProcessor, stock: LlavaProcessor, messages: list[dict[str, Any]], prompt: bool
) -> None:
    encoded = graft.encode(messages, add_generation_prompt=prompt)
    found = stock.apply_chat_template(
        messages, add_generation_prompt=prompt, tokenize=True, return_dict=True
    )
    kinds = [int(index == stock.image_token_id) for index in found["input_ids"][0]]
    ids = [
        PLACEHOLDER if kind else index
        for index, kind in zip(found["input_ids"][0], kinds, strict=True)
    ]
    assert ids == encoded.input_ids
    assert kinds == encoded.kinds


@cache
def chat(kind: str, name: str) -> tuple[GraftProcessor, LlavaProcessor]:
    return both(text_tokenizer(kind, template(name)), Template("chat"))


@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("name", NAMES)
def test_ids_of_real_templates_are_the_grafts(name: str, case: str) -> None:
    graft, stock = chat("byte_bpe", name)
    for prompt in (True, False):
        assert_same(graft, stock, CONVERSATIONS[case], prompt)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "byte_bpe"])
@pytest.mark.parametrize("name", ["llama2", "gemma3", "qwen3", "zephyr"])
def test_ids_of_every_kind_of_tokenizer_are_the_grafts(name: str, kind: str) -> None:
    """One that adds special tokens of its own accord too: the template alone writes them."""
    graft, stock = chat(kind, name)
    for messages in CONVERSATIONS.values():
        assert_same(graft, stock, messages, prompt=True)


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("case", CONVERSATIONS)
def test_ids_of_a_template_without_bos_and_a_tokenizer_with_it(case: str, add_bos: bool) -> None:
    graft, stock = both(tiny_tokenizer(add_bos=add_bos), Template("chat"))
    assert_same(graft, stock, CONVERSATIONS[case], prompt=True)


# This wordpiece ends texts with a token, which a stock processor cannot leave out around images.
PLAIN = [
    (kind, case)
    for kind in (*KINDS, "bos")
    for case in CONVERSATIONS
    if kind != "wordpiece" or "text" in case
]


@pytest.mark.parametrize(("kind", "case"), PLAIN)
def test_ids_of_plain_text_are_the_grafts(kind: str, case: str) -> None:
    tokenizer = tiny_tokenizer(False, add_bos=True) if kind == "bos" else text_tokenizer(kind)
    graft, stock = both(tokenizer, Template("plain"))
    assert_same(graft, stock, CONVERSATIONS[case], prompt=False)


def test_a_template_from_a_file_and_templates_by_name() -> None:
    own = "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    graft, stock = both(tiny_tokenizer(False), Template("file", own))
    assert_same(graft, stock, CONVERSATIONS["dialogue"], prompt=False)
    named = tiny_tokenizer({"default": CHATML, "tool_use": own})  # type: ignore[arg-type]
    made = image_template(Template("chat"), named, "<image>")
    assert set(made) == {"default", "tool_use"}
    assert made["default"].endswith(CHATML)
    assert made["tool_use"].endswith(own)


@pytest.mark.parametrize("start", ["", " ", "\n", "\n\n", "  {#- c #}"])
def test_what_a_template_begins_with_is_kept(start: str) -> None:
    """White space at its start would be stripped, or more of it kept, by lines put before it."""
    own = start + "{% for m in messages %}\n  {{ m.content }}|\n{% endfor %}"
    graft, stock = both(tiny_tokenizer(False), Template("file", own))
    messages = [user("Hi")]
    assert stock.apply_chat_template(messages) == graft.prompt(messages, False)


def test_a_known_image_token_is_not_taken() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["<image>"])
    clone, token = image_tokenizer(tokenizer, Template("chat"))
    assert token == "[image]"
    assert clone.convert_tokens_to_ids(token) == len(tokenizer)
    assert len(clone) == len(tokenizer) + 1  # and the base's own is as it was
    assert "[image]" not in tokenizer.get_vocab()


def test_other_parts_are_refused() -> None:
    _, stock = both(tiny_tokenizer(), Template("chat"))
    with pytest.raises(Exception, match="neither text nor image"):
        stock.apply_chat_template([user(IMAGE, {"type": "video", "video": "a.mp4"})])
