"""BraTS slices pushed to a Hub load anywhere: over real HTTP, in processes of their own, without this checkout."""

import json
import re
import shlex
import sys
from pathlib import Path

import datasets
import forks
import numpy as np
import pytest
from loopback_hub import LoopbackHub

from dataset_scripts.brats_slices.__main__ import main
from dataset_scripts.brats_slices.publish import CARD_PICTURE, upload_command
from dataset_scripts.phantom import write_phantom_cohort


CHECKOUT = Path(__file__).parents[1]
REPO = "tester/slices"
OPTIONS = ["--slices", "14 15", "--modalities", "t1ce", "t2", "flair"]
PICTURES = ["t1ce", "t2", "flair", "mask"]  # columns
STALE = "data/train-00001-of-00002.parquet"
FILES = [".gitattributes", "README.md", *(f"data/{name}-00000-of-00001.parquet" for name in ("test", "train"))]
FILES.append("data/validation-00000-of-00001.parquet")

LOAD = """
import json, sys

sys.modules["sam2unet_hf"] = sys.modules["dataset_scripts"] = None  # an import fails, installed or not

import numpy as np
from datasets import load_dataset
from huggingface_hub import DatasetCard

repo, *columns = sys.argv[1:]
arrays, rows = {}, {}
for split, part in load_dataset(repo).items():
    rows[split] = part.remove_columns(columns).to_list()
    for column in columns:
        arrays[f"{split} {column}"] = np.stack([np.asarray(image) for image in part[column]])
for column in columns:
    stream = load_dataset(repo, split="train", streaming=True).take(3)
    arrays[f"stream {column}"] = np.stack([np.asarray(row[column]) for row in stream])
np.savez("arrays.npz", **arrays)
card = DatasetCard.load(repo)
card.validate(repo_type="dataset")
source = load_dataset(repo, split="train").cache_files[0]["filename"]
print(json.dumps({"rows": rows, "card": card.data.to_dict(), "text": card.text, "source": source}))
"""
# Several runs of the command in one process, for it takes seconds to start. The client waits between its attempts.
PUSHES = """
import json, os, sys, time
import huggingface_hub
from dataset_scripts.brats_slices.__main__ import main

time.sleep = lambda seconds: None
ends = []
for call in json.load(sys.stdin):
    os.environ.pop("HF_TOKEN", None)
    os.environ.update({"HF_TOKEN": call["token"]} if call["token"] else {})
    huggingface_hub.constants.ENDPOINT = call["endpoint"]
    try:
        ends.append(main(call["arguments"]))
    except SystemExit as end:
        ends.append(end.code)
print(json.dumps(ends))
"""


@pytest.fixture
def hub():
    with LoopbackHub() as hub:
        yield hub
    assert hub.unknown_requests == []


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    """Five patients: three for training, one each for validation and testing. By their names they are of BraTS."""
    folder = write_phantom_cohort(tmp_path_factory.mktemp("scans") / "cohort", 5, (48, 48, 31))
    for path in sorted(folder.glob("Phantom_*/*")):
        path.rename(path.with_name(path.name.replace("Phantom_", "BraTS20_Training_")))
    for path in sorted(folder.glob("Phantom_*")):
        path.rename(path.with_name(path.name.replace("Phantom_", "BraTS20_Training_")))
    return folder


@pytest.fixture(scope="module")
def unreadable(cohort, tmp_path_factory):
    """The cohort with scans that give an error once they are read."""
    folder = tmp_path_factory.mktemp("scans") / "unreadable"
    for path in cohort.rglob("*.nii.gz"):
        (folder / path.relative_to(cohort)).parent.mkdir(parents=True, exist_ok=True)
        (folder / path.relative_to(cohort)).write_bytes(b"no scan")
    return folder


def run(hub, folder, command, token=None, checkout=False, typed=""):
    """Run a command in an empty folder, with an empty cache and a Hub that is the only one known."""
    folder.mkdir(parents=True)
    environment = {**hub.environment(folder.with_name(f"{folder.name} home"), token), "OMP_NUM_THREADS": "1"}
    environment.pop("PYTHONPATH", None)
    if checkout:
        environment["PYTHONPATH"] = str(CHECKOUT)
    done = forks.run(command, cwd=folder, env=environment, stdin=typed, timeout=120)
    assert done.returncode == 0, done.stderr
    for secret in hub.tokens:
        assert secret not in done.stdout + done.stderr
    return done


def push_options(cohort, *options, repo=REPO, output_dir="out"):
    return ["--brats_dir", str(cohort), "--output_dir", output_dir, "--push_to_hub", repo, *OPTIONS, *options]


def run_pushes(hub, folder, *calls):
    """What each push ends with: `None`, or a message on one line or more that stands for a traceback."""
    return run_pushes_and_read(hub, folder, *calls)[0]


def run_pushes_and_read(hub, folder, *calls):
    """What each push ends with, and what all of them wrote to the console."""
    calls = [{"token": "hf_write", "endpoint": hub.url, **call} for call in calls]
    done = run(hub, folder, ["-c", PUSHES], checkout=True, typed=json.dumps(calls))
    return json.loads(done.stdout), done.stderr


def columns(dataset):
    """Pixels by split and column, and the other columns as rows by split."""
    arrays = {
        f"{split} {column}": np.stack([np.asarray(image) for image in part[column]])
        for split, part in dataset.items()
        for column in PICTURES
    }
    return arrays, {split: part.remove_columns(PICTURES).to_list() for split, part in dataset.items()}


def test_a_push_is_private_and_loads_without_the_checkout(hub, cohort, tmp_path, monkeypatch):
    command = ["-m", "dataset_scripts.brats_slices", *push_options(cohort)]
    done = run(hub, tmp_path / "push", command, "hf_write", checkout=True)
    assert f"Pushed to {hub.url}/datasets/{REPO}" in done.stderr
    assert f'load_dataset("{REPO}")' in done.stderr
    assert hub.repos["datasets", REPO].private
    assert hub.files("datasets", REPO) == sorted(FILES)
    output_dir = tmp_path / "push" / "out"
    for name in FILES[1:]:
        content = hub.file("datasets", REPO, name)
        assert content == (output_dir / name).read_bytes()
        assert b"hf_write" not in content

    loaded = run(hub, tmp_path / "load", ["-c", LOAD, REPO, *PICTURES], "hf_read")
    facts = json.loads(loaded.stdout)
    found = np.load(tmp_path / "load" / "arrays.npz")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    expected, rows = columns(datasets.load_dataset(str(output_dir)))
    assert {split: len(part) for split, part in rows.items()} == {"train": 6, "validation": 2, "test": 2}
    assert facts["rows"] == rows
    assert expected["train t1ce"].shape == (6, 48, 48)
    assert np.unique(expected["train mask"]).tolist() == [0, 1, 2, 3]
    for name, pixels in expected.items():
        np.testing.assert_array_equal(found[name], pixels, err_msg=name)
    for column in PICTURES:
        np.testing.assert_array_equal(found[f"stream {column}"], expected[f"train {column}"][:3])

    assert (facts["card"]["license"], facts["card"]["license_name"]) == ("other", "brats-data-use")
    # By this folder a model card tells the revision.
    assert Path(facts["source"]).parent.name == hub.commits("datasets", REPO)[0].sha
    entries = facts["card"]["configs"][0]["data_files"]
    assert entries == [{"split": split, "path": f"data/{split}-*"} for split in ("train", "validation", "test")]
    assert re.search(r"do not pass them on\. Keep this data set\s+private", facts["text"])


def test_what_cannot_be_pushed_is_refused_before_a_scan_is_read(hub, unreadable, tmp_path):
    hub.create("datasets", "tester/private", private=True)
    hub.create("datasets", "tester/public")
    hub.create("datasets", "stranger/public")
    before = dict(hub.repos)
    the_readers = {"token": "hf_read"}
    reading = "the token is for reading"
    cases = [
        (the_readers, "tester/new", [], f"403 .*rights to create a dataset: {reading}"),
        (the_readers, "tester/private", [], f"403 .*rights to write to tester/private: {reading}"),
        ({}, "stranger/new", [], '403 .*rights to create a dataset under the namespace "stranger"'),
        ({}, "stranger/public", ["--public"], '403 .*rights to write to .* under the namespace "stranger"'),
        ({"token": "hf_wrong"}, "tester/new", [], "Invalid user token"),
        ({"token": None}, "tester/new", [], "no token found"),
        ({}, "tester/public", [], "`tester/public` is public, and the terms of BraTS forbid .* Make the repository"),
        ({"endpoint": "http://127.0.0.1:9"}, "tester/new", [], "onnect"),
    ]
    calls = [{**call, "arguments": push_options(unreadable, *more, repo=repo)} for call, repo, more, _ in cases]
    ends = run_pushes(hub, tmp_path / "push", *calls)
    for (_, repo, _, message), end in zip(cases, ends, strict=True):
        assert re.match(f"error: .*{message}", end), (repo, end)
    assert hub.repos == before
    assert {len(repo.commits) for repo in hub.repos.values()} == {1}
    assert not any(path for method, path, _ in hub.requests if "preupload" in path or method == "PUT")
    assert not (tmp_path / "push" / "out").exists()


def test_a_bad_scan_ends_a_push_before_any_upload(hub, unreadable, tmp_path):
    (end,) = run_pushes(hub, tmp_path / "push", {"arguments": push_options(unreadable)})
    assert re.match("error: case BraTS20_.*is not a NIfTI file", end)
    assert hub.repos["datasets", REPO].private
    assert hub.files("datasets", REPO) == [".gitattributes"]
    assert hub.uploads() == []


def test_public_without_a_repository_is_a_usage_error(cohort, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--brats_dir", str(cohort), "--output_dir", str(tmp_path / "out"), "--public"])
    assert "argument --public: needs --push_to_hub, which names the repository" in capsys.readouterr().err


def test_a_push_replaces_the_data_of_a_repository_and_public_scans_go_to_any(hub, cohort, tmp_path):
    stale = {STALE: b"PAR1", FILES[3]: b"PAR1", "README.md": b"# Old\n", "notes.txt": b"mine"}
    stale[CARD_PICTURE] = b"a patient that was shown before"
    hub.create("datasets", "tester/public", stale)
    hub.create("datasets", "tester/private", stale, private=True)
    repos = ["new", "tester/public", "tester/private"]  # without a namespace: the user's own
    calls = [{"arguments": push_options(cohort, "--public", repo=repo, output_dir=repo)} for repo in repos]
    again = push_options(cohort, "--plane", "coronal", "--show_slices", repo="tester/private", output_dir="again")
    ends, console = run_pushes_and_read(hub, tmp_path / "push", *calls, {"arguments": again})
    assert ends == [None] * 4
    # The commit before still has the picture; the last push found none, for the third had replaced it.
    warned = re.findall(rf"The history of (\S+) still holds the `{CARD_PICTURE}` of an earlier push", console)
    assert warned == ["tester/public", "tester/private"]
    assert 'HfApi().super_squash_history("tester/private", repo_type="dataset")' in console

    found = {name: repo.private for (_, name), repo in hub.repos.items()}
    assert found == {"tester/public": False, "tester/private": True, "tester/new": False}
    assert hub.files("datasets", "tester/new") == sorted(FILES)
    for repo, more in (("tester/public", []), ("tester/private", [CARD_PICTURE])):
        assert hub.files("datasets", repo) == sorted([*FILES, "notes.txt", *more])
        assert hub.file("datasets", repo, "notes.txt") == b"mine"
    last = {"tester/new": "new", "tester/public": "tester/public", "tester/private": "again"}
    for repo, folder in last.items():
        for name in FILES[1:]:
            assert hub.file("datasets", repo, name) == (tmp_path / "push" / folder / name).read_bytes()
        card = hub.file("datasets", repo, "README.md").decode()
        assert (f"]({CARD_PICTURE})" in card) == (folder == "again")
        assert f'load_dataset("{repo}")' in card
        if folder != "again":
            assert "license: unknown\n" in card
            assert "states that its scans may be passed on" in card
            for forbidden in ("Keep this", "do not pass", "brats-data-use", "$"):
                assert forbidden not in card
    first, second = (path.read_bytes() for path in sorted((tmp_path / "push").glob(f"*/{FILES[3]}")))
    assert first != second


def test_a_push_that_was_cut_off_names_the_command_that_repeats_it(hub, cohort, tmp_path):
    hub.create("datasets", REPO, {STALE: b"PAR1"}, private=True)
    hub.drop_connection_on_lfs_upload(2, times=6)
    folder = tmp_path / "a b" / "push"
    call = {"arguments": push_options(cohort)}
    foreign = {"arguments": push_options(cohort, repo="tester/other")}
    cut_off, repeated, other = run_pushes(hub, folder, call, call, foreign)
    assert hub.files("datasets", REPO) == [".gitattributes", STALE]
    assert "error: Error while uploading 'data/" in cut_off
    message, command = cut_off.split(" To upload it: ")
    assert message.endswith("The data set is complete in `out`.")
    # A run that was killed cannot say so; its repetition does, but not for another repository.
    not_empty = f"error: `{folder / 'out'}` is not empty. Remove it or choose another `--output_dir`."
    assert repeated == f"{not_empty} Or, to upload what an earlier run wrote there: {command}"
    assert other == not_empty

    program, *arguments = shlex.split(command)
    assert program == "hf"
    assert "--private" in arguments  # should the repository be gone by then
    assert "--private" not in upload_command(folder / "out", REPO, public=True)
    run(hub, tmp_path / "elsewhere", [Path(sys.executable).with_name(program), *arguments], "hf_write")
    assert hub.files("datasets", REPO) == sorted(FILES)
    for name in FILES[1:]:
        assert hub.file("datasets", REPO, name) == (folder / "out" / name).read_bytes()
    assert hub.repos["datasets", REPO].private
