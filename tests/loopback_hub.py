"""A small Hugging Face Hub on 127.0.0.1, so that tests push and load over real HTTP with the real client.

It keeps repositories, full snapshots of every commit, branches, tags and LFS objects, and answers with the status
codes and `X-Error-*` headers from which `huggingface_hub` makes its exceptions. What it cannot answer is a 501 and is
noted in `unknown_requests`. It has no Xet storage, pull requests, organisations, gating, `.gitignore` rules, pages of
long listings, or CDN: files come from the Hub's own address. Only the standard library, and PyYAML for model cards.
"""

import base64
import contextlib
import hashlib
import json
import os
import re
import secrets
import socket
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


CHUNK = 1 << 20
LFS_SIZE = 10 * 2**20  # larger files are LFS objects whatever they hold
LFS_SUFFIXES = (
    "arrow bin bz2 ckpt gz h5 jpeg jpg msgpack npy npz onnx parquet pkl png pt pth safetensors tar zip".split()
)
GITATTRIBUTES = "".join(f"*.{suffix} filter=lfs diff=lfs merge=lfs -text\n" for suffix in LFS_SUFFIXES)
FRONT_MATTER = re.compile(r"\s*---(?:\r\n|\r|\n)(.*?)(?:\r\n|\r|\n)---[ \t]*(?:\r\n|\n|$)", re.DOTALL)
# As the Hub lists them when it refuses one: https://github.com/huggingface/huggingface_hub/issues/4218
LICENSES = """
apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0 bigcode-openrail-m
afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0 cc-by-2.0 cc-by-2.5
cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nd-4.0 cc-by-nc-nd-3.0
cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0 cdla-permissive-1.0
cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl gpl gpl-2.0 gpl-3.0 lgpl
lgpl-2.1 lgpl-3.0 isc h-research intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by odbl openmdw-1.0
openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown other
""".split()

KINDS = "models|datasets|spaces"
API = rf"/api/(?P<kind>{KINDS})/(?P<repo>[^/]+/[^/]+)"
PAGE = r"/(?:(?P<kind>datasets|spaces)/)?(?P<repo>[^/]+/[^/]+)"
ROUTES: list[tuple[list[str], re.Pattern, Callable, bool]] = []


class Refusal(Exception):
    """An answer other than success; `code` decides which exception the client raises."""

    def __init__(self, status: int, message: str, code: str | None = None, headers: dict | None = None, **body):
        super().__init__(message)
        self.status, self.body = status, {"error": message, **body}
        line = " ".join(message.split()).encode("ascii", "replace").decode()
        self.headers = {"X-Error-Message": line, **({"X-Error-Code": code} if code else {}), **(headers or {})}


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def check_model_index(index: list) -> list[str]:
    """What the Hub has against the scores of a model card: https://github.com/huggingface/hub-docs, modelcard.md."""
    errors = []

    def check(path: str, values: dict, required: list[str], optional: list[str] = ()) -> None:
        for key in (*required, *optional):
            if key in required and values.get(key) in (None, ""):
                errors.append(f'"{path}.{key}" is required')
            elif key != "value" and not isinstance(values.get(key, ""), str):
                errors.append(f'"{path}.{key}" must be a string')

    for i, model in enumerate(index):
        check(f"model-index[{i}]", model, ["name"])
        for j, result in enumerate(model.get("results", [])):
            path = f"model-index[{i}].results[{j}]"
            check(f"{path}.task", result.get("task", {}), ["type"], ["name"])
            dataset = result.get("dataset", {})
            check(f"{path}.dataset", dataset, ["type", "name"], ["config", "split", "revision"])
            if not re.fullmatch(r"([\w-]+/)?[\w.-]+", str(dataset.get("type", ""))):
                errors.append(f'"{path}.dataset.type" with value "{dataset.get("type")}" fails to match the pattern')
            if not result.get("metrics"):
                errors.append(f'"{path}.metrics" is required')
            for k, metric in enumerate(result.get("metrics", [])):
                check(f"{path}.metrics[{k}]", metric, ["type", "value"], ["name", "config"])
    return errors


def read_card(text: str) -> tuple[dict, list[str], list[str]]:
    """The metadata of a README with the errors and warnings the Hub has for it, as far as they are known here."""
    match = FRONT_MATTER.match(text)
    if not match:
        return {}, [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(match[1])
    except yaml.YAMLError as error:
        return {}, [f"the metadata is not YAML: {error}"], []
    if not isinstance(data, dict):
        return {}, ["the metadata must be a mapping of keys to values"], []
    errors = []
    for key in ("tags", "metrics", "model-index", "widget", "configs", "task_categories", "size_categories"):
        if not isinstance(data.get(key, []), list):
            errors.append(f'"{key}" must be an array')
    repo_id = r"[\w.-]+(/[\w.-]+)?"
    rules = {"language": "[a-z]{2,3}|code|multilingual", "datasets": repo_id, "base_model": repo_id, "tags": ".+"}
    rules["license"] = "|".join(map(re.escape, LICENSES))
    for key, rule in rules.items():
        values = data.get(key, [])
        for value in values if isinstance(values, list) else [values]:
            if not isinstance(value, str) or not re.fullmatch(rule, value):
                errors.append(f'"{key}" with value "{value}" is not valid')
                if key == "license":
                    errors[-1] = f'"license" must be one of [{", ".join(LICENSES)}, array], got "{value}"'
    if isinstance(index := data.get("model-index", []), list):
        errors += check_model_index(index)
    return data, errors, []


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    return size > LFS_SIZE or b"\0" in sample or path.rsplit(".", 1)[-1] in LFS_SUFFIXES


@dataclass(frozen=True)
class Blob:
    """A stored content. `key` names its file in the store: SHA-256 for an LFS object, git SHA-1 for anything else."""

    key: str
    size: int
    lfs: bool = False

    @property
    def pointer(self) -> bytes:
        """What git itself holds of an LFS object."""
        return f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.key}\nsize {self.size}\n".encode()

    @property
    def oid(self) -> str:
        return git_sha1(self.pointer) if self.lfs else self.key

    def lfs_info(self, name: str) -> dict:
        return {"lfs": {name: self.key, "size": self.size, "pointerSize": len(self.pointer)}} if self.lfs else {}


@dataclass(frozen=True)
class Commit:
    """A snapshot: `files` is the whole tree, not the difference to the parent."""

    sha: str
    parent: str | None
    title: str
    message: str
    date: str
    files: dict[str, Blob]

    def below(self, path: str) -> dict[str, Blob]:
        """The file of this path, or the files in the folder of this path."""
        return {name: blob for name, blob in self.files.items() if not path or f"{name}/".startswith(f"{path}/")}


@dataclass
class Repo:
    kind: str
    id: str
    private: bool
    created: str = field(default_factory=now)
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)
    objects: dict[str, int] = field(default_factory=dict)  # uploaded LFS objects and their sizes, committed or not

    @property
    def page(self) -> str:
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    def resolve(self, revision: str) -> Commit:
        """The commit of a branch, a tag or a commit id, of which seven digits are enough."""
        sha = {**self.tags, **self.branches}.get(revision, revision)
        found = [commit for commit in self.commits.values() if len(sha) >= 7 and commit.sha.startswith(sha)]
        if not found:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    def history(self, revision: str = "main") -> list[Commit]:
        """Newest first."""
        commits = [self.resolve(revision)]
        while commits[-1].parent:
            commits.append(self.commits[commits[-1].parent])
        return commits

    def commit(self, branch: str, files: dict[str, Blob], title: str, message: str = "") -> Commit:
        parent = self.branches.get(branch)
        content = [self.page, parent, title, sorted((path, blob.key) for path, blob in files.items())]
        sha = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.commits[sha] = Commit(sha, parent, title, message, now(), files)
        self.branches[branch] = sha
        return self.commits[sha]

    def entry(self, commit: Commit, path: str, expand: bool = False) -> dict | None:
        """What the tree listing says of a file or folder, None where there is neither."""
        blob = commit.files.get(path)
        below = {path: blob} if blob else commit.below(path)
        if not below:
            return None
        if blob:
            entry = {"type": "file", "oid": blob.oid, "size": blob.size, "path": path, **blob.lfs_info("oid")}
        else:
            oid = hashlib.sha1(repr(sorted(below.items())).encode()).hexdigest()
            entry = {"type": "directory", "oid": oid, "size": 0, "path": path}
        if expand:
            while commit.parent and self.commits[commit.parent].below(path) == below:
                commit = self.commits[commit.parent]
            entry["lastCommit"] = {"id": commit.sha, "title": commit.title, "date": commit.date}
        return entry


class LoopbackHub:
    """The server, a context manager.

    Args:
        tokens: Token to role, `"write"` or `"read"`. All belong to `user`; any other token is refused.
        user: The only namespace in which the tokens may write, and whose private repositories they may read.

    Attributes:
        url: The value for `HF_ENDPOINT`.
        requests: Method, path as sent but without query, and status of each answer; 0 for a dropped connection.
        unknown_requests: The requests answered with 501 or, after a mistake in this file, 500. Should stay empty.
        repos: `Repo` by kind (`"models"`, `"datasets"`, `"spaces"`) and id.
    """

    def __init__(self, tokens: dict[str, str] | None = None, user: str = "tester"):
        self.tokens = {"hf_write": "write", "hf_read": "read"} if tokens is None else tokens
        self.user = user
        self.requests: list[tuple[str, str, int]] = []
        self.unknown_requests: list[tuple[str, str]] = []
        self.repos: dict[tuple[str, str], Repo] = {}
        self.lock = threading.RLock()
        self.signature = secrets.token_hex(8)  # uploads carry no token, as with signed storage URLs
        self.connections: set[socket.socket] = set()
        self._drops = {"uploads_until": 0, "times": 0, "oid": None}

    def __enter__(self) -> "LoopbackHub":
        self._folder = tempfile.TemporaryDirectory(prefix="loopback-hub-")
        self.folder = Path(self._folder.name)
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.hub = self
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self._server.shutdown()
        self._server.server_close()
        for connection in list(self.connections):  # clients keep theirs open
            with contextlib.suppress(OSError):  # the other side was faster
                connection.shutdown(socket.SHUT_RDWR)
        self._folder.cleanup()

    def environment(self, hf_home: str | os.PathLike, token: str | None = None) -> dict[str, str]:
        """Variables for a subprocess that is to know this Hub only, with its own caches."""
        foreign = re.compile("(HF|HUGGING_?FACE|TRANSFORMERS|DATASETS)_.*|.*_PROXY", re.IGNORECASE)
        kept = {name: value for name, value in os.environ.items() if not foreign.fullmatch(name)}
        own = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(hf_home),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",  # also stops the library asking for /api/agent-harnesses, not `hf`
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets asks amazonaws.com otherwise
        }
        return {**kept, **own, **({"HF_TOKEN": token} if token else {})}

    def file(self, kind: str, repo_id: str, path: str, revision: str = "main") -> bytes:
        return (self.folder / self.repos[kind, repo_id].resolve(revision).files[path].key).read_bytes()

    def files(self, kind: str, repo_id: str, revision: str = "main") -> list[str]:
        return sorted(self.repos[kind, repo_id].resolve(revision).files)

    def commits(self, kind: str, repo_id: str, revision: str = "main") -> list[Commit]:
        """Newest first; the last one is the Hub's own "initial commit" with `.gitattributes`."""
        return self.repos[kind, repo_id].history(revision)

    def uploads(self) -> list[tuple[str, int]]:
        """SHA-256 and status of each LFS upload."""
        return [(path[-64:], status) for method, path, status in self.requests if method == "PUT"]

    def create(self, kind: str, repo_id: str, files: dict[str, bytes] | None = None, private: bool = False) -> Repo:
        """Make a repository from within, in any namespace."""
        repo = self.repos[kind, repo_id] = Repo(kind, repo_id, private)
        attributes = {".gitattributes": self.store(GITATTRIBUTES.encode())}
        repo.commit("main", attributes, "initial commit")
        if files:
            lfs = {path: is_lfs(path, len(content), content[:512]) for path, content in files.items()}
            blobs = {path: self.store(content, lfs[path]) for path, content in files.items()}
            repo.objects.update({blob.key: blob.size for blob in blobs.values() if blob.lfs})
            repo.commit("main", {**attributes, **blobs}, "Add files")
        return repo

    def store(self, content: bytes, lfs: bool = False) -> Blob:
        blob = Blob(hashlib.sha256(content).hexdigest() if lfs else git_sha1(content), len(content), lfs)
        if not (self.folder / blob.key).exists():  # it may be being read
            (self.folder / blob.key).write_bytes(content)
        return blob

    def drop_connection_on_lfs_upload(self, n: int, times: int = 1) -> None:
        """Cut the connection in the middle of the n-th LFS upload from now, counting from 1.

        The client tries an upload six times before it gives up, 1 + 2 + 4 + 8 + 8 seconds in all: with `times=1` the
        push succeeds, with `times=6` it fails.
        """
        self._drops = {"uploads_until": n, "times": times, "oid": None}

    def is_dropped(self, oid: str) -> bool:
        with self.lock:
            drops = self._drops
            drops["uploads_until"] -= 1
            if drops["uploads_until"] == 0:
                drops["oid"] = oid
            if drops["oid"] != oid or not drops["times"]:
                return False
            drops["times"] -= 1
            return True


class _Server(ThreadingHTTPServer):
    request_queue_size = 64
    hub: LoopbackHub

    def handle_error(self, request, client_address):
        if not isinstance(sys.exc_info()[1], ConnectionError):  # clients leave whenever they like
            super().handle_error(request, client_address)


def route(methods: str, pattern: str, write: bool = False) -> Callable:
    """Let a method of the handler answer. Of the groups, `kind` and `repo` become a `Repo` the caller may see, or
    write to; the others are passed on."""

    def register(function: Callable) -> Callable:
        ROUTES.append((methods.split(), re.compile(pattern), function, write))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # else 40 ms between headers and body

    def setup(self):
        super().setup()
        self.hub = self.server.hub
        self.hub.connections.add(self.connection)

    def finish(self):
        self.hub.connections.discard(self.connection)
        super().finish()

    def log_message(self, *arguments):
        pass

    def answer(self):
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        self.incoming = self.read_body()
        self.status = None
        try:
            self.role = self.authenticate()
            for methods, pattern, function, write in ROUTES:
                match = pattern.fullmatch(url.path)
                if match and self.command in methods and "create_pr" not in self.query:
                    values = {name: unquote(value) for name, value in match.groupdict().items() if value}
                    if "repo" in values:
                        kind = values.pop("kind", "models")
                        values["repo"] = self.visible_repo(kind, values["repo"], write)
                    function(self, **values)
                    return
            self.hub.unknown_requests.append((self.command, self.path))
            raise Refusal(501, f"The loopback Hub does not know {self.command} {self.path}")
        except Refusal as refusal:
            self.send_json(refusal.body, refusal.status, refusal.headers)
        except ConnectionError:
            self.close_connection = True
            if self.status is None:
                self.record(0)
        except Exception:
            traceback.print_exc()
            self.hub.unknown_requests.append((self.command, self.path))
            self.close_connection = True
            if self.status is None:
                self.send_json({"error": traceback.format_exc()}, 500)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = do_PATCH = answer

    def record(self, status: int) -> None:
        self.status = status
        self.hub.requests.append((self.command, urlsplit(self.path).path, status))

    def read_body(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline() or b"0", 16):
                yield self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        left = int(self.headers.get("Content-Length", 0))
        while left:
            chunk = self.rfile.read(min(left, CHUNK))
            if not chunk:
                raise ConnectionError("the client left in the middle of a body")
            left -= len(chunk)
            yield chunk

    def body(self) -> bytes:
        return b"".join(self.incoming)

    def payload(self) -> dict:
        return json.loads(self.body() or b"{}")

    def send_head(self, status: int, size: int, headers: dict) -> None:
        for _ in self.incoming:  # what is left unread would be taken for the next request
            pass
        self.record(status)  # before the client can know
        self.send_response(status)
        for name, value in {"Content-Length": str(size), **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def send_json(self, content, status: int = 200, headers: dict | None = None) -> None:
        text = content if isinstance(content, str) else json.dumps(content, default=str)  # str: dates of YAML
        mime = "text/plain" if isinstance(content, str) else "application/json"
        body = text.encode()
        self.send_head(status, len(body), {"Content-Type": f"{mime}; charset=utf-8", **(headers or {})})
        if self.command != "HEAD":
            self.wfile.write(body)

    def authenticate(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise Refusal(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def check_rights(self, namespace: str, action: str, code: str | None = "RepoNotFound") -> None:
        if self.role is None:
            # The client takes any 401 of a repository for "RepoNotFound", but over https only: say it here.
            raise Refusal(401, "Invalid username or password.", code)
        if self.role != "write":
            raise Refusal(403, f"You don't have the rights to {action}: the token is for reading, use a write token")
        if namespace != self.hub.user:
            raise Refusal(403, f'You don\'t have the rights to {action} under the namespace "{namespace}"')

    def visible_repo(self, kind: str, repo_id: str, write: bool = False) -> Repo:
        repo = self.hub.repos.get((kind, repo_id))
        namespace = repo_id.split("/")[0]
        if repo is None or repo.private and (self.role is None or namespace != self.hub.user):
            if self.role is None:
                raise Refusal(401, "Invalid username or password.", "RepoNotFound")
            raise Refusal(404, "Repository not found", "RepoNotFound")
        if write:
            self.check_rights(namespace, f"write to {repo_id}")
        return repo

    # Accounts and repositories

    @route("GET", "/api/whoami-v2")
    def whoami(self):
        if self.role is None:
            raise Refusal(401, "Invalid username or password.")
        token = {"displayName": "loopback", "role": self.role}
        auth = {"type": "access_token", "accessToken": token}
        self.send_json({"type": "user", "id": "0", "name": self.hub.user, "fullname": "", "orgs": [], "auth": auth})

    @route("GET", "/api/agent-harnesses")
    def agent_harnesses(self):
        self.send_json({"standardEnvVars": [], "harnesses": {}})  # asked for by `hf`, to report what calls it

    def named_repo(self) -> tuple[str, str, dict]:
        body = self.payload()
        return f"{body.get('type') or 'model'}s", f"{body.get('organization') or self.hub.user}/{body['name']}", body

    @route("POST", "/api/repos/create")
    def create_repo(self):
        kind, repo_id, body = self.named_repo()
        self.check_rights(repo_id.split("/")[0], f"create a {kind[:-1]}", code=None)
        private = bool(body.get("private")) or body.get("visibility") == "private"
        with self.hub.lock:
            existing = self.hub.repos.get((kind, repo_id))
            repo = existing or self.hub.create(kind, repo_id, private=private)
        url = f"{self.hub.url}/{repo.page}"
        if existing:
            raise Refusal(409, f"You already created this {kind[:-1]} repo: {repo_id}", url=url)
        self.send_json({"url": url, "name": repo_id, "id": repo_id, "private": private})

    @route("DELETE", "/api/repos/delete")
    def delete_repo(self):
        kind, repo_id, _ = self.named_repo()
        self.visible_repo(kind, repo_id, write=True)
        del self.hub.repos[kind, repo_id]
        self.send_json({})

    @route("GET", API + "(?:/revision/(?P<rev>[^/]+))?")
    def info(self, repo: Repo, rev: str = "main"):
        commit = repo.resolve(rev)
        card = {}
        if "README.md" in commit.files:
            card = read_card(self.hub.file(repo.kind, repo.id, "README.md", commit.sha).decode())[0]
        named = {"license": card.get("license"), "dataset": card.get("datasets"), "language": card.get("language")}
        tags = [card.get("library_name"), card.get("pipeline_tag"), *(card.get("tags") or [])]
        for name, values in named.items():
            tags += [f"{name}:{value}" for value in (values if isinstance(values, list) else [values]) if value]
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        if "blobs" in self.query:
            for sibling in siblings:
                blob = commit.files[sibling["rfilename"]]
                sibling.update(size=blob.size, blobId=blob.oid, **blob.lfs_info("sha256"))
        info = {"id": repo.id, "author": repo.id.split("/")[0], "sha": commit.sha, "lastModified": commit.date}
        info.update(createdAt=repo.created, private=repo.private, gated=False, disabled=False, downloads=0, likes=0)
        info.update(tags=[tag for tag in tags if tag], cardData=card, siblings=siblings)
        info.update({key: card[key] for key in ("library_name", "pipeline_tag", "model-index") if key in card})
        self.send_json(info)

    @route("GET", API + "/auth-check(?P<write>/write)?")
    def auth_check(self, repo: Repo, write: str = ""):
        if write:
            self.check_rights(repo.id.split("/")[0], f"write to {repo.id}")
        self.send_json({})

    # Revisions

    @route("GET", API + "/refs")
    def refs(self, repo: Repo):
        def listed(refs: dict[str, str], folder: str) -> list[dict]:
            return [{"name": name, "ref": f"refs/{folder}/{name}", "targetCommit": sha} for name, sha in refs.items()]

        branches, tags = listed(repo.branches, "heads"), listed(repo.tags, "tags")
        self.send_json({"branches": branches, "tags": tags, "converts": [], "pullRequests": []})

    @route("GET", API + "/commits/(?P<rev>[^/]+)")
    def list_commits(self, repo: Repo, rev: str):
        authors = [{"user": repo.id.split("/")[0]}]
        commits = [{"id": c.sha, "title": c.title, "message": c.message, "date": c.date} for c in repo.history(rev)]
        self.send_json([{**commit, "authors": authors} for commit in commits])

    @route("POST DELETE", API + "/(?P<sort>branch|tag)/(?P<name>[^/]+)", write=True)
    def change_refs(self, repo: Repo, sort: str, name: str):
        refs, body = (repo.branches if sort == "branch" else repo.tags), self.payload()
        if self.command == "DELETE":
            if name not in refs:
                raise Refusal(404, f"No {sort} {name}", "RevisionNotFound")
            del refs[name]
        else:
            # The path holds the new branch's name, but the revision to tag.
            start = body.get("startingPoint", "main") if sort == "branch" else name
            name = name if sort == "branch" else body["tag"]
            if name in refs:
                raise Refusal(409, f"Reference already exists: the {sort} {name}")
            refs[name] = repo.resolve(start).sha
        self.send_json({})

    # Reading

    @route("GET", API + "/tree/(?P<rev>[^/]+)(?:/(?P<path>.+))?")
    def tree(self, repo: Repo, rev: str, path: str = ""):
        commit = repo.resolve(rev)
        path = path.strip("/")
        found = commit.below(path)
        if path and not found:
            raise Refusal(404, f"{path} does not exist on {rev}", "EntryNotFound")
        recursive, expand = (self.query.get(name, ["false"])[0].lower() == "true" for name in ("recursive", "expand"))
        names = {path: None} if path in commit.files else {}
        for file in sorted(found) if not names else ():
            parts = Path(file).relative_to(path).parts
            for depth in range(1, len(parts) + 1 if recursive else 2):
                names["/".join([*([path] if path else []), *parts[:depth]])] = None
        self.send_json([repo.entry(commit, name, expand) for name in names])

    @route("POST", API + "/paths-info/(?P<rev>[^/]+)")
    def paths_info(self, repo: Repo, rev: str):
        commit = repo.resolve(rev)
        form = parse_qs(self.body().decode())
        expand = form.get("expand") == ["true"]
        entries = [repo.entry(commit, path.strip("/"), expand) for path in form.get("paths", [])]
        self.send_json([entry for entry in entries if entry])

    @route("GET HEAD", PAGE + "/resolve/(?P<rev>[^/]+)/(?P<path>.+)")
    def resolve(self, repo: Repo, rev: str, path: str):
        commit = repo.resolve(rev)
        headers = {"X-Repo-Commit": commit.sha}  # with a missing file too: the client remembers that it is missing
        if path not in commit.files:
            raise Refusal(404, "Entry not found", "EntryNotFound", headers)
        blob = commit.files[path]
        headers.update({"ETag": f'"{blob.key}"', "Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"})
        if blob.lfs:
            headers.update({"X-Linked-ETag": f'"{blob.key}"', "X-Linked-Size": str(blob.size)})
        status, start, end = 200, 0, blob.size
        span = re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if span and any(span.groups()):
            status, first, last = 206, *span.groups()
            start = int(first) if first else max(0, blob.size - int(last))
            end = min(blob.size, int(last) + 1) if first and last else blob.size
            if start >= end:
                raise Refusal(416, "Range not satisfiable", headers={"Content-Range": f"bytes */{blob.size}"})
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{blob.size}"
        with open(self.hub.folder / blob.key, "rb") as file:
            self.send_head(status, end - start, headers)
            file.seek(start)
            while self.command == "GET" and start < end:
                start += self.wfile.write(file.read(min(CHUNK, end - start)))

    # Writing

    @route("POST", "/api/validate-yaml")
    def validate_yaml(self):
        _, errors, warnings = read_card(self.payload()["content"])
        status = 400 if errors else 200
        if self.headers.get("Accept") == "text/plain":  # of `ModelCard.validate`, which shows the answer as it is
            lines = [f"- Error: {error}" for error in errors] + [f"- Warning: {warning}" for warning in warnings]
            self.send_json("\n".join(lines), status)
        else:
            notes = {"errors": errors, "warnings": warnings}
            self.send_json({key: [{"message": note} for note in notes[key]] for key in notes}, status)

    @route("POST", API + "/preupload/(?P<rev>[^/]+)", write=True)
    def preupload(self, repo: Repo, rev: str):
        commit, answers = repo.resolve(rev), []
        for file in self.payload()["files"]:
            lfs = is_lfs(file["path"], file["size"], base64.b64decode(file["sample"]))
            answer = {"path": file["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if file["path"] in commit.files:  # the client leaves out files that have not changed
                answer["oid"] = commit.files[file["path"]].key
            answers.append(answer)
        self.send_json({"files": answers})

    @route("POST", PAGE + r"\.git/info/lfs/objects/batch", write=True)
    def lfs_batch(self, repo: Repo):
        objects = []
        for item in self.payload()["objects"]:
            actions = {}
            if item["oid"] not in repo.objects:
                upload = f"{self.hub.url}/upload/{repo.kind}/{repo.id}/{item['oid']}?signature={self.hub.signature}"
                actions = {"actions": {"upload": {"href": upload}}}
            objects.append({"oid": item["oid"], "size": item["size"], **actions})
        self.send_json({"transfer": "basic", "objects": objects})

    @route("PUT", rf"/upload/(?P<place>(?:{KINDS})/[^/]+/[^/]+)/(?P<oid>[0-9a-f]{{64}})")
    def lfs_upload(self, place: str, oid: str):
        repo = self.hub.repos.get(tuple(place.split("/", 1)))
        if repo is None or self.query.get("signature") != [self.hub.signature]:
            raise Refusal(403, "The upload URL is not signed by this Hub")
        if self.hub.is_dropped(oid):
            self.rfile.read(int(self.headers.get("Content-Length", 0)) // 2)
            raise ConnectionAbortedError("dropped on purpose")  # with the other half unread, a reset
        digest, size = hashlib.sha256(), 0
        part = self.hub.folder / f"{oid}.{secrets.token_hex(4)}.part"
        try:
            with open(part, "wb") as file:
                for chunk in self.incoming:
                    size += file.write(chunk)
                    digest.update(chunk)
            if digest.hexdigest() != oid:
                raise Refusal(422, f"The SHA-256 of the content is {digest.hexdigest()}, not {oid}; upload it again")
            part.replace(self.hub.folder / oid)
            repo.objects[oid] = size
        finally:
            part.unlink(missing_ok=True)
        self.send_json({})

    @route("POST", API + "/commit/(?P<rev>[^/]+)", write=True)
    def commit(self, repo: Repo, rev: str):
        header, *operations = (json.loads(line) for line in self.body().splitlines())
        with self.hub.lock:
            if rev not in repo.branches:
                raise Refusal(404, f"Invalid rev id: {rev}", "RevisionNotFound")
            parent = header["value"].get("parentCommit")
            if parent and not repo.branches[rev].startswith(parent):
                raise Refusal(412, "A commit has happened since. Please refresh and try again.")
            files = dict(repo.resolve(rev).files)
            for operation in operations:
                self.apply(repo, files, operation["key"], operation["value"])
            commit = repo.commit(rev, files, header["value"]["summary"], header["value"].get("description", ""))
        url = f"{self.hub.url}/{repo.page}/commit/{commit.sha}"
        self.send_json({"success": True, "commitOid": commit.sha, "commitUrl": url, "hookOutput": ""})

    def apply(self, repo: Repo, files: dict[str, Blob], key: str, value: dict) -> None:
        path = value["path"].strip("/")
        if not path or ".." in path.split("/"):
            raise Refusal(400, f"Invalid path: {value['path']}")
        if key == "file":
            content = base64.b64decode(value["content"])
            errors = read_card(content.decode())[1] if path == "README.md" else []
            if errors:
                raise Refusal(400, "Invalid metadata in README.md: " + "; ".join(errors))
            files[path] = self.hub.store(content)
        elif key == "lfsFile":
            if value["oid"] not in repo.objects:
                raise Refusal(400, f"The LFS object {value['oid']} of {path} was not uploaded; do so first")
            files[path] = Blob(value["oid"], repo.objects[value["oid"]], lfs=True)
        elif key in ("deletedFile", "deletedFolder"):
            gone = [name for name in files if name == path or name.startswith(f"{path}/")]
            if not gone or (key == "deletedFile") != (path in files):
                raise Refusal(404, f"A file with this name doesn't exist: {value['path']}", "EntryNotFound")
            for name in gone:
                del files[name]
        else:
            raise Refusal(400, f"Unknown operation `{key}`")
