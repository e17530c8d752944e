"""LAWS: how the layers share their attention between the image and the text around it.

Source: Wings, arXiv 2406.03496, section 3. With ``a_ij`` a layer's attention weights, averaged over
heads, and ``S`` the text before the image, the image, or the text after it,

    LAWS_S(l) = sum over queries i, sum over keys j in S, of a^l_ij
    shift     = 1 - pearson(LAWS_before, LAWS_after)            over the layers l

for each sample; the shift is then averaged over samples. The paper ties a larger shift to a larger
loss of text ability.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from mmgraft.data.chat.content import images_of_all
from mmgraft.data.chat.processor import Encoded
from mmgraft.data.formats.sources import read_rows
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.evaluation.attention.layer_sums import PROJECTOR_ONLY, SIDES, LayerSums, layer_sums
from mmgraft.evaluation.generate.answers import refuse_longer
from mmgraft.evaluation.generate.run_features import Features, image_inputs
from mmgraft.evaluation.items.files import file_sha256, sampled
from mmgraft.evaluation.items.item import Item
from mmgraft.evaluation.metrics.intervals import Measured, paired
from mmgraft.evaluation.origin import described_graft, section_of
from mmgraft.grafts.registry import get_method
from mmgraft.inference import Answerer
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.progress import counted, say
from mmgraft.runs.results import Results, Score, SetResult

LEFT_OUT = ("no_image", "no_text_before", "no_text_after", "no_variance")
"""Why a sample has no attention shift."""

Sample = Row | Item
_CONSTANT = 1e-6  # a curve that varies by less, of its largest value, is rounding


# -- shifts -------------------------------------------------------------------------------------


def attention_shift(sums: np.ndarray) -> np.ndarray:
    """Compute ``1 - pearson(before, after)`` over layers, ``(samples, layers, 3) -> (samples,)``.

    Not a number where the before or the after side does not vary over the layers.
    """
    before, after = sums[..., 0], sums[..., 2]
    varies = _varies(before) & _varies(after)
    before = before - before.mean(axis=-1, keepdims=True)
    after = after - after.mean(axis=-1, keepdims=True)
    below = np.sqrt((before**2).sum(axis=-1) * (after**2).sum(axis=-1))
    above = (before * after).sum(axis=-1)
    shift = 1 - np.divide(above, below, out=np.zeros_like(above), where=varies)
    return np.where(varies, shift, np.nan)


def _varies(curve: np.ndarray) -> np.ndarray:
    return np.ptp(curve, axis=-1) > _CONSTANT * np.abs(curve).max(axis=-1)


# -- many samples -------------------------------------------------------------------------------


def read_samples(
    path: str | Path, images: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> Sequence[Row]:
    """Read rows of a file, or a sample of them by a seed, in the file's order.

    Raises:
        UsageError: See :func:`mmgraft.data.formats.sources.read_rows`.
    """
    return sampled(read_rows(path, images), limit, seed)


def evaluate_laws(
    answerer: Answerer,
    samples: Sequence[Sample],
    run: Path,
    *,
    file: Path | None = None,
    name: str = "laws",
    workflow: str | None = None,
    batch_size: int = 8,
    features: Features | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Results:
    """Measure attention by layer (in ``details``), and its shift, of images between text.

    Args:
        answerer: The grafted model and its processor.
        samples: Rows or items; those without an image between text are left out and counted.
        run: Its folder.
        file: Where the samples were read; by default as the first one says.
        name: Of the set.
        workflow: Default: the graft's.
        batch_size: Samples a batch, of like length.
        features: The tower's features of image files.
        settings: Noted in the result.

    Raises:
        UsageError: No sample is left, an unreadable image, or an attention without weights.
    """
    began, file = time.monotonic(), _file(samples, file)
    workflow = refuse_memory(answerer.model.workflow(workflow).record)
    batches = _Batches(answerer, samples, workflow, features)
    say(f"attention of {len(batches.order)} of {len(samples)} samples by layer")
    measured = _Shifts(batches, batches.sums(batch_size))
    measured.refuse_empty(file)
    result = SetResult(
        name=name,
        metric="attention_shift",
        file=file.name,
        sha256=file_sha256(file),
        items=len(measured.used),
        settings={"batch_size": batch_size, "workflow": workflow, **(settings or {})},
        seconds=time.monotonic() - began,
        **measured.scores(),
    )
    graft = described_graft(answerer.model, run, workflow)
    return section_of("laws", graft, [result], details={name: measured.details()})


def refuse_memory(record: GraftFile) -> str:
    """Refuse a method whose images the attention of the base does not reach.

    Returns:
        The name of the graft's workflow.

    Raises:
        UsageError: It keeps images beside the sequence.
    """
    if get_method(record.method).memory:
        raise UsageError(
            f"laws sums what the base's attention gives to an image and to the text around it, and "
            f"method {record.method} keeps an image's vectors beside the sequence, where that "
            "attention does not reach: there is nothing to sum"
        )
    return record.workflow


def _file(samples: Sequence[Sample], file: Path | None) -> Path:
    if not samples:
        raise UsageError("no samples to measure; give rows with an image between text")
    file = file or Path(samples[0].file)
    if not file.is_file():
        raise UsageError(f"no file {str(file)!r} that the samples come from; say where they do")
    return file


class _Batches:
    """The samples as rows, those that can be measured in order of length."""

    def __init__(
        self,
        answerer: Answerer,
        samples: Sequence[Sample],
        workflow: str,
        features: Features | None,
    ) -> None:
        self.model, self.processor = answerer.model, answerer.processor
        self.samples, self.workflow, self.features = samples, workflow, features
        self.encoded = [_encode(answerer, sample) for sample in samples]
        names = [sample.where for sample in samples]
        refuse_longer(self.encoded, names, self.model.anatomy.position_table)
        reasons = [_lacks(row) for row in self.encoded]
        self.left_out = Counter(reason for reason in reasons if reason is not None)
        kept = [at for at, reason in enumerate(reasons) if reason is None]
        self.order = sorted(kept, key=lambda at: len(self.encoded[at]))

    def sums(self, batch_size: int) -> dict[str, LayerSums]:
        """Return every series of the samples, in order of length."""
        found: dict[str, list[LayerSums]] = {}
        starts = range(0, len(self.order), batch_size)
        for start in counted("measuring attention, batches", starts):
            chosen = self.order[start : start + batch_size]
            for series, sums in layer_sums(self.model, self._inputs(chosen), self.workflow).items():
                found.setdefault(series, []).append(sums)
        return {
            series: LayerSums(parts[0].layers, np.concatenate([part.sums for part in parts]))
            for series, parts in found.items()
        }

    def _inputs(self, chosen: Sequence[int]) -> dict[str, Tensor]:
        rows = [self.encoded[at] for at in chosen]
        inputs = self.processor.collate(rows, "right")
        if inputs["attention_mask"].all():
            del inputs["attention_mask"]  # no padding: the base then needs no mask of s x s
        device, names = self.model.device, [self.samples[at].where for at in chosen]
        inputs = {name: tensor.to(device) for name, tensor in inputs.items()}
        return inputs | image_inputs(device, self.processor, rows, self.features, names)


class _Shifts:
    """The attention shifts of every series, of samples whose curves vary."""

    def __init__(self, batches: _Batches, found: Mapping[str, LayerSums]) -> None:
        self.batches, self.found = batches, found
        shifts = {f"shift_{series}": attention_shift(one.sums) for series, one in found.items()}
        self.whole = ~np.isnan(sum(shifts.values(), np.zeros(len(batches.order))))
        if not self.whole.all():
            batches.left_out["no_variance"] = int((~self.whole).sum())
        self.used = [at for at, keep in zip(batches.order, self.whole, strict=True) if keep]
        self.groups = [_group(batches.samples[at]) for at in self.used]
        self.shares = {
            series: Measured.means(**{series: shift[self.whole]})
            for series, shift in shifts.items()
        }

    def refuse_empty(self, file: Path) -> None:
        """Refuse samples of which none is left."""
        if self.used:
            return
        counts = self.batches.left_out.items()
        why = ", ".join(f"{count} {reason}" for reason, count in counts if count)
        raise UsageError(
            f"{file} leaves no sample to measure ({why}): give rows with an image between text; a "
            "system prompt counts as text before it, the question as text after it"
        )

    def scores(self) -> dict[str, Any]:
        """Return the mean shifts, and their changes to the base with the projector."""
        alone = f"shift_{PROJECTOR_ONLY}"
        scores = {series: one.scores(self.groups)[series] for series, one in self.shares.items()}
        change = {one: self._change(one, alone) for one in self.shares if one != alone}
        return {"main": list(scores)[-1], "scores": scores, "change": change}

    def details(self) -> dict[str, Any]:
        """Return the curves, and how many samples were left out and why."""
        encoded, left_out = self.batches.encoded, self.batches.left_out
        lengths = np.array([len(encoded[at]) for at in self.used], dtype=np.float64)
        curves = {
            series: _curves(one, one.sums[self.whole] / lengths[:, None, None])
            for series, one in self.found.items()
        }
        details = {
            "samples": len(encoded),
            "used": len(self.used),
            "left_out": {reason: left_out[reason] for reason in LEFT_OUT},
            "series": curves,
        }
        if "shift_main_and_learners" in self.shares:
            added = self._change("shift_main_and_learners", "shift_main")
            details["learners_change"] = added.model_dump()
        return details

    def _change(self, series: str, before: str) -> Score:
        one, other = self.shares[series], self.shares[before]
        return paired(one.columns, other.columns, groups=self.groups)


def _encode(answerer: Answerer, sample: Sample) -> Encoded:
    """Encode a row whole, with its answer; an item up to where the answer begins."""
    ends_with_question = bool(sample.messages) and sample.messages[-1].get("role") == "user"
    return answerer.processor.encode(
        sample.messages, ends_with_question, sample.tools, sample.where
    )


def _lacks(row: Encoded) -> str | None:
    """Return why a sample has no curves, or None."""
    if 1 not in row.kinds:
        return "no_image"
    if row.kinds[0] == 1:
        return "no_text_before"
    return "no_text_after" if row.kinds[-1] == 1 else None


def _group(sample: Sample) -> Any:
    group = sample.group if isinstance(sample, Item) else None
    return group or tuple(map(str, images_of_all(sample.messages)))


def _curves(found: LayerSums, shares: np.ndarray) -> dict[str, list[Any]]:
    """Return the layers, and a list over layers for each side, of ``(samples, layers, 3)``."""
    average = shares.mean(axis=0)
    sides = {side: [float(x) for x in average[:, at]] for at, side in enumerate(SIDES)}
    return {"layers": list(found.layers), **sides}
