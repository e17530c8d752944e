"""A recipe's description of a set to evaluate on. Free of torch."""

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import Field, model_validator
from typing_extensions import Self

from mmgraft.strict import StrictModel, about

Metric = Literal["perplexity", "choice", "exact", "vqa", "vqa_v2", "yes_no", "caption", "box"]
TEXT_METRICS = ("perplexity", "choice")
BoxFormat = Literal["unit", "thousand", "ten", "pixel", "cogvlm", "qwen"]
Blind = Literal["prior", "no_image"]

#: Fields of an item; ``columns`` of a set names the key of each in its rows.
COLUMNS = (
    "id", "question", "answer", "answers", "options", "image", "box", "kind", "group", "text",
)  # fmt: skip


class SetSpec(StrictModel):
    """One set of items and how its answers are scored.

    Sets of ``perplexity``, and of ``choice`` with ``modality: text``, are evaluated on the text
    workflow and the untouched base, the others with their images. With ``chat`` a set of text has
    questions and answers: perplexity is then of the answers.
    """

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$")
    path: str | None = about(
        "file of items, folder or pattern of shards, hub:OWNER/NAME, or a packaged set's name"
    )
    split: str | None = about("split of a set of the Hub; None: test")
    subset: str | None = about("configuration of a set of the Hub")
    revision: str | None = about("branch, tag or commit of that set")
    metric: Metric
    modality: Literal["text", "image"] = "image"
    chat: bool = about("ask a set of text through the chat template, not as plain text", False)
    images: str | None = about("folder that image paths start from")
    train: str | None = about("file of training rows, whose answers give the prior score")
    columns: dict[str, str] = about("keys of the rows, where they have other names", dict)
    prompt: str | None = about("template of the prompt, with {question} and {options}")
    boxes: BoxFormat | None = about("format of the model's boxes; needed by `box`")
    blind: list[Blind] = Field(default_factory=lambda: ["prior", "no_image"])
    workflow: str | None = about("workflow of rows with images; None: the graft's")
    max_new_tokens: int | None = about("None: by the metric", ge=1)
    limit: int | None = about("draw so many items", ge=1)
    seed: int = about("seed of that sample", 0)

    @model_validator(mode="before")
    @classmethod
    def _of_text(cls, data: Any) -> Any:
        if isinstance(data, dict) and data.get("metric") == "perplexity":
            return {"modality": "text", **data}
        return data

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.metric == "perplexity" and self.modality != "text":
            raise ValueError(f"set {self.name!r}: perplexity is of text; leave modality out")
        if self.modality == "text" and self.metric not in TEXT_METRICS:
            raise ValueError(
                f"set {self.name!r}: {self.metric} needs images; for text write one of "
                + ", ".join(TEXT_METRICS)
            )
        if self.chat and self.modality != "text":
            raise ValueError(
                f"set {self.name!r}: questions with images are always chats; leave chat out, or "
                "write modality: text"
            )
        if self.metric == "box" and self.boxes is None:
            raise ValueError(
                f"set {self.name!r}: say how boxes are written: boxes: unit (0 to 1), thousand "
                "(0 to 999), ten (0 to 9) or pixel"
            )
        unknown = sorted(set(self.columns) - set(COLUMNS))
        if unknown:
            raise ValueError(
                f"set {self.name!r}: columns names {unknown[0]!r}, which no item has; choose from "
                + ", ".join(COLUMNS)
            )
        return self


def dialogue_sets(specs: Sequence[SetSpec]) -> list[SetSpec]:
    """Return the sets that dialogues are built of: multiple choice, each question once.

    Dialogues are chats whatever a set says, so that one asked as a chat adds nothing to the same
    file as plain text.
    """
    choices = [spec for spec in specs if spec.metric == "choice"]
    plain = {spec.path or spec.name for spec in choices if not spec.chat}
    return [spec for spec in choices if not (spec.chat and (spec.path or spec.name) in plain)]
