"""Check what is learnt of a conversation, under the templates of real models."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest

from mmgraft.data.chat.labels import supervise
from mmgraft.data.chat.processor import Encoded, GraftProcessor
from mmgraft.data.chat.template import Template
from mmgraft.errors import UsageError
from text_tokenizers import EOS, template, text_tokenizer

PATCHES, PLACEHOLDER = 3, 4
FIRST, SECOND = "Blue, says été.", "Two cats."

# What an answer begins and ends with: in the middle, and as the last turn.
EDGES: dict[str, tuple[tuple[str, str], tuple[str, str]]] = {
    "smollm2": (("", "<|im_end|>"), ("", "<|im_end|>")),
    "qwen2_5": (("", "<|im_end|>"), ("", "<|im_end|>")),
    "qwen3": (("", "<|im_end|>"), ("<think>\n\n</think>\n\n", "<|im_end|>")),
    "llama2": ((" ", " </s>"), (" ", " </s>")),
    "llama3": (("", "<|eot_id|>"), ("", "<|eot_id|>")),
    "llama3_2": (("", "<|eot_id|>"), ("", "<|eot_id|>")),
    "mistral_v0_2": (("", "</s>"), ("", "</s>")),
    "mistral_v0_3": ((" ", "</s>"), (" ", "</s>")),
    "gemma2": (("", "<end_of_turn>"), ("", "<end_of_turn>")),
    "gemma3": (("", "<end_of_turn>"), ("", "<end_of_turn>")),
    "phi3": (("", "<|end|>"), ("", "<|end|>")),
    "zephyr": (("", "</s>"), ("", "</s>")),
    "vicuna": ((" ", "</s>"), (" ", "</s>")),
    "command_r": (("", "<|END_OF_TURN_TOKEN|>"), ("", "<|END_OF_TURN_TOKEN|>")),
    "openchat": ((" ", "<|end_of_turn|>"), (" ", "<|end_of_turn|>")),
    "falcon": ((" ", ""), (" ", "</s>")),  # it marks no end: the last answer gets one
    "glm4": (("\n", ""), ("\n", "</s>")),
    "chatml_marked": (("", "<|im_end|>"), ("", "<|im_end|>")),
}
NO_SYSTEM = {"gemma2", "mistral_v0_2", "mistral_v0_3"}
TOKENIZERS = ["byte_bpe", "unigram_first", "unigram_always"]


@cache
def _processor(name: str, kind: str = "byte_bpe", rstrip: tuple[str, ...] = ()) -> GraftProcessor:
    tokenizer = text_tokenizer(kind, template(name), rstrip)
    return GraftProcessor(tokenizer, PATCHES, PLACEHOLDER)


def _user(text: str, images: int = 0) -> dict[str, Any]:
    picture = {"type": "image", "image": "a.png"}
    return {"role": "user", "content": [picture] * images + [{"type": "text", "text": text}]}


def _assistant(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _dialogue(images: int = 0) -> list[dict[str, Any]]:
    return [
        _user("Which colour is it?", images),
        _assistant(FIRST),
        _user("An <image> tag: how many?", images),
        _assistant(SECOND),
    ]


def _learnt(processor: GraftProcessor, messages: list[dict], encoded: Encoded) -> list[str]:
    """The text under every span, by the tokenizer's own offsets into the rendered conversation."""
    transcript = processor.transcript(messages)
    text = transcript.render()
    tokens = transcript.tokenizer(
        text, add_special_tokens=processor.template.kind == "plain", return_offsets_mapping=True
    )
    offsets: list[tuple[int, int]] = []
    for index, offset in zip(tokens["input_ids"], tokens["offset_mapping"], strict=True):
        offsets += [offset] * (PATCHES if index == transcript.sentinel_id else 1)
    text += EOS  # where an end was added to what the template writes
    offsets += [(len(text) - len(EOS), len(text))]
    return [text[offsets[start][0] : offsets[end - 1][1]] for start, end in encoded.spans]


def _expected(name: str) -> list[str]:
    (before, after), (last_before, last_after) = EDGES[name]
    return [before + FIRST + after, last_before + SECOND + last_after]


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("images", [0, 2])
@pytest.mark.parametrize("name", EDGES)
def test_answers_and_their_ends_are_learnt(name: str, images: int, kind: str) -> None:
    processor = _processor(name, kind)
    messages = _dialogue(images)
    encoded = supervise(processor, messages)
    assert _learnt(processor, messages, encoded) == _expected(name)
    labels = encoded.labels
    inside = [at for start, end in encoded.spans for at in range(start, end)]
    assert [at for at, label in enumerate(labels) if label != -100] == inside
    assert all(labels[at] == encoded.input_ids[at] for at in inside)
    assert sum(encoded.kinds) == 2 * images * PATCHES


@pytest.mark.parametrize("name", [name for name in EDGES if name not in NO_SYSTEM])
def test_a_system_turn_is_never_learnt(name: str) -> None:
    processor = _processor(name)
    messages = [{"role": "system", "content": "Be kind."}, *_dialogue(1)]
    encoded = supervise(processor, messages)
    assert _learnt(processor, messages, encoded) == _expected(name)


@pytest.mark.parametrize("name", EDGES)
def test_what_is_trained_on_is_the_prompt_of_inference(name: str) -> None:
    processor = _processor(name)
    messages = _dialogue(1)
    encoded = supervise(processor, messages)
    for turn, (start, _) in zip((1, 3), encoded.spans, strict=True):
        prompt = processor.encode(messages[:turn])
        assert encoded.input_ids[:start] == prompt.input_ids
        assert encoded.kinds[:start] == prompt.kinds


@pytest.mark.parametrize("name", ["smollm2", "phi3"])
def test_special_tokens_that_swallow_white_space_change_nothing(name: str) -> None:
    processor = _processor(name, "unigram_first", ("<|im_end|>", "<|end|>"))
    messages = _dialogue(1)
    texts = _learnt(processor, messages, supervise(processor, messages))
    assert [text.strip() for text in texts] == _expected(name)


def test_the_templates_newline_after_the_end_of_turn_is_not_learnt() -> None:
    processor = _processor("smollm2")
    encoded = supervise(processor, _dialogue())
    for _, end in encoded.spans:
        assert encoded.labels[end] == -100
        assert processor.decode([encoded.input_ids[end]]) == "\n"


def test_the_ids_are_the_templates_own() -> None:
    for name in ("smollm2", "llama3", "phi3"):
        processor = _processor(name)
        messages = [_user("Hi"), _assistant(FIRST)]
        whole = processor.encode(messages, add_generation_prompt=False)
        assert supervise(processor, messages).input_ids == whole.input_ids


def test_qwen3_keeps_the_reasoning_of_the_last_turn_only() -> None:
    processor = _processor("qwen3")
    thought = "<think>\nHm.\n</think>\n\n"
    messages = [
        _user("One?", 1),
        _assistant(thought + FIRST),
        _user("Two?"),
        _assistant(thought + SECOND),
    ]
    encoded = supervise(processor, messages)
    assert _learnt(processor, messages, encoded) == [
        FIRST + "<|im_end|>",
        thought + SECOND + "<|im_end|>",
    ]


def test_tool_calls_are_learnt_with_and_without_words() -> None:
    call = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
    written = '<tool_call>\n{"name": "look", "arguments": {"at": 1}}\n</tool_call><|im_end|>'
    tokenizer = text_tokenizer("byte_bpe", template("qwen3"))
    tokenizer.add_tokens(["<tool_call>", "</tool_call>", "<think>", "</think>"])  # as Qwen3's
    processor = GraftProcessor(tokenizer, PATCHES, PLACEHOLDER)
    for said, expected in (("Let me see.", "Let me see.\n" + written), ("", written)):
        messages = [
            _user("What is it?", 1),
            _assistant(said, tool_calls=[call]),
            {"role": "tool", "content": "a cat"},
            _assistant("A cat."),
        ]
        encoded = supervise(processor, messages)
        texts = _learnt(processor, messages, encoded)
        assert texts == [expected, "<think>\n\n</think>\n\nA cat.<|im_end|>"]


def _with_file(text: str) -> GraftProcessor:
    return GraftProcessor(text_tokenizer("byte_bpe"), PATCHES, PLACEHOLDER, Template("file", text))


def test_a_call_without_words_may_be_written_with_less_before_its_end() -> None:
    processor = _with_file(
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.content %}{{ m.content }}, then "
        "{% endif %}{% if m.tool_calls %}CALL {{ m.tool_calls[0].name }}{% endif %}"
        "<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    messages = [_user("Look", 1), _assistant("", tool_calls=[{"name": "f"}]), _user("Thanks")]
    assert _learnt(processor, messages, supervise(processor, messages)) == ["CALL f<|im_end|>"]


def test_an_end_of_turn_in_words_is_learnt() -> None:
    processor = _with_file(
        "{% for m in messages %}{{ m.role }}: {{ m.content }} [END]\n{% endfor %}"
        "{% if add_generation_prompt %}assistant:{% endif %}"
    )
    messages = _dialogue(1)
    learnt = _learnt(processor, messages, supervise(processor, messages))
    assert learnt == [f" {FIRST} [END]", f" {SECOND} [END]"]


def test_plain_learns_the_caption_and_its_end() -> None:
    for kind in TOKENIZERS:
        processor = GraftProcessor(text_tokenizer(kind), PATCHES, PLACEHOLDER, "plain")
        messages = [{"role": "user", "content": _user("", 1)["content"]}, _assistant("A cat.")]
        encoded = supervise(processor, messages)
        assert _learnt(processor, messages, encoded) == ["A cat.</s>"]
        assert encoded.input_ids[-1] == processor.tokenizer.eos_token_id
        prompt = processor.encode(messages[:1])
        assert encoded.input_ids[: len(prompt)] == prompt.input_ids


def test_plain_goes_on_after_a_question() -> None:
    processor = GraftProcessor(text_tokenizer("byte_bpe"), PATCHES, PLACEHOLDER, "plain")
    messages = [_user("What?", 1), _assistant("A cat"), _user("And?"), _assistant("Two")]
    encoded = supervise(processor, messages)
    assert _learnt(processor, messages, encoded) == [" A cat</s>", " Two</s>"]


def test_a_mark_that_leaves_the_end_of_turn_out_is_completed() -> None:
    outside = template("chatml_marked").replace(
        "turn['content'] + '<|im_end|>' -}}{%- endgeneration -%}",
        "turn['content'] -}}{%- endgeneration -%}{{- '<|im_end|>' -}}",
    )
    assert outside != template("chatml_marked")
    processor = _with_file(outside)
    messages = _dialogue(1)
    encoded = supervise(processor, messages)
    assert _learnt(processor, messages, encoded) == _expected("chatml_marked")


def test_the_templates_mask_is_transformers_own() -> None:
    processor = _processor("chatml_marked")
    messages = [{**m, "content": "Hi"} if m["role"] == "user" else m for m in _dialogue()]
    stock = processor.tokenizer.apply_chat_template(
        messages, return_dict=True, tokenize=True, return_assistant_tokens_mask=True
    )
    labels = supervise(processor, messages).labels
    assert [int(label != -100) for label in labels] == stock["assistant_masks"]


def test_a_last_answer_under_another_end_token_takes_its_own() -> None:
    # gpt-oss ends the last answer with <|return|>, the others with <|end|>.
    text = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{{ '<|eot_id|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    processor = _with_file(text)
    messages = _dialogue(1)
    learnt = _learnt(processor, messages, supervise(processor, messages))
    assert learnt == [FIRST + "<|end|>", SECOND + "<|eot_id|>"]


def test_an_image_in_an_answer_is_not_learnt() -> None:
    processor = _processor("smollm2")
    picture = {"type": "image", "image": "a.png"}
    answer = {"role": "assistant", "content": [picture, {"type": "text", "text": FIRST}]}
    encoded = supervise(processor, [_user("Draw."), answer])
    assert sum(encoded.kinds) == PATCHES
    assert all(
        label == -100
        for label, kind in zip(encoded.labels, encoded.kinds, strict=True)
        if kind == 1
    )
    learnt = [label for label in encoded.labels if label != -100]
    assert processor.decode(learnt, skip_special_tokens=False) == "\n" + FIRST + "<|im_end|>"


def test_a_dialogue_that_begins_with_an_answer_is_learnt_from_its_header_on() -> None:
    processor = _processor("smollm2")
    messages = [_assistant(FIRST), _user("Why?", 1), _assistant(SECOND)]
    encoded = supervise(processor, messages)
    assert _learnt(processor, messages, encoded) == [FIRST + "<|im_end|>", SECOND + "<|im_end|>"]


def test_an_answer_without_words_is_not_learnt() -> None:
    processor = _processor("smollm2")
    messages = [_user("One?"), _assistant(" "), _user("Two?", 1), _assistant(SECOND)]
    encoded = supervise(processor, messages)
    assert _learnt(processor, messages, encoded) == [SECOND + "<|im_end|>"]


@pytest.mark.parametrize(
    ("name", "messages", "says"),
    [
        ("smollm2", [_user("Hi")], "row 5: nothing to learn"),
        ("smollm2", [_user("Hi"), _assistant("")], "row 5: nothing to learn"),
        ("gemma2", [{"role": "system", "content": "S"}, *_dialogue()], "row 5: .*System role not"),
        ("mistral_v0_2", [_user("a"), _user("b"), _assistant("c")], "row 5: .*must alternate"),
        # The prompt that these write for an answer is no beginning of the conversation with it.
        ("mistral_v0_3", [{"role": "system", "content": "S"}, *_dialogue()], "turn 1: .*system"),
        ("deepseek_r1_distill", _dialogue(), "row 5, turn 2: .*differently"),
        ("chatml_marked", [_user("Hi"), {"role": "assistant", "content": 3}], "row 5: .*refuses"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learnt_are_refused_by_name(
    name: str, messages: list[dict], says: str
) -> None:
    processor = _processor(name)
    with pytest.raises(UsageError, match=says):
        supervise(processor, messages, where="row 5")


def test_an_answer_that_melts_into_its_header_is_refused_by_turn() -> None:
    tokenizer = text_tokenizer("byte_bpe", template("smollm2"))
    tokenizer.add_tokens(["\n\n"])  # as in Qwen's vocabulary
    processor = GraftProcessor(tokenizer, PATCHES, PLACEHOLDER)
    messages = [_user("Hi", 1), _assistant("Ho"), _user("Hi"), _assistant("\nHo")]
    with pytest.raises(UsageError, match=r"row 5, turn 4: .*'\\nHo<\|im_.*white space"):
        supervise(processor, messages, where="row 5")


def test_a_question_that_ends_in_a_space_is_refused_in_plain_text() -> None:
    processor = GraftProcessor(text_tokenizer("byte_bpe"), PATCHES, PLACEHOLDER, "plain")
    with pytest.raises(UsageError, match=r"turn 2: .*'The squa'.*end of the turn before"):
        supervise(processor, [_user("What? ", 1), _assistant("The square")])


def test_a_template_that_writes_an_answer_twice_is_refused() -> None:
    text = "{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}"
    processor = _with_file(text)
    with pytest.raises(UsageError, match=r"turn 2: .*2 times"):
        supervise(processor, [_user("Hi"), _assistant("Ho")])


def test_a_template_whose_end_depends_on_the_answer_is_refused() -> None:
    text = (
        "{% for m in messages %}{{ m.content }}{{ '!' if 'Ho' in m.content else '?' }}{% endfor %}"
    )
    processor = _with_file(text)
    with pytest.raises(UsageError, match=r"turn 2: .*depends on the answer"):
        supervise(processor, [_user("Hi"), _assistant("Ho")])


def test_a_date_that_changes_between_two_renders_does_not_end_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    processor = _processor("llama3_2")
    text = processor.tokenizer.apply_chat_template
    days = iter(["31 Dec 2026"] + ["01 Jan 2027"] * 100)
    monkeypatch.setattr(
        processor.tokenizer,
        "apply_chat_template",
        lambda *args, **settings: text(*args, date_string=next(days), **settings),
    )
    messages = [_user("Hi"), _assistant(FIRST)]
    encoded = supervise(processor, messages)
    assert processor.decode([x for x in encoded.labels if x != -100], False).startswith(FIRST)
