"""vLLM's renderer, which lets a request without an image ask for a workflow."""

from __future__ import annotations

from typing import Any

from vllm.renderers.hf import HfRenderer

from mmgraft_vllm import ALWAYS, KEY


class GraftRenderer(HfRenderer):
    """The stock one; for a model of ours, a prompt may have an item that is its workflow.

    vLLM hands a prompt to a model's processor where it has multimodal data. A prompt that asks for
    its workflow in any case, and has no image, gets the workflow's name as such data.
    """

    def process_for_engine(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return super().process_for_engine(self._asked(prompt), *args, **kwargs)

    async def process_for_engine_async(self, prompt: Any, *args: Any, **kwargs: Any) -> Any:
        return await super().process_for_engine_async(self._asked(prompt), *args, **kwargs)

    def _asked(self, prompt: Any) -> Any:
        asked = prompt.get("mm_processor_kwargs") or {}
        ours = hasattr(self.model_config.hf_config, "mmgraft")
        if not ours or not asked.get(ALWAYS) or prompt.get("multi_modal_data"):
            return prompt
        return {**prompt, "multi_modal_data": {KEY: asked.get(KEY)}}
