"""Refuse what stock LLaVA cannot express with the reason, before anything is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mmgraft.errors import UsageError
from mmgraft.export.llava.export import export_llava
from mmgraft.export.llava.fit import gather
from mmgraft.vision.projectors.configs import (
    LinearConfig,
    PixelShuffleConfig,
    PoolConfig,
    ProjectorConfig,
)
from mmgraft.vision.spec import ProjectorSpec, VisionSpec
from tiny import tiny_clip_dir
from tiny_exports import ROUNDING, change_record, make_base, make_graft
from tiny_towers import save_tower, tiny_tower


def refused(run: Path, reason: str) -> None:
    with pytest.raises(UsageError, match=reason) as error:
        export_llava(run, run.parent / "out")
    assert "--to full" in str(error.value)
    assert not (run.parent / "out").exists()


@pytest.mark.parametrize("method", ["wings", "wings-official"])
def test_wings(tmp_path: Path, method: str) -> None:
    run = make_graft(tmp_path, method="wings", rank=4)
    lengths = {"system_prompt_length": 3, "image_token_length": 4}
    config = {"rank": 4, **(lengths if method == "wings-official" else {})}
    change_record(run, method=method, config={"method": method, **config})
    refused(run, "learners and a router beside the attention")


@pytest.mark.parametrize("structure", ["a", "b"])
def test_gated_structures(tmp_path: Path, structure: str) -> None:
    refused(make_graft(tmp_path, structure=structure), "added through gates")


def test_gates_that_are_not_in_the_path_do_no_harm(tmp_path: Path) -> None:
    run = make_graft(tmp_path, structure="b")
    change_record(run, state={"active": False})
    assert gather(run).inserted == []


@pytest.mark.parametrize(
    ("projector", "reason"),
    [
        (LinearConfig(), "its projector is linear"),
        (PixelShuffleConfig(), "its projector is pixel_shuffle"),
        (PoolConfig(), "its projector is pool"),
        (ProjectorSpec(norm=True), "projector.norm"),
        (ProjectorSpec(hidden=48), "48 wide in the middle"),
    ],
)
def test_projectors(tmp_path: Path, projector: ProjectorConfig, reason: str) -> None:
    refused(make_graft(tmp_path, projector=projector), reason)


def test_a_projector_of_the_bases_width_by_name(tmp_path: Path) -> None:
    run = make_graft(tmp_path, projector=ProjectorSpec(hidden=32))
    assert export_llava(run, tmp_path / "out").difference < ROUNDING


@pytest.mark.parametrize(
    ("arch", "values", "reason"),
    [
        ("gemma2", {}, "bounds its logits .soft cap 3."),
        ("phi", {}, "has a bias"),
        ("opt_post_norm", {}, "embeds tokens in 24 numbers and works in 32"),
    ],
)
def test_bases(tmp_path: Path, arch: str, values: dict[str, Any], reason: str) -> None:
    refused(make_graft(tmp_path, arch, method="llava", **values), reason)


def test_a_registered_tower(tmp_path: Path) -> None:
    refused(make_graft(tmp_path, tower=tiny_tower().spec), "tower tiny is no vision model of trans")


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext", "gives a grid of features"),
        ("deit", "puts 2 tokens before the patches"),
        ("dinov2-registers", "puts 5 tokens before"),
    ],
)
def test_transformers_towers(tmp_path: Path, name: str, reason: str) -> None:
    save_tower(tmp_path / "tower", name)
    refused(make_graft(tmp_path, tower=VisionSpec(id=str(tmp_path / "tower"))), reason)


def test_a_tower_at_another_size_than_its_own(tmp_path: Path) -> None:
    tiny_clip_dir(tmp_path / "tower")
    options = {"image_size": 32, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    spec = VisionSpec(id=str(tmp_path / "tower"), options=options)
    refused(make_graft(tmp_path, tower=spec), "position table stretched")


def test_an_unknown_dtype(tmp_path: Path) -> None:
    run = make_graft(tmp_path)
    for name in ("float99", "int8", "nn"):
        with pytest.raises(UsageError, match=f"--dtype {name}"):
            gather(run, dtype=name)
    assert gather(run, dtype="bfloat16").dtype == torch.bfloat16


def test_another_base_under_the_same_name(tmp_path: Path) -> None:
    run = make_graft(tmp_path)
    other = make_base(tmp_path / "other", "llama", seed=5)
    with pytest.raises(UsageError, match="is not the base that this graft was made for"):
        gather(run, base=str(other))


def test_the_order_of_layers(tmp_path: Path) -> None:
    made_of = gather(make_graft(tmp_path, layers=[1, 3]))
    order = [(layer.index, layer.inserted) for layer in made_of.layers]
    assert order == [(0, None), (1, None), (1, 0), (2, None), (3, None), (3, 1)]
    assert made_of.inserted == [1, 3]
