"""`mmgraft generate`."""

from __future__ import annotations

import json as jsonlib
from pathlib import Path
from typing import Annotated, Any

import typer

from mmgraft.cli.options import (
    BaseOption,
    DeviceOption,
    DryRunFlag,
    DtypeOption,
    JsonFlag,
    QuantizationOption,
    RevisionOption,
    VerifyOption,
)


def generate(
    run: Annotated[str, typer.Argument(help="Folder or Hub id of a graft.")],
    rows: Annotated[Path, typer.Argument(help="Messages jsonl or LLaVA json.")],
    out: Annotated[Path, typer.Option("--out", help="jsonl to write: id and answer.")],
    images: Annotated[
        Path | None, typer.Option("--images", help="Folder that image paths start from.")
    ] = None,
    batch_size: Annotated[
        int, typer.Option("--batch-size", min=1, help="Rows answered together.")
    ] = 8,
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")
    ] = 256,
    num_beams: Annotated[int, typer.Option("--num-beams", min=1, help="Beam search.")] = 1,
    temperature: Annotated[
        float, typer.Option("--temperature", min=0.0, help="0 takes the likeliest token.")
    ] = 0.0,
    seed: Annotated[int | None, typer.Option("--seed", help="Of sampling.")] = None,
    workflow: Annotated[
        str | None,
        typer.Option("--workflow", help="Of all rows; default: the graft's where it sees."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="Answer the first rows only.")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    quantization: QuantizationOption = None,
    base: BaseOption = None,
    verify: VerifyOption = "fast",
    revision: RevisionOption = None,
    force: Annotated[bool, typer.Option("--force", help="Write over the output.")] = False,
    dry_run: DryRunFlag = False,
    json: JsonFlag = False,
) -> None:
    """Answer the last user's turn of every row, in batches.

    Rows of about one length are answered together; the output keeps the order of the input. It
    appears under its name when it is whole.
    """
    from mmgraft.cli.console import note, print_json
    from mmgraft.errors import UsageError

    if out.exists() and not force:
        raise UsageError(f"{out} is there already; give --force to write over it")
    if not out.parent.is_dir():
        raise UsageError(f"there is no folder {out.parent}; make it first")
    from mmgraft.atomic import atomic_text
    from mmgraft.cli.loading import load_answerer
    from mmgraft.data.chat.content import images_of_all
    from mmgraft.data.formats.sources import read_rows
    from mmgraft.data.images import open_images
    from mmgraft.inference import prompt_of

    read = read_rows(rows, images, limit=limit)
    prompts = [prompt_of(list(row.messages), row.where) for row in read]
    if dry_run:
        note(f"would answer {len(read)} rows of {rows} in batches of {batch_size}")
        return
    for row, prompt in zip(read, prompts, strict=True):
        open_images(list(images_of_all(prompt)), row.where)  # before hours of work, not after
    answerer = load_answerer(run, device, dtype, quantization, base, verify, revision)
    if seed is not None:
        import torch

        torch.manual_seed(seed)
    settings: dict[str, Any] = {
        "max_new_tokens": max_new_tokens, "num_beams": num_beams,
        "do_sample": temperature > 0, "temperature": temperature or None,
    }  # fmt: skip
    lengths = [
        len(answerer.processor.encode(prompt, where=row.where))
        for prompt, row in zip(prompts, read, strict=True)
    ]
    order = sorted(range(len(read)), key=lambda number: lengths[number])
    answers: dict[int, str] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        texts = answerer.answers([prompts[n] for n in batch], workflow, **settings)
        answers.update(zip(batch, texts, strict=True))
        note(f"{len(answers)} of {len(read)} rows")
    lines = [
        jsonlib.dumps({"id": row.id, "answer": answers[number]}, ensure_ascii=False)
        for number, row in enumerate(read)
    ]
    atomic_text(out, "\n".join(lines) + "\n")
    if json:
        print_json({"rows": len(lines), "out": str(out)})
        return
    note(f"wrote {len(lines)} answers to {out}")
