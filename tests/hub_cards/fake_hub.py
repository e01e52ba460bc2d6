"""A Hub in one process and in memory: the requests by which huggingface_hub and datasets create, fill and read it."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import parse_qs, urlsplit

OWNER = "you"
COMMIT = "0" * 40
LATE = 0.5  # seconds

Repositories = dict[str, dict[str, bytes]]
"""By repository name, with `datasets/` or `spaces/` before it where it is not a model, the content of every path."""
# The path of a repository: after `/api/`, its kind and its name.
_REPOSITORY = r"/api/(models|datasets|spaces)/([^/]+/[^/]+)"


class FakeHub(ThreadingHTTPServer):
    """
    Serves on a free port of the loopback interface.

    Args:
        repositories (`dict`): everything that was committed, by repository and path.
        created (`list`): every repository that was created, in order.
        private (`set`): the repositories that were created as private.
        commits (`list`): the repository of every commit.
        role (`str`): what tokens may do: `"write"` or `"read"`.
        faults (`dict[str, int | None]`): by pattern of method and path, the status with which such a request is
            refused, `None` to close the connection without an answer, or 0 to answer late.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: Repositories = {}
        self.created: list[str] = []
        self.private: set[str] = set()
        self.role = "write"
        self.faults: dict[str, int | None] = {}
        self.commits: list[str] = []
        self.url = f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serving() -> Iterator[FakeHub]:
    with FakeHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


def client(hub: FakeHub, desk: Path, script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    """Run a script as a user of `hub`, in a separate process with a separate cache."""
    online = {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "token", "HF_HOME": str(desk / "cache")}
    quiet = {"HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DISABLE_SAFETENSORS_CONVERSION": "1"}
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        cwd=desk,
        env={**os.environ, **online, **quiet},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


class _Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self._fails():
            return
        if self.path == "/api/repos/create":
            self._create(**json.loads(body))
        elif self.path == "/api/validate-yaml":
            front = json.loads(body)["content"].split("---")[1]
            errors = [] if "tags:" in front else [{"message": "no tags"}]
            self._send_json({"errors": errors, "warnings": []}, status=400 if errors else 200)
        elif match := re.fullmatch(_REPOSITORY + "/(preupload|commit)/main", self.path):
            if match[3] == "preupload":
                self._preupload(json.loads(body))
            else:
                self._commit(_key(match[1], match[2]), body)
        else:
            self._refuse(404, "EntryNotFound")

    def do_GET(self) -> None:
        path, query = urlsplit(self.path).path, parse_qs(urlsplit(self.path).query)
        if self._fails():
            return
        if path == "/api/whoami-v2":
            token = {"accessToken": {"role": self.server.role}}
            self._send_json({"name": OWNER, "type": "user", "orgs": [], "auth": token})
        elif match := re.fullmatch(_REPOSITORY + "(?:/revision/[^/]+)?", path):
            self._describe(_key(match[1], match[2]))
        elif match := re.fullmatch(_REPOSITORY + "/tree/[^/]+(?:/(.+))?", path):
            below = f"{match[3]}/" if match[3] else ""
            entries = [entry for entry in self._tree(_key(match[1], match[2])) if entry["path"].startswith(below)]
            deep = query.get("recursive") == ["true"]
            self._send_json([entry for entry in entries if deep or "/" not in entry["path"].removeprefix(below)])
        elif match := re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/[^/]+/(.+)", path):
            self._resolve(match[1], match[2])
        else:
            self._refuse(404, "EntryNotFound")

    do_HEAD = do_GET  # noqa: N815 (the name http.server asks for)

    def _create(
        self, name: str, organization: str | None = None, visibility: str = "public", type: str = "model", **_: Any
    ) -> None:
        repository = _key(f"{type}s", f"{organization or OWNER}/{name}")
        if organization not in (None, OWNER):
            return self._refuse(403, "Forbidden")
        if visibility == "private":
            self.server.private.add(repository)
        known = repository in self.server.repositories
        if not known:
            self.server.created.append(repository)
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
            elif entry["key"] == "deletedFile":
                del self.server.repositories[repository][entry["value"]["path"]]
        self.server.commits.append(repository)
        url = f"{self.server.url}/{repository}/commit/{COMMIT}"
        self._send_json({"success": True, "commitUrl": url, "commitOid": COMMIT})

    def _describe(self, repository: str) -> None:
        if repository not in self.server.repositories:
            return self._refuse(404, "RepoNotFound")
        siblings = [{"rfilename": path} for path in self.server.repositories[repository]]
        private = repository in self.server.private
        return self._send_json(
            {"id": repository.removeprefix("datasets/"), "sha": COMMIT, "siblings": siblings, "private": private}
        )

    def _tree(self, repository: str) -> list[dict[str, Any]]:
        files = self.server.repositories[repository]
        folders = {str(parent) for path in files for parent in PurePosixPath(path).parents} - {"."}
        return [{"type": "directory", "path": path, "oid": "0" * 40} for path in sorted(folders)] + [
            {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for path, content in files.items()
        ]

    def _resolve(self, repository: str, path: str) -> None:
        if repository not in self.server.repositories:
            return self._refuse(404, "RepoNotFound")
        if path not in self.server.repositories[repository]:
            return self._refuse(404, "EntryNotFound")
        content = self.server.repositories[repository][path]
        return self._send(200, content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": COMMIT})

    def _fails(self) -> bool:
        """Whether this request is one of the faults; then it has been dealt with."""
        for pattern, status in self.server.faults.items():
            if re.search(pattern, f"{self.command} {self.path}"):
                if not status:
                    time.sleep(0 if status is None else LATE)
                    self.close_connection = True
                else:
                    self._refuse(status, "Fault")
                return True
        return False

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
        """Requests are not logged."""


def _key(kind: str, name: str) -> str:
    return name if kind == "models" else f"{kind}/{name}"
