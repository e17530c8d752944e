"""Turn what the Hub's client raises into errors that say what to do next."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from mmgraft.errors import MMGraftError, UsageError, first_line
from mmgraft.runs.contents import README

LOGIN = "log in with `hf auth login` (the token needs write access), or set HF_TOKEN"


@contextmanager
def hub_errors(doing: str) -> Iterator[None]:
    """While the block lasts, raise :class:`MMGraftError` where the Hub's client raises its own.

    Args:
        doing: What is being done, for the message: "pushing to me/x".

    Raises:
        UsageError: No or a refused token, no right to write, offline mode, a card that the Hub
            cannot read.
        MMGraftError: Everything else, foremost a network that went away.
    """
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except MMGraftError:
        raise
    except OfflineModeIsEnabled as error:
        raise UsageError("HF_HUB_OFFLINE is set, so nothing can be pushed; unset it") from error
    except HfHubHTTPError as error:
        raise _refused(doing, error) from error
    except Exception as error:  # httpx, Xet and plain RuntimeErrors: all mean that it did not work
        if isinstance(error, ValueError) and README in str(error):
            raise UsageError(f"the Hub refuses {README}: {error}; mend its front matter") from error
        raise MMGraftError(
            f"{doing} failed: {first_line(error)}\nYour files are whole and the repository has "
            "its previous commit. Check the network and run the same command again."
        ) from error


def _refused(doing: str, error: Any) -> MMGraftError:
    status = getattr(error.response, "status_code", 0)
    if status == 401:
        return UsageError(f"the Hub refuses the token ({first_line(error)}); {LOGIN}")
    if status == 403:
        return UsageError(
            f"{doing} is not allowed with this token: {first_line(error)}\n"
            "Push under your own name, or take a token with write access: "
            "https://huggingface.co/settings/tokens"
        )
    again = "somebody pushed at the same time" if status == 412 else first_line(error)
    return MMGraftError(
        f"{doing} failed: {again}\nYour files are whole and the repository has its previous "
        "commit. Run the same command again."
    )
