"""A hub on this machine: serves a folder as the dataset or model `lab/arm`, and counts requests."""

import contextlib
import hashlib
import http.server
import json
import threading
from dataclasses import dataclass, field

from huggingface_hub import constants

COMMIT = "0123456789abcdef0123456789abcdef01234567"
PAGES = {401: "RepoNotFound", 403: "GatedRepo", 404: "RepoNotFound"}


@dataclass
class Hub:
    """The folder that is served, and the requests so far."""

    root: object
    address: str = ""
    status: int = 200
    """The status of every response, unless 200."""
    asked: list = field(default_factory=list)

    def got(self):
        """Files that were downloaded."""
        return sorted(path for verb, path in self.asked if verb == "GET" and not path.startswith("/api/"))


def _handler(hub):
    class Handler(http.server.BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_):
            pass

        def answer(self, status, body=b"", **headers):
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self):
            path = self.path.partition("?")[0]
            if path == "/":
                return self.answer(200)
            name = path.partition("/resolve/")[2].partition("/")[2] or path
            hub.asked.append((self.command, name))
            if hub.status != 200:
                return self.answer(hub.status, X_Error_Code=PAGES.get(hub.status, ""))
            if "/tree/" in path:
                under = path.partition("/tree/")[2].partition("/")[2]
                files = [p for p in (hub.root / under).rglob("*") if p.is_file()]
                tree = [
                    {"type": "file", "path": p.relative_to(hub.root).as_posix(), "size": p.stat().st_size, "oid": "0"}
                    for p in files
                ]
                return self.answer(200, json.dumps(tree).encode(), Content_Type="application/json")
            if "/resolve/" in path and path.partition("/resolve/")[2].split("/")[0] not in ("main", "v2", COMMIT):
                return self.answer(404, X_Error_Code="RevisionNotFound", X_Repo_Commit=COMMIT)
            file = hub.root / name
            if not file.is_file():
                return self.answer(404, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            body = file.read_bytes()
            return self.answer(200, body, ETag=f'"{hashlib.sha1(body).hexdigest()}"', X_Repo_Commit=COMMIT)

        do_HEAD = do_GET  # noqa: N815

    return Handler


@contextlib.contextmanager
def serve(root):
    """Serve a folder; yields the `Hub`."""
    hub = Hub(root)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def point_to(monkeypatch, address):
    """Have huggingface_hub ask the server at this address."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr("huggingface_hub.hf_api.constants.ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", address)
