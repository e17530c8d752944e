"""A graft's adapters as an ordinary PEFT folder, for a stock LLaVA model of the same graft."""

import json
from pathlib import Path

from safetensors.torch import save_file

from mmgraft.atomic import atomic_folder
from mmgraft.errors import UsageError
from mmgraft.export.folder import ADAPTER, NOTE_KEY, Exported, sizes_in
from mmgraft.export.llava.fit import gather
from mmgraft.grafts.method import PlainAdapter
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import read_tensors
from mmgraft.progress import say
from mmgraft.version import __version__

_PREFIX, _WRAPPED = "graft.", "base_model.model."


def export_peft(run: Path, out: Path, base: str | None = None, dry_run: bool = False) -> Exported:
    """Write the adapters that a server switches on for requests with an image.

    Args:
        run: The graft's folder.
        out: See :func:`mmgraft.export.folder.check_folder`.
        base: Where the base lies, when not where the record says.
        dry_run: Return the size and write nothing.

    Raises:
        UsageError: The graft is no adapter of the ordinary kind, or does not fit a LLaVA model.
    """
    record = GraftFile.read(run)
    say("examining the graft and its base")
    mine = {
        n.removeprefix(_PREFIX): t for n, t in read_tensors(run).items() if n.startswith(_PREFIX)
    }
    adapter = _as_adapter(record, list(mine))
    anatomy = gather(run, base).anatomy
    layers = f"model.language_model.{anatomy.layers_path.partition('.')[2]}"
    tensors = {f"{_WRAPPED}{layers}.{new}": mine[old] for old, new in adapter.tensors.items()}
    notes = ["it is for the model that --to llava writes, and acts on rows with an image alone"]
    size = sum(tensor.nbytes for tensor in tensors.values())
    if dry_run:
        listed = {ADAPTER: size}
        return Exported("peft", out, record.workflow, listed, notes, written=False)

    def write(folder: Path) -> None:
        whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(whole, folder / ADAPTER, {"format": "pt", NOTE_KEY: __version__})
        targets = sorted({name.partition(".lora_")[0].removeprefix(_WRAPPED) for name in tensors})
        config = {
            "peft_type": "LORA", "task_type": None, "inference_mode": True, "bias": "none",
            "r": adapter.rank, "lora_alpha": adapter.alpha, "lora_dropout": 0.0,
            "target_modules": targets, "base_model_name_or_path": None,
        }  # fmt: skip
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")

    atomic_folder(out, write)
    return Exported("peft", out, record.workflow, sizes_in(out), notes)


def _as_adapter(record: GraftFile, names: list[str]) -> PlainAdapter:
    made = get_method(record.method).as_adapter
    reason = f"method {record.method} is no adapter on the base's linear layers"
    try:
        if made is not None:
            return made(record.settings, names)
    except UsageError as error:
        reason = str(error)
    raise UsageError(f"this graft cannot be written as a PEFT adapter: {reason}.")
