"""The whole base as transformers loads it, and nothing made up where its files lack something."""

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer
from transformers.utils import logging

from mmgraft.basefiles.files import ModelFiles
from mmgraft.errors import UsageError, brief, first_line, is_out_of_memory
from mmgraft.progress import Work, working
from mmgraft.textfiles import read_json

#: Settings of a generation config that are numbers, or lists of them.
_NUMBERS = re.compile(r"temperature|.*_([kp]|ids?|cutoff|penalty|size|length|tokens|beams)")


def load_whole(files: ModelFiles, **options: Any) -> PreTrainedModel:
    """Load a base; transformers would draw at random what its files lack, and run their code.

    Args:
        files: The base's.
        options: Of ``from_pretrained``.

    Raises:
        UsageError: The files are damaged, lack tensors, or need a package that is not here.
    """
    if (settings := files.path / "generation_config.json").is_file():
        # transformers would do without a damaged one
        for name, value in read_json(settings, "fetch it again").items():
            kinds = {type(one) for one in (value if isinstance(value, list) else [value])}
            if _NUMBERS.fullmatch(name) and kinds & {str, bool, dict}:
                raise UsageError(f"{settings} has {brief(repr(value))} as {name}; write a number")
    try:
        what = "loading and quantising" if options.get("quantization_config") else "loading"
        with working(f"{what} {files.id}") as work, quiet(work):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                files.path,
                gguf_file=files.gguf,
                trust_remote_code=False,
                output_loading_info=True,
                **options,
            )
    except Exception as error:  # whatever a foreign file may raise
        if is_out_of_memory(error):
            raise
        raise UsageError(
            f"{files.id} cannot be loaded ({type(error).__name__}: {first_line(error)}); mend "
            "this, fetch the base again, or give another one"
        ) from error
    model, report = loaded
    quantizer = getattr(model, "hf_quantizer", None)
    if report["missing_keys"] and not getattr(quantizer, "pre_quantized", False):
        raise UsageError(lacking(files.id, report["missing_keys"]))
    return model


def lacking(name: str, tensors: set[str] | None = None) -> str:
    """Say that the files of a base do not fill it."""
    shown = sorted(tensors or ())
    more = f" and {len(shown) - 3} more" if len(shown) > 3 else ""
    what = ", ".join(shown[:3]) + more or "its tensors"
    return (
        f"{name} does not hold {what} as its config.json says; fetch the base again, or give "
        "another one"
    )


def check_quantised(config: PreTrainedConfig, name: str) -> None:
    """Refuse a checkpoint that is stored quantised, unless it can be loaded here.

    Raises:
        UsageError: A package is missing, or transformers does not know its form.
    """
    stored: Any = getattr(config, "quantization_config", None)
    if stored is None:
        return
    try:
        with quiet():
            if not AutoHfQuantizer.supports_quant_method(stored):
                raise ValueError("transformers knows no such quant_method")
            quantizer = AutoHfQuantizer.from_config(stored, pre_quantized=True)
            quantizer.validate_environment(device_map=None, weights_only=True)
    except RuntimeError:
        pass  # no such device here; where it is loaded there may be one
    except Exception as error:  # whatever a foreign config may raise
        raise UsageError(
            f"the weights of {name} are stored quantised (quantization_config in config.json), "
            f"and cannot be loaded here: {first_line(error)}. Install what it needs, or give the "
            "base with its full weights"
        ) from error


@contextlib.contextmanager
def quiet(work: Work | None = None) -> Iterator[None]:
    """Keep transformers' bars, and its reports of tensors left out on purpose, off the console.

    Args:
        work: Is told how far the loading of weights is.
    """

    class Counted(logging.EmptyTqdm):
        def __iter__(self) -> Iterator[Any]:
            items: Any = self._iterator
            for number, item in enumerate(items):
                if work is not None:
                    work(number, len(items))
                yield item

    level, bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hook = logging.set_tqdm_hook(lambda _, args, kwargs: Counted(*args, **kwargs))
    try:
        yield
    finally:
        logging.set_tqdm_hook(hook)
        logging.set_verbosity(level)
        if bar:
            logging.enable_progress_bar()
