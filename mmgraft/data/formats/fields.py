"""The fields of a record of a table: its question, options and right answers."""

import ast
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mmgraft.data.chat.turns import ROW_KEYS
from mmgraft.errors import UsageError, brief, did_you_mean

#: Keys that are looked for where ``columns`` names none, of fields that have other names than
#: their own.
_KEYS: dict[str, tuple[str, ...]] = {
    "id": ("id", "question_id"),
    "answer": ("answer", "caption"),
    "answers": ("answers", "captions"),
    "options": ("options", "choices"),
    "image": ("image", "images"),
    "box": ("box", "bbox"),
}

PASSAGES = ("passage", "context", "hint")
_LETTERED = re.compile(r"(?:^|\n)\s*([A-Z])[.)]\s+")
_ENDS = " .?!"  # some sets have them in the options or in the answer alone
_LETTER = re.compile(r"\(?([A-Z])[.)]?")


class Fields:
    """Finds the fields of records by the names that a set gives them.

    Args:
        columns: ``SetSpec.columns``, a field to the key it has in the records. ``options`` may be
            several keys with commas between them.
    """

    def __init__(self, columns: Mapping[str, str]) -> None:
        self.columns = columns

    def check(self, keys: Sequence[str], file: str, without: str = "no row has") -> None:
        """Refuse a column that no record has, or that a row is ``without``.

        Raises:
            UsageError: It names the columns there are.
        """
        for field, name in self.columns.items():
            for part in [name] if name in keys else [part.strip() for part in name.split(",")]:
                if part not in keys:
                    there = ", ".join(keys) or "none"
                    raise UsageError(
                        f"{file}: columns says that {field} is {part!r}, which {without}; there "
                        f"are {there} ({did_you_mean(part, keys)})"
                    )

    def get(self, record: Mapping[str, Any], field: str) -> Any:
        """Return a field's value, None where the record does not have it."""
        named = self.columns.get(field)
        if named is not None and (named in record or "," not in named):
            return record.get(named)
        if named is not None:
            return [record.get(part.strip()) for part in named.split(",")]
        found = map(record.get, _KEYS.get(field, (field,)))
        return next((one for one in found if one is not None), None)

    def others(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return a record without what ``columns`` names, but for the row's own keys."""
        named = {part.strip() for name in self.columns.values() for part in name.split(",")}
        named |= set(self.columns.values())
        return {key: record[key] for key in record if key in ROW_KEYS or key not in named}

    def question(self, record: Mapping[str, Any], where: str) -> str | None:
        """Return the question, after its passage where there is one."""
        value = self.get(record, "question")
        if value is None:
            return None
        if not isinstance(value, str):
            raise UsageError(f"{where}: a question that is no text ({value!r}); write a text")
        passage = self.passage(record)
        return f"{passage}\n{value.strip()}" if passage else value.strip()

    def passage(self, record: Mapping[str, Any]) -> str | None:
        """Return the texts under ``passage``, ``context`` and ``hint`` that precede a question."""
        found = [record.get(key) for key in PASSAGES if key not in self.columns.values()]
        return "\n".join(one.strip() for one in found if isinstance(one, str)).strip() or None

    def answers(self, record: Mapping[str, Any], where: str) -> list[Any]:
        """Return the right answers: of ``answers``, else of ``answer``; numbers stay numbers.

        VQAv2's ``[{"answer": ...}]`` is read as a list of texts.
        """
        value = self.get(record, "answers")
        value = self.get(record, "answer") if value is None else value
        listed = as_list(_listed(value))
        plain = [one.get("answer") if isinstance(one, dict) else one for one in listed]
        for one, given in zip(plain, listed, strict=True):
            if isinstance(one, bool) or not isinstance(one, str | int | float):
                raise UsageError(f"{where}: an answer that is no text ({given!r}); write texts")
        return [self._option(one, record, where) for one in plain]

    def options(self, record: Mapping[str, Any], where: str) -> tuple[str, ...]:
        """Return the texts to choose from; none where the record has no options."""
        value = self.get(record, "options")
        if value is None:
            value = _letter_columns(record)
        value = _listed(value)
        if value in (None, "", [], {}):
            return ()
        if isinstance(value, str):
            listed: list[Any] = _split_letters(value, where)
        elif isinstance(value, dict):
            listed = list(_by_label(value).values())
        else:
            listed = value if isinstance(value, list) else [{}]
        if any(not isinstance(one, str | int | float | None) for one in listed):
            raise UsageError(
                f"{where}: options that are no list of texts ({brief(repr(value))}); write one"
            )
        texts = ["" if one is None else str(one).strip() for one in listed]
        while texts and not texts[-1]:
            texts.pop()  # a table has cells for the question with the most options
        if len(texts) < 2 or "" in texts:
            raise UsageError(f"{where}: options {texts}; write at least two, none empty")
        return tuple(texts)

    def _option(self, answer: Any, record: Mapping[str, Any], where: str) -> Any:
        """Return the option that a set's own label names; anything else as it is."""
        value = _listed(self.get(record, "options"))
        if isinstance(value, dict):
            named = _by_label(value)
            return str(answer if answer in named.values() else named.get(str(answer), answer))
        at: Any = value.index(answer) if isinstance(value, list) and answer in value else answer
        if isinstance(answer, int | float) and at != answer and 0 <= answer < len(value):
            raise UsageError(
                f"{where}: the answer {answer} may be an option of {value}, or its place counted "
                "from 0; write the options as texts"
            )
        return answer


def as_list(value: Any) -> list[Any]:
    """Return what a key holds that may hold one or several; nothing where it is empty."""
    return value if isinstance(value, list) else [] if value in (None, "") else [value]


def _by_label(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options by what a set calls each: their keys, or a list beside that of the texts."""
    texts = options.get("text")  # {"text": [...], "label": [...]}, as ARC has it
    if not isinstance(texts, list):
        return dict(options)
    labels = [*map(str, options.get("label") or ())]
    if len({*labels}) != len(texts):
        labels = [*map(_letter, range(len(texts)))]
    return dict(zip(labels, texts, strict=True))


def _listed(value: Any) -> Any:
    """Return the texts of a list that is written as Python writes it, as MMMU and A-OKVQA have."""
    if isinstance(value, str) and value.strip()[:1] == "[":
        try:
            found = ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return value
        if isinstance(found, list) and all(isinstance(one, str) for one in found):
            return found
    return value


def _letter_columns(record: Mapping[str, Any]) -> list[Any] | None:
    """Return the columns A, B, C ... of a table."""
    by_letter = {key.strip().upper(): value for key, value in record.items()}
    found: list[Any] = []
    while (letter := _letter(len(found))) in by_letter and letter <= "Z":
        found.append(by_letter[letter])
    return found if len(found) > 1 else None


def _split_letters(text: str, where: str) -> list[Any]:
    """Return the options of lettered lines; a line with the next letter begins the next."""
    starts: list[re.Match[str]] = []
    for match in _LETTERED.finditer(text):
        if match[1] == _letter(len(starts)):
            starts.append(match)
    if len(starts) < 2 or any(map(str.isalnum, text[: starts[0].start()])):
        raise UsageError(
            f"{where}: options {text[:80]!r} are no lettered lines; write 'A. ...', 'B. ...' on "
            "lines of their own, or a list of texts"
        )
    ends = [match.start() for match in starts[1:]] + [len(text)]
    return [text[match.end() : end] for match, end in zip(starts, ends, strict=True)]


def gold_of(answer: Any, options: Sequence[str], where: str) -> int:
    """Return which option an answer names.

    Text is looked for in this order: an option, an option with its letter ("B. two"), its letter
    ("B", "(b)"), its number from 0, an option whatever the case. A number counts from 0, else it is
    looked for as text.

    Raises:
        UsageError: It names none.
    """
    if isinstance(answer, float) and answer.is_integer():
        answer = int(answer)
    if isinstance(answer, int) and 0 <= answer < len(options):
        return answer
    options, text = list(options), str(answer).strip()
    lettered = _LETTERED.match(text)
    if lettered and _at(lettered[1]) < len(options):
        named = options[_at(lettered[1])]
        if named.strip(_ENDS) == text[lettered.end() :].strip(_ENDS):
            return _at(lettered[1])
    if text in options:
        return options.index(text)
    letter = _LETTER.fullmatch(text.upper())
    if letter and _at(letter[1]) < len(options):
        return _at(letter[1])
    if text.isdecimal() and int(text) < len(options):
        return int(text)
    lowered = [option.lower() for option in options]
    if text.lower() in lowered:
        return lowered.index(text.lower())
    raise UsageError(
        f"{where}: the answer {text!r} is not among the options {options}; write an option, "
        "its letter or its number counted from 0"
    )


def _letter(at: int) -> str:
    return chr(ord("A") + at)


def _at(letter: str) -> int:
    return ord(letter) - ord("A")


def lettered_lines(options: Sequence[str]) -> str:
    """Write options as a prompt shows them: "A. one", "B. two", each on its line."""
    return "\n".join(f"{_letter(at)}. {option}" for at, option in enumerate(options))


def fill_prompt(prompt: str, question: str, options: Sequence[str]) -> str:
    """Return a prompt with ``{question}`` and ``{options}`` replaced; other braces stay as they
    are.
    """
    pieces = {"{question}": question, "{options}": lettered_lines(options)}
    return re.sub(r"\{question\}|\{options\}", lambda match: pieces[match[0]], prompt)
