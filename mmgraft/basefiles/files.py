"""The files of a base: in a local folder, or in a snapshot from the Hub."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import errors as hub_errors
from huggingface_hub import is_offline_mode, snapshot_download
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from mmgraft.anatomy import refuse_non_causal, text_config
from mmgraft.basefiles.tensor_files import open_pickled
from mmgraft.errors import MMGraftError, UsageError
from mmgraft.frozen import Frozen
from mmgraft.progress import working
from mmgraft.textfiles import read_json, weight_files

_SAFETENSORS = ["*.safetensors", "*.safetensors.index.json"]
_PICKLES = ["pytorch_model*.bin", "pytorch_model*.bin.index.json"]
_TOKENIZER = [
    "tokenizer*", "special_tokens*", "added_tokens*", "chat_template*", "vocab*", "merges*",
    "*.model",
]  # fmt: skip
#: All of a base but its weights.
SMALL = ["config.json", "generation_config.json", *_TOKENIZER]
# Subfolders and second copies of the same weights in other formats.
_NOT_WANTED = ["*/*", "consolidated*", "*.fp16.*", "*adapter*"]

_HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


class ModelFiles(Frozen):
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
    if path.exists() or path.is_symlink():
        raise UsageError(
            f"{name} is no folder; give the one that holds config.json and the weights"
        )
    if not _HUB_ID.fullmatch(name):
        raise UsageError(
            f"no folder {name!r} here, and it is no Hub id; give a folder that holds config.json "
            "and *.safetensors, or an id such as Qwen/Qwen2-7B-Instruct"
        )
    folder = fetch(name, revision, [*SMALL, *_SAFETENSORS])
    if not weight_files(folder, "model", ".safetensors"):
        folder = fetch(name, revision, [*SMALL, *_PICKLES])
    commit = folder.name if _COMMIT.fullmatch(folder.name) else revision
    return _describe(name, folder, commit)


def load_config(files: ModelFiles) -> PreTrainedConfig:
    """Read the configuration of a base.

    Raises:
        UsageError: It is broken, unknown to this transformers, or not that of a causal LM.
    """
    config = read_config(files.path, files.id, files.gguf)
    refuse_non_causal(text_config(config))
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(
            f"{files.id} is a {config.model_type!r}, not a causal language model; give a text "
            "model that predicts the next token, such as Llama or Qwen2"
        )
    return config


def read_config(folder: Path, name: str, gguf: str | None = None) -> PreTrainedConfig:
    """Read a model's configuration; code that comes with it is neither run nor asked about.

    Raises:
        UsageError: It is broken, of a type that transformers has not, or needs code of its own.
    """
    stored = {} if gguf else read_json(folder / "config.json", "fetch it again")
    if stored.get("transformers_weights") not in (None, "model.safetensors"):
        raise UsageError(
            f"config.json of {name} names its weights (transformers_weights); take the key out and "
            "name the file model.safetensors, or its index model.safetensors.index.json"
        )
    try:
        config = AutoConfig.from_pretrained(folder, gguf_file=gguf, trust_remote_code=False)
        for key in ("num_hidden_layers", "hidden_size"):
            if isinstance(size := getattr(config, key, None), int) and size < 1:
                raise ValueError(f"{key} is {size}")
        return config
    except Exception as error:  # whatever a foreign file may raise
        todo = (
            "it brings code of its own (auto_map), which mmgraft never runs; give a model of a "
            "type that transformers has"
            if "auto_map" in stored
            else "mend its config.json; if the model is newer than the installed transformers, "
            "upgrade it with pip install -U transformers"
        )
        raise UsageError(
            f"the configuration of {name} cannot be read ({_first_line(error)}); {todo}"
        ) from error


def fetch(
    name: str, revision: str | None, patterns: list[str], ignore: Sequence[str] = _NOT_WANTED
) -> Path:
    """Fetch files of a Hub repository, or find them in the cache.

    Raises:
        UsageError: No such repository or revision, or no access to it.
        MMGraftError: The Hub cannot be reached, or the download failed.
    """
    try:
        with working(f"fetching {name}", bar=False):  # the Hub's client has its own
            folder = snapshot_download(
                name, revision=revision, allow_patterns=patterns, ignore_patterns=list(ignore)
            )
        return Path(folder)
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
    if isinstance(error, hub_errors.GatedRepoError):
        return (
            f"{name} is gated: accept its terms on its Hub page, then log in with `hf auth login`"
        )
    if isinstance(error, hub_errors.RepositoryNotFoundError):
        return (
            f"there is no model {name!r} on the Hub, or it is private; check the name, or log in "
            "with `hf auth login`"
        )
    if isinstance(error, hub_errors.RevisionNotFoundError):
        return f"{name} has no revision {revision!r}; check it on its Hub page"
    if isinstance(error, hub_errors.HFValidationError):
        return f"no folder {name!r} here, and it is no Hub id such as Qwen/Qwen2-7B-Instruct"
    if isinstance(error, hub_errors.LocalEntryNotFoundError) and is_offline_mode():
        return (
            f"{name} is neither a folder here nor in the Hub cache, and HF_HUB_OFFLINE forbids to "
            "fetch it; unset it, or give a local folder"
        )
    return None


def vocabulary(folder: Path) -> int | None:
    """Return the rows of a base's embedding; None where its folder holds no configuration."""
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception:  # a GGUF file's folder, or one of a tokenizer alone
        return None
    return getattr(config.get_text_config(decoder=True), "vocab_size", None)


def find_tokenizer(folder: Path) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a model's folder; None where it has no file of one.

    Raises:
        UsageError: Its files are damaged, or need code of their own.
    """
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # whatever foreign files may raise
        found = [path.name for path in _tokenizer_files(folder)]
        if not found:
            return None
        code = "auto_map" in str(error) or "custom code" in str(error)
        todo = "code of its own is never run" if code else "fetch these files again"
        raise UsageError(
            f"the tokenizer in {folder} ({', '.join(found)}) cannot be read "
            f"({_first_line(error)}): {todo}"
        ) from error


def _tokenizer_files(folder: Path) -> list[Path]:
    found = {path for pattern in _TOKENIZER for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


def copy_tokenizer(source: Path, target: Path) -> None:
    """Copy the files of a base's tokenizer as they are, into a folder with other weights."""
    for path in _tokenizer_files(source):
        shutil.copyfile(path, target / path.name)


def _describe(name: str, folder: Path, revision: str | None) -> ModelFiles:
    config = folder / "config.json"
    _refuse_others(name, folder)
    if config.is_file() and weight_files(folder, "model", ".safetensors"):
        return ModelFiles(name, folder, revision)
    if config.is_file() and (pickled := weight_files(folder, "pytorch_model", ".bin")):
        for file in pickled:
            open_pickled(file)
        return ModelFiles(name, folder, revision, slow=_slow_reason("pytorch_model.bin"))
    ggufs = sorted(folder.glob("*.gguf"))
    if len(ggufs) == 1:
        gguf = ggufs[0].name
        return ModelFiles(name, folder, revision, gguf, _slow_reason(gguf))
    if len(ggufs) > 1:
        raise UsageError(
            f"{name} holds {len(ggufs)} GGUF files; give the path of one, such as "
            f"{folder / ggufs[0].name}"
        )
    others = [path.name for path in sorted((*folder.glob("*.safetensors"), *folder.glob("*.bin")))]
    missing = "weights (*.safetensors)" if config.is_file() else "config.json"
    seen = f" under a name that transformers reads, only {', '.join(others[:3])}"
    raise UsageError(
        f"{name} holds no {missing}{seen if config.is_file() and others else ''}; give the folder "
        "that save_pretrained wrote (model.safetensors, or shards with their "
        "model.safetensors.index.json), or a Hub id"
    )


def _refuse_others(name: str, folder: Path) -> None:
    """Refuse what transformers would load instead of, or on, the weights in the folder."""
    if (folder / "adapter_config.json").is_file():
        raise UsageError(
            f"{name} holds a LoRA adapter (adapter_config.json), which transformers would put on "
            "its base or leave out, as packages are installed; give the base alone, or merge "
            "them first (peft: merge_and_unload, then save_pretrained)"
        )
    if (folder / "graft_config.json").is_file():
        raise UsageError(f"{name} is a graft, not a base; name the model that it was made on")
    if any(folder.glob("shard-*-model-*-of-*.safetensors")):
        raise UsageError(
            f"{name} holds a checkpoint of several ranks (shard-*-model-*.safetensors); load it "
            "with transformers and write it with save_pretrained"
        )


def _slow_reason(name: str) -> str:
    return (
        f"its weights are in {name}, not in safetensors, so the whole base is loaded to read them"
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".partition("\n")[0]
