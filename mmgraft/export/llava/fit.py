"""Refusal of grafts that stock LLaVA cannot express, and the ingredients of those it can."""

from dataclasses import field
from pathlib import Path

import torch
from transformers import PreTrainedConfig

from mmgraft.anatomy import Anatomy, get_path
from mmgraft.basefiles import ModelFiles, TensorReader, examine_files, load_config
from mmgraft.basefiles.parts import own_dtype
from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.grafts.method import PlainDecoder
from mmgraft.grafts.registry import get_method
from mmgraft.layers import parse_layers
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import base_files, check_base, local_tower
from mmgraft.vision.projectors.configs import MlpConfig
from mmgraft.vision.spec import TRANSFORMERS_KIND
from mmgraft.vision.towers.registry import load_tower
from mmgraft.vision.towers.transformers import TransformersTower


class NotLlava(UsageError):
    """A graft, base or tower that LLaVA has no place for."""


class Source(Frozen):
    """Origin of a layer of the exported decoder: a base layer or an inserted one.

    Attributes:
        index: The base layer that it is, or that it follows.
        inserted: Number of the inserted layer in the graft; None for the base's own.
    """

    index: int
    inserted: int | None = None


class Ingredients(Frozen):
    """All that an export to LLaVA is made of; of the base nothing but its config is in memory.

    Attributes:
        run: The graft's folder.
        record: Its record.
        files: The base's files.
        base_config: The base's config.
        anatomy: The base's.
        tower: The vision tower, in the dtype of its file.
        dtype: Of everything that is written.
        layers: The decoder's layers in order.
        owns: Which of ``embedding``, ``norm`` and ``head`` the graft has.
        tied_own: Own embedding and own head are one tensor.
        untied: Write the head by itself also where it is the embedding.
        lacks: What of the graft is not in it; see ``PlainDecoder``.
        gated: How inserted layers are added; see ``PlainDecoder``.
    """

    run: Path
    record: GraftFile
    files: ModelFiles
    base_config: PreTrainedConfig
    anatomy: Anatomy
    tower: TransformersTower
    dtype: torch.dtype
    layers: list[Source]
    owns: frozenset[str] = field(default_factory=frozenset)
    tied_own: bool = False
    untied: bool = False
    lacks: str = ""
    gated: str = ""

    @property
    def inserted(self) -> list[int]:
        """The base layers that are followed by an inserted one."""
        return [layer.index for layer in self.layers if layer.inserted is not None]

    @property
    def tied(self) -> bool:
        """Return whether embedding and head of the exported model are one tensor."""
        if self.untied or self.anatomy.logit_scale != 1.0:
            return False  # the scale goes into the head
        return self.tied_own if {"embedding", "head"} & self.owns else self.anatomy.tied

    @property
    def text_note(self) -> str:
        """Sentence about text in the exported model."""
        name = self.record.workflow
        if self.record.base_trained:
            was = "those of the base that was trained with it, not the original model's"
        elif self.inserted or self.owns:
            was = f"no longer the base's: rows without an image run {name} too"
        else:
            was = "still computed by the base's own layers, as they were before"
        return f"it carries one workflow, {name}, and its text answers are {was}"


def gather(
    run: Path, base: str | None = None, dtype: str | None = None, gates: bool = False
) -> Ingredients:
    """Read what an export needs, and refuse what LLaVA cannot express.

    Args:
        run: The graft's folder.
        base: Where the base lies, when not where the record says.
        dtype: Name of a torch dtype; default: the base's own.
        gates: Take grafts whose layers are added through gates, too.

    Raises:
        UsageError: With the reason; or a base that is not the one the graft was made for.
    """
    record = GraftFile.read(run)
    graft = _as_decoder(record)
    if graft.gated and not gates:
        raise _refusal("its layers are added through gates, which no plain decoder has")
    files = base_files(record, run, base)
    check_base(record, files, "fast")
    config = load_config(files)
    with TensorReader(files) as reader:
        blank, anatomy = examine_files(reader, config)
    _refuse_base(anatomy, getattr(get_path(blank, anatomy.head_path), "bias", None) is not None)
    _refuse_projector(record, anatomy)
    stock = record.vision.kind == TRANSFORMERS_KIND
    tower = load_tower(local_tower(record, run)) if stock else None
    if not isinstance(tower, TransformersTower):
        raise _refusal(
            f"its vision tower {record.vision.name} is no vision model of transformers, and LLaVA "
            "loads no other"
        )
    _refuse_tower(tower)
    after = [] if graft.layers is None else parse_layers(graft.layers, anatomy.num_layers)
    return Ingredients(
        run=run,
        record=record,
        files=files,
        base_config=blank.config,
        anatomy=anatomy,
        tower=tower,
        dtype=_dtype(dtype, config, files),
        layers=_order(anatomy.num_layers, after),
        owns=graft.owns,
        lacks=graft.lacks,
        gated=graft.gated,
        tied_own=anatomy.tied and {"embedding", "head"} <= graft.owns and not graft.untie,
    )


def _order(num_layers: int, after: list[int]) -> list[Source]:
    layers: list[Source] = []
    for index in range(num_layers):
        layers.append(Source(index))
        if index in after:
            layers.append(Source(index, after.index(index)))
    return layers


def _refusal(reason: str) -> NotLlava:
    return NotLlava(
        f"this graft cannot be written as a stock LLaVA model: {reason}. Use --to full for one "
        "folder that mmgraft loads."
    )


def _as_decoder(record: GraftFile) -> PlainDecoder:
    """Return the graft as a plain decoder, or a refusal with its method's reason."""
    made = get_method(record.method).as_decoder
    if made is None:
        raise _refusal(
            f"LLaVA has a projector and a plain decoder, and what method {record.method} adds "
            "has no place in it"
        )
    try:
        return made(record.settings, bool(record.state.get("active", True)))
    except UsageError as error:
        raise _refusal(str(error)) from None


def _refuse_projector(record: GraftFile, anatomy: Anatomy) -> None:
    if not isinstance(record.projector, MlpConfig):
        raise _refusal(
            f"its projector is {record.projector.kind}, and LLaVA's is two linear layers (mlp)"
        )
    if record.projector.norm:
        raise _refusal(
            "its projector has a norm (projector.norm), and LLaVA normalises nothing before its "
            "projector; a graft for LLaVA must be trained without"
        )
    hidden = record.projector.hidden
    if hidden not in (None, anatomy.hidden_size):
        raise _refusal(
            f"its projector is {hidden} wide in the middle, and LLaVA's has the decoder's width, "
            f"{anatomy.hidden_size}"
        )


def _refuse_base(anatomy: Anatomy, head_bias: bool) -> None:
    name = anatomy.class_name
    if anatomy.logits_blocked is not None:
        raise _refusal(f"the logits of {name} are no plain linear head's: {anatomy.logits_blocked}")
    if anatomy.logit_softcap is not None:
        raise _refusal(
            f"{name} bounds its logits (soft cap {anatomy.logit_softcap:g}), and LLaVA's head does "
            "not, so that its logits would differ"
        )
    if head_bias:
        raise _refusal(f"the head of {name} has a bias, and LLaVA's head has none")
    if anatomy.embedding_size != anatomy.hidden_size:
        raise _refusal(
            f"{name} embeds tokens in {anatomy.embedding_size} numbers and works in "
            f"{anatomy.hidden_size}, and LLaVA's projector ends in the latter"
        )


def _refuse_tower(tower: TransformersTower) -> None:
    seen, name = tower.feature_map, tower.spec.name
    if seen.is_grid or seen.index is None:
        raise _refusal(
            f"the vision tower {name} gives a grid of features, and LLaVA reads tokens out of a "
            "list of hidden states"
        )
    if seen.prefix > 1:
        raise _refusal(
            f"the vision tower {name} puts {seen.prefix} tokens before the patches, and LLaVA can "
            "leave out none or one"
        )
    if seen.arguments:
        raise _refusal(
            f"the vision tower {name} is run at {tower.image_size[0]} x {tower.image_size[1]} "
            "pixels with its position table stretched, which LLaVA does not ask for"
        )


def _dtype(name: str | None, config: PreTrainedConfig, files: ModelFiles) -> torch.dtype:
    if name is not None:
        found = getattr(torch, name, None)
        if not isinstance(found, torch.dtype) or not found.is_floating_point:
            raise UsageError(f"--dtype {name} is no dtype; give float32, bfloat16 or float16.")
        return found
    with TensorReader(files) as reader:
        return own_dtype(config, reader)
