"""The second method of docs/adding-a-method.md, which uses every door, through all of mmgraft.

Its code is taken from the page and found by its entry point, as an installed package's is.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import wraps
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from decoding import worst
from grafting import (
    batch,
    distance,
    graft_on,
    logits_of,
    own,
    perturb,
    plain,
    rows,
    text_labels,
    text_of,
    together,
)
from mmgraft import GraftedModel
from mmgraft.cli.app import run as mmgraft
from mmgraft.errors import UsageError
from mmgraft.evaluation.generate.answers import answer
from mmgraft.evaluation.vision import blind_workflow
from mmgraft.grafts.base import Pass
from mmgraft.grafts.method import Promises
from mmgraft.grafts.registry import METHODS, get_method
from mmgraft.model import modeling
from mmgraft.training.trainer import GraftTrainer
from same_run import same
from tiny_exports import ROUNDING
from tiny_runs import losses, make_parts

DOCS = Path(__file__).resolve().parents[2] / "docs"
sys.path.insert(0, str(DOCS))

from console import prepare, read_blocks  # noqa: E402

PACKAGE = "mmgraft_adapter"
OPTIONS_OF = "mmgraft.cli.graft"  # made from the methods found when it is imported
OPTIONS = ["--layers", "1,3", "--rank", 4, "--tied", "--max-length", 128, "--norm"]
MIXED = ("tttttttttt", "ttiiiitttttt")  # a row of text first


@pytest.fixture(scope="module", autouse=True)
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's package, as a distribution that Python finds."""
    folder = tmp_path_factory.mktemp("package")
    blocks = read_blocks((DOCS / "adding-a-method.md").read_text(encoding="utf-8"))
    files = [block for block in blocks if "file" in block.options]
    prepare("\n".join(f"```x file={b.options['file']}\n{b.text}```" for b in files), folder)
    sys.path.insert(0, str(folder))
    sys.modules.pop(OPTIONS_OF, None)
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]
    sys.modules.pop(OPTIONS_OF, None)


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_parts(tmp_path_factory.mktemp("parts"))


@pytest.fixture(scope="module")
def fresh(parts: Path) -> Path:
    """A new graft, made by the command line with the method's own options."""
    torch.manual_seed(0)
    command = ["graft", parts / "base", "--method", "recall", "--vision", parts / "tower"]
    more = ["--projector-norm", "--out", parts / "fresh"]
    assert mmgraft([str(word) for word in [*command, *OPTIONS, *more]]) == 0
    return parts / "fresh"


def train(run: Path, parts: Path, *more: str) -> int:
    data = [] if more else ["--data", parts / "rows.jsonl", "--images", parts / "images"]
    steps = [] if more else ["--max-steps", 3]
    return mmgraft([str(word) for word in ["train", run, *data, *steps, "--device", "cpu", *more]])


@pytest.fixture(scope="module")
def trained(fresh: Path, parts: Path) -> Path:
    run = Path(shutil.copytree(fresh, parts / "run"))
    assert train(run, parts) == 0
    return run


@pytest.fixture(scope="module")
def moved(trained: Path, parts: Path) -> Path:
    """The trained graft with every tensor moved, as if it were trained for long."""
    run = Path(shutil.copytree(trained, parts / "moved"))
    perturb(GraftedModel.from_pretrained(run), size=0.3).save_pretrained(run)
    return run


def recall(**settings: Any) -> GraftedModel:
    config = get_method("recall").config_class(layers=[1, 3], rank=4, **settings)
    return perturb(graft_on("llama", config), size=0.3)


def test_it_is_listed_and_its_options_are_shown(cli) -> None:
    (line,) = [line for line in cli("methods").out.splitlines() if line.startswith("recall ")]
    assert line.endswith("mmgraft-adapter")
    assert "--tied" in cli("graft", "--help").out


def test_what_it_refuses_is_refused(cli, parts: Path, tmp_path: Path) -> None:
    graft = ["graft", parts / "base", "--method", "recall", "--vision", parts / "tower"]
    ran = cli(*graft, "--set", "rnak=3", "--out", tmp_path / "a")
    assert (ran.code, "did you mean 'rank'" in ran.err) == (2, True)
    assert cli(*graft, "--layers", "7", "--out", tmp_path / "a").code == 2
    method = get_method("recall")
    anatomy = graft_on("llama", method.config_class()).anatomy
    assert method.refuses(anatomy) is None
    narrow = replace(anatomy, embedding_size=8)
    assert "another width" in str(method.refuses(narrow))


def test_its_parts_and_promises_are_shown(cli, fresh: Path, parts: Path, tmp_path: Path) -> None:
    shown = json.loads(cli("inspect", fresh, "--json").out)
    names = {part["part"] for part in shown["parts"]}
    assert names == {"memory", "readers", "extra layer", "norm", "projector"}
    assert shown["lacks"] == {}
    assert cli("graft", parts / "base", "--method", "recall", "--vision", parts / "tower",
               "--weight", 0.5, "--out", tmp_path / "heavy").code == 0  # fmt: skip
    (why,) = json.loads(cli("inspect", tmp_path / "heavy", "--json").out)["lacks"].values()
    assert why == "the extra layer begins with the weight 0.5"


def change(run: Path, stage: int, **keys: Any) -> None:
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    recipe["stages"][stage].update(keys)
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe))


@pytest.mark.parametrize(
    ("keys", "why"),
    [
        ({"train": ["projector", "extra"]}, "extra_layer: false leaves it out of the path"),
        ({"extra_layers": False}, "did you mean 'extra_layer'"),
        ({"train": ["reader"]}, "readers"),
    ],
)
def test_a_stage_that_does_not_fit_is_refused(
    cli, fresh: Path, parts: Path, tmp_path: Path, keys: dict[str, Any], why: str
) -> None:
    run = Path(shutil.copytree(fresh, tmp_path / "run"))
    change(run, 0, **keys)
    ran = cli("train", run, "--data", parts / "rows.jsonl", "--images", parts / "images")
    assert ran.code == 2
    assert why in ran.err


def test_a_graft_refuses_a_switch_of_what_it_lacks() -> None:
    graft = recall(extra_layer=False).workflow().graft
    with pytest.raises(UsageError, match="this graft has none"):
        graft.switch(get_method("recall").stage(extra_layer=True))


def test_two_stages_train_what_they_name(fresh: Path, trained: Path) -> None:
    assert [(stage, step) for stage, step, _ in losses(trained)] == [
        (stage, step) for stage in ("read", "deepen") for step in (1, 2, 3)
    ]
    before, after = (load_file(run / "graft.safetensors") for run in (fresh, trained))
    assert "graft.memory.value.weight" not in after
    assert before.keys() == after.keys()
    alike = {name for name in after if torch.equal(before[name], after[name])}
    assert not any(name.startswith(("graft.readers", "graft.memory.key")) for name in alike)
    record = json.loads((trained / "graft_config.json").read_text())
    assert record["state"] == {"active": True, "extra_layer": True}


@pytest.mark.parametrize("step", [2, 5])
def test_a_stopped_run_goes_on_to_the_bit(
    fresh: Path,
    parts: Path,
    trained: Path,
    tmp_path: Path,
    step: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run, steps = Path(shutil.copytree(fresh, tmp_path / "run")), [0]
    original = GraftTrainer.compute_loss

    def compute_loss(self: GraftTrainer, *args: Any, **kwargs: Any) -> Any:
        steps[0] += 1
        if steps[0] == step:
            os.kill(os.getpid(), signal.SIGINT)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(GraftTrainer, "compute_loss", compute_loss)
    assert train(run, parts) == 130
    assert len(losses(run)) == step
    torch.manual_seed(4321)  # what a new process has drawn must not matter
    assert train(run, parts, "--resume") == 0
    same(run, trained)


def test_a_stages_switch_takes_the_layer_out_of_the_path() -> None:
    model = recall()
    graft, stage = model.workflow().graft, get_method("recall").stage
    inputs = batch(rows("ttiiiitttttt"))
    deep = logits_of(model, inputs)
    graft.switch(stage(extra_layer=False))
    without = logits_of(model, inputs)
    assert distance(deep, without) > 1e-2
    with torch.no_grad():
        graft.extra_weight.zero_()
    graft.switch(stage())
    assert graft.state()["extra_layer"] is True
    assert distance(logits_of(model, inputs), without) < 1e-5


def test_a_saved_graft_loads_as_it_is(moved: Path, tmp_path: Path) -> None:
    model = GraftedModel.from_pretrained(moved)
    memory = model.workflow().graft.memory
    assert memory.value.weight is memory.key.weight
    model.workflow().graft.set_state({"extra_layer": False})
    model.save_pretrained(tmp_path / "again")
    again = GraftedModel.from_pretrained(tmp_path / "again")
    assert again.workflow().graft.runs_extra is False
    memory = again.workflow().graft.memory
    assert memory.value.weight is memory.key.weight
    inputs = model.processor()(question("0.png", moved.parent))
    assert torch.equal(logits_of(model, inputs), logits_of(again, inputs))


def question(name: str, parts: Path) -> list[dict[str, Any]]:
    image = {"type": "image", "image": str(parts / "images" / name)}
    return [{"role": "user", "content": [image, {"type": "text", "text": "which colour?"}]}]


def test_generation_is_the_same_without_a_cache(moved: Path, parts: Path) -> None:
    model = GraftedModel.from_pretrained(moved)
    inputs = model.processor()([question("0.png", parts), question("1.png", parts)])
    asked = {**inputs, "max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    cached = model.generate(**asked)
    assert torch.equal(cached, model.generate(**asked, use_cache=False))
    beams = model.generate(**asked, num_beams=3)
    assert torch.equal(beams, model.generate(**asked, num_beams=3, use_cache=False))
    seen = logits_of(model, inputs)
    model.workflow().graft.active = False
    assert distance(seen, logits_of(model, inputs)) > 1e-2


def test_chunks_and_padding_are_the_full_forward() -> None:
    model = recall(tied=True, norm=True)
    words = ("ttiiiitttiiiittt", "ttttiiiittttttttttt", "ttttttttttttt")
    assert worst(model, batch(rows(*words), side="left")) < 1e-4


@pytest.fixture
def promising(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the package's method break promises, each with its reason."""

    def put(**reasons: str) -> None:
        made = replace(get_method("recall"), promises=lambda config: Promises(**reasons))
        monkeypatch.setitem(METHODS.known, "recall", made)

    return put


def test_without_a_cache_all_is_computed_again(
    promising: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = {**batch(rows("ttiiiitttt")), "max_new_tokens": 4, "do_sample": False}
    cached = recall().generate(**inputs)
    promising(cache="the memory is read whole")
    seen: list[bool] = []
    forward, model = GraftedModel.forward, recall()

    @wraps(forward)
    def spy(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(bool(kwargs.get("use_cache")))
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(GraftedModel, "forward", spy)
    assert torch.equal(model.generate(**inputs), cached)
    assert len(seen) == 4
    assert not any(seen)
    assert model(**batch(rows("ttiiiitt"))).past_key_values is None


def test_rows_that_may_not_be_padded_are_answered_by_length(
    promising: Callable[..., None], moved: Path, parts: Path
) -> None:
    short, long = question("0.png", parts), question("1.png", parts)
    long[0]["content"][1]["text"] += " now, and then?"
    sizes: list[int] = []

    def note(indices: Any, texts: Any) -> None:
        sizes.append(len(indices))

    for _ in range(2):
        model = GraftedModel.from_pretrained(moved)
        answer(model, model.processor(), [short, long], max_new_tokens=1, on_result=note)
        promising(padding="positions count from the left")
    assert sizes == [2, 1, 1]


def test_a_question_without_its_image_runs_text_where_nothing_is_promised(
    promising: Callable[..., None],
) -> None:
    assert blind_workflow(recall(), "mm") == "mm"
    promising(no_image="a memory without images is empty")
    assert blind_workflow(recall(), "mm") == "text"


def test_what_is_not_trained_is_refused_with_the_methods_reason(
    cli, promising: Callable[..., None], fresh: Path, parts: Path
) -> None:
    promising(training="it is a table")
    with pytest.raises(UsageError, match="recall is not trained: it is a table"):
        recall().set_trainable(["graft"])
    ran = cli("train", fresh, "--data", parts / "rows.jsonl", "--images", parts / "images")
    assert (ran.code, "recall is not trained: it is a table" in ran.err) == (2, True)
    promising(neighbours="rows share a memory", causal="it reads all tokens", text="as the others")
    lacks = json.loads(cli("inspect", fresh, "--json").out)["lacks"]
    assert list(lacks.values()) == ["as the others", "rows share a memory", "it reads all tokens"]


def test_rows_of_text_are_the_bases_and_mind_no_neighbours() -> None:
    model = recall(norm=True)
    mixed = batch(rows(*MIXED))
    text, image = own(logits_of(model, mixed), mixed)
    alone = batch(rows(*MIXED)[:1])
    assert torch.equal(logits_of(model, alone), logits_of(plain("llama"), text_of(alone)))
    assert distance(text, logits_of(model, alone)[0]) < 1e-5
    assert distance(image, logits_of(model, batch(rows(*MIXED)[1:]))[0]) < 1e-5


def test_two_workflows_of_the_method_share_a_batch() -> None:
    one, other = recall(), graft_on("llama", recall().workflow().graft.config, workflow="other")
    perturb(other, size=0.3, seed=2)
    inputs = batch(rows("ttiiiitt", "iiiitttt"))
    mixed = logits_of(together(one, other), inputs, workflow=["mm", "other"])
    alone = [logits_of(model, batch(rows("ttiiiitt", "iiiitttt"))) for model in (one, other)]
    assert distance(mixed[0], alone[0][0]) < 1e-5
    assert distance(mixed[1], alone[1][1]) < 1e-5


@pytest.mark.parametrize("extra_layer", [True, False])
def test_a_mixed_batch_trains_as_the_slow_way(
    extra_layer: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = recall(extra_layer=extra_layer)
    model.set_trainable(["projector", "graft"])
    model.train()

    def step() -> dict[str, torch.Tensor]:
        inputs = batch(rows(*MIXED))
        model.zero_grad()
        loss = model(**inputs, labels=text_labels(inputs)).loss
        loss.backward()
        grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        return {"loss": loss.detach(), **grads}

    found = step()
    monkeypatch.setattr(modeling, "fed_at", lambda layer, wanted: nullcontext())
    slow = step()
    model.gradient_checkpointing_enable()
    for wanted in (slow, step()):
        assert found.keys() == wanted.keys()
        for name in wanted:
            torch.testing.assert_close(found[name], wanted[name], atol=1e-6, rtol=1e-4, msg=name)


def test_a_row_that_is_too_long_is_refused() -> None:
    model = recall(max_length=8)
    logits_of(model, batch(rows("ttiiiitt")))
    with pytest.raises(UsageError, match=r"knows 8.*--max-length"):
        logits_of(model, batch(rows("ttiiiittt")))


def test_a_graft_in_fp32_begins_on_a_base_in_half_precision() -> None:
    model = graft_on("llama", get_method("recall").config_class(rank=4), dtype=torch.bfloat16)
    model.workflows.float()
    assert logits_of(model, batch(rows("ttiiiitt"))).isfinite().all()


def test_what_begins_a_pass_goes_with_it_to_another_device() -> None:
    some = torch.zeros(1, 2)
    state = Pass(None, some[..., None], some, some, some, some, 0)  # type: ignore[arg-type]
    state.shared["recall"] = (some, some)
    moved = state.on(torch.device("meta"))
    assert [tensor.device.type for tensor in moved.shared["recall"]] == ["meta", "meta"]
    assert state.on(torch.device("meta")) is moved


def test_it_is_evaluated(cli, moved: Path, parts: Path, tmp_path: Path) -> None:
    items = [
        {"id": str(n), "image": f"{n}.png", "question": "which colour?", "answer": "red",
         "options": ["red", "green"]}
        for n in (0, 1)
    ]  # fmt: skip
    seen = tmp_path / "seen.jsonl"
    seen.write_text("".join(json.dumps(item) + "\n" for item in items))
    shown = {"path": str(seen), "images": str(parts / "images"), "max_new_tokens": 2}
    sets = [
        {"name": "exact", "metric": "exact", **shown},
        {"name": "choice", "metric": "choice", **shown},
    ]
    (tmp_path / "sets.yaml").write_text(yaml.safe_dump({"evaluation": sets}))
    ran = cli("eval", moved, "--text", "--vision", "--sets", tmp_path / "sets.yaml")
    assert ran.code == 0, ran.err
    results = {
        name: json.loads((moved / "results" / f"{name}.json").read_text())
        for name in ("text", "vision")
    }
    assert results["text"]["identity"]["identical"] is True
    assert [one["name"] for one in results["vision"]["sets"]] == ["exact", "choice"]
    assert all("no_image" in one["blind"] for one in results["vision"]["sets"])


def test_what_it_looks_at_is_measured(cli, moved: Path, parts: Path, tmp_path: Path) -> None:
    rows = ["laws", moved, parts / "rows.jsonl", "--images", parts / "images"]
    ran = cli(*rows, "--limit", 2, "--out", tmp_path / "laws", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["details"]["rows"]["samples"] == 2


@pytest.mark.parametrize("kind", ["graft", "full"])
def test_it_is_exported(cli, moved: Path, parts: Path, tmp_path: Path, kind: str) -> None:
    out = tmp_path / kind
    ran = cli("export", moved, "--to", kind, "--out", out)
    assert ran.code == 0, ran.err
    card = (out / "README.md").read_text()
    assert "extra layer" in card
    assert "recall" in card
    model, there = GraftedModel.from_pretrained(moved), GraftedModel.from_pretrained(out)
    inputs = model.processor()(question("1.png", parts))
    assert torch.equal(logits_of(model, inputs), logits_of(there, inputs))


def test_llava_has_no_memory_but_takes_the_projector_alone(
    cli: Callable[..., Any], parts: Path, moved: Path, tmp_path: Path
) -> None:
    ran = cli("export", moved, "--to", "llava", "--out", tmp_path / "llava")
    assert ran.code == 2
    assert "recall reads a memory of the images" in ran.err
    assert not (tmp_path / "llava").exists()
    graft = ["graft", parts / "base", "--method", "recall", "--vision", parts / "tower"]
    assert cli(*graft, "--out", tmp_path / "alone").code == 0
    model = GraftedModel.from_pretrained(tmp_path / "alone")
    model.workflow().graft.set_state({"active": False})
    model.save_pretrained(tmp_path / "alone")
    ran = cli("export", tmp_path / "alone", "--to", "llava", "--out", tmp_path / "llava")
    assert ran.code == 0, ran.err
    assert float(ran.out.split("largest difference ")[1].split()[0]) < ROUNDING
