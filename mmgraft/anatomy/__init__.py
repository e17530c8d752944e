"""The parts of a causal LM, their sizes, and the layers that can carry a graft.

Everything is found by inspection of the model, real or on the meta device: its modules, the
signature and source of its layers, and two probes that run a layer and the head with stand-ins in
place of their parts. Nothing here is a table of models.
"""

from __future__ import annotations

from mmgraft.anatomy.blocked import keeps_keys
from mmgraft.anatomy.description import Anatomy, decoder_layers, get_path
from mmgraft.anatomy.inspection import (
    examine,
    examine_config,
    refuse_non_causal,
    skeleton,
    text_config,
)
from mmgraft.anatomy.shrinking import shrunken

__all__ = [
    "Anatomy",
    "decoder_layers",
    "examine",
    "examine_config",
    "get_path",
    "keeps_keys",
    "refuse_non_causal",
    "shrunken",
    "skeleton",
    "text_config",
]
