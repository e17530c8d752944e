"""Make a fresh graft: on a loaded base, or from files without ever loading the base."""

from pathlib import Path
from typing import Any, cast

import torch
from jinja2.exceptions import TemplateSyntaxError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from mmgraft import basefiles
from mmgraft.anatomy import Anatomy
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import Template, check_template, resolve_template
from mmgraft.errors import UsageError, brief
from mmgraft.grafts.method import Method
from mmgraft.grafts.registry import get_method, methods
from mmgraft.layers import parse_layers
from mmgraft.model.files.graft_file import BaseReference, GraftFile, TemplateChoice
from mmgraft.model.files.parts import LoadedParts, ReadParts, check_layers, make_workflow
from mmgraft.model.files.save import graft_tensors, write_graft
from mmgraft.model.trial import refusal
from mmgraft.model.workflow import Workflow
from mmgraft.strict import StrictModel
from mmgraft.vision.projectors.configs import MlpConfig, ProjectorConfig
from mmgraft.vision.spec import TRANSFORMERS_KIND, VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import TowerShape, describe_tower

_GIVEN: dict[str, tuple[Any, str]] = {
    "base": (str | Path | torch.nn.Module, "a Hub id, a folder or a loaded causal LM"),
    "vision": (str | Path | VisionSpec | VisionTower | None, "a name, a VisionSpec or a tower"),
    "config": (StrictModel, 'settings of a method, such as IAAConfig(layers="22,24")'),
    "projector": (ProjectorConfig | None, "settings of a projector, such as PoolConfig(k=2)"),
    "template": (TemplateChoice | None, 'a template, such as TemplateChoice(kind="plain")'),
}


def check_given(**given: Any) -> None:
    """Refuse arguments of another type, by name, with what to write instead.

    Raises:
        UsageError: One of them is no base, tower, settings or template.
    """
    for name, value in given.items():
        types, example = _GIVEN[name]
        if not isinstance(value, types) or (name == "config" and not hasattr(value, "method")):
            raise UsageError(f"{name}={brief(repr(value))} cannot be used: give {example}.")


def make_on_loaded(
    base: PreTrainedModel,
    anatomy: Anatomy,
    config: StrictModel,
    workflow: str,
    projector: ProjectorConfig,
    template: TemplateChoice | None,
    tower: VisionTower | None,
    tokenizer: PreTrainedTokenizerBase | None,
) -> Workflow:
    """Make a fresh workflow on a base in memory."""
    if getattr(base, "is_quantized", False):
        raise UsageError(
            "this base is held in 4-bit, so its exact tensors are gone: name the base by id "
            "or folder and give quantization='nf4'."
        )
    _copied_layers(config, anatomy)
    _refuse(get_method(cast(Any, config).method), anatomy, base)
    reference = BaseReference(id=base.config._name_or_path or "unknown")
    parts, chosen = LoadedParts(base, anatomy), template or TemplateChoice()
    return make_workflow(
        config, anatomy, parts, workflow, projector, tower, reference, tokenizer, chosen
    )


def create_graft(
    base: str,
    vision: str | VisionSpec,
    config: StrictModel,
    folder: str | Path,
    *,
    workflow: str = "mm",
    projector: ProjectorConfig | None = None,
    template: TemplateChoice | None = None,
    revision: str | None = None,
    full_fingerprint: bool = False,
    seed: int = 0,
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
        seed: Of new tensors that do not start as copies or zero.
        dry_run: Check everything and write nothing.

    Returns:
        The record that was written.

    Raises:
        UsageError: An unknown base or tower, or settings that do not fit them; nothing is written.
    """
    check_given(base=base, vision=vision, config=config, projector=projector, template=template)
    spec = VisionSpec.from_name(vision) if isinstance(vision, str) else vision
    spec = _pinned(spec)
    shape = describe_tower(spec)
    files = basefiles.resolve(base, revision)
    made = make_from_files(files, config, workflow, projector or MlpConfig(), template, shape, seed)
    if full_fingerprint:
        made.record.base.fingerprint = basefiles.fingerprint(files, full=True)
    made.record.vision = spec
    if not dry_run:
        write_graft(Path(folder), made.record, graft_tensors(made))
    return made.record


def _pinned(spec: VisionSpec) -> VisionSpec:
    """Return the spec with the whole path of a local tower, and the commit of one on the Hub."""
    if spec.id is None:
        return spec
    if Path(spec.id).expanduser().is_dir():
        return spec.model_copy(update={"id": str(Path(spec.id).expanduser().resolve())})
    if spec.kind != TRANSFORMERS_KIND:
        return spec
    from mmgraft.vision.towers.transformers import locate

    return spec.model_copy(update={"revision": locate(spec)[1]})


def make_from_files(
    files: basefiles.ModelFiles,
    config: StrictModel,
    workflow: str,
    projector: ProjectorConfig,
    template: TemplateChoice | None,
    tower: VisionTower | TowerShape | None,
    seed: int = 0,
) -> Workflow:
    """Make a fresh workflow from a base's files, of which it reads what it copies.

    Args:
        files: The base's.
        config: The method's settings.
        workflow: Its name.
        projector: Its shape and start.
        template: How conversations become text.
        tower: The tower, or its shape, which leaves the record to name it.
        seed: Of new tensors that do not start as copies or zero.
    """
    base_config = basefiles.load_config(files)
    with basefiles.TensorReader(files) as reader:
        blank, anatomy = basefiles.examine_files(reader, base_config)
        indices = _copied_layers(config, anatomy)
        _refuse(get_method(cast(Any, config).method), anatomy, blank)
        tokenizer = basefiles.find_tokenizer(files.path)
        chosen = choose_template(tokenizer, template, files.id)
        if tokenizer is not None:
            _check_vocabulary(tokenizer, chosen, anatomy.vocab_size)
        reference = BaseReference(
            id=files.id, revision=files.revision, fingerprint=basefiles.fingerprint(files)
        )
        owns = [name for name in ("embedding", "norm", "head") if getattr(config, name, False)]
        parts = ReadParts(reader, base_config, indices, owns, anatomy)
        return make_workflow(
            config, anatomy, parts, workflow, projector, tower, reference, tokenizer, chosen, seed
        )


def _copied_layers(config: Any, anatomy: Anatomy) -> list[int]:
    """Return the layers that a method names, checked against the base."""
    if getattr(config, "layers", None) is None:
        return []
    indices = parse_layers(config.layers, anatomy.num_layers)
    check_layers(indices, anatomy)
    return indices


def _refuse(method: Method, anatomy: Anatomy, base: PreTrainedModel) -> None:
    """Refuse a method that does not keep its promises on a base."""
    reason = refusal(method, anatomy, base)
    if reason is not None:
        others = [name for name, one in methods().items() if not refusal(one, anatomy, base)]
        raise UsageError(
            f"method {method.name} cannot be used on this base: {reason}. Methods that can: "
            f"{', '.join(others) or 'none'}."
        )


def _check_vocabulary(
    tokenizer: PreTrainedTokenizerBase, chosen: TemplateChoice, vocab_size: int
) -> None:
    """Refuse a base whose template writes tokens that its embedding has no rows for."""
    template = Template(chosen.kind, chosen.text)
    processor = GraftProcessor(tokenizer, 1, 0, template, options=chosen.options)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
    try:
        ids = processor.encode(turns, add_generation_prompt=False).input_ids
    except UsageError as error:
        if isinstance(error.__cause__, TemplateSyntaxError):
            raise
        return  # it wants other turns than these
    processor.vocab_size = vocab_size
    processor.check_ids(ids, "the template of this base")


def choose_template(
    tokenizer: PreTrainedTokenizerBase | None, wanted: TemplateChoice | None, name: str
) -> TemplateChoice:
    """Return the template of a graft: what the user asked for, else the base's own; never a guess.

    Raises:
        UsageError: The base has no chat template and none was named, none of several is chosen, or
            an option is no variable of the template.
    """
    wanted = wanted or TemplateChoice()
    if tokenizer is None:
        return wanted
    if wanted.kind == "chat" and wanted.text is not None:
        named = resolve_template(wanted.text, tokenizer)
        wanted = wanted.model_copy(update={"kind": named.kind, "text": named.text})
    if wanted.kind == "chat" and not getattr(tokenizer, "chat_template", None):
        raise UsageError(
            f"{name} has no chat template: add --template plain (image, then text) or "
            "--template FILE.jinja."
        )
    check_template(Template(wanted.kind, wanted.text), tokenizer, wanted.options)
    return wanted
