"""Examples as one batch for a grafted model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmgraft.data.batches.dataset import Example, TextRows
from mmgraft.data.batches.sequences import pad
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.data.features import image_file
from mmgraft.errors import UsageError
from mmgraft.vision.feature_cache import Compute, FeatureCache, ImageFile


class Collator:
    """Puts examples together, padded on the right.

    A batch has ``input_ids``, ``attention_mask``, ``mm_token_type_ids`` and ``labels``, each
    (b, s); for its images in order of appearance what ``GraftProcessor.images_of`` says of them and
    ``pixel_values``, or ``image_features`` (sum of their vectors, vision hidden) from a cache; and
    ``row_ids``, a list of b texts. With ``text_rows`` "graft" it also names the workflow of every
    row, so that rows without an image run the graft too.
    """

    def __init__(
        self,
        processor: GraftProcessor,
        text_rows: TextRows = "skip",
        features: FeatureCache | None = None,
        compute: Compute | None = None,
        workflow: str = "mm",
        multiple: int = 1,
    ):
        """Choose how batches are made.

        Args:
            processor: Pads and makes pixels.
            text_rows: See ``RowDataset``.
            features: Asked for image features instead of making pixels; the dataset then leaves
                its images unopened (``load_images=False``).
            compute: Features of files that the cache does not hold yet, such as ``TowerFeatures``
                gives; without it they are an error.
            workflow: The one that rows run with ``text_rows`` "graft".
            multiple: Round the length of a batch of uneven rows up to a multiple of this.
        """
        self.processor = processor
        self.text_rows = text_rows
        self.features = features
        self.compute = compute
        self.workflow = workflow
        self.multiple = multiple

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """One batch; see the class.

        Raises:
            UsageError: Where pixels are wanted and the processor has no preprocessing; where a
                feature cache is asked for an image that is no file, or that it does not hold.
        """
        rows = [example.encoded for example in examples]
        uneven = len({len(row.labels) for row in rows}) > 1  # even ones need no mask at all
        multiple = self.multiple if uneven else 1
        batch: dict[str, Any] = self.processor.collate(rows, "right", multiple)
        batch["labels"] = pad([row.labels for row in rows], -100, "right", multiple)
        images = [image for example in examples for image in example.images]
        if images and self.features is not None:
            paths = [image_file(image, one.where) for one in examples for image in one.images]
            found = self.features.get_many(paths, self.compute or _not_cached)
            batch["image_features"] = torch.cat(found)
        elif images:
            batch["pixel_values"] = self.processor.pixels(images)
        if self.text_rows == "graft":
            batch["workflow"] = [self.workflow] * len(rows)
        batch["row_ids"] = [example.row_id for example in examples]
        return batch


def _not_cached(paths: list[ImageFile]) -> list[Tensor]:
    raise UsageError(
        f"the feature cache does not hold {paths[0]}; compute the features of all images first"
    )
