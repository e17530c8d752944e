"""Make a fresh graft: in memory on a loaded base, or as files without ever loading the base."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from mmgraft.anatomy import Anatomy, examine, examine_config
from mmgraft.data.chat.placeholder import choose_placeholder
from mmgraft.errors import UsageError
from mmgraft.grafts.base import BaseParts, Graft
from mmgraft.grafts.registry import get_method
from mmgraft.layers import parse_layers
from mmgraft.model.files.graft_file import BaseReference, GraftFile, ImageToken, TemplateChoice
from mmgraft.model.files.load import finish, load_base
from mmgraft.model.files.parts import LoadedParts, ReadParts, check_places
from mmgraft.model.files.save import graft_tensors, write_graft
from mmgraft.model.workflow import Workflow
from mmgraft.vision.projectors.configs import MlpConfig, ProjectorConfig
from mmgraft.vision.projectors.registry import build_projector
from mmgraft.vision.spec import TRANSFORMERS_KIND, VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import describe_tower, load_tower

if TYPE_CHECKING:
    from mmgraft.basefiles import ModelFiles
    from mmgraft.model.modeling import GraftedModel

SEED = 0
"""Of the new tensors that do not start as copies or zero: projector, learners."""


def graft_model(
    base: str | Path | PreTrainedModel,
    vision: str | Path | VisionSpec | VisionTower | None,
    config: Any,
    *,
    workflow: str = "mm",
    quantization: str | None = None,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    projector: ProjectorConfig | None = None,
    template: TemplateChoice | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> GraftedModel:
    """Graft fresh modules onto a base, ready to train or to run.

    Args:
        base: A Hub id or folder, or a loaded causal LM (not in 4-bit: an inserted layer is a copy
            of exact tensors; name the base instead, and give ``quantization``).
        vision: A tower, its spec, its name; None for a model that is only given features of the
            base's own width.
        config: ``IAAConfig``, ``WingsConfig``, ``LlavaConfig`` or a registered method's.
        workflow: Its name.
        quantization: ``"nf4"`` holds the base in 4-bit.
        dtype: Of the base; default: as saved.
        device_map: As for transformers.
        projector: Which one, with its settings; default: the two layers of ``MlpConfig``.
        template: How conversations become text; default: the tokenizer's chat template.
        tokenizer: Of a loaded base, to choose the image token by.

    Raises:
        UsageError: Layers that cannot carry a graft, or settings that do not fit the base.
    """
    from mmgraft.model.modeling import GraftedModel

    spec = MlpConfig() if projector is None else projector
    vision = str(vision) if isinstance(vision, Path) else vision
    tower = load_tower(vision) if isinstance(vision, str | VisionSpec) else vision
    width = tower.hidden_size if tower is not None else None
    if isinstance(base, str | Path):
        from mmgraft.basefiles import resolve

        files = resolve(base)
        made = _make_from_files(files, config, workflow, spec, width, template, tower)
        loaded = load_base(files, dtype, device_map, quantization)
        anatomy = examine(loaded)
    else:
        if getattr(base, "is_quantized", False):
            raise UsageError(
                "this base is held in 4-bit, so its exact tensors are gone: name the base by id "
                "or folder and give quantization='nf4'."
            )
        loaded, anatomy = base, examine(base)
        reference = BaseReference(id=base.config._name_or_path or "unknown")
        token = _image_token(tokenizer, anatomy)
        parts = LoadedParts(base, anatomy)
        chosen = template or TemplateChoice()
        made = _make(config, anatomy, parts, workflow, spec, width, reference, token, chosen)
        if tower is not None:
            made.record.vision = tower.spec
            made.record.vision_fingerprint = tower.fingerprint()
    made.to(loaded.dtype)
    finish(made, loaded, anatomy)
    if tower is not None:
        tower = tower.to(device=loaded.device, dtype=loaded.dtype)
    return GraftedModel(loaded.requires_grad_(False), tower, [made], anatomy)


def create_graft(
    base: str,
    vision: str | VisionSpec,
    config: Any,
    folder: str | Path,
    *,
    workflow: str = "mm",
    projector: ProjectorConfig | None = None,
    template: TemplateChoice | None = None,
    revision: str | None = None,
    full_fingerprint: bool = False,
    dry_run: bool = False,
) -> GraftFile:
    """Write a fresh graft; of the base only the tensors that the graft copies are read.

    Args:
        base: Hub id or folder.
        vision: The tower's spec or name; of it only the config is read.
        config: The method's settings.
        folder: Where the graft goes.
        workflow: Its name.
        projector: Which one, with its settings; default: the two layers of ``MlpConfig``.
        template: How conversations become text.
        revision: Of the base on the Hub.
        full_fingerprint: Hash every byte of the base, so that ``verify="full"`` can compare.
        dry_run: Check everything and write nothing.

    Returns:
        The record that was written.

    Raises:
        UsageError: An unknown base or tower, or settings that do not fit them; nothing is written.
    """
    from mmgraft.basefiles import fingerprint, resolve

    spec = VisionSpec.from_name(vision) if isinstance(vision, str) else vision
    spec = _pinned(spec)
    shape = describe_tower(spec)
    files = resolve(base, revision)
    made = _make_from_files(
        files, config, workflow, projector or MlpConfig(), shape.hidden_size, template, None
    )
    if full_fingerprint:
        made.record.base.fingerprint = fingerprint(files, full=True)
    made.record.vision = spec
    if not dry_run:
        write_graft(Path(folder), made.record, graft_tensors(made))
    return made.record


def _pinned(spec: VisionSpec) -> VisionSpec:
    """The spec with the whole path of a local tower, and the commit of one on the Hub."""
    if spec.id is None:
        return spec
    if Path(spec.id).expanduser().is_dir():
        return spec.model_copy(update={"id": str(Path(spec.id).expanduser().resolve())})
    if spec.kind != TRANSFORMERS_KIND:
        return spec
    from mmgraft.vision.towers.transformers import locate

    return spec.model_copy(update={"revision": locate(spec)[1]})


def _make_from_files(
    files: ModelFiles,
    config: Any,
    workflow: str,
    spec: ProjectorConfig,
    width: int | None,
    template: TemplateChoice | None,
    tower: VisionTower | None,
) -> Workflow:
    from mmgraft.basefiles import TensorReader, fingerprint, load_config

    base_config = load_config(files)
    anatomy = examine_config(base_config)
    places = _copied_layers(config, anatomy)
    tokenizer = _tokenizer(files)
    chosen = choose_template(tokenizer, template, files.id)
    token = _image_token(tokenizer, anatomy)
    reference = BaseReference(id=files.id, revision=files.revision, fingerprint=fingerprint(files))
    owns = [name for name in ("embedding", "norm", "head") if getattr(config, name, False)]
    with TensorReader(files) as reader:
        parts = ReadParts(reader, base_config, places, owns, anatomy)
        made = _make(config, anatomy, parts, workflow, spec, width, reference, token, chosen)
    if tower is not None:
        made.record.vision = tower.spec
        made.record.vision_fingerprint = tower.fingerprint()
    return made


def _copied_layers(config: Any, anatomy: Anatomy) -> list[int]:
    """The layers that a method names, checked against the base."""
    if getattr(config, "layers", None) is None:
        return []
    places = parse_layers(config.layers, anatomy.num_layers)
    check_places(places, anatomy)
    return places


def _make(
    config: Any,
    anatomy: Anatomy,
    parts: BaseParts,
    workflow: str,
    spec: ProjectorConfig,
    width: int | None,
    reference: BaseReference,
    token: tuple[int, str],
    template: TemplateChoice,
) -> Workflow:
    _copied_layers(config, anatomy)
    method = get_method(config.method).load_graft()
    size = anatomy.embedding_size
    with torch.random.fork_rng(devices=[]):  # the same graft twice, whatever was drawn before
        torch.manual_seed(SEED)
        # The projector first: the same one whatever the method, so that methods compare.
        projector = build_projector(spec, width or size, size)
        graft: Graft = method.build(config, anatomy, parts)
    record = GraftFile(
        method=config.method,
        config=config.model_dump(mode="json"),
        workflow=workflow,
        base=reference,
        vision=VisionSpec(),
        projector=spec,
        image_token=ImageToken(id=token[0], why=token[1]),
        template=template,
    )
    made = Workflow(workflow, projector, graft, record)
    dtype = next((p.dtype for p in graft.parameters()), None)
    return made if dtype is None else _as(made, dtype)


def _as(workflow: nn.Module, dtype: torch.dtype) -> Any:
    return workflow.to(dtype)


def _image_token(tokenizer: PreTrainedTokenizerBase | None, anatomy: Anatomy) -> tuple[int, str]:
    if tokenizer is None:
        return anatomy.vocab_size - 1, "the last id, for want of a tokenizer to choose by"
    return choose_placeholder(tokenizer, anatomy.vocab_size)


def _tokenizer(files: ModelFiles) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(files.path)
    except (OSError, ValueError):
        return None  # a base without a tokenizer still has an id to spare


def choose_template(
    tokenizer: PreTrainedTokenizerBase | None, wanted: TemplateChoice | None, name: str
) -> TemplateChoice:
    """The template of a graft: what the user asked for, else the base's own; never a guess.

    Raises:
        UsageError: The base has no chat template and none was named.
    """
    if wanted is not None and wanted.kind != "chat":
        return wanted
    if tokenizer is not None and not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{name} has no chat template: add --template plain (image, then text) or "
            "--template FILE.jinja."
        )
    return TemplateChoice()
