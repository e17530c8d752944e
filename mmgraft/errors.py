"""Errors that a user can act on.

Every message says what went wrong and what to do next. The command line shows the message alone,
without a traceback, and exits with the error's ``exit_code``.
"""

import difflib
from collections.abc import Iterable


class MMGraftError(Exception):
    """Something failed that was asked for correctly: a full disk, a dead network, a killed save."""

    exit_code = 1


class UsageError(MMGraftError):
    """Something was asked for that cannot be right. The message always says what to do next."""

    exit_code = 2


def nearest(word: str, known: Iterable[str]) -> str | None:
    """Return the known word that ``word`` most likely stands for, or None when nothing is close.

    Case is ignored; a known word that begins with ``word`` counts as close, however long it is.
    """
    by_lower = {name.lower(): name for name in known}
    lower = word.lower()
    close = difflib.get_close_matches(lower, by_lower, n=1, cutoff=0.6)
    if not close and len(lower) >= 2:
        close = sorted((name for name in by_lower if name.startswith(lower)), key=len)
    return by_lower[close[0]] if close else None


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """End a message about an unknown word: with the nearest known one, else with all of them."""
    names = list(known)
    guess = nearest(word, names)
    if guess is not None:
        return f"did you mean {guess!r}?"
    return f"known: {', '.join(names)}" if names else "none is known"


def brief(text: object) -> str:
    """Return a text as a message can show it: not long, and with characters that print."""
    shown = str(text)
    if len(shown) > 400:
        shown = f"{shown[:200]}...{shown[-200:]} ({len(shown):,} characters)"
    return shown.encode("utf-8", "backslashreplace").decode("utf-8")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message that says something, else its class."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


_OUT_OF_MEMORY = (
    "DefaultCPUAllocator", "not enough memory", "out of memory", "Cannot allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED", "CUDNN_STATUS_ALLOC_FAILED",
)  # fmt: skip


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out: on a card, or in main memory."""
    kinds = {cls.__name__ for cls in type(error).__mro__}
    if isinstance(error, MemoryError) or "OutOfMemoryError" in kinds:
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _OUT_OF_MEMORY)
