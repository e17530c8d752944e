"""The files of a base, read without ever loading the base."""

from __future__ import annotations

from mmgraft.basefiles.files import (
    ModelFiles,
    copy_tokenizer,
    fetch,
    find_tokenizer,
    load_config,
    resolve,
)
from mmgraft.basefiles.fingerprint import compare_fingerprints, fingerprint
from mmgraft.basefiles.parts import examine_files, read_layers, read_modules
from mmgraft.basefiles.tensors import TensorReader
from mmgraft.basefiles.whole import load_whole

__all__ = [
    "ModelFiles",
    "TensorReader",
    "compare_fingerprints",
    "copy_tokenizer",
    "examine_files",
    "fetch",
    "find_tokenizer",
    "fingerprint",
    "load_config",
    "load_whole",
    "read_layers",
    "read_modules",
    "resolve",
]
