"""A fresh workflow, and the sources of its copies: a loaded base, its files, or its shape."""

import copy
from collections.abc import Sequence
from functools import cached_property, partial
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from mmgraft.anatomy import Anatomy, get_path, skeleton
from mmgraft.basefiles import TensorReader, read_layers, read_modules
from mmgraft.data.chat.placeholder import choose_placeholder
from mmgraft.errors import UsageError
from mmgraft.grafts.base import BaseParts, Graft
from mmgraft.grafts.registry import get_method
from mmgraft.model.files import graft_file
from mmgraft.model.workflow import Workflow
from mmgraft.vision.projectors.configs import ProjectorConfig
from mmgraft.vision.projectors.registry import build_projector
from mmgraft.vision.spec import VisionSpec
from mmgraft.vision.towers.base import VisionTower
from mmgraft.vision.towers.registry import TowerShape


class LoadedParts:
    """Copies of the modules of a base in memory, or of its shape only.

    Args:
        model: A causal LM with the base's classes.
        anatomy: Where its parts are.
    """

    def __init__(self, model: PreTrainedModel, anatomy: Anatomy) -> None:
        self.model, self.anatomy = model, anatomy

    def _at(self, path: str) -> nn.Module:
        return copy.deepcopy(get_path(self.model, path))

    def layer(self, index: int) -> nn.Module:
        return self._at(f"{self.anatomy.layers_path}.{index}")

    def embedding(self) -> nn.Module:
        return self._at(self.anatomy.embedding_path)

    def norm(self) -> nn.Module:
        if self.anatomy.norm_path is None:
            raise UsageError("this base has no final norm to copy: add --no-norm.")
        return self._at(self.anatomy.norm_path)

    def head(self) -> nn.Module:
        return self._at(self.anatomy.head_path)

    def modules(self, paths: Sequence[str]) -> list[nn.Module]:
        """Return modules by their dotted names from the model itself."""
        return [self._at(path) for path in paths]


class ReadParts(LoadedParts):
    """Modules of a base's files, read all at once when a method asks for the first of them.

    A method that copies nothing reads nothing. Each module is handed out once and not copied again.

    Args:
        reader: The base's tensors.
        config: The base's config.
        indices: The layers that may be asked for.
        owns: Which of ``embedding``, ``norm`` and ``head`` may be.
        anatomy: Of the config.
    """

    def __init__(
        self,
        reader: TensorReader,
        config: PreTrainedConfig,
        indices: Sequence[int],
        owns: Sequence[str],
        anatomy: Anatomy,
    ) -> None:
        self.anatomy = anatomy
        self._read = partial(read_layers, reader, config, indices, owns, anatomy)
        self._read_modules = partial(read_modules, reader, config)

    @cached_property
    def model(self) -> PreTrainedModel:
        """The base with these parts alone."""
        return self._read()

    def _at(self, path: str) -> nn.Module:
        return get_path(self.model, path)

    def modules(self, paths: Sequence[str]) -> list[nn.Module]:
        model = self._read_modules(paths)
        return [get_path(model, path) for path in paths]


def shape_parts(base: PreTrainedModel, anatomy: Anatomy) -> LoadedParts:
    """Modules on the meta device: shapes to load a saved graft into."""
    plain = copy.deepcopy(base.config)
    vars(plain).pop("quantization_config", None)
    return LoadedParts(skeleton(plain, type(base)), anatomy)


def share_config(module: nn.Module, base: PreTrainedModel) -> None:
    """Let copied modules read the base's own configs, so that they use its attention kernel."""
    own = {type(config): config for config in _configs(base).values()}
    for child, config in _configs(module).items():
        child.config = own.get(type(config), config)  # type: ignore[assignment]


def _configs(module: nn.Module) -> dict[nn.Module, PreTrainedConfig]:
    found = {child: getattr(child, "config", None) for child in module.modules()}
    return {child: one for child, one in found.items() if isinstance(one, PreTrainedConfig)}


def execution_device(module: nn.Module) -> torch.device | None:
    """Return where accelerate runs a part of a base that is spread or offloaded; None where it
    is not.
    """
    hook = getattr(module, "_hf_hook", None)
    for one in getattr(hook, "hooks", (hook,)):
        device = getattr(one, "execution_device", None)
        if device is not None:
            return torch.device(device)
    return None


def check_layers(indices: Sequence[int], anatomy: Anatomy) -> None:
    """Refuse layers that cannot carry a graft, by name and with the reason."""
    for index in indices:
        if index in anatomy.blocked:
            free = [str(i) for i in range(anatomy.num_layers) if i not in anatomy.blocked]
            raise UsageError(
                f"layer {index} of {anatomy.class_name} cannot carry a graft: "
                f"{anatomy.blocked[index]}. Layers that can: {', '.join(free) or 'none'}."
            )


def make_workflow(
    config: Any,
    anatomy: Anatomy,
    parts: BaseParts,
    workflow: str,
    spec: ProjectorConfig,
    tower: VisionTower | TowerShape | None,
    reference: graft_file.BaseReference,
    tokenizer: PreTrainedTokenizerBase | None,
    template: graft_file.TemplateChoice,
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
    width = anatomy.embedding_size if tower is None else tower.hidden_size
    with torch.random.fork_rng(devices=[]):  # the same graft twice, whatever was drawn before
        torch.manual_seed(seed)
        # The projector first: the same one whatever the method, so that methods compare.
        projector = build_projector(spec, width, anatomy.embedding_size)
        projector.fill()
        graft: Graft = get_method(config.method).load_graft()(config, anatomy, parts)
    token, why = choose_placeholder(tokenizer, anatomy.vocab_size)
    record = graft_file.GraftFile(
        method=config.method,
        config=config.model_dump(mode="json"),
        workflow=workflow,
        base=reference,
        vision=VisionSpec(),
        projector=projector.config,
        image_token=graft_file.ImageToken(id=token, why=why),
        template=template,
    )
    if tower is not None and not isinstance(tower, TowerShape):
        record.vision, record.vision_fingerprint = tower.spec, tower.fingerprint()
        record.vision_features = graft_file.SeenFeatures(sample=tower.sample())
    made: Any = Workflow(workflow, projector, graft, record)
    dtype = next((p.dtype for p in graft.parameters()), None)
    return made if dtype is None else made.to(dtype)
