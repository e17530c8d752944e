"""Find the files of a run folder that belong to the graft, and check its weights."""

import re
from collections.abc import Iterable
from fnmatch import fnmatchcase
from pathlib import Path

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.model.files.graft_file import CONFIG_NAME, WEIGHTS_NAME
from mmgraft.textfiles import weight_files as files_of_weights

README = "README.md"
RECIPE = "recipe.yaml"
INDEX_NAME = f"{WEIGHTS_NAME}.index.json"

_PROCESSOR = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "*.tiktoken",
    "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "spiece.model", "sentencepiece.bpe.model", "chat_template.jinja", "chat_template.json",
    "additional_chat_templates/*.jinja", "preprocessor_config.json", "processor_config.json",
    "generation_config.json", "config.json",
)  # fmt: skip
_RESULTS = ("results/*.json", "results/*.md", "results/*.html", "results/*.png")
_RECORDS = (RECIPE, "results.json", *_RESULTS)
_LEGAL = ("LICENSE*", "NOTICE*", "licenses/*")
_MANAGED = ("graft*.safetensors", INDEX_NAME, *_RECORDS, "base/*")
_NEVER_IN_A_MODEL = ("checkpoint*", "optimizer*", "scheduler*", "rng_state*", "*.pt", "*.pth")


class UploadFile(Frozen):
    """One file of the repository: its name there, and where its bytes are."""

    name: str
    content: Path | bytes

    @property
    def size(self) -> int:
        """Bytes."""
        return len(self.content) if isinstance(self.content, bytes) else self.content.stat().st_size


def belonging(run: Path, folders: Iterable[str] = ()) -> list[UploadFile]:
    """List the files of a run that make the graft, without its config and card.

    Checkpoints, optimizer states, metrics and everything unknown stay at home.

    Args:
        run: The run folder.
        folders: Folders in it that hold a base or a tower and go along as they are.

    Raises:
        UsageError: When a weight file is missing or cannot be read.
    """
    names = [path.name for path in weight_files(run)]
    if names != [WEIGHTS_NAME]:
        names.append(INDEX_NAME)
    for path in (*run.glob("*"), *run.glob("*/*")):
        name = path.relative_to(run).as_posix()
        if path.is_file() and _matches(name, (*_PROCESSOR, *_RECORDS, *_LEGAL)):
            names.append(name)
    for folder in folders:
        names += _model_folder(run, folder)
    return [UploadFile(name, run / name) for name in sorted(set(names))]


def weight_files(run: Path) -> list[Path]:
    """List the graft's safetensors files, one or the shards of an index, each opened once.

    Raises:
        UsageError: When one is missing or cannot be read.
    """
    files = files_of_weights(run, "graft", ".safetensors") or [run / WEIGHTS_NAME]
    for file in files:
        check_whole(file)
    return files


def check_whole(file: Path) -> None:
    """Check a safetensors file against its header; no tensor is read.

    Raises:
        UsageError: When the file is missing, cut short or no safetensors file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, framework="np"):
            pass
    except (SafetensorError, OSError) as error:
        missing = isinstance(error, FileNotFoundError)
        why = "it is missing" if missing else f"it is damaged: {error}"
        raise UsageError(
            f"{file} cannot be read ({why}); nothing was pushed. "
            "Restore it from the run's checkpoints, or train or graft again"
        ) from error


def folder_named(file: UploadFile) -> str | None:
    """Find the first path of this machine that a file of results names, or None."""
    if not isinstance(file.content, Path) or not _matches(file.name, ("results/*.json",)):
        return None
    text = file.content.read_text(encoding="utf-8", errors="replace")
    found = re.search(r'"(/[^"/]+/[^"]*|~/[^"]+|[A-Za-z]:\\[^"]+)"', text)
    return found.group(1) if found else None


def managed(name: str) -> bool:
    """Tell whether a file of the repository is one that a push replaces or removes."""
    return _matches(name, _MANAGED)


def _model_folder(run: Path, folder: str) -> list[str]:
    root = run / folder
    if not (root / "config.json").is_file():
        raise UsageError(
            f"{CONFIG_NAME} names ./{folder}, but {root} holds no model; restore that folder"
        )
    names = []
    for path in root.rglob("*"):
        inside = path.relative_to(root)
        unwanted = any(
            part.startswith(".") or _matches(part, _NEVER_IN_A_MODEL) for part in inside.parts
        )
        if path.is_file() and not unwanted:
            names.append(path.relative_to(run).as_posix())
            if path.suffix == ".safetensors":
                check_whole(path)
    return names


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in patterns)
