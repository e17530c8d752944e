"""A graft as an ordinary LLaVA model, which transformers loads without mmgraft, and its card."""

from dataclasses import replace
from pathlib import Path

import yaml
from transformers import GenerationConfig, LlavaConfig, LlavaForConditionalGeneration

from mmgraft.atomic import atomic_folder
from mmgraft.basefiles.tensor_files import write_shards
from mmgraft.data.chat.answers import Answers
from mmgraft.errors import UsageError
from mmgraft.evaluation.report.markdown import render
from mmgraft.export.folder import Exported, copy_file, sizes_in
from mmgraft.export.llava.check import compare, take_samples
from mmgraft.export.llava.config import empty_llava, llava_config
from mmgraft.export.llava.fit import Ingredients, gather
from mmgraft.export.llava.processor import StockProcessor, stock_processor
from mmgraft.export.llava.tensors import llava_tensors
from mmgraft.frozen import Frozen
from mmgraft.progress import say
from mmgraft.runs.contents import README
from mmgraft.version import __version__


class Plan(Frozen):
    """All of an exported model but its values.

    Attributes:
        made_of: The parts.
        processor: Its processor.
        config: Its config.
        model: It, on the meta device.
    """

    made_of: Ingredients
    processor: StockProcessor
    config: LlavaConfig
    model: LlavaForConditionalGeneration


def export_llava(
    run: Path, out: Path, base: str | None = None, dtype: str | None = None, dry_run: bool = False
) -> Exported:
    """Write a graft as a ``LlavaForConditionalGeneration`` folder, and prove that it is the same.

    A layer that the graft inserts becomes an ordinary decoder layer after the one it follows. The
    graft is run first; the folder is written tensor by tensor, loaded by stock transformers, and
    kept only if ids, pixels and logits are the graft's.

    Args:
        run: The graft's folder.
        out: See :func:`mmgraft.export.folder.check_folder`.
        base: Where the base lies, when not where the record says.
        dtype: Of all weights, such as ``"bfloat16"``; default: the base's.
        dry_run: Refuse what cannot be expressed, return the size, and write nothing.

    Raises:
        UsageError: The format cannot express the graft; it is damaged; its base is another one.
        MMGraftError: The disk is full, or the result differs; what stood in ``out`` is whole.
    """
    say("examining the graft, its base and its vision tower")
    plan = _plan(gather(run, base, dtype))
    made_of, notes = plan.made_of, _notes(plan)
    with llava_tensors(made_of, plan.model) as tensors:
        size = sum(tensor.nbytes for tensor in tensors.values())
        if dry_run:
            listed = {"model.safetensors": size}
            return Exported("llava", out, made_of.record.workflow, listed, notes, written=False)
        say("running the graft on two short conversations")
        samples = take_samples(made_of, plan.processor.graft, base)
        found: list[float] = []

        def write(folder: Path) -> None:
            say(f"writing {size / 2**20:,.1f} MiB of weights")
            write_shards(folder, "model", tensors)
            write_small_files(plan, folder)
            say("running the same conversations in stock transformers")
            found.append(compare(folder, samples, made_of.dtype))
            token = plan.processor.processor.image_token
            (folder / README).write_text(llava_card(made_of, out.name, token, found[0]), "utf-8")

        atomic_folder(out, write)
    return Exported("llava", out, made_of.record.workflow, sizes_in(out), notes, found[0])


def write_small_files(plan: Plan, folder: Path) -> None:
    """Write configs, processor and licences."""
    plan.config.save_pretrained(folder)
    config = generation_config(plan.made_of, plan.processor.graft.answers)
    if plan.processor.new_rows:  # tokens that the base does not have, so never says
        config.suppress_tokens = [*(config.suppress_tokens or []), *plan.processor.new_rows]
    config.save_pretrained(folder)
    processor = plan.processor.processor
    processor.save_pretrained(folder)
    processor.image_processor.save_pretrained(folder)  # older transformers look for it alone
    for pattern in ("LICENSE*", "NOTICE*"):
        for path in plan.made_of.files.path.glob(pattern):
            copy_file(path, folder / path.name)


def _plan(made_of: Ingredients) -> Plan:
    processor = stock_processor(made_of)
    rows = processor.new_rows.stop
    config = llava_config(made_of, processor.image_token_id, rows)
    try:
        return Plan(made_of, processor, config, empty_llava(config))
    except UsageError:
        if not made_of.tied:
            raise
    # LLaVA ties its head to an embedding of one name only; elsewhere the head is written out.
    made_of = replace(made_of, untied=True)
    config = llava_config(made_of, processor.image_token_id, rows)
    return Plan(made_of, processor, config, empty_llava(config))


def _notes(plan: Plan) -> list[str]:
    made_of, processor = plan.made_of, plan.processor
    notes = [made_of.text_note, *filter(None, [made_of.lacks])]
    token = processor.processor.image_token
    if processor.new_rows:
        more = len(processor.new_rows)
        rows = "one row" if more == 1 else f"{more} rows"
        notes.append(
            f"{token} is a new token: embedding and head are {rows} longer than the base's"
        )
    notes.append(f"text that contains {token} literally is read as an image position")
    if stops := processor.graft.answers.stops:
        notes.append(f"answers end with text: give generate(stop_strings={list(stops)!r})")
    if made_of.anatomy.logit_scale != 1.0:
        notes.append(
            f"the base's factor on its logits, {made_of.anatomy.logit_scale:g}, went into the head"
        )
    return notes


def generation_config(made_of: Ingredients, answers: Answers) -> GenerationConfig:
    """Return the base's settings of generation, with the tokens that end the graft's answers."""
    try:
        config = GenerationConfig.from_pretrained(made_of.files.path)
    except OSError:
        config = GenerationConfig.from_model_config(made_of.base_config)
    config._from_model_config = False  # LLaVA's own config knows none of these ids
    config.eos_token_id = answers.with_ends(config.eos_token_id)
    return config


_HUB = "https://huggingface.co/"


def llava_card(made_of: Ingredients, title: str, image_token: str, difference: float) -> str:
    """Write the card as Markdown with its front matter.

    Args:
        made_of: The parts.
        title: Name of the folder.
        image_token: Text of the image token.
        difference: Largest difference of a logit from the graft's, as measured.
    """
    record = made_of.record
    local = record.base.id.startswith((".", "/"))
    front = {"library_name": "transformers", "pipeline_tag": "image-text-to-text"}
    if not local:
        front["base_model"] = record.base.id
    tags = ["mmgraft", "llava", record.method, "vision-language", "multimodal"]
    note = made_of.text_note
    return render(
        "export/llava/card.md.jinja",
        front=yaml.safe_dump({**front, "tags": tags}, sort_keys=False),
        title=title,
        base="in a local folder" if local else f"[{record.base.id}]({_HUB}{record.base.id})",
        note=note[0].upper() + note[1:],
        made_of=made_of,
        dtype=str(made_of.dtype).removeprefix("torch."),
        difference=f"{difference:.1e}",
        version=__version__,
        token=image_token,
    )
