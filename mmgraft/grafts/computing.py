"""Questions about the place of a computation, for code that takes another path there.

An estimate of memory runs on tensors without values, which say that they are on the CPU whatever
device is asked about: it says so here, and the code takes that device's path.
"""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

_asked: list[str] = []


def computes_on(tensor: Tensor) -> str:
    """Return the kind of device, such as ``cpu`` or ``cuda``, whose path a tensor's computation
    takes.
    """
    return _asked[-1] if _asked else tensor.device.type


@contextmanager
def as_if_on(kind: str) -> Iterator[None]:
    """While the block lasts, every computation takes the path of this kind of device."""
    _asked.append(kind)
    try:
        yield
    finally:
        _asked.pop()


def is_flash(attention: str) -> bool:
    """Tell whether an attention is a flash package's, which takes half precision alone."""
    return "flash_attention" in attention or "flash-attn" in attention
