"""A graft for llama.cpp: text and mmproj, or the mmproj alone beside the user's own base."""

from functools import partial
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from mmgraft.atomic import atomic_folder
from mmgraft.data.chat.processor import GraftProcessor
from mmgraft.errors import UsageError
from mmgraft.evaluation.report.markdown import render
from mmgraft.export.folder import MMPROJ, Exported, sizes_in
from mmgraft.export.gguf.files import check_parts, decoder_file, refuse, vision_file
from mmgraft.export.gguf.tokenizer import Vocabulary
from mmgraft.export.llava.config import empty_llava, llava_config
from mmgraft.export.llava.export import generation_config
from mmgraft.export.llava.fit import Ingredients, gather
from mmgraft.export.llava.processor import image_tokenizer, plain_template
from mmgraft.export.llava.tensors import llava_tensors
from mmgraft.model.files.load import load_processor
from mmgraft.progress import say
from mmgraft.runs.contents import README
from mmgraft.version import __version__

TEXT, TEMPLATE = "model.gguf", "chat_template.jinja"


def export_gguf(
    run: Path,
    out: Path,
    kind: Literal["gguf", "mmproj"] = "gguf",
    base: str | None = None,
    outtype: str | None = None,
    dry_run: bool = False,
) -> Exported:
    """Write what llama.cpp loads.

    Args:
        run: The graft's folder.
        out: See :func:`mmgraft.export.folder.check_folder`.
        kind: ``gguf``, decoder and mmproj; ``mmproj``, that alone and the chat template.
        base: Where the base lies, when not where the record says.
        outtype: Type of the matrices: ``f32``, ``f16`` (default) or ``q8_0``, which is f16 in the
            mmproj.
        dry_run: Refuse what cannot be expressed, return the sizes, and write nothing.

    Raises:
        UsageError: Llama.cpp would not give what the graft gives, with the reason.
        MMGraftError: The disk is full; what stood in ``out`` is whole.
    """
    made_of, architecture = _examined(run, base, kind)
    processor = load_processor(made_of.record, made_of.files.path, made_of.tower)
    template, notes = media_template(processor), _notes(made_of, processor)
    vocabulary = _vocabulary(made_of, processor, notes) if kind == "gguf" else None
    model = empty_llava(llava_config(made_of, 0, made_of.anatomy.vocab_size))
    with llava_tensors(made_of, model) as tensors:
        parts = {MMPROJ: vision_file(made_of, tensors, outtype or "f16")}
        if vocabulary is not None:
            tokens = partial(vocabulary.describe, template=template)
            parts[TEXT] = decoder_file(made_of, architecture, tensors, outtype or "f16", tokens)
        sizes = {name: part.nbytes for name, part in parts.items()}
        if dry_run:
            return Exported(kind, out, made_of.record.workflow, sizes, notes, written=False)

        def write(folder: Path) -> None:
            for name, part in parts.items():
                say(f"writing {name}, {part.nbytes / 2**20:,.1f} MiB")
                part.write(folder / name)
            if vocabulary is not None:
                vocabulary.compare(folder / TEXT)
            else:
                (folder / TEMPLATE).write_text(template, "utf-8")
            (folder / README).write_text(_card(made_of, kind, out.name, notes), "utf-8")

        atomic_folder(out, write)
    return Exported(kind, out, made_of.record.workflow, sizes_in(out), notes)


def _card(made_of: Ingredients, kind: str, title: str, notes: list[str]) -> str:
    values = {"made_of": made_of, "kind": kind, "notes": notes, "version": __version__}
    return render("export/gguf/card.md.jinja", title=title, **values)


def _examined(run: Path, base: str | None, kind: str) -> tuple[Ingredients, str]:
    """Return the parts of a graft and the decoder's name in GGUF; refuse what has none."""
    if find_spec("gguf") is None:
        raise UsageError("writing GGUF needs the package gguf: pip install 'mmgraft[gguf]'.")
    say("examining the graft, its base and its vision tower")
    made_of = gather(run, base, "float32")
    architecture = check_parts(made_of)
    changed = bool(made_of.inserted or made_of.owns or made_of.record.base_trained)
    other = f"{made_of.text_note}; --to gguf writes the decoder too"
    refuse("this graft", {made_of.lacks: bool(made_of.lacks), other: kind == "mmproj" and changed})
    return made_of, architecture


def _vocabulary(made_of: Ingredients, processor: GraftProcessor, notes: list[str]) -> Vocabulary:
    """Return the tokens to write, and note what a user must know of them."""
    tokenizer = processor.tokenizer
    stock, _ = image_tokenizer(tokenizer, processor.template)
    own = generation_config(made_of, processor.answers).eos_token_id
    ends = [tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])]
    known = tuple(dict.fromkeys(end for end in ends if end is not None))
    vocabulary = Vocabulary(tokenizer, made_of.anatomy.vocab_size, known, stock)
    if known[3:]:
        notes.append(f"answers also end with ids that GGUF has no place for: {list(known[3:])}")
    if vocabulary.composes:
        notes.append("llama.cpp does not normalise text: send composed characters (NFC)")
    if find_spec("xllamacpp") is None:
        notes.append("llama.cpp's ids were not compared, which needs the package xllamacpp")
    return vocabulary


def _notes(made_of: Ingredients, processor: GraftProcessor) -> list[str]:
    size, stops = made_of.tower.image_size[0], processor.answers.stops
    notes = [
        made_of.text_note,
        "llama.cpp pads an image to a square, and the graft was trained on squashed ones: send "
        f"images of {size} x {size} pixels",
    ]
    return [*notes, f"answers end with text: send stop={list(stops)}"] if stops else notes


def media_template(processor: GraftProcessor) -> str:
    """Return the graft's template behind lines that know llama-server's markers of images."""
    template, tokenizer = processor.template, processor.tokenizer
    lines = files("mmgraft.export.gguf").joinpath("media.jinja").read_text(encoding="utf-8")
    if template.kind == "plain":
        return lines + plain_template(tokenizer, "<__media", "__>")
    own = template.text if template.kind == "file" else tokenizer.chat_template
    return lines + str(own["default"] if isinstance(own, dict) else own)
