"""A workflow: the projector and the graft that a row with an image runs through."""

from collections.abc import Iterable
from pathlib import Path

from torch import nn

from mmgraft.errors import UsageError
from mmgraft.grafts.base import Graft
from mmgraft.grafts.registry import get_method
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.vision.plan import Plan
from mmgraft.vision.projectors.built_in import Projector

#: The base alone.
TEXT_WORKFLOW = "text"


class Workflow(nn.Module):
    """Projector, graft, and the record that is saved as ``graft_config.json``."""

    def __init__(self, name: str, projector: Projector, graft: Graft, record: GraftFile) -> None:
        super().__init__()
        if name == TEXT_WORKFLOW or not name.isidentifier():
            raise UsageError(
                f"{name!r} cannot name a workflow: choose a word such as 'mm' or 'grounding' "
                f"('{TEXT_WORKFLOW}' is the base alone)."
            )
        self.name = name
        self.projector = projector
        self.graft = graft
        self.record = record
        self.origin: Path | None = None  # the folder that it was loaded from

    def positions(self, plan: Plan) -> int:
        """Positions of an image in its row."""
        return get_method(self.record.method).positions(self.projector.counts(plan))

    def groups(self) -> dict[str, list[nn.Parameter]]:
        """Parameters by the names that a recipe's stages train."""
        found: dict[str, Iterable[nn.Parameter]] = {
            "projector": self.projector.parameters(),
            "graft": self.graft.parameters(),
            **self.graft.groups(),
        }
        return {name: list(parameters) for name, parameters in found.items()}
