"""Settings of a LoRA graft."""

from collections.abc import Sequence
from typing import Annotated, Literal

from mmgraft.errors import UsageError
from mmgraft.grafts.method import PlainAdapter, PlainDecoder, Promises
from mmgraft.strict import LayerChoice, Option, StrictModel, about

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
    layers: LayerChoice = about(
        "base layers, counted from 0, with adapters: 'all', [0, 4], 'every:4'", "all"
    )
    targets: Annotated[
        Literal["all", "attention", "feedforward"],
        Option("Adapted linear layers: all, attention or feedforward."),
    ] = about(
        "linear layers with an adapter; of a mixture of experts, attention and shared experts",
        "all",
    )
    rank: Annotated[int, Option("Rank of the adapters.")] = about(
        "rank of every adapter (256 in both published models)", 64, ge=1
    )
    alpha: Annotated[float | None, Option("Scale of an adapter, times its rank.")] = about(
        "an adapter's result is scaled by alpha / rank; None: 2 rank", gt=0
    )
    gate: Annotated[Literal["row", "token"], Option("Gate of the adapters: row or token.")] = about(
        "row: every position of a row with an image (Phi-4-multimodal); token: image "
        "positions alone (InternLM-XComposer2)",
        "row",
    )
    dropout: Annotated[float, Option("Dropout before an adapter.")] = about(
        "dropout of an adapter's input in training (XComposer2: 0.05)", 0.0, ge=0, lt=1
    )

    @property
    def scale(self) -> float:
        """Return the factor of an adapter's result."""
        return 2.0 if self.alpha is None else self.alpha / self.rank


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
