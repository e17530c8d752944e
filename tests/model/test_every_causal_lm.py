"""A sample of the types of `python -m tests.sweep`: each works with every invariant, or is refused.

The sweep goes through files, as a user does; here everything happens in memory. What is not in the
dictionary of a type works.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from grafting import perturb
from mmgraft import GraftedModel, IAAConfig, LlavaConfig, WingsConfig
from mmgraft.anatomy import examine
from mmgraft.basefiles import TensorReader, load_config, read_modules, resolve
from mmgraft.errors import UsageError

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "sweep"))

from invariants import INVARIANTS, Case, broken
from judging import small_base

IN_MEMORY = [name for name in INVARIANTS if name != "save"]

WORKS = [
    "afmoe",
    "arcee",
    "aria_text",
    "bitnet",
    "cohere2_moe",
    "deepseek_v3",
    "deepseek_v32",
    "diffllama",
    "dots1",
    "ernie4_5",
    "flint",
    "fuyu",
    "glm4_moe_lite",
    "gpt_bigcode",
    "gpt_neo",
    "gptj",
    "helium",
    "hunyuan_v1_dense",
    "jetmoe",
    "kimi_linear",
    "lfm2_moe",
    "llama4_text",
    "minicpm3",
    "mimo_v2_flash",
    "modernbert-decoder",
    "mpt",
    "nanochat",
    "nemotron",
    "olmo",
    "olmo3",
    "olmo_hybrid",
]

_ALL = ("iaa", "wings", "llava")


def _every(words: str) -> dict[str, str]:
    return dict.fromkeys(_ALL, words)


_STATE = {"iaa": "keeps a running state", "wings": "keeps a running state"}
_KEEPS_NOTHING = dict.fromkeys(("iaa", "wings"), "it keeps no keys and values")
_PADDING = "padding on the left changes a row's logits"

REFUSED: dict[str, dict[str, str]] = {
    "bart": _every(_PADDING),
    "beam": {"wings": "scales the residual stream itself"},
    "bert": _every("is an encoder"),
    "ctrl": {"wings": "decoding with a cache differs"},
    "falcon_h1": {"iaa": "a hybrid layer does not keep", "wings": "a hybrid layer does not keep"},
    "hy_v4": {"wings": "could not be followed"},
    "minimax": _every("uses cache of its own"),
    "openai-gpt": {**_KEEPS_NOTHING, "llava": "returns no past_key_values"},
    "recurrent_gemma": {**_STATE, "llava": _PADDING},
    "rwkv": {**_STATE, "llava": _PADDING},
    "trocr": {"iaa": _PADDING, "llava": _PADDING, "wings": "gave no attention weights"},
    "xlnet": {**_KEEPS_NOTHING, "llava": "a later token changes earlier logits"},
}
"""Words of the reason, by method."""


def grafted(base: Any, method: str) -> GraftedModel:
    anatomy = examine(base)
    free = [index for index in range(anatomy.num_layers) if index not in anatomy.blocked] or [0]
    configs: dict[str, Any] = {
        "iaa": IAAConfig(layers=sorted({free[0], free[-1]}), norm=anatomy.norm_path is not None),
        "wings": WingsConfig(rank=4, layers=free),
        "llava": LlavaConfig(),
    }
    return perturb(GraftedModel.graft(base, None, configs[method]))


@pytest.mark.parametrize("kind", [*WORKS, *REFUSED])
def test_each_method_works_or_is_refused_with_the_reason(kind: str) -> None:
    base, plain = small_base(kind), small_base(kind)
    for method in _ALL:
        if words := REFUSED.get(kind, {}).get(method):
            with pytest.raises(UsageError, match=words):
                grafted(base, method)
            continue
        model = grafted(base, method)
        assert broken(Case(plain, model, model.anatomy.embedding_size), IN_MEMORY) == {}, method


@pytest.mark.parametrize("kind", ["qwen3_next", "modernbert-decoder"])
def test_linear_layers_are_read_where_a_class_reaches_into_what_is_left_out(
    kind: str, tmp_path: Path
) -> None:
    """As it starts a part, it looks for the weights of another, which is not read."""
    small_base(kind).save_pretrained(tmp_path)
    base = AutoModelForCausalLM.from_pretrained(tmp_path)
    anatomy = examine(base)
    paths = [
        f"{anatomy.layers_path}.{i}.{name}" for i, of in anatomy.linears.items() for name in of
    ]
    with TensorReader(resolve(str(tmp_path))) as reader:
        found = read_modules(reader, load_config(reader.files), paths)
    for path in paths:
        read, whole = (model.get_submodule(path).state_dict() for model in (found, base))
        assert read.keys() == whole.keys()
        assert all(torch.equal(read[name], whole[name]) for name in whole), path
