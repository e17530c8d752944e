"""The contract that every method implements, and the forward pass that it takes part in.

A method is one folder: a config (pydantic, free of torch) and a :class:`Graft`. The model runs the
base's own decoder layers and asks each graft of an active workflow two things per layer: a context
to run the base layer in (:meth:`Graft.layer_context`, for additions beside the attention) and
what follows it (:meth:`Graft.after_layer`, for inserted layers).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Protocol

import torch
from accelerate.utils.operations import send_to_device
from torch import Tensor, nn

from mmgraft.anatomy import Anatomy
from mmgraft.errors import UsageError
from mmgraft.grafts.computing import computes_on
from mmgraft.grafts.method import Promises, StageSwitches
from mmgraft.grafts.registry import get_method

#: Kinds of a position. Padding is 0, as a cache slot is that nothing was written to.
PADDING, TEXT, IMAGE = 0, 1, 2

#: CUDA's efficient attention copies a mask whose width is no multiple of this, in every call.
MASK_WIDTH = 8

#: In :meth:`Graft.slot_layers`: a slot that keeps every position, whatever the base's layers do.
FULL_ATTENTION = -1

#: In :meth:`Graft.slot_layers`: a slot of images beside the sequence,
#: :class:`mmgraft.model.cache.MemoryLayer`.
MEMORY = -2


@dataclass
class Memory:
    """Images beside the sequence, and which of them each new position sees.

    The images of a row are numbered from 1 in their order. A position sees those with
    ``first < number <= last``: the ones that stand at or before it in its row, and in a sequence of
    several rows in its own one.
    """

    features: Tensor | None  # (T, h) vectors of the new images, one after another; None without one
    index: Tensor  # (b, K) which of the T belong to a row
    owner: Tensor  # (b, K) number of the image that each is of, 0 where a row has fewer than K
    before: Tensor  # (b,) images in the row before the new positions
    first: Tensor  # (b, s)
    last: Tensor  # (b, s)


@dataclass
class Packed:
    """The positions of one kind, moved together: row by row the ``K`` columns that hold it.

    Rows with fewer than ``K`` are filled with other columns, which no query may look at.
    """

    columns: Tensor  # (b, K) ascending
    features: Tensor  # (b, K, h) initial features there
    positions: Tensor  # (b, K) own positions there
    mask: Tensor  # (b, 1, s, K) as from Pass.visible
    seen: Tensor  # (b, s, 1) likewise

    def on(self, device: torch.device) -> "Packed":
        """Return the same on another device."""
        return Packed(**{name: tensor.to(device) for name, tensor in vars(self).items()})


def image_numbers(kinds: Tensor, lengths: Tensor | None) -> Tensor:
    """Return the number of the image that each position belongs to ``(b, s)``; -1 at others.

    Args:
        kinds: ``(b, s)``.
        lengths: Positions of each image ``(images,)``; None where there is none.
    """
    found = torch.full_like(kinds, -1)
    if lengths is None:
        return found
    numbers = torch.arange(len(lengths)).repeat_interleave(lengths)
    return found.masked_scatter(kinds == IMAGE, numbers.to(found))


@dataclass
class Pass:
    """One forward pass over new positions ``s``, with all positions so far ``S`` as keys."""

    anatomy: Anatomy
    features: Tensor  # (b, s, h) initial features: text embeddings, projected image features
    kinds: Tensor  # (b, s) PADDING, TEXT or IMAGE
    positions: Tensor  # (b, s) a token's own position in its row, padding not counted
    key_kinds: Tensor  # (b, S)
    key_positions: Tensor  # (b, S)
    start: int  # column of the first new position among the keys
    cache: Any = None
    images: Tensor | None = None  # (sum of image_counts, h) projected features, image after image
    image_counts: Tensor | None = None  # (images,) vectors of each, on the CPU as the next two
    image_lengths: Tensor | None = None  # (images,) positions of each: its vectors, or 0 (unplaced)
    image_rows: Tensor | None = None  # (images,) the row of each, ascending
    shared: dict[Any, Any] = field(default_factory=dict)  # computed once, used by every layer
    packed: dict[int, Packed] = field(default_factory=dict)  # by kind, where a graft asked for it
    segments: Tensor | None = None  # (b, s) which of a sequence's rows, where it holds several

    def on(self, device: torch.device) -> "Pass":
        """Return this pass with its tensors on a device (itself where they are there already)."""
        if device == self.features.device:
            return self
        key = ("pass", device)
        if key not in self.shared:
            names = ("features", "kinds", "positions", "key_kinds", "key_positions")
            given = {name: getattr(self, name) for name in (*names, "segments", "images")}
            begun = {name: value for name, value in self.shared.items() if isinstance(name, str)}
            packed = {kind: chosen.on(device) for kind, chosen in self.packed.items()}
            moved: Any = send_to_device({**given, "shared": begun}, device)
            other = replace(self, **moved, packed=packed)
            vars(other).update(any_image=self.any_image, new_image=self.new_image)
            self.shared[key] = other
        return self.shared[key]

    @cached_property
    def columns(self) -> Tensor:
        """Column of each new position among the keys, ``(s,)``."""
        return torch.arange(self.kinds.shape[1], device=self.kinds.device) + self.start

    @cached_property
    def any_image(self) -> bool:
        """Return whether any key of any row is an image position."""
        return bool((self.key_kinds == IMAGE).any())

    @cached_property
    def new_image(self) -> bool:
        """Return whether any new position of any row is an image position."""
        return bool((self.kinds == IMAGE).any())

    @cached_property
    def ordinals(self) -> Tensor:
        """Number of the image that each new position belongs to ``(b, s)``; -1 at others."""
        return image_numbers(self.kinds, self.image_lengths)

    @cached_property
    def memory(self) -> Memory:
        """Images beside the sequence, for grafts of which an image takes one position.

        Take it before the first layer, as :meth:`pack`.
        """
        images = (self.key_kinds == IMAGE).cumsum(-1)  # (b, S) at or before each key
        counts = nn.functional.pad(images, (1, 0))  # (b, S + 1) before each key
        first = torch.zeros_like(self.kinds)
        if self.segments is not None:
            begins = self.segments.diff(dim=1, prepend=self.segments[:, :1]) != 0
            starts = torch.where(begins, self.columns, 0).cummax(-1).values  # of each one's segment
            first = counts.gather(1, starts)
        index = owner = torch.zeros_like(self.kinds[:, :0])
        before = counts[:, self.start]
        if self.images is not None:
            index, owner = self._of_rows()
            owner = torch.where(owner > 0, owner + before[:, None], 0)
        return Memory(self.images, index, owner, before, first, images[:, self.start :])

    def _of_rows(self) -> tuple[Tensor, Tensor]:
        """Return which vectors of the new images are of which row, and of its which image."""
        assert self.image_rows is not None
        assert self.image_counts is not None
        assert self.image_lengths is not None
        placed = self.image_lengths > 0  # others stand nowhere, so that nobody sees them
        same = self.image_rows[:, None] == self.image_rows
        numbers = (same & placed).tril().sum(-1) * placed  # (images,)
        rows, numbers = (
            one.repeat_interleave(self.image_counts) for one in (self.image_rows, numbers)
        )
        mine = [(rows == row).nonzero().squeeze(1) for row in range(len(self.kinds))]
        pair = mine, [numbers[one] for one in mine]
        index, owner = (nn.utils.rnn.pad_sequence(one, batch_first=True) for one in pair)
        return index.to(self.kinds.device), owner.to(self.kinds.device)

    def visible(self, kind: int) -> tuple[Tensor, Tensor]:
        """Keys of one kind at or before each query.

        Returns:
            A mask ``(b, 1, s, S)`` that is true where the query may look (a query that sees nothing
            gets a row of true, so that no softmax runs over nothing) and ``(b, s, 1)``, true for
            the queries that see something.
        """
        if kind not in self.shared:
            mask = (self.key_kinds == kind)[:, None, :]
            if self.kinds.shape[1] > 1:  # after a single new position comes no key of any kind
                keys = torch.arange(self.key_kinds.shape[1], device=self.key_kinds.device)
                mask = mask & (keys <= self.columns[:, None])[None]
            if self.segments is not None:
                mask = mask & (self.segments[:, :, None] == self.segments[:, None, :])
            seen = mask.any(-1, keepdim=True)
            self.shared[kind] = ((mask | ~seen)[:, None], seen)
        return self.shared[kind]

    def pack(self, kind: int) -> None:
        """Fill :attr:`packed` for a kind, in a pass without a cache.

        Called before the first layer: what a checkpointed layer computed here for all of them would
        not be computed again in the backward pass.
        """
        chosen = self.kinds == kind  # (b, s)
        counts = chosen.sum(-1)
        width = int(counts.max())
        if width == 0 or kind in self.packed:
            return
        if computes_on(self.features) == "cuda":
            width = min(-(-width // MASK_WIDTH) * MASK_WIDTH, chosen.shape[1])
        columns = (~chosen).to(torch.uint8).argsort(dim=-1, stable=True)[:, :width]
        there = torch.arange(width, device=columns.device) < counts[:, None]
        mask = there[:, None, :] & (columns[:, None, :] <= self.columns[:, None])  # (b, s, K)
        if self.segments is not None:
            theirs = self.segments.gather(1, columns)  # (b, K)
            mask = mask & (self.segments[:, :, None] == theirs[:, None, :])
        seen = mask.any(-1, keepdim=True)
        wide = columns[..., None].expand(-1, -1, self.features.shape[-1])
        self.packed[kind] = Packed(
            columns=columns,
            features=self.features.gather(1, wide),
            positions=self.positions.gather(1, columns),
            mask=(mask | ~seen)[:, None],
            seen=seen,
        )


class BaseParts(Protocol):
    """Modules of a base that a graft copies, or (on the meta device) takes the shape of."""

    def layer(self, index: int) -> nn.Module: ...
    def embedding(self) -> nn.Module: ...
    def norm(self) -> nn.Module: ...
    def head(self) -> nn.Module: ...
    def modules(self, paths: Sequence[str]) -> list[nn.Module]: ...


#: Called with attention that a graft computes beside the base's: base layer, queries and keys
#: ``(b, heads, s, d)``, the mask, the queries that see a key ``(b, s, 1)``, and the share
#: ``(b, s)`` with which the result is added, None for 1.
Watch = Callable[[int, Tensor, Tensor, Tensor, Tensor, Tensor | None], None]


class Graft(nn.Module):
    """New modules on a frozen base. Subclasses are the methods.

    Args:
        config: The method's settings.
        anatomy: The base.
        parts: Copies of the base's modules to start from.

    Attributes:
        method: Name of the method.
        active: False leaves the graft out of the path (a stage for the projector alone).
        embedding, norm, head: The workflow's own modules, or None to use the base's.
        watch: Set for measurements; see :data:`Watch`. A graft without attention of its own never
            calls it.
    """

    method: ClassVar[str]
    config: Any  # the method's own pydantic class
    embedding: nn.Module | None
    norm: nn.Module | None
    head: nn.Module | None
    watch: Watch | None = None

    def __init__(self, config: Any, anatomy: Anatomy, parts: BaseParts | None = None) -> None:
        super().__init__()
        self.config = config
        self.anatomy = anatomy
        self.active = True
        # Set here: a class attribute would hide the module that a subclass registers.
        self.embedding = self.norm = self.head = None

    @cached_property
    def promises(self) -> Promises:
        """Return what holds for this graft, from its method's descriptor."""
        return get_method(self.method).promises(self.config)

    @property
    def continues_text(self) -> bool:
        """Return whether a cache that the base filled with text goes on when an image arrives.

        It does where text before an image has the base's own keys and values (level E2).
        """
        return not (self.active and self.promises.before)

    @property
    def shares_positions(self) -> bool:
        """Return whether all positions of an image have one number, which text after goes on from.

        The base is then always given a mask: without one transformers reads repeated numbers as the
        beginnings of packed rows.
        """
        return False

    # -- what runs ------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """Return what runs now, for ``graft_config.json``; :meth:`set_state` takes it back."""
        return {"active": self.active}

    def set_state(self, state: dict[str, Any]) -> None:
        """Run what an earlier :meth:`state` says.

        Raises:
            UsageError: A key that this method does not know.
        """
        unknown = set(state) - set(self.state())
        if unknown:
            raise UsageError(
                f"method {self.method} has no state {', '.join(sorted(unknown))}; it has: "
                f"{', '.join(self.state())}."
            )
        self.active = bool(state.get("active", self.active))

    def switch(self, switches: StageSwitches) -> None:
        """Run what a stage of a recipe wants.

        Args:
            switches: The stage, which has the fields of the method's :attr:`Method.stage`.

        Raises:
            UsageError: This graft does not have what is wanted; the stage's name is put before it.
        """

    def readings(self) -> dict[str, Tensor]:
        """Return what is worth following in training, by the name under which it is logged; of
        several numbers the largest in size is.
        """
        return {}

    def remark(self, readings: Mapping[str, float]) -> str | None:
        """Return what a user must know at the end of a training, from its last readings; None for
        nothing.
        """
        return None

    # -- the forward ----------------------------------------------------------------------------

    def placed(self, vectors: Tensor) -> Tensor:
        """Return what stands at the positions of an image, of which the projector made
        ``vectors (count, h)``; as many as :meth:`Method.positions` says.
        """
        return vectors

    def check_length(self, length: int) -> None:
        """Refuse a row of ``length`` positions that the graft cannot represent."""

    def check_attention(self, implementation: str) -> None:
        """Refuse an attention of the base that the graft cannot run beside, when it is loaded.

        Args:
            implementation: Its name in transformers, such as ``sdpa`` or ``flash_attention_2``.
        """

    def begin(self, state: Pass) -> None:
        """Compute what all layers of a pass share, before the first of them.

        Tensors in ``state.shared`` under a string go with the pass to other devices; what stands
        under any other key is computed there anew.
        """

    def acts_on(self, index: int) -> bool:
        """Return whether the graft does anything at base layer ``index``."""
        return False

    def layer_context(
        self, index: int, layer: nn.Module, hidden: Tensor, state: Pass, gate: Tensor | None
    ) -> AbstractContextManager[Any]:
        """Return a context to run base layer ``index`` in, given its input ``hidden (b, s, h)``.

        ``gate (b,)`` is true for the rows that run this graft; None means all of them.
        """
        return nullcontext()

    def changes_feed_forward(self, index: int) -> bool:
        """Return whether :meth:`layer_context` reaches into the feed-forward of a base layer.

        If it does, the last layer's feed-forward gets whole rows ``(b, s, h)``; else it may run at
        the positions that are read alone. By default every :meth:`layer_context` does.
        """
        return type(self).layer_context is not Graft.layer_context

    def after_layer(
        self,
        index: int,
        call: Callable[[nn.Module, Tensor], Tensor],
        hidden_in: Tensor,
        hidden_out: Tensor,
        state: Pass,
        carry: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Return what follows base layer ``index``, and what to carry to the next layer.

        Args:
            index: The base layer.
            call: ``call(module, x)`` runs a decoder layer with the arguments that the base layer
                got.
            hidden_in: Hidden states that went into the base layer, ``(b, s, h)``.
            hidden_out: Those that came out of it.
            state: The forward pass.
            carry: What the last layer's call returned to carry.
        """
        return hidden_out, carry

    def ends_with(self, index: int) -> nn.Module | None:
        """Return the decoder layer that :meth:`after_layer` runs last after base layer ``index``.

        Only where each position of what comes out needs no other position of that layer's output;
        None makes no promise. The last layer's feed-forward is then run where it is read alone.
        """
        return None

    # -- the cache ------------------------------------------------------------------------------

    def slot_layers(self) -> list[int]:
        """Return an entry for each extra cache slot: the base layer whose cache type it takes, or
        :data:`FULL_ATTENTION` or :data:`MEMORY`.
        """
        return []

    def assign_slots(self, first: int) -> None:
        """Take note of the cache index of the graft's first slot."""

    # -- the parameters -------------------------------------------------------------------------

    def groups(self) -> dict[str, Iterable[nn.Parameter]]:
        """Return named groups of parameters that a recipe's stage can train."""
        return {}

    def layer_modules(self) -> Sequence[tuple[int, nn.Module]]:
        """Return pairs of a base layer and a module that belongs on its device."""
        return []

    def shares(self) -> set[str]:
        """Return state-dict keys that repeat another key's tensor and are not saved."""
        return set()

    def tie(self) -> None:
        """Make one tensor again of parameters that are one: called after they were replaced."""


def select(gate: Tensor | None, chosen: Tensor, other: Tensor) -> Tensor:
    """Return rows of ``chosen`` where ``gate (b,)`` is true, rows of ``other`` elsewhere."""
    if gate is None:
        return chosen
    gate = gate.to(chosen.device).view(-1, *[1] * (chosen.dim() - 1))
    return torch.where(gate, chosen, other.to(chosen))
