"""Replace a module's ``forward`` for the length of a ``with`` block.

Nothing of a base is edited for good: a graft acts only while one of its workflows runs, and
afterwards every module has exactly the ``forward`` that it had before.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

_ABSENT = object()


@contextmanager
def patched_forward(module: nn.Module, wrapper: Callable[..., Any]) -> Iterator[None]:
    """Run ``wrapper(original_forward, *args, **kwargs)`` in place of ``module.forward``.

    Patches of one module nest: an inner one receives the outer wrapper as its original.
    """
    before = module.__dict__.get("forward", _ABSENT)
    module.__dict__["forward"] = partial(wrapper, module.forward)
    try:
        yield
    finally:
        if before is _ABSENT:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before
