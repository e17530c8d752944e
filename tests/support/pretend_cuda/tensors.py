"""Tensors of a make-believe card, and what becomes of an operation on them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing

from pretend_cuda.seen import INDEXED, line_of_code, note_operation, wait

CARD = torch.device("cuda:0")
_CPU = torch.device("cpu")


class OnCard(Tensor):
    """A tensor of a make-believe card; ``held`` is the real one."""

    held: Tensor

    @staticmethod
    def __new__(
        cls, held: Tensor, requires_grad: bool = False, card: torch.device = CARD
    ) -> OnCard:
        with torch.inference_mode(held.is_inference()):  # a view of an older tensor is none
            made = Tensor._make_wrapper_subclass(
                cls, held.size(), strides=held.stride(), storage_offset=held.storage_offset(),
                dtype=held.dtype, layout=held.layout, device=card, requires_grad=requires_grad,
            )  # fmt: skip
        made.held = held
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})

    # What torch does without an operation, or not at all for a wrapper.

    def tolist(self) -> Any:
        wait("tolist")
        return self.held.tolist()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def is_pinned(self, *_: Any) -> bool:
        return False

    def numpy(self, **_: Any) -> Any:
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor "
            f"to host memory first. At {line_of_code()}"
        )

    def __array__(self, *_: Any, **__: Any) -> Any:
        return self.numpy()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        made = other.detach()
        if isinstance(made, OnCard):
            self.held = made.held
        Tensor.data.__set__(self, made)  # type: ignore[attr-defined]

    def __repr__(self, **_: Any) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f"OnCard({self.held!r})"

    def __reduce_ex__(self, protocol: Any) -> Any:  # saved as what `map_location="cpu"` gives
        return self.detach().held.__reduce_ex__(protocol)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if id(self) not in memo:
            copied = OnCard.__new__(type(self), self.held.clone(), self.requires_grad, self.device)
            copied.__dict__.update({k: v for k, v in self.__dict__.items() if k != "held"})
            memo[id(self)] = copied
        return memo[id(self)]

    def __tensor_flatten__(self) -> tuple[list[str], None]:
        return ["held"], None

    @staticmethod
    def __tensor_unflatten__(inner: Any, meta: Any, size: Any, stride: Any) -> OnCard:
        return OnCard(inner["held"])


_ACROSS = {"aten::_to_copy", "aten::copy_", "aten::copy"}
"""Operations that go from one device to another."""
_SCALARS = {
    "aten::masked_fill", "aten::masked_fill_", "aten::fill_", "aten::fill", "aten::index_fill",
    "aten::index_fill_", "aten::where", "aten::_foreach_mul_", "aten::_foreach_add_",
    "aten::_foreach_div_", "aten::_foreach_mul", "aten::_foreach_add", "aten::_foreach_div",
    "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index_put",
}  # fmt: skip
"""Operations beside the pointwise ones that take a CPU tensor without dimensions."""


def _run(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run one operation as a card would take it."""
    _tensors_are_moved()
    name = func._schema.name
    tensors: list[Tensor] = []
    _gather((*args, *kwargs.values()), tensors)
    ours = [tensor for tensor in tensors if isinstance(tensor, OnCard)]
    wanted = kwargs.get("device")
    wanted = None if wanted is None else torch.device(wanted)
    if not ours and (wanted is None or wanted.type != "cuda"):
        return _on_cpu(func, name, args, kwargs)
    if _is_composite(func):  # as they come in inference mode
        with Mode():
            return func.decompose(*args, **kwargs)
    to = _lands(name, args, ours, wanted)
    _check(func, name, args, kwargs, tensors, ours)
    note_operation(name, func, args, kwargs, to)
    plain_args, plain = _map(_held, args), _map(_held, kwargs)
    if wanted is not None:
        plain["device"] = _CPU
    plain.pop("pin_memory", None)
    if name == "aten::_to_copy":
        plain.pop("non_blocking", None)
        if wanted is not None and wanted != args[0].device:  # else CPU to CPU would be a view
            out = plain_args[0].to(
                dtype=plain.get("dtype"), copy=True,
                memory_format=plain.get("memory_format") or torch.preserve_format,
            )  # fmt: skip
            return out if to is None else OnCard(out, card=to)
    if name == "aten::histc" and not plain_args[0].is_floating_point():  # the CPU has it for floats
        plain_args = (plain_args[0].float(), *plain_args[1:])
    out = func(*plain_args, **plain)
    return out if to is None else _returned(func, args, kwargs, out, to)


def _tensors_are_moved() -> None:
    """Make tensors of Python's numbers on the CPU and move them from there, in this thread."""
    torch._C._set_only_lift_cpu_tensors(True)


def _on_cpu(func: Any, name: str, args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operation without a card; pinned memory is ordinary memory that is marked."""
    if name == "aten::is_pinned":
        return getattr(args[0], "_pinned", False)
    if not kwargs.get("pin_memory"):
        return func(*args, **kwargs)
    out = func(*args, **(kwargs | {"pin_memory": False}))
    out._pinned = True
    return out


def _lands(
    name: str, args: Any, ours: list[OnCard], wanted: torch.device | None
) -> torch.device | None:
    """Find the card of what comes out; None for the CPU."""
    if wanted is not None and wanted.type == "cuda":
        return torch.device("cuda", wanted.index or 0)
    if wanted is not None:
        return None
    if name in _ACROSS:
        return args[0].device if isinstance(args[0], OnCard) else None
    return ours[0].device


def _returned(func: Any, args: Any, kwargs: Any, out: Any, card: torch.device) -> Any:
    """Put results on a card; what was written in place is the tensor that was given."""
    made = _map(lambda tensor: OnCard(tensor, card=card), out)
    if torch.Tag.inplace_view in func.tags:  # shape and strides of the wrapper change too
        return return_and_correct_aliasing(func, args, kwargs, made)
    written = _written(func)
    if not any(written):
        return made
    names = [argument.name for argument in func._schema.arguments]
    named = {**dict(zip(names, args, strict=False)), **kwargs}
    given = [named[name] if name else None for name in written]
    return given[0] if len(given) == 1 else tuple(given)


@functools.cache
def _written(func: Any) -> list[str | None]:
    """Find for each result the argument that it is after it was written to; None for another."""
    found: list[str | None] = []
    for one in func._schema.returns:
        alias = one.alias_info if one.alias_info is not None and one.alias_info.is_write else None
        owners = [
            argument.name
            for argument in func._schema.arguments
            if alias and argument.alias_info and argument.alias_info.before_set & alias.before_set
        ]
        found.append(owners[0] if owners else None)
    return found


@functools.cache
def _is_composite(func: Any) -> bool:
    """Say whether an operation is made of others."""
    return func._can_decompose() and torch._C._dispatch_has_kernel_for_dispatch_key(
        func.name(), "CompositeImplicitAutograd"
    )


def _check(
    func: Any, name: str, args: Any, kwargs: Any, tensors: list[Tensor], ours: list[OnCard]
) -> None:
    """Refuse what CUDA refuses.

    Raises:
        RuntimeError: Tensors of two devices, or a generator of the CPU.
    """
    generator = kwargs.get("generator")
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    if name in _ACROSS:
        return
    cards = {str(tensor.device) for tensor in ours}
    if len(cards) > 1 and not name.startswith("aten::_foreach"):
        raise RuntimeError(f"{_TWO} {' and '.join(sorted(cards))}! ({name}) at {line_of_code()}")
    strangers = [t for t in tensors if not isinstance(t, OnCard) and t.device.type == "cpu"]
    if not ours or not strangers:
        return
    if name in INDEXED and isinstance(args[0], OnCard):
        indices = {id(index) for index in args[1] if index is not None}
        strangers = [tensor for tensor in strangers if id(tensor) not in indices]
    if torch.Tag.pointwise in func.tags or name in _SCALARS:
        first = args[0]
        strangers = [tensor for tensor in strangers if tensor.dim()]
        if isinstance(first, Tensor) and not isinstance(first, OnCard) and name.endswith("_"):
            strangers = [first]  # written on the CPU, from a card
    if strangers:
        shapes, at = [(*tensor.shape,) for tensor in strangers], line_of_code()
        raise RuntimeError(f"{_TWO} {min(cards)} and cpu! ({name}, CPU: {shapes}) at {at}")


_TWO = "Expected all tensors to be on the same device, but found at least two devices,"


def _gather(values: Any, into: list[Tensor]) -> None:
    for value in values:
        if isinstance(value, Tensor):
            into.append(value)
        elif isinstance(value, list | tuple):
            _gather(value, into)


def _map(change: Callable[[Tensor], Tensor], value: Any) -> Any:
    """Change the tensors of a value, at any depth."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, list | tuple):
        return type(value)([_map(change, one) for one in value])
    if isinstance(value, dict):
        return {name: _map(change, one) for name, one in value.items()}
    return value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, OnCard) else tensor


class Mode(TorchDispatchMode):
    """Take operations without a tensor of a card, such as those that make one."""

    def __enter__(self) -> Any:
        _tensors_are_moved()
        return super().__enter__()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _run(func, args, kwargs or {})
