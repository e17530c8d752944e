"""The pydantic base classes: unknown keys are refused, a refusal reads like a sentence."""

import inspect
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import ParamSpec, Self

from mmgraft.errors import UsageError, did_you_mean
from mmgraft.frozen import Frozen
from mmgraft.layers import check_layers

P = ParamSpec("P")
R = TypeVar("R")


def _layer_choice(value: Any) -> list[int] | str:
    if isinstance(value, int) and not isinstance(value, bool):
        value = [value]
    if isinstance(value, tuple):
        value = list(value)
    if not isinstance(value, list | str):
        raise ValueError("layers are a list of numbers or text such as '0-31:5', 'last:8', 'all'")
    try:
        check_layers(value)
    except UsageError as error:
        raise ValueError(str(error)) from error
    return value


#: Layers as a config names them: checked in form here, against the base by ``parse_layers``.
LayerChoice = Annotated[list[int] | str, BeforeValidator(_layer_choice)]


class Option(Frozen):
    """Makes a setting of a method an option of ``mmgraft graft``: ``Annotated[int, Option(...)]``.

    Attributes:
        help: Its help text.
    """

    help: str


def known_keywords(function: Callable[P, R]) -> Callable[P, R]:
    """Let a function refuse an unknown keyword with the nearest one that it has."""
    known = inspect.signature(function).parameters

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                names = [one for one in known if one not in ("self", "cls")]
                # torch_dtype means dtype, although graft_dtype is spelled more like it
                hint = did_you_mean(name, [n for n in names if name.endswith(f"_{n}")] or names)
                raise TypeError(f"{function.__qualname__}() takes no keyword {name!r}; {hint}")
        return function(*args, **kwargs)

    return call


def about(description: str, default: Any = None, **limits: Any) -> Any:
    """Describe a field that need not be given; its default may be a function that makes one."""
    given: dict[str, Any] = {"default_factory" if callable(default) else "default": default}
    return Field(description=description, **given, **limits)


class StrictModel(BaseModel):
    """A config that refuses unknown keys and numbers that are inf or nan.

    Assignments are checked as construction is.
    """

    model_config = ConfigDict(extra="forbid", validate_assignment=True, allow_inf_nan=False)

    @model_validator(mode="before")  # one of a field is not allowed where it tells kinds apart
    @classmethod
    def _no_yes_for_a_number(cls, data: Any) -> Any:
        for name, info in cls.model_fields.items() if isinstance(data, dict) else ():
            kinds, value = list(_leaves(info.annotation)), data.get(name)
            if (int in kinds or float in kinds) and bool not in kinds and _holds_bool(value):
                raise ValueError(f"{name} is {value}, and yes, no, true and false are no numbers")
        return data

    @classmethod
    def parse(cls, data: Any, what: str) -> Self:
        """Check ``data`` (plain dicts and lists) and build the config.

        Args:
            data: What a YAML or JSON file or a command line gave.
            what: Its name in the message: "recipe iaa.yaml", "graft_config.json".

        Raises:
            UsageError: With one line for every wrong key or value, and the nearest right key.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UsageError(describe(error, cls, what)) from error


def describe(error: ValidationError, model: type[BaseModel], what: str) -> str:
    """Pydantic's report in words: one line a problem, unknown keys with the nearest right one."""
    return listed(what, [describe_item(item, model) for item in error.errors(include_url=False)])


def listed(what: str, problems: Sequence[str]) -> str:
    """Write the problems of a file in one line where there is one, else in a line for each."""
    problems = list(dict.fromkeys(problems))
    if len(problems) == 1:
        return what + (", " if problems[0].startswith("line ") else ": ") + problems[0]
    return f"{what} has {len(problems)} problems:\n" + "\n".join(f"  - {one}" for one in problems)


def describe_item(item: Any, model: type[BaseModel]) -> str:
    """Return one of pydantic's problems in words; see ``describe``."""
    where = dotted(item["loc"])
    if item["type"] == "extra_forbidden":
        known = _fields_at(model, item["loc"][:-1])
        hint = did_you_mean(str(item["loc"][-1]), known) if known else "remove it"
        return f"unknown key {where!r}; {hint}"
    if item["type"] == "missing":
        return f"{where!r} is missing; add it"
    text = item["msg"].removeprefix("Value error, ")
    if not where:
        return text
    shown = repr(item["input"])
    if shown in text:
        return f"{where!r}: {text}"
    return f"{where!r}: {text} (got {shown if len(shown) <= 80 else shown[:77] + '...'})"


def dotted(loc: Sequence[int | str]) -> str:
    """Return a place in a config as a user writes it: ``stages[0].lr``."""
    return "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in loc).lstrip(".")


def _fields_at(model: type[BaseModel], loc: tuple[int | str, ...]) -> list[str]:
    """Keys that the nested model at ``loc`` knows; empty when ``loc`` leads to no single model."""
    current: Any = model
    for part in loc:
        if isinstance(part, int):
            continue
        models = [one for one in _models_in(current) if part in one.model_fields]
        if models:
            current = models[0].model_fields[part].annotation
        # A name that is no field is the tag that pydantic adds for one member of a union.
        else:
            named = [one for one in _models_in(current) if part in (one.__name__, _tag(one))]
            current = named[0] if named else current
    return [
        info.alias or name for one in _models_in(current) for name, info in one.model_fields.items()
    ]


def _tag(model: type[BaseModel]) -> str | None:
    field = model.model_fields.get("method")
    return field.default if field is not None and isinstance(field.default, str) else None


def _models_in(annotation: Any) -> list[type[BaseModel]]:
    arguments = get_args(annotation)
    if arguments:  # first, because Python 3.10 takes list[int] for a class
        return [model for argument in arguments for model in _models_in(argument)]
    is_model = isinstance(annotation, type) and issubclass(annotation, BaseModel)
    return [annotation] if is_model else []


def _leaves(annotation: Any) -> Iterator[Any]:
    """Yield the types that an annotation is made of."""
    arguments = get_args(annotation)
    for argument in arguments:
        yield from _leaves(argument)
    if not arguments:
        yield annotation


def _holds_bool(value: Any) -> bool:
    inner = value.values() if isinstance(value, dict) else value
    if isinstance(value, dict | list | tuple):
        return any(map(_holds_bool, inner))
    return isinstance(value, bool)


class MeasuredModel(StrictModel):
    """Model of measurements: a perplexity may be inf, a mean of nothing nan."""

    model_config = ConfigDict(allow_inf_nan=True)
