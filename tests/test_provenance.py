import json
import logging
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Image, Value
from PIL import Image as PILImage

from sam2unet_hf.finetuning import provenance
from sam2unet_hf.finetuning.parsing import parse_arguments


FEATURES = Features({"image": Image(), "mask": Image(), "case_id": Value("string")})


def make_rows(folder, value=7, case_id="a"):
    folder.mkdir()
    for name, grey in (("image", value), ("mask", 1)):
        PILImage.fromarray(np.full((8, 9), grey, np.uint8)).save(folder / f"{name}.png")
    row = {"image": [str(folder / "image.png")], "mask": [str(folder / "mask.png")], "case_id": [case_id]}
    return Dataset.from_dict(row, features=FEATURES)


def test_fingerprint_depends_on_what_rows_hold_and_not_on_where_it_lies(tmp_path):
    first = make_rows(tmp_path / "here")
    same = make_rows(tmp_path / "there")
    same.to_parquet(tmp_path / "same.parquet")  # with the images in the file
    stored = Dataset.from_parquet(str(tmp_path / "same.parquet"), cache_dir=str(tmp_path / "cache"))
    assert provenance.fingerprint(first) == provenance.fingerprint(same) == provenance.fingerprint(stored)
    for other in (make_rows(tmp_path / "x", value=8), make_rows(tmp_path / "y", case_id="b")):
        assert provenance.fingerprint(other) != provenance.fingerprint(first)


def test_the_record_of_a_run_has_what_repeats_it_and_no_token(tmp_path, monkeypatch):
    argv = ["run_segmentation.py", "--use_cpu", "--output_dir", str(tmp_path), "--hub_token", "hf_secret"]
    monkeypatch.setattr(sys, "argv", [*argv[:-2], "--hub_token=hf_secret", "--seed", "3"])
    _, _, args = parse_arguments(sys.argv[1:])
    record = provenance.run_record({"a": (1, 2)}, args, DatasetDict({"train": make_rows(tmp_path / "rows")}))
    provenance.write_json(tmp_path / provenance.RECORD, record)
    text = (tmp_path / provenance.RECORD).read_text()
    assert "hf_secret" not in text
    found = json.loads(text)
    assert found == provenance.read_record(tmp_path)
    assert found["training_arguments"]["seed"] == 3
    assert found["versions"]["torch"] == metadata.version("torch")
    head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True)
    if head.returncode == 0:
        assert found["git"]["commit"] == head.stdout.strip()
    assert provenance.changed_values(found["arguments"], {"a": (1, 2)}) == {}
    assert provenance.changed_values(found["arguments"], {"a": (1, 3), "b": 0}) == {"a": [1, 2], "b": None}


def test_a_write_that_fails_leaves_the_file_that_was_there(tmp_path):
    path = tmp_path / "results.json"
    provenance.write_json(path, {"dice": 1})
    with pytest.raises(TypeError):
        provenance.write_json(path, {"dice": object()})
    assert json.loads(path.read_text()) == {"dice": 1}


def test_a_run_that_goes_on_with_other_versions_or_data_says_so(tmp_path, caplog):
    _, _, args = parse_arguments(["--use_cpu", "--output_dir", str(tmp_path)])
    record = {"arguments": {}, "data": {"train": "old"}, "versions": {"torch": "2.13"}, "git": {"commit": "c0ffee"}}
    provenance.start_run(record, args)
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        provenance.start_run({**record, "data": {"train": "new"}, "versions": {"torch": "2.14"}}, args)
    assert "Other data than when this run began, so it may end otherwise: train new (was old)." in caplog.text
    assert "Other versions than when this run began, so it may end otherwise: torch 2.14 (was 2.13)." in caplog.text
