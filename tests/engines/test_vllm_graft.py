"""Several workflows and their base in one vLLM engine: each row is what it is alone."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest
from vllm import LLM

from mmgraft.export.vllm import export_vllm
from mmgraft_vllm.layers import BaseDecoder
from tiny_exports import change_record, make_base, make_graft
from vllm_engine import SIZES, Graft, Messages, answers, engine, for_vllm, greedy, image

pytestmark = pytest.mark.filterwarnings("ignore:.*reduce_op:FutureWarning")  # of vLLM itself

ARCH = "qwen3"
WORKFLOWS: dict[str, dict[str, Any]] = {
    "c": {"layers": [0, 2, 3]},
    "b": {"layers": [1, 3], "structure": "b", "head": False},
    "a": {"layers": [0, 1, 3], "structure": "a", "gate": "scalar", "embedding": False},
    "p": {"method": "llava"},
}
LONG = "Answer in one word, and do not say why you think that it is so: the shorter the better."
FILLER = 92
"""Positions of a conversation with one image."""
STEPS = {"max_num_batched_tokens": 64}  # prompts come in chunks
TEXT: Messages = [{"role": "system", "content": LONG}, {"role": "user", "content": "One, two?"}]


def look(seed: int = 0, *more: int, text: str = "What is it?") -> Messages:
    images = [{"type": "image", "image": image(16, one)} for one in (seed, *more)]
    content = [*images, {"type": "text", "text": text}]
    return [{"role": "system", "content": LONG}, {"role": "user", "content": content}]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    make_base(folder, ARCH, **SIZES)
    found = {
        name: make_graft(folder, ARCH, name=name, **config) for name, config in WORKFLOWS.items()
    }
    for name, run in found.items():
        change_record(run, workflow=name)
    return found


@pytest.fixture(scope="module")
def base_alone(runs: dict[str, Path]) -> dict[str, Any]:
    """Answers of the base served by itself, without the plugin's model."""
    with engine(runs["c"].parent / ARCH, **STEPS) as llm:
        found = {"alone": run(llm, [(None, TEXT)])}
        assert llm.reset_prefix_cache()
        filler: Any = {"prompt_token_ids": [5 + n % 200 for n in range(FILLER)]}
        both: Any = [prompt(llm, None, TEXT), filler]
        found["beside"] = answers(llm.generate(both, greedy(), use_tqdm=False)[:1])
        return found


@pytest.fixture(scope="module")
def llm(
    runs: dict[str, Path], base_alone: Any, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LLM]:
    folder = tmp_path_factory.mktemp("vllm") / "out"
    export_vllm(list(runs.values()), folder)
    with engine(folder, **STEPS, num_gpu_blocks_override=24, disable_log_stats=False) as made:
        yield made


def prompt(llm: LLM, name: str | None, row: Messages) -> dict[str, Any]:
    """A name that ends with `!` asks for its workflow in any case."""
    images = [part["image"] for turn in row for part in turn["content"] if "image" in part]
    ids = llm.get_tokenizer().apply_chat_template(row, add_generation_prompt=True)["input_ids"]
    asked: dict[str, Any] = {"workflow": name and name.rstrip("!")}
    asked |= {"always": True} if name and name.endswith("!") else {}
    made: dict[str, Any] = {"prompt_token_ids": ids, "mm_processor_kwargs": asked}
    return {**made, "multi_modal_data": {"image": images}} if images else made


def run(llm: LLM, rows: list[tuple[str | None, Messages]], **options: Any) -> list[Any]:
    """Answer rows of any workflows in one batch."""
    given: Any = [prompt(llm, name, row) for name, row in rows]
    return answers(llm.generate(given, greedy(**options), use_tqdm=False))


def alone(llm: LLM, rows: list[tuple[str | None, Messages]], **options: Any) -> list[Any]:
    """Answer each by itself, with nothing in the cache."""
    found = []
    for row in rows:
        assert llm.reset_prefix_cache()
        found += run(llm, [row], **options)
    assert llm.reset_prefix_cache()
    return found


def close(mine: Any, its: Any, within: float = 2e-5) -> None:
    assert mine[0] == its[0]
    assert mine[1] == pytest.approx(its[1], abs=within)


@pytest.mark.parametrize("name", WORKFLOWS)
@pytest.mark.parametrize("row", [look(1), look(2, 3)], ids=["one image", "two images"])
def test_an_image_row_is_what_generate_gives(
    llm: LLM, runs: dict[str, Path], name: str, row: Messages
) -> None:
    (mine,) = llm.chat(
        for_vllm(row), greedy(), mm_processor_kwargs={"workflow": name}, use_tqdm=False
    )
    close(answers([mine])[0], Graft(runs[name]).answer(row))


@pytest.mark.parametrize("name", [None, "c", "a"])
def test_text_is_the_bases_bit_for_bit(
    llm: LLM, base_alone: dict[str, Any], name: str | None
) -> None:
    """Whatever workflow it asks for."""
    assert llm.reset_prefix_cache()
    assert run(llm, [(name, TEXT)]) == base_alone["alone"]


@pytest.mark.parametrize("name", WORKFLOWS)
def test_text_beside_an_image_is_the_bases_bit_for_bit(
    llm: LLM, base_alone: dict[str, Any], name: str
) -> None:
    """In a batch of the shape in which the base answered it: one id stands for four positions."""
    assert llm.reset_prefix_cache()
    assert len(prompt(llm, name, look(1))["prompt_token_ids"]) + 3 == FILLER
    assert run(llm, [(None, TEXT), (name, look(1))])[:1] == base_alone["beside"]


def test_rows_of_all_workflows_and_text_in_one_batch(llm: LLM) -> None:
    rows: list[tuple[str | None, Messages]] = [(name, look(4)) for name in WORKFLOWS]
    rows[2:2] = [(None, TEXT)]
    each = alone(llm, rows)
    for mine, its in zip(run(llm, rows), each, strict=True):
        close(mine, its)
    assert len({tuple(ids) for ids, _ in each}) == len(rows), "workflows differ"


@pytest.mark.parametrize("name", WORKFLOWS)
@pytest.mark.parametrize("row", [TEXT, [*TEXT, *TEXT[1:]]], ids=["one turn", "two turns"])
def test_a_workflow_asked_for_without_an_image_is_what_generate_gives(
    llm: LLM, runs: dict[str, Path], name: str, row: Messages
) -> None:
    asked = {"workflow": name, "always": True}
    (mine,) = llm.chat(row, greedy(), mm_processor_kwargs=asked, use_tqdm=False)
    close(answers([mine])[0], Graft(runs[name]).answer(row, workflow=name))


def test_an_unknown_workflow_is_refused_without_an_image_too(llm: LLM) -> None:
    with pytest.raises(
        ValueError, match="'boxes' is no workflow, and sees no images; workflows: c, b, a, p"
    ):
        run(llm, [("boxes!", TEXT)])


def test_a_step_runs_the_layers_of_its_workflows_alone(
    llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Text runs the base's decoder, and a workflow's rows nothing of another's."""
    model = llm.llm_engine.model_executor.driver_worker.worker.model_runner.model
    base, layers = [], set()
    before = BaseDecoder.forward

    def counted(self: Any, *given: Any) -> Any:
        base.append(self)
        return before(self, *given)

    monkeypatch.setattr(BaseDecoder, "forward", counted)
    hooks = [
        layer.self_attn.register_forward_hook(lambda *_, place=place: layers.add(place))
        for place, layer in enumerate(model.language_model.model.layers)
    ]
    inserted = {one["name"]: {at for _, at in one["layers"]} for one in model.entries}
    own = set(range(len(hooks))) - set().union(*inserted.values())
    try:
        for names in ((None,), ("c",), ("a", None), ("b!", "p")):
            assert llm.reset_prefix_cache()
            base.clear()
            layers.clear()
            rows = [(name, look(9) if name in ("c", "a", "p") else TEXT) for name in names]
            run(llm, rows)
            wanted = own.union(*(inserted[name.rstrip("!")] for name in names if name))
            assert layers == wanted
            assert bool(base) == (None in names)  # a prompt of text may end in a step of its own
    finally:
        for hook in hooks:
            hook.remove()


ORDERS = [*permutations("cpt"), *permutations(["t", "c", "c!"]), *permutations(["t", "a!", "b!"])]


@pytest.mark.parametrize("order", ORDERS, ids=",".join)
def test_no_workflow_reads_anothers_prefix(llm: LLM, order: tuple[str, ...]) -> None:
    """They share their first tokens, and two of them their image or all of the prompt.

    Where text comes first, its steps leave the inserted layers out, whose blocks are unwritten.
    """
    rows: list[tuple[str | None, Messages]] = [
        (None, TEXT) if name == "t" else (name, TEXT if "!" in name else look(5)) for name in order
    ]
    each = alone(llm, rows)
    for _ in range(2):  # the second time from the cache
        for row, its in zip(rows, each, strict=True):
            close(run(llm, [row])[0], its)


@pytest.mark.parametrize("name", [None, "c", "c!"])
def test_the_cache_is_used(llm: LLM, name: str | None) -> None:
    """Also where it covers all of an image."""
    row, other = TEXT, [*TEXT, *TEXT[1:]]
    if name == "c":
        row, other = look(6, text=f"{LONG} What?"), look(6, text=f"{LONG} And where?")
    (alike,) = alone(llm, [(name, other)])
    run(llm, [(name, row)])
    given: Any = prompt(llm, name, other)
    (made,) = llm.generate(given, greedy(), use_tqdm=False)
    assert made.num_cached_tokens >= (128 if name == "c" else 32)
    close(answers([made])[0], alike)


def test_preempted_rows_are_what_they_are_alone(llm: LLM) -> None:
    rows: list[tuple[str | None, Messages]] = [
        (name, look(seed)) for seed in (7, 8) for name in ("c", "a", "b")
    ]
    rows += [(None, TEXT), (None, [*TEXT, *TEXT[1:]]), ("c!", TEXT), ("b!", TEXT)]
    each, before = alone(llm, rows, max_tokens=60), preemptions(llm)
    for mine, its in zip(run(llm, rows, max_tokens=60), each, strict=True):
        close(mine, its, 1e-4)
    assert preemptions(llm) > before


def preemptions(llm: LLM) -> int:
    return sum(one.value for one in llm.get_metrics() if one.name == "vllm:num_preemptions")


def test_an_unknown_workflow_and_the_bases_name_take_no_image(llm: LLM) -> None:
    for name in ("boxes", ARCH):
        with pytest.raises(
            ValueError, match=f"'{name}' is no workflow, and sees no images; workflows: c, b, a, p"
        ):
            run(llm, [(name, look(9))])
