"""A Hub of one process: what huggingface_hub asks for to create, fill and read model repositories, held in memory."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

OWNER = "you"
COMMIT = "0" * 40

Repositories = dict[str, dict[str, bytes]]
"""Repository name to path to content."""


class FakeHub(ThreadingHTTPServer):
    """
    Serves on a free port of the loopback interface.

    Args:
        repositories (`dict`): everything that was committed, by repository and path.
        private (`set`): the repositories that were created private.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: Repositories = {}
        self.private: set[str] = set()
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self._create(**json.loads(body))
        elif self.path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")[1]
            self._send_json({"errors": [] if "tags:" in front else [{"message": "no tags"}], "warnings": []})
        elif match := re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", self.path):
            self._preupload(json.loads(body)) if match[2] == "preupload" else self._commit(match[1], body)
        else:
            self._refuse(404, "EntryNotFound")

    def do_GET(self) -> None:
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/main)?(?:\?.*)?", self.path):
            self._describe(match[1])
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", self.path):
            self._resolve(match[1], match[2])
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET  # noqa: N815 (the name http.server asks for)

    def _create(self, name: str, organization: str | None = None, visibility: str = "public", **_: Any) -> None:
        repository = f"{organization or OWNER}/{name}"
        if organization not in (None, OWNER):
            return self._refuse(403, "Forbidden")
        if visibility == "private":
            self.server.private.add(repository)
        known = repository in self.server.repositories
        self.server.repositories.setdefault(repository, {})
        return self._send_json({"url": f"{self.server.url}/{repository}"}, status=409 if known else 200)

    def _preupload(self, body: dict[str, Any]) -> None:
        files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in body["files"]]
        self._send_json({"files": files})

    def _commit(self, repository: str, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            if entry["key"] == "file":
                content = base64.b64decode(entry["value"]["content"])
                self.server.repositories[repository][entry["value"]["path"]] = content
        url = f"{self.server.url}/{repository}/commit/{COMMIT}"
        self._send_json({"success": True, "commitUrl": url, "commitOid": COMMIT})

    def _describe(self, repository: str) -> None:
        if repository not in self.server.repositories:
            return self._refuse(404, "RepoNotFound")
        siblings = [{"rfilename": path} for path in self.server.repositories[repository]]
        return self._send_json({"id": repository, "sha": COMMIT, "siblings": siblings})

    def _resolve(self, repository: str, path: str) -> None:
        if repository not in self.server.repositories:
            return self._refuse(404, "RepoNotFound")
        if path not in self.server.repositories[repository]:
            return self._refuse(404, "EntryNotFound")
        content = self.server.repositories[repository][path]
        return self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send_json(self, value: Any, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are no news."""
