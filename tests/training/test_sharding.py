"""FSDP2 by mmgraft's own plan, on two gloo processes: the same as one process, with all rows."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch

from mmgraft.vision.projectors.configs import PerceiverConfig, ProjectorConfig, QFormerConfig
from rank_work import sharded_steps, stop_and_go_on, tensors_of
from ranks import on_ranks
from tiny_runs import losses, make_run, write_recipe

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "checkpointing", "four_bit"),
    [
        ("iaa", False, False),
        ("iaa", True, False),
        ("wings", False, False),
        ("wings", True, False),
        ("llava", False, False),
        ("lora", False, False),
        ("lora", True, False),
        ("xattn", False, False),
        ("xattn", True, False),
        pytest.param("iaa", False, True, marks=needs_bitsandbytes),
    ],
)
def test_pieces_compute_what_the_whole_does(
    parts: Path, tmp_path: Path, method: str, checkpointing: bool, four_bit: bool
):
    """Also where one rank's rows have no image, or both ranks': nobody waits for a part."""
    own: dict[str, object] = {}
    if method == "iaa" and not four_bit:
        own = {"embedding": True, "head": True}
    own = {**own, "structure": "a"} if own and checkpointing else own  # what a layer hands on
    own = {"gate_init": 0.5} if method == "xattn" else own  # so that all of a block learns
    run = make_run(parts, tmp_path / "run", method, **own)
    pieces_are_the_whole(run, tmp_path / "saved", checkpointing, four_bit)


PERCEIVER = PerceiverConfig(
    form="idefics2", latents=4, layers=2, heads=4, kv_heads=2, head_dim=4, per="image"
)
QFORMER = QFormerConfig(queries=4, width=8, layers=2, heads=2, hidden=8)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("projector", "four_bit"),
    [
        pytest.param(PERCEIVER, True, marks=needs_bitsandbytes),
        (QFORMER, False),
    ],
    ids=lambda one: getattr(one, "kind", None),
)
def test_pieces_of_a_resampler_compute_what_the_whole_does(
    parts: Path, tmp_path: Path, projector: ProjectorConfig, four_bit: bool
):
    run = make_run(parts, tmp_path / "run", "llava", projector)
    pieces_are_the_whole(run, tmp_path / "saved", False, four_bit)


def pieces_are_the_whole(run: Path, saved: Path, checkpointing: bool, four_bit: bool) -> None:
    found = on_ranks(sharded_steps, str(run), checkpointing, four_bit, str(saved))
    for one in found:
        assert one["whole"] == []
        for whole, pieces in one["losses"]:
            assert pieces == pytest.approx(whole, abs=1e-5)
        assert max(one["gradients"]) < 1e-5
    assert sum(one["held"] for one in found) == found[0]["all"]  # each number is held once
    assert max(one["held"] for one in found) < 0.6 * found[0]["all"]
    whole, pieces = tensors_of(saved / "whole"), tensors_of(saved / "pieces")
    assert whole.keys() == pieces.keys()
    for name in whole:
        torch.testing.assert_close(pieces[name], whole[name], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
def test_a_sharded_run_goes_on_as_if_never_stopped(parts: Path, tmp_path: Path):
    """Over the border of two stages, with optimizer state; the base is trained and saved whole."""
    stages = [
        {"name": "align", "train": ["projector"], "lr": 1e-3, "max_steps": 2},
        {"name": "tune", "train": ["projector", "base"], "lr": 1e-3, "max_steps": 5},
    ]
    runs = [make_run(parts, tmp_path / name, "llava") for name in ("undisturbed", "stopped")]
    for run in runs:
        write_recipe(run, parts, "llava", stages, base="full", parallel="fsdp2", save_every=2)
    on_ranks(stop_and_go_on, *map(str, runs), 3)
    assert losses(runs[1]) == losses(runs[0])
    wanted, found = (tensors_of(run) for run in runs)
    assert found.keys() == wanted.keys()
    for name in wanted:
        assert torch.equal(found[name], wanted[name]), name
