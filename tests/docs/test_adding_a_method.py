"""The method that docs/adding-a-method.md builds, taken from the page and held to the house's laws.

That its commands print what the page shows is tested with all pages (test_console_blocks.py).
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mmgraft import GraftedModel, UsageError
from mmgraft.grafts.registry import get_method
from mmgraft.recipes.source import load_recipe
from mmgraft.training.stages import open_stage
from mmgraft.vision.spec import VisionSpec
from tiny import ARCHITECTURES, save_base, tiny_clip_dir, tiny_model

DOCS = Path(__file__).resolve().parents[2] / "docs"
sys.path.insert(0, str(DOCS))

from console import prepare, read_blocks  # noqa: E402

PAGE = (DOCS / "adding-a-method.md").read_text(encoding="utf-8")
PACKAGE = "mmgraft_adapter"


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The page's package, as a distribution that Python finds."""
    folder = tmp_path_factory.mktemp("adapter")
    only_files = "\n".join(
        f"```{block.language} file={block.options['file']}\n{block.text}```"
        for block in read_blocks(PAGE)
        if "file" in block.options
    )
    prepare(only_files, folder)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == PACKAGE]:
        del sys.modules[name]


def test_it_is_found_by_its_entry_point(installed: Path) -> None:
    method = get_method("adapter")
    assert method.origin == "mmgraft-adapter"
    assert method.load_graft().__name__ == "AdapterGraft"


def test_finding_it_imports_no_torch(installed: Path) -> None:
    code = (
        "import sys; from mmgraft.grafts.registry import get_method\n"
        "get_method('adapter').config_class(rank=2)\n"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=installed)


def graft(base: object, vision: object = None) -> GraftedModel:
    torch.manual_seed(0)
    config = get_method("adapter").config_class(rank=2)
    return GraftedModel.graft(base, vision, config)


def row(model: GraftedModel, *kinds: int) -> dict[str, torch.Tensor]:
    """A batch of one row, 1 at image positions."""
    ids = torch.arange(len(kinds))[None] % 7 + 10
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if any(kinds):
        width = model.workflow().projector.mlp[0].in_features
        generator = torch.Generator().manual_seed(1)
        inputs["image_features"] = torch.randn(1, sum(kinds), width, generator=generator)
        inputs["mm_token_type_ids"] = torch.tensor([kinds])
    return inputs


@torch.no_grad()
def logits(model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return model(**inputs).logits


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_it_knows_no_architecture_by_name(arch: str, installed: Path) -> None:
    model, base = graft(tiny_model(arch)), tiny_model(arch)
    seen, read = row(model, 0, 0, 1, 1, 0, 0), row(model, 0, 0, 0, 0, 0)
    graft_ = model.workflow().graft
    fresh = logits(model, seen)
    graft_.active = False
    assert torch.equal(logits(model, seen), fresh)  # it begins as the projector alone
    graft_.active = True
    for adapter in graft_.adapters.values():
        torch.nn.init.normal_(adapter.up.weight)
    assert (logits(model, seen) - fresh).abs().max() > 1e-3
    assert torch.equal(logits(model, read), logits(base, read))


def test_trained_saved_and_loaded(installed: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", "llama")
    tower = VisionSpec(id=str(tiny_clip_dir(tmp_path / "tower")))
    model = graft(str(tmp_path / "base"), tower)
    trained = model.set_trainable(["projector", "adapters"])
    assert all(".projector." in name or ".adapters." in name for name in trained)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    seen = row(model, 0, 1, 1, 1, 1, 0, 0, 0)
    losses = []
    model.train()
    for _ in range(8):
        loss = model(**seen, labels=seen["input_ids"]).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    model.eval()
    model.save_pretrained(tmp_path / "run")
    assert {name.split(".")[1] for name in load_file(tmp_path / "run" / "graft.safetensors")} == {
        "adapters", "mlp",
    }  # fmt: skip
    loaded = GraftedModel.from_pretrained(tmp_path / "run")
    assert torch.equal(logits(loaded, seen), logits(model, seen))
    read = row(loaded, 0, 0, 0, 0)
    assert torch.equal(logits(loaded, read), logits(tiny_model("llama"), read))


def test_a_stage_switches_it_and_what_runs_is_saved(installed: Path, tmp_path: Path) -> None:
    save_base(tmp_path / "base", "llama")
    tower = VisionSpec(id=str(tiny_clip_dir(tmp_path / "tower")))
    model = graft(str(tmp_path / "base"), tower)
    file = installed / PACKAGE / "adapter.yaml"
    recipe = load_recipe(file, overrides=["stages.instruct.scale=0.5"]).resolved("mm")
    for stage, scale in zip(recipe.stages, (1.0, 0.5), strict=True):
        open_stage(model, stage)
        assert model.workflow().graft.scale == scale
    model.save_pretrained(tmp_path / "run")
    loaded = GraftedModel.from_pretrained(tmp_path / "run")
    assert loaded.workflow().graft.state() == {"active": True, "scale": 0.5}


def test_its_switch_and_its_groups_are_its_own(installed: Path, tmp_path: Path) -> None:
    text = (installed / PACKAGE / "adapter.yaml").read_text(encoding="utf-8")
    file = tmp_path / "recipe.yaml"
    file.write_text(text.replace("method: adapter", "method: llava"), encoding="utf-8")
    with pytest.raises(UsageError, match="scale"):
        load_recipe(file)
    file.write_text(text.replace("[projector, adapters]", "[projector, layers]"), encoding="utf-8")
    with pytest.raises(UsageError, match="layers"):
        load_recipe(file)
