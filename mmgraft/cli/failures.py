"""Turn what can go wrong outside mmgraft into a message and an exit code."""

import errno
import re

from mmgraft.errors import MMGraftError, UsageError, first_line, is_out_of_memory

_NETWORK_PACKAGES = {"httpx", "httpx2", "httpcore", "httpcore2", "requests", "urllib3"}
#: Texts of gloo's error where a process that it waits for has gone.
_PEER = re.compile("Connection (closed|reset) by peer|[Tt]imed out waiting .*ms for recv")
_HUB_USAGE = {"GatedRepoError", "RepositoryNotFoundError", "RevisionNotFoundError"}


def explain(error: BaseException) -> tuple[str, int] | None:
    """Return the message and exit code for an error; None for a defect of mmgraft itself.

    A full disk, a dead network and too little memory are nobody's mistake (1); a config that
    pydantic refuses and a model that the Hub does not give out are wrong use (2).
    """
    if isinstance(error, MMGraftError):
        return str(error), error.exit_code
    kinds = {cls.__name__ for cls in type(error).__mro__}
    packages = {cls.__module__.partition(".")[0] for cls in type(error).__mro__}
    if "ValidationError" in kinds and "pydantic_core" in packages:
        return _explain_validation(error), UsageError.exit_code
    if found := kinds & _HUB_USAGE:
        return _explain_hub(error, found), UsageError.exit_code
    if "huggingface_hub" in packages or packages & _NETWORK_PACKAGES:
        return (
            f"the Hub could not be reached or refused: {first_line(error)}\n"
            "Check the network and HF_ENDPOINT, then run the same command again.",
            MMGraftError.exit_code,
        )
    if "DistError" in kinds or (isinstance(error, RuntimeError) and _PEER.search(str(error))):
        return (
            "another process of this training has ended; what it said tells why. What was saved "
            "before is whole: the same command with --resume goes on.",
            MMGraftError.exit_code,
        )
    if is_out_of_memory(error):
        return (
            f"out of memory: {first_line(error)}\n"
            "Use a smaller batch, --quantization nf4, or gradient checkpointing in the recipe.",
            MMGraftError.exit_code,
        )
    return (_explain_os(error), MMGraftError.exit_code) if isinstance(error, OSError) else None


def _explain_validation(error: BaseException) -> str:
    from pydantic import BaseModel, ValidationError

    from mmgraft.strict import describe

    assert isinstance(error, ValidationError)
    return describe(error, BaseModel, error.title)


def _explain_hub(error: BaseException, found: set[str]) -> str:
    if "GatedRepoError" in found:
        todo = "Ask for access on its page, then log in with `hf auth login`."
    else:
        todo = "Check the name and the revision; a private one needs `hf auth login`."
    return f"{first_line(error)}\n{todo}"


def _explain_os(error: OSError) -> str:
    where = f" ({error.filename})" if error.filename else ""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return (
            f"the disk is full{where}; what was there before is whole. "
            "Free some space and run the same command again."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not allowed to read or write{where}; choose another folder or mend its rights."
    return f"{first_line(error)}; mend this and run the same command again."
