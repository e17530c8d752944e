"""Distance of a trained base's text from that of the base before training."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from mmgraft.atomic import atomic_text, atomic_write
from mmgraft.frozen import Frozen
from mmgraft.model.files.graft_file import CONFIG_NAME, GraftFile
from mmgraft.model.packing import takes_half

if TYPE_CHECKING:
    from mmgraft.data.chat.processor import GraftProcessor
    from mmgraft.model.modeling import GraftedModel

#: Conversations without an image, one of which mentions what elsewhere stands for one.
PROMPTS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three colors.",
    "An <image> tag in HTML is spelt how?",
    "2 + 2 =",
    "Translate 'good morning' into French.",
    "Is there a blue shape?",
    "List the first five prime numbers.",
)

#: The base's log-probabilities before training, so that a resumed run has them too.
BEFORE = "text-before.safetensors"
_KEY = "text_change"


class TextChange(Frozen):
    """Text before training beside text after it, on a few fixed prompts.

    Attributes:
        mean_kl: KL divergence of the trained base from the one before, nats a position.
        same_choice: Share of positions whose likeliest next token is the same.
        positions: Compared.
    """

    mean_kl: float
    same_choice: float
    positions: int

    def __str__(self) -> str:
        return (
            f"the base was trained, so text may change: mean KL to the base before "
            f"{self.mean_kl:.4g} nats, the same likeliest token at {self.same_choice:.1%} of "
            f"{self.positions} positions of {len(PROMPTS)} prompts"
        )


def remember(run: Path, model: "GraftedModel", processor: "GraftProcessor") -> None:
    """Keep the base's log-probabilities, unless an earlier start of this run has kept them."""
    if not (run / BEFORE).is_file():
        tensors = _log_probabilities(model, processor)
        atomic_write(run / BEFORE, lambda path: save_file(tensors, path))


def is_due(run: Path) -> bool:
    """Tell whether text was remembered, but results do not say how far it has moved."""
    return (run / BEFORE).is_file() and _KEY not in (GraftFile.read(run).results or {})


def forgotten(results: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return a graft's results without what an earlier training had done to its text."""
    return {key: value for key, value in (results or {}).items() if key != _KEY} or None


def measure(run: Path, model: "GraftedModel", processor: "GraftProcessor") -> TextChange:
    """Compare with what was remembered, and write it into the graft's results."""
    before = load_file(run / BEFORE)
    change = compare(before, _log_probabilities(model, processor))
    record = GraftFile.read(run)
    results = {**(record.results or {}), _KEY: asdict(change)}
    atomic_text(run / CONFIG_NAME, record.model_copy(update={"results": results}).dump())
    return change


def compare(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> TextChange:
    """Compare two sets of log-probabilities, each ``(positions, vocab)`` by prompt."""
    divergence, same, positions = 0.0, 0, 0
    for name, old in before.items():
        new = after[name]
        divergence += float((old.exp() * (old - new)).sum(-1).sum())
        same += int((old.argmax(-1) == new.argmax(-1)).sum())
        positions += old.shape[0]
    return TextChange(divergence / positions, same / positions, positions)


def _log_probabilities(model: "GraftedModel", processor: "GraftProcessor") -> dict[str, Tensor]:
    """Compute those of the next token at every position, ``(s, vocab)`` in fp32 by prompt."""
    training = model.training
    model.eval()
    found: dict[str, Tensor] = {}
    half = torch.autocast(model.device.type, torch.bfloat16, enabled=takes_half(model.base))
    with torch.inference_mode(), model.text_only(), half:
        for number, prompt in enumerate(PROMPTS):
            encoded = processor.encode([{"role": "user", "content": prompt}])
            ids = torch.tensor([encoded.input_ids], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0]
            found[str(number)] = logits.float().log_softmax(-1).cpu().clone()
    model.train(training)
    return found
