"""The base class of records whose values stay: results, plans, settings of code."""

from dataclasses import Field, dataclass, field
from typing import Any, ClassVar

from typing_extensions import dataclass_transform


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
class Frozen:
    """Values by name: every subclass is a frozen dataclass of its annotated attributes."""

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__()
        dataclass(frozen=True, **options)(cls)
