"""Command lines with options off their defaults, and a recorder of what a command calls."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmgraft.errors import UsageError


class Stop(UsageError):
    """Ends a command where it would begin to work."""


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Put a recorder in a function's place; `gives` is returned, an exception is raised."""

    def record(target: str, gives: Any = None) -> list[dict[str, Any]]:
        module, _, name = target.rpartition(".")
        try:
            owner: Any = importlib.import_module(module)
        except ModuleNotFoundError:
            inner, _, kind = module.rpartition(".")
            owner = getattr(importlib.import_module(inner), kind)
        real, calls = getattr(owner, name), list[dict[str, Any]]()

        def instead(*args: Any, **kwargs: Any) -> Any:
            bound = inspect.signature(real).bind(*args, **kwargs)
            calls.append(dict(bound.arguments))
            if isinstance(gives, Exception):
                raise gives
            return gives

        monkeypatch.setattr(owner, name, instead)
        return calls

    return record


CPU = ["--device", "cpu"]
LOADING = [
    "--device",
    "mps",
    "--dtype",
    "float16",
    "--quantization",
    "nf4",
    "--base",
    "elsewhere",
    "--verify",
    "off",
]
LOADED = {
    "device": "on mps",
    "dtype": "float16",
    "quantization": "nf4",
    "base": "elsewhere",
    "verify": "off",
}

SPOKEN = ["--template-option", "brief=true", "--template-option", "tone=dry"]
SPEAKS = {"brief": True, "tone": "dry"}
"""Variables of the chat template."""

READING = [
    "--images",
    "pics",
    "--run",
    "there",
    "--base",
    "b",
    "--vision",
    "v",
    "--recipe",
    "r",
    "--stage",
    "s",
    "--template",
    "plain",
    "--max-length",
    "77",
    "--read",
    "format=vqa",
    *SPOKEN,
]
READS = {
    "target": Path("rows.jsonl"),
    "images": Path("pics"),
    "run": Path("there"),
    "base": "b",
    "vision": "v",
    "recipe": "r",
    "stage": "s",
    "template": "plain",
    "max_length": 77,
    "read": ["format=vqa"],
    "template_option": ["brief=true", "tone=dry"],
}
