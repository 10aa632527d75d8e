"""A stand-in for the hub: an HTTP server on the loopback that answers the requests of `huggingface_hub` and `datasets`.

It speaks the plain and the LFS protocol; clients must set HF_HUB_DISABLE_XET=1. Repositories are in memory.
"""

import base64
import hashlib
import json
import re
import threading
import time
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".parquet", ".arrow")  # stored by LFS: served from another address
TOKEN = "hf_owner"  # may read every repository and write to the namespaces of `Hub.writable`
DATE = "2024-01-01T00:00:00.000Z"


@dataclass
class Repo:
    """One repository: its commits, oldest first, and the names that point to commits."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # sha → path → content
    refs: dict[str, str] = field(default_factory=dict)  # branch or tag → sha


@dataclass
class Fault:
    """What the next `times` requests that match `pattern` get instead of the usual answer."""

    pattern: str  # regular expression over "METHOD /path"
    times: int
    status: int = 0  # 0: the usual answer
    headers: dict[str, str] = field(default_factory=dict)
    cut: int | None = None  # close the connection after this number of bytes of the body
    delay: float = 0.0  # seconds


class Hub:
    """The server and its repositories."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}  # "models/OWNER/NAME" or "datasets/OWNER/NAME"
        self.renamed: dict[str, str] = {}  # former name → name, both as in `repos`
        self.writable = {"me"}  # namespaces that TOKEN may write to
        self.blobs: dict[str, bytes] = {}  # SHA-256 → content
        self.log: list[str] = []  # "METHOD /path" of each request
        self.sent: list[int] = []  # bytes of the body of each response
        self.faults: list[Fault] = []
        self.port = 0  # any free one, then always the same
        self.start()
        self.url = f"http://127.0.0.1:{self.port}"
        self.storage = f"http://localhost:{self.port}"  # another host for clients, which then send no token

    def start(self) -> None:
        methods = dict.fromkeys(("do_GET", "do_HEAD", "do_POST", "do_PUT"), _Handler.serve)
        handler = type("Handler", (_Handler,), methods | {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), handler)
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def stop(self) -> None:
        """Refuse connections until `start`."""
        self._server.shutdown()
        self._server.server_close()

    def commit(self, name: str, files: Path | dict[str, bytes], sha: str | None = None, ref: str = "main") -> str:
        """Add a commit that holds the files of a folder, or these files, and let `ref` point to it; return its sha."""
        repo = self.repos.setdefault(name, Repo())
        if isinstance(files, Path):
            files = {str(path.relative_to(files)): path.read_bytes() for path in files.rglob("*") if path.is_file()}
        sha = sha or hashlib.sha1(f"{name} {len(repo.commits)}".encode()).hexdigest()
        repo.commits[sha] = files
        repo.refs = {"main": sha} | repo.refs | {ref: sha}
        self.blobs |= {hashlib.sha256(content).hexdigest(): content for content in files.values()}
        return sha

    def fail(self, pattern: str, times: int = 1, **fault: Any) -> Fault:
        """Let requests fail: see `Fault`."""
        self.faults.append(Fault(pattern, times, **fault))
        return self.faults[-1]

    def environment(self, home: Path, **more: str) -> dict[str, str]:
        """Return the variables of a process that asks this hub and keeps its caches in a folder."""
        caches = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
        return {"HF_ENDPOINT": self.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": "", **caches, **more}


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments: Any) -> None:
        pass

    def serve(self) -> None:
        path = urlsplit(self.path).path
        request = f"{self.command} {unquote(path)}"
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.log.append(request)
        fault = next((fault for fault in self.hub.faults if fault.times and re.search(fault.pattern, request)), None)
        self.cut = fault.cut if fault else None
        if fault:
            fault.times -= 1
            time.sleep(fault.delay)
        if fault and fault.status:
            self.answer(fault.status, {"error": "injected"}, **fault.headers)
            return
        for route, handle in self.ROUTES:
            if match := re.fullmatch(route, path):
                values = {name: unquote(value or "") for name, value in match.groupdict().items()}
                if "kind" in values:
                    values["name"] = f"{values.pop('kind').rstrip('/') or 'models'}/{values.pop('id')}"
                handle(self, **values)
                return
        self.answer(404, {"error": "Sorry, we can't find the page you are looking for."})

    def answer(self, status: int, body: bytes | Any = b"", **headers: str) -> None:
        """Send a response; a body that is not bytes is sent as JSON. In header names, _ means -."""
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.hub.sent.append(len(content[: self.cut]))
            self.wfile.write(content[: self.cut])
        self.close_connection = self.close_connection or self.cut is not None

    def error(self, status: int, code: str, message: str, **headers: str) -> None:
        self.answer(status, {"error": message}, X_Error_Code=code, X_Error_Message=message, **headers)

    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    def find(self, name: str, rev: str, *, content: bool = False) -> tuple[str, dict[str, bytes]] | None:
        """Return the sha and the files of a revision; otherwise answer with the error of the hub, and return None."""
        if new := self.hub.renamed.get(name):
            old, new = (part.removeprefix("models/") for part in (name, new))
            self.answer(307, Location=self.path.replace(old, new, 1))
            return None
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and self.token() != TOKEN):
            signed_in = bool(self.token())
            message = "Repository not found" if signed_in else "Invalid username or password."
            self.error(404 if signed_in else 401, "RepoNotFound", message)
        elif content and repo.gated and self.token() != TOKEN:
            self.error(403 if self.token() else 401, "GatedRepo", f"Access to {name} is restricted.")
        elif (sha := repo.refs.get(rev or "main", rev)) not in repo.commits:
            self.error(404, "RevisionNotFound", f"Invalid rev id: {rev}")
        else:
            return sha, repo.commits[sha]
        return None

    def info(self, name: str, rev: str) -> None:
        if found := self.find(name, rev):
            repo, (sha, files) = self.hub.repos[name], found
            state = {"private": repo.private, "gated": "auto" if repo.gated else False, "disabled": False}
            siblings = [{"rfilename": path} for path in sorted(files)]
            dates = {"lastModified": DATE, "createdAt": DATE}
            self.answer(
                200, {"id": name.partition("/")[2], "sha": sha, "tags": [], "siblings": siblings} | state | dates
            )

    def entry(self, path: str, content: bytes) -> dict[str, Any]:
        oid = hashlib.sha256(content).hexdigest()
        lfs = {"lfs": {"oid": oid, "size": len(content), "pointerSize": 134}} if path.endswith(LARGE) else {}
        blob = hashlib.sha1(content).hexdigest()
        return {"type": "file", "oid": blob, "size": len(content), "path": path} | lfs

    def tree(self, name: str, rev: str, path: str) -> None:
        if found := self.find(name, rev):
            recursive = parse_qs(urlsplit(self.path).query.lower()).get("recursive", [""])[0] in ("true", "1")
            start = len(path) + 1 if path else 0
            inside = [file for file in sorted(found[1]) if not path or file.startswith(f"{path}/")]
            files = [self.entry(file, found[1][file]) for file in inside if recursive or "/" not in file[start:]]
            folders = {file[:start] + file[start:].partition("/")[0] for file in inside if "/" in file[start:]}
            entries = [{"type": "directory", "oid": "0" * 40, "size": 0, "path": at} for at in sorted(folders)] + files
            if entries:
                self.answer(200, entries)
            else:
                self.error(404, "EntryNotFound", f"{path} does not exist on {rev}")

    def paths_info(self, name: str, rev: str) -> None:
        if found := self.find(name, rev):
            form = self.body.decode()
            wanted = json.loads(form)["paths"] if form.startswith("{") else parse_qs(form).get("paths", [])
            self.answer(200, [self.entry(path, found[1][path]) for path in wanted if path in found[1]])

    def resolve(self, name: str, rev: str, path: str) -> None:
        if not (found := self.find(name, rev, content=True)):
            return
        sha, files = found
        if path not in files:
            self.error(404, "EntryNotFound", "Entry not found", X_Repo_Commit=sha)
        elif path.endswith(LARGE):
            oid = hashlib.sha256(files[path]).hexdigest()
            linked = {"X_Linked_Etag": f'"{oid}"', "X_Linked_Size": str(len(files[path]))}
            self.answer(302, X_Repo_Commit=sha, Location=f"{self.hub.storage}/blobs/{oid}", **linked)
        else:
            self.send_content(files[path], X_Repo_Commit=sha)

    def send_content(self, content: bytes, **headers: str) -> None:
        headers |= {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "Accept_Ranges": "bytes"}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            self.answer(206, content[first : last + 1], **headers)
        else:
            self.answer(200, content, **headers)

    def blob(self, oid: str) -> None:
        if self.command == "PUT":
            self.hub.blobs[oid] = self.body
            self.answer(200)
        else:
            self.send_content(self.hub.blobs[oid])

    def may_write(self, name: str) -> bool:
        if self.token() != TOKEN:
            self.answer(401, {"error": "Invalid username or password."})
        elif name.split("/")[1] not in self.hub.writable:
            message = f"You don't have the rights to write under the namespace {name.split('/')[1]}"
            self.answer(403, {"error": message}, X_Error_Message=message)
        else:
            return True
        return False

    def create(self) -> None:
        given = json.loads(self.body)
        name = f"{given.get('type') or 'model'}s/{given.get('organization') or 'me'}/{given['name']}"
        if self.may_write(name):
            url = {"url": f"{self.hub.url}/{name.removeprefix('models/')}"}
            if name in self.hub.repos:
                self.answer(409, url | {"error": "You already created this repo"})
            else:
                self.hub.commit(name, {".gitattributes": b""})
                self.hub.repos[name].private = given.get("visibility") == "private"
                self.answer(200, url)

    def preupload(self, name: str, rev: str) -> None:
        if self.may_write(name):
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [{"uploadMode": "lfs" if path.endswith(LARGE) else "regular"} for path in paths]
            files = [{"path": path, "shouldIgnore": False, **mode} for path, mode in zip(paths, modes, strict=True)]
            self.answer(200, {"files": files})

    def validate_card(self) -> None:
        self.answer(200, {"errors": [], "warnings": []})

    def lfs_batch(self, name: str) -> None:
        if self.may_write(name):
            objects = json.loads(self.body)["objects"]
            for item in objects:
                item["actions"] = {"upload": {"href": f"{self.hub.storage}/blobs/{item['oid']}"}}
            self.answer(200, {"transfer": "basic", "objects": objects})

    def add_commit(self, name: str, rev: str) -> None:
        if not self.may_write(name):
            return
        repo = self.hub.repos[name]
        files = dict(repo.commits[repo.refs[rev]])
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
        sha = self.hub.commit(name, files, ref=rev)
        self.answer(
            200,
            {
                "commitUrl": f"{self.hub.url}/{name.removeprefix('models/')}/commit/{sha}",
                "commitOid": sha,
                "success": True,
            },
        )

    API = r"/api/(?P<kind>models|datasets)/(?P<id>[^/]+/[^/]+)"
    ROUTES = (
        (API + r"(/revision/(?P<rev>[^/]+))?", info),
        (API + r"/tree/(?P<rev>[^/]+)(/(?P<path>.+))?", tree),
        (API + r"/paths-info/(?P<rev>[^/]+)", paths_info),
        (API + r"/preupload/(?P<rev>[^/]+)", preupload),
        (API + r"/commit/(?P<rev>[^/]+)", add_commit),
        (r"/api/repos/create", create),
        (r"/api/validate-yaml", validate_card),
        (r"/blobs/(?P<oid>\w+)", blob),
        (r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)\.git/info/lfs/objects/batch", lfs_batch),
        (r"/(?P<kind>datasets/)?(?P<id>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)", resolve),
    )
