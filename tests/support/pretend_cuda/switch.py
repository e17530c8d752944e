"""Switching make-believe cards on and off: what torch answers, in C++ and in Python."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import torch._dynamo  # which looks at what is replaced here, when it is first imported
from torch import Tensor

from pretend_cuda.seen import Attention, Card, counting, wait
from pretend_cuda.tensors import CARD, Mode, OnCard


class _Stream:
    """A stream, or an event, of a card on which everything has always happened already."""

    device = CARD
    cuda_stream = stream_id = device_index = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __enter__(self) -> _Stream:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def _nothing(self, *_: Any, **__: Any) -> None:
        pass

    wait_stream = wait_event = record_event = record = synchronize = wait = _nothing

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: Any) -> float:
        return 0.0


@contextmanager
def pretend_cuda(cards: int = 1) -> Iterator[Card]:
    """Give torch one CUDA device, or two, while the block lasts.

    Yields:
        What was seen of it.
    """
    assert _hooks is not None, WHY_NOT
    with ExitStack() as stack:
        stack.callback(_forget_answers)
        _forget_answers()
        _hooks.set_there(cards)
        stack.callback(_hooks.set_there, 0)
        for owner, name, value in _replaced(cards):
            stack.enter_context(mock.patch.object(owner, name, value, create=True))
        stack.callback(torch._C._set_only_lift_cpu_tensors, torch._C._only_lift_cpu_tensors())
        stack.enter_context(Attention())
        stack.enter_context(Mode())
        yield stack.enter_context(counting())


_OF_CARDS = re.compile("cuda|accelerator|gpu|flash|triton|device|tf32")
_REMEMBERING = ("transformers.utils", "accelerate.utils", "torch.utils._triton")


def _forget_answers() -> None:
    """Let libraries look again at whether there is a card: they keep the first answer."""
    for name, module in list(sys.modules.items()):
        if module is not None and name.startswith(_REMEMBERING):
            for question, value in list(vars(module).items()):
                if isinstance(value, functools._lru_cache_wrapper) and _OF_CARDS.search(question):
                    value.cache_clear()


def _why_not() -> str:
    """Say why there can be no make-believe card here; empty where there can."""
    if torch.backends.cuda.is_built():
        return "this torch is built for CUDA and has hooks of its own"
    return "" if shutil.which("g++") else "needs g++"


def _compiled() -> ctypes.CDLL:
    """Compile and load what autograd calls of a device in C++, before it counts the devices."""
    home, source = Path(torch.__file__).parent, Path(__file__).with_name("hooks.cpp")
    key = hashlib.sha256(f"{torch.__version__} {source.read_text()}".encode()).hexdigest()[:16]
    library = Path(tempfile.gettempdir()) / f"pretend-{key}.so"
    if not library.is_file():
        made = library.with_suffix(f".{os.getpid()}")
        command = ["g++", "-std=c++20", "-shared", "-fPIC", str(source), "-o", str(made)]
        command += [f"-I{home}/include", f"-L{home}/lib", "-lc10", "-ltorch_cpu"]
        subprocess.run(command, check=True)
        made.replace(library)
    return ctypes.CDLL(str(library))


WHY_NOT = _why_not()
_hooks = None if WHY_NOT else _compiled()


def _replaced(cards: int) -> list[tuple[Any, str, Any]]:
    """List what is called of a card in Python: owner, name, and what is there instead."""
    cuda, size = torch.cuda, 80 << 30
    properties = SimpleNamespace(
        name="NVIDIA Pretend", total_memory=size, major=9, minor=0, multi_processor_count=132
    )
    state = torch.zeros(16, dtype=torch.uint8)
    answers: dict[str, Any] = {
        "is_available": True, "is_initialized": True, "device_count": cards, "current_device": 0,
        "get_device_name": properties.name, "get_device_properties": properties,
        "get_device_capability": (9, 0), "is_bf16_supported": True,
        "memory_allocated": 0, "max_memory_allocated": 0, "memory_reserved": 0,
        "max_memory_reserved": 0, "mem_get_info": (size, size), "get_rng_state": state,
        "get_rng_state_all": [state] * cards, "current_stream": _Stream(),
        "default_stream": _Stream(), "is_current_stream_capturing": False,
        **dict.fromkeys((
            "_lazy_init", "init", "set_device", "empty_cache", "ipc_collect", "manual_seed",
            "manual_seed_all", "set_rng_state", "set_rng_state_all", "_lazy_call",
            "reset_peak_memory_stats",
        )),
    }  # fmt: skip

    def always(value: Any) -> Callable[..., Any]:
        return lambda *_, **__: value

    generators = [name for name in answers if "rng_state" in name]
    listing: Any = [importlib.import_module(f"torch.{name}") for name in _LISTING]
    accelerator = {
        "is_available": True, "current_accelerator": torch.device("cuda"), "device_count": cards,
        "current_device_index": 0, "set_device_index": None,
    }  # fmt: skip
    return [
        *((cuda, name, always(value)) for name, value in answers.items()),
        *((cuda.random, name, always(answers[name])) for name in generators),
        *((torch.accelerator, name, always(value)) for name, value in accelerator.items()),
        *((one, _TYPES, [*getattr(one, _TYPES), OnCard]) for one in listing),
        (cuda, "synchronize", lambda *_: wait("synchronize")),
        (cuda, "stream", lambda stream: stream or _Stream()),
        (cuda, "Stream", _Stream),
        (cuda, "Event", _Stream),
        (torch, "Stream", _Stream),
        (torch.version, "cuda", "12.8"),
        (Tensor, "cuda", lambda self, device=None, *_, **__: self.to(_card_of(device))),
        (Tensor, "pin_memory", _pin),
        (Tensor, "_make_subclass", staticmethod(_make_subclass)),
        (threading.Thread, "run", _with_modes(threading.Thread.run)),
    ]


_LISTING = ("optim.optimizer", "utils._foreach_utils")
_TYPES = "_foreach_supported_types"


def _card_of(device: Any) -> torch.device:
    return torch.device("cuda", device) if isinstance(device, int) else device or CARD


def _pin(tensor: Tensor, *_: Any) -> Tensor:
    if isinstance(tensor, OnCard):
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
        )
    pinned = tensor.clone()
    pinned._pinned = True  # type: ignore[attr-defined]
    return pinned


_plain_subclass = Tensor._make_subclass


def _make_subclass(cls: Any, data: Tensor, requires_grad: bool = False, **kwargs: Any) -> Any:
    """Make a parameter class of its own (bitsandbytes has one) around a tensor of a card."""
    if not isinstance(data, OnCard):
        return _plain_subclass(cls, data, requires_grad, **kwargs)
    both = cls
    if not issubclass(cls, OnCard):
        hidden = {"__tensor_flatten__": _Absent()}  # or `Module.to` would swap it for another
        both = type(cls)(cls.__name__, (cls, OnCard), hidden)
    return OnCard.__new__(both, data.held, requires_grad, data.device)


class _Absent:
    def __get__(self, *_: Any) -> Any:
        raise AttributeError


def _with_modes(run: Callable[..., None]) -> Callable[..., None]:
    """Give a thread that is begun the modes, which belong to one thread each."""

    def patched(self: threading.Thread) -> None:
        with Attention(), Mode():
            run(self)

    return patched
