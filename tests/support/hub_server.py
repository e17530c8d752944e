"""A Hub on the loopback interface: as much of its HTTP API as huggingface_hub 2.4 uses for models.

    with HubServer() as hub:
        hub.add_model("Qwen/Qwen2-7B-Instruct", folder)
        subprocess.run([...], env=hub.env(home))

Two ports are served: `url` is the Hub, `cdn_url` stands for its large-file storage on another host
(downloads of large files are redirected there, and LFS and Xet uploads go there).
"""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Any

from hub_http import HubHandler, QuietServer
from hub_store import Blob, Repo
from hub_xet import XetStore


class HubServer:
    """The server and what it holds.

    Attributes:
        url: the Hub's address, for `HF_ENDPOINT`.
        cdn_url: the address of its large-file storage.
        token: the only token that it knows; it belongs to `user`.
        repos: repository id to `Repo`, also of what was pushed.
        requests: (method, path) of everything that was asked, in order.
    """

    def __init__(self, user: str = "tester", token: str = "hf_test") -> None:
        self.user = user
        self.token = token
        self.repos: dict[str, Repo] = {}
        self.large: dict[str, Blob] = {}
        self.xet = XetStore(self.large)
        self.requests: list[tuple[str, str]] = []
        self.dead = False
        self._budget: int | None = None
        self._drop: list[str] = []
        self._lock = threading.Lock()
        self._servers = [
            QuietServer(("127.0.0.1", 0), HubHandler, self, cdn) for cdn in (False, True)
        ]
        self.url, self.cdn_url = (f"http://127.0.0.1:{one.server_port}" for one in self._servers)

    def __enter__(self) -> HubServer:
        for server in self._servers:
            serve = {"poll_interval": 0.02}
            threading.Thread(target=server.serve_forever, kwargs=serve, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def add_model(self, repo_id: str, folder: str | Path, private: bool = False) -> str:
        """Serve the files of `folder` under `repo_id` and return the commit id.

        Files stay where they are and are hashed when first asked for. A second call makes a second
        commit, whose files replace all the earlier ones.
        """
        root = Path(folder)
        paths = [path for path in root.rglob("*") if path.is_file() and ".cache" not in path.parts]
        new: dict[str, Blob | None] = {
            path.relative_to(root).as_posix(): Blob(path) for path in paths
        }
        repo = self.repos.setdefault(repo_id, Repo(repo_id, private))
        gone = dict.fromkeys(repo.head.files) if repo.sha else {}
        return repo.commit("add files", {**gone, **new})

    def env(self, home: str | Path, token: bool = True, xet: bool = True) -> dict[str, str]:
        """The environment of a fresh process that knows no Hub but this one.

        Args:
            home: an empty folder for `HF_HOME`.
            token: give it the token that `push` needs.
            xet: upload through Xet, as huggingface_hub does by default; else through LFS.
        """
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.upper().startswith(("HF_", "HUGGING")) and not key.upper().endswith("_PROXY")
        }
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "NO_PROXY": "127.0.0.1",
        }
        if token:
            own["HF_TOKEN"] = self.token
        if not xet:
            own["HF_HUB_DISABLE_XET"] = "1"
        return {**kept, **own}

    def fail_after(self, n_bytes: int) -> None:
        """Let the network die once `n_bytes` more bytes of request bodies have come in."""
        self._budget = n_bytes

    def drop_connection_on(self, path: str) -> None:
        """Close, without an answer, the connection of every request whose path contains `path`."""
        self._drop.append(path)

    def restore(self) -> None:
        """Undo `fail_after` and `drop_connection_on`."""
        self.dead, self._budget = False, None
        self._drop.clear()

    def received(self, n_bytes: int) -> None:
        """Count bytes of a request body; raises when they were too many."""
        with self._lock:
            if self._budget is not None:
                self._budget -= n_bytes
                self.dead = self.dead or self._budget < 0
        self.check("")

    def check(self, path: str) -> None:
        """Raise when the network is down, or down for `path`."""
        if self.dead or any(part in path for part in self._drop):
            raise ConnectionAbortedError(path)

    def paths(self, method: str) -> list[str]:
        """The paths that were asked for with `method`."""
        return [path for verb, path in self.requests if verb == method]

    def allowed(self, repo_id: str, user: str | None) -> Any:
        """The repository, or None when `user` may not see it or there is none."""
        repo = self.repos.get(repo_id)
        return None if repo is None or (repo.private and user is None) else repo
