"""The loopback Hub against the real client, as other tests rely on it.

`HfApi` takes the endpoint as an argument and runs in this process; model cards and data sets read `HF_ENDPOINT` at
import and run in another.
"""

import hashlib
import json
import os
import urllib.error
import urllib.request

import forks
import huggingface_hub
import pytest
from huggingface_hub import CommitOperationAdd, HfApi, HfFileSystem, constants
from huggingface_hub.errors import (
    BadRequestError,
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from loopback_hub import LoopbackHub


pytestmark = pytest.mark.filterwarnings("ignore:Use 'content:DeprecationWarning")  # the client's own

REPO = "tester/m"
WEIGHTS = bytes(range(256)) * 8000  # 2 MB
FILES = {
    "README.md": b"---\nlicense: apache-2.0\nlibrary_name: transformers\ntags:\n- mri\n---\n# Model\n",
    "config.json": b'{"model_type": "sam2unet"}\n',
    "code/modeling x.py": "# räumlich\n".encode(),
    "code/deep/empty.txt": b"",
    "figures/mask.png": b"\x89PNG\r\n\x1a\n\0\0",
    "model.safetensors": WEIGHTS,
    "runs/events.0": b"\x18\0\0",
}
LFS = {"figures/mask.png", "model.safetensors", "runs/events.0"}


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub
    assert hub.unknown_requests == []


@pytest.fixture
def connect(hub, monkeypatch):
    """The client of this process with a token, online and for nothing but the loopback Hub."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    huggingface_hub.close_session()
    disable_progress_bars()
    yield lambda token: HfApi(endpoint=hub.url, token=token)
    enable_progress_bars()
    huggingface_hub.close_session()


@pytest.fixture
def api(connect):
    return connect("hf_write")


@pytest.fixture
def folder(tmp_path):
    return write(tmp_path / "folder", FILES)


@pytest.fixture
def pushed(hub, api, folder):
    api.create_repo(REPO)
    return api.upload_folder(repo_id=REPO, folder_path=folder, commit_message="First").oid


def write(folder, files):
    for path, content in files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_bytes(content)
    return folder


def run(hub, code, home, *arguments, token="hf_write"):
    """Run code in another process, where the Hub is the only one known; what it prints last is JSON."""
    environment = {**hub.environment(home, token), "OMP_NUM_THREADS": "1"}
    process = forks.run(["-c", code, *arguments], cwd=home, env=environment, timeout=100)
    assert process.returncode == 0, process.stderr
    return json.loads(process.stdout.splitlines()[-1])


def fetch(url, method="GET", data=None, **headers):
    """Status, headers and body of an answer, whatever the status."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(urllib.request.Request(url, data, headers, method=method)) as answer:
            return answer.status, answer.headers, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.headers, error.read()


def test_pushed_files_come_back_byte_for_byte(hub, api, pushed, tmp_path):
    assert {path: hub.file("models", REPO, path) for path in FILES} == FILES
    assert hub.files("models", REPO) == sorted([*FILES, ".gitattributes"])
    assert [commit.title for commit in hub.commits("models", REPO)] == ["First", "initial commit"]
    for path, content in FILES.items():
        with open(api.hf_hub_download(REPO, path, cache_dir=tmp_path / "cache"), "rb") as file:
            assert file.read() == content, path
    snapshot = api.snapshot_download(REPO, cache_dir=tmp_path / "other", max_workers=4)
    assert snapshot.endswith(pushed)
    assert {path: (tmp_path / "other" / snapshot / path).read_bytes() for path in FILES} == FILES


def test_only_binary_files_are_lfs_objects_and_name_their_sha256(hub, api, pushed):
    info = api.model_info(REPO, files_metadata=True)
    digests = {file.rfilename: file.lfs.sha256 for file in info.siblings if file.lfs}
    assert digests == {path: hashlib.sha256(FILES[path]).hexdigest() for path in LFS}
    assert {file.rfilename: file.size for file in info.siblings if file.rfilename in FILES} == {
        path: len(content) for path, content in FILES.items()
    }
    assert sorted(hub.uploads()) == sorted((digest, 200) for digest in digests.values())
    assert (info.sha, info.private, info.card_data.license) == (pushed, False, "apache-2.0")
    assert {"mri", "transformers", "license:apache-2.0"} <= set(info.tags)


def test_pushing_the_same_again_uploads_and_commits_nothing(hub, api, pushed, folder):
    before = len(hub.requests)
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == pushed
    assert len(hub.commits("models", REPO)) == 2
    sent = [path for method, path, _ in hub.requests[before:] if method == "PUT" or "/commit/" in path]
    assert sent == []
    # A known object under a new name is committed, but not uploaded.
    api.upload_file(path_or_fileobj=WEIGHTS, path_in_repo="copy.safetensors", repo_id=REPO)
    assert len(hub.uploads()) == len(LFS)
    assert hub.file("models", REPO, "copy.safetensors") == WEIGHTS


def test_old_revisions_stay(hub, api, pushed, tmp_path):
    api.create_tag(REPO, tag="v1")
    there_and_back = [b"{}", FILES["config.json"], b"{}"]
    shas = [
        api.upload_file(path_or_fileobj=text, path_in_repo="config.json", repo_id=REPO).oid for text in there_and_back
    ]
    api.create_branch(REPO, branch="side", revision=pushed)
    with pytest.raises(HfHubHTTPError, match="Reference already exists: the branch side"):
        api.create_branch(REPO, branch="side")
    api.create_branch(REPO, branch="side", exist_ok=True)
    for revision in (pushed, pushed[:7], "v1", "side"):
        with open(api.hf_hub_download(REPO, "config.json", revision=revision, cache_dir=tmp_path), "rb") as file:
            assert file.read() == FILES["config.json"], revision
    with open(api.hf_hub_download(REPO, "config.json", cache_dir=tmp_path), "rb") as file:
        assert file.read() == b"{}"
    refs = api.list_repo_refs(REPO)
    assert {ref.name: ref.target_commit for ref in refs.branches + refs.tags} == {
        "main": shas[-1],
        "side": pushed,
        "v1": pushed,
    }
    assert [commit.commit_id for commit in api.list_repo_commits(REPO)][:-1] == [*reversed(shas), pushed]
    assert not api.revision_exists(REPO, "v2")
    with pytest.raises(RevisionNotFoundError, match="Invalid rev id: v2"):
        api.hf_hub_download(REPO, "config.json", revision="v2", cache_dir=tmp_path)
    with pytest.raises(HfHubHTTPError, match="A commit has happened since"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id=REPO, parent_commit=pushed)
    api.delete_branch(REPO, branch="side")
    api.delete_tag(REPO, tag="v1")
    assert not api.revision_exists(REPO, "side")


def test_listings(api, pushed, tmp_path):
    def listed(*arguments, **options):
        return [entry.path for entry in api.list_repo_tree(REPO, *arguments, **options)]

    assert listed() == [".gitattributes", "README.md", "code", "config.json", "figures", "model.safetensors", "runs"]
    assert listed("code") == ["code/deep", "code/modeling x.py"]
    assert listed("code", recursive=True) == ["code/deep", "code/deep/empty.txt", "code/modeling x.py"]
    with pytest.raises(RemoteEntryNotFoundError, match="nowhere does not exist on main"):
        listed("nowhere")
    edited = api.upload_file(path_or_fileobj=b"new", path_in_repo="code/new.py", repo_id=REPO).oid
    code, config = api.get_paths_info(REPO, ["code", "config.json", "nowhere"], expand=True)
    assert (code.last_commit.oid, config.last_commit.oid) == (edited, pushed)
    assert (config.size, config.lfs) == (len(FILES["config.json"]), None)
    assert api.file_exists(REPO, "code/modeling x.py")
    assert not api.file_exists(REPO, "code")
    with pytest.raises(RemoteEntryNotFoundError, match="Entry Not Found"):
        api.hf_hub_download(REPO, "tokenizer.json", cache_dir=tmp_path)
    # The client remembers by commit what is missing, which takes the header of the refusal.
    assert list(tmp_path.glob(f"*/.no_exist/{edited}/tokenizer.json"))


def test_deleting_leaves_the_past_alone(hub, api, pushed):
    api.delete_file("config.json", REPO)
    api.delete_folder("code", REPO)
    assert hub.files("models", REPO) == [".gitattributes", "README.md", *sorted(LFS)]
    assert hub.file("models", REPO, "config.json", pushed) == FILES["config.json"]
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("config.json", REPO)
    with pytest.raises(RemoteEntryNotFoundError, match="A file with this name doesn't exist"):
        api.delete_file("figures", REPO)


@pytest.mark.parametrize(
    ("asked", "status", "span"),
    [
        ("bytes=10-19", 206, slice(10, 20)),
        ("bytes=1999990-", 206, slice(1999990, None)),
        ("bytes=-5", 206, slice(-5, None)),
        ("bytes=2047990-9999999", 206, slice(2047990, None)),
        ("bytes=2048000-", 416, None),
        ("lines=1-2", 200, slice(None)),
    ],
)
def test_byte_ranges(hub, asked, status, span):
    hub.create("models", REPO, {"w.bin": WEIGHTS})
    answer = fetch(f"{hub.url}/{REPO}/resolve/main/w.bin", Range=asked)
    assert answer[0] == status
    if status == 416:
        assert answer[1]["Content-Range"] == "bytes */2048000"
    else:
        assert answer[2] == WEIGHTS[span]
        assert int(answer[1]["Content-Length"]) == len(answer[2])
        assert answer[1]["X-Repo-Commit"] == hub.commits("models", REPO)[0].sha


def test_headers_name_the_content(hub, api, pushed):
    size, digest = str(len(WEIGHTS)), f'"{hashlib.sha256(WEIGHTS).hexdigest()}"'
    config = f'"{api.get_paths_info(REPO, "config.json")[0].blob_id}"'
    for path, expected in [("model.safetensors", [digest, digest, size]), ("config.json", [config, None, None])]:
        status, headers, body = fetch(f"{hub.url}/{REPO}/resolve/main/{path}", "HEAD")
        assert (status, headers["Content-Length"], body) == (200, str(len(FILES[path])), b"")
        assert [headers[name] for name in ("ETag", "X-Linked-ETag", "X-Linked-Size")] == expected
    assert config == '"' + hashlib.sha1(b"blob 27\0" + FILES["config.json"]).hexdigest() + '"'


def test_file_system_reads_parts(hub, api):
    hub.create("datasets", "tester/d", {"data/a.bin": WEIGHTS, "data/b.txt": b"text"})
    files = HfFileSystem(endpoint=hub.url, token="hf_read", skip_instance_cache=True)
    assert files.glob("datasets/tester/d/data/*") == ["datasets/tester/d/data/a.bin", "datasets/tester/d/data/b.txt"]
    with files.open("datasets/tester/d/data/a.bin", block_size=1000) as file:
        file.seek(1_000_003)
        assert file.read(7) == WEIGHTS[1_000_003:1_000_010]
    assert hub.requests[-1] == ("GET", "/datasets/tester/d/resolve/main/data/a.bin", 206)


def test_creating_and_deleting_repositories(hub, api):
    assert api.whoami()["name"] == "tester"
    url = api.create_repo("d", repo_type="dataset", private=True)
    assert (url.repo_id, url.repo_type, url) == ("tester/d", "dataset", f"{hub.url}/datasets/tester/d")
    assert hub.repos["datasets", "tester/d"].private
    with pytest.raises(HfHubHTTPError, match="You already created this dataset repo: tester/d"):
        api.create_repo("d", repo_type="dataset")
    assert api.create_repo("d", repo_type="dataset", exist_ok=True) == url
    assert not api.repo_exists("tester/d")  # no model of that name
    api.delete_repo("d", repo_type="dataset")
    assert hub.repos == {}
    with pytest.raises(RepositoryNotFoundError, match="Repository Not Found"):
        api.delete_repo("d", repo_type="dataset")


def test_rights(hub, connect, folder, tmp_path):
    hub.create("models", "tester/secret", {"a.txt": b"a"}, private=True)
    hub.create("models", "other/secret", {"a.txt": b"a"}, private=True)
    hub.create("models", "other/public", {"a.txt": b"a"})
    own, reader, nobody, wrong = map(connect, ("hf_write", "hf_read", False, "hf_wrong"))

    for client, repo_id in [(own, "tester/secret"), (reader, "tester/secret"), (nobody, "other/public")]:
        assert client.file_exists(repo_id, "a.txt"), repo_id
    # The Hub does not tell what is missing from what is private: 401 without a token, 404 with one.
    for client, repo_id, status in [
        (nobody, "tester/secret", 401),
        (nobody, "tester/missing", 401),
        (own, "other/secret", 404),
        (own, "tester/missing", 404),
    ]:
        with pytest.raises(RepositoryNotFoundError) as caught:
            client.model_info(repo_id)
        assert caught.value.response.status_code == status, repo_id
        with pytest.raises(RepositoryNotFoundError):
            client.hf_hub_download(repo_id, "a.txt", cache_dir=tmp_path)

    def refused(status, match, function, *arguments, **options):
        with pytest.raises(HfHubHTTPError, match=match) as caught:
            function(*arguments, **options)
        assert caught.value.response.status_code == status
        return type(caught.value)

    refused(401, "Invalid user token", wrong.whoami)
    refused(401, "Invalid credentials", wrong.model_info, "other/public")
    refused(401, "Invalid credentials", wrong.create_repo, "m")
    refused(401, "Invalid username or password", nobody.create_repo, "m")
    refused(403, "rights to create a model: the token is for reading", reader.create_repo, "m")
    refused(403, 'rights to create a model under the namespace "other"', own.create_repo, "other/m", exist_ok=True)
    push = {"path_or_fileobj": b"b", "path_in_repo": "a.txt"}
    refused(401, "Invalid credentials", wrong.upload_file, repo_id="tester/secret", **push)
    refused(403, "the token is for reading", reader.upload_file, repo_id="tester/secret", **push)
    refused(403, 'under the namespace "other"', own.upload_file, repo_id="other/public", **push)
    error = refused(401, "Invalid username or password", nobody.upload_file, repo_id="other/public", **push)
    assert error is RepositoryNotFoundError  # as the client makes of it over https too
    assert [len(hub.commits(*key)) for key in hub.repos] == [2, 2, 2]
    assert hub.uploads() == []


def test_upload_of_other_content_than_announced_is_refused(hub, api):
    api.create_repo(REPO)
    operation = CommitOperationAdd("w.bin", WEIGHTS)
    operation.upload_info.sha256 = hashlib.sha256(b"other").digest()
    with pytest.raises(RuntimeError, match=r"uploading 'w.bin'") as caught:
        api.create_commit(REPO, [operation], commit_message="Wrong")
    assert "The SHA-256 of the content is" in str(caught.value.__cause__)
    assert [status for _, status in hub.uploads()] == [422]
    assert hub.files("models", REPO) == [".gitattributes"]
    operation._is_uploaded = True  # a client that lies
    with pytest.raises(BadRequestError, match="was not uploaded"):
        api.create_commit(REPO, [operation], commit_message="Wrong")


def test_upload_takes_a_signature(hub):
    hub.create("models", REPO)
    url = f"{hub.url}/upload/models/{REPO}/{hashlib.sha256(b'a').hexdigest()}?signature="
    assert fetch(url + "guessed", "PUT", b"a")[0] == 403
    assert hub.repos["models", REPO].objects == {}
    assert fetch(url + hub.signature, "PUT", b"a")[0] == 200
    assert fetch(url + hub.signature, "PUT", iter([b"", b"a"]))[0] == 200  # chunked
    assert hub.repos["models", REPO].objects == {hashlib.sha256(b"a").hexdigest(): 1}


@pytest.mark.parametrize("times", [1, 6])
def test_connection_dropped_in_the_third_upload(hub, api, monkeypatch, times):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # the client waits between its six attempts
    shards = {f"model-{i}.safetensors": bytes([i]) * 3_000_000 for i in range(1, 6)}

    def push():
        additions = [CommitOperationAdd(path, content) for path, content in shards.items()]
        api.create_commit(REPO, additions, commit_message="Shards", num_threads=1)

    api.create_repo(REPO)
    hub.drop_connection_on_lfs_upload(3, times=times)
    if times == 6:
        with pytest.raises(RuntimeError, match=r"Error while uploading 'model-3.safetensors'"):
            push()
        assert hub.files("models", REPO) == [".gitattributes"]
    push()
    assert {path: hub.file("models", REPO, path) for path in shards} == shards
    # What arrived is not sent again.
    assert [status for _, status in hub.uploads()] == [200] * 2 + [0] * times + [200] * 3
    assert len({oid for oid, _ in hub.uploads()}) == 5


def test_commit_with_a_bad_card_is_refused(hub, api):
    api.create_repo(REPO)
    card = b"---\nlicense: Apache 2.0\n---\n"
    with pytest.raises(ValueError, match=r'Invalid metadata in README.md.\n- "license" must be one of'):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=REPO)
    with pytest.warns(UserWarning, match="empty or missing yaml metadata"):
        api.upload_file(path_or_fileobj=b"# No card\n", path_in_repo="README.md", repo_id=REPO)
    api._validate_yaml = lambda *arguments, **options: None  # the Hub looks again itself
    with pytest.raises(BadRequestError, match='"license" must be one of'):
        api.upload_file(path_or_fileobj=card, path_in_repo="README.md", repo_id=REPO)
    assert hub.file("models", REPO, "README.md") == b"# No card\n"


CARDS = """
import json
from huggingface_hub import DatasetCard, ModelCard

card = ModelCard("---\\nlicense: apache-2.0\\ntags:\\n- mri\\n---\\n# Model\\n")
card.validate()
url = card.push_to_hub("tester/m")
loaded = ModelCard.load("tester/m")
refused = []
for text in json.loads(input()):
    try:
        DatasetCard(text, ignore_metadata_errors=True).validate()
    except ValueError as error:
        refused.append(str(error))
print(json.dumps({"url": url, "license": loaded.data.license, "text": loaded.text, "refused": refused}))
"""


def test_cards(hub, tmp_path):
    hub.create("models", REPO)
    scores, metrics = "model-index:\n- name: a\n  results: [{task: {type: c}, ", "[{type: dice, value: 0.5}]"
    dataset, refusal = "dataset: {name: B, type: me/b, config: d}", '- Error: "model-index[0].results[0]'
    bad = {
        "license: my own": '- Error: "license" must be one of [apache-2.0, mit, openrail, ',
        "license: 2.0": '- Error: "license" must be one of [apache-2.0, mit, openrail, ',
        "tags: mri": '- Error: "tags" must be an array',
        "language: English": '- Error: "language" with value "English" is not valid',
        "datasets:\n- /home/me/brats": '- Error: "datasets" with value "/home/me/brats" is not valid',
        "model-index: none": '- Error: "model-index" must be an array',
        f"{scores}dataset: {{name: B}}, metrics: {metrics}}}]": f'{refusal}.dataset.type" is required',
        f"{scores}dataset: {{name: B, type: b c}}, metrics: {metrics}}}]": f'{refusal}.dataset.type" with value "b c"',
        f"{scores}{dataset}, metrics: [{{type: dice}}]}}]": f'{refusal}.metrics[0].value" is required',
    }
    good = ["license:\n- mit\n- other", "language: en\ndatasets: tester/d"]
    good.append(f"{scores}{dataset}, metrics: {metrics}}}]")
    texts = [f"---\n{text}\n---\n# Data\n" for text in [*good, *bad]]
    result = run(hub, CARDS.replace("input()", repr(json.dumps(texts))), tmp_path)
    assert result["url"] == f"{hub.url}/tester/m/commit/{hub.commits('models', REPO)[0].sha}"
    assert (result["license"], result["text"].strip()) == ("apache-2.0", "# Model")
    assert len(result["refused"]) == len(bad)
    for message, start in zip(result["refused"], bad.values(), strict=True):
        assert message.startswith(start)


@pytest.mark.parametrize(
    ("matter", "message"),
    [
        ("- a\n- b", "the metadata must be a mapping of keys to values"),
        ("license: [mit", "the metadata is not YAML: while parsing"),
    ],
)
def test_front_matter_that_is_no_mapping_is_refused(api, matter, message):
    with pytest.raises(ValueError, match=message):
        api._validate_yaml(f"---\n{matter}\n---\n")


DATA = """
import json
from datasets import Dataset, load_dataset
from datasets.exceptions import DatasetNotFoundError

rows = Dataset.from_dict({"image": [b"0" * 9, b"1" * 9, b"2" * 9], "slice_index": [4, 5, 6]})
first = rows.push_to_hub("tester/d", private=True, split="train")
again = rows.push_to_hub("tester/d", split="train")
rows.select([1]).push_to_hub("tester/d", split="test")
try:  # before it is in the cache, which `load_dataset` falls back to
    load_dataset("tester/d", token=False)
except DatasetNotFoundError as error:
    anonymous = str(error)
loaded = load_dataset("tester/d")
streamed = load_dataset("tester/d", split="train", streaming=True)
result = {
    "commits": [first.oid, again.oid],
    "sizes": {split: len(part) for split, part in loaded.items()},
    "equal": loaded["train"].to_dict() == rows.to_dict(),
    "streamed": [row["slice_index"] for row in streamed],
    "old": load_dataset("tester/d", revision=first.oid).num_rows,
    "anonymous": anonymous,
}
print(json.dumps(result))
"""


def test_data_set_is_pushed_loaded_and_streamed(hub, tmp_path):
    result = run(hub, DATA, tmp_path)
    assert result["sizes"] == {"train": 3, "test": 1}
    assert result["equal"]
    assert result["streamed"] == [4, 5, 6]
    assert result["old"] == {"train": 3}
    assert result["commits"] == [hub.commits("datasets", "tester/d")[1].sha] * 2
    assert "doesn't exist on the Hub or cannot be accessed" in result["anonymous"]
    assert hub.repos["datasets", "tester/d"].private
    parquet = [path for path in hub.files("datasets", "tester/d") if path.endswith(".parquet")]
    assert parquet == ["data/test-00000-of-00001.parquet", "data/train-00000-of-00001.parquet"]
    assert [status for _, status in hub.uploads()] == [200, 200]
    ranges = [path for method, path, status in hub.requests if status == 206]
    assert ranges, "streaming reads parts"


def test_what_the_hub_does_not_know_is_noted(hub, connect):
    api = connect("hf_write")
    with pytest.raises(HfHubHTTPError, match=r"does not know GET /api/models\?"):
        list(api.list_models(author="tester"))
    hub.create("models", REPO)
    with pytest.raises(HfHubHTTPError, match="create_pr=1"):
        api.upload_file(path_or_fileobj=b"", path_in_repo="x", repo_id=REPO, create_pr=True)
    assert [(method, path.split("?")[0]) for method, path in hub.unknown_requests] == [
        ("GET", "/api/models"),
        ("POST", f"/api/models/{REPO}/preupload/main"),
    ]
    hub.unknown_requests.clear()
    # So is what the Hub fails to answer.
    assert fetch(f"{hub.url}/api/validate-yaml", "POST", b"{")[0] == 500
    assert hub.unknown_requests == [("POST", "/api/validate-yaml")]
    hub.unknown_requests.clear()


def test_environment_knows_only_this_hub(hub, tmp_path, monkeypatch):
    foreign = ["HF_HUB_CACHE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "https_proxy"]
    for name in [*foreign, "HF_TOKEN"]:
        monkeypatch.setenv(name, "1")
    environment = hub.environment(tmp_path)
    assert not set(foreign) & set(environment)
    assert "HF_TOKEN" not in environment
    assert environment["HF_ENDPOINT"] == hub.url
    assert environment["HF_HUB_OFFLINE"] == "0"
    assert environment["PATH"] == os.environ["PATH"]
    assert hub.environment(tmp_path, "hf_read")["HF_TOKEN"] == "hf_read"
