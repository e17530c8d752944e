"""Turns a checkpoint that the published IAA or Wings code wrote into grafts, a base and a tower.

    OUT/graft_config.json  OUT/graft.safetensors     the graft ``mm``
    OUT/grounding/...                                IAA's second graft, on the same base
    OUT/base/                                        the checkpoint's own base, unless it is --base
    OUT/tower/                                       its vision tower, where it has one inside

The checkpoint is a folder, a Hub id, or (for a look) its headers on the Hub. Its base is compared
with the original, or written as its own; its tower is inside it, or named. Tensors go from the
checkpoint to the new files one shard at a time.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor

from mmgraft import basefiles
from mmgraft.anatomy import skeleton
from mmgraft.basefiles.files import SMALL
from mmgraft.basefiles.tensor_files import DTYPES, LazyTensor, open_tensors, write_shards
from mmgraft.data.chat.placeholder import choose_placeholder
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.frozen import Frozen
from mmgraft.model.files import graft_file
from mmgraft.progress import counted, say
from mmgraft.published.names import Published, PublishedGraft, read_published
from mmgraft.published.wings.config import OfficialWingsConfig
from mmgraft.textfiles import read_json
from mmgraft.vision.preprocessing import stored_processor
from mmgraft.vision.spec import VisionSpec

TOWER_FILES = ["preprocessor_config.json", "vision_config.json"]
_SMALL = [*SMALL, *TOWER_FILES]


class Source(Frozen):
    """A published checkpoint.

    Attributes:
        name: What the user called it.
        tensors: Its tensors by their published names.
        files: Small files beside them, by name.
        readable: False where only the tensors' names and shapes are known.
    """

    name: str
    tensors: Mapping[str, LazyTensor]
    files: dict[str, Path]
    readable: bool = True

    @cached_property
    def config(self) -> dict[str, Any]:
        """Return its config.json."""
        config = self.read_json("config.json")
        if config is None:
            raise UsageError(
                f"{self.name} has no config.json; give the folder of a whole checkpoint"
            )
        return config

    def read_json(self, name: str) -> dict[str, Any] | None:
        """Return a small file's content, or None where the checkpoint lacks it.

        Raises:
            UsageError: When it is no JSON object.
        """
        return None if name not in self.files else read_json(self.files[name], "fetch it again")


def open_source(name: str, revision: str | None = None, headers_only: bool = False) -> Source:
    """Open a checkpoint by folder or Hub id.

    Args:
        name: The folder or the id.
        revision: Commit, branch or tag on the Hub.
        headers_only: Of a Hub id fetch names and shapes only, a few MB at most.

    Raises:
        UsageError: When there is no such checkpoint, or it misses its config or tensors.
        MMGraftError: When the Hub cannot be reached.
    """
    on_hub = not Path(name).expanduser().is_dir()
    if headers_only and on_hub:
        return _from_headers(name, revision)
    found = basefiles.resolve(name, revision)
    if on_hub:  # no base has such files, so they were not fetched with it
        basefiles.fetch(name, found.revision, TOWER_FILES)
    return Source(name, open_tensors(found.path), _small_files(found.path))


def _small_files(folder: Path) -> dict[str, Path]:
    return {path.name: path for pattern in _SMALL for path in folder.glob(pattern)}


def _from_headers(name: str, revision: str | None) -> Source:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import NotASafetensorsRepoError

    try:
        metadata = HfApi().get_safetensors_metadata(name, revision=revision)
    except NotASafetensorsRepoError:
        raise UsageError(
            f"{name} holds pickled tensors, whose names cannot be read without all of them; "
            "leave --dry-run out, or download it and give its folder"
        ) from None

    def unread() -> Tensor:
        raise RuntimeError(f"only the headers of {name} were fetched")

    tensors = {
        tensor: LazyTensor(tuple(info.shape), DTYPES[info.dtype], unread)
        for file in metadata.files_metadata.values()
        for tensor, info in file.tensors.items()
    }
    files = _small_files(basefiles.fetch(name, revision, _SMALL))
    return Source(name, tensors, files, readable=False)


_CLASSES = {"clip_vision_model": "CLIPVisionModel", "siglip_vision_model": "SiglipVisionModel"}
_PROCESSOR = "preprocessor_config.json"


class TowerPlan(Frozen):
    """Reference of an imported graft to its tower.

    Attributes:
        spec: What loads it; its id is a placeholder where it is written beside the graft.
        config: Config of a tower that is written.
        processor: Image processor of a tower that is written.
        notes: What the user should know.
    """

    spec: VisionSpec
    config: dict[str, Any] = field(default_factory=dict)
    processor: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)


def plan_tower(source: Source, published: Published, named: str | None) -> TowerPlan:
    """Decide where the tower comes from.

    Args:
        source: The checkpoint.
        published: What is in it.
        named: Hub id or folder to use instead of the one that the checkpoint names.

    Raises:
        UsageError: When config or weights of the tower cannot be found.
    """
    spec = VisionSpec(id=named or published.tower_id, feature_layer=published.feature_layer)
    if not published.tower_tensors:
        if spec.id is None or not _findable(spec.id):
            raise UsageError(
                f"the checkpoint has no vision tower inside and names {spec.id!r}, which is no "
                "folder here and no Hub id; give the tower it was trained with by --tower"
            )
        return TowerPlan(spec)
    config = source.read_json("vision_config.json") or _config_of(spec.id)
    if config is None or config.get("model_type") not in _CLASSES:
        kind = "no vision_config.json" if config is None else repr(config.get("model_type"))
        raise UsageError(
            f"the checkpoint's vision tower has {kind}, and {spec.id!r} gives no CLIP or SigLIP "
            "config; name the tower it was made from by --tower (a Hub id or a folder)"
        )
    width = source.tensors["model.mm_projector.0.weight"].shape[1]
    if config["hidden_size"] != width:
        raise UsageError(
            f"the tower's config says {config['hidden_size']} features and the checkpoint's "
            f"projector takes {width}; name the right tower by --tower"
        )
    notes: list[str] = []
    processor = source.read_json(_PROCESSOR) or _processor_of(spec.id)
    if processor is None:
        processor = _default_processor(config)
        notes.append(
            f"no image processor came with the checkpoint; the tower has {config['model_type']}'s "
            "own means and sizes"
        )
    if source.config.get("image_aspect_ratio") == "pad":
        notes.append(
            "the published code pads an image to a square before the image processor resizes it, "
            "which mmgraft does not do: pad images beforehand to see them as it did"
        )
    return TowerPlan(spec, _plain_config(config), processor, notes)


def write_tower(source: Source, published: Published, plan: TowerPlan, folder: Path) -> None:
    """Write the tower inside the checkpoint as an ordinary transformers folder."""
    tensors = {ours: source.tensors[name] for ours, name in published.tower_tensors.items()}
    write_shards(folder, "model", tensors)
    for name, data in (("config.json", plan.config), (_PROCESSOR, plan.processor)):
        (folder / name).write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _findable(name: str) -> bool:
    is_id = name.count("/") == 1 and not name.startswith((".", "/", "~"))
    return is_id or Path(name).expanduser().is_dir()


def _config_of(name: str | None) -> dict[str, Any] | None:
    """Return the vision config of a model on the Hub or in a folder, or None."""
    if name is None or not _findable(name):
        return None
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError):
        return None
    return getattr(config, "vision_config", config).to_dict()


def _processor_of(name: str | None) -> dict[str, Any] | None:
    """Return the image processor's settings of a model on the Hub or in a folder, or None."""
    found = name is not None and _findable(name)
    return stored_processor(Path(name).expanduser()) if found and name else None


def _plain_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config with the fields alone that its class has today."""
    known = transformers.CONFIG_MAPPING[config["model_type"]]().to_dict()
    dropped = ("_name_or_path", "transformers_version", "id2label", "label2id", "dtype")
    kept = {key: config[key] for key in known if key in config and key not in dropped}
    return {**kept, "architectures": [_CLASSES[config["model_type"]]]}


def _default_processor(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that transformers has for CLIP and SigLIP, at the tower's size."""
    size = config["image_size"]
    square = {"height": size, "width": size}
    if config["model_type"] == "siglip_vision_model":
        return transformers.SiglipImageProcessorPil(size=square).to_dict()
    return transformers.CLIPImageProcessorPil(
        size={"shortest_edge": size}, crop_size=square
    ).to_dict()


_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_CONFIGS = {
    "LlamaForCausalLM": transformers.LlamaConfig,
    "Qwen2ForCausalLM": transformers.Qwen2Config,
}
_DECIDING = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters"),
    *("use_sliding_window", "attention_bias", "mlp_bias"),
)


def base_config(source: Source, published: Published) -> transformers.PreTrainedConfig:
    """Return the config of the checkpoint's base, as of a plain model.

    Raises:
        UsageError: When the base's tensors are not those of its config.
    """
    dtype = source.tensors[_EMBEDDING].dtype if _EMBEDDING in source.tensors else torch.float32
    config = _CONFIGS[published.base_class](
        **published.base_config, architectures=[published.base_class], dtype=dtype
    )
    wanted = {name: tuple(t.shape) for name, t in skeleton(config).state_dict().items()}
    found = {name: source.tensors[name].shape for name in published.base_tensors}
    if config.tie_word_embeddings:
        wanted.pop(_HEAD, None)
    for name in sorted(wanted.keys() | (found.keys() - {_HEAD})):
        if found.get(name) != wanted.get(name):
            raise UsageError(
                f"{source.name} is no whole {published.base_class}: tensor {name} has shape "
                f"{found.get(name, 'none')} and its config says {wanted.get(name, 'none')}; "
                "the download may be incomplete: fetch it again"
            )
    return config


def differs_from(source: Source, published: Published, files: basefiles.ModelFiles) -> str | None:
    """Return the first difference between the checkpoint's base and another model, in words.

    Tensors stored in another dtype are equal when casting the other model's to the checkpoint's
    dtype gives the checkpoint's, bit for bit.
    """
    ours, theirs = base_config(source, published), basefiles.load_config(files)
    if theirs.model_type != ours.model_type:
        return f"it is a {theirs.model_type} model, and the checkpoint's base is {ours.model_type}"
    for name in _DECIDING:
        one, other = getattr(ours, name, None), getattr(theirs, name, None)
        if one != other:
            return f"config field {name} is {other}, and {one} in the checkpoint"
    with basefiles.TensorReader(files) as reader:
        return _tensor_difference(source, published, reader)


def _tensor_difference(
    source: Source, published: Published, reader: basefiles.TensorReader
) -> str | None:
    names = set(reader.keys())
    for name in counted("comparing tensors of the base", published.base_tensors):
        other = _EMBEDDING if name == _HEAD and name not in names else name
        if other not in names:
            return f"it has no tensor {name}"
        if tuple(reader.shape(other)) != source.tensors[name].shape:
            shapes = tuple(reader.shape(other)), source.tensors[name].shape
            return f"tensor {name} has shape {shapes[0]}, and {shapes[1]} in the checkpoint"
        if not _same(reader.get(other), source.tensors[name].read()):
            return f"tensor {name} has other values"
    # A head that the checkpoint leaves to its embedding.
    if _HEAD in names and _HEAD not in published.base_tensors:
        same = _same(reader.get(_HEAD), source.tensors[_EMBEDDING].read())
        return None if same else f"tensor {_HEAD} has other values"
    return None


def _same(theirs: Tensor, ours: Tensor) -> bool:
    return torch.equal(theirs.to(ours.dtype), ours)


def write_base(source: Source, published: Published, folder: Path) -> None:
    """Write the checkpoint's base as an ordinary model folder, tokenizer included."""
    config = base_config(source, published)
    tensors = {name: source.tensors[name] for name in published.base_tensors}
    if config.tie_word_embeddings and _HEAD in tensors:
        if torch.equal(tensors[_HEAD].read(), tensors[_EMBEDDING].read()):
            del tensors[_HEAD]
        else:
            config.tie_word_embeddings = False
    write_shards(folder, "model", tensors)
    config.save_pretrained(folder)
    for name in source.files.keys() - {"config.json", *TOWER_FILES}:
        shutil.copyfile(source.files[name], folder / name)


#: Folder inside a graft's folder that holds the vision tower.
OWN_TOWER = "tower"


class ImportedGraft(Frozen):
    """One graft of an import: workflow, folder, settings and number of parameters."""

    workflow: str
    folder: str
    config: dict[str, Any]
    parameters: int


class ImportReport(Frozen):
    """Result of an import, or of a dry run.

    Attributes:
        source: The checkpoint.
        folder: Where its grafts are.
        method: ``iaa`` or ``wings-official``.
        grafts: The grafts, the default one first.
        base: Hub id or folder of the base.
        own_base: Whether the base is the checkpoint's own.
        difference: Why it is not the base that was named; None where it is, or none was.
        tower: Hub id or folder of the vision tower.
        bytes: Size of the new tensor files.
        notes: What the user should know.
    """

    source: str
    folder: str
    method: str
    grafts: list[ImportedGraft]
    base: str
    own_base: bool
    difference: str | None
    tower: str
    bytes: int
    notes: list[str]


class _Import(Frozen):
    """Everything that is known before the first file is written."""

    source: Source
    published: Published
    tower: TowerPlan
    base: basefiles.ModelFiles | None  # None: the checkpoint's own
    difference: str | None
    notes: list[str]


def import_checkpoint(
    source: str | Path,
    out_dir: str | Path,
    base: str | None = None,
    *,
    layers: str | None = None,
    tower: str | None = None,
    revision: str | None = None,
    force: bool = False,
    dry_run: bool = False,
) -> ImportReport:
    """Import a published checkpoint.

    Args:
        source: Its folder, or its Hub id.
        out_dir: Where the grafts go; nothing appears there before everything is written.
        base: The model that the checkpoint's base may be. If every tensor is equal, the grafts
            refer to it; if not, or without it, the checkpoint's own base is written beside them.
        layers: Base layers that IAA's inserted layers follow, where the checkpoint does not say.
        tower: The vision tower that it was trained with, instead of the one it names: its config
            and image processor are used, and its weights where the checkpoint has none.
        revision: Of the checkpoint on the Hub.
        force: Write into a folder that is not empty.
        dry_run: Write nothing; of a Hub id fetch names and shapes only.

    Raises:
        UsageError: For a checkpoint of another kind, missing files, and an ``out_dir`` in use.
        MMGraftError: When the disk is full; ``out_dir`` is as it was.
    """
    out = Path(out_dir).expanduser()
    if not force and out.is_dir() and any(out.iterdir()):
        raise UsageError(f"{out} is not empty; choose another folder, or add --force")
    opened = open_source(str(source), revision, headers_only=dry_run)
    shapes = {name: tensor.shape for name, tensor in opened.tensors.items()}
    published = read_published(shapes, opened.config, layers)
    plan = plan_tower(opened, published, tower)
    reference, difference = None, None
    if base is not None and opened.readable:
        reference = basefiles.resolve(base)
        say(f"comparing every tensor of the base with {reference.id}")
        difference = differs_from(opened, published, reference)
    notes = [*_base_notes(opened, published, base, difference), *plan.notes]
    notes += _other_notes(opened, published)
    todo = _Import(opened, published, plan, None if difference else reference, difference, notes)
    if not dry_run:
        _write(todo, out)
    return _report(todo, str(source), out)


def _report(todo: _Import, source: str, out: Path) -> ImportReport:
    tensors, published = todo.source.tensors, todo.published
    names = [] if todo.base is not None else [*published.base_tensors]
    for of_one in (published.tower_tensors, *(graft.tensors for graft in published.grafts)):
        names += of_one.values()
    written = sum(tensors[name].nbytes for name in names)
    return ImportReport(
        source=source,
        folder=str(out),
        method=published.method,
        grafts=[
            ImportedGraft(
                workflow=graft.workflow,
                folder=str(_folder_of(graft, published, out)),
                config=graft.config.model_dump(mode="json"),
                parameters=sum(tensors[name].numel for name in graft.tensors.values()),
            )
            for graft in published.grafts
        ],
        base=str(out / graft_file.OWN_BASE) if todo.base is None else todo.base.id,
        own_base=todo.base is None,
        difference=todo.difference,
        tower=str(out / OWN_TOWER) if published.tower_tensors else str(todo.tower.spec.id),
        bytes=written,
        notes=todo.notes,
    )


def _base_notes(
    source: Source, published: Published, base: str | None, difference: str | None
) -> list[str]:
    if base is not None and not source.readable:
        return [f"whether its base equals {base} is compared when it is imported"]
    if base is not None and difference is None:
        return [f"its base equals {base} tensor by tensor: text answers are those of {base}"]
    note = "text answers are those of this checkpoint's own base, not of the original LLM"
    if difference is not None:
        return [f"{note}: compared with {base}, {difference}"]
    settings = published.grafts[0].config
    if isinstance(settings, OfficialWingsConfig) and settings.routed:
        return [f"{note}: Wings' second stage trains it"]
    return [f"{note}, unless they are equal: name the original with --base to compare them"]


def _other_notes(source: Source, published: Published) -> list[str]:
    notes = []
    if isinstance(published.grafts[0].config, OfficialWingsConfig):
        notes.append(
            "the graft is of method wings-official, the published code's computation with its "
            "defects: earlier answers depend on later tokens, nothing is cached, no training"
        )
    if published.left_out:
        notes.append(f"{len(published.left_out)} tensors are not used by the published code either")
    if not any(name.startswith("tokenizer") for name in source.files):
        notes.append("no tokenizer came with the checkpoint; only ids can be given to its own base")
    return notes


def _folder_of(graft: PublishedGraft, published: Published, out: Path) -> Path:
    return out if graft is published.grafts[0] else out / graft.workflow


def _write(todo: _Import, out: Path) -> None:
    """Write everything beside ``out``, then move it there."""
    out = out.resolve()
    building = out.with_name(f".{out.name}.importing")
    shutil.rmtree(building, ignore_errors=True)
    try:
        building.mkdir(parents=True)
        if todo.base is None:
            say("writing the checkpoint's own base")
            write_base(todo.source, todo.published, building / graft_file.OWN_BASE)
        if todo.published.tower_tensors:
            say("writing its vision tower")
            write_tower(todo.source, todo.published, todo.tower, building / OWN_TOWER)
        record = _shared_record(todo, building)
        for graft in todo.published.grafts:
            say(f"writing the graft {graft.workflow}")
            folder = _folder_of(graft, todo.published, building)
            _write_graft(graft, todo.source.tensors, record, folder, up=folder != building)
        _move_in(building, out)
    except (OSError, SafetensorError) as error:
        raise MMGraftError(
            f"could not write {out} ({error}); what stood there is as it was. Make room, or choose "
            "another folder, and run the command again"
        ) from error
    finally:
        shutil.rmtree(building, ignore_errors=True)


def _shared_record(todo: _Import, building: Path) -> graft_file.GraftFile:
    """Return the record that all grafts of an import share but for method and workflow."""
    files = todo.base or basefiles.resolve(building / graft_file.OWN_BASE)
    tokenizer = basefiles.find_tokenizer(files.path)
    token, why = choose_placeholder(tokenizer, int(todo.published.base_config["vocab_size"]))
    own = todo.base is None
    vision, seen, features = todo.tower.spec, None, None
    if todo.published.tower_tensors:
        from mmgraft.vision.towers.registry import load_tower

        # The processor is proved to work before anything is moved into place.
        tower = load_tower(vision.model_copy(update={"id": str(building / OWN_TOWER)}))
        seen, features = tower.fingerprint(), graft_file.SeenFeatures(sample=tower.sample())
        vision = vision.model_copy(update={"id": f"./{OWN_TOWER}"})
    chat = tokenizer is None or bool(getattr(tokenizer, "chat_template", None))
    return graft_file.GraftFile(
        method=todo.published.method,
        config={},
        base=graft_file.BaseReference(
            id=f"./{graft_file.OWN_BASE}" if own else files.id,
            revision=files.revision,
            fingerprint=basefiles.fingerprint(files),
        ),
        vision=vision,
        vision_fingerprint=seen,
        vision_features=features,
        image_token=graft_file.ImageToken(id=token, why=why),
        template=graft_file.TemplateChoice(kind="chat" if chat else "plain"),
        base_trained=own,
    )


def _write_graft(
    graft: PublishedGraft,
    tensors: Mapping[str, LazyTensor],
    shared: graft_file.GraftFile,
    folder: Path,
    up: bool,
) -> None:
    """Write one graft; with ``up`` the base and the tower beside it are one folder higher."""

    def place(name: str | None) -> str | None:
        return f"./../{name.removeprefix('./')}" if up and name and name.startswith("./") else name

    record = shared.model_copy(
        update={
            "workflow": graft.workflow,
            "config": graft.config.model_dump(mode="json"),
            "base": shared.base.model_copy(update={"id": place(shared.base.id)}),
            "vision": shared.vision.model_copy(update={"id": place(shared.vision.id)}),
        }
    )
    chosen = {ours: tensors[name] for ours, name in graft.tensors.items()}
    write_shards(folder, "graft", chosen, {"method": record.method, "workflow": record.workflow})
    (folder / "config.json").write_text(record.dump_config(), encoding="utf-8")
    (folder / graft_file.CONFIG_NAME).write_text(record.dump(), encoding="utf-8")


def _move_in(building: Path, out: Path) -> None:
    """Put what was built in its place; the graft's record, which makes it one, comes last."""
    if not out.exists():
        building.rename(out)
        return
    (out / graft_file.CONFIG_NAME).unlink(missing_ok=True)
    for stale in out.glob("graft*.safetensors*"):
        stale.unlink()
    for piece in sorted(building.iterdir(), key=lambda path: path.name == graft_file.CONFIG_NAME):
        target = out / piece.name
        if target.is_dir():
            shutil.rmtree(target)
        piece.replace(target)
