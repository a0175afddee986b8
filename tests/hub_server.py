"""A small Hub on this machine: as much of the protocol as the clients call to make, fill and read repositories."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml


USER = "tester"
TOKEN = "hf_only_for_this_server"
LARGE_FILES = (".safetensors", ".bin", ".pth", ".pt")


class Repository:
    """A list of commits, each with all its files: path to content."""

    def __init__(self):
        self.commits: list[dict[str, bytes]] = [{}]
        self.messages: list[str] = ["initial commit"]

    @property
    def files(self) -> dict[str, bytes]:
        return self.commits[-1]

    def name_of(self, index: int) -> str:
        return hashlib.sha1(f"{id(self)} {index}".encode()).hexdigest()

    def find(self, revision: str) -> int | None:
        names = [self.name_of(index) for index in range(len(self.commits))]
        if revision in ("main", "HEAD"):
            return len(names) - 1
        return names.index(revision) if revision in names else None


class LocalHub(ThreadingHTTPServer):
    """
    The server, on a free port of the loopback interface. `repositories` holds what was pushed, `unknown` the requests
    that it could not answer.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.unknown: list[str] = []
        self.endpoint = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.shutdown()
        self.server_close()


class Handler(BaseHTTPRequestHandler):
    """One request."""

    protocol_version = "HTTP/1.1"
    server: LocalHub

    ROUTES = {
        "GET": [
            (r"/api/whoami-v2", "whoami"),
            (r"/api/agent-harnesses", "harnesses"),
            (r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
            (r"/api/models/([^/]+/[^/]+)/refs", "refs"),
            (r"/api/models/([^/]+/[^/]+)/tree/([^/]+)(?:/(.+))?", "tree"),
            (r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
        ],
        "POST": [
            (r"/api/repos/create", "create"),
            (r"/api/validate-yaml", "validate"),
            (r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
            (r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
            (r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
            (r"/large-files/verify", "verify"),
        ],
        "PUT": [(r"/large-files/([0-9a-f]{64})", "put")],
    }

    def log_message(self, *args):
        """Silence."""

    def answer(self, status: int, content=b"", **headers):
        """Sends a response; what is not bytes goes as JSON."""
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str, message: str = ""):
        self.answer(status, {"error": message or code}, X_Error_Code=code, X_Error_Message=message or code)

    def handle_request(self):
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = unquote(urlsplit(self.path).path)
        if self.command not in ("GET", "HEAD") and "large-files" not in path and not self.knows_the_user():
            return self.fail(401, "Unauthorized", "who are you?")
        for pattern, name in self.ROUTES["GET" if self.command == "HEAD" else self.command]:
            if match := re.fullmatch(pattern, path):
                return getattr(self, name)(*match.groups())
        self.server.unknown.append(f"{self.command} {path}")
        return self.fail(404, "NotFound")

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def knows_the_user(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repository(self, name: str) -> Repository | None:
        repository = self.server.repositories.get(name)
        if repository is None:
            self.fail(404, "RepoNotFound", f"no repository {name}")
        return repository

    def whoami(self):
        if not self.knows_the_user():
            return self.fail(401, "Unauthorized")
        return self.answer(200, {"type": "user", "name": USER, "fullname": USER, "orgs": [], "auth": {}})

    def harnesses(self):
        """What some clients ask to find out who runs them; they do without."""
        return self.fail(404, "NotFound")

    def create(self):
        wanted = json.loads(self.body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        status = 409 if name in self.server.repositories else 200
        self.server.repositories.setdefault(name, Repository())
        return self.answer(status, {"url": f"{self.server.endpoint}/{name}", "name": name, "id": name})

    def validate(self):
        """The metadata of a card, as the Hub looks at them, roughly."""
        errors = []
        text = json.loads(self.body)["content"]
        match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
        data = yaml.safe_load(match.group(1)) if match else {}
        for name in ("library_name", "pipeline_tag", "license"):
            if not isinstance(data.get(name, ""), str):
                errors.append(f"{name} must be a string")
        for name in ("language", "tags", "datasets", "metrics"):
            value = data.get(name, [])
            if not isinstance(value, list) or not all(isinstance(one, str) for one in value):
                errors.append(f"{name} must be a list of strings")
        for index in data.get("model-index", []):
            for result in index["results"]:
                for metric in result["metrics"]:
                    if not (result["task"]["type"] and result["dataset"]["type"] and metric["type"]):
                        errors.append("a result lacks a type")
                    if not isinstance(metric["value"], int | float | str):
                        errors.append("a metric must be a number or a text")
        return self.answer(400 if errors else 200, {"errors": [{"message": error} for error in errors], "warnings": []})

    def preupload(self, name, revision):
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LARGE_FILES) else "regular",
                "shouldIgnore": False,
                "oid": None,
            }
            for file in json.loads(self.body)["files"]
        ]
        return self.answer(200, {"files": files})

    def batch(self, name):
        objects = []
        for wanted in json.loads(self.body)["objects"]:
            actions = {
                "upload": {"href": f"{self.server.endpoint}/large-files/{wanted['oid']}", "header": {}},
                "verify": {"href": f"{self.server.endpoint}/large-files/verify", "header": {}},
            }
            present = wanted["oid"] in self.server.large_files
            objects.append({"oid": wanted["oid"], "size": wanted["size"]} | ({} if present else {"actions": actions}))
        return self.answer(200, {"transfer": "basic", "objects": objects})

    def put(self, oid):
        if hashlib.sha256(self.body).hexdigest() != oid:
            return self.fail(400, "BadContent")
        self.server.large_files[oid] = self.body
        return self.answer(200)

    def verify(self):
        wanted = json.loads(self.body)
        present = len(self.server.large_files.get(wanted["oid"], b"")) == wanted["size"]
        return self.answer(200 if present else 404)

    def commit(self, name, revision):
        repository = self.repository(name)
        if repository is None:
            return None
        files, message = dict(repository.files), ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
            elif operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            else:
                self.server.unknown.append(f"operation {operation['key']}")
        repository.commits.append(files)
        repository.messages.append(message)
        oid = repository.name_of(len(repository.commits) - 1)
        url = f"{self.server.endpoint}/{name}/commit/{oid}"
        return self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def at(self, name, revision):
        """The files and the name of a commit, or None after a failure was sent."""
        repository = self.repository(name)
        if repository is None:
            return None
        index = repository.find(revision)
        if index is None:
            return self.fail(404, "RevisionNotFound")
        return repository.commits[index], repository.name_of(index)

    def info(self, name, revision):
        if found := self.at(name, revision or "main"):
            files, sha = found
            siblings = [{"rfilename": path} for path in sorted(files)]
            about = {"id": name, "modelId": name, "sha": sha, "siblings": siblings, "tags": [], "private": False}
            self.answer(200, about)

    def refs(self, name):
        if found := self.at(name, "main"):
            branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": found[1]}
            self.answer(200, {"branches": [branch], "tags": [], "converts": [], "pullRequests": []})

    def tree(self, name, revision, folder):
        if found := self.at(name, revision):
            start = f"{folder}/" if folder else ""
            inside = [path for path in sorted(found[0]) if path.startswith(start)]
            if folder and not inside:
                return self.fail(404, "EntryNotFound")
            entries = [{"type": "file", "path": path, "size": len(found[0][path]), "oid": ""} for path in inside]
            return self.answer(200, entries)
        return None

    def resolve(self, name, revision, path):
        if found := self.at(name, revision):
            files, sha = found
            if path not in files:
                return self.fail(404, "EntryNotFound", f"no file {path}")
            etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
            return self.answer(200, files[path], ETag=etag, X_Repo_Commit=sha, Accept_Ranges="none")
        return None
