"""``mmgraft generate``."""

import json as jsonlib
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmgraft.cli import options
from mmgraft.cli.console import note, print_json, refuse_to_overwrite
from mmgraft.cli.loading import load_answerer
from mmgraft.progress import counted

if TYPE_CHECKING:
    from collections.abc import Sequence

    from mmgraft.data.rows import Row
    from mmgraft.inference import Answerer


@options.with_options("force", options.ANSWERING)
def generate(
    run: Annotated[str, options.argument("Folder or Hub id of a graft.")],
    rows: Annotated[Path, options.argument("A file of rows.")],
    out: Annotated[Path, options.option("--out", "jsonl to write: id and answer.")],
    images: options.ImagesOption = None,
    read: options.ReadOption = None,
    batch_size: Annotated[
        int, options.option("--batch-size", "Rows answered together.", min=1)
    ] = 8,
    max_new_tokens: options.MaxNewTokensOption = 256,
    num_beams: Annotated[int, options.option("--num-beams", "Beams of a beam search.", min=1)] = 1,
    temperature: options.TemperatureOption = 0.0,
    workflow: options.WorkflowOption = None,
    limit: Annotated[
        int | None, options.option("--limit", "Answer the first rows only.", min=1)
    ] = None,
    force: options.OverwriteFlag = False,
    dry_run: options.DryRunFlag = False,
    json: options.JsonFlag = False,
    **loading: Any,
) -> None:
    """Answer the last user's turn of every row, in batches.

    Rows of about one length are answered together; the output keeps the order of the input. It
    appears under its name when it is whole.
    """
    read = [*(read or ()), *([f"limit={limit}"] if limit else ())]
    found, prompts = _read(rows, images, read, out, force)
    if dry_run:
        note(f"would answer {len(found)} rows of {rows} in batches of {batch_size}")
        return
    _check_images(found, prompts)
    answerer = load_answerer(run, **loading)
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "num_beams": num_beams}
    settings |= {"do_sample": temperature > 0, "temperature": temperature or None}
    answers = _answer(answerer, found, prompts, batch_size, workflow, settings)
    _write(out, found, answers)
    if json:
        print_json({"rows": len(answers), "out": str(out)})
    else:
        note(f"wrote {len(answers)} answers to {out}")


def _read(
    rows: Path, images: Path | None, read: "Sequence[str]", out: Path, force: bool
) -> "tuple[list[Row], list[Sequence[dict[str, Any]]]]":
    """Read rows and the prompt of each, once it is known that the answers can be written."""
    from mmgraft.data.formats.sources import index_rows
    from mmgraft.inference import prompt_of
    from mmgraft.recipes.source import entry_of
    from mmgraft.training.stage_data import source_of

    refuse_to_overwrite(out, force)
    found = list(index_rows(source_of(entry_of(str(rows), images, read))))
    return found, [prompt_of(list(row.messages), row.where) for row in found]


def _check_images(rows: "Sequence[Row]", prompts: "Sequence[Any]") -> None:
    """Open every image before hours of work, not after."""
    from mmgraft.data.chat.turns import images_of_all
    from mmgraft.data.images import open_images

    pairs = list(zip(rows, prompts, strict=True))
    for row, prompt in counted("looking at images", pairs):
        open_images(list(images_of_all(prompt)), row.where)


def _answer(
    answerer: "Answerer",
    rows: "Sequence[Row]",
    prompts: "Sequence[Any]",
    batch_size: int,
    workflow: str | None,
    settings: dict[str, Any],
) -> list[str]:
    """Return the answers in the order of the rows, rows of about one length answered together."""
    lengths = [
        len(answerer.processor.encode(prompt, tools=row.tools, where=row.where))
        for prompt, row in counted("tokenising", list(zip(prompts, rows, strict=True)))
    ]
    order = sorted(range(len(rows)), key=lambda number: lengths[number])
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        tools = [rows[n].tools for n in batch]
        texts = answerer.answers([prompts[n] for n in batch], workflow, tools, **settings)
        answers.update(zip(batch, texts, strict=True))
        note(f"{len(answers)} of {len(rows)} rows")
    return [answers[number] for number in range(len(rows))]


def _write(out: Path, rows: "Sequence[Row]", answers: "Sequence[str]") -> None:
    from mmgraft.atomic import atomic_text

    lines = [
        jsonlib.dumps({"id": row.id, "answer": answer}, ensure_ascii=False)
        for row, answer in zip(rows, answers, strict=True)
    ]
    atomic_text(out, "\n".join(lines) + "\n")
