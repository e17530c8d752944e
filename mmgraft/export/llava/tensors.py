"""The tensors of an exported LLaVA model, read when they are written."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration
from transformers.core_model_loading import revert_weight_conversion

from mmgraft.anatomy import skeleton
from mmgraft.basefiles import TensorReader, read_modules
from mmgraft.basefiles.tensor_files import LazyTensor
from mmgraft.errors import UsageError
from mmgraft.export.llava.fit import Ingredients
from mmgraft.frozen import Frozen
from mmgraft.runs.contents import weight_files

_TEXT, _TOWER, _PROJECTOR, _HEAD = (
    "model.language_model.",
    "model.vision_tower.",
    "model.multi_modal_projector.",
    "lm_head.",
)

#: Towers of published LLaVA models, whose tensors begin with ``vision_model.``.
_VISION_MODELS = ("clip_vision_model", "siglip_vision_model")


class Piece(Frozen):
    """Tensors that are read together, such as one layer.

    Attributes:
        names: Their names in the exported model.
        read: Reads them all.
    """

    names: tuple[str, ...]
    read: Callable[[], dict[str, Tensor]]


@contextmanager
def llava_tensors(
    made_of: Ingredients,
    model: LlavaForConditionalGeneration,
    own: Mapping[str, Callable[[], Tensor]] | None = None,
) -> Iterator[dict[str, LazyTensor]]:
    """Yield every tensor by its name on disk, as transformers itself would save it.

    One piece of the model (a layer, the embedding, the tower) is in memory at a time, as long as
    tensors are read in the order given. The files stay open while the block lasts.

    Args:
        made_of: The parts.
        model: The exported model on the meta device.
        own: What reads each tensor of the graft; by default from the folder of its run.

    Raises:
        UsageError: The base has tensors that the exported model has no place for.
    """
    with TensorReader(made_of.files) as reader:
        pieces = list(_Pieces(made_of, model, reader, own or own_tensors(made_of.run)).all())
        wanted = _wanted(made_of, model)
        _check_complete(pieces, wanted)
        last = _LastPiece(model, wanted)
        tensors: dict[str, LazyTensor] = {}
        tower = getattr(model.config.vision_config, "model_type", None)
        for piece in pieces:
            empty = {name: wanted[name] for name in piece.names}
            for name, tensor in revert_weight_conversion(model, empty).items():
                read = partial(last.tensor, piece, name)
                saved = _published(name) if tower in _VISION_MODELS else name
                tensors[saved] = LazyTensor(tuple(tensor.shape), tensor.dtype, read)
        yield tensors


def _published(name: str) -> str:
    """Return a tensor's name as published LLaVA models have it, which vLLM insists on."""
    tower, own, rest = name.partition("vision_tower.")
    return f"{tower}{own}vision_model.{rest.removeprefix('vision_model.')}" if own else name


class _LastPiece:
    """Keeps the piece that was read last, in the form in which it is saved."""

    def __init__(self, model: LlavaForConditionalGeneration, wanted: dict[str, Tensor]) -> None:
        self.model, self.wanted = model, wanted
        self.piece: Piece | None = None
        self.tensors: dict[str, Tensor] = {}

    def tensor(self, piece: Piece, name: str) -> Tensor:
        if piece is not self.piece:
            self.piece, self.tensors = None, {}
            read = piece.read()
            typed = {name: read[name].detach().to(self.wanted[name].dtype) for name in piece.names}
            self.piece, self.tensors = piece, revert_weight_conversion(self.model, typed)
        return self.tensors[name]


class _Pieces:
    """Source of every tensor of the exported model."""

    def __init__(
        self,
        made_of: Ingredients,
        model: LlavaForConditionalGeneration,
        reader: TensorReader,
        own: Mapping[str, Callable[[], Tensor]],
    ) -> None:
        self.made_of, self.model, self.reader = made_of, model, reader
        self.anatomy = made_of.anatomy
        self.base = skeleton(made_of.base_config)
        self.prefix = f"{self.base.base_model_prefix}."
        self.rows = model.lm_head.weight.shape[0]
        self.own = own

    def all(self) -> Iterator[Piece]:
        """Yield every piece in the order of the model."""
        anatomy = self.anatomy
        for path in self._outside(self.base, ""):
            if path == anatomy.embedding_path:
                yield self._embedding()
            elif path == anatomy.norm_path and "norm" in self.made_of.owns:
                yield self._from_graft("graft.norm.", self._place(path))
            elif path != anatomy.head_path:
                yield self._from_base(path, self._place(path))
        for number, layer in enumerate(self.made_of.layers):
            target = self._place(f"{anatomy.layers_path}.{number}")
            if layer.inserted is None:
                yield self._from_base(f"{anatomy.layers_path}.{layer.index}", target)
            else:
                yield self._from_graft(f"graft.layers.{layer.inserted}.", target)
        if not self.made_of.tied:
            yield self._head()
        yield self._projector()
        tower = self.made_of.tower.model.state_dict()
        named = {_TOWER + name: tensor for name, tensor in tower.items()}
        yield Piece(tuple(named), lambda: named)

    def _outside(self, module: nn.Module, prefix: str) -> Iterator[str]:
        """Yield paths of the modules with tensors that are no decoder layers."""
        layers = self.anatomy.layers_path
        for name, child in module.named_children():
            path = prefix + name
            if layers.startswith(f"{path}."):
                yield from self._outside(child, f"{path}.")
            elif path != layers and child.state_dict():
                yield path

    def _place(self, path: str) -> str:
        """Return the exported model's name for a module of the base's decoder."""
        if not path.startswith(self.prefix):
            raise UsageError(
                f"{self.anatomy.class_name} has tensors in {path}, beside its decoder, which LLaVA "
                "has no place for. Use --to full for one folder that mmgraft loads."
            )
        return f"{_TEXT}{path.removeprefix(self.prefix)}."

    def _from_base(self, path: str, target: str) -> Piece:
        inside = self.base.get_submodule(path).state_dict()
        names = {f"{target}{name}": f"{path}.{name}" for name in inside}

        def read() -> dict[str, Tensor]:
            loaded = self._load(path)
            return {name: loaded[source] for name, source in names.items()}

        return Piece(tuple(names), read)

    def _load(self, path: str) -> dict[str, Tensor]:
        dtype = self.made_of.dtype
        return read_modules(self.reader, self.made_of.base_config, [path], dtype).state_dict()

    def _from_graft(self, source: str, target: str) -> Piece:
        mine = {
            target + name.removeprefix(source): read
            for name, read in self.own.items()
            if name.startswith(source)
        }
        return Piece(tuple(mine), lambda: {name: read() for name, read in mine.items()})

    def _embedding(self) -> Piece:
        path = self.anatomy.embedding_path
        return self._padded("embedding", path, f"{self._place(path)}weight", 1.0)

    def _head(self) -> Piece:
        # A tied base has no head of its own on disk: it is the embedding's tensor.
        path = self.anatomy.embedding_path if self.anatomy.tied else self.anatomy.head_path
        return self._padded("head", path, f"{_HEAD}weight", self.anatomy.logit_scale)

    def _padded(self, part: str, path: str, target: str, scale: float) -> Piece:
        """Embedding or head, with rows for tokens that the base has none for."""

        def read() -> dict[str, Tensor]:
            weight = self._own_or_base(part, path)
            if scale != 1.0:
                weight = (weight.float() * scale).to(self.made_of.dtype)
            return {target: pad_rows(weight, self.rows)}

        return Piece((target,), read)

    def _own_or_base(self, part: str, path: str) -> Tensor:
        if part in self.made_of.owns:
            tied = part == "head" and self.made_of.tied_own
            return self.own[f"graft.{'embedding' if tied else part}.weight"]()
        return self._load(path)[f"{path}.weight"]

    def _projector(self) -> Piece:
        names = {
            f"{_PROJECTOR}linear_{number}.{part}": f"projector.mlp.{index}.{part}"
            for number, index in ((1, 0), (2, 2))
            for part in ("weight", "bias")
        }
        return Piece(tuple(names), lambda: {name: self.own[mine]() for name, mine in names.items()})


def pad_rows(weight: Tensor, rows: int) -> Tensor:
    """Give an embedding or a head new rows, each the mean of all: ``(v, h) -> (rows, h)``.

    The mean's logit is the mean of the logits, so a new token is never the most likely one.
    """
    missing = rows - weight.shape[0]
    if missing <= 0:
        return weight
    mean = weight.float().mean(dim=0, keepdim=True).to(weight.dtype)
    return torch.cat([weight, mean.expand(missing, -1)])


def own_tensors(run: Path) -> dict[str, Callable[[], Tensor]]:
    """Return what reads each tensor of the graft."""
    found: dict[str, Callable[[], Tensor]] = {}
    for path in weight_files(run):
        file = safe_open(path, framework="pt")
        for name in file.keys():  # noqa: SIM118  (no mapping)
            found[name] = partial(file.get_tensor, name)
    return found


def _wanted(made_of: Ingredients, model: LlavaForConditionalGeneration) -> dict[str, Tensor]:
    """Return every tensor of the exported model, empty, in the dtype that is written."""
    found = {
        name: tensor.to(made_of.dtype) if tensor.is_floating_point() else tensor
        for name, tensor in model.state_dict().items()
    }
    if made_of.tied:
        found.pop(f"{_HEAD}weight")
    return found


def _check_complete(pieces: list[Piece], wanted: dict[str, Tensor]) -> None:
    given = [name for piece in pieces for name in piece.names]
    wrong = set(given) ^ set(wanted)
    if wrong or len(given) != len(set(given)):
        name = min(wrong) if wrong else "one twice"
        raise UsageError(
            f"base and LLaVA's decoder do not hold the same tensors ({name}), so that this base "
            "cannot be written as one. Use --to full for one folder that mmgraft loads."
        )
