"""Grafts of one base in one folder, for vLLM with the plugin ``mmgraft-vllm`` (``plugins/vllm``).

It is a LLaVA model whose decoder has the inserted layers of every workflow in it, and beside it
``workflows.N.``, what else a workflow has. The plugin says which row runs which.
"""

import shlex
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmgraft.atomic import atomic_folder
from mmgraft.basefiles.parts import refuse_quantised
from mmgraft.basefiles.tensor_files import LazyTensor, write_shards
from mmgraft.errors import UsageError
from mmgraft.export.folder import NOTE_KEY, Exported, sizes_in
from mmgraft.export.llava.config import empty_llava, llava_config
from mmgraft.export.llava.export import Plan, write_small_files
from mmgraft.export.llava.fit import Ingredients, NotLlava, Source, gather
from mmgraft.export.llava.processor import stock_processor
from mmgraft.export.llava.tensors import llava_tensors, own_tensors
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.progress import say
from mmgraft.version import __version__

#: Bases whose decoder the plugin knows, by model type.
DECODERS = ("llama", "mistral", "qwen2", "qwen3")

ARCHITECTURE = "MMGraftForConditionalGeneration"

_NO_IMAGE = "a conversation without an image is the base's, unless its request says workflow, too"

_LAYERS, _PROJECTOR, _BESIDE = "graft.layers.", "projector.", "workflows."

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
    plan, own = _plan(grafts)
    names = [graft.record.workflow for graft in grafts]
    stock = own | _moved(own, f"{_BESIDE}0.{_PROJECTOR}", _PROJECTOR)
    with llava_tensors(plan.made_of, plan.model, stock) as tensors:
        kept = {name: one for name, one in tensors.items() if not name.startswith("multi_modal")}
        kept |= {n: _lazy(r, plan.made_of.dtype) for n, r in own.items() if n.startswith(_BESIDE)}
        size = sum(tensor.nbytes for tensor in kept.values())
        if dry_run:
            listed = {"model.safetensors": size}
            return Exported("vllm", out, ", ".join(names), listed, _notes(plan), written=False)

        def write(folder: Path) -> None:
            say(f"writing {size / 2**20:,.1f} MiB of weights")
            write_shards(folder, "model", kept)
            write_small_files(plan, folder)

        atomic_folder(out, write)
    command = shlex.join(serve_command(out, [graft.record for graft in grafts]))
    return Exported("vllm", out, ", ".join(names), sizes_in(out), [*_notes(plan), command])


def serve_command(folder: Path, records: Sequence[GraftFile]) -> list[str]:
    """Return the command that serves the folder: its base's name first, then each workflow's."""
    served = [Path(records[0].base.id).name, *(record.workflow for record in records)]
    command = ["vllm", "serve", str(folder), "--served-model-name", *served]
    # The middleware refuses every such argument of a client, and puts the workflow in.
    return [*command, "--trust-request-mm-kwargs", "--middleware", "mmgraft_vllm.names.Workflows"]


def _gather(run: Path, base: str | None, dtype: str | None) -> Ingredients:
    try:
        made_of = gather(run, base, dtype, gates=True)
    except NotLlava as error:
        raise UsageError(f"mmgraft-vllm builds on vLLM's LLaVA model, and {error}") from None
    refuse_quantised(made_of.base_config, made_of.files.id)
    if (kind := made_of.base_config.model_type) not in DECODERS:
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


def _plan(grafts: list[Ingredients]) -> tuple[Plan, _Tensors]:
    """Return the common model, and what reads the grafts' tensors."""
    first = grafts[0]
    for other in grafts[1:]:
        _check_together(first, other)
    names = [Path(first.record.base.id).name, *(graft.record.workflow for graft in grafts)]
    if len(set(names)) < len(names):
        raise UsageError(
            f"base and workflows are called {', '.join(names)}, and two of one name cannot be told "
            "apart by a request; rename a workflow, or the base's folder."
        )
    layers, workflows, tensors = _join(grafts)
    made_of = replace(first, layers=layers, owns=frozenset(), tied_own=False)
    processor = stock_processor(made_of)
    config = llava_config(made_of, processor.image_token_id, made_of.anatomy.vocab_size)
    model = empty_llava(config)
    own = {"architectures": [ARCHITECTURE], "mrope_section": [1, 1, 1]}  # see the plugin
    config.update({**own, NOTE_KEY: {"version": __version__, "workflows": workflows}})
    return Plan(made_of, processor, config, model), tensors


def _join(grafts: list[Ingredients]) -> tuple[list[Source], list[dict[str, Any]], _Tensors]:
    """Return the common decoder's layers, each workflow's entry in the config, and all tensors."""
    layers: list[Source] = []
    tensors: _Tensors = {}
    read = [own_tensors(graft.run) for graft in grafts]
    workflows: list[dict[str, Any]] = [
        {
            "name": graft.record.workflow, "layers": [], "gated": graft.gated,
            "owns": sorted(graft.owns), "tied": graft.tied_own,
            "scalar": "graft.gates.0.scale" in mine,
        }
        for graft, mine in zip(grafts, read, strict=True)
    ]  # fmt: skip
    for index in range(grafts[0].anatomy.num_layers):
        base = len(layers)
        layers.append(Source(index))
        for graft, mine, entry in zip(grafts, read, workflows, strict=True):
            for k in [one.inserted for one in graft.layers if one.index == index]:
                if k is not None:
                    entry["layers"].append([base, len(layers)])
                    tensors |= _moved(mine, f"{_LAYERS}{k}.", f"{_LAYERS}{len(layers)}.")
                    layers.append(Source(index, len(layers)))
    for number, (graft, mine) in enumerate(zip(grafts, read, strict=True)):
        parts = [*(f"graft.{part}." for part in graft.owns), _PROJECTOR]
        for part in [*parts, "graft.gates."] if graft.gated else parts:
            tensors |= _moved(mine, part, f"{_BESIDE}{number}.{part.removeprefix('graft.')}")
    return layers, workflows, tensors


def _moved(tensors: _Tensors, old: str, new: str) -> _Tensors:
    return {new + n.removeprefix(old): read for n, read in tensors.items() if n.startswith(old)}


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


def _lazy(read: Callable[[], Tensor], dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(tuple(read().shape), dtype, lambda: read().to(dtype))


def _notes(plan: Plan) -> list[str]:
    token = plan.processor.processor.image_token
    notes = [_NO_IMAGE, f"text that contains {token} literally is read as an image position"]
    if stops := plan.processor.graft.answers.stops:
        notes.append(f"answers end with text: send stop={list(stops)!r} with each request")
    return notes
