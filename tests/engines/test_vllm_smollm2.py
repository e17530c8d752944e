"""A real language model with its graft, served: it answers as `mmgraft chat` does."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from mmgraft.demo import assets
from tiny_exports import make_graft
from vllm_engine import image
from vllm_server import Server, running, text, url

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # of vLLM itself

OPTIONS = "--max-model-len 256 --max-num-seqs 4"
NEW = 24


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """SmolLM2 with two inserted layers, and a SigLIP tower made for the test."""
    folder = tmp_path_factory.mktemp("smollm2")
    run = make_graft(folder, tower="siglip", layers=[9, 20], base=assets.smollm2())
    with running({"mm": run}, folder, OPTIONS, "--dtype", "float32") as made:
        yield made


@pytest.mark.parametrize(
    ("model", "seen"), [("mm", 1), ("mm", 2), ("mm", None), ("smollm2-135m-instruct", None)]
)
def test_it_answers_as_chat_does(
    smollm2: Server, tmp_path: Path, cli: Callable[..., Any], model: str, seen: int | None
) -> None:
    question = "What is the capital of France, and what is it known for?"
    line = ["chat", smollm2.runs["mm"], question, "--max-new-tokens", NEW, "--dtype", "float32"]
    content: Any = question
    if seen is not None:
        image(16, seen).save(tmp_path / "a.png")
        line += ["--image", tmp_path / "a.png"]
        content = [url(image(16, seen)), text(question)]
    ran = cli(*map(str, line), "--json")
    status, told = smollm2.ask(model, content, max_tokens=NEW, ignore_eos=False)
    assert status == 200, told
    given = told["choices"][0]["message"]["content"].strip()
    assert given == json.loads(ran.out)["answer"]
    assert ("Paris" in given) == (seen is None), "the graft acts on images alone"
