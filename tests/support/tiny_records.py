"""Records of grafts that were never made, to build shapes from."""

from __future__ import annotations

from typing import Any

from mmgraft.model.files.graft_file import BaseReference, GraftFile, ImageToken
from mmgraft.vision.spec import VisionSpec


def tiny_record(method: str, **config: Any) -> GraftFile:
    """A graft of a method with these settings, on no base in particular."""
    return GraftFile(
        method=method,
        config={"method": method, **config},
        base=BaseReference(id="base"),
        vision=VisionSpec(id="tower"),
        image_token=ImageToken(id=0),
    )
