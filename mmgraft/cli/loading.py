"""Load a model for a command that generates or evaluates."""

import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from mmgraft.errors import UsageError
from mmgraft.recipes.source import template_options

if TYPE_CHECKING:
    from mmgraft.inference import Answerer
    from mmgraft.model.files.load import Verify

DTYPES = ("bfloat16", "float32", "float16")


def load_answerer(
    run: str,
    *,
    device: str | None,
    verify: str,
    dtype: str | None = None,
    template_option: Sequence[str] | None = None,
    show_reasoning: bool = False,
    seed: int | None = None,
    **more: Any,
) -> "Answerer":
    """Check the options that need no model, then load it on a device; they are ``LOADING``.

    Raises:
        UsageError: An option that is not known, or a device or package that is not there.
    """
    if verify not in ("fast", "full", "off"):
        raise UsageError(f"--verify {verify}: choose fast, full or off")
    check_dtype(dtype)
    options = template_options(template_option)
    with uncollected():
        import torch

        from mmgraft.inference import Answerer
        from mmgraft.training.devices import pick_device

        answerer = Answerer.load(
            run,
            device=pick_device(device),
            dtype=dtype,
            verify=cast("Verify", verify),
            options=options,
            **more,
        )
    answerer.reasoning = show_reasoning
    if seed is not None:
        torch.manual_seed(seed)
    return answerer


def check_dtype(dtype: str | None) -> None:
    """Refuse a dtype that no model is loaded or written in."""
    if dtype is not None and dtype not in DTYPES:
        raise UsageError(f"--dtype {dtype}: choose {', '.join(DTYPES)}")


@contextmanager
def uncollected() -> Iterator[None]:
    """Suspend Python's cycle collector while the block imports and loads.

    A start makes a million objects that stay; looking through them again and again for what might
    be freed took a sixth of the time.
    """
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
