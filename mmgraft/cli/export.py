"""``mmgraft export``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

from mmgraft.cli.console import human_bytes, note, print_json, stdout, table
from mmgraft.cli.loading import check_dtype
from mmgraft.cli.options import BaseOption, DryRunFlag, JsonFlag, RunArgument, option
from mmgraft.errors import UsageError, did_you_mean
from mmgraft.runs.find import find_run

if TYPE_CHECKING:
    from mmgraft.export.folder import Exported, Kind

_KINDS = ("graft", "full", "llava", "peft", "gguf", "mmproj", "vllm")
_OUTTYPES = ("f32", "f16", "q8_0")

_TO = (
    "What to write: graft, alone; full, with base and tower; llava, a stock model; peft, adapters; "
    "gguf, files of llama.cpp; mmproj, tower and projector beside the base's own GGUF; vllm, base "
    "and grafts."
)
_ALSO = "Further graft of the same base in a vllm export; may be given several times."
_WORKFLOW = "Workflow to export, where an import wrote several."
_OUTTYPE = "Type of the matrices of a gguf or mmproj export: f32, f16, q8_0; default: f16."
_DTYPE = "Dtype of a llava or vllm export: bfloat16, float32, float16; default: the base's."


def export(
    run: RunArgument = None,
    to: Annotated[str, option(_TO)] = "",
    out: Annotated[Path | None, option("--out", "-o", "Folder. Default: ./<graft>-<to>.")] = None,
    workflow: Annotated[str | None, option(_WORKFLOW)] = None,
    dtype: Annotated[str | None, option(_DTYPE)] = None,
    outtype: Annotated[str | None, option(_OUTTYPE)] = None,
    also: Annotated[list[Path] | None, option("--also", _ALSO)] = None,
    base: BaseOption = None,
    force: Annotated[bool, option("--force", "Replace an earlier export in the folder.")] = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Write a graft for use elsewhere.

    To graft: the small adapter. To full: base, tower and graft in one folder that loads offline.
    To llava: an ordinary model of transformers, for grafts that are a plain decoder with a
    projector; it is compared with the graft before it is kept. To peft: adapters of a lora graft
    with gate row, to be switched on beside its llava export for rows with an image. To gguf: text
    and vision for llama.cpp, of Llama, Qwen2 and Qwen3 with SigLIP. To mmproj: vision alone, for a
    graft that is a projector, beside a GGUF of its base. To vllm: base and grafts in one folder,
    for vLLM with the plugin mmgraft-vllm.
    """
    _check(to, dtype, outtype, also)
    kind = cast("Kind", to)
    from mmgraft.export.folder import check_folder, default_folder, find_workflow

    folder = _find(run)
    target = check_folder(out or default_folder(folder, kind), folder, force)
    runs = [find_workflow(folder, workflow), *(_find(str(one)) for one in also or ())]
    result = _write(runs, target, kind, base, outtype if dtype is None else dtype, dry_run)
    for text in result.notes:
        note(f"note: {text}")
    if json:
        print_json(_summary(result))
    else:
        _show(result)


def _write(
    runs: list[Path], out: Path, kind: "Kind", base: str | None, stored: str | None, dry_run: bool
) -> "Exported":
    from mmgraft.export.gguf.export import export_gguf
    from mmgraft.export.graft import export_full, export_graft
    from mmgraft.export.llava.export import export_llava
    from mmgraft.export.peft import export_peft
    from mmgraft.export.vllm import export_vllm

    run = runs[0]
    if kind in ("gguf", "mmproj"):
        return export_gguf(run, out, kind, base, stored, dry_run)
    writers = {
        "graft": lambda: export_graft(run, out, dry_run),
        "full": lambda: export_full(run, out, base, dry_run),
        "peft": lambda: export_peft(run, out, base, dry_run),
        "vllm": lambda: export_vllm(runs, out, base, stored, dry_run),
        "llava": lambda: export_llava(run, out, base, stored, dry_run),
    }
    return writers[kind]()


def _check(to: str, dtype: str | None, outtype: str | None, also: list[Path] | None) -> None:
    """Refuse options that need no model to be refused."""
    if not to:
        raise UsageError(f"say what to write with --to: {', '.join(_KINDS)}")
    if to not in _KINDS:
        raise UsageError(f"--to {to}: {did_you_mean(to, _KINDS)}")
    if also and to != "vllm":
        raise UsageError(f"--also goes with --to vllm: a {to} export holds one graft")
    if dtype is not None and to not in ("llava", "vllm"):
        raise UsageError(
            f"--dtype goes with --to llava and vllm: {to} keeps its files as they are, and takes a "
            "dtype when it is loaded"
        )
    check_dtype(dtype)
    if outtype is not None and to not in ("gguf", "mmproj"):
        raise UsageError(f"--outtype goes with --to gguf and --to mmproj, not with --to {to}")
    if outtype not in (None, *_OUTTYPES):
        raise UsageError(f"--outtype {outtype}: {did_you_mean(str(outtype), _OUTTYPES)}")


def _find(run: str | None) -> Path:
    if run is None or Path(run).expanduser().exists() or run.count("/") != 1:
        return find_run(run)
    from mmgraft.model.files.load import graft_folder

    return graft_folder(run)


def _summary(result: "Exported") -> dict[str, Any]:
    return {
        "to": result.kind,
        "folder": str(result.folder),
        "written": result.written,
        "workflow": result.workflow,
        "files": [{"name": name, "bytes": size} for name, size in result.files.items()],
        "bytes": sum(result.files.values()),
        "largest_logit_difference": result.difference,
        "notes": result.notes,
    }


def _show(result: "Exported") -> None:
    rows = [[name, human_bytes(size)] for name, size in result.files.items()]
    rows.append([f"{len(result.files)} files", human_bytes(sum(result.files.values()))])
    verb = "written to" if result.written else "would be written to"
    out = stdout()
    out.print(table(["file", "size"], rows, title=f"{verb} {result.folder}"))
    if result.difference is not None:
        out.print(
            f"stock transformers gives the graft's logits: largest difference "
            f"{result.difference:.1e}",
            markup=False,
        )
