"""Settings of a cross-attention graft."""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import field_validator, model_validator

from mmgraft.errors import UsageError
from mmgraft.grafts.method import PlainDecoder, Promises, StageSwitches
from mmgraft.strict import LayerChoice, Option, StrictModel, about

if TYPE_CHECKING:
    from mmgraft.anatomy import Anatomy

GROUPS = {
    "attention": "cross-attention of the blocks, with its norms",
    "feedforward": "feed-forward of the blocks, with its norm",
    "gates": "gates of the blocks",
    "marker": "vector at an image's position",
}
#: Learning rate of the gates where a stage names none: AdamW moves one by about this a step.
GATE_RATE = 1e-2

_PRESETS: dict[str, dict[str, Any]] = {
    "llama": {},
    "flamingo": {
        "attend": "latest",
        "heads": "8x64",
        "qk_norm": False,
        "feedforward": "4h",
        "layer_norm": True,
    },
}
_HEADS = re.compile(r"([1-9]\d{0,3})x([1-9]\d{0,4})(?:/([1-9]\d{0,3}))?")


class XattnConfig(StrictModel):
    """Settings of the blocks: base layers, attention, feed-forward and gates.

    Source: Llama 3.2 Vision, as in arXiv 2407.21783 and Meta's code (preset ``llama``), and
    Flamingo, arXiv 2204.14198, as in open_flamingo (preset ``flamingo``).
    """

    method: Literal["xattn"] = "xattn"
    preset: Annotated[
        Literal["llama", "flamingo"], Option("Preset of the blocks: llama or flamingo.")
    ] = about("values of the settings below that are not given", "llama")
    layers: LayerChoice = about("base layers, counted from 0, that a block follows", "spread:8")
    attend: Annotated[
        Literal["all", "latest"], Option("Images that a position reads: all or latest.")
    ] = about("all images before a position, or the latest alone (flamingo)", "all")
    heads: Annotated[str, Option("Heads of a block: base, 8x64, or 32x128/8.")] = about(
        "query heads x width, and after a slash key heads where they are fewer; base: "
        "as the base has them (flamingo: 8x64)",
        "base",
    )
    qk_norm: bool = about("an RMSNorm over every head's queries and keys (flamingo: none)", True)
    feedforward: Annotated[
        Literal["base", "4h", "none"], Option("Feed-forward of a block: base, 4h or none.")
    ] = about(
        "base: SwiGLU of the base's width, of a mixture of experts 4h; 4h: two linear "
        "layers with a GELU (flamingo); none: attention alone",
        "base",
    )
    layer_norm: bool = about(
        "a LayerNorm before each half of a block (flamingo), not an RMSNorm", False
    )
    gate: Annotated[Literal["tanh", "linear"], Option("Gate of a block: tanh or linear.")] = about(
        "factor of a block's two sums: tanh(g), or g itself", "tanh"
    )
    gate_size: Literal["scalar", "channel"] = about(
        "one gate for each half of a block, or one for each channel", "scalar"
    )
    gate_init: float = about(
        "g at the start; with another value than 0 a fresh graft changes logits", 0.0
    )
    marker: bool = about(
        "train the vector at an image's position; false leaves it as it starts", True
    )

    @model_validator(mode="before")
    @classmethod
    def _of_preset(cls, data: Any) -> Any:
        if isinstance(data, dict) and isinstance(data.get("preset"), str):
            return {**_PRESETS.get(data["preset"], {}), **data}
        return data

    @field_validator("heads")
    @classmethod
    def _check_heads(cls, value: str) -> str:
        found = _HEADS.fullmatch(value)
        if value != "base" and found is None:
            raise ValueError(
                "write base, or heads x width such as 8x64, with key heads such as 32x128/8"
            )
        if found is not None and found[3] is not None and int(found[1]) % int(found[3]):
            raise ValueError(
                f"{found[1]} query heads cannot share {found[3]} key heads evenly; choose key "
                "heads that divide them"
            )
        return value

    def head_shape(self, anatomy: "Anatomy") -> tuple[int, int, int]:
        """Return query heads, key heads and the width of a head."""
        found = _HEADS.fullmatch(self.heads)
        if found is None:
            return anatomy.num_heads, anatomy.num_kv_heads, anatomy.head_dim
        return int(found[1]), int(found[3] or found[1]), int(found[2])


class XattnStage(StageSwitches):
    """Nothing to switch; the base stays frozen and the blocks in the path."""

    def check_switches(self, train: Sequence[str]) -> None:
        if "base" in train:
            raise ValueError("xattn keeps its base frozen in every stage; take base out of train")
        if not getattr(self, "graft_active", True):
            raise ValueError(
                "has graft_active: false, and without its blocks nothing reads an image; take it "
                "out"
            )


def promises(config: XattnConfig) -> Promises:
    """Return what holds: all, and a gate that starts open gives E3 up."""
    fresh = f"gate_init is {config.gate_init:g}" if config.gate_init else ""
    return Promises(before="", fresh=fresh)


def feedforward_width(config: XattnConfig, anatomy: "Anatomy") -> int:
    """Return the inner width of a block's feed-forward; 0 where it has none.

    The base's is that of its widest linear layer back to the hidden size outside of the attention.
    """
    if config.feedforward == "none":
        return 0
    widths = [
        into
        for linears in anatomy.linears.values()
        for name, (into, out) in linears.items()
        if out == anatomy.hidden_size and not name.startswith(f"{anatomy.attention_name}.")
    ]
    wide = 4 * anatomy.hidden_size
    return max(widths, default=wide) if config.feedforward == "base" else wide


def part_of(tensor: str) -> str:
    """Return the group that a tensor is counted with: ``blocks.2.attention.gate`` with gates."""
    words = tensor.split(".")
    if words[-1] == "gate":
        return "gates"
    return next((word for word in words if word in GROUPS), words[0])


def as_decoder(config: XattnConfig, active: bool) -> PlainDecoder:
    """Refuse: an ordinary decoder reads nothing beside its sequence."""
    raise UsageError(
        "xattn's blocks read an image's vectors beside the sequence, in which it has one position; "
        "an ordinary decoder reads its sequence alone"
    )
