"""The page docs/architectures.md, from the verdicts of a sweep."""

from __future__ import annotations

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
expert once in a while.

{counts}

| type | {methods} |
|---|{lines}|
"""


def cell(found: dict[str, str] | None) -> str:
    if found is None:
        return "not judged"
    word = "fails" if "fails" in found else next(iter(found))
    return "works" if word == "works" else f"{word}: {found[word]}".replace("|", "\\|")


def verdict_of(verdict: dict[str, Any]) -> str:
    words = [
        "fails" if "fails" in verdict[name] else next(iter(verdict[name]))
        for name in METHODS
        if name in verdict
    ]
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
    day = datetime.now(UTC).strftime("%-d %B %Y")
    text = HEAD.format(
        version=transformers.__version__,
        day=day,
        counts=counts(known, every),
        methods=" | ".join(METHODS),
        lines="|".join(["---"] * len(METHODS)),
    )
    for kind in every:
        if kind in known:
            cells = [cell(known[kind].get(name)) for name in METHODS]
            if len(set(cells)) == 1 and cells[0] != "works":
                cells[1:] = ["the same"] * (len(cells) - 1)
            text += f"| `{kind}` | {' | '.join(cells)} |\n"
    path.write_text(text, encoding="utf-8")
