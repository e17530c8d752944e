"""The layouts in which rows come, each made into turns; ``docs/data.md`` shows a row of each.

A layout is known by keys that its rows have, and reads some others. Free of torch.
"""

import random
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import field
from functools import cached_property, lru_cache, partial
from typing import Any, Literal

from pydantic import ConfigDict, Field

from mmgraft.data.chat.turns import refuse_unread
from mmgraft.data.formats.fields import PASSAGES, Fields, fill_prompt, gold_of
from mmgraft.errors import UsageError, brief
from mmgraft.frozen import Frozen
from mmgraft.strict import StrictModel, about

Format = Literal["auto", "messages", "swift", "llava", "alpaca", "cauldron", "trl", "vqa"]
#: Fields of a row of a table; ``columns`` names the key of each.
Column = Literal["id", "question", "answer", "answers", "options", "image"]

Record = Mapping[str, Any]
Turn = dict[str, Any]


class Vqa(StrictModel):
    """Settings that turn a row of a table into a question and an answer."""

    prompt: str = about("template of the question", "{question}")
    prompt_with_options: str = about("template of a question with options", "{question}\n{options}")
    answer: Literal["first", "most_frequent", "sampled"] = about(
        "choice among several answers", "first"
    )
    seed: int = about("seed for answers that are sampled", 0)


class Layout(Frozen):
    """One way of writing rows.

    Attributes:
        names: What ``format`` calls it; of several, the turns or the images tell which it is.
        keys: That every row of it has.
        turns: Makes the turns of a record: role and content, images not yet in their places.
        more: Further keys that it reads.
    """

    names: tuple[Format, ...]
    keys: tuple[str, ...]
    turns: Callable[[Record, str], list[Turn]]
    more: tuple[str, ...] = ()

    @cached_property
    def reads(self) -> tuple[str, ...]:
        """All keys that it reads."""
        return (*self.keys, *self.more, "image", "images", "system", "tools")

    @cached_property
    def known_by(self) -> str:
        """Its keys in words."""
        return " and ".join(map(repr, self.keys))


class Reading(Frozen):
    """Settings of a recipe for reading rows.

    Attributes:
        format: A layout's name; "auto" tells the layout by the keys of each row.
        columns: Of a table, by what it holds: see ``Column``.
        vqa: Templates and policy of a table.
    """

    format: Format = "auto"
    columns: Mapping[str, str] = field(default_factory=dict)
    vqa: Vqa = field(default_factory=Vqa)

    def layout(self, data: Record, where: str) -> Layout:
        """Return the layout of a record.

        Raises:
            UsageError: None has its keys, or more than one has; it says what was seen.
        """
        if self.columns or self.format == "vqa":
            keys = tuple(self.columns.values())
            more = (*map(str.strip, ",".join(keys).split(",")), *PASSAGES)
            return Layout(("vqa",), keys, partial(_vqa, self), more)
        found = [one for one in _with_keys(tuple(data), self.format) if has_keys(data, one)]
        if len(found) > 1:  # a column that is empty tells nothing
            found = [one for one in found if all(data[key] for key in one.keys)] or found
        if len(found) == 1:
            return found[0]
        if found:
            seen = " and ".join(f"{one.known_by} ({one.names[0]})" for one in found)
            raise UsageError(
                f"{where}: the keys of several layouts, {seen}; write format: {found[0].names[0]}, "
                "or another of them, in the recipe"
            )
        seen = brief(", ".join(map(repr, data)) or "nothing")
        known = [one for one in LAYOUTS if self.format in ("auto", *one.names)]
        keys = " or ".join(one.known_by for one in known[:2])
        others = ", ".join(f"{one.known_by} ({one.names[0]})" for one in LAYOUTS[2:])
        raise UsageError(
            f"{where}: no {keys} in it but {seen}; write messages, "
            f"another layout ({others}), or columns: {{question: ..., answer: ...}} for a table"
        )

    def read_keys(self, layout: Layout) -> Collection[str]:
        """Return the keys of a row that are read, or that a named layout says not to read."""
        if self.format == "auto" and not self.columns:
            return layout.reads
        return {*layout.reads, *(key for one in LAYOUTS for key in one.keys)}


def has_keys(data: Record, layout: Layout) -> bool:
    """Tell whether a record has the keys of a layout."""
    return all(data.get(key) is not None for key in layout.keys)


@lru_cache(maxsize=1024)
def _with_keys(keys: tuple[str, ...], format: Format) -> list[Layout]:
    """Return layouts whose keys are there; rows of a file mostly have the same."""
    named = [one for one in LAYOUTS if format in ("auto", *one.names)]
    return [one for one in named if set(one.keys) <= set(keys)]


def told(data: Record) -> bool:
    """Tell whether a record has the keys of any layout."""
    return any(has_keys(data, layout) for layout in LAYOUTS)


def _listed(key: str, data: Record, where: str) -> list[Turn]:
    """Return the turns under a key as role and content, from either way of writing one."""
    turns = _objects(data[key])
    if not isinstance(turns, list) or not turns:
        kind = "messages" if key == "messages" else "turns"
        raise UsageError(f"{where}: {key!r} is not a list of {kind}; write at least one")
    return [_turn(turn, f"{where}, turn {at}") for at, turn in enumerate(turns, start=1)]


def _turn(turn: Any, at: str) -> Turn:
    made = dict(turn) if isinstance(turn, dict) else {}
    for old, new in (("from", "role"), ("value", "content")):
        said = made.pop(old, None)
        if made.get(new) is None and said is not None:
            made[new] = said
        elif said not in (None, made.get(new)):
            raise UsageError(f"{at}: its {old!r} and {new!r} differ; write one of them")
    if not isinstance(made.get("role"), str) or not ("content" in made or made.get("tool_calls")):
        raise UsageError(
            f"{at}: not {{'role': ..., 'content': ...}} or {{'from': ..., 'value': ...}}; mend it"
        )
    return made


def _objects(value: Any) -> Any:
    """Return a list of objects; a table may hold it as an object of lists."""
    lists: list[Any] = list(value.values()) if isinstance(value, dict) else [None]
    if all(isinstance(one, list) and len(one) == len(lists[0]) for one in lists):
        return [dict(zip(value, cells, strict=True)) for cells in zip(*lists, strict=True)]
    return value


def _trl(data: Record, where: str) -> list[Turn]:
    turns: list[Turn] = []
    for key, role in (("prompt", "user"), ("completion", "assistant")):
        said = isinstance(data[key], str)
        turns += [{"role": role, "content": data[key]}] if said else _listed(key, data, where)
    return turns


class _Pair(StrictModel):
    model_config = ConfigDict(extra="ignore")  # ``refuse_unread`` looks at further keys

    user: str
    assistant: str


class _Texts(StrictModel):
    texts: list[_Pair] = Field(min_length=1)


class _Alpaca(StrictModel):
    instruction: str
    input: str | None = None
    output: str | None = None
    history: list[tuple[str, str]] | None = None


def _alpaca(data: Record, where: str) -> list[Turn]:
    """Return earlier questions and answers, then the instruction above its input, then the output.

    The instruction and the input are joined by a newline, as LLaMA-Factory does.
    """
    row = _Alpaca.parse({key: data[key] for key in _Alpaca.model_fields if key in data}, where)
    asked = "\n".join(filter(None, (row.instruction, row.input)))
    said = [*(text for pair in row.history or () for text in pair), asked, row.output]
    roles = ("user", "assistant")
    return [
        {"role": roles[at % 2], "content": text} for at, text in enumerate(said) if text is not None
    ]


def _cauldron(data: Record, where: str) -> list[Turn]:
    texts = _objects(data["texts"])
    for at, text in enumerate(texts if isinstance(texts, list) else ()):
        if isinstance(text, dict):
            refuse_unread(text, _Pair.model_fields, f"{where}, texts[{at}]")
    pairs = _Texts.parse({"texts": texts}, where).texts
    return [{"role": role, "content": text} for pair in pairs for role, text in pair]


def _vqa(reading: Reading, data: Record, where: str) -> list[Turn]:
    """Return the question of a table's row, and the answer that the policy takes."""
    columns = {what: name for what, name in reading.columns.items() if what != "image"}
    Fields(columns).check(list(data), where, "this row has not")
    if "answer" in columns:  # one column, whether it holds one or several
        columns["answers"] = columns.pop("answer")
    fields = Fields(columns)
    question, answers = fields.question(data, where), fields.answers(data, where)
    options = fields.options(data, where)
    if question is None:
        there = brief(", ".join(map(repr, data)) or "nothing")
        raise UsageError(f"{where}: no question but {there}; write columns: {{question: NAME}}")
    prompt = reading.vqa.prompt_with_options if options else reading.vqa.prompt
    turns = [{"role": "user", "content": fill_prompt(prompt, question, options)}]
    if answers:
        answer = _chosen(answers, reading.vqa, f"{fields.get(data, 'id')} {question}")
        said = options[gold_of(answer, options, where)] if options else str(answer)
        turns.append({"role": "assistant", "content": said})
    return turns


def _chosen(answers: Sequence[Any], vqa: Vqa, row: str) -> Any:
    if vqa.answer == "most_frequent":
        return Counter(answers).most_common(1)[0][0]  # of several, the first
    sampled = vqa.answer == "sampled"
    return random.Random(f"{vqa.seed} {row}").choice(answers) if sampled else answers[0]


#: All but tables, which a recipe names by their columns.
LAYOUTS = (
    Layout(("llava", "swift"), ("conversations",), partial(_listed, "conversations")),
    Layout(("messages", "swift"), ("messages",), partial(_listed, "messages")),
    Layout(("alpaca",), ("instruction", "output"), _alpaca, ("input", "history")),
    Layout(("cauldron",), ("texts",), _cauldron),
    Layout(("trl",), ("prompt", "completion"), _trl),
)
