"""A hub on the loopback: directories served in the protocol that huggingface_hub speaks.

    with Hub({"owner/name": directory}) as hub:
        ...  # HF_ENDPOINT=hub.url
        hub.requests  # [Request("HEAD", "owner/name", "main", "unet/config.json", None), ...]

It speaks what a download of single files needs: HEAD and GET of
/{owner}/{name}/resolve/{revision}/{file}, ranges, redirections to a signed address, and errors
told apart by X-Error-Code. And what a commit needs: /api/repos/create, /api/validate-yaml,
/api/models/.../preupload and /commit, git-lfs's batches and PUT of large files to /lfs/{sha256}.
What was committed lies in `hub.uploaded[repository][path]`.
"""

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
SIGNATURE = "c2lnbmVkLWJ5LXRoZS1odWI"
REPO_API = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit)/main")
FILE_URL = re.compile(r"/(cdn/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
STATUS = {
    "EntryNotFound": 404,
    "RevisionNotFound": 404,
    "RepoNotFound": 404,
    "GatedRepo": 403,
    "Invalid credentials in Authorization header": 401,
}


class Request(NamedTuple):
    method: str
    repo: str  # "cdn/owner/name" at the signed address
    revision: str
    file: str
    token: str | None


class Hub:
    """`revisions`: {branch or tag: commit}, the same for all repositories.

    `faults` {"owner/name" or "owner/name/file": what is wrong with it}:

        a key of STATUS, or a number: the error that is every answer
        "cut": GET breaks off half-way; "cut once": the first one does
        "short": GET has fewer bytes than HEAD said
        "signed": no fault; GET is sent on to a signed address, as it is for large files
        "expired": the signed address refuses

    and by the first words of a POST's or PUT's path ("/api/repos/create", "/lfs", ...) a number.
    Who uploads is "me" with `token`, if one is given.
    """

    def __init__(
        self,
        repos: Mapping[str, Path],
        *,
        revisions: Mapping[str, str] | None = None,
        faults: Mapping[str, str | int] | None = None,
        token: str | None = None,
    ):
        self.token, self.large = token, {}
        self.uploaded: dict[str, dict[str, bytes]] = {}
        self.repos, self.faults = dict(repos), dict(faults or {})
        self.revisions = dict(revisions or {"main": COMMIT})
        self.requests: list[Request] = []
        self.ranges: list[str] = []
        self.server = ThreadingHTTPServer(
            ("127.0.0.1", 0), type("Bound", (_Answer,), {"hub": self})
        )
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        self.thread = Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> "Hub":
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()

    def files(self, method: str, repo: str) -> list[str]:
        """The files of a repository that were asked for by `method`, in order."""
        return [r.file for r in self.requests if (r.method, r.repo) == (method, repo)]


class _Answer(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        self.answer()

    def do_POST(self) -> None:
        self.take()

    def do_PUT(self) -> None:
        self.take()

    def take(self) -> None:
        """A step of an upload."""
        path, hub = urlsplit(self.path).path, self.hub
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        token = self.headers.get("Authorization")
        hub.requests.append(Request(self.command, path, "", "", token))
        fault = next((n for words, n in hub.faults.items() if path.startswith(words)), None)
        if fault is not None:
            return self.head(fault)
        if path.startswith("/lfs/"):  # a signed address: nobody's token belongs there
            assert hashlib.sha256(body).hexdigest() == path[5:]
            hub.large[path[5:]] = body
            return self.head(200)
        if hub.token is not None and token != f"Bearer {hub.token}":
            return self.head(401)
        if path == "/api/validate-yaml":
            return self.tell({})
        if path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked['organization'] or 'me'}/{asked['name']}"
            there = repo in hub.uploaded
            hub.uploaded.setdefault(repo, {})
            return self.tell({"url": f"{hub.url}/{repo}"}, 409 if there else 200)
        if path.endswith(".git/info/lfs/objects/batch"):
            return self.tell({"objects": [
                {**one, "actions": {"upload": {"href": f"{hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]})  # fmt: skip
        repo, step = REPO_API.fullmatch(path).groups()
        if step == "preupload":
            return self.tell({"files": [
                {"path": file["path"], "shouldIgnore": False,
                 "uploadMode": "regular" if file["path"].endswith(".md") else "lfs"}
                for file in json.loads(body)["files"]
            ]})  # fmt: skip
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                hub.uploaded[repo][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                hub.uploaded[repo][value["path"]] = hub.large[value["oid"]]
        self.tell({"commitUrl": f"{hub.url}/{repo}/commit/{COMMIT}", "commitOid": COMMIT})

    def tell(self, answer: dict, status: int = 200) -> None:
        content = json.dumps(answer).encode()
        self.head(status, Content_Type="application/json", Content_Length=len(content))
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass

    def head(self, status: int, **headers: str | int) -> None:
        self.send_response(status)
        for name, value in ({"Content_Length": 0} | headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()

    def answer(self) -> None:
        address = urlsplit(self.path)
        url = FILE_URL.fullmatch(unquote(address.path))
        if url is None:
            return self.head(404)
        cdn, repo, revision, file = url.groups()
        token = self.headers.get("Authorization")
        self.hub.requests.append(Request(self.command, (cdn or "") + repo, revision, file, token))

        faults = self.hub.faults
        fault = faults.get(repo, faults.get(f"{repo}/{file}"))
        commit = self.hub.revisions.get(revision, revision)
        path = self.hub.repos.get(repo, Path()) / file
        if isinstance(fault, int):
            return self.head(fault)
        if repo not in self.hub.repos:
            fault = "RepoNotFound"
        elif commit not in self.hub.revisions.values():
            fault = "RevisionNotFound"
        elif not path.is_file():
            fault = "EntryNotFound"
        if fault in STATUS:
            known = {"X_Repo_Commit": commit} if fault == "EntryNotFound" else {}
            return self.head(STATUS[fault], X_Error_Code=fault, X_Error_Message=fault, **known)

        content = path.read_bytes()
        about = {"X_Repo_Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
        if fault in ("signed", "expired") and not cdn:
            to = f"http://localhost:{self.server.server_port}/cdn{address.path}?Sig={SIGNATURE}"
            linked = {"X_Linked_Size": len(content), "X_Linked_ETag": about["ETag"]}
            return self.head(302, Location=to, **linked, **about)
        if cdn and (fault == "expired" or parse_qs(address.query) != {"Sig": [SIGNATURE]}):
            return self.head(403)
        self.give(content, about, fault)

    def give(self, content: bytes, about: dict[str, str], fault: str | None) -> None:
        size, start, status = len(content), 0, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            self.hub.ranges.append(wanted[0])
            start, status = int(wanted[1]), 206
            about = about | {"Content_Range": f"bytes {start}-{size - 1}/{size}"}
        end = size // 2 if fault == "short" and self.command == "GET" else size
        self.head(status, Content_Length=end - start, Accept_Ranges="bytes", **about)
        if self.command == "HEAD":
            return
        if fault == "cut" or (fault == "cut once" and not wanted):
            end, self.close_connection = (start + end) // 2, True
        self.wfile.write(content[start:end])
