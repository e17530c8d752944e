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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from mmgraft import __version__
from mmgraft.answering import Answerer
from mmgraft.data.content import images_of_all
from mmgraft.data.images import open_images
from mmgraft.data.processor import Encoded
from mmgraft.errors import UsageError
from mmgraft.evaluation.estimate import estimate, paired
from mmgraft.evaluation.item_files import file_sha256
from mmgraft.evaluation.layer_sums import PROJECTOR_ONLY, SIDES, layer_sums
from mmgraft.evaluation.origin import as_score, described_graft, software
from mmgraft.evaluation.results import Results, Score, SetResult

LEFT_OUT = ("no_image", "no_text_before", "no_text_after", "no_variance")
"""Why a sample has no attention shift."""

_CONSTANT = 1e-6  # a curve that varies by less, of its largest value, is rounding


class Sample(Protocol):
    """A row or an item: something with messages."""

    @property
    def id(self) -> str: ...
    @property
    def messages(self) -> Sequence[Any]: ...
    @property
    def where(self) -> str: ...


# -- shifts -------------------------------------------------------------------------------------


def attention_shift(sums: np.ndarray) -> np.ndarray:
    """``1 - pearson(before, after)`` over layers, ``(samples, layers, 3) -> (samples,)``.

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


def evaluate_laws(
    answerer: Answerer,
    samples: Sequence[Sample],
    run: Path,
    *,
    file: Path,
    name: str = "laws",
    workflow: str | None = None,
    batch_size: int = 8,
    features: Callable[[list[Path]], Tensor] | None = None,
    settings: Mapping[str, Any] | None = None,
    announce: Callable[[str], None] = lambda text: None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Results:
    """Attention by layer, and its shift, of samples with an image between text.

    Samples without an image, or with no text before or after it, are left out and counted; so are
    samples of which a curve does not vary over the layers.

    Args:
        answerer: The grafted model and its processor.
        samples: Rows (with their answers, where they have them) or items.
        run: Its folder.
        file: Where the samples were read; its name and SHA-256 are noted.
        name: Of the set.
        workflow: Default: the graft's.
        batch_size: Samples run together, of like length.
        features: The tower's features of image files, as for :func:`mmgraft.evaluation.vqa.answer`.
        settings: Noted in the result.
        announce: Told in a sentence what is done.
        progress: Told how many samples are done, and of how many.

    Returns:
        The section ``laws``: one set whose scores are the mean shifts of every series
        (``shift_SERIES``), ``change`` the paired differences to the base with the projector, and
        in ``details[name]`` the curves: for every series its layers and each side's share of a
        query's attention, averaged over queries and samples.

    Raises:
        UsageError: No sample is left, an image that cannot be read, or an attention whose weights
            cannot be found out.
    """
    began = time.monotonic()
    flow = answerer.model.workflow(workflow)
    encoded = [_encode(answerer, sample) for sample in samples]
    reasons = [_lacks(row) for row in encoded]
    left_out = Counter(reason for reason in reasons if reason is not None)
    kept = [at for at, reason in enumerate(reasons) if reason is None]
    order = sorted(kept, key=lambda at: len(encoded[at]))
    announce(f"attention of {len(order)} of {len(samples)} samples by layer")
    parts: dict[str, list[np.ndarray]] = {}
    layers: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [encoded[at] for at in chosen]
        inputs = _inputs(answerer, [samples[at] for at in chosen], rows, features)
        for series, found in layer_sums(answerer.model, inputs, flow.name).items():
            parts.setdefault(series, []).append(found.sums)
            layers[series] = found.layers
        progress(start + len(chosen), len(order))
    sums = {series: np.concatenate(found) for series, found in parts.items()}
    shifts = {series: attention_shift(found) for series, found in sums.items()}
    whole = ~np.isnan(sum(shifts.values(), np.zeros(len(order))))
    if not whole.all():
        left_out["no_variance"] = int((~whole).sum())
    _refuse_empty(int(whole.sum()), left_out, file)
    used = [at for at, keep in zip(order, whole, strict=True) if keep]
    lengths = np.array([len(encoded[at]) for at in used], dtype=np.float64)[:, None, None]
    curves = {
        series: {"layers": list(layers[series]), **_curves(found[whole] / lengths)}
        for series, found in sums.items()
    }
    scores, change = _scores(
        {series: found[whole] for series, found in shifts.items()},
        [_group(samples[at]) for at in used],
    )
    result = SetResult(
        name=name,
        metric="attention_shift",
        main=list(scores)[-1],
        file=file.name,
        sha256=file_sha256(file),
        items=len(used),
        scores=scores,
        change=change,
        settings={"batch_size": batch_size, "workflow": flow.name, **(settings or {})},
        seconds=time.monotonic() - began,
    )
    left = {reason: left_out[reason] for reason in LEFT_OUT}
    details = {"samples": len(samples), "used": len(used), "left_out": left, "series": curves}
    return Results(
        section="laws",
        mmgraft_version=__version__,
        versions=software(),
        graft=described_graft(answerer.model, run, flow.name),
        sets=[result],
        details={name: details},
    )


def _encode(answerer: Answerer, sample: Sample) -> Encoded:
    """A row whole, with its answer; an item up to where the answer begins."""
    asks = bool(sample.messages) and sample.messages[-1].get("role") == "user"
    return answerer.processor.encode(
        sample.messages, add_generation_prompt=asks, where=sample.where
    )


def _lacks(row: Encoded) -> str | None:
    """Why a sample has no curves, or None."""
    if 1 not in row.kinds:
        return "no_image"
    if row.kinds[0] == 1:
        return "no_text_before"
    return "no_text_after" if row.kinds[-1] == 1 else None


def _inputs(
    answerer: Answerer,
    samples: Sequence[Sample],
    rows: Sequence[Encoded],
    features: Callable[[list[Path]], Tensor] | None,
) -> dict[str, Tensor]:
    processor, model = answerer.processor, answerer.model
    inputs = processor.collate(rows, "right")
    if inputs["attention_mask"].all():
        del inputs["attention_mask"]  # no padding: the base then needs no mask of s x s
    if features is not None:
        images = [image for row in rows for image in row.images]
        inputs["image_features"] = features([Path(image) for image in images])
    else:
        opened = [
            image
            for sample, row in zip(samples, rows, strict=True)
            for image in open_images(row.images, sample.where)
        ]
        inputs["pixel_values"] = processor.pixels(opened)
    return {name: tensor.to(model.device) for name, tensor in inputs.items()}


def _refuse_empty(left: int, left_out: Mapping[str, int], file: Path) -> None:
    if left:
        return
    told = ", ".join(f"{count} {reason}" for reason, count in left_out.items()) or "it is empty"
    raise UsageError(
        f"{file} leaves no sample to measure ({told}): give rows with an image between text; a "
        "system prompt counts as text before it, the question as text after it"
    )


def _group(sample: Sample) -> Any:
    group = getattr(sample, "group", None)
    return group or tuple(map(str, images_of_all(sample.messages)))


def _curves(shares: np.ndarray) -> dict[str, list[float]]:
    """``(samples, layers, 3)`` to a list over layers for each side."""
    average = shares.mean(axis=0)
    return {side: [float(x) for x in average[:, at]] for at, side in enumerate(SIDES)}


def _scores(
    shifts: Mapping[str, np.ndarray], groups: Sequence[Any]
) -> tuple[dict[str, Score], dict[str, Score]]:
    """Mean shifts, and how each differs from that of the base with the projector."""
    columns = {
        f"shift_{series}": np.stack([found, np.ones_like(found)], axis=-1)
        for series, found in shifts.items()
    }
    before = columns[f"shift_{PROJECTOR_ONLY}"]
    scores = {name: as_score(estimate(found, groups=groups)) for name, found in columns.items()}
    change = {
        name: as_score(paired(found, before, groups=groups))
        for name, found in columns.items()
        if found is not before
    }
    return scores, change
