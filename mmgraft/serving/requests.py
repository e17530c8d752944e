"""Requests of clients, checked before a model sees them; none is answered in part.

Images come as data URLs; addresses and files of the server are refused unless they are allowed.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, NonNegativeInt, StrictBool

from mmgraft.data.images import is_data_uri, path_of
from mmgraft.errors import UsageError, brief
from mmgraft.frozen import Frozen
from mmgraft.strict import StrictModel


class Sampling(StrictModel):
    """The fields that every request for text may have, by OpenAI's names.

    A field that is there with one value alone is what the server does in any case.
    """

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: str | list[str] | None = None
    stream: StrictBool | None = None
    stream_options: dict[Literal["include_usage", "include_obfuscation"], bool] | None = None
    logit_bias: dict[NonNegativeInt, float] | None = None
    n: Literal[1] | None = None
    frequency_penalty: Literal[0] | None = None
    presence_penalty: Literal[0] | None = None
    user: str | None = None

    @property
    def tokens(self) -> int:
        """Return the largest number of tokens in the answer."""
        return self.max_tokens or 1024  # as transformers has it

    @property
    def stops(self) -> tuple[str, ...]:
        """Return the texts that end an answer, of which they are no part."""
        return tuple(filter(None, [self.stop] if isinstance(self.stop, str) else self.stop or ()))


class CompletionRequest(Sampling):
    """A request to ``/v1/completions``: text that goes on, without a chat template."""

    prompt: str
    best_of: Literal[1] | None = None
    echo: Literal[False] | None = None


class ChatRequest(Sampling):
    """A request to ``/v1/chat/completions``."""

    messages: list[dict[str, Any]] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    tools: list[dict[str, Any]] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[Literal["type"], Literal["text"]] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None
    metadata: dict[str, str] | None = None
    store: bool | None = None

    @property
    def tokens(self) -> int:
        """Return the largest number of tokens in the answer."""
        return self.max_completion_tokens or super().tokens


class Allowed(Frozen):
    """Images beside data URLs that a request may name.

    Attributes:
        urls: Addresses, which the server fetches.
        files: A folder of the server, whose files may be named by ``file://`` addresses.
    """

    urls: bool = False
    files: Path | None = None

    def conversation(self, messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
        """Return OpenAI's messages as rows have them.

        Raises:
            UsageError: A part that is no text and no image, or an image that is not allowed.
        """
        return [
            {**turn, "content": self._content(turn.get("content"), f"messages[{at}]")}
            for at, turn in enumerate(messages)
        ]

    def _content(self, content: Any, where: str) -> Any:
        if content is None or isinstance(content, str):
            return content or ""
        if not isinstance(content, list):
            raise UsageError(f"{where}: 'content' is a text or a list of parts; mend it")
        return [self._part(part, f"{where}.content[{at}]") for at, part in enumerate(content)]

    def _part(self, part: Any, where: str) -> dict[str, Any]:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            return {"type": "text", "text": part["text"]}
        image = part.get("image_url") if kind == "image_url" else None
        url = image.get("url") if isinstance(image, dict) else image
        if not isinstance(url, str):
            raise UsageError(
                f"{where}: give a part as {{'type': 'text', 'text': ...}} or as {{'type': "
                "'image_url', 'image_url': {'url': 'data:image/png;base64,...'}}"
            )
        try:
            return {"type": "image", "image": self._image(url, where)}
        except UsageError:
            raise
        except Exception as error:  # a broken address, the network, the server there, what it sends
            raise UsageError(
                f"{where}: {brief(repr(url))} cannot be fetched as an image ({error})"
            ) from error

    def _image(self, url: str, where: str) -> Any:
        scheme = urlsplit(url).scheme.lower()
        if is_data_uri(url):
            return url
        if scheme in ("http", "https") and self.urls:
            from transformers.image_utils import load_image

            return load_image(url, timeout=10.0)
        path = Path(path_of(url)).resolve()
        if scheme == "file" and self.files is not None and path.is_relative_to(self.files):
            return str(path)
        raise UsageError(
            f"{where}: the image {brief(url)} is not given as a data URL "
            "(data:image/png;base64,...), and this server may not open it; it was started without "
            f"{'--allow-urls' if scheme.startswith('http') else '--allow-files FOLDER'} for it"
        )
