"""The application: transformers' server with grafts as its models, and a filter in front.

Routes, streams and the queue of requests are transformers'. Models, tokenising and generation are
mmgraft's: :class:`Served` stands for a model and its processor.
"""

import hmac
import inspect
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmgraft.errors import UsageError, first_line
from mmgraft.inference import Answerer
from mmgraft.model.files.graft_file import GraftFile
from mmgraft.model.files.load import base_files, graft_folder
from mmgraft.model.workflow import TEXT_WORKFLOW
from mmgraft.serving.requests import Allowed
from mmgraft.serving.served import Served

if TYPE_CHECKING:
    from fastapi import FastAPI

#: Largest body of a request.
MAX_BYTES = 64 * 2**20

_ROUTES = ("/v1/chat/completions", "/v1/completions", "/v1/models", "/health")


def check_packages() -> None:
    """Refuse to serve without the packages of the extra ``serve``.

    Raises:
        UsageError: Names those that are missing.
    """
    if missing := [name for name in ("fastapi", "uvicorn", "openai") if find_spec(name) is None]:
        raise UsageError(
            f"serving needs {', '.join(missing)}: pip install 'mmgraft[serve]', then try again"
        )


def serve_names(
    answerer: Answerer, others: Sequence[str | Path] = (), base: str | None = None
) -> dict[str, Served]:
    """Return what is served, by name: the base alone and every workflow.

    A workflow has its own name, or that of its folder where another workflow has it already.

    Args:
        answerer: The first graft.
        others: Folders or Hub ids of further grafts of the same base and tower.
        base: Where the base lies, when not where their records say.

    Raises:
        UsageError: A graft of another base or tower, or two of one name.
    """
    model, first = answerer.model, answerer.model.default_workflow
    alone = Path(model.workflow().record.base.id).name
    if alone == first:
        raise UsageError(f"base and workflow are both called {alone!r}; rename the base's folder")
    found = {alone: Served(alone, answerer, TEXT_WORKFLOW), first: Served(first, answerer, first)}
    for source in others:
        folder = graft_folder(source)
        record = GraftFile.read(folder)
        name = record.workflow if record.workflow not in found else folder.resolve().name
        if name in found:
            raise UsageError(f"{source}: {name!r} is served already; name its folder otherwise")
        workflow = f"served_{len(found)}"  # any folder's name will do
        model.add_workflow(workflow, folder)
        files = base_files(record, folder, base)
        made = model.processor(files.path, workflow, answerer.processor.options)
        found[name] = Served(name, Answerer(model, made, answerer.reasoning), workflow)
    model.answers = None  # every request says what ends its answer
    return found


def build_app(
    served: Mapping[str, Served],
    allowed: Allowed | None = None,
    key: str | None = None,
    cors: bool = False,
) -> "FastAPI":
    """Build the application.

    Args:
        served: Models by name.
        allowed: Images beside data URLs.
        key: What a client must send as ``Authorization: Bearer KEY``, except to ``/health``.
        cors: Let pages of other origins ask.

    Raises:
        UsageError: A package of the extra ``serve`` is missing.
    """
    check_packages()
    from transformers.cli.serving.server import build_server

    from mmgraft.serving.handlers import Chat, Completion, Models, OneQueue

    models, queue = Models(served), OneQueue()
    names = inspect.signature(build_server).parameters
    given: dict[str, Any] = {name: None for name in names if name.endswith("_handler")}
    given["chat_handler"] = Chat(models, queue, allowed or Allowed())
    given["completion_handler"] = Completion(models, queue)
    app = build_server(models, **given, generation_state=queue, enable_cors=cors)
    app.router.routes[:] = [one for one in app.router.routes if getattr(one, "path", "") in _ROUTES]
    _answer_errors(app)
    _guard(app, key)
    app.router.redirect_slashes = False  # a redirect has no error's form
    app.user_middleware.reverse()  # a page may read refusals too
    return app


def _answer_errors(app: "FastAPI") -> None:
    """Answer errors in OpenAI's form, without a traceback."""
    from fastapi.exceptions import RequestValidationError
    from starlette.exceptions import HTTPException

    async def refuse(_request: Any, error: Any) -> Any:
        return _error(str(getattr(error, "detail", error)), getattr(error, "status_code", 400))

    async def malformed(_request: Any, _error_: Any) -> Any:
        return _error("the body is no JSON object; send one with 'model' and 'messages'", 400)

    refused = {UsageError: refuse, HTTPException: refuse}
    for kind, answer in {**refused, RequestValidationError: malformed, 400: malformed}.items():
        app.add_exception_handler(kind, answer)


def _guard(app: "FastAPI", key: str | None) -> None:
    """Refuse requests without the key, and bodies past the limit, before they are read."""

    @app.middleware("http")
    async def check(request: Any, call_next: Any) -> Any:
        given = request.headers.get("authorization", "").removeprefix("Bearer ")
        is_open = request.url.path == "/health" or request.method == "OPTIONS"
        if key and not is_open and not hmac.compare_digest(given.encode(), key.encode()):
            return _error("wrong or no API key; send Authorization: Bearer KEY", 401)
        size = request.headers.get("content-length", "")
        if request.method == "POST" and (not size.isdigit() or int(size) > MAX_BYTES):
            return _error(f"a request needs a Content-Length up to {MAX_BYTES // 2**20} MiB", 413)
        try:
            return await call_next(request)
        except Exception as error:  # answered here, so that a page may read it
            logging.getLogger("uvicorn.error").exception("a request failed")
            return _error(f"the server failed at this request: {first_line(error)}", 500)


def _error(message: str, status: int) -> Any:
    from fastapi.responses import JSONResponse

    kind = "server_error" if status >= 500 else "invalid_request_error"
    body = {"message": message, "type": kind, "param": None, "code": None}
    return JSONResponse({"error": body}, status_code=status)
