"""The HTTP side of the loopback Hub: one method an endpoint."""

from __future__ import annotations

import base64
import json
import re
import socket
import struct
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

from hub_store import Blob, Commit, Repo, file_entry, front_matter, is_lfs, parse_front_matter, tree

if TYPE_CHECKING:
    from hub_server import HubServer

_DATE = "2026-01-01T00:00:00.000Z"


class QuietServer(ThreadingHTTPServer):
    """A threading server that knows its hub and does not report connections that break."""

    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(
        self,
        address: tuple[str, int],
        handler: type[BaseHTTPRequestHandler],
        hub: HubServer,
        cdn: bool,
    ) -> None:
        self.hub = hub
        self.cdn = cdn
        super().__init__(address, handler)

    def verify_request(self, request: Any, client_address: Any) -> bool:
        return not self.hub.dead

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


class HubError(Exception):
    """An answer of the Hub that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        super().__init__(message)
        self.status = status
        self.headers = {"X-Error-Message": message, **headers}
        if code is not None:
            self.headers["X-Error-Code"] = code


Answer = tuple[int, dict[str, str], bytes | Blob]


def _json(value: Any, status: int = 200, **headers: str) -> Answer:
    return status, {"Content-Type": "application/json", **headers}, json.dumps(value).encode()


class HubHandler(BaseHTTPRequestHandler):
    """Finds the endpoint, reads the body, answers."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1  # one packet an answer: half of one waits for an acknowledgement
    server: QuietServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        hub = self.server.hub
        url = urlsplit(self.path)
        hub.requests.append((self.command, url.path))
        try:
            hub.check(url.path)
            self.body = self._read_body()
            self.query = parse_qs(url.query)
            status, headers, content = self._route(url.path)
        except HubError as error:
            status, headers, content = _json({"error": str(error)}, error.status, **error.headers)
        except ConnectionError:
            self._drop()
            return
        self._send(status, headers, content)

    do_HEAD = do_POST = do_PUT = do_GET

    def _drop(self) -> None:
        # A reset instead of a polite end: what a dead network looks like from the other side.
        linger = struct.pack("ii", 1, 0)
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        self.close_connection = True

    def _read_body(self) -> bytes:
        pieces: list[bytes] = []
        if self.headers.get("Transfer-Encoding", "").lower() == "chunked":
            while size := int(self.rfile.readline().split(b";")[0], 16):
                pieces.append(self._read(size))
                self.rfile.readline()
            while self.rfile.readline().strip():
                pass
        else:
            left = int(self.headers.get("Content-Length") or 0)
            while left:
                pieces.append(self._read(min(left, 2**16)))
                left -= len(pieces[-1])
        return b"".join(pieces)

    def _read(self, size: int) -> bytes:
        piece = self.rfile.read(size)
        if len(piece) < size:
            raise ConnectionResetError("the client went away")
        self.server.hub.received(size)
        return piece

    def _route(self, path: str) -> Answer:
        for method, pattern, endpoint in CDN_ROUTES if self.server.cdn else ROUTES:
            if self.command in method and (match := pattern.fullmatch(path)):
                if self.server.cdn and self.headers.get("Authorization", "").endswith(
                    self.server.hub.token
                ):
                    raise HubError(400, "the Hub's token was sent to another host")
                return endpoint(self, *(unquote(part or "") for part in match.groups()))
        raise HubError(404, f"the loopback Hub does not know {self.command} {path}")

    def _send(self, status: int, headers: dict[str, str], content: bytes | Blob) -> None:
        blob = Blob(content) if isinstance(content, bytes) else content
        start, stop = 0, blob.size
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or "")
        if status == 200 and wanted:
            start = int(wanted[1])
            stop = min(int(wanted[2]) + 1, stop) if wanted[2] else stop
            if start >= blob.size:
                status, stop = 416, start
            else:
                status = 206
            headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{blob.size}"}
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        if self.command != "HEAD":
            blob.copy_to(self.wfile, start, stop)

    # Who asks, and for what

    def _user(self) -> str | None:
        given = self.headers.get("Authorization")
        if given is None:
            return None
        if given != f"Bearer {self.server.hub.token}":
            raise HubError(401, "Invalid credentials in Authorization header")
        return self.server.hub.user

    def _writer(self, namespace: str) -> str:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        if user != namespace:
            raise HubError(
                403, f"You don't have the rights to write under the namespace {namespace!r}"
            )
        return user

    def _repo(self, repo_id: str, write: bool = False) -> Repo:
        user = self._writer(repo_id.split("/")[0]) if write else self._user()
        repo = self.server.hub.allowed(repo_id, user)
        if repo is None:
            raise HubError(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return repo

    def _commit(self, repo: Repo, revision: str) -> Commit:
        commit = repo.at(revision or "main")
        if commit is None:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return commit

    # Endpoints that read

    def whoami(self) -> Answer:
        user = self._user()
        if user is None:
            raise HubError(401, "Invalid username or password.")
        return _json(
            {"type": "user", "id": "1", "name": user, "fullname": user, "orgs": [], "auth": {}}
        )

    def telemetry(self) -> Answer:
        return 200, {}, b""

    def model_info(self, repo_id: str, revision: str = "") -> Answer:
        repo = self._repo(repo_id)
        commit = self._commit(repo, revision)
        card = front_matter(commit)
        siblings = [
            {"rfilename": name, "size": blob.size} for name, blob in sorted(commit.files.items())
        ]
        info = {"_id": "1", "id": repo.id, "modelId": repo.id, "author": repo.id.split("/")[0]}
        info |= {"sha": commit.oid, "private": repo.private, "gated": False, "disabled": False}
        info |= {
            "createdAt": _DATE,
            "lastModified": _DATE,
            "tags": card.get("tags", []),
            "downloads": 0,
        }
        info |= {"siblings": siblings, "cardData": card, "library_name": card.get("library_name")}
        return _json(info)

    def tree(self, repo_id: str, revision: str, folder: str = "") -> Answer:
        commit = self._commit(self._repo(repo_id), revision)
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        entries = tree(commit, folder, recursive)
        if folder and not entries:
            raise HubError(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        return _json(entries)

    def paths_info(self, repo_id: str, revision: str) -> Answer:
        commit = self._commit(self._repo(repo_id), revision)
        text = self.body.decode()
        asked = json.loads(text) if text.startswith("{") else parse_qs(text)
        known = commit.files
        return _json([file_entry(name, known[name]) for name in asked["paths"] if name in known])

    def refs(self, repo_id: str) -> Answer:
        repo = self._repo(repo_id)
        main = {"name": "main", "ref": "refs/heads/main", "targetCommit": repo.sha}
        return _json({"branches": [main], "tags": [], "converts": []})

    def commits(self, repo_id: str, revision: str) -> Answer:
        repo = self._repo(repo_id)
        found: list[dict[str, Any]] = []
        commit: Commit | None = self._commit(repo, revision)
        while commit is not None:
            found.append(
                {
                    "id": commit.oid,
                    "title": commit.title,
                    "message": "",
                    "date": _DATE,
                    "authors": [],
                }
            )
            commit = repo.commits.get(commit.parent or "")
        return _json(found)

    def resolve(self, repo_id: str, revision: str, name: str) -> Answer:
        repo = self._repo(repo_id)
        commit = self._commit(repo, revision)
        blob = commit.files.get(name)
        headers = {"X-Repo-Commit": commit.oid, "Accept-Ranges": "bytes"}
        if blob is None:
            raise HubError(404, "Entry not found", "EntryNotFound", **headers)
        headers["ETag"] = f'"{blob.etag(name)}"'
        if not blob.is_lfs(name):
            return 200, headers, blob
        self.server.hub.large.setdefault(blob.sha256, blob)
        headers |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": headers["ETag"]}
        headers["Location"] = f"{self.server.hub.cdn_url}/large/{blob.sha256}"
        return 302, headers, b""

    def large(self, sha256: str) -> Answer:
        blob = self.server.hub.large.get(sha256)
        if blob is None:
            raise HubError(404, "no such object")
        return 200, {"ETag": f'"{sha256}"', "Accept-Ranges": "bytes"}, blob

    # Endpoints that write

    def create_repo(self) -> Answer:
        asked = json.loads(self.body)
        user = self._user()
        owner = asked.get("organization") or user or ""
        self._writer(owner)
        repo_id = f"{owner}/{asked['name']}"
        answer = {"url": f"{self.server.hub.url}/{repo_id}", "name": repo_id}
        if asked.get("type", "model") != "model":
            raise HubError(400, "the loopback Hub keeps models only")
        if repo_id in self.server.hub.repos:
            return _json({"error": "You already created this model repo", **answer}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repo = self.server.hub.repos[repo_id] = Repo(repo_id, private)
        attributes = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        repo.commit("initial commit", {".gitattributes": Blob(attributes)})
        return _json(answer)

    def validate_yaml(self) -> Answer:
        content = json.loads(self.body)["content"]
        try:
            parse_front_matter(content)
        except (yaml.YAMLError, ValueError) as error:
            return _json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        return _json({"errors": [], "warnings": []})

    def preupload(self, repo_id: str, revision: str) -> Answer:
        files = self._commit(self._repo(repo_id, write=True), revision).files
        answer = []
        for file in json.loads(self.body)["files"]:
            name, old = file["path"], files.get(file["path"])
            mode = "lfs" if is_lfs(name, file["size"]) else "regular"
            oid = old.etag(name) if old is not None else None
            answer.append({"path": name, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return _json({"files": answer})

    def lfs_batch(self, repo_id: str) -> Answer:
        self._repo(repo_id, write=True)
        hub = self.server.hub
        objects = []
        for one in json.loads(self.body)["objects"]:
            if one["oid"] not in hub.large:
                actions: dict[str, Any] = {"upload": {"href": f"{hub.cdn_url}/large/{one['oid']}"}}
                actions["verify"] = {"href": f"{hub.url}/{repo_id}.git/info/lfs/verify"}
                one = {**one, "actions": actions}
            objects.append(one)
        return _json({"transfer": "basic", "objects": objects})

    def put_large(self, sha256: str) -> Answer:
        blob = Blob(self.body)
        if blob.sha256 != sha256:
            raise HubError(400, "the bytes have another SHA-256")
        self.server.hub.large[sha256] = blob
        return 200, {"ETag": f'"{sha256}"'}, b""

    def lfs_verify(self, repo_id: str) -> Answer:
        self._repo(repo_id, write=True)
        asked = json.loads(self.body)
        self._stored(asked["oid"], asked["size"])
        return _json({})

    def _stored(self, sha256: str, size: int | None) -> Blob:
        blob = self.server.hub.large.get(sha256)
        if blob is None or size not in (None, blob.size):
            raise HubError(400, f"LFS object {sha256} was never uploaded")
        return blob

    def commit(self, repo_id: str, revision: str) -> Answer:
        repo = self._repo(repo_id, write=True)
        header: dict[str, Any] = {}
        changes: dict[str, Blob | None] = {}
        for line in self.body.splitlines():
            item = json.loads(line)
            key, value = item["key"], item["value"]
            if key == "header":
                header = value
            elif key == "file":
                changes[value["path"]] = Blob(base64.b64decode(value["content"]))
            elif key == "lfsFile":
                changes[value["path"]] = self._stored(value["oid"], value.get("size"))
            elif key in ("deletedFile", "deletedFolder"):
                path = value["path"].rstrip("/")
                gone = [name for name in repo.names if name == path or name.startswith(f"{path}/")]
                if not gone:
                    raise HubError(404, "A file with this name doesn't exist", "EntryNotFound")
                changes |= dict.fromkeys(gone)
        with repo.lock:
            if header.get("parentCommit") not in (None, repo.sha):
                raise HubError(412, "A commit has happened since. Please refresh and try again.")
            oid = repo.commit(header["summary"], changes)
        url = f"{self.server.hub.url}/{repo_id}/commit/{oid}"
        return _json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def xet_token(self, repo_id: str, kind: str) -> Answer:
        self._repo(repo_id, write=kind == "write")
        expires = int(time.time()) + 3600
        address = self.server.hub.cdn_url
        headers = {
            "X-Xet-Cas-Url": address,
            "X-Xet-Access-Token": "xet",
            "X-Xet-Token-Expiration": str(expires),
        }
        return _json({"casUrl": address, "accessToken": "xet", "exp": expires}, **headers)

    def xorb(self, name: str) -> Answer:
        try:
            return _json({"was_inserted": self.server.hub.xet.add_xorb(name, self.body)})
        except ValueError as error:
            raise HubError(400, str(error)) from error

    def shard(self) -> Answer:
        try:
            self.server.hub.xet.add_shard(self.body)
        except (KeyError, ValueError) as error:
            raise HubError(400, str(error)) from error
        return _json({"result": 1})


def _routes(
    *routes: tuple[str, str, Callable[..., Answer]],
) -> list[tuple[str, re.Pattern[str], Any]]:
    named = {"REPO": r"([^/]+(?:/[^/]+)?)", "PART": r"([^/]+)", "REST": r"(.+)"}
    found = []
    for method, pattern, endpoint in routes:
        for name, regex in named.items():
            pattern = pattern.replace(name, regex)
        found.append((method, re.compile(pattern), endpoint))
    return found


_API = "/api/models/REPO"
ROUTES = _routes(
    ("GET", "/api/whoami-v2", HubHandler.whoami),
    ("HEAD GET", "/api/telemetry/REST", lambda handler, _: handler.telemetry()),
    ("GET", f"{_API}/tree/PART(?:/(.+))?", HubHandler.tree),
    ("GET", f"{_API}/revision/PART", HubHandler.model_info),
    ("POST", f"{_API}/paths-info/PART", HubHandler.paths_info),
    ("GET", f"{_API}/refs", HubHandler.refs),
    ("GET", f"{_API}/commits/PART", HubHandler.commits),
    (
        "GET",
        f"{_API}/xet-(read|write)-token/PART",
        lambda handler, repo, kind, _: handler.xet_token(repo, kind),
    ),
    ("POST", f"{_API}/preupload/PART", HubHandler.preupload),
    ("POST", f"{_API}/commit/PART", HubHandler.commit),
    ("GET", _API, HubHandler.model_info),
    ("POST", "/api/repos/create", HubHandler.create_repo),
    ("POST", "/api/validate-yaml", HubHandler.validate_yaml),
    ("POST", r"/REPO\.git/info/lfs/objects/batch", HubHandler.lfs_batch),
    ("POST", r"/REPO\.git/info/lfs/verify", HubHandler.lfs_verify),
    ("HEAD GET", "/REPO/resolve/PART/REST", HubHandler.resolve),
)
CDN_ROUTES = _routes(
    ("HEAD GET", "/large/PART", HubHandler.large),
    ("PUT", "/large/PART", HubHandler.put_large),
    ("POST", "/v1/xorbs/default/PART", HubHandler.xorb),
    ("POST", "/v1/shards", HubHandler.shard),
)
