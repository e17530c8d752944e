"""The put-in bugs, by the part of mmgraft that they are put into."""

from __future__ import annotations

from . import around, evaluation, model, training
from .patch import Patch as Patch

PATCHES = [*training.PATCHES, *evaluation.PATCHES, *model.PATCHES, *around.PATCHES]
