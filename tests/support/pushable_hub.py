"""A hub on this machine that accepts uploads: what huggingface_hub asks for a push, and failures on request.

Endpoints and answers are those of the real hub as its client's source expects them; large files go through Git LFS.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field

TOKEN = "hf_" + "x" * 30


@dataclass
class Repo:
    private: bool
    branches: dict = field(default_factory=lambda: {"main": {}})
    commits: dict = field(default_factory=dict)
    """Commit -> name -> content."""

    def head(self, branch):
        text = json.dumps({k: hashlib.sha1(v).hexdigest() for k, v in self.branches[branch].items()})
        commit = hashlib.sha1(text.encode()).hexdigest()
        self.commits[commit] = dict(self.branches[branch])
        return commit


@dataclass
class Hub:
    address: str = ""
    repos: dict = field(default_factory=dict)
    stored: dict = field(default_factory=dict)
    """SHA-256 -> content of large files."""
    asked: list = field(default_factory=list)
    fail: dict = field(default_factory=dict)
    """Part of a path -> (status, message) that it answers."""
    sent: int = 0
    """Large files that were sent."""


def _handler(hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            body = body if isinstance(body, bytes) else json.dumps(body).encode()
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def refuse(self, status, message, code=""):
            self.answer(status, {"error": message}, X_Error_Message=message, **({"X_Error_Code": code} if code else {}))

        def handle_request(self):
            path = self.path.partition("?")[0]
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            hub.asked.append((self.command, path))
            for part, (status, message) in hub.fail.items():
                if part in path:
                    return self.refuse(status, message)
            known = self.headers.get("Authorization") == f"Bearer {TOKEN}"
            if path == "/api/whoami-v2":
                return self.answer(200, {"name": "lab", "type": "user"}) if known else self.refuse(401, "Invalid token")
            if path.startswith("/lfs/"):
                hub.stored[path.rpartition("/")[2]] = body
                hub.sent += 1
                return self.answer(200)
            if path == "/api/repos/create":
                return self.create(json.loads(body)) if known else self.refuse(401, "Invalid token")
            if path == "/api/validate-yaml":
                wrong = "license: nonsense" in json.loads(body)["content"]
                errors = [{"message": '"license" must be one of [...]'}] if wrong else []
                return self.answer(400 if wrong else 200, {"errors": errors, "warnings": []})
            name = next((name for name in hub.repos if f"/{name}" in path), "")
            if not name or (hub.repos[name].private and not known):
                return self.refuse(404 if known else 401, "Repository not found", "RepoNotFound")
            return self.of_repo(hub.repos[name], path.partition(f"/{name}")[2], body, known)

        do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = handle_request  # noqa: N815

        def create(self, wanted):
            owner = wanted.get("organization") or "lab"
            if owner not in ("lab", "team"):
                return self.refuse(403, f"You don't have the rights to create a model under the namespace {owner!r}")
            name = f"{owner}/{wanted['name']}"
            if name in hub.repos:
                return self.refuse(409, "You already created this model repo")
            hub.repos[name] = Repo(wanted.get("visibility") == "private" or bool(wanted.get("private")))
            hub.repos[name].branches["main"][".gitattributes"] = b"*.safetensors filter=lfs\n"
            return self.answer(200, {"url": f"{hub.address}/{name}", "name": name})

        def of_repo(self, repo, rest, body, known):
            parts = rest.strip("/").split("/")
            if self.command in ("GET", "HEAD") and parts[0] == "resolve":
                content = repo.commits.get(parts[1], {}).get("/".join(parts[2:]))
                if content is None:
                    return self.refuse(404, "Entry not found", "EntryNotFound")
                etag = f'"{hashlib.sha1(content).hexdigest()}"'
                return self.answer(200, content, ETag=etag, X_Repo_Commit=parts[1])
            if self.command == "GET":
                revision = parts[1] if parts[0] == "revision" else "main"
                return self.info(repo, revision)
            if not known:
                return self.refuse(401, "Invalid token")
            asked = json.loads(body.splitlines()[0]) if body else {}
            if parts[0] == "branch":
                repo.branches.setdefault(parts[1], dict(repo.branches["main"]))
                return self.answer(200, {})
            if parts[0] == "preupload":
                large = [one["path"].endswith(".safetensors") for one in asked["files"]]
                files = [
                    {"path": one["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False, "oid": None}
                    for one, lfs in zip(asked["files"], large, strict=True)
                ]
                return self.answer(200, {"files": files})
            if rest.endswith("/info/lfs/objects/batch"):
                return self.batch(asked)
            if parts[0] == "commit":
                return self.commit(repo, parts[1], [json.loads(line) for line in body.splitlines()])
            return self.refuse(404, f"no such endpoint: {rest}")

        def info(self, repo, revision):
            files = repo.commits.get(revision) or repo.branches.get(revision)
            if files is None:
                return self.refuse(404, "Invalid rev id", "RevisionNotFound")
            siblings = []
            for name, content in files.items():
                blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
                one = {"rfilename": name, "size": len(content), "blobId": blob}
                if name.endswith(".safetensors"):
                    digest = hashlib.sha256(content).hexdigest()
                    one["lfs"] = {"sha256": digest, "size": len(content), "pointerSize": 130}
                siblings.append(one)
            sha = revision if revision in repo.commits else repo.head(revision)
            return self.answer(200, {"id": "lab/arm", "sha": sha, "private": repo.private, "siblings": siblings})

        def batch(self, asked):
            objects = []
            for one in asked["objects"]:
                if one["oid"] not in hub.stored:
                    one = one | {"actions": {"upload": {"href": f"{hub.address}/lfs/{one['oid']}"}}}
                objects.append(one)
            return self.answer(200, {"transfer": "basic", "objects": objects})

        def commit(self, repo, branch, lines):
            files = dict(repo.branches[branch])
            header = next(one["value"] for one in lines if one["key"] == "header")
            if header.get("parentCommit") not in (None, repo.head(branch)):
                return self.refuse(412, "A commit has happened since. Please refresh and try again.")
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.stored[value["oid"]]
                elif line["key"] == "deletedFile":
                    files.pop(value["path"], None)
            repo.branches[branch] = files
            oid = repo.head(branch)
            url = f"{hub.address}/lab/arm/commit/{oid}"
            return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    return Handler


@contextlib.contextmanager
def serve():
    """Start it; yields the `Hub`."""
    hub = Hub()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
