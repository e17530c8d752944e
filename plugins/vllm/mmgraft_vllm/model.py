"""A frozen base and its grafts in one vLLM model.

The decoder holds the inserted layers of every workflow, in order, so that vLLM gives each its KV
cache and shards it. Which workflow a row runs travels in its *positions*, which vLLM asks the model
for with the request's images (M-RoPE), and keeps through chunked prefill, preemption and decoding.
Without torch.compile, a step runs what belongs to the workflows that have a row in it alone.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from vllm.config import CompilationMode, CUDAGraphMode, VllmConfig
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.models.interfaces import SupportsMRoPE
from vllm.model_executor.models.llava import (
    LlavaDummyInputsBuilder,
    LlavaForConditionalGeneration,
    LlavaMultiModalProjector,
)
from vllm.model_executor.models.utils import AutoWeightsLoader, WeightsMapper
from vllm.multimodal import MULTIMODAL_REGISTRY

from mmgraft_vllm import KEY
from mmgraft_vllm.layers import (
    STRIDE,
    BaseDecoder,
    Feed,
    Gate,
    Norms,
    Step,
    base_layer,
    inserted_layer,
)
from mmgraft_vllm.processor import GraftInfo, GraftProcessor

QUANTISED = "compressed-tensors"
DECODERS = ("gemma3_text", "llama", "mistral", "phi3", "qwen2", "qwen3")


class Workflow(nn.Module):
    """Projector, embedding and head of one workflow.

    Args:
        config: Config of the whole model.
        values: The workflow's entry in it.
    """

    def __init__(self, config: Any, values: dict[str, Any]) -> None:
        super().__init__()
        text, owns = config.text_config, values["owns"]
        self.projector = LlavaMultiModalProjector(
            config.vision_config.hidden_size,
            text.hidden_size,
            config.projector_hidden_act,
            config.multimodal_projector_bias,
        )
        self.embedding, self.head = None, None
        if "embedding" in owns:
            self.embedding = VocabParallelEmbedding(text.vocab_size, text.hidden_size)
        if "head" in owns:
            self.head = ParallelLMHead(text.vocab_size, text.hidden_size)
            if values["tied"]:
                self.head = self.head.tie_weights(self.embedding)


@MULTIMODAL_REGISTRY.register_processor(
    GraftProcessor, info=GraftInfo, dummy_inputs=LlavaDummyInputsBuilder
)
class MMGraftForConditionalGeneration(LlavaForConditionalGeneration, SupportsMRoPE):
    """LLaVA, whose rows run the base or one of several workflows."""

    requires_raw_input_tokens = True  # for workflows with an embedding of their own

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        refuse(vllm_config)
        super().__init__(vllm_config=vllm_config, prefix=prefix)
        del self.multi_modal_projector
        self.entries: list[dict[str, Any]] = self.config.mmgraft["workflows"]
        self.workflows: Any = nn.ModuleList([Workflow(self.config, one) for one in self.entries])
        text, decoder = self.config.text_config, self.language_model.model
        self.hidden, self.step = text.hidden_size, Step()
        self.full = vllm_config.quant_config is None
        self.scale = getattr(decoder, "normalizer", 1)  # Gemma's, of embeddings
        self._gate_layers(decoder.layers)
        normed = [n for n, one in enumerate(self.entries, 1) if "norm" in one["owns"]]
        kind = type(decoder.norm)
        own = {n: kind(self.hidden, eps=text.rms_norm_eps) for n in normed}
        decoder.norm = Norms(decoder.norm, own, self.step)
        inserted = {place for one in self.entries for _, place in one["layers"]}
        layers = [one for place, one in enumerate(decoder.layers) if place not in inserted]
        # In a tuple: its weights are the decoder's.
        self.base = (BaseDecoder(layers, decoder.norm.base),)
        tokens = vllm_config.scheduler_config.max_num_batched_tokens
        # By place, not by id: an image's id may be an ordinary one that a workflow may say.
        self.register_buffer("images", torch.zeros(tokens, dtype=torch.bool), persistent=False)

    def _gate_layers(self, layers: Any) -> None:
        inserted = {place for one in self.entries for _, place in one["layers"]}
        for place, layer in enumerate(layers):
            kind = type(layer)
            layer.__class__ = inserted_layer(kind) if place in inserted else base_layer(kind)
            layer.step, layer.feeds = self.step, []
        for number, one in enumerate(self.entries, 1):
            feed = Feed(number) if one["gated"] == "beside" else None
            for count, (before, place) in enumerate(one["layers"]):
                layer = layers[place]
                layer.workflow, layer.feed, layer.opens = number, feed, count == 0
                layer.gate = Gate(self.hidden, one["scalar"]) if one["gated"] else None
                if feed is not None:
                    layers[before].feeds.append(feed)

    def get_mrope_input_positions(
        self, input_tokens: list[int], mm_features: list[Any]
    ) -> tuple[Tensor, int]:
        """Return a request's positions with its workflow in them, and what decoding adds."""
        number = int(mm_features[0].data[KEY].data) if mm_features else 0
        positions = torch.arange(len(input_tokens)) + number * STRIDE
        return positions.expand(3, -1), number * STRIDE

    def embed_multimodal(self, **kwargs: Any) -> Any:
        """Return each image's vectors, by the projector of its workflow."""
        numbers = kwargs.pop(KEY, None)
        given = self._parse_and_validate_image_input(**kwargs)
        if given is None:
            return []
        seen = self._process_image_pixels(given)
        pairs = zip(numbers.flatten().tolist(), seen, strict=True)
        return [self.workflows[number - 1].projector(one) for number, one in pairs]

    def embed_input_ids(
        self, input_ids: Tensor, multimodal_embeddings: Any = None, *, is_multimodal: Any = None
    ) -> Tensor:
        """Return the base's embeddings, with images in them, and remember where those are."""
        images = self.images[: input_ids.shape[0]]
        if is_multimodal is None:
            images.zero_()
        else:
            images.copy_(is_multimodal, non_blocking=True)
        return super().embed_input_ids(
            input_ids, multimodal_embeddings, is_multimodal=is_multimodal
        )

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: Any = None,
        inputs_embeds: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Return ``(t, h)`` where all rows are the base's, else ``(t, h + 1)``.

        The last channel is the number of each row's workflow: ``compute_logits`` sees nothing else.
        """
        positions = positions[0]
        if inputs_embeds is None:
            inputs_embeds = cast(Tensor, self.language_model.embed_input_ids(input_ids))
        context = get_forward_context()
        whole = (
            not self.language_model.model.do_not_compile  # compiled once, as the first step ran it
            or context.cudagraph_runtime_mode != CUDAGraphMode.NONE
            or context.attn_metadata is None  # a trial, which measures memory
        )
        everything = tuple(range(1, len(self.entries) + 1))
        self.step.workflows = everything if whole else present(positions // STRIDE)
        if not self.step.workflows:
            return self.base[0](positions, inputs_embeds)
        return self._run(input_ids, positions, inputs_embeds)

    def _run(self, input_ids: Tensor | None, positions: Tensor, embedded: Tensor) -> Tensor:
        number = (positions // STRIDE)[:, None]
        if input_ids is not None:
            embedded = self._embedded(input_ids, number, embedded)
        decoder = self.language_model.model
        states = decoder(input_ids, positions, None, inputs_embeds=embedded)
        kept, *own = states.split(self.hidden, dim=-1)
        for one, normed in zip(decoder.norm.running(), own, strict=True):
            kept = torch.where(number == one, normed, kept)
        return torch.cat([kept, number.to(kept.dtype)], dim=-1)

    def _embedded(self, input_ids: Tensor, number: Tensor, embedded: Tensor) -> Tensor:
        images = self.images[: input_ids.shape[0]]
        for one in self.step.workflows:
            workflow = self.workflows[one - 1]
            if workflow.embedding is not None:
                own = workflow.embedding(input_ids.masked_fill(images, 0)) * self.scale
                embedded = torch.where((number == one) & ~images[:, None], own, embedded)
        return embedded

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """Return each row's logits by the head of its workflow."""
        if hidden_states.shape[-1] == self.hidden:
            return self.language_model.compute_logits(hidden_states)
        number, states = hidden_states[:, -1:], hidden_states[:, :-1].contiguous()
        logits = self.language_model.compute_logits(states)
        # Asking another device than the CPU would wait for it.
        running = present(number) if number.device.type == "cpu" else None
        for one, workflow in enumerate(self.workflows, 1):
            if workflow.head is None or (running is not None and one not in running):
                continue
            own = self.language_model.logits_processor(workflow.head, states)  # it may gather
            if logits is not None:
                logits = torch.where(number == one, own, logits)
        return logits

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Load the folder's tensors.

        Raises:
            ValueError: It lacks some. VLLM itself leaves a linear layer without values as it is.
        """
        decoder = "language_model.model."
        prefixes = {f"{decoder}norm.": f"{decoder}norm.base."}
        for number, one in enumerate(self.entries):
            prefixes[f"workflows.{number}.norm."] = f"{decoder}norm.own.{number + 1}."
            for count, (_, place) in enumerate(one["layers"]):
                prefixes[f"workflows.{number}.gates.{count}."] = f"{decoder}layers.{place}.gate."
        inside = {".projector.mlp.0.": ".projector.linear_1."}
        inside |= {".projector.mlp.2.": ".projector.linear_2."}
        mapper = WeightsMapper(orig_to_new_prefix=prefixes, orig_to_new_substr=inside)
        names: set[str] = set()

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in weights:
                # A quantised base may have layers in full, with other tensors in its modules.
                names.add(name if self.full else name.rpartition(".")[0])
                yield name, tensor

        loaded = AutoWeightsLoader(self).load_weights(noted(), mapper=mapper)
        # Of a quantised model, vLLM counts itself, and knows which no file has.
        empty = {name for name, _ in self.named_parameters()} - loaded if self.full else set()
        if missing := sorted(without_values(empty, names)):
            raise ValueError(
                f"the folder lacks {len(missing)} tensors, such as {missing[0]}; export it once "
                "more with mmgraft export --to vllm"
            )
        return loaded


def without_values(empty: set[str], names: set[str]) -> set[str]:
    """Return parameters that got no tensor, and tensors that a layer lacks beside another.

    Several tensors of a layer are one parameter in vLLM, which counts as loaded by any of them.

    Args:
        empty: Parameters that got none.
        names: Of all tensors in the folder.
    """
    layers: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
    for name in names:
        if found := re.match(r"(.*\.layers\.)(\d+)\.(.*)", name):
            stack, number, rest = found.groups()
            layers[stack][number].add(rest)
    return empty | {
        f"{stack}{number}.{rest}"
        for stack, found in layers.items()
        for number, has in found.items()
        for rest in set().union(*found.values()) - has
    }


def present(numbers: Tensor) -> tuple[int, ...]:
    """Return the workflows among the numbers of rows."""
    return tuple(sorted({int(one) for one in numbers.flatten().tolist()} - {0}))


def refuse(config: VllmConfig) -> None:
    """Refuse what would be wrong, or was never tested, before any weight is read.

    Raises:
        ValueError: Says what to leave out.
    """
    model, parallel = config.model_config, config.parallel_config
    check_entries(getattr(model.hf_config, "mmgraft", None), model.uses_mrope)
    kind = model.hf_config.text_config.model_type
    compiled = config.compilation_config.mode not in (None, CompilationMode.NONE)
    scalar = any(one["scalar"] for one in model.hf_config.mmgraft["workflows"])
    wrong = {
        f"a {kind} decoder (it knows {', '.join(DECODERS)})": kind not in DECODERS,
        "speculative decoding": config.speculative_config is not None,
        "microbatch overlap (DBO)": parallel.use_ubatching,
        "pipeline parallelism": parallel.pipeline_parallel_size > 1,
        "a quantised model": not _plain(config),
        # Off by 0.15 in a test with a small model, for a reason that was not found.
        "torch.compile with a scalar gate (it needs --enforce-eager)": compiled and scalar,
        "LoRA adapters": config.lora_config is not None,
        "embeddings as prompts": model.enable_prompt_embeds,
        "embeddings as images": model.multimodal_config.enable_mm_embeds,
    }
    if found := [what for what, given in wrong.items() if given]:
        raise ValueError(f"mmgraft-vllm does not take {' and '.join(found)}; start vLLM without")


def _plain(config: VllmConfig) -> bool:
    """Return whether weights are full, or as the export writes those of a quantised base."""
    if config.quant_config is None:
        return True
    hf_config = config.model_config.hf_config
    stored = getattr(hf_config, "quantization_config", None) or {}
    layers = [one["layers"] or one["owns"] for one in hf_config.mmgraft["workflows"]]
    return stored.get("quant_method") == QUANTISED and not any(layers)


def check_entries(note: Any, uses_mrope: bool) -> None:
    """Refuse a folder that another mmgraft wrote, or whose config was changed by hand.

    Args:
        note: What the config says under ``mmgraft``.
        uses_mrope: VLLM asks the model for positions, which carry the workflows.

    Raises:
        ValueError: Says which mmgraft wrote it.
    """
    note = note if isinstance(note, dict) else {}
    entries = note.get("workflows")
    keys = {"name", "layers", "gated", "owns", "tied", "scalar"}
    known = isinstance(entries, list) and all(set(one) == keys for one in entries)
    if not entries or not known or not uses_mrope:
        raise ValueError(
            f"the folder was written by mmgraft {note.get('version', 'of unknown version')}, or "
            "changed since, and does not say what this mmgraft-vllm reads; export it once more "
            "with mmgraft export --to vllm, both of one release"
        )
