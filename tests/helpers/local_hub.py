"""A Hugging Face hub on this machine: the few answers that loading a model or dataset by id needs."""

import contextlib
import hashlib
import http.server
import json
import threading
import urllib.parse
from pathlib import Path

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class _Answers(http.server.BaseHTTPRequestHandler):
    """`/api/KIND/OWNER/NAME/...` describes a repository, `.../resolve/REVISION/PATH` is a file."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def send(self, status, body=b"", **headers):
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer(self):
        length = int(self.headers.get("Content-Length") or 0)
        sent = self.rfile.read(length).decode()
        path, _, query = self.path.partition("?")
        path = urllib.parse.unquote(path).strip("/")
        self.server.asked.append(f"{self.command} /{path}")
        described = path.startswith("api/")
        kind, _, rest = path.removeprefix("api/").partition("/")
        if kind not in ("models", "datasets"):
            kind, rest = "models", path
        owner, name, *rest = rest.split("/")
        folder = self.server.top / kind / owner / name
        if not folder.is_dir():
            return self.send(404, b"{}", X_Error_Code="RepoNotFound", X_Error_Message="not found")
        if described:
            recursive = "recursive=true" in query.lower()
            return self.describe(folder, f"{owner}/{name}", rest, recursive, sent)
        return self.file(folder.joinpath(*rest[2:]))

    def describe(self, folder, name, rest, recursive, sent):
        entries = [
            {
                "type": "file" if path.is_file() else "directory",
                "path": str(path.relative_to(folder)),
                "rfilename": str(path.relative_to(folder)),
                "size": path.stat().st_size,
                "oid": hashlib.sha1(str(path).encode()).hexdigest(),
            }
            for path in sorted(folder.rglob("*"))
        ]
        if rest[:1] == ["tree"]:
            top = Path(*rest[2:])
            if not (folder / top).is_dir():
                return self.send(404, b"{}", X_Error_Code="EntryNotFound", X_Error_Message="none")
            parents = [Path(entry["path"]).parents for entry in entries]
            answer = [
                entry
                for entry, above in zip(entries, parents)
                if above[0] == top or (recursive and top in above)
            ]
        elif rest[:1] == ["paths-info"]:
            wanted = urllib.parse.parse_qs(sent).get("paths") or json.loads(sent)["paths"]
            answer = [entry for entry in entries if entry["path"] in wanted]
        else:
            files = [entry for entry in entries if entry["type"] == "file"]
            answer = {"id": name, "sha": COMMIT, "siblings": files, "private": False, "tags": []}
        return self.send(200, json.dumps(answer).encode(), Content_Type="application/json")

    def file(self, path):
        if not path.is_file():
            return self.send(404, X_Error_Code="EntryNotFound", X_Error_Message="not found")
        body = path.read_bytes()
        etag = f'"{hashlib.sha1(body).hexdigest()}"'
        self.send(200, body, ETag=etag, X_Repo_Commit=COMMIT, Accept_Ranges="none")

    do_GET = do_HEAD = do_POST = answer


@contextlib.contextmanager
def serve(top):
    """Yield address and requests so far of a hub with top/{models,datasets}/owner/name."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Answers)
    server.top, server.asked = Path(top), []
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", server.asked
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
