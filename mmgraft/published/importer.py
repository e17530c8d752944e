"""Turns a checkpoint that the published IAA or Wings code wrote into grafts, a base and a tower.

    OUT/graft_config.json  OUT/graft.safetensors     the graft ``mm``
    OUT/grounding/...                                IAA's second graft, on the same base
    OUT/base/                                        the checkpoint's own base, unless it is --base
    OUT/tower/                                       its vision tower, where it has one inside

Tensors go from the checkpoint to the new files one at a time.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from mmgraft.basefiles import ModelFiles, find_tokenizer, fingerprint, resolve
from mmgraft.basefiles.tensor_files import LazyTensor, write_shards
from mmgraft.data.chat.placeholder import choose_placeholder
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.model.files.graft_file import (
    CONFIG_NAME,
    OWN_BASE,
    BaseReference,
    GraftFile,
    ImageToken,
    SeenFeatures,
    TemplateChoice,
)
from mmgraft.progress import say
from mmgraft.published.names import Published, PublishedGraft, read_published
from mmgraft.published.parts import (
    Source,
    TowerPlan,
    base_bytes,
    differs_from,
    open_source,
    plan_tower,
    write_base,
    write_tower,
)
from mmgraft.published.wings.config import OfficialWingsConfig

OWN_TOWER = "tower"
"""Folder inside a graft's folder that holds the vision tower."""


@dataclass(frozen=True)
class ImportedGraft:
    """One graft of an import: workflow, folder, settings and number of parameters."""

    workflow: str
    folder: str
    config: dict[str, Any]
    parameters: int


@dataclass(frozen=True)
class ImportReport:
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


@dataclass(frozen=True)
class _Import:
    """Everything that is known before the first file is written."""

    source: Source
    published: Published
    tower: TowerPlan
    base: ModelFiles | None  # None: the checkpoint's own
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
        reference = resolve(base)
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
    written = base_bytes(todo.source, published) if todo.base is None else 0
    for names in (published.tower_tensors, *(graft.tensors for graft in published.grafts)):
        written += sum(tensors[name].nbytes for name in names.values())
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
        base=str(out / OWN_BASE) if todo.base is None else todo.base.id,
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
            write_base(todo.source, todo.published, building / OWN_BASE)
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


def _shared_record(todo: _Import, building: Path) -> GraftFile:
    """Return the record that all grafts of an import share but for method and workflow."""
    files = todo.base or resolve(building / OWN_BASE)
    tokenizer = find_tokenizer(files.path)
    token, why = choose_placeholder(tokenizer, int(todo.published.base_config["vocab_size"]))
    own = todo.base is None
    vision, seen, features = todo.tower.spec, None, None
    if todo.published.tower_tensors:
        from mmgraft.vision.towers.registry import load_tower

        # The processor is proved to work before anything is moved into place.
        tower = load_tower(vision.model_copy(update={"id": str(building / OWN_TOWER)}))
        seen, features = tower.fingerprint(), SeenFeatures(sample=tower.sample())
        vision = vision.model_copy(update={"id": f"./{OWN_TOWER}"})
    chat = tokenizer is None or bool(getattr(tokenizer, "chat_template", None))
    return GraftFile(
        method=todo.published.method,
        config={},
        base=BaseReference(
            id=f"./{OWN_BASE}" if own else files.id,
            revision=files.revision,
            fingerprint=fingerprint(files),
        ),
        vision=vision,
        vision_fingerprint=seen,
        vision_features=features,
        image_token=ImageToken(id=token, why=why),
        template=TemplateChoice(kind="chat" if chat else "plain"),
        base_trained=own,
    )


def _write_graft(
    graft: PublishedGraft,
    tensors: Mapping[str, LazyTensor],
    shared: GraftFile,
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
    (folder / CONFIG_NAME).write_text(record.dump(), encoding="utf-8")


def _move_in(building: Path, out: Path) -> None:
    """Put what was built in its place; the graft's record, which makes it one, comes last."""
    if not out.exists():
        building.rename(out)
        return
    (out / CONFIG_NAME).unlink(missing_ok=True)
    for stale in out.glob("graft*.safetensors*"):
        stale.unlink()
    for piece in sorted(building.iterdir(), key=lambda path: path.name == CONFIG_NAME):
        target = out / piece.name
        if target.is_dir():
            shutil.rmtree(target)
        piece.replace(target)
