"""Load a saved graft with its base, its tower and its processor."""

from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from mmgraft import basefiles
from mmgraft.anatomy import Anatomy, decoder_layers, examine, get_path
from mmgraft.basefiles.files import vocabulary
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.chat.template import Template
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import CONFIG_NAME, OWN_BASE, WEIGHTS_NAME, GraftFile
from mmgraft.model.files.parts import execution_device, shape_parts, share_config
from mmgraft.model.kernels.quantization import assert_unquantized, leave_file, quantization_config
from mmgraft.model.workflow import Workflow
from mmgraft.textfiles import weight_files
from mmgraft.vision.projectors.registry import build_projector
from mmgraft.vision.spec import VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import TowerShape

Verify = Literal["fast", "full", "off"]
#: Relative distance of a fixed image's features that other machines explain.
_FEATURES_APART = 1e-3
_GRAFT_FILES = [
    "*.json",
    "*.safetensors",
    "*.yaml",
    "*.jinja",
    f"{OWN_BASE}/*",
    "vision/*",
    "tower/*",
]


def same_base(first: GraftFile, second: GraftFile, source: str | Path) -> None:
    """Refuse a graft that belongs to another base."""
    if not first.base.fingerprint or not second.base.fingerprint:
        return  # a base made in memory has none; the tensors' shapes must still fit
    difference = basefiles.compare_fingerprints(first.base.fingerprint, second.base.fingerprint)
    if difference is not None:
        raise UsageError(f"{source} belongs to another base ({difference}); load it by itself.")


def graft_folder(source: str | Path, revision: str | None = None) -> Path:
    """Return the local folder of a graft, downloaded from the Hub where ``source`` is an id."""
    path = Path(source)
    if path.is_dir():
        return path
    text = str(source)
    if text.count("/") != 1 or text.startswith((".", "/")):
        raise UsageError(f"{text} is neither a folder nor a Hub id (owner/name).")
    return basefiles.fetch(text, revision, _GRAFT_FILES, ignore=())


def base_files(
    record: GraftFile, folder: Path, override: str | None = None
) -> basefiles.ModelFiles:
    """Return where a graft's base lies."""
    if override is not None:
        return basefiles.resolve(override)
    if record.base.id.startswith("./"):
        return basefiles.resolve(str(folder / record.base.id))
    return basefiles.resolve(record.base.id, record.base.revision)


def local_tower(record: GraftFile, folder: Path) -> VisionSpec:
    """Return what loads a graft's tower; one that lies beside the graft is named by its path
    here.
    """
    name = record.vision.id
    if name is None or not name.startswith("./"):
        return record.vision
    return record.vision.model_copy(update={"id": str((folder / name).resolve())})


def same_tower(first: GraftFile, second: GraftFile) -> bool:
    """Return whether two grafts see with one tower: by what it is where known, else by name."""
    if first.vision_fingerprint and second.vision_fingerprint:
        return first.vision_fingerprint == second.vision_fingerprint
    return first.vision == second.vision


def check_tower(record: GraftFile, tower: VisionTower, verify: Verify) -> None:
    """Stop unless the tower gives the features that the graft was made with.

    Raises:
        UsageError: They differ: the tower's weights, or how its library reads them.
    """
    if verify == "off" or record.vision_features is None:
        return
    was, now = record.vision_features, version("transformers")
    theirs, ours = torch.tensor(was.sample), torch.tensor(tower.sample())
    apart = float((ours - theirs).norm() / theirs.norm()) if ours.shape == theirs.shape else 1.0
    if not apart <= _FEATURES_APART:
        raise UsageError(
            f"the vision tower {tower.spec.name} gives other features than this graft was made "
            f"with ({apart:.0%} apart; transformers {was.transformers} then, {now} now): use the "
            "versions it was made with, or graft and train again. --verify off loads it anyway."
        )


def check_base(record: GraftFile, files: basefiles.ModelFiles, verify: Verify) -> None:
    """Stop unless the base is the one that the graft was made for.

    Raises:
        UsageError: Names the first config field or tensor that differs.
    """
    if verify == "off" or not record.base.fingerprint:
        return
    tensors = record.base.fingerprint["tensors"].values()
    if verify == "full" and not all("full" in tensor for tensor in tensors):
        raise UsageError(
            "this graft recorded no hash of the whole base, so --verify full has nothing to "
            "compare with: use --verify fast, or graft again with --verify full."
        )
    now = basefiles.fingerprint(files, full=verify == "full")
    difference = basefiles.compare_fingerprints(record.base.fingerprint, now)
    if difference is not None:
        raise UsageError(
            f"{files.id} is not the base that this graft was made for: {difference}. "
            "Name the right one with --base, or graft again."
        )


def load_base(
    files: basefiles.ModelFiles,
    dtype: str | torch.dtype | None = None,
    device_map: Any = None,
    quantization: str | None = None,
    attn_implementation: str | None = None,
    quantization_storage: torch.dtype | None = None,
) -> PreTrainedModel:
    """Return the base alone, as transformers loads it: frozen, in eval mode."""
    wanted = getattr(torch, dtype) if isinstance(dtype, str) and dtype != "auto" else dtype
    options: dict[str, Any] = {"dtype": wanted or "auto"}
    compute = wanted if isinstance(wanted, torch.dtype) else torch.bfloat16
    quantized = quantization_config(quantization, compute, quantization_storage)
    given = {
        "quantization_config": quantized,
        "device_map": device_map,
        "attn_implementation": attn_implementation,
    }
    options |= {name: value for name, value in given.items() if value is not None}
    base = basefiles.load_whole(files, **options)
    if quantized is not None:
        leave_file(base)
    return base.requires_grad_(False).eval()


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return all tensors of a graft.

    Raises:
        UsageError: The file is missing or corrupt.
    """
    tensors: dict[str, Tensor] = {}
    try:
        for path in weight_files(folder, "graft", ".safetensors"):
            with safe_open(path, framework="pt") as file:
                tensors.update({key: file.get_tensor(key) for key in file.keys()})  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UsageError(
            f"the graft's weights in {folder} ({WEIGHTS_NAME}) are corrupt ({error}): "
            "copy them there once more, or graft again."
        ) from None
    if not tensors:
        raise UsageError(
            f"{folder} has a {CONFIG_NAME} but lacks {WEIGHTS_NAME}: copy it there, or graft again."
        )
    return tensors


def load_processor(
    record: GraftFile,
    tokenizer_folder: str | Path,
    tower: VisionTower | TowerShape | None,
    options: Mapping[str, Any] | None = None,
) -> GraftProcessor:
    """Make the processor that a graft's record describes.

    Args:
        record: The graft's ``graft_config.json``.
        tokenizer_folder: Where the base's tokenizer lies.
        tower: The tower that images go through; its shape is enough to count their positions.
        options: Variables of the chat template, such as ``enable_thinking``, beside those that
            the record has.

    Raises:
        UsageError: The base has no tokenizer, or its template does not know an option.
    """
    tokenizer = basefiles.find_tokenizer(Path(tokenizer_folder))
    if tokenizer is None:
        raise UsageError(
            f"the base {record.base.id} has no tokenizer that transformers can load; "
            "put its tokenizer files beside its weights."
        )
    template = Template(record.template.kind, record.template.text)
    shape = tower if isinstance(tower, TowerShape) else tower and TowerShape.of(tower)
    positions = 1 if shape is None else record.positions(shape)
    preprocess = getattr(tower, "preprocess", None)
    options = {**record.template.options, **(options or {})}
    return GraftProcessor(
        tokenizer,
        positions,
        record.image_token.id,
        template,
        preprocess,
        options,
        vocabulary(Path(tokenizer_folder)),
    )


def load_workflow(
    record: GraftFile,
    folder: Path,
    base: PreTrainedModel,
    dtype: torch.dtype,
    width: int,
    anatomy: Anatomy,
) -> Workflow:
    """Build a workflow's modules on the meta device and put the saved tensors in."""
    tensors = read_tensors(folder)
    workflow = build_workflow(record, base, width, anatomy)
    shared = {f"graft.{name}" for name in workflow.graft.shares()}
    wanted = {k: v for k, v in workflow.state_dict().items() if k not in shared}
    problem = _mismatch(wanted, tensors)
    if problem is not None:
        raise UsageError(f"{folder} does not hold what its {CONFIG_NAME} says: {problem}.")
    tensors = {k: v.to(dtype) if v.is_floating_point() else v for k, v in tensors.items()}
    workflow.load_state_dict(tensors, strict=False, assign=True)
    workflow.graft.tie()
    finish(workflow, base, anatomy)
    workflow.origin = folder
    return workflow


def _mismatch(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> str | None:
    for name in wanted:
        if name not in found:
            return f"tensor {name} is missing"
        if wanted[name].shape != found[name].shape:
            return f"{name} has shape {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
    extra = set(found) - set(wanted)
    return f"tensor {min(extra)} is unknown" if extra else None


def build_workflow(
    record: GraftFile, base: PreTrainedModel, width: int, anatomy: Anatomy | None = None
) -> Workflow:
    """Return a workflow's modules, without values, for the base at hand."""
    anatomy = examine(base) if anatomy is None else anatomy
    parts = shape_parts(base, anatomy)
    with torch.device("meta"):
        graft = get_method(record.method).load_graft()(record.settings, anatomy, parts)
        projector = build_projector(record.projector, width, anatomy.embedding_size)
    if record.state:
        graft.set_state(record.state)
    return Workflow(record.workflow, projector, graft, record)


def finish(workflow: Workflow, base: PreTrainedModel, anatomy: Anatomy) -> None:
    """Give a workflow the base's config and devices, fill buffers, and check that it is whole.

    Raises:
        MMGraftError: A tensor has no value (a method did not save it).
    """
    share_config(workflow.graft, base)
    layers = decoder_layers(base, anatomy)
    embedding = base.get_input_embeddings()
    placed: set[nn.Module | None] = set()
    for index, module in workflow.graft.layer_modules():
        _fill_buffers(module, layers[index])
        _to_device_of(module, layers[index])
        placed.add(module)
    twins = {
        "embedding": embedding,
        "norm": get_path(base, anatomy.norm_path) if anatomy.norm_path else None,
        "head": base.get_output_embeddings(),
    }
    for name, twin in twins.items():
        module = getattr(workflow.graft, name)
        if module is not None and twin is not None:
            _fill_buffers(module, twin)
            _to_device_of(module, twin)
        placed.add(module)
    for part in (*workflow.graft.children(), workflow.projector):
        if placed.isdisjoint(part.modules()):  # it stands before the first layer
            _to_device_of(part, embedding)
    for name, tensor in workflow.state_dict().items():
        if tensor.is_meta:
            raise MMGraftError(f"{workflow.name}.{name} was not saved by its method: no value.")
    assert_unquantized(workflow, f"workflow {workflow.name}")
    workflow.requires_grad_(False).eval()


def _fill_buffers(module: nn.Module, twin: nn.Module) -> None:
    """Take buffers that no file holds (tables computed at build time) from the base's layer."""
    own = dict(twin.named_buffers())
    for name, buffer in list(module.named_buffers()):
        if buffer.is_meta and name in own:
            parent, _, leaf = name.rpartition(".")
            module.get_submodule(parent)._buffers[leaf] = own[name].clone()


def _to_device_of(module: nn.Module, other: nn.Module) -> None:
    device = execution_device(other) or next((p.device for p in other.parameters()), None)
    if device is not None and device.type != "meta":
        module.to(device)
