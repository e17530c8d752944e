"""``mmgraft serve``."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Annotated, Any

from mmgraft.cli.console import note
from mmgraft.cli.loading import load_answerer
from mmgraft.cli.options import LOADING, argument, option, with_options
from mmgraft.errors import UsageError
from mmgraft.runs.find import find_run

_KEY = "Key that clients must send; also MMGRAFT_API_KEY."


@with_options("show_reasoning", LOADING)
def serve(
    runs: Annotated[
        list[str] | None,
        argument("Folders or Hub ids of grafts of one base. Default: the one here."),
    ] = None,
    host: Annotated[str, option("--host", "Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, option("--port", "Port; 0 takes a free one.", min=0, max=65535)] = 8000,
    api_key: Annotated[
        str | None, option("--api-key", _KEY, envvar="MMGRAFT_API_KEY", show_envvar=False)
    ] = None,
    allow_urls: Annotated[
        bool, option("--allow-urls", "Fetch images whose address a client sends.")
    ] = False,
    allow_files: Annotated[
        Path | None, option("--allow-files", "Folder whose images a client may name by file://.")
    ] = None,
    cors: Annotated[bool, option("--cors", "Let web pages of other origins ask.")] = False,
    show_reasoning: Annotated[
        bool, option("--show-reasoning", "Send the reasoning before an answer, too.")
    ] = False,
    **loading: Any,
) -> None:
    """Serve grafts of one base behind OpenAI's API, with transformers' own server.

    Each workflow is a model, and so is the base alone. A conversation without an image is the
    base's, word for word. Images come as data URLs. Requests are answered one after another.
    """
    from mmgraft.serving.app import Allowed, build_app, check_packages, serve_names

    check_packages()
    allowed = Allowed(allow_urls, _folder(allow_files))
    listening = _listen(host, port)
    first, *others = runs or [str(find_run(None))]
    answerer = load_answerer(first, show_reasoning=show_reasoning, **loading)
    served = serve_names(answerer, others, loading["base"])
    import uvicorn

    server = uvicorn.Server(
        uvicorn.Config(build_app(served, allowed, api_key, cors), log_level="warning")
    )
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
    note(f"serving {', '.join(served)} at {address} (Ctrl-C ends)")
    if not api_key and host not in ("127.0.0.1", "localhost", "::1"):
        note("note: anyone who reaches this address may ask; --api-key asks for a key")
    server.run(sockets=[listening])


def _folder(path: Path | None) -> Path | None:
    if path is None:
        return None
    if not path.is_dir():
        raise UsageError(f"--allow-files {path}: no folder; name one that is there")
    return path.resolve()


def _listen(host: str, port: int) -> socket.socket:
    """Take the port before a model is loaded."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UsageError(
            f"cannot listen on {host}, port {port} ({error.strerror or error}); name another with "
            "--host or --port (0 takes a free one)"
        ) from error
