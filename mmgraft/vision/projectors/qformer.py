"""``qformer``: BLIP-2's Q-Former as transformers computes it, with published weights or drawn."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Blip2Config, Blip2QFormerConfig, Blip2QFormerModel

from mmgraft.basefiles import fetch, files, resolve, tensor_files
from mmgraft.errors import UsageError
from mmgraft.vision.projectors.built_in import Resampler, draw_anew

#: Settings by the names that transformers has for them.
_NAMES = {
    "width": "hidden_size",
    "layers": "num_hidden_layers",
    "heads": "num_attention_heads",
    "hidden": "intermediate_size",
    "every": "cross_attention_frequency",
    "act": "hidden_act",
    "eps": "layer_norm_eps",
}


class QFormerProjector(Resampler):
    """Queries that read each view; see ``QFormerConfig``.

    Its parameters but the last layer's are named as in a BLIP-2 checkpoint, whose text half and
    language projection are left there. It runs without dropout.
    """

    def __init__(self, config: Any, in_features: int, out_features: int) -> None:
        super().__init__(config, in_features)
        c = self.config
        if c.features not in (None, in_features):
            raise UsageError(
                f"the Q-Former of {c.weights} reads features of width {c.features}, and this tower "
                f"gives width {in_features}; name the tower that it was trained with, or another "
                "Q-Former"
            )
        settings: dict[str, Any] = {theirs: getattr(c, ours) for ours, theirs in _NAMES.items()}
        dropout: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        shape = Blip2QFormerConfig(**settings, **dropout, encoder_hidden_size=in_features)
        self.post_layernorm = nn.LayerNorm(in_features, eps=c.norm_eps)
        self.query_tokens = nn.Parameter(0.02 * torch.randn(1, c.queries, c.width))
        self.qformer = Blip2QFormerModel(shape)
        self.linear = nn.Linear(c.width, out_features)
        draw_anew([self.linear], c.init_scale)

    def resample(self, features: Tensor) -> Tensor:
        features = self.post_layernorm(features.to(self.query_tokens.dtype))
        queries = self.query_tokens.expand(len(features), -1, -1)
        made = self.qformer(query_embeds=queries, encoder_hidden_states=features)
        return self.linear(made.last_hidden_state)

    @torch.no_grad()
    def fill(self) -> None:
        name = self.config.weights
        if name is None:
            return
        stored = tensor_files.open_tensors(resolve(name, self.config.revision).path)
        for key, tensor in self.state_dict().items():
            if key.startswith("linear."):
                continue
            theirs = key.replace("post_layernorm", "vision_model.post_layernorm")
            if theirs not in stored or stored[theirs].shape != tensor.shape:
                raise UsageError(
                    f"{name} holds no {theirs} of shape {tuple(tensor.shape)}, as its config.json "
                    "says; fetch it again, or name another BLIP-2 checkpoint"
                )
            tensor.copy_(stored[theirs].read())


@cache
def published(name: str | None, revision: str | None) -> dict[str, Any]:
    """Return the settings of a checkpoint and what names it for good; BLIP-2's own without one.

    Raises:
        UsageError: It is no BLIP-2 checkpoint, or there is none.
        MMGraftError: The Hub cannot be reached.
    """
    found: dict[str, Any] = {}
    config: Any = Blip2Config()
    if name is not None:
        folder = Path(name).expanduser().absolute()
        found |= {"weights": str(folder), "revision": None}
        if not folder.is_dir():
            folder = fetch(name, revision, ["config.json"])
            found |= {"weights": name, "revision": folder.name}
        config = files.read_config(folder, name)
        if config.model_type != Blip2Config.model_type:
            raise UsageError(
                f"{name} is of type {config.model_type}; weights of qformer are those of a BLIP-2 "
                "checkpoint (type blip-2), whose Q-Former reads an image alone"
            )
        found["features"] = config.vision_config.hidden_size
    found |= {ours: getattr(config.qformer_config, theirs) for ours, theirs in _NAMES.items()}
    norm_eps = config.vision_config.layer_norm_eps
    return {**found, "queries": config.num_query_tokens, "norm_eps": norm_eps}
