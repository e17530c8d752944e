"""Settings of a LoRA graft."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from mmgraft.errors import UsageError
from mmgraft.grafts.method import PlainAdapter, PlainDecoder, Promises, StageSwitches
from mmgraft.strict import LayerChoice, Option, StrictModel

if TYPE_CHECKING:
    from mmgraft.anatomy import Anatomy

GROUPS = {
    "attention": "adapters of the attention's linear layers",
    "feedforward": "adapters of the feed-forward's linear layers",
}


class LoraConfig(StrictModel):
    """Settings of the adapters: linear layers of the base, rank, and gate.

    Source: Phi-4-multimodal, arXiv 2503.01743 (gate ``row``), and InternLM-XComposer2, arXiv
    2401.16420 (gate ``token``).
    """

    method: Literal["lora"] = "lora"
    layers: LayerChoice = Field(
        "all", description="base layers, counted from 0, with adapters: 'all', [0, 4], 'every:4'"
    )
    targets: Annotated[
        Literal["all", "attention", "feedforward"],
        Option("Adapted linear layers: all, attention or feedforward."),
    ] = Field(
        "all",
        description="linear layers with an adapter; of a mixture of experts all means attention",
    )
    rank: Annotated[int, Option("Rank of the adapters.")] = Field(
        64, ge=1, description="rank of every adapter (256 in both published models)"
    )
    alpha: Annotated[float | None, Option("Scale of an adapter, times its rank.")] = Field(
        None, gt=0, description="an adapter's result is scaled by alpha / rank; None: 2 rank"
    )
    gate: Annotated[Literal["row", "token"], Option("Gate of the adapters: row or token.")] = Field(
        "row",
        description="row: every position of a row with an image (Phi-4-multimodal); token: image "
        "positions alone (InternLM-XComposer2)",
    )
    dropout: Annotated[float, Option("Dropout before an adapter.")] = Field(
        0.0, ge=0, lt=1, description="dropout of an adapter's input in training (XComposer2: 0.05)"
    )

    @property
    def scale(self) -> float:
        """Return the factor of an adapter's result."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


class LoraStage(StageSwitches):
    """Nothing to switch; the base stays frozen."""

    def check_switches(self, train: Sequence[str]) -> None:
        if "base" in train:
            raise ValueError("LoRA keeps its base frozen in every stage; take base out of train")


def refuses(anatomy: Anatomy) -> str | None:
    """Return the reason why a base cannot take adapters."""
    if not any(anatomy.linears.values()):
        return f"the layers of {anatomy.model_type} hold no linear layers outside of experts"
    return None


def chosen_linears(
    config: LoraConfig, anatomy: Anatomy, index: int
) -> dict[str, dict[str, tuple[int, int]]]:
    """Return the linear layers of one base layer that get an adapter, by group.

    Raises:
        UsageError: There is none of a kind that is asked for.
    """
    found: dict[str, dict[str, tuple[int, int]]] = {"attention": {}, "feedforward": {}}
    for name, size in anatomy.linears[index].items():
        inside = name.startswith(f"{anatomy.attention_name}.")
        found["attention" if inside else "feedforward"][name] = size
    if config.targets != "all":
        found = {config.targets: found[config.targets]}
    if not any(found.values()):
        has = [i for i, names in anatomy.linears.items() if names]
        raise UsageError(
            f"layer {index} of {anatomy.class_name} has no linear layer for an adapter "
            f"(targets: {config.targets}): experts of a mixture take tokens out of their rows, "
            f"where no adapter finds them. Choose --targets attention, or --layers among "
            f"{', '.join(map(str, has))}."
        )
    return found


def promises(config: LoraConfig) -> Promises:
    """Return what holds: only behind the gate token is text before an image as it was."""
    if config.gate == "token":
        return Promises(before="")
    return Promises(before="gate row adapts every position of a row with an image")


def as_decoder(config: LoraConfig, active: bool) -> PlainDecoder:
    """Return the base itself: behind the gate ``row`` the adapters may stand beside it."""
    if not active:
        return PlainDecoder()
    _refuse_token(config)
    return PlainDecoder(
        lacks="it lacks the adapters, which rows with an image need: mmgraft export --to peft "
        "writes them, and docs/export.md says how to serve both"
    )


def as_adapter(config: LoraConfig, names: Sequence[str]) -> PlainAdapter:
    """Return the adapters as PEFT names them: ``A`` goes down to the rank, ``B`` up again."""
    _refuse_token(config)
    tensors: dict[str, str] = {}
    for name in names:
        path, _, matrix = name.partition(".")[2].removesuffix(".weight").rpartition(".")
        tensors[name] = f"{path}.lora_{'A' if matrix == 'down' else 'B'}.weight"
    return PlainAdapter(config.rank, config.scale * config.rank, tensors)


def _refuse_token(config: LoraConfig) -> None:
    if config.gate == "token":
        raise UsageError(
            "its adapters act at image positions alone (gate token), and others switch an adapter "
            "on for whole rows; only a graft with gate row can be written so"
        )
