"""Load a graft, its processor or its base's tokenizer as an Auto class asks for them."""

from functools import cache
from pathlib import Path
from typing import Any

import transformers
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from mmgraft.basefiles import ModelFiles
from mmgraft.model.auto.config import GraftedConfig
from mmgraft.model.auto.processor import GraftedProcessor
from mmgraft.model.files import load
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.modeling import GraftedModel
from mmgraft.vision.towers.registry import load_tower
from mmgraft.vision.towers.transformers import outline

#: Options that the Auto classes pass on for themselves; a base's own code is never run.
_INNER = ("config", "adapter_kwargs", "trust_remote_code", "code_revision", "tqdm_class")


@cache
def register() -> None:
    """Tell the Auto classes, and those that ask a model type for its class's name."""
    from transformers.models.auto import modeling_auto

    loaders: dict[str, Any] = {
        "AutoModelForImageTextToText": load_answering,
        "AutoModelForMultimodalLM": load_answering,
        "AutoModelForCausalLM": load_model,
        "AutoProcessor": load_processor,
        "AutoTokenizer": load_tokenizer,
    }
    for name, function in loaders.items():
        own = {"config_class": GraftedConfig, "from_pretrained": staticmethod(function)}
        auto: Any = getattr(transformers, name)
        auto.register(GraftedConfig, type("GraftedModel", (), own), exist_ok=True)
    for task in ("IMAGE_TEXT_TO_TEXT", "MULTIMODAL_LM"):
        names = getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        names["mmgraft"] = "GraftedModel"


def load_model(source: str | Path, **options: Any) -> GraftedModel:
    """Load a graft with its base, as :meth:`GraftedModel.from_pretrained` does.

    Raises:
        TypeError: An option that it does not take, by name.
    """
    given, config = _given(options), options.get("config")
    taken = {"dtype": "dtype", "attn_implementation": "_attn_implementation"}  # by the config
    known = {name: getattr(config, field, None) for name, field in taken.items()}
    model = GraftedModel.from_pretrained(source, **{**_given(known), **given})
    placed = getattr(model.base, "hf_device_map", None)
    if placed is not None:
        model.hf_device_map = placed  # a pipeline leaves it where it is
    return model


def load_answering(source: str | Path, **options: Any) -> GraftedModel:
    """Load a graft whose ``generate`` ends where its template ends an answer."""
    model = load_model(source, **options)
    model.processor(_found(source, options)[2].path)
    return model


def load_processor(source: str | Path, **options: Any) -> GraftedProcessor:
    """Load a graft's processor; the tower's weights are left out where its kind can."""
    record, folder, files = _found(source, options)
    spec = load.local_tower(record, folder)
    tower = outline(spec) if spec.kind == "transformers" else load_tower(spec)
    return GraftedProcessor(load.load_processor(record, files.path, tower))


def load_tokenizer(source: str | Path, **options: Any) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a graft's base, with options of its own."""
    files, options = _found(source, options)[2], _given(options)
    own = {name: value for name, value in options.items() if name not in ("revision", "base")}
    own["gguf_file"] = files.gguf
    return AutoTokenizer.from_pretrained(files.path, trust_remote_code=False, **own)


def _given(options: dict[str, Any]) -> dict[str, Any]:
    """Return what is not the Auto classes' own and not left at nothing."""
    kept = {k: v for k, v in options.items() if not k.startswith("_") and k not in _INNER}
    return {k: v for k, v in kept.items() if v is not None and v is not False and v != ""}


def _found(source: str | Path, options: dict[str, Any]) -> tuple[GraftFile, Path, ModelFiles]:
    folder = load.graft_folder(source, options.get("revision"))
    record = GraftFile.read(folder)
    return record, folder, load.base_files(record, folder, options.get("base"))
