"""Files from elsewhere: checkpoints to resume from, models, and data sets run no code and name no files of others."""

import ast
import json
import pickle
import re
import shutil
import sys
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from common import small_model
from PIL import Image
from transformers import AutoConfig, AutoModelForSemanticSegmentation, TrainingArguments

from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.finetuning import run_segmentation
from sam2unet_hf.finetuning.arguments import ModelArguments
from sam2unet_hf.finetuning.data_sources import DataArguments, load_data
from sam2unet_hf.training import Sam2UNetTrainer, SegmentationTransform
from sam2unet_hf.training.streaming import open_parquet
from sam2unet_hf.volume import Sam2UNetVolumePipeline
from sam2unet_hf.weights_sam2unet import weight_files


ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "examples"))
import error_analysis  # noqa: E402 - the scripts are no package


def test_nothing_is_trusted_by_the_code_itself():
    """What bandit does not look for."""
    for path in [
        path
        for folder in ("sam2unet_hf", "sam2unet_command", "dataset_scripts", "examples")
        for path in ROOT.glob(f"{folder}/**/*.py")
    ]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.keyword) and node.arg in (
                "trust_remote_code",
                "allow_pickle",
                "allow_all_kernels",
            ):
                assert ast.unparse(node.value) == "False", f"{path}:{node.value.lineno}"
            if isinstance(node, ast.keyword) and node.arg == "weights_only":
                assert ast.unparse(node.value) == "True", f"{path}:{node.value.lineno}"


# ----------------------------------------------------------------------------------------------------------- resuming


class Payload:
    """A pickle that creates a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def trainer_in(folder, max_steps):
    model = small_model()
    processor = Sam2UNetImageProcessor(regions=model.config.regions, size={"height": 64, "width": 64})
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    pictures = {"image": [Image.new("L", (64, 64), 90)], "mask": [Image.new("L", (64, 64), 1)]}
    rows = datasets.Dataset.from_dict(pictures, features=features)
    args = TrainingArguments(
        folder,
        max_steps=max_steps,
        save_steps=1,
        remove_unused_columns=False,
        use_cpu=True,
        report_to="none",
        disable_tqdm=True,
    )
    return Sam2UNetTrainer(model, args, train_dataset=rows.with_transform(SegmentationTransform(processor)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that was cut off after its first step."""
    folder = tmp_path_factory.mktemp("run")
    trainer_in(folder, 1).train()
    return folder / "checkpoint-1"


@pytest.mark.parametrize("form", ["archive", "pickle"])
@pytest.mark.parametrize("file", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "pytorch_model.bin"])
def test_resuming_from_a_checkpoint_runs_no_code_in_it(run, tmp_path, file, form):
    checkpoint = shutil.copytree(run, tmp_path / "checkpoint-1")
    ran = tmp_path / "ran"
    if file == "pytorch_model.bin":
        (checkpoint / "model.safetensors").unlink()
    else:
        assert (checkpoint / file).exists()
    if form == "archive":
        torch.save({"state": Payload(ran)}, checkpoint / file)
    else:
        (checkpoint / file).write_bytes(pickle.dumps(Payload(ran), protocol=2))
    # What is no archive, as `torch.save` writes, is not even opened.
    refused = {"archive": (pickle.UnpicklingError, "Weights only load"), "pickle": (ValueError, f"{file} is cut off")}
    with pytest.raises(refused[form][0], match=refused[form][1]):
        trainer_in(tmp_path, 2).train(resume_from_checkpoint=str(checkpoint))
    assert not ran.exists()
    torch.load(checkpoint / file, weights_only=False) if form == "archive" else pickle.loads(
        (checkpoint / file).read_bytes()
    )
    assert ran.exists()


def test_resuming_does_not_load_the_saved_arguments(run, tmp_path):
    checkpoint = shutil.copytree(run, tmp_path / "checkpoint-1")
    ran = tmp_path / "ran"
    assert (checkpoint / "training_args.bin").exists()
    torch.save(Payload(ran), checkpoint / "training_args.bin")
    trainer = trainer_in(tmp_path, 2)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert trainer.state.global_step == 2
    assert not ran.exists()


# -------------------------------------------------------------------------------------------------------- remote code


@pytest.fixture
def hostile(tmp_path):
    """A checkpoint whose code creates a file, and that file."""
    model = small_model(regions={"WT": [1, 2, 3]})
    folder, ran = tmp_path / "hostile", tmp_path / "ran"
    model.save_pretrained(folder)
    Sam2UNetImageProcessor(regions=model.config.regions).save_pretrained(folder)
    scripts = list(folder.glob("*.py"))
    assert {"configuration_sam2unet.py", "modeling_sam2unet.py", "image_processing_sam2unet.py"} <= {
        path.name for path in scripts
    }
    for path in scripts:
        path.write_text(f"import pathlib\npathlib.Path({str(ran)!r}).touch()\n{path.read_text()}")
    return folder, ran


LOADERS = {
    "AutoModel": lambda name: AutoModelForSemanticSegmentation.from_pretrained(name),
    "model": lambda name: Sam2UNetForSemanticSegmentation.from_pretrained(name),
    "volume": lambda name: Sam2UNetVolumePipeline.from_pretrained(name, ["flair"]),
    "run_segmentation": lambda name: run_segmentation.load_model(
        ModelArguments(model_name_or_path=name), {"WT": [1, 2, 3]}
    ),
    "error_analysis": lambda name: error_analysis.load_model(error_analysis.AnalysisArguments(model=name)),
}


@pytest.mark.parametrize("load", LOADERS.values(), ids=LOADERS)
def test_code_in_a_checkpoint_does_not_run_unasked(hostile, load):
    folder, ran = hostile
    load(str(folder))
    assert not ran.exists()


@pytest.fixture
def unknown(hostile):
    """The same under a type that is not known here."""
    folder, ran = hostile
    config = folder / "config.json"
    config.write_text(config.read_text().replace('"model_type": "sam2unet"', '"model_type": "unknown"'))
    return folder, ran


@pytest.mark.parametrize(
    "load", [AutoModelForSemanticSegmentation.from_pretrained, Sam2UNetForSemanticSegmentation.from_sam2]
)
def test_code_of_an_unknown_type_does_not_run_unasked(unknown, load):
    folder, ran = unknown
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        load(folder)
    assert not ran.exists()


def test_that_code_runs_where_it_is_trusted(unknown, tmp_path, monkeypatch):
    """So the file that the other tests look for can appear."""
    folder, ran = unknown
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    with pytest.raises(ValueError, match="holds a model of type 'unknown'"):  # says the code that ran
        AutoConfig.from_pretrained(folder, trust_remote_code=True)
    assert ran.exists()


def test_a_loading_script_of_a_data_set_does_not_run(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "data.py").write_text(f"import pathlib\npathlib.Path({str(tmp_path / 'ran')!r}).touch()\n")
    with pytest.raises(SystemExit, match=r"--dataset_name .*data"):
        load_data(DataArguments(dataset_name=str(folder)))
    assert not (tmp_path / "ran").exists()


# -------------------------------------------------------------------------------------------------------------- paths


@pytest.mark.parametrize("shard", ["../model.safetensors", "sub/model.safetensors", r"..\model.safetensors"])
def test_shards_lie_beside_their_index(tmp_path, shard):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    with pytest.raises(ValueError, match=r"names .*model.safetensors, which does not lie beside it"):
        weight_files(tmp_path)


@pytest.fixture
def secret(tmp_path):
    Image.new("L", (8, 8), 1).save(tmp_path / "secret.png")
    return tmp_path / "secret.png"


def write_rows(folder, image):
    """Write a data set of one image and a mask that is in the rows."""
    (folder / "masks").mkdir(parents=True)
    Image.new("L", (8, 8), 1).save(folder / "masks" / "a.png")
    features = datasets.Features({"image": datasets.Image(), "mask": datasets.Image()})
    row = {"image": image, "mask": {"bytes": (folder / "masks" / "a.png").read_bytes(), "path": None}}
    pq.write_table(pa.Table.from_pylist([row] * 12, schema=features.arrow_schema), folder / "train.parquet")


@pytest.mark.parametrize("form", ["{secret}", "{folder}/../secret.png", "file://{secret}", "zip://a.png::{secret}"])
def test_rows_name_no_file_outside_their_data_set(tmp_path, secret, form):
    folder = tmp_path / "data"
    path = form.format(secret=secret, folder=folder)
    write_rows(folder, {"bytes": None, "path": path})
    with pytest.raises(SystemExit, match=rf"column 'image' of split 'train' names the file {re.escape(path)}, which"):
        load_data(DataArguments(dataset_name=str(folder)))


def test_streamed_rows_name_no_file_at_all(tmp_path, secret):
    write_rows(tmp_path / "data", {"bytes": None, "path": str(secret)})
    rows = open_parquet(str(tmp_path / "data"))["train"]
    with pytest.raises(ValueError, match=rf"Row 3 .*names the file {re.escape(str(secret))} in column 'image'"):
        rows[3]


def test_rows_may_name_a_file_of_their_data_set(tmp_path):
    folder = tmp_path / "data"
    write_rows(folder, {"bytes": None, "path": str(folder / "masks" / "a.png")})
    data = load_data(DataArguments(dataset_name=str(folder)))
    assert data["train"][0]["image"].getpixel((0, 0)) == 1
