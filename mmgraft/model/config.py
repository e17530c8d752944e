"""The config that makes a grafted model a transformers model."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedConfig


class GraftedConfig(PreTrainedConfig):
    """A thin shell round the base's own config, which caches and masks are made from."""

    model_type = "mmgraft"

    def __init__(self, base_config: PreTrainedConfig | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.base_config = base_config
        if base_config is not None:
            for name in ("vocab_size", "hidden_size", "num_hidden_layers", "pad_token_id"):
                setattr(self, name, getattr(base_config, name, None))
            for name in ("bos_token_id", "eos_token_id", "tie_word_embeddings"):
                setattr(self, name, getattr(base_config, name, None))

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """The base's config."""
        base = getattr(self, "base_config", None)  # not set yet while transformers checks a config
        return self if base is None else base
