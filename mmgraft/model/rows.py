"""The workflow of each row of a batch, and the token type of each position."""

from collections.abc import Collection, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from mmgraft.errors import UsageError
from mmgraft.frozen import Frozen
from mmgraft.grafts.base import IMAGE, PADDING, TEXT
from mmgraft.model.cache import RowSlot
from mmgraft.model.workflow import TEXT_WORKFLOW

#: Stands for ``text`` among the numbers of workflows.
TEXT_NUMBER = -1


class Rows(Frozen):
    """A batch's rows.

    Attributes:
        names: Workflow of each.
        images: Image positions of each, of the new ones.
    """

    names: list[str]
    images: Sequence[int] = ()

    @property
    def text_only(self) -> bool:
        """Return whether the base alone runs."""
        return all(name == TEXT_WORKFLOW for name in self.names)

    def gate(self, name: str, device: torch.device) -> Tensor | None:
        """Mark the rows of one workflow ``(b,)``; None where all rows run it."""
        if all(other == name for other in self.names):
            return None
        return torch.tensor([other == name for other in self.names], device=device)

    def numbers(self, known: Sequence[str]) -> list[int]:
        """Return the number of each row's workflow among those known."""
        return [known.index(one) if one != TEXT_WORKFLOW else TEXT_NUMBER for one in self.names]


def sort_rows(
    batch: tuple[int, int],
    image_mask: Tensor | None,
    wanted: str | Sequence[str] | Tensor | None,
    known: Sequence[str],
    default: str,
    slot: RowSlot,
    real: Tensor | None = None,
    continuing: Collection[str] = (),
) -> Rows:
    """Decide every row's workflow.

    Args:
        batch: Rows and new positions ``(b, s)``.
        image_mask: ``mm_token_type_ids (b, s)``, 1 at image positions; None means no image.
        wanted: What the caller wants: one workflow, one a row, or (inside ``generate``)
            numbers into ``known`` with -1 for ``text``.
        known: Workflows of the model.
        default: The workflow of a row with an image when the caller names none.
        slot: Rows that a cache remembers.
        real: ``(b, s)`` or longer, 0 at padding; None means no padding.
        continuing: Workflows that go on from a cache that ``text`` filled.

    Raises:
        UsageError: An unknown workflow, images in a row that runs ``text``, or a cache that was
            filled by another workflow.
    """
    size, length = batch
    images = [0] * size
    if image_mask is not None:  # the one look that the host takes at where images stand
        shown = image_mask[:, -length:] != 0
        if real is not None and real.dim() == 2:
            shown = shown & (real[:, -length:] != 0)
        images = shown.sum(dim=1).tolist()
    chosen = _by_row(wanted, known, size)
    held = [TEXT_WORKFLOW] * size
    if slot.filled:
        held = [TEXT_WORKFLOW if n < 0 else known[n] for n in slot.workflows()]
    names = chosen or [
        default if count and name == TEXT_WORKFLOW else name
        for name, count in zip(held, images, strict=True)
    ]
    if slot.filled or slot.past:
        _refuse_other_cache(held, names, continuing)
    _refuse_blind(names, images, known)
    return Rows(names, images)


def _refuse_other_cache(held: list[str], names: list[str], continuing: Collection[str]) -> None:
    """Refuse a cache that the rows' workflows cannot go on from."""
    for before, now in zip(held, names, strict=True):
        if before not in (now, TEXT_WORKFLOW):
            raise UsageError(
                "the cache was filled by another workflow than the one wanted now; "
                "begin with a fresh cache."
            )
        if before != now and now not in continuing:
            raise UsageError(
                f"this cache was filled by the text workflow, and a row now needs {now!r} (an "
                "image changes how the earlier text is read): run the whole dialogue again with a "
                "fresh cache."
            )


def _refuse_blind(names: list[str], images: list[int], known: Sequence[str]) -> None:
    for row, (name, count) in enumerate(zip(names, images, strict=True)):
        if count and name == TEXT_WORKFLOW:
            raise UsageError(
                f"row {row} has an image but runs the text workflow (the base alone, which cannot "
                f"see): choose one of {', '.join(known)}, or take the image out."
            )


def _by_row(
    wanted: str | Sequence[str] | Tensor | None, known: Sequence[str], size: int
) -> list[str] | None:
    if wanted is None:
        return None
    if isinstance(wanted, Tensor):
        return [TEXT_WORKFLOW if n < 0 else known[int(n)] for n in wanted.tolist()]
    names = [wanted] * size if isinstance(wanted, str) else list(wanted)
    if len(names) != size:
        raise UsageError(f"{len(names)} workflows were given for {size} rows; give one a row.")
    for name in names:
        if name != TEXT_WORKFLOW and name not in known:
            raise UsageError(
                f"no workflow is called {name!r}; this model has: "
                f"{', '.join([TEXT_WORKFLOW, *known])}."
            )
    return names


def shared_positions(positions: Tensor, images: Tensor, slot: RowSlot) -> Tensor:
    """Give all positions of an image the number of its first, and let text go on from it.

    Args:
        positions: Each token's own ``(b, s)``.
        images: Number of the image at each, -1 at others, ``(b, s)``.
        slot: The rows so far.
    """
    again = (images[:, 1:] == images[:, :-1]) & (images[:, 1:] >= 0)
    return (positions - F.pad(again, (1, 0)).cumsum(1) - slot.spared()).clamp(min=0)


def kinds_of(
    batch: tuple[int, int],
    image_mask: Tensor | None,
    attention_mask: Tensor | None,
    device: torch.device,
) -> Tensor:
    """Kind of every new position, ``(b, s)``: padding, text or image.

    Args:
        batch: Rows and new positions ``(b, s)``.
        image_mask: ``(b, s)`` or longer, 1 at image positions; None means no image.
        attention_mask: ``(b, past + s)``, 0 at padding; None means no padding.
        device: Where to.
    """
    size, length = batch
    kinds = torch.full((size, length), TEXT, device=device)
    if image_mask is not None:
        kinds = kinds.masked_fill(image_mask[:, -length:] != 0, IMAGE)
    if attention_mask is not None and attention_mask.dim() == 2:
        kinds = kinds.masked_fill(attention_mask[:, -length:] == 0, PADDING)
    return kinds
