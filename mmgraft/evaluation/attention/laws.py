"""LAWS: how the layers share their attention between the image and the text around it.

Source: Wings, arXiv 2406.03496, section 3. With ``a_ij`` a layer's attention weights, averaged over
heads, and ``S`` the text before the image, the image, or the text after it,

    LAWS_S(l) = sum over queries i, sum over keys j in S, of a^l_ij
    shift     = 1 - pearson(LAWS_before, LAWS_after)            over the layers l

for each sample; the shift is then averaged over samples. The paper ties a larger shift to a larger
loss of text ability.
"""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch import Tensor

from mmgraft import __version__
from mmgraft.data.chat.content import images_of_all
from mmgraft.data.chat.processor import Encoded
from mmgraft.data.formats.sources import read_rows
from mmgraft.data.images import open_images
from mmgraft.data.rows import Row
from mmgraft.errors import UsageError
from mmgraft.evaluation.attention.layer_sums import PROJECTOR_ONLY, SIDES, LayerSums, layer_sums
from mmgraft.evaluation.generate.answers import refuse_longer
from mmgraft.evaluation.items.files import file_sha256
from mmgraft.evaluation.metrics.intervals import estimate, paired
from mmgraft.evaluation.origin import as_score, described_graft, software
from mmgraft.inference import Answerer
from mmgraft.runs.results import Results, Score, SetResult

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
    def file(self) -> str: ...
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


def read_samples(
    path: str | Path, images: str | Path | None = None, limit: int | None = None, seed: int = 0
) -> list[Row]:
    """Rows of a file, or so many of them drawn by a seed, in the file's order.

    Raises:
        UsageError: See :func:`mmgraft.data.formats.sources.read_rows`.
    """
    rows = read_rows(path, images)
    if limit is None or limit >= len(rows):
        return rows
    return [rows[at] for at in sorted(random.Random(seed).sample(range(len(rows)), limit))]


def evaluate_laws(
    answerer: Answerer,
    samples: Sequence[Sample],
    run: Path,
    *,
    file: Path | None = None,
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
        file: Where the samples were read, by default as the first one says; its name and SHA-256
            are noted.
        name: Of the set.
        workflow: Default: the graft's.
        batch_size: Samples run together, of like length.
        features: The tower's features of image files; see
            :func:`mmgraft.evaluation.generate.answers.answer`.
        settings: Noted in the result.
        announce: Told in a sentence what is done.
        progress: Told how many samples are done, and of how many.

    Returns:
        The section ``laws``: one set whose scores are the mean shifts of every series
        (``shift_SERIES``), ``change`` the paired differences to the base with the projector, and
        in ``details[name]`` the curves: for every series its layers and each side's share of a
        query's attention, averaged over queries and samples. ``learners_change`` there
        is the paired difference that a graft's own attention makes to the base's.

    Raises:
        UsageError: No sample is left, an image that cannot be read, or an attention whose weights
            cannot be found out.
    """
    began = time.monotonic()
    if not samples:
        raise UsageError("no samples to measure; give rows with an image between text")
    file = file or Path(samples[0].file)
    if not file.is_file():
        raise UsageError(f"no file {str(file)!r} that the samples come from; say where they do")
    flow = answerer.model.workflow(workflow)
    encoded = [_encode(answerer, sample) for sample in samples]
    names = [sample.where for sample in samples]
    refuse_longer(encoded, names, answerer.model.anatomy.position_table)
    reasons = [_lacks(row) for row in encoded]
    left_out = Counter(reason for reason in reasons if reason is not None)
    kept = [at for at, reason in enumerate(reasons) if reason is None]
    order = sorted(kept, key=lambda at: len(encoded[at]))
    announce(f"attention of {len(order)} of {len(samples)} samples by layer")
    found = _all_sums(answerer, samples, encoded, order, flow.name, batch_size, features, progress)
    shifts = {series: attention_shift(one.sums) for series, one in found.items()}
    whole = ~np.isnan(sum(shifts.values(), np.zeros(len(order))))
    if not whole.all():
        left_out["no_variance"] = int((~whole).sum())
    _refuse_empty(int(whole.sum()), left_out, file)
    used = [at for at, keep in zip(order, whole, strict=True) if keep]
    lengths = np.array([len(encoded[at]) for at in used], dtype=np.float64)[:, None, None]
    curves = {
        series: {"layers": list(one.layers), **_curves(one.sums[whole] / lengths)}
        for series, one in found.items()
    }
    groups = [_group(samples[at]) for at in used]
    columns = {
        f"shift_{series}": np.stack([shift[whole], np.ones(len(used))], axis=-1)
        for series, shift in shifts.items()
    }
    scores = {key: as_score(estimate(column, groups=groups)) for key, column in columns.items()}

    def change(key: str, before: str) -> Score:
        return as_score(paired(columns[key], columns[before], groups=groups))

    alone = f"shift_{PROJECTOR_ONLY}"
    result = SetResult(
        name=name,
        metric="attention_shift",
        main=list(scores)[-1],
        file=file.name,
        sha256=file_sha256(file),
        items=len(used),
        scores=scores,
        change={key: change(key, alone) for key in columns if key != alone},
        settings={"batch_size": batch_size, "workflow": flow.name, **(settings or {})},
        seconds=time.monotonic() - began,
    )
    left = {reason: left_out[reason] for reason in LEFT_OUT}
    details: dict[str, Any] = {
        "samples": len(samples), "used": len(used), "left_out": left, "series": curves,
    }  # fmt: skip
    if "shift_main_and_learners" in columns:
        added = change("shift_main_and_learners", "shift_main")
        details["learners_change"] = added.model_dump()
    return Results(
        section="laws",
        mmgraft_version=__version__,
        versions=software(),
        graft=described_graft(answerer.model, run, flow.name),
        sets=[result],
        details={name: details},
    )


def _all_sums(
    answerer: Answerer,
    samples: Sequence[Sample],
    encoded: Sequence[Encoded],
    order: Sequence[int],
    workflow: str,
    batch_size: int,
    features: Callable[[list[Path]], Tensor] | None,
    progress: Callable[[int, int], None],
) -> dict[str, LayerSums]:
    """Every series of the samples at ``order``, in that order."""
    found: dict[str, list[LayerSums]] = {}
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        rows = [encoded[at] for at in chosen]
        inputs = _inputs(answerer, [samples[at] for at in chosen], rows, features)
        for series, sums in layer_sums(answerer.model, inputs, workflow).items():
            found.setdefault(series, []).append(sums)
        progress(start + len(chosen), len(order))
    return {
        series: LayerSums(parts[0].layers, np.concatenate([part.sums for part in parts]))
        for series, parts in found.items()
    }


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
    told = ", ".join(f"{count} {reason}" for reason, count in left_out.items() if count)
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
