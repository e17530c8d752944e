"""The page docs/architectures.md, from the verdicts of a sweep."""

from __future__ import annotations

import re
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import transformers

METHODS = ("iaa", "wings", "llava", "lora", "expert", "xattn")
HEAD = """# Every causal LM

mmgraft has no table of models: it examines what it gets. This page says what came of it for each
type that transformers {version} can load as a causal LM, as `python -m tests.sweep` found on
{day}.

Each type is built small and random from its default configuration (up to 4 layers, one of every
kind that the configuration tells apart) and saved. Then everything goes as for a user: `inspect`,
`graft` from the files, loading, and noise on every tensor of the graft. **works** means that all of
this holds:

- a batch of text gives the base's logits bit for bit, before and after a training step;
- decoding from a cache (token by token, in chunks, padded on the left) gives what the full forward
  gives, and so does `generate` on a padded batch;
- no position sees a later one;
- a row depends neither on its neighbours nor on padding, on either side;
- a saved graft loads to the same logits;
- the loss is that of the logits, and a training step moves the graft alone.

**refused** means that `inspect` and `graft` say why, with exit code 2, before anything is written.
Layers that cannot carry a graft are refused one by one; a type works here if the others do. Of an
encoder with a decoder it is the decoder alone, as it is saved by itself; the checkpoint of both is
refused. What fails is judged again with other random weights, for rounding sends a token to another
expert once in a while. The reasons stand [below](#reasons).

{counts}

| type | {methods} |
|---|{lines}|
{rows}
## Reasons

What does not work is said once for the methods that it holds for, with the numbers of the first.
"Off by" is the largest difference of a logit, and the largest logit, of a small random copy.

{reasons}
"""


def word_of(found: dict[str, str] | None) -> str:
    if found is None:
        return "not judged"
    return "fails" if "fails" in found else next(iter(found))


def reasons(kind: str, verdict: dict[str, Any]) -> list[str]:
    """Return a line for each reason that keeps a type from some methods."""
    methods: dict[str, list[str]] = {}
    texts: dict[str, str] = {}
    judged = [name for name in METHODS if name in verdict]
    for name in judged:
        word = word_of(verdict[name])
        if word == "works":
            continue
        text = re.sub(r"^method \S+ cannot be used on this base: ", "", verdict[name][word])
        text = re.sub(r" ?Methods that can: .*$|; give a text model that .*$", "", text).rstrip(".")
        text = re.sub(r"\(a small random copy of \w+ was tried: (.*)\)$", r"(\1)", text)
        key = word + re.sub(r"[\d.e-]+|(?<=for the router of )\w+", "", text)
        methods.setdefault(key, []).append(name)
        texts.setdefault(key, text if word == "refused" else f"{word}: {text}")
    return [
        f"- `{kind}`, {'all methods' if names == judged else ', '.join(names)}: {texts[key]}"
        for key, names in methods.items()
    ]


def verdict_of(verdict: dict[str, Any]) -> str:
    words = [word_of(verdict[name]) for name in METHODS if name in verdict]
    if "fails" in words:
        return "fails"
    if set(words) == {"works"}:
        left = len(METHODS) - len(words)
        return f"works with all methods{f', {left} not judged' if left else ''}"
    return "refused with all" if "works" not in words else "works with some, refused with others"


def counts(known: dict[str, dict[str, Any]], every: list[str]) -> str:
    """Return a table of how many types have which verdict."""
    found = Counter(verdict_of(known[kind]) if kind in known else "not judged" for kind in every)
    lines = [f"| {word} | {number} |" for word, number in found.most_common()]
    return "\n".join(["| verdict | types |", "|---|---|", *lines])


def write_page(path: Path, known: dict[str, dict[str, Any]], every: list[str]) -> None:
    """Write the page."""
    rows, why = [], []
    for kind in every:
        if kind in known:
            words = [word_of(known[kind].get(name)) for name in METHODS]
            rows.append(f"| `{kind}` | {' | '.join(words)} |\n")
            why += reasons(kind, known[kind])
    text = HEAD.format(
        version=transformers.__version__,
        day=datetime.now(UTC).strftime("%-d %B %Y"),
        counts=counts(known, every),
        methods=" | ".join(METHODS),
        lines="|".join(["---"] * len(METHODS)),
        rows="".join(rows),
        reasons="\n".join(why),
    )
    path.write_text(text, encoding="utf-8")
