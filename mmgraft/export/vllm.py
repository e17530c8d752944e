"""Grafts of one base in one folder, for vLLM with the plugin ``mmgraft-vllm`` (``plugins/vllm``).

It is a LLaVA model whose decoder has the inserted layers of every workflow in it, and beside it
``workflows.N.``, what else a workflow has. The plugin says which row runs which.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

from mmgraft.atomic import atomic_folder
from mmgraft.basefiles.tensor_files import LazyTensor, write_shards
from mmgraft.errors import UsageError
from mmgraft.export.folder import NOTE_KEY, Exported, sizes_in
from mmgraft.export.llava.config import empty_llava, llava_config
from mmgraft.export.llava.export import Plan, write_small_files
from mmgraft.export.llava.fit import Ingredients, NotLlava, Source, gather
from mmgraft.export.llava.processor import stock_processor
from mmgraft.export.llava.tensors import llava_tensors, own_tensors
from mmgraft.progress import say

DECODERS = ("llama", "mistral", "qwen2", "qwen3")
"""Bases whose decoder the plugin knows, by model type."""

ARCHITECTURE = "MMGraftForConditionalGeneration"

_LAYERS, _PROJECTOR = "graft.layers.", "multi_modal_projector."

_Tensors = dict[str, Callable[[], Tensor]]


def export_vllm(
    runs: Sequence[Path],
    out: Path,
    base: str | None = None,
    dtype: str | None = None,
    dry_run: bool = False,
) -> Exported:
    """Write the base once, and each graft's tensors beside it.

    Args:
        runs: Folders of grafts of one base and tower.
        out: See :func:`mmgraft.export.folder.check_folder`.
        base: Where the base lies, when not where the records say.
        dtype: Of all weights, such as ``"bfloat16"``; default: the base's.
        dry_run: Refuse what the plugin cannot run, return the size, and write nothing.

    Raises:
        UsageError: With the reason why the plugin cannot run a graft, or run them together.
        MMGraftError: The disk is full; what stood in ``out`` is whole.
    """
    say("examining grafts, base and vision tower")
    grafts = [_gather(run, base, dtype) for run in runs]
    plan, own, beside = _plan(grafts)
    names = [graft.record.workflow for graft in grafts]
    with llava_tensors(plan.made_of, plan.model, own) as tensors:
        kept = {name: one for name, one in tensors.items() if _PROJECTOR not in name}
        kept |= {name: _typed(read, plan.made_of) for name, read in beside.items()}
        size = sum(tensor.nbytes for tensor in kept.values())
        if dry_run:
            listed = {"model.safetensors": size}
            return Exported("vllm", out, ", ".join(names), listed, _notes(plan), written=False)

        def write(folder: Path) -> None:
            say(f"writing {size / 2**20:,.1f} MiB of weights")
            write_shards(folder, "model", kept)
            write_small_files(plan, folder)

        atomic_folder(out, write)
    notes = [*_notes(plan), shlex.join(serve_command(out, plan.made_of, names))]
    return Exported("vllm", out, ", ".join(names), sizes_in(out), notes)


def serve_command(folder: Path, made_of: Ingredients, names: Sequence[str]) -> list[str]:
    """Return the command that serves the folder: its base's name first, then each workflow's."""
    base = Path(made_of.record.base.id).name
    served = ["--served-model-name", base, *names]
    return ["vllm", "serve", str(folder), *served, "--middleware", "mmgraft_vllm.names.Workflows"]


def _gather(run: Path, base: str | None, dtype: str | None) -> Ingredients:
    try:
        made_of = gather(run, base, dtype, gates=True)
    except NotLlava as error:
        raise UsageError(f"mmgraft-vllm builds on vLLM's LLaVA model, and {error}") from None
    kind = made_of.base_config.model_type
    if kind not in DECODERS:
        raise UsageError(
            f"mmgraft-vllm knows no {kind} decoder, but {', '.join(DECODERS)}; use mmgraft serve, "
            "which runs every base in this process."
        )
    if made_of.lacks:
        raise UsageError(
            f"mmgraft-vllm runs inserted layers and projectors, and what method "
            f"{made_of.record.method} adds to the base's layers is neither; use mmgraft serve."
        )
    return made_of


def _plan(grafts: list[Ingredients]) -> tuple[Plan, _Tensors, _Tensors]:
    """Return the common model, and what reads tensors of its decoder and those beside it."""
    first = grafts[0]
    for other in grafts[1:]:
        _check_together(first, other)
    names = [Path(first.record.base.id).name, *(graft.record.workflow for graft in grafts)]
    if len(set(names)) < len(names):
        raise UsageError(
            f"base and workflows are called {', '.join(names)}, and two of one name cannot be told "
            "apart by a request; rename a workflow, or the base's folder."
        )
    read = [own_tensors(graft.run) for graft in grafts]
    layers: list[Source] = []
    pairs: list[list[list[int]]] = [[] for _ in grafts]
    own: _Tensors = {name: one for name, one in read[0].items() if not name.startswith(_LAYERS)}
    for index in range(first.anatomy.num_layers):
        layers.append(Source(index))
        after = len(layers) - 1
        for number, graft in enumerate(grafts):
            for source in graft.layers:
                if source.index == index and source.inserted is not None:
                    place = f"{_LAYERS}{len(layers)}."
                    pairs[number].append([after, len(layers)])
                    own |= _renamed(read[number], f"{_LAYERS}{source.inserted}.", place)
                    layers.append(Source(index, len(layers)))
    made_of = replace(first, layers=layers, owns=frozenset(), tied_own=False)
    beside = {
        f"workflows.{number}.{name.removeprefix('graft.')}": one
        for number, tensors in enumerate(read)
        for name, one in tensors.items()
        if not name.startswith(_LAYERS)
    }
    workflows = [
        {
            "name": graft.record.workflow, "layers": pairs[number], "gated": graft.gated,
            "owns": sorted(graft.owns), "tied": graft.tied_own,
            "scalar": f"workflows.{number}.gates.0.scale" in beside,
        }
        for number, graft in enumerate(grafts)
    ]  # fmt: skip
    processor = stock_processor(made_of)
    config = llava_config(made_of, processor.image_token_id, made_of.anatomy.vocab_size)
    values: dict[str, Any] = {"architectures": [ARCHITECTURE], "mrope_section": [1, 1, 1]}
    values[NOTE_KEY] = {**getattr(config, NOTE_KEY), "note": "", "workflows": workflows}
    model = empty_llava(config)
    for key, value in values.items():
        setattr(config, key, value)
    return Plan(made_of, processor, config, model), own, beside


def _check_together(first: Ingredients, other: Ingredients) -> None:
    """Refuse a graft that cannot share base, tower and chat template with another."""
    mine, its = first.record, other.record
    for what, same in (
        ("base", mine.base.fingerprint == its.base.fingerprint),
        ("vision tower", first.tower.fingerprint() == other.tower.fingerprint()),
        ("layer of the vision tower", first.tower.feature_map == other.tower.feature_map),
        ("chat template", mine.template == its.template),
    ):
        if not same:
            raise UsageError(
                f"{other.run} has another {what} than {first.run}; one folder for vLLM takes "
                "grafts that share it. Export it by itself."
            )


def _renamed(tensors: _Tensors, prefix: str, new: str) -> _Tensors:
    mine = {name: read for name, read in tensors.items() if name.startswith(prefix)}
    return {new + name.removeprefix(prefix): read for name, read in mine.items()}


def _typed(read: Callable[[], Tensor], made_of: Ingredients) -> LazyTensor:
    return LazyTensor(tuple(read().shape), made_of.dtype, partial(_cast, read, made_of))


def _cast(read: Callable[[], Tensor], made_of: Ingredients) -> Tensor:
    return read().to(made_of.dtype)


def _notes(plan: Plan) -> list[str]:
    token = plan.processor.processor.image_token
    notes = ["a conversation without an image is answered by the base, whatever name it asks for"]
    notes.append(f"text that contains {token} literally is read as an image position")
    if stops := plan.processor.graft.answers.stops:
        notes.append(f"answers end with text: send stop={list(stops)!r} with each request")
    return notes
