"""A fresh workflow: projector, graft and record, before anything is written."""

from __future__ import annotations

from typing import Any, cast

import torch
from transformers import PreTrainedTokenizerBase

from mmgraft.anatomy import Anatomy
from mmgraft.data.chat.placeholder import choose_placeholder
from mmgraft.grafts.base import BaseParts, Graft
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import (
    BaseReference,
    GraftFile,
    ImageToken,
    SeenFeatures,
    TemplateChoice,
)
from mmgraft.model.workflow import Workflow
from mmgraft.vision.projectors.configs import ProjectorConfig
from mmgraft.vision.projectors.registry import build_projector
from mmgraft.vision.spec import VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import TowerShape


def make_workflow(
    config: Any,
    anatomy: Anatomy,
    parts: BaseParts,
    workflow: str,
    spec: ProjectorConfig,
    tower: VisionTower | TowerShape | None,
    reference: BaseReference,
    tokenizer: PreTrainedTokenizerBase | None,
    template: TemplateChoice,
    seed: int = 0,
) -> Workflow:
    """Make the projector, the graft and the record of a fresh workflow.

    Args:
        config: The method's settings.
        anatomy: The base's.
        parts: Copies of the base's modules to start from.
        workflow: Its name.
        spec: The projector's settings.
        tower: The tower, or its shape; None for features as wide as the base's embeddings.
        reference: Where the base is found again.
        tokenizer: The base's, for the token that stands for an image.
        template: The way from conversations to text.
        seed: Of new tensors that do not start as copies or zero, such as the projector's.
    """
    size = anatomy.embedding_size
    width = size if tower is None else tower.hidden_size
    with torch.random.fork_rng(devices=[]):  # the same graft twice, whatever was drawn before
        torch.manual_seed(seed)
        # The projector first: the same one whatever the method, so that methods compare.
        projector = build_projector(spec, width, size)
        graft: Graft = get_method(config.method).load_graft()(config, anatomy, parts)
    token, why = choose_placeholder(tokenizer, anatomy.vocab_size)
    record = GraftFile(
        method=config.method,
        config=config.model_dump(mode="json"),
        workflow=workflow,
        base=reference,
        vision=VisionSpec(),
        projector=spec,
        image_token=ImageToken(id=token, why=why),
        template=template,
    )
    if tower is not None and not isinstance(tower, TowerShape):
        record.vision, record.vision_fingerprint = tower.spec, tower.fingerprint()
        record.vision_features = SeenFeatures(sample=tower.sample())
    made = Workflow(workflow, projector, graft, record)
    dtype = next((p.dtype for p in graft.parameters()), None)
    return made if dtype is None else cast(Workflow, made.to(dtype))
