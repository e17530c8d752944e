"""The files of a base: in a local folder, or in a snapshot from the Hub."""

from __future__ import annotations

import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import is_offline_mode, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mmgraft.anatomy import refuse_non_causal, text_config
from mmgraft.errors import MMGraftError, UsageError

_SAFETENSORS = ["*.safetensors", "*.safetensors.index.json"]
_PICKLES = ["pytorch_model*.bin", "pytorch_model*.bin.index.json"]
_TOKENIZER = [
    "tokenizer*",
    "special_tokens*",
    "added_tokens*",
    "chat_template*",
    "vocab*",
    "merges*",
    "*.model",
]
_SMALL = ["config.json", "generation_config.json", *_TOKENIZER]
# Subfolders and second copies of the same weights in other formats.
_NOT_WANTED = ["*/*", "consolidated*", "*.fp16.*", "*adapter*"]

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class ModelFiles:
    """The files of one base on this machine.

    Attributes:
        id: Hub id, or the absolute path of a local folder or GGUF file.
        path: The folder that holds the files.
        revision: Commit id on the Hub; None for a local folder.
        gguf: Name of the GGUF file inside the folder, where the weights are in one.
        slow: Reason why reading tensors needs the whole base loaded once; None for safetensors.
    """

    id: str
    path: Path
    revision: str | None = None
    gguf: str | None = None
    slow: str | None = None


def resolve(id_or_path: str | Path, revision: str | None = None) -> ModelFiles:
    """Find the files of a base, and fetch them from the Hub if they are not here.

    Fetched are the config, the weights as safetensors and the tokenizer; ``.bin`` weights only
    where there are no others.

    Args:
        id_or_path: A local folder, a local GGUF file, or a Hub id.
        revision: Commit, branch or tag on the Hub.

    Raises:
        UsageError: Nothing of that name, no access to it, or no weights in it.
        MMGraftError: The Hub cannot be reached, or the download failed.
    """
    path = Path(id_or_path).expanduser()
    if path.is_dir():
        return _describe(str(path.absolute()), path.absolute(), None)
    if path.is_file() and path.suffix == ".gguf":
        path = path.absolute()
        return ModelFiles(str(path), path.parent, gguf=path.name, slow=_slow_reason(path.name))
    name = str(id_or_path)
    if not _HUB_ID.fullmatch(name):
        raise UsageError(
            f"no folder {name!r} here, and it is no Hub id; give a folder that holds config.json "
            "and *.safetensors, or an id such as Qwen/Qwen2-7B-Instruct"
        )
    folder = fetch(name, revision, [*_SMALL, *_SAFETENSORS])
    if not _weights(folder, "*.safetensors"):
        folder = fetch(name, revision, [*_SMALL, *_PICKLES])
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    return _describe(name, folder, commit)


def load_config(files: ModelFiles) -> PreTrainedConfig:
    """Read the configuration of a base.

    Raises:
        UsageError: It is broken, unknown to this transformers, or not that of a causal LM.
    """
    try:
        config = AutoConfig.from_pretrained(files.path, gguf_file=files.gguf)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UsageError(
            f"the configuration of {files.id} cannot be read ({_first_line(error)}); if the model "
            "is newer than the installed transformers, upgrade it with pip install -U transformers"
        ) from error
    refuse_non_causal(text_config(config))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"{files.id} is a {config.model_type!r}, not a causal language model; give a text "
            "model that predicts the next token, such as Llama or Qwen2"
        )
    return config


def fetch(
    name: str, revision: str | None, patterns: list[str], ignore: Sequence[str] = _NOT_WANTED
) -> Path:
    """Fetch files of a Hub repository, or find them in the cache.

    Raises:
        UsageError: No such repository or revision, or no access to it.
        MMGraftError: The Hub cannot be reached, or the download failed.
    """
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=list(ignore)
            )
        )
    except Exception as error:  # every HTTP and disk error there is
        refusal = _refusal(name, revision, error)
        if refusal is not None:
            raise UsageError(refusal) from error
        raise MMGraftError(
            f"could not fetch {name} from the Hub ({_first_line(error)}); check the network and "
            "the free disk space, then run the command again: it goes on where it stopped"
        ) from error


def _refusal(name: str, revision: str | None, error: Exception) -> str | None:
    """Explain an error that no second try mends; None where the download has failed."""
    if isinstance(error, GatedRepoError):
        return (
            f"{name} is gated: accept its terms on its Hub page, then log in with `hf auth login`"
        )
    if isinstance(error, RepositoryNotFoundError):
        return (
            f"there is no model {name!r} on the Hub, or it is private; check the name, or log in "
            "with `hf auth login`"
        )
    if isinstance(error, RevisionNotFoundError):
        return f"{name} has no revision {revision!r}; check it on its Hub page"
    if isinstance(error, HFValidationError):
        return f"{name!r} is no Hub id; give one such as Qwen/Qwen2-7B-Instruct"
    if isinstance(error, LocalEntryNotFoundError) and is_offline_mode():
        return (
            f"{name} is neither a folder here nor in the Hub cache, and HF_HUB_OFFLINE forbids to "
            "fetch it; unset it, or give a local folder"
        )
    return None


def fetch_tokenizer(name: str, revision: str | None = None) -> Path:
    """Fetch config and tokenizer of a base on the Hub, and no weights.

    Raises:
        UsageError: See :func:`fetch`.
        MMGraftError: See :func:`fetch`.
    """
    return fetch(name, revision, _SMALL)


def find_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model's folder; None where it has none."""
    try:
        return AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError, TypeError, ImportError):
        return None


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a base's tokenizer as they are, into a folder with other weights."""
    for pattern in _TOKENIZER:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)


def _describe(name: str, folder: Path, revision: str | None) -> ModelFiles:
    config = folder / "config.json"
    if config.is_file() and _weights(folder, "*.safetensors"):
        return ModelFiles(name, folder, revision)
    if config.is_file() and _weights(folder, "pytorch_model*.bin"):
        return ModelFiles(name, folder, revision, slow=_slow_reason("pytorch_model.bin"))
    ggufs = _weights(folder, "*.gguf")
    if len(ggufs) == 1:
        return ModelFiles(
            name, folder, revision, gguf=ggufs[0].name, slow=_slow_reason(ggufs[0].name)
        )
    if len(ggufs) > 1:
        raise UsageError(
            f"{name} holds {len(ggufs)} GGUF files; give the path of one, such as "
            f"{folder / ggufs[0].name}"
        )
    missing = "weights (*.safetensors)" if config.is_file() else "config.json"
    raise UsageError(
        f"{name} holds no {missing}; give the folder that save_pretrained wrote, or a Hub id"
    )


def _weights(folder: Path, pattern: str) -> list[Path]:
    return sorted(p for p in folder.glob(pattern) if "adapter" not in p.name)


def _slow_reason(name: str) -> str:
    return (
        f"its weights are in {name}, not in safetensors, so the whole base is loaded to read them"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
