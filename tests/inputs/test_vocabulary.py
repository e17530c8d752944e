"""A tokenizer with more tokens than the base's embedding has rows."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from refusals import GRAFT, STAGE
from tiny_runs import write_recipe
from tiny_tokenizer import VOCAB_SIZE, tiny_tokenizer

pytestmark = pytest.mark.xdist_group("bad-input")  # one worker makes the parts

FAR = "<|more 399|>"


@pytest.fixture
def run(cli, parts: Path, here: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graft on a base whose tokenizer has 400 tokens too many; the template writes none."""
    base = Path(shutil.copytree(parts / "base", tmp_path_factory.mktemp("far") / "base"))
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens([f"<|more {number}|>" for number in range(400)], special_tokens=True)
    tokenizer.save_pretrained(base)
    made = cli("graft", base, *GRAFT, "--vision", parts / "tower", "--out", "run")
    assert made.code == 0, made.err
    write_recipe(here / "run", parts, "iaa", [{**STAGE, "text_rows": "graft"}])
    return here / "run"


def rows(here: Path, word: str) -> Path:
    """Two rows, of which the second says the word."""
    lines = []
    for text in ("hello", f"say {word}"):
        turns = [{"role": "user", "content": text}, {"role": "assistant", "content": "yes"}]
        lines.append(json.dumps({"messages": turns, "text": text}))
    (here / "rows.jsonl").write_text("\n".join(lines) + "\n")
    return here / "rows.jsonl"


COMMANDS = {
    "train": ["train", "RUN", "--data", "ROWS"],
    "generate": ["generate", "RUN", "ROWS", "--out", "out.jsonl"],
    "eval": ["eval", "RUN", "--text", "--data", "ROWS", "--metric", "perplexity"],
    "preview": ["data", "preview", "ROWS", "--run", "RUN", "--row", "2"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_a_text_with_such_a_token_is_named(cli, run, here, command) -> None:
    names = {"RUN": run, "ROWS": rows(here, FAR)}
    ran = cli(*(names.get(word, word) for word in COMMANDS[command]))
    said = ran.err + ran.out
    assert ran.code == 2, said
    assert "Traceback" not in said
    assert f"({FAR}) is past the base's embedding of {VOCAB_SIZE} rows" in said
    assert ("rows.jsonl, line 2" if command != "eval" else f"'say {FAR}'") in said


def test_so_is_a_question_in_chat(refused, run) -> None:
    assert FAR in refused("chat", run, f"what is {FAR}?")


def test_texts_without_one_are_answered_and_checked(cli, run, here) -> None:
    assert cli("chat", run, "hello", "--max-new-tokens", "2").code == 0
    assert cli("data", "check", rows(here, "hi"), "--run", run).code == 0
    found = cli("data", "check", rows(here, FAR), "--run", run)
    assert found.code == 2
    assert "line 2" in found.out
