"""``mmgraft serve``."""

import socket
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from mmgraft.cli.console import note
from mmgraft.cli.loading import load_answerer
from mmgraft.cli.options import LOADING, argument, given, option, with_options
from mmgraft.errors import UsageError
from mmgraft.runs.find import find_run

if TYPE_CHECKING:
    from mmgraft.serving.requests import Allowed

_VLLM = {
    "no_vllm": given(bool, "--no-vllm", "Serve in this process in any case.", default=False),
    "vllm_options": given(str, "Further options of vllm serve, in one text.", default=""),
    "dry_run": given(bool, "--dry-run", "Show the command for vLLM; start nothing.", default=False),
}
_KEY = "Key that clients must send; also MMGRAFT_API_KEY."


@with_options("show_reasoning", {**_VLLM, **LOADING})
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
    """Serve grafts of one base behind OpenAI's API: with vLLM, or with transformers' own server.

    Each workflow is a model, and so is the base alone. A conversation without an image is the
    base's, word for word. Images come as data URLs. vLLM answers requests in batches, and runs
    where it and mmgraft-vllm are installed and take the grafts; transformers' server runs in this
    process, and answers one after another.
    """
    from mmgraft.serving.requests import Allowed
    from mmgraft.serving.with_vllm import start_vllm

    found = runs or [str(find_run(None))]
    allowed = Allowed(allow_urls, _folder(allow_files))
    given = {"show_reasoning": show_reasoning, **loading}
    reason = start_vllm(found, (host, port), allowed, api_key, cors, given)
    if reason is not None:
        note(f"note: served by transformers in this process, not by vLLM: {reason}")
    if reason is not None and not loading["dry_run"]:
        given = {name: value for name, value in given.items() if name not in _VLLM}
        _serve_here(found, host, port, allowed, api_key, cors, given)


def _serve_here(
    runs: list[str],
    host: str,
    port: int,
    allowed: "Allowed",
    api_key: str | None,
    cors: bool,
    loading: dict[str, Any],
) -> None:
    from mmgraft.serving.app import build_app, check_packages, serve_names

    check_packages()
    listening = _listen(host, port)
    served = serve_names(load_answerer(runs[0], **loading), runs[1:], loading["base"])
    import uvicorn

    app = build_app(served, allowed, api_key, cors)
    # Running answers have five seconds after Ctrl-C.
    config = uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)
    address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}/v1"
    note(f"serving {', '.join(served)} at {address} (Ctrl-C ends)")
    if not api_key and host not in ("127.0.0.1", "localhost", "::1"):
        note("note: anyone who reaches this address may ask; --api-key asks for a key")
    uvicorn.Server(config).run(sockets=[listening])


def _folder(path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise UsageError(f"--allow-files {path}: no folder; name one that is there")
    return path and path.resolve()


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
