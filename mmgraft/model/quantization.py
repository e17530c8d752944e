"""A frozen base in 4-bit: nf4 with double quantisation, through bitsandbytes."""

from __future__ import annotations

import importlib.util

import torch
from torch import nn
from transformers import BitsAndBytesConfig

from mmgraft.errors import UsageError

KINDS = ("nf4",)


def quantization_config(kind: str | None, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Transformers' config for a kind of quantisation; None stays None.

    Raises:
        UsageError: An unknown kind, bitsandbytes missing, or a device that it does not run on.
    """
    if kind is None:
        return None
    if kind not in KINDS:
        raise UsageError(f"quantization {kind!r} is not known; use {', '.join(KINDS)} or none.")
    if importlib.util.find_spec("bitsandbytes") is None:
        raise UsageError("a 4-bit base needs bitsandbytes: pip install 'mmgraft[4bit]'")
    if not torch.cuda.is_available() and torch.backends.mps.is_available():
        raise UsageError(
            "bitsandbytes has no 4-bit kernels for MPS: use CUDA or the CPU (--device cpu), "
            "or leave --quantization out."
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def assert_unquantized(module: nn.Module, where: str) -> None:
    """Make sure that nothing in a tower, projector or graft was quantised.

    Raises:
        UsageError: Names the module that was.
    """
    for name, child in module.named_modules():
        if type(child).__module__.startswith("bitsandbytes"):
            raise UsageError(f"{where}.{name} was quantised; only the base may be.")
