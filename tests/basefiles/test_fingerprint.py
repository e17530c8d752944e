"""A base is told from every other one, a fine-tune of the same shape included."""

from __future__ import annotations

import copy
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mmgraft.basefiles import compare_fingerprints, fingerprint, resolve
from mmgraft.basefiles.fingerprint import EDGE
from tiny import save_base

EMBEDDING = "model.embed_tokens.weight"  # 320 x 48 x 4 bytes: longer than both edges


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return save_base(tmp_path / "base", "llama", tokenizer=False, hidden_size=48)


def change(folder: Path, key: str, row: int) -> None:
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[key][row, 0] += 1
    save_file(tensors, file, metadata={"format": "pt"})


def test_the_same_base_is_the_same_however_it_is_sharded(base: Path, tmp_path: Path) -> None:
    first = fingerprint(resolve(base))
    assert first == json.loads(json.dumps(first))
    sharded = save_base(
        tmp_path / "b", "llama", tokenizer=False, hidden_size=48, max_shard_size="60KB"
    )
    assert fingerprint(resolve(sharded)) == first
    assert compare_fingerprints(first, fingerprint(resolve(base), full=True)) is None


def test_the_hash_covers_both_ends_of_every_tensor(base: Path) -> None:
    tensors = load_file(base / "model.safetensors")
    found = fingerprint(resolve(base))["tensors"]
    assert found.keys() == tensors.keys()
    for key, tensor in tensors.items():
        data = tensor.numpy().tobytes()
        edges = data if len(data) <= 2 * EDGE else data[:EDGE] + data[-EDGE:]
        assert found[key]["sha256"] == hashlib.sha256(edges).hexdigest()
        assert found[key]["dtype"] == "F32"
        assert found[key]["shape"] == list(tensor.shape)
    assert tensors[EMBEDDING].numel() * 4 > 2 * EDGE
    whole = fingerprint(resolve(base), full=True)["tensors"][EMBEDDING]["full"]
    assert whole == hashlib.sha256(tensors[EMBEDDING].numpy().tobytes()).hexdigest()


@pytest.mark.parametrize(("row", "edges_see_it"), [(0, True), (319, True), (160, False)])
def test_a_fine_tune_is_refused_by_its_tensors(base: Path, row: int, edges_see_it: bool) -> None:
    saved = fingerprint(resolve(base), full=True)
    change(base, EMBEDDING, row)
    fast = compare_fingerprints(saved, fingerprint(resolve(base)))
    assert fast == (f"tensor '{EMBEDDING}' holds other values" if edges_see_it else None)
    full = compare_fingerprints(saved, fingerprint(resolve(base), full=True))
    assert full == f"tensor '{EMBEDDING}' holds other values"


def test_another_dtype_is_another_base(base: Path, tmp_path: Path) -> None:
    half = save_base(tmp_path / "h", "llama", tokenizer=False, hidden_size=48, dtype=torch.bfloat16)
    difference = compare_fingerprints(fingerprint(resolve(base)), fingerprint(resolve(half)))
    assert difference == "tensor 'lm_head.weight' was of dtype F32 and is of BF16"


def rewrite(folder: Path, **values: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def test_config_fields_that_compute_are_compared_and_the_others_are_not(base: Path) -> None:
    saved = fingerprint(resolve(base))
    rewrite(
        base,
        transformers_version="4.0.0",
        _name_or_path="elsewhere",
        dtype="float16",
        architectures=["X"],
        use_cache=False,
    )
    assert compare_fingerprints(saved, fingerprint(resolve(base))) is None
    rewrite(base, rope_parameters={"rope_type": "default", "rope_theta": 7.0})
    difference = compare_fingerprints(saved, fingerprint(resolve(base)))
    assert difference == "config field 'rope_parameters.rope_theta' was 500.0 and is 7.0"
    rewrite(base, rms_norm_eps=0.5)
    assert "rms_norm_eps" in str(compare_fingerprints(saved, fingerprint(resolve(base))))


def test_fields_of_another_transformers_are_no_difference_but_tensors_are(base: Path) -> None:
    saved = fingerprint(resolve(base))
    now = copy.deepcopy(saved)
    now["config"]["of_next_year"] = 1
    del now["config"]["mlp_bias"]
    assert compare_fingerprints(saved, now) is None
    now["tensors"]["z"] = now["tensors"].pop("model.norm.weight")
    assert compare_fingerprints(saved, now) == "tensor 'model.norm.weight' is gone"
    assert compare_fingerprints(now, saved) == "tensor 'model.norm.weight' is new"
    changed = copy.deepcopy(saved)
    changed["tensors"]["model.norm.weight"]["shape"] = [3]
    assert "shape [48] and is of [3]" in str(compare_fingerprints(saved, changed))


def test_a_field_taken_out_of_the_file_counts_as_its_default(base: Path) -> None:
    saved = fingerprint(resolve(base))
    file = base / "config.json"
    values = json.loads(file.read_text())
    del values["intermediate_size"]
    file.write_text(json.dumps(values))
    assert "intermediate_size" in str(compare_fingerprints(saved, fingerprint(resolve(base))))
