"""Grafts sight onto a language model that is never edited.

The names below are loaded when first used, so that ``import mmgraft`` costs nothing.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mmgraft.model.auto import register
from mmgraft.version import __version__

if TYPE_CHECKING:
    from mmgraft.errors import MMGraftError, UsageError
    from mmgraft.grafts.expert.config import ExpertConfig
    from mmgraft.grafts.iaa.config import IAAConfig
    from mmgraft.grafts.llava.config import LlavaConfig
    from mmgraft.grafts.lora.config import LoraConfig
    from mmgraft.grafts.wings.config import WingsConfig
    from mmgraft.grafts.xattn.config import XattnConfig
    from mmgraft.model.modeling import GraftedModel

    load = GraftedModel.from_pretrained

_METHODS = ("Expert", "IAA", "Llava", "Lora", "Wings", "Xattn")
_HOMES = {
    **{f"{method}Config": f"mmgraft.grafts.{method.lower()}.config" for method in _METHODS},
    **dict.fromkeys(("MMGraftError", "UsageError"), "mmgraft.errors"),
    "GraftedModel": "mmgraft.model.modeling",
}

__all__ = [
    "ExpertConfig", "GraftedModel", "IAAConfig", "LlavaConfig", "LoraConfig", "MMGraftError",
    "UsageError", "WingsConfig", "XattnConfig", "__version__", "load",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name == "load":
        return import_module("mmgraft.model.modeling").GraftedModel.from_pretrained
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)


register()
