"""Keys of files that have changed on purpose since the recording; the others are compared."""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

TEXT = "text"
"""The text of a card; what stands before it as YAML is compared."""

_STAGES = "keys of a stage that only one method has stand in its stages alone"
_LAYOUTS = "an entry of data says how a table is read"
_OFFICIAL = "a setting of wings-official left wings"
CHANGED_FILES: dict[str, dict[str, str]] = {
    "*README.md": {TEXT: "a model card's words changed"},
    "*recipe.used.yaml": {
        "learners": _STAGES,
        "router": _STAGES,
        "template_options": "a recipe may set variables of the template",
        "columns": _LAYOUTS,
        "vqa": _LAYOUTS,
    },
    "*generation_config.json": {
        "of another package.eos_token_id": "generation ends where the template ends a turn"
    },
    "*graft_config.json": {
        "recipe sha256": _STAGES,
        "vision_features": "features of a fixed image are recorded, with the version",
        "vision_features sha256": "features of a fixed image are recorded, with the version",
        "template.options": "variables of the template are recorded",
        "config sha256": _OFFICIAL,
        "config.system_prompt_length": _OFFICIAL,
        "config.image_token_length": _OFFICIAL,
        "config.router_width": _OFFICIAL,
    },
}
"""The reason by the file's name as fnmatch reads it, and by key.

When everything is recorded anew this is emptied.
"""


def compared(name: str, content: Any, recorded: Any = None) -> Any:
    """Return what of a file is compared; None where a hash alone was recorded of a change."""
    keys = {key for file, keys in CHANGED_FILES.items() if fnmatchcase(name, file) for key in keys}
    if isinstance(recorded, dict):  # a value that was recorded by its hash may be shorter now
        keys |= {key.removesuffix(" sha256") for key in keys & recorded.keys()}
    if not keys or isinstance(content, str):
        return content
    if isinstance(content, dict):
        return None if "length" in content else _without(content, keys)
    if TEXT in keys:
        return content[: content.index("---", 1)] if content[0] == "---" else None
    return [line for line in content if line.strip(" -").partition(":")[0] not in keys]


def _without(content: dict[str, Any], keys: set[str], above: str = "") -> dict[str, Any]:
    return {
        key: _without(one, keys, f"{above}{key}.") if isinstance(one, dict) else one
        for key, one in content.items()
        if f"{above}{key}" not in keys
    }
