"""Check chat templates: how answers end, reasoning, tools, what is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mmgraft.data.chat.labels import supervise
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import Template, resolve_template
from mmgraft.errors import UsageError
from text_tokenizers import EOS, template, text_tokenizer

USER, ANSWER = {"role": "user", "content": "Which?"}, {"role": "assistant", "content": "red"}
TOOLS = [{"type": "function", "function": {"name": "zoom", "parameters": {}}}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
REASONING = CHATML.replace(
    "{{ m.content }}",
    "{% if loop.last and m.role == 'assistant' %}OPEN{{ m.reasoning_content }}CLOSE{% endif %}"
    "{{ m.content }}",
)
HARMONY = (
    "{% for m in messages %}<|start|>{{ m.role }}{% if m.role == 'assistant' %}"
    "{% if m.thinking %}<|channel|>analysis<|message|>{{ m.thinking }}<|end|><|start|>assistant"
    "{% endif %}<|channel|>final{% endif %}<|message|>{{ m.content }}"
    "{{ '<|return|>' if loop.last and m.role == 'assistant' else '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant{% endif %}"
)
LLAMA_CALLS = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}"
    "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n{% if 'tool_calls' in m %}"
    "{% if m.tool_calls | length != 1 %}{{ raise_exception('single tool-calls alone') }}{% endif %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}{% else %}{{ m.content }}{% endif %}"
    "<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)


def _processor(text: str, special: tuple[str, ...] = (), **options: Any) -> GraftProcessor:
    tokenizer = text_tokenizer("byte_bpe", text)
    tokenizer.add_tokens(list(special), special_tokens=True)
    return GraftProcessor(tokenizer, 3, 4, options=options)


def _generated(processor: GraftProcessor, text: str) -> str:
    return processor.answer(processor.tokenizer(text, add_special_tokens=False)["input_ids"])


# -- what ends an answer ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "end"),
    [("qwen2_5", "<|im_end|>"), ("llama3", "<|eot_id|>"), ("gemma3", "<end_of_turn>"),
     ("command_r", "<|END_OF_TURN_TOKEN|>"), ("vicuna", EOS), ("falcon", EOS), ("plain", EOS)],
)  # fmt: skip
def test_what_training_learns_as_the_end_ends_an_answer(name: str, end: str) -> None:
    text = None if name == "plain" else template(name)
    tokenizer = text_tokenizer("byte_bpe", text)
    processor = GraftProcessor(tokenizer, 3, 4, "plain" if text is None else "chat")
    index = tokenizer.convert_tokens_to_ids(end)
    assert processor.answers.ends == (index,)
    learnt = supervise(processor, [USER, ANSWER])
    assert learnt.input_ids[learnt.spans[-1][1] - 1] == index
    for own, both in ((None, [index]), (900, [900, index]), ([900, index], [900, index])):
        assert processor.answers.with_ends(own) == both


def test_an_end_of_ordinary_text_is_a_text_to_stop_at() -> None:
    processor = _processor(CHATML.replace("<|im_end|>", "\n### end"))
    assert processor.answers.ends == ()
    assert processor.answers.stops == ("\n### end",)
    assert _generated(processor, "red\n### end\n###") == "red"


# -- reasoning ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("opens", "closes"),
    [("<think>\n", "\n</think>\n\n"), ("<reasoning>", "</reasoning>"), ("[THINK]", "[/THINK]"),
     ("<|begin_of_thought|>", "<|end_of_thought|>"), ("~~why: ", " :so~~"),
     ("<seed:think>", "</seed:think>")],
)  # fmt: skip
@pytest.mark.parametrize("special", [False, True])
def test_an_answer_is_what_comes_after_reasoning(opens: str, closes: str, special: bool) -> None:
    text = REASONING.replace("OPEN", opens).replace("CLOSE", closes)
    tags = (opens.strip(), closes.strip())
    processor = _processor(text, tags if special else ())
    assert _generated(processor, f"{opens}It is warm.{closes}red<|im_end|>") == "red"
    assert _generated(processor, f"{opens}{closes}red<|im_end|><pad>") == "red"
    assert _generated(processor, f"{opens}It is") == ""
    assert _generated(processor, "red <|im_end|>") == "red"
    assert _generated(processor, f"It is warm.{closes}red") == "red"


@pytest.mark.parametrize("tag", ["think", "thinking", "thought", "reasoning", "scratchpad"])
def test_common_reasoning_is_known_to_templates_that_write_none(tag: str) -> None:
    processor = _processor(CHATML)
    assert _generated(processor, f"<{tag}>so</{tag}>\nred") == "red"
    assert _generated(processor, f"<{tag}>so</other>") == ""
    assert _generated(processor, f"<{tag}ful> red") == f"<{tag}ful> red"


@pytest.mark.parametrize(
    ("opens", "closes"),
    [("<think></think><answer>", "</answer>"), ("[think]\n[/think]\n<a>", "</a>\n"), ('"', '"'),
     ("Answer: ", ""), ("", " END")],
)  # fmt: skip
@pytest.mark.parametrize("special", [False, True])
def test_what_a_template_writes_around_an_answer_is_none_of_it(
    opens: str, closes: str, special: bool
) -> None:
    says = f"{{% if m.role == 'assistant' %}}{opens}{{{{ m.content }}}}{closes}{{% else %}}"
    text = CHATML.replace("{{ m.content }}", f"{says}{{{{ m.content }}}}{{% endif %}}")
    processor = _processor(text, ("<think>", "</think>") if special else ())
    assert processor.answers.ends == (processor.tokenizer.convert_tokens_to_ids("<|im_end|>"),)
    assert _generated(processor, f"{opens}red{closes}<|im_end|>") == "red"
    after = opens.replace("think><", "think>so<", 1).replace("]\n[", "]so[")
    assert _generated(processor, f"{after}red{closes}<|im_end|><pad>") == "red"
    assert _generated(processor, "red<|im_end|>") == "red"
    pieces = [f"{opens}red{closes}"[:at] for at in range(len(opens) + 4 + len(closes))]
    said = [processor.answers.shown(one) for one in pieces]
    held = [one[: len(one) - processor.answers.begun(one)] for one in said]
    assert all("red".startswith(one.strip()) for one in held[len(opens) + 1 :])


@pytest.mark.parametrize("ends", ["<|im_end|>\n", "<|im_end|>", "\n"])
@pytest.mark.parametrize("header", ["<|im_start|>assistant\n", "<|assistant|>", "ASSISTANT: "])
def test_a_header_after_every_conversation_is_no_end(ends: str, header: str) -> None:
    turn = "{{ '<|im_start|>user\n' if m.role == 'user' else '" + header + "' }}{{ m.content }}"
    text = f"{{% for m in messages %}}{turn}{ends}{{% endfor %}}{header}"
    with pytest.raises(UsageError, match="the header of an answer after the last one too"):
        supervise(_processor(text), [USER, ANSWER])
    asked = text.replace("endfor %}", "endfor %}{% if add_generation_prompt %}") + "{% endif %}"
    assert len(supervise(_processor(asked), [USER, ANSWER])) > 4


@pytest.mark.parametrize(
    "text", ["{{ 1 / 0 }}", "{{ messages[9].content.x.y }}", "{{ raise_exception('no') }}",
             "{{ messages | sum }}", "{{ none.x.y }}", "{{ [] | first | int(base=99) }}"],
)  # fmt: skip
def test_whatever_a_template_raises_is_a_refusal(text: str) -> None:
    tokenizer = text_tokenizer("byte_bpe", text)
    assert resolve_template(None, tokenizer).kind == "chat"  # it may want other turns
    with pytest.raises(UsageError, match="the chat template refuses this conversation"):
        supervise(_processor(text), [USER, ANSWER])


@pytest.mark.parametrize("text", ["{% for m in messages %}", "{{ m.content }", "{{ 1 | nothing }}"])
def test_a_template_that_is_no_jinja_is_refused_at_once(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_text(text)
    for spec, base in (
        (None, text),
        (str(tmp_path / "a.jinja"), CHATML),
        ("b", {"b": text, "default": CHATML}),
    ):
        with pytest.raises(UsageError, match=r"line 1: .*; correct the template"):
            resolve_template(spec, text_tokenizer("byte_bpe", base))


def test_channels_are_reasoning_and_answer() -> None:
    tags = ("<|start|>", "<|channel|>", "<|message|>", "<|end|>", "<|return|>")
    processor = _processor(HARMONY, tags)
    ends = processor.tokenizer.convert_tokens_to_ids(["<|return|>"])
    assert processor.answers.ends == tuple(ends), "an end of reasoning ends no answer"
    thought = "<|channel|>analysis<|message|>It is warm.<|end|><|start|>assistant"
    assert _generated(processor, f"{thought}<|channel|>final<|message|>red<|return|>") == "red"
    assert _generated(processor, "<|channel|>final<|message|>red<|return|>") == "red"
    assert _generated(processor, "<|channel|>analysis<|message|>It is") == ""


def test_a_prompt_may_begin_the_reasoning() -> None:
    text = CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif")
    processor = _processor(text)
    assert _generated(processor, "It is warm.\n</think>\n\nred<|im_end|>") == "red"
    assert _generated(processor, "It is warm.") == ""


def test_reasoning_that_a_template_does_not_write_is_refused() -> None:
    thought = {**ANSWER, "reasoning_content": "It is warm."}
    with pytest.raises(UsageError, match=r"turn 2: .* does not write the 'reasoning_content'"):
        supervise(_processor(CHATML), [USER, thought])
    text = REASONING.replace("OPEN", "<think>").replace("CLOSE", "</think>")
    brief = text.replace("if loop.last", "if not brief and loop.last")
    with pytest.raises(UsageError, match="does not write the 'reasoning_content'"):
        supervise(_processor(brief, brief=True), [USER, thought])
    supervise(_processor(brief), [USER, thought, USER, ANSWER])  # it is left out on purpose
    learnt = supervise(_processor(text), [USER, thought])
    assert "It is warm." in _processor(text).decode(learnt.input_ids)


# -- options ------------------------------------------------------------------------------------


def test_options_are_variables_that_the_template_knows() -> None:
    processor = _processor(template("qwen3"), enable_thinking=False)
    assert processor.prompt([USER]).endswith("<think>\n\n</think>\n\n")
    assert not _processor(template("qwen3")).prompt([USER]).endswith("</think>\n\n")
    for wrong in ("enable_thinkin", "messages", "tools", "bos_token", "add_generation_prompt"):
        with pytest.raises(UsageError, match=f"template option '{wrong}'"):
            _processor(template("qwen3"), **{wrong: False})
    with pytest.raises(UsageError, match="no such variable; none is known"):
        _processor(CHATML, enable_thinking=True)
    with pytest.raises(UsageError, match="no such variable"):
        GraftProcessor(text_tokenizer("byte_bpe"), 3, 4, "plain", options={"a": 1})
    assert processor.with_template("plain").options == {}
    assert processor.with_template(Template("file", template("qwen3"))).options


# -- templates by name --------------------------------------------------------------------------


def test_of_several_templates_without_a_default_one_is_chosen() -> None:
    named = {"rag": CHATML, "tool_use": LLAMA_CALLS}
    tokenizer = text_tokenizer("byte_bpe")
    tokenizer.chat_template = named
    for make in (
        lambda: GraftProcessor(tokenizer, 3, 4),
        lambda: resolve_template(None, tokenizer),
    ):
        with pytest.raises(UsageError, match=r"called rag, tool_use, .*--template NAME"):
            make()
    assert resolve_template("rag", tokenizer) == Template("file", CHATML)
    with pytest.raises(UsageError, match="write chat, plain, rag, tool_use or the path"):
        resolve_template("default", tokenizer)
    tokenizer.chat_template = {**named, "default": CHATML}
    assert GraftProcessor(tokenizer, 3, 4).prompt([USER]).startswith("<|im_start|>user")


# -- roles --------------------------------------------------------------------------------------


def test_no_unknown_role_reaches_a_header() -> None:
    processor = _processor(CHATML)
    picture = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "Which?"}]
    for content in ("Which?", picture):
        human, user = ({"role": role, "content": content} for role in ("human", "user"))
        assert processor.encode([human]) == processor.encode([user])
        for role in ("usr", "narrator", None):
            for act in (processor.encode, processor.prompt, processor):
                with pytest.raises(UsageError, match=r"turn 2: the role .* is not known"):
                    act([user, {"role": role, "content": "a"}])


# -- tools and their calls ----------------------------------------------------------------------


def _call(arguments: Any) -> dict[str, Any]:
    call = {"type": "function", "function": {"name": "zoom", "arguments": arguments}}
    return {"role": "assistant", "content": "", "tool_calls": [call]}


@pytest.mark.parametrize("name", ["qwen2_5", "qwen3", "llama"])
def test_arguments_of_calls_are_objects_however_they_are_given(name: str) -> None:
    text = LLAMA_CALLS if name == "llama" else template(name)
    processor = _processor(text)
    learnt = [
        supervise(processor, [USER, _call(given)], TOOLS)
        for given in ('{"factor": 2}', {"factor": 2})
    ]
    assert learnt[0] == learnt[1]
    (start, end), *_ = learnt[0].spans
    said = processor.decode(learnt[0].input_ids[start:end], skip_special_tokens=False)
    assert '{"factor": 2}' in said
    assert said.endswith(("<|im_end|>", "<|eot_id|>"))


@pytest.mark.parametrize("written", ["{{ ARGS }}", "{{ '' + ARGS }}"])
def test_a_template_of_text_arguments_gets_text(written: str) -> None:
    args = written.replace("ARGS", "c.function.arguments")
    text = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}"
        + args
        + "{% endfor %}",
    )
    for given in ('{"factor": 2}', {"factor": 2}):
        assert 'zoom{"factor": 2}<|im_end|>' in _processor(text).prompt([USER, _call(given)], False)


def test_a_call_is_learnt_in_the_middle_and_without_content() -> None:
    processor = _processor(LLAMA_CALLS)
    result = {"role": "tool", "content": "closer"}
    encoded = supervise(processor, [USER, _call({"factor": 2}), result, ANSWER], TOOLS)
    said = [
        processor.decode(encoded.input_ids[start:end], skip_special_tokens=False)
        for start, end in encoded.spans
    ]
    assert said == ['{"name": "zoom", "parameters": {"factor": 2}}<|eot_id|>', "red<|eot_id|>"]


def test_no_calls_are_as_none() -> None:
    for text in (LLAMA_CALLS, template("llama3_2"), template("mistral_v0_3")):
        processor = _processor(text)
        plain = supervise(processor, [USER, ANSWER])
        for nothing in ([], None, "[]"):
            assert supervise(processor, [USER, {**ANSWER, "tool_calls": nothing}]) == plain


def test_tools_of_each_conversation_reach_the_template() -> None:
    processor = _processor(template("qwen2_5"))
    both = processor([[USER], [USER]], tools=[TOOLS, None])
    texts = [processor.decode(row) for row in both["input_ids"]]
    assert ["zoom" in text for text in texts] == [True, False]
    assert all(
        "zoom" in processor.decode(r) for r in processor([[USER], [USER]], tools=TOOLS)["input_ids"]
    )


# -- what a template leaves out -----------------------------------------------------------------

TWO_ROLES = (
    "{% for m in messages %}{% if m.role == 'user' %}<|user|>{{ m.content }}{% elif m.role == "
    "'assistant' %}<|assistant|>{{ m.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        (
            [{"role": "system", "content": "French."}, USER, ANSWER],
            "turn 1: .* 'content' .* system",
        ),
        ([{"role": "developer", "content": "Fr."}, USER, ANSWER], "turn 1: .* of the developer"),
        ([USER, _call({}), ANSWER], "turn 2: .* 'tool_calls' of this turn of the assistant"),
        ([USER, ANSWER, {"role": "tool", "content": "2"}, ANSWER], "turn 3: .* of the tool"),
        ([USER, {**ANSWER, "thinking": "hm"}], "turn 2: .* 'reasoning_content'"),
    ],
)
def test_turns_that_the_template_does_not_write_are_refused(
    turns: list[dict[str, Any]], says: str
) -> None:
    processor = _processor(TWO_ROLES)
    with pytest.raises(UsageError, match=says):
        supervise(processor, turns)
    with pytest.raises(UsageError, match=says):
        processor.encode(turns)
    picture = {"role": "user", "content": [{"type": "image", "image": "a.png"}]}
    with pytest.raises(UsageError, match=r"does not write|is not known"):
        processor.encode([*turns, picture])
    supervise(processor, [USER, ANSWER])


def test_content_beside_calls_and_tools_are_refused_where_they_are_dropped() -> None:
    with pytest.raises(UsageError, match=r"turn 2: .* 'content' of this turn"):
        supervise(_processor(LLAMA_CALLS), [USER, {**_call({}), "content": "Let me see."}], TOOLS)
    with pytest.raises(UsageError, match="does not write the row's 'tools'"):
        _processor(CHATML).encode([USER], tools=TOOLS)
