"""Work of ranks in tests; each function runs in a process of its own, on every rank."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import TrainerCallback

from mmgraft.data.batches.sampler import EpochSampler
from mmgraft.errors import MMGraftError
from mmgraft.model.modeling import GraftedModel
from mmgraft.model.sharded import gathered, is_piece
from mmgraft.training.distributed.sharding import rest, shard
from mmgraft.training.run import plan_training, train

BATCHES = [(True, True), (True, False), (False, True), (False, False)]
"""Rows of a rank with an image (True) or without, step by step."""


def batch(seed: int, image: bool, taken: int) -> dict[str, Any]:
    """Two rows for a tower of 4 patches; the second is shorter."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 60, (2, 12), generator=draw)
    mask, labels = torch.ones_like(ids), ids.clone()
    mask[1, 10:] = 0
    labels[:, :6] = labels[1, 10:] = -100
    given: dict[str, Any] = {"input_ids": ids, "attention_mask": mask, "labels": labels}
    if not image:
        return {**given, "workflow": ["text", "text"]}
    kinds = torch.zeros_like(ids)
    kinds[:, 2 : 2 + taken] = 1
    pixels = torch.randn(2, 3, 16, 16, generator=draw)
    return {**given, "mm_token_type_ids": kinds, "pixel_values": pixels, "workflow": ["mm", "mm"]}


def sharded_steps(run: str, checkpointing: bool, four_bit: bool, saved: str) -> dict[str, Any]:
    """Steps of a sharded model beside the same model whole, which sees the rows of all ranks."""
    torch.set_num_threads(1)
    rank, ranks = start()
    plain, pieces = (_fresh(run, checkpointing, four_bit) for _ in range(2))
    taken = plain.workflow().positions(plain.vision_tower.fixed_plan)
    shard(pieces, "cpu")
    trained = {name: p for name, p in pieces.named_parameters() if p.requires_grad}
    found: dict[str, Any] = {
        "whole": [name for name, parameter in trained.items() if not is_piece(parameter)],
        "held": sum(p.to_local().numel() for p in trained.values()),
        "all": sum(p.numel() for p in trained.values()),
        "losses": [],
        "gradients": [],
    }
    optimizers = [
        torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        for model in (plain, pieces)
    ]
    for step, images in enumerate(BATCHES):
        batches = [batch(10 * step + one, images[one], taken) for one in range(ranks)]
        counts = [int((b["labels"][:, 1:] != -100).sum()) for b in batches]
        learned = max(1, sum(n for n, image in zip(counts, images, strict=True) if image))
        total = torch.zeros(())
        for one in batches:
            loss = plain(**one, num_items_in_batch=learned).loss
            loss.backward()
            total += loss.detach()
        loss = pieces(**batches[rank], num_items_in_batch=learned).loss
        (loss * ranks).backward()
        summed = loss.detach().clone()
        torch.distributed.all_reduce(summed)
        found["losses"].append((float(total), float(summed)))
        found["gradients"].append(_furthest(plain, trained))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    with torch.no_grad():
        pieces.eval()(**batch(99, True, taken))
    rest(pieces)
    from mmgraft.model.files.save import save_graft

    for name, model in (("whole", plain), ("pieces", pieces)):
        save_graft(model, Path(saved) / name, write=rank == 0)
    return found


def start() -> tuple[int, int]:
    """Join the other ranks; gives the rank and how many there are."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo")
    return torch.distributed.get_rank(), torch.distributed.get_world_size()


def _fresh(run: str, checkpointing: bool, four_bit: bool) -> Any:
    options: dict[str, Any] = {}
    if four_bit:
        options = {"quantization": "nf4", "device_map": {"": "cpu"}}
        options["quantization_storage"] = torch.bfloat16
    model = GraftedModel.from_pretrained(
        run, dtype=torch.float32, graft_dtype=torch.float32, **options
    )
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):  # or a CPU packs the weights anew
            module.support_avx512bf16_for_cpu = False
    model.set_trainable([name for name in ("projector", "graft") if model.groups()[name]])
    draw = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:  # a fresh learner adds nothing, and so gets no gradient
            parameter.data += torch.randn(parameter.shape, generator=draw) * 0.05
    model.train()
    model.gradient_checkpointing = checkpointing
    return model


def _furthest(plain: Any, trained: dict[str, Tensor]) -> float:
    """The largest difference of a gradient, of the parameter's largest one."""
    mine = gathered({name: p.grad for name, p in trained.items() if p.grad is not None})
    assert mine.keys() == trained.keys(), "a parameter in pieces has no gradient"
    worst = 0.0
    for name, parameter in plain.named_parameters():
        if name in mine:
            wanted = torch.zeros_like(mine[name]) if parameter.grad is None else parameter.grad
            worst = max(worst, float((wanted - mine[name]).abs().max() / (wanted.abs().max() + 1)))
    return worst


def apart(batch_size: int, with_image: list[bool]) -> None:
    """From now on, of two ranks the first one's rows all have an image, and the other's none.

    The order of rows is drawn no more: a batch of pictures is followed by one of text.
    """
    images = [at for at, image in enumerate(with_image) if image]
    texts = [at for at, image in enumerate(with_image) if not image]
    order: list[int] = []
    while len(order) < len(with_image):
        for rows in (images, texts):
            order += rows[:batch_size]
            del rows[:batch_size]

    def fixed(self: EpochSampler) -> Iterator[int]:
        return iter(order)

    EpochSampler.__iter__ = fixed  # type: ignore[method-assign]


def train_run(run: str, stop_at: int | None = None, **options: Any) -> dict[str, bool]:
    """Train a run; gives, by name, whether a trained parameter was in pieces after a step."""
    found: dict[str, bool] = {}

    class Look(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any):
            for name, parameter in model.named_parameters():
                if parameter.requires_grad:
                    found[name] = is_piece(parameter)
            if state.global_step == stop_at:
                raise KeyboardInterrupt

    try:
        train(plan_training(Path(run), device="cpu", **options), display=lambda *_: [Look()])
    except MMGraftError:
        assert stop_at is not None
    return found


def train_runs(
    runs: list[str], batch_size: int, with_image: list[bool] | None
) -> list[dict[str, bool]]:
    """Several runs one after another; with rows apart where it is said which have an image."""
    torch.set_num_threads(1)
    if with_image is not None:
        apart(batch_size, with_image)
    return [train_run(run) for run in runs]


def stop_and_go_on(undisturbed: str, stopped: str, stop_at: int) -> None:
    """Train a run to its end, and another to a step, then on from its last checkpoint."""
    torch.set_num_threads(1)
    train_run(undisturbed)
    train_run(stopped, stop_at=stop_at)
    train_run(stopped, resume=True)


def go_on(run: str) -> None:
    """Train a run to its end from where it stopped."""
    torch.set_num_threads(1)
    train_run(run, resume=True)


def tensors_of(run: Path) -> dict[str, Tensor]:
    """A saved graft's tensors, and those of its own base where it has one."""
    found = load_file(run / "graft.safetensors")
    for file in sorted(run.glob("base/*.safetensors")):
        found.update(load_file(file))
    return found
