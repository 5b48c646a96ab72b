"""
A small Hub inside the test process: as much of the protocol as the real `huggingface_hub` client needs to create a model
repository, commit to it (regular files and LFS) and read it back. It can drop connections in the middle of a request.
"""

import base64
import contextlib
import hashlib
import json
import re
import socket
import struct
import threading
import time
import uuid
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace
from typing import Any
from unittest import mock
from urllib.parse import unquote, urlsplit

USER = "tester"
TOKEN = "hf_thisIsTheSecretOfTheTests"
_BINARY = (".safetensors", ".bin", ".png", ".model")


class HubServer:
    """
    The server and all it holds.

    Attributes:
        repos: `{repo_id: {"private": bool, "branches": {name: [commit, ...]}}}`.
        requests: (method, path) of every request, in order, dropped ones included.
        lfs: contents of uploaded large files by SHA-256.
    """

    def __init__(self) -> None:
        self.repos: dict[str, dict[str, Any]] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self._drops: list[list[Any]] = []
        self._lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._http.daemon_threads = True
        self._thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        self.endpoint = f"http://127.0.0.1:{self._http.server_port}"

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._http.shutdown()
        self._http.server_close()
        self._thread.join()

    def drop(self, method: str, path: str, *, nth: int = 1, times: int = 1, after: bool = False) -> None:
        """
        Cut the connection of some requests to come: half their body is read, then the socket is reset.

        Args:
            method: HTTP method.
            path: regular expression, searched in the path.
            nth: the first of the matching requests that is dropped, counted from 1.
            times: how many in a row, as the client tries again by itself.
            after: read the whole body and do what it asks, and drop the answer only.
        """
        self._drops.append([method, re.compile(path), nth, times, after])

    def dropped(self, method: str, path: str) -> str | None:
        """`"middle"` or `"after"` if this request is to be dropped."""
        with self._lock:
            self.requests.append((method, path))
            for drop in self._drops:
                if drop[0] == method and drop[1].search(path):
                    drop[2] -= 1
                    if drop[2] <= 0 and drop[3] > 0:
                        drop[3] -= 1
                        return "after" if drop[4] else "middle"
        return None

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """Contents of a branch by path."""
        commits = self.repos[repo_id]["branches"][branch]
        return self.commits[commits[-1]]

    def commit(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        """Make a commit that holds exactly these files; its id."""
        with self._lock:
            commits = self.repos[repo_id]["branches"].setdefault(branch, [])
            # Never the same twice: the client's cache takes a commit that it knows for granted, also another server's
            sha = hashlib.sha1(f"{repo_id} {branch} {len(commits)} {uuid.uuid4()}".encode()).hexdigest()
            commits.append(sha)
            self.commits[sha] = files
            return sha

    def create(self, repo_id: str, *, private: bool = False, files: dict[str, bytes] | None = None) -> None:
        """Make a repository; nothing if it is there already."""
        with self._lock:
            if repo_id not in self.repos:
                self.repos[repo_id] = {"private": private, "branches": {}}
                self.commit(repo_id, files or {})

    def resolve(self, repo_id: str, revision: str) -> str | None:
        """Id of the commit that a branch name or commit id means."""
        branches = self.repos[repo_id]["branches"]
        if revision in branches:
            return branches[revision][-1]
        return revision if revision in self.commits else None


def git_oid(content: bytes) -> str:
    """Git's id of a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: HubServer

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._serve()

    do_HEAD = do_POST = do_PUT = do_GET

    def _serve(self) -> None:
        path = unquote(urlsplit(self.path).path)
        fate = self.hub.dropped(self.command, path)
        if fate == "middle":
            length = int(self.headers.get("Content-Length") or 0)
            self.rfile.read(length // 2)
            return self._reset()
        body = self._body()
        if path.startswith("/lfs/"):
            status, headers, content = self._put(path, body)
        elif self.headers.get("Authorization") not in (None, f"Bearer {TOKEN}"):
            status, headers, content = _json(401, {"error": "Invalid credentials"})
        else:
            status, headers, content = self._route(path, body)
        if fate == "after":
            return self._reset()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self) -> None:
        # Linger 0: the client sees a reset, not an orderly end
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _put(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        oid = path.removeprefix("/lfs/")
        if hashlib.sha256(body).hexdigest() != oid:
            return _json(400, {"error": "content does not match its id"})
        self.hub.lfs[oid] = body
        return 200, {"ETag": f'"{oid}"'}, b""

    def _route(self, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        hub, method = self.hub, self.command
        signed_in = self.headers.get("Authorization") is not None
        if path == "/api/whoami-v2":
            if not signed_in:
                return _json(401, {"error": "Invalid credentials"})
            return _json(200, {"type": "user", "name": USER, "orgs": [], "auth": {"type": "access_token"}})
        if path == "/api/validate-yaml":
            return _json(200, {"errors": [], "warnings": []})
        if path == "/api/repos/create":
            if not signed_in:
                return _json(401, {"error": "Sign in first"})
            asked = json.loads(body)
            repo_id = f"{asked.get('organization') or USER}/{asked['name']}"
            existed = repo_id in hub.repos
            hub.create(repo_id, private=asked.get("visibility") == "private" or bool(asked.get("private")))
            return _json(409 if existed else 200, {"url": f"{hub.endpoint}/{repo_id}", "name": repo_id})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._lfs_batch(body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._file(*match.groups())
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(\w[\w-]*)/([^/]+))?(?:/.*)?", path):
            repo_id, action, revision = match.groups()
            if repo_id not in hub.repos:
                return _json(404, {"error": "Repository not found"}, code="RepoNotFound")
            if action == "branch" and method == "POST":
                hub.commit(repo_id, dict(hub.files(repo_id)), revision)
                return _json(200, {})
            sha = hub.resolve(repo_id, revision or "main")
            if sha is None:
                return _json(404, {"error": "Revision not found"}, code="RevisionNotFound")
            if action == "preupload":
                return self._preupload(hub.commits[sha], json.loads(body))
            if action == "commit":
                return self._commit(repo_id, str(revision), hub.commits[sha], body)
            if action == "tree":
                rows = [
                    {"type": "file", "path": name, "size": len(content), "oid": git_oid(content)}
                    for name, content in sorted(hub.commits[sha].items())
                ]
                return 200, {"Content-Type": "application/json"}, json.dumps(rows).encode()
            info = {
                "_id": repo_id,
                "id": repo_id,
                "modelId": repo_id,
                "sha": sha,
                "private": hub.repos[repo_id]["private"],
                "tags": [],
                "siblings": [{"rfilename": name} for name in sorted(hub.commits[sha])],
            }
            return _json(200, info)
        return _json(404, {"error": f"no such address: {method} {path}"})

    def _preupload(self, present: dict[str, bytes], asked: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
        rows = []
        for file in asked["files"]:
            row = {"path": file["path"], "shouldIgnore": False}
            row["uploadMode"] = "lfs" if file["path"].endswith(_BINARY) or file["size"] > 2**20 else "regular"
            if file["path"] in present:
                content = present[file["path"]]
                is_lfs = row["uploadMode"] == "lfs"
                row["oid"] = hashlib.sha256(content).hexdigest() if is_lfs else git_oid(content)
            rows.append(row)
        return _json(200, {"files": rows})

    def _lfs_batch(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
        objects = []
        for asked in json.loads(body)["objects"]:
            row = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.lfs:
                row["actions"] = {"upload": {"href": f"{self.hub.endpoint}/lfs/{asked['oid']}"}}
            objects.append(row)
        return _json(200, {"transfer": "basic", "objects": objects})

    def _commit(
        self, repo_id: str, revision: str, present: dict[str, bytes], body: bytes
    ) -> tuple[int, dict[str, str], bytes]:
        files = dict(present)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (
                None,
                self.hub.resolve(repo_id, revision),
            ):
                return _json(412, {"error": "The branch has moved on since parentCommit"})
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.lfs:
                    return _json(400, {"error": f"{value['path']}: content was never uploaded"})
                files[value["path"]] = self.hub.lfs[value["oid"]]
            elif line["key"] == "deletedFile":
                files.pop(value["path"], None)
        sha = self.hub.commit(repo_id, files, revision)
        return _json(200, {"commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{sha}", "commitOid": sha})

    def _file(self, repo_id: str, revision: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if repo_id not in self.hub.repos:
            return _json(404, {"error": "Repository not found"}, code="RepoNotFound")
        sha = self.hub.resolve(repo_id, revision)
        if sha is None:
            return _json(404, {"error": "Revision not found"}, code="RevisionNotFound")
        content = self.hub.commits[sha].get(name)
        if content is None:
            return _json(404, {"error": "Entry not found"}, code="EntryNotFound", sha=sha)
        return 200, {"X-Repo-Commit": sha, "ETag": f'"{git_oid(content)}"', "Accept-Ranges": "bytes"}, content


def _json(
    status: int, content: dict[str, Any], *, code: str | None = None, sha: str | None = None
) -> tuple[int, dict[str, str], bytes]:
    headers = {"Content-Type": "application/json"}
    if code is not None:
        headers |= {"X-Error-Code": code, "X-Error-Message": content["error"]}
    if sha is not None:
        headers["X-Repo-Commit"] = sha
    return status, headers, json.dumps(content).encode()


@contextlib.contextmanager
def hub_client(server: HubServer) -> Iterator[None]:
    """
    Point the `huggingface_hub` client of this process at the server, signed in, and let it try again without waiting.
    The client reads its environment at import, which lies behind us: what it read is replaced instead.
    """
    import transformers.utils.hub
    from huggingface_hub import constants
    from huggingface_hub.hf_api import api
    from huggingface_hub.utils import _http, close_session

    template = server.endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    environment = {"HF_TOKEN": TOKEN, "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    close_session()  # a session keeps the proxies it was made with
    with (
        warnings.catch_warnings(),
        mock.patch.dict("os.environ", environment),
        mock.patch.multiple(
            constants,
            ENDPOINT=server.endpoint,
            HUGGINGFACE_CO_URL_TEMPLATE=template,
            HF_HUB_OFFLINE=False,
            HF_HUB_DISABLE_XET=True,
        ),
        mock.patch.object(api, "endpoint", server.endpoint),
        mock.patch.object(transformers.utils.hub, "_hf_api", None),
        # The client's own waiting between attempts only: `time.sleep` itself belongs to everybody
        mock.patch.object(_http, "time", SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None})),
    ):
        # huggingface_hub 2.4 uploads with an argument of httpx2's that is on its way out
        warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
        yield
    close_session()
