"""A graft in a folder of its own: alone, as ``mmgraft push`` sends it, or with base and tower."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers import GenerationConfig

from mmgraft.atomic import atomic_folder, atomic_json, atomic_text
from mmgraft.basefiles import ModelFiles, TensorReader, find_tokenizer, load_config, resolve
from mmgraft.errors import UsageError
from mmgraft.export.folder import Exported, copy_file, sizes_in
from mmgraft.hub.card import WHAT, card_of, has_own_readme, local_references
from mmgraft.model.files.graft_file import CONFIG_NAME, OWN_BASE, GraftFile
from mmgraft.model.files.load import base_files, check_base, load_processor, local_tower
from mmgraft.progress import counted, say
from mmgraft.runs.contents import README, UploadFile, belonging
from mmgraft.textfiles import read_json
from mmgraft.vision.spec import TRANSFORMERS_KIND, VisionSpec
from mmgraft.vision.towers.registry import load_tower

#: Folder inside a graft's folder that holds its vision tower.
OWN_TOWER = "vision"

_KEPT = (
    "*.json", "*.model", "*.txt", "*.jinja", "*.tiktoken", "additional_chat_templates/*.jinja",
    "LICENSE*", "NOTICE*", "USE_POLICY*", "README.md",
)  # fmt: skip
_OF_TRAINING = ("trainer_state.json", "*.index.json", "adapter_*")


def export_full(run: Path, out: Path, base: str | None = None, dry_run: bool = False) -> Exported:
    """Copy base and tower beside the graft, and let its record name them there.

    Args:
        run: The graft's folder.
        out: See :func:`mmgraft.export.folder.check_folder`.
        base: Where the base lies, when not where the record says.
        dry_run: List the large files and write nothing.

    Raises:
        UsageError: A damaged graft, or a base that is not the one it was made for.
        MMGraftError: The disk is full; what stood in ``out`` is whole.
    """
    record = GraftFile.read(run)
    files = base_files(record, run, base)
    say(f"checking the base {files.id}")
    check_base(record, files, "fast")
    own = belonging(run)
    copied = _files_of(files)
    notes = _notes(record)
    if dry_run:
        listed = {f.name: f.size for f in own}
        listed |= {f"{OWN_BASE}/{name}": path.stat().st_size for name, path in copied.items()}
        return Exported("full", out, record.workflow, listed, notes, written=False)

    def write(folder: Path) -> None:
        say(f"copying the base, {len(copied)} files")
        for name, path in counted("copying the base, files", copied.items()):
            copy_file(path, folder / OWN_BASE / name)
        _end_answers(record, files, folder / OWN_BASE)
        say(f"writing the vision tower {record.vision.name}")
        vision, seen = _write_tower(local_tower(record, run), folder)
        reference = record.base.model_copy(update={"id": f"./{OWN_BASE}", "revision": None})
        whole = record.model_copy(
            update={"base": reference, "vision": vision, "vision_fingerprint": seen}
        )
        write_files(folder, own)
        write_record(folder, run, whole, out.name, [file.name for file in own])
        say("checking the copy")
        check_base(whole, resolve(folder / OWN_BASE), "fast")

    atomic_folder(out, write)
    return Exported("full", out, record.workflow, sizes_in(out), notes)


def _notes(record: GraftFile) -> list[str]:
    notes = [f"it carries one workflow, {record.workflow}, with its base and what it sees with"]
    if record.base_trained:
        notes.append("its base was trained: text is that base's, not the original model's")
    if record.vision.kind != TRANSFORMERS_KIND:
        notes.append(
            f"the vision tower {record.vision.kind} comes with a package and stays in it: loading "
            "needs that package installed"
        )
    return notes


def _files_of(files: ModelFiles) -> dict[str, Path]:
    """Return the files of a base by name: config, tokenizer, licence, and the weights in use."""
    found: set[Path] = set()
    for pattern in _KEPT:
        found |= {path for path in files.path.glob(pattern) if path.is_file()}
    for pattern in _OF_TRAINING:
        found -= set(files.path.glob(pattern))
    if files.gguf is not None:
        found.add(files.path / files.gguf)
    elif files.slow is not None:
        found |= set(files.path.glob("pytorch_model*.bin*"))
    else:
        with TensorReader(files) as reader:
            entries = [reader.entry(key) for key in reader]
        found |= {entry.file for entry in entries if entry is not None}
        found |= set(files.path.glob("model.safetensors.index.json"))
    return {path.relative_to(files.path).as_posix(): path for path in sorted(found)}


def _end_answers(record: GraftFile, files: ModelFiles, folder: Path) -> None:
    """Let whatever loads the copied base end its answers where the graft's template ends them."""
    if files.gguf is not None or find_tokenizer(files.path) is None:
        return
    path = folder / "generation_config.json"
    if path.is_file():
        settings = read_json(path, "fetch it again")
    else:
        settings = GenerationConfig.from_model_config(load_config(files)).to_diff_dict()
    own = settings.get("eos_token_id")
    ends = load_processor(record, files.path, None).answers.with_ends(own)
    if ends != own:
        atomic_json(path, {**settings, "eos_token_id": ends})


def _write_tower(spec: VisionSpec, folder: Path) -> tuple[VisionSpec, str]:
    """Save the tower beside the graft; a kind that writes nothing keeps its own spec."""
    target = folder / OWN_TOWER
    tower = load_tower(spec)
    saved = tower.save(target)
    if saved.id is None or Path(saved.id) != target:
        return saved, tower.fingerprint()
    if load_tower(saved).fingerprint() != tower.fingerprint():
        raise UsageError(
            f"the vision tower {spec.name} saves something else than it was loaded from, so it "
            "cannot go into the folder; use --to graft, which refers to it."
        )
    return saved.model_copy(update={"id": f"./{OWN_TOWER}"}), tower.fingerprint()


def export_graft(run: Path, out: Path, dry_run: bool = False) -> Exported:
    """Write config, weights, recipe, results and card of a graft into a new folder.

    A base or tower that lies inside the run goes along; one that lies elsewhere on this machine is
    named by its whole path.

    Args:
        run: The graft's folder.
        out: See :func:`mmgraft.export.folder.check_folder`.
        dry_run: List the files and write nothing.

    Raises:
        UsageError: A damaged graft.
        MMGraftError: The disk is full; what stood in ``out`` is whole.
    """
    record, inside, notes = _settled(GraftFile.read(run), run)
    files = belonging(run, inside)
    if dry_run:
        listed = {CONFIG_NAME: len(record.dump().encode())} | {f.name: f.size for f in files}
        return Exported("graft", out, record.workflow, listed, notes, written=False)

    def write(folder: Path) -> None:
        say(f"copying {len(files)} files")
        write_files(folder, files)
        write_record(folder, run, record, out.name, [file.name for file in files])

    atomic_folder(out, write)
    return Exported("graft", out, record.workflow, sizes_in(out), notes)


def write_files(folder: Path, files: list[UploadFile]) -> None:
    """Copy what belongs to a graft beside its record."""
    for file in counted("copying the graft, files", files):
        assert isinstance(file.content, Path)
        copy_file(file.content, folder / file.name)


def write_record(
    folder: Path, run: Path, record: GraftFile, name: str, files: Sequence[str] = ()
) -> None:
    """Write ``graft_config.json`` and the card; a README of the user's own is kept."""
    atomic_text(folder / CONFIG_NAME, record.dump())
    if has_own_readme(run):
        copy_file(run / README, folder / README)
    else:
        atomic_text(folder / README, card_of(run, record, name, files))


def _settled(record: GraftFile, run: Path) -> tuple[GraftFile, list[str], list[str]]:
    """Return the record with references that hold anywhere, folders that go along, and notes."""
    inside: list[str] = []
    notes: list[str] = []
    update: dict[str, Any] = {}
    for key, reference, folder in local_references(record, run):
        name = _portable(folder, run, inside, notes, WHAT[key])
        update[key] = reference.model_copy(update={"id": name})
    return record.model_copy(update=update), inside, notes


def _portable(folder: Path, run: Path, inside: list[str], notes: list[str], what: str) -> str:
    folder, run = folder.resolve(), run.resolve()
    if folder != run and folder.is_relative_to(run):
        name = folder.relative_to(run).as_posix()
        inside.append(name)
        notes.append(f"the {what} goes along in ./{name}: it lies in the graft's own folder")
        return f"./{name}"
    notes.append(f"the {what} is not in it, but referred to: the folder {folder} of this machine")
    return str(folder)
