"""Ids, labels and kinds of conversations under every chat template and kind of tokenizer."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from mmgraft import UsageError
from text_tokenizers import BOS, EOS, PAD, SPARE, TEMPLATES, UNK, template
from unchanged.comparing import value_hash
from unchanged.inside import GraftProcessor, supervise

TOKENIZERS = Path(__file__).resolve().parent / "tokenizers"
"""Made by tests/support/text_tokenizers once: most kinds come out differently in every process."""

WHOLE = "byte_bpe"
"""The tokenizer whose ids are recorded themselves; of the others, a hash."""

PATCHES, PLACEHOLDER = 3, 4
OPTIONS = {"date_string": "26 Jul 2024"}  # or a template writes today's

PLAIN = "plain"
CASES = [*sorted(path.stem for path in TEMPLATES.glob("*.jinja")), PLAIN]

_CALL = {"type": "function", "function": {"name": "look", "arguments": {"at": 1}}}
_TOOL = {"type": "function", "function": {"name": "look", "parameters": {}}}


def _user(text: str, images: int = 0) -> dict[str, Any]:
    pictures = [{"type": "image", "image": "a.png"}] * images
    return {"role": "user", "content": [*pictures, {"type": "text", "text": text}]}


def _says(text: str, **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def _dialogue(images: int) -> list[dict[str, Any]]:
    return [
        _user("Which colour is it?", images),
        _says("Blue, says été."),
        _user("An <image> tag: how many?", images),
        _says("Two cats."),
    ]


_THOUGHT = "<think>\nHm.\n</think>\n\n"
_SYSTEM = {"role": "system", "content": "Be kind."}
_PICTURE = {"type": "image", "image": "b.png"}

ROWS: dict[str, tuple[list[dict[str, Any]], list[Any] | None]] = {
    # Messages and tools.
    "text": (_dialogue(0), None),
    "pictures": (_dialogue(1), None),
    "two in a turn": (_dialogue(2), None),
    "system": ([_SYSTEM, *_dialogue(1)], None),
    "one turn": ([_user("Look", 1), _says("A cat.")], None),
    "string content": ([{"role": "user", "content": "Hi"}, _says("Ho")], None),
    "in the middle": (
        [
            {"role": "user", "content": [{"type": "text", "text": "Is "}, _PICTURE,
                                         {"type": "text", "text": " blue? "}]},
            _says("No"),
        ],
        None,
    ),
    "marks as text": ([_user(f"<image> {SPARE} <s> </s>\n\n", 1), _says("[image] <pad>")], None),
    "reasoning": ([_user("One?", 1), _says(_THOUGHT + "1"), _user("2?"), _says(_THOUGHT + "2")],
                  None),
    "begins with an answer": ([_says("First."), _user("Why?", 1), _says("So.")], None),
    "an answer without words": ([_user("1?"), _says(" "), _user("2?", 1), _says("Two.")], None),
    "picture in an answer": (
        [
            _user("Draw."),
            {"role": "assistant", "content": [_PICTURE, {"type": "text", "text": "Here."}]},
        ],
        None,
    ),
    "tool call": ([_user("Look", 1), _says("", tool_calls=[_CALL]), _user("So?"), _says("Ah.")],
                  [_TOOL]),
    "nothing to learn": ([_user("Hi", 1)], None),
}  # fmt: skip


def record(case: str) -> dict[str, Any]:
    """Every row under one template, by tokenizer."""
    found: dict[str, Any] = {}
    for kind in sorted(path.stem for path in TOKENIZERS.glob("*.json")):
        rows = {name: _row(case, kind, *row) for name, row in ROWS.items()}
        found[kind] = rows if kind == WHOLE else {n: value_hash(row) for n, row in rows.items()}
    return found


def _row(
    case: str, kind: str, messages: list[dict[str, Any]], tools: list[Any] | None
) -> dict[str, Any]:
    """Return what is trained on, and the prompt for the last turn; or where it is refused."""
    processor = _processor(case, kind)
    asked = messages if messages[-1]["role"] == "user" else messages[:-1]
    found: dict[str, Any] = {}
    try:
        whole = supervise(processor, messages, tools, "row 5")
        found["ids"], found["kinds"] = whole.input_ids, _spans([k == 1 for k in whole.kinds])
        found["learned"] = _spans([label != -100 for label in whole.labels])
        pairs = zip(whole.labels, whole.input_ids, strict=True)
        assert all(label in (-100, index) for label, index in pairs), "a label is no id of its own"
    except UsageError as error:
        found["refused"] = _place(error)
    try:
        prompt = processor.encode(asked, tools=tools, where="row 5")
        begins = found.get("ids", [])[: len(prompt)] == prompt.input_ids
        found["prompt"] = f"the first {len(prompt)} ids" if begins else prompt.input_ids
        found["prompt kinds"] = _spans([k == 1 for k in prompt.kinds])
        found["pictures"] = prompt.images
    except UsageError as error:
        found["prompt refused"] = _place(error)
    return found


def _place(error: UsageError) -> str:
    """The row, and where it is told the turn, that an error names; not its words."""
    return str(error).partition(": ")[0]


@cache
def _processor(case: str, kind: str) -> GraftProcessor:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_file(str(TOKENIZERS / f"{kind}.json")),
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        pad_token=PAD,
    )
    tokenizer.chat_template = None if case == PLAIN else template(case)
    way = "plain" if case == PLAIN else "chat"
    known = {name: OPTIONS[name] for name in OPTIONS if name in (tokenizer.chat_template or "")}
    return GraftProcessor(tokenizer, PATCHES, PLACEHOLDER, way, options=known)


def _spans(marks: list[bool]) -> list[list[int]]:
    """First and past-the-last place of every run of marked places."""
    edges = [at for at, (a, b) in enumerate(zip([False, *marks], [*marks, False], strict=True))
             if a != b]  # fmt: skip
    return [list(pair) for pair in zip(edges[::2], edges[1::2], strict=True)]
