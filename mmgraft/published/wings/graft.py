"""The published Wings code's learners in the path of a base."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from mmgraft.anatomy import Anatomy
from mmgraft.errors import UsageError
from mmgraft.grafts.base import BaseParts, Graft, Pass
from mmgraft.grafts.wings.router import route
from mmgraft.layers import parse_layers
from mmgraft.patching import patched_forward
from mmgraft.published.wings.config import OfficialWingsConfig
from mmgraft.published.wings.learners import OfficialLearners, OfficialPlan, plan_official


class OfficialWingsGraft(Graft):
    """Wings as the published code computes it, to load published checkpoints; not for training."""

    method = "wings-official"

    def __init__(
        self, config: OfficialWingsConfig, anatomy: Anatomy, parts: BaseParts | None
    ) -> None:
        super().__init__(config, anatomy)
        assert anatomy.rope_theta is not None  # see `refuses`
        indices = parse_layers(config.layers, anatomy.num_layers)
        self.layers = nn.ModuleDict(
            {
                str(index): OfficialLearners(
                    anatomy.hidden_size,
                    config.rank,
                    anatomy.num_heads,
                    anatomy.rope_theta,
                    config.learners,
                    config.routed,
                    config.router_width,
                )
                for index in indices
            }
        )

    def acts_on(self, index: int) -> bool:
        return str(index) in self.layers

    def changes_feed_forward(self, index: int) -> bool:
        return False

    @contextmanager
    def layer_context(
        self, index: int, layer: nn.Module, hidden: Tensor, state: Pass, gate: Tensor | None
    ) -> Iterator[None]:
        if gate is not None:
            raise UsageError(
                "wings-official mixes the rows of a batch: give it batches in which "
                "every row runs this workflow."
            )
        learners: OfficialLearners = self.layers[str(index)]  # type: ignore[assignment]
        attention = layer.get_submodule(self.anatomy.attention_name)
        plan = self._plan(state)

        def attend(original: Any, *args: Any, **kwargs: Any) -> Any:
            scores = None
            if learners.router is not None:
                columns = learners.router.weight

                def widths(count: int) -> Tensor:
                    return columns[:, :count].t()[None].expand(hidden.shape[0], -1, -1)

                fused = attention.config._attn_implementation != "eager"  # type: ignore[union-attr]
                out, scores = route(original, attention, widths, fused, args, kwargs)
            else:
                out = original(*args, **kwargs)
            after = hidden + out[0]
            added = learners(after, plan, router_scores=scores)
            return (out[0] + added.to(out[0].dtype), *out[1:])

        with patched_forward(attention, attend):
            yield

    def _plan(self, state: Pass) -> OfficialPlan:
        if ("official",) not in state.shared:
            if state.cache is not None:
                raise UsageError(
                    "wings-official cannot use a cache (later tokens change earlier "
                    "outputs): pass use_cache=False."
                )
            if state.segments is not None:
                raise UsageError("wings-official takes one row a sequence: leave segments out.")
            width = self.config.router_width if self.config.routed else None
            images, owners, rows = state.images, state.image_rows, state.kinds.shape[0]
            if images is not None and owners is not None and owners.tolist() == list(range(rows)):
                images = images.unflatten(0, (rows, -1))  # (b, P, h), dummies too
            else:
                images = None
            state.shared["official",] = plan_official(
                state.features, state.kinds, images, self.config.system_prompt_length, width
            )
        return state.shared["official",]

    def layer_modules(self) -> list[tuple[int, nn.Module]]:
        return [(int(index), module) for index, module in self.layers.items()]
