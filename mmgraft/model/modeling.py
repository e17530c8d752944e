"""GraftedModel: a stock causal LM, a vision tower, and workflows beside the text one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.cache_utils import Cache, DynamicCache, StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from mmgraft.anatomy import decoder_layers, examine, get_path
from mmgraft.basefiles import resolve
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.grafts.base import IMAGE, Graft, Pass, image_numbers, select
from mmgraft.model.cache import RowSlot
from mmgraft.model.files import load
from mmgraft.model.files.create import check_given, make_from_files, make_on_loaded
from mmgraft.model.files.graft_file import GraftFile, TemplateChoice
from mmgraft.model.files.save import MAX_SHARD_SIZE, save_graft
from mmgraft.model.forward import Active, Inputs, running
from mmgraft.model.generation import WorkflowGeneration
from mmgraft.model.images import GivenImages, Images
from mmgraft.model.kernels.compiling import is_compiled
from mmgraft.model.kernels.quantization import assert_unquantized
from mmgraft.model.loss import chunked_loss, fed_at, last_layer, supervised
from mmgraft.model.packing import packing_blocked
from mmgraft.model.rows import TEXT_NUMBER, Rows, kinds_of, shared_positions, sort_rows
from mmgraft.model.sharded import join, outside_layers
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.strict import StrictModel, known_keywords
from mmgraft.vision.projectors.configs import MlpConfig, ProjectorConfig
from mmgraft.vision.spec import VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import load_tower

_OF_THE_BASE = (
    "input_ids", "attention_mask", "position_ids", "past_key_values", "inputs_embeds", "labels",
    "logits_to_keep",
)  # fmt: skip


class GraftedModel(WorkflowGeneration):
    """A base that reads text exactly as before and, in its other workflows, sees images.

    Rows run a workflow each: ``text`` is the base alone, every graft adds one by its name. A batch
    of text rows is handed to the base as it is, so its logits are the base's bit for bit.

    Args:
        base: A loaded causal LM; it is never edited.
        vision_tower: The frozen image encoder, or None for a model that only gets features.
        workflows: The grafts by name; more come with :meth:`add_workflow`.
        anatomy: The base's, where it was examined before.
    """

    # -- construction --------------------------------------------------------------------------

    @classmethod
    @known_keywords
    def graft(
        cls,
        base: str | Path | PreTrainedModel,
        vision: str | Path | VisionSpec | VisionTower | None,
        config: StrictModel,
        *,
        workflow: str = "mm",
        quantization: str | None = None,
        dtype: str | torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
        projector: ProjectorConfig | None = None,
        template: TemplateChoice | None = None,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> "GraftedModel":
        """Graft fresh modules onto a base, ready to train or to run.

        Args:
            base: A Hub id or folder; or a loaded causal LM, which must not be in 4-bit.
            vision: A tower, its spec, its name; None for a model that is only given features of
                the base's own width.
            config: Settings of a method, such as ``IAAConfig(layers="22,24")``.
            workflow: Name of the new workflow.
            quantization: ``"nf4"`` holds the base in 4-bit.
            dtype: Of the base, such as ``"bfloat16"``; default: as it was saved.
            device_map: As for transformers.
            projector: Which one, with its settings; default: the two layers of ``MlpConfig``.
            template: How conversations become text; default: the tokenizer's chat template.
            tokenizer: Of a loaded base, to choose the image token by.

        Raises:
            UsageError: Layers that cannot carry a graft, or settings that do not fit the base.
            TypeError: An unknown keyword, with the nearest known one.
        """
        check_given(base=base, vision=vision, config=config, projector=projector, template=template)
        spec = MlpConfig() if projector is None else projector
        vision = str(vision) if isinstance(vision, Path) else vision
        tower = load_tower(vision) if isinstance(vision, str | VisionSpec) else vision
        if isinstance(base, str | Path):
            files = resolve(base)
            made = make_from_files(files, config, workflow, spec, template, tower)
            base = load.load_base(files, dtype, device_map, quantization)
            anatomy = examine(base)
        else:
            anatomy = examine(base)
            made = make_on_loaded(base, anatomy, config, workflow, spec, template, tower, tokenizer)
        made.to(base.dtype)
        load.finish(made, base, anatomy)
        if tower is not None:
            tower = tower.to(device=base.device, dtype=base.dtype)
        return cls(base.requires_grad_(False), tower, [made], anatomy)

    @classmethod
    @known_keywords
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        dtype: str | torch.dtype | None = None,
        device_map: str | dict[str, Any] | None = None,
        quantization: str | None = None,
        quantization_storage: torch.dtype | None = None,
        attn_implementation: str | None = None,
        verify: load.Verify = "fast",
        base: str | None = None,
        graft_dtype: torch.dtype | None = None,
        revision: str | None = None,
    ) -> "GraftedModel":
        """Load a saved graft, its base and its tower.

        Args:
            source: A graft's folder, or its Hub id.
            dtype: Of the base, such as ``"bfloat16"``; default: as it was saved.
            device_map: As for transformers.
            quantization: ``"nf4"`` holds the base in 4-bit; nothing else is quantised.
            quantization_storage: Of the packed bytes; bf16 for FSDP2.
            attn_implementation: As for transformers.
            verify: ``"fast"`` compares the base's config, headers and the edges of every tensor
                with the graft's record, ``"full"`` hashes every byte, ``"off"`` trusts.
            base: Where the base lies, when not where the record says.
            graft_dtype: Of tower, projector and graft; default: the base's. Training loads fp32.
            revision: Of the graft on the Hub.

        Raises:
            UsageError: No graft, a corrupt or newer file, a base that is not the recorded one.
            TypeError: An unknown keyword, with the nearest known one.
        """
        folder = load.graft_folder(source, revision)
        record = GraftFile.read(folder)
        files = load.base_files(record, folder, base)
        load.check_base(record, files, verify)
        loaded = load.load_base(
            files, dtype, device_map, quantization, attn_implementation, quantization_storage
        )
        anatomy = examine(loaded)
        spec, weights = load.local_tower(record, folder), graft_dtype or loaded.dtype
        tower = load_tower(spec, dtype=loaded.dtype, device=loaded.device)
        load.check_tower(record, tower, verify)
        width = tower.hidden_size
        workflow = load.load_workflow(record, folder, loaded, weights, width, anatomy)
        assert_unquantized(tower, "vision_tower")
        model = cls(loaded, tower, [workflow], anatomy)
        model.name_or_path = str(source)
        return model

    @known_keywords
    def save_pretrained(  # pyright: ignore[reportIncompatibleMethodOverride]
        self,
        folder: str | Path,
        workflow: str | None = None,
        *,
        max_shard_size: str = MAX_SHARD_SIZE,
    ) -> None:
        """Save one workflow's graft; a base that was trained goes into ``folder/base``.

        Args:
            folder: Where to. Base, weights and config are replaced together: a killed save leaves
                all the earlier ones, or all the new ones.
            workflow: Which one; default: the model's first.
            max_shard_size: Split larger weights, with an index.

        Raises:
            MMGraftError: The disk is full or not writable; earlier files are whole.
            TypeError: An unknown keyword, with the nearest known one.
        """
        save_graft(self, folder, workflow, max_shard_size)

    @known_keywords
    def add_workflow(
        self,
        name: str,
        source: str | Path,
        *,
        verify: load.Verify = "fast",
        revision: str | None = None,
    ) -> None:
        """Add a saved graft of the same base and tower as a further workflow.

        Args:
            name: The workflow's name here.
            source: The graft's folder, or its Hub id.
            verify: ``"off"`` does not compare the two grafts' bases.
            revision: Of the graft on the Hub.

        Raises:
            UsageError: The graft belongs to another base or sees with another tower, or the name
                is taken.
            TypeError: An unknown keyword, with the nearest known one.
        """
        if name in self.names:
            raise UsageError(f"a workflow is called {name!r} already; choose another name.")
        folder = load.graft_folder(source, revision)
        record = GraftFile.read(folder)
        first = self.workflow().record
        if verify != "off":
            load.same_base(first, record, source)
        if self.vision_tower is not None:
            load.check_tower(record, self.vision_tower, verify)
        if not load.same_tower(first, record):
            raise UsageError(
                f"{source} sees with {record.vision.name}, this model with {first.vision.name}: "
                "workflows of one model share a tower."
            )
        projector = self.workflow().projector
        dtype, width = next(projector.parameters()).dtype, projector.in_features
        record = record.model_copy(update={"workflow": name})
        self._attach(load.load_workflow(record, folder, self.base, dtype, width, self.anatomy))

    def processor(
        self,
        tokenizer_folder: str | Path | None = None,
        workflow: str | None = None,
        options: Mapping[str, Any] | None = None,
    ) -> GraftProcessor:
        """Make the processor of a workflow: conversations with images in, inputs of a batch out.

        From then on ``generate`` ends where the template ends an answer, too.

        Args:
            tokenizer_folder: Where the base's tokenizer lies, when not with the base.
            workflow: Its name; default: the first.
            options: Variables of the chat template, beside those that the graft records.
        """
        chosen = self.workflow(workflow)
        if tokenizer_folder is None:
            tokenizer_folder = load.base_files(chosen.record, chosen.origin or Path()).path
        made = load.load_processor(chosen.record, tokenizer_folder, self.vision_tower, options)
        self.answers = made.answers
        return made

    # -- forward -------------------------------------------------------------------------------

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        mm_token_type_ids: Tensor | None = None,
        pixel_values: Tensor | None = None,
        image_features: Tensor | Images | None = None,
        image_sizes: Tensor | None = None,
        image_lengths: Tensor | None = None,
        image_rows: Tensor | None = None,
        workflow: str | Sequence[str] | Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        num_items_in_batch: Tensor | int | None = None,
        segments: Tensor | None = None,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Run a batch whose rows may run different workflows.

        Every parameter is described with :class:`mmgraft.model.forward.Inputs`; what is not named
        there is handed to the base.

        Returns:
            Loss, logits ``(b, s, vocab)`` and cache.

        Raises:
            UsageError: See :func:`mmgraft.model.rows.sort_rows` and :meth:`check_packing`; also
                images that do not match the image positions, and rows longer than a graft can
                represent.
        """
        images = GivenImages(pixel_values, image_features, image_sizes, image_lengths, image_rows)
        return self._run(
            Inputs(
                input_ids, attention_mask, position_ids, past_key_values, inputs_embeds, labels,
                mm_token_type_ids, images, workflow, use_cache, logits_to_keep, num_items_in_batch,
                segments, kwargs,
            )
        )  # fmt: skip

    def _run(self, given: Inputs) -> CausalLMOutputWithPast:
        slot = RowSlot(given.past_key_values, self.anatomy.num_layers)
        wanted = TEXT_WORKFLOW if self._only_text else given.workflow
        rows = sort_rows(
            given.batch, given.mm_token_type_ids, wanted, self.names, self.default_workflow, slot,
            given.real, self._continuing,
        )  # fmt: skip
        if given.segments is not None:
            self.check_packing(given.batch[0], rows.names)
            given.number_rows()
        if rows.text_only and not (self.in_step and given.labels is not None):
            return self._run_text(given, slot)
        slot = self._open_cache(given, rows, slot)
        active = self._active(rows, given.new.device)
        embeds = self._embed(given.input_ids, given.inputs_embeds, active)
        kinds = kinds_of(given.batch, given.mm_token_type_ids, given.real, embeds.device)
        images = self.images_in(given.images, rows.names, rows.images)
        embeds, projected = self._merge(embeds, rows, kinds == IMAGE, images)
        embeds = self._joined(embeds, first=True)
        lengths = None if images is None else torch.tensor(images.lengths)
        positions = self._positions(given, slot, active, kinds, lengths)
        state = self._state(rows, embeds, kinds, positions, given, slot)
        if images is not None:
            state.images, state.image_lengths = projected, lengths
            state.image_counts = torch.tensor(images.counts)
            state.image_rows = torch.tensor(images.rows)
        return self._run_layers(given, rows, active, state)

    def _run_layers(
        self, given: Inputs, rows: Rows, active: list[Active], state: Pass
    ) -> CausalLMOutputWithPast:
        """Run the base with the grafts in its path, up to logits or loss."""
        cache, labels, mask = given.past_key_values, given.labels, given.attention_mask
        if mask is None and any(item.graft.shares_positions for item in active):
            mask = torch.ones_like(state.key_kinds)
        inputs = {
            "inputs_embeds": state.features,
            "attention_mask": self._static_mask(mask, cache),
            "past_key_values": cache, "use_cache": given.use_cache, **given.options,
        }  # fmt: skip
        if self._takes_positions:
            inputs["position_ids"] = state.positions
        checkpointing = self.gradient_checkpointing and self.training
        with running(self.base, self.anatomy, active, state, checkpointing, self.in_step):
            if labels is None:
                return self.base(**inputs, logits_to_keep=given.logits_to_keep)
            with self._last_layer(active, labels, rows, checkpointing):
                hidden = self._before_head(inputs)
        hidden = self._joined(hidden, first=False)
        loss = self._loss(hidden, labels, rows, active, given.num_items_in_batch)
        if self.in_step:
            loss = join(loss, [hidden]).clone()  # no view: torch hangs a hook on what is returned
        return CausalLMOutputWithPast(loss=loss)

    def _run_text(self, given: Inputs, slot: RowSlot) -> CausalLMOutputWithPast:
        """Text rows alone: the base with what was given, bit for bit."""
        given.images.refuse()
        if given.labels is not None and self.training:
            return self._text_training(given, given.labels)
        if slot.filled and given.position_ids is None and self._takes_positions:
            given.position_ids = _positions(
                given.attention_mask, slot.past, given.batch[1], given.new.device
            )
        inputs = {name: getattr(given, name) for name in _OF_THE_BASE}
        inputs.update(given.options, use_cache=given.use_cache)
        return self.base(**{k: v for k, v in inputs.items() if v is not None})

    def _open_cache(self, given: Inputs, rows: Rows, slot: RowSlot) -> RowSlot:
        """Decide whether a cache is used where the caller did not, and make one where it is."""
        if given.use_cache is None:
            given.use_cache = given.labels is None and not self.training
            given.use_cache = given.use_cache and all(
                not self.workflow(name).graft.promises.cache
                for name in set(rows.names) - {TEXT_WORKFLOW}
            )
        if given.use_cache and given.past_key_values is None:
            given.past_key_values = DynamicCache(config=self.base.config)
            slot = RowSlot(given.past_key_values, self.anatomy.num_layers)
        return slot

    def _joined(self, x: Tensor, first: bool) -> Tensor:
        """Return ``x``, joined across ranks with what is before the layers or with the heads."""
        if not self.in_step:
            return x
        before, heads = outside_layers(self._workflow_list())
        if not first and self.anatomy.head_path is not None:
            heads += get_path(self.base, self.anatomy.head_path).parameters()
        return join(x, before if first else heads)

    def _static_mask(self, mask: Tensor | None, cache: Cache | None) -> Tensor | None:
        """Return a mask of all columns of a static cache, from which Bloom makes its biases."""
        layers = [] if cache is None else cache.layers
        sizes = [one.max_cache_len for one in layers if isinstance(one, StaticLayer)]
        if mask is None or mask.dim() != 2 or not sizes:
            return mask
        return F.pad(mask, (0, max(0, max(sizes) - mask.shape[1])))

    def check_packing(self, sequences: int = 1, names: Sequence[str] | None = None) -> None:
        """Try, once for each kernel of attention, whether the base keeps rows of a sequence apart.

        Args:
            sequences: Of a batch.
            names: Workflows of the rows; None: all.

        Raises:
            UsageError: It does not, with the reason.
        """
        kernel = str(self.base.config._attn_implementation)
        case = kernel, min(sequences, 2)
        if case not in self._packs:
            takes = self._takes_positions
            self._packs[case] = packing_blocked(self.base, self.anatomy, takes, case[1])
        why, who = self._packs[case], self.anatomy.class_name
        for graft in [w.graft for w in self._workflow_list() if names is None or w.name in names]:
            if graft.active and graft.promises.packing:
                why, who = graft.promises.packing, f"this {graft.method}"
        if why is not None:
            raise UsageError(
                f"{who} cannot hold several rows in one sequence: {why}. Leave "
                "packing out; group_by: length saves padding too."
            )

    # -- steps of the forward -------------------------------------------------------------------

    def _active(self, rows: Rows, device: torch.device) -> list[Active]:
        used = [w for w in self._workflow_list() if self.in_step or w.name in rows.names]
        return [Active(w.graft, rows.gate(w.name, device)) for w in used]

    def _embed(self, ids: Tensor | None, embeds: Tensor | None, active: list[Active]) -> Tensor:
        """Token embeddings ``(b, s, h)``, each row by its workflow's own table."""
        if ids is None:
            return embeds  # type: ignore[return-value]
        own = [a for a in active if a.graft.embedding is not None and a.graft.active]
        if len(active) == 1 and own and own[0].gate is None:
            return cast(Any, own[0].graft.embedding)(ids)
        out = self.base.get_input_embeddings()(ids)
        for item in own:
            out = select(item.gate, cast(Any, item.graft.embedding)(ids), out)
        return out

    def _merge(
        self, embeds: Tensor, rows: Rows, shown: Tensor, images: Images | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return embeddings with what stands at image positions, and projected features."""
        if images is None:
            return embeds, None
        projected = self._project(images, rows).to(embeds)  # (sum of counts, h)
        placed = projected
        if not any(images.lengths):
            return embeds, projected
        grafts = [self.workflow(rows.names[row]).graft for row in images.rows]
        if 0 in images.lengths or any(type(one).placed is not Graft.placed for one in grafts):
            pieces = zip(grafts, projected.split(images.counts), images.lengths, strict=True)
            placed = torch.cat([one.placed(vectors) for one, vectors, n in pieces if n])
        return embeds.masked_scatter(shown[..., None].to(embeds.device), placed), projected

    def _project(self, images: Images, rows: Rows) -> Tensor:
        """Take each image through the projector of its row's workflow, ``(sum of counts, h)``."""
        names = [rows.names[row] for row in images.rows]
        if len(set(names)) == 1:
            return images.project(self.workflow(names[0]).projector)
        found: dict[int, Tensor] = {}
        for name in dict.fromkeys(names):
            mine = [number for number, other in enumerate(names) if other == name]
            chosen = images.choose(mine)
            made = chosen.project(self.workflow(name).projector)
            found.update(zip(mine, made.split(chosen.counts), strict=True))
        return torch.cat([found[number] for number in range(len(names))])

    def _positions(
        self, given: Inputs, slot: RowSlot, active: list[Active], kinds: Tensor,
        lengths: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Position of each new token ``(b, s)``; ``lengths`` are the positions of each image."""
        found = given.position_ids
        if found is None:
            found = _positions(given.attention_mask, slot.past, kinds.shape[1], kinds.device)
        found = found.to(kinds.device).expand(kinds.shape[0], -1)
        for item in active:
            if item.graft.shares_positions:
                shared = shared_positions(found, image_numbers(kinds, lengths), slot)
                found = select(item.gate, shared, found)
        return found

    def _state(
        self, rows: Rows, embeds: Tensor, kinds: Tensor, positions: Tensor, given: Inputs,
        slot: RowSlot,
    ) -> Pass:  # fmt: skip
        cache, past = given.past_key_values, slot.past
        if cache is not None:
            self._extend(cache)
        self._check_lengths(rows, positions)  # before anything is written to the cache
        new_image, numbers = any(rows.images), rows.numbers(self.names)
        if past and not slot.filled:  # the base read text into the cache by itself
            mask = None if given.attention_mask is None else given.attention_mask[:, :past]
            read = kinds_of((len(kinds), past), None, mask, kinds.device)
            where = _positions(mask, 0, past, kinds.device).expand(len(kinds), -1)
            slot.write(read, where, [TEXT_NUMBER] * len(kinds), image=False)
        key_kinds, key_positions, any_image = slot.write(kinds, positions, numbers, new_image)
        state = Pass(
            self.anatomy, embeds, kinds, positions, key_kinds, key_positions, past, cache,
            segments=given.segments,
        )  # fmt: skip
        vars(state).update(new_image=new_image, any_image=any_image)  # known on the host
        return state

    def _check_lengths(self, rows: Rows, positions: Tensor) -> None:
        """Refuse rows that are longer than a graft of theirs can represent."""
        grafts = [w.graft for w in self._workflow_list() if w.name in rows.names]
        bound = [graft for graft in grafts if type(graft).check_length is not Graft.check_length]
        if bound:  # or nobody waits for it
            longest = int(positions.max()) + 1
            for graft in bound:
                graft.check_length(longest)

    def _text_training(self, inputs: Inputs, labels: Tensor) -> CausalLMOutputWithPast:
        """Take a training step whose rows are all text: a zero loss unless the base is
        trained.
        """
        if not self.base_is_trained:
            return CausalLMOutputWithPast(loss=self.touch())
        given: dict[str, Any] = {
            "input_ids": inputs.input_ids, "attention_mask": inputs.attention_mask,
        }  # fmt: skip
        if inputs.position_ids is not None and self._takes_positions:
            given["position_ids"] = inputs.position_ids
        with running(self.base, self.anatomy, [], None, self.gradient_checkpointing):
            hidden = self._before_head({**given, "use_cache": False})
        rows = Rows(["text"] * hidden.shape[0])
        loss = self._loss(hidden, labels, rows, [], inputs.num_items_in_batch)
        return CausalLMOutputWithPast(loss=loss + self.touch())

    # -- the loss -------------------------------------------------------------------------------

    def _loss(
        self,
        hidden: Tensor,
        labels: Tensor,
        rows: Rows,
        active: list[Active],
        num_items: Tensor | int | None,
    ) -> Tensor:
        """Return the mean cross-entropy (nats) of supervised tokens in rows that train."""
        mask = self._supervised(labels, rows).to(hidden.device)
        targets = labels.roll(-1, dims=1).to(hidden.device)
        total = hidden.new_zeros((), dtype=torch.float32)
        for head, gate in self._heads(active):
            part = mask if gate is None else mask & gate.to(mask.device)[:, None]
            at = part.flatten().nonzero().squeeze(1)  # a card is waited for once; by a mask, twice
            total = total + chunked_loss(
                hidden.flatten(0, 1).index_select(0, at),
                targets.flatten().index_select(0, at),
                head,
                self.anatomy.vocab_size,
            )
        count = mask.sum() if num_items is None else num_items
        count = count.to(total.device) if isinstance(count, Tensor) else count
        return (
            total / max(count, 1) if not isinstance(count, Tensor) else total / count.clamp(min=1)
        )

    def _supervised(self, labels: Tensor, rows: Rows) -> Tensor:
        """Return the positions whose logits the loss reads, ``(b, s)``."""
        mask = supervised(labels)
        if self.training and not self.base_is_trained and TEXT_WORKFLOW in rows.names:
            learns = torch.tensor([name != TEXT_WORKFLOW for name in rows.names])
            mask = mask & learns.to(mask.device)[:, None]
        return mask

    def _last_layer(
        self, active: Sequence[Active], labels: Tensor, rows: Rows, checkpointing: bool
    ) -> AbstractContextManager[Any]:
        """Return a context in which the last layer does at supervised positions alone what it
        can.
        """
        if checkpointing or is_compiled(self.base, self.anatomy):
            return nullcontext()
        layers = decoder_layers(self.base, self.anatomy)
        last = last_layer(list(layers), [(item.graft, item.gate) for item in active])
        return nullcontext() if last is None else fed_at(last, self._supervised(labels, rows))

    def _before_head(self, inputs: dict[str, Any]) -> Tensor:
        """Run the base up to what its heads read, ``(b, s, h)``.

        Where logits are more than a head's output, that is the logits, from the base's own forward.
        """
        if self.anatomy.logits_blocked is not None:
            return self.base(**inputs).logits
        return get_path(self.base, self.anatomy.trunk_path)(**inputs).last_hidden_state

    def _heads(self, active: list[Active]) -> Iterator[tuple[Any, Tensor | None]]:
        """Yield heads (hidden to logits) and the rows that use them."""
        if self.anatomy.logits_blocked is not None:
            yield nn.Identity(), None
            return
        base_head = get_path(self.base, self.anatomy.head_path)
        own = [a for a in active if a.graft.head is not None and a.graft.active]
        if len(own) == 1 and own[0].gate is None:
            yield self._logits_of(own[0].graft.head), None
            return
        rest: Tensor | None = None
        for item in own:
            yield self._logits_of(item.graft.head), item.gate
            rest = ~item.gate if rest is None else rest & ~item.gate  # type: ignore[operator]
        yield self._logits_of(base_head), rest

    def _logits_of(self, head: nn.Module | None) -> Any:
        """Return a head followed by what the base does to its logits (scale, soft-cap)."""
        anatomy = self.anatomy

        def logits(hidden: Tensor) -> Tensor:
            out = head(hidden) * anatomy.logit_scale  # type: ignore[misc]
            if anatomy.logit_softcap is not None:
                out = torch.tanh(out / anatomy.logit_softcap) * anatomy.logit_softcap
            return out

        return logits


def _positions(mask: Tensor | None, past: int, length: int, device: torch.device) -> Tensor:
    """Return each new token's own position in its row ``(b or 1, s)``, padding not counted."""
    if mask is not None and mask.dim() == 2:
        return (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
    return torch.arange(past, past + length, device=device)[None]
