"""The config of a grafted model, and of a graft's folder: ``config.json``."""

from collections.abc import Callable
from typing import Any

from transformers.configuration_utils import PreTrainedConfig

#: Called before a ``config.json`` is read.
BEFORE_READING: list[Callable[[], None]] = []


class GraftedConfig(PreTrainedConfig):
    """A thin shell around the base's own config, which caches and masks are made from."""

    model_type = "mmgraft"

    def __init__(self, text_config: Any = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        if isinstance(text_config, dict):
            from transformers import AutoConfig

            text_config = AutoConfig.for_model(**text_config)
        self.text_config: PreTrainedConfig | None = text_config
        if text_config is not None:
            sizes = ("vocab_size", "hidden_size", "num_hidden_layers", "tie_word_embeddings")
            for name in (*sizes, "pad_token_id", "bos_token_id", "eos_token_id"):
                setattr(self, name, getattr(text_config, name, None))

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Read ``config.json``, and first make the model known to the Auto classes that ask."""
        for call in BEFORE_READING:
            call()
        return super().from_dict(config_dict, **kwargs)

    def get_text_config(self, *args: Any, **kwargs: Any) -> PreTrainedConfig:
        """Return the base's config."""
        base = getattr(self, "text_config", None)  # not set yet while transformers checks a config
        return self if base is None else base
