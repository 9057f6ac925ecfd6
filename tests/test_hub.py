"""Pushed to a Hub, a model loads anywhere: over real HTTP, in processes of their own, without the package.

The processes are forks of one without the package, which test_remote_code.py does without.
"""

import itertools
import json
import re
import shutil
from pathlib import Path

import evaluate
import forks
import numpy as np
import pandas
import pytest
import torch
from common import BRATS_REGIONS, CODE, small_model
from evaluate.utils.gradio import infer_gradio_input_types, parse_gradio_data
from loopback_hub import LoopbackHub
from PIL import Image

from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.clean_up_sam2unet import CleanUp, RegionRule
from sam2unet_hf.hub import main, write_metric_space
from sam2unet_hf.metrics.space import METRIC_CLASSES
from sam2unet_hf.volume import Sam2UNetVolumePipeline


REPO = "tester/sam2unet-brats"

PUSH = """
import sys
from transformers import AutoImageProcessor, AutoModel
import sam2unet_hf

folder, repo = sys.argv[1:]
AutoModel.from_pretrained(folder).push_to_hub(repo, private=True)
AutoImageProcessor.from_pretrained(folder).push_to_hub(repo)
"""

LOAD = """
import json, sys

sys.modules["sam2unet_hf"] = None  # an import of it fails, installed or not

import numpy as np
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

repo, revision, output = sys.argv[1:]
options = {"trust_remote_code": True, "revision": revision}
image = Image.open("slice.png")
config = AutoConfig.from_pretrained(repo, **options)
processor = AutoImageProcessor.from_pretrained(repo, **options)
pixel_values = processor(image, return_tensors="pt")["pixel_values"]
tensors = {}
for auto_class in (AutoModel, AutoModelForSemanticSegmentation):
    model = auto_class.from_pretrained(repo, **options)
    with torch.inference_mode():
        tensors[auto_class.__name__] = model(pixel_values).logits
segments = pipeline("image-segmentation", model=repo, **options)(image)
pipe = pipeline("volume-segmentation", model=repo, **options)
found = pipe("brats/Phantom_001", return_probabilities=True, progress=False)
np.savez(f"{output}.npz", label_map=found.label_map, probabilities=found.probabilities)
torch.save(tensors, f"{output}.pt")
masks = {segment["label"]: int((np.asarray(segment["mask"]) > 0).sum()) for segment in segments}
with open(f"{output}.json", "w") as file:
    json.dump({"regions": config.regions, "masks": masks}, file)
# Fine-tuned where it was loaded, it can be pushed again.
if revision == "main":
    model.decode_head.classifier.bias.data += 1
    model.push_to_hub(repo, commit_message="Fine-tuned")
"""


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub
        assert hub.unknown_requests == []


@pytest.fixture(scope="module")
def model():
    return small_model(regions=BRATS_REGIONS)


@pytest.fixture(scope="module")
def processor():
    return Sam2UNetImageProcessor(regions=BRATS_REGIONS, size={"height": 96, "width": 64}, modalities=["flair"])


@pytest.fixture(scope="module")
def folder(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def run(hub, tmp_path, code, *arguments, token="hf_write"):
    # In an empty folder with an empty cache.
    environment = hub.environment(tmp_path / "hf_home", token)
    if "import sam2unet_hf" in code:
        environment["PYTHONPATH"] = str(forks.ROOT)
    return forks.run(["-c", code, *arguments], cwd=tmp_path, env=environment)


@pytest.fixture(scope="module")
def pushed(hub, folder, tmp_path_factory):
    result = run(hub, tmp_path_factory.mktemp("push"), PUSH, folder, REPO)
    assert result.returncode == 0, result.stderr
    return result


def test_a_push_uploads_weights_configuration_processor_and_code_and_no_token(hub, folder, pushed):
    files = hub.files("models", REPO)
    expected = {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", *CODE}
    assert set(files) - {".gitattributes"} == expected
    assert hub.file("models", REPO, "model.safetensors") == (folder / "model.safetensors").read_bytes()
    assert hub.repos["models", REPO].private
    assert "hf_write" not in pushed.stdout + pushed.stderr
    for name in files:
        assert b"hf_write" not in hub.file("models", REPO, name), name


PUSH_TRAINED = """
import sys
import sam2unet_hf
import torch

folder, repo, new_repo = sys.argv[1:]
regions = {"a": [1, 2, 3, 4], "b": [1, 2], "c": [1]}
model = sam2unet_hf.Sam2UNetForSemanticSegmentation.from_pretrained(folder, regions=regions)
with torch.no_grad():
    next(model.parameters()).add_(1)
sam2unet_hf.Sam2UNetImageProcessor(regions=regions, size={"height": 128, "width": 160}).push_to_hub(repo)
model.push_to_hub(repo)
model.push_to_hub(new_repo)
sam2unet_hf.Sam2UNetForSemanticSegmentation.from_pretrained(folder).push_to_hub(repo)
model.push_to_hub(repo)
"""


def test_a_push_keeps_the_processor_that_somebody_pushed_for_a_model_trained_since(folder, tmp_path):
    folder = shutil.copytree(folder, tmp_path / "run")
    CleanUp({"WT": RegionRule(threshold=0.4)}).save(folder)
    with LoopbackHub() as hub:
        result = run(hub, tmp_path, PUSH_TRAINED, folder, "tester/trained", "tester/new")
        assert result.returncode == 0, result.stderr
        last, *commits = [commit.sha for commit in hub.commits("models", "tester/trained")]
        have_rules = ["clean_up.json" in hub.files("models", "tester/trained", sha) for sha in (last, *commits[:2])]
        configs = [
            json.loads(hub.file("models", "tester/trained", "preprocessor_config.json", sha)) for sha in commits[:2]
        ]
        configs.append(json.loads(hub.file("models", "tester/new", "preprocessor_config.json")))
    # Newest first: the model of the folder as it is, then the trained one, and that in a new repository.
    assert [config["size"]["height"] for config in configs] == [96, 128, 96]
    assert [config["regions"][0][0] for config in configs] == ["WT", "a", "a"]
    # The rules go with the weights that they are for, and with them alone.
    assert have_rules == [False, True, False]


def test_a_pushed_model_loads_without_the_package_and_can_be_pushed_again(hub, model, processor, pushed, tmp_path):
    first = hub.commits("models", REPO)[0].sha
    torch.manual_seed(0)
    image = Image.fromarray(torch.randint(0, 256, (80, 70), dtype=torch.uint8).numpy())
    image.save(tmp_path / "slice.png")
    with torch.inference_mode():
        outputs = model(**processor(image, return_tensors="pt"))
    (label_map,) = processor.post_process_semantic_segmentation(outputs, [(80, 70)])
    write_phantom_cohort(tmp_path / "brats", num_patients=1, shape=(24, 24, 16))
    volume = Sam2UNetVolumePipeline(model, processor)(tmp_path / "brats" / "Phantom_001", return_probabilities=True)
    for revision, shift in (("main", 0), ("main", 1), (first, 0)):
        result = run(hub, tmp_path, LOAD, REPO, revision, tmp_path / "out")
        assert result.returncode == 0, result.stderr
        tensors = torch.load(tmp_path / "out.pt", weights_only=True)
        for name in ("AutoModel", "AutoModelForSemanticSegmentation"):
            if shift:
                torch.testing.assert_close(tensors[name], outputs.logits + shift)
            else:
                assert torch.equal(tensors[name], outputs.logits), name
        facts = json.loads((tmp_path / "out.json").read_text())
        assert list(facts["regions"].items()) == list(BRATS_REGIONS.items())
        if not shift:
            found = np.load(tmp_path / "out.npz")
            for name in ("label_map", "probabilities"):
                assert np.array_equal(found[name], getattr(volume, name)), name
            ids, counts = label_map.unique(return_counts=True)
            expected = {model.config.id2label[int(i)]: int(n) for i, n in zip(ids, counts, strict=True)}
            assert len(expected) >= 2
            assert facts["masks"] == expected
    assert [commit.title for commit in hub.commits("models", REPO)][:1] == ["Fine-tuned"]
    assert set(hub.files("models", REPO)) - {".gitattributes"} >= {"config.json", "model.safetensors", *CODE}


LOAD_WITH_PACKAGE = """
import json, sys

import numpy as np
import sam2unet_hf
import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation, pipeline

image = Image.open("slice.png")
tensors = {}
for repo, subfolder, revision in json.loads(sys.argv[1]):
    options = {"subfolder": subfolder, "revision": revision}
    processor = AutoImageProcessor.from_pretrained(repo, **options)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    for auto_class in (AutoModel, AutoModelForSemanticSegmentation):
        for more in ({}, {"device_map": "auto"}, {"low_cpu_mem_usage": True}, {"dtype": torch.float32}):
            if more and revision != "main":
                continue
            model = auto_class.from_pretrained(repo, **options, **more)
            assert type(model) is sam2unet_hf.Sam2UNetForSemanticSegmentation
            with torch.inference_mode():
                tensors[f"{repo} {revision} {auto_class.__name__} {more}"] = model(pixel_values).logits
    if not subfolder:
        segments = pipeline("image-segmentation", model=repo, revision=revision)(image)
        assert {segment["label"] for segment in segments} <= set(AutoConfig.from_pretrained(repo).id2label.values())
torch.save(tensors, sys.argv[2])
"""


def test_with_the_package_it_loads_the_same_without_trust(hub, model, processor, tmp_path):
    """Whole or sharded, at the top of the repository or in a folder, of a branch or of a commit."""
    places = []
    for max_shard_size, subfolder in itertools.product(("5GB", "500KB"), ("", "models/best")):
        checkpoint = tmp_path / max_shard_size
        model.save_pretrained(checkpoint, max_shard_size=max_shard_size)
        processor.save_pretrained(checkpoint)
        files = {str(Path(subfolder, path.name)): path.read_bytes() for path in checkpoint.iterdir()}
        assert any("-of-" in name for name in files) == (max_shard_size == "500KB")
        repo = f"tester/placed-{max_shard_size}-{len(subfolder)}"
        hub.create("models", repo, files)
        places += [(repo, subfolder, revision) for revision in ("main", hub.commits("models", repo)[0].sha)]
    image = Image.fromarray(torch.randint(0, 256, (80, 70), dtype=torch.uint8).numpy())
    image.save(tmp_path / "slice.png")
    with torch.inference_mode():
        expected = model(**processor(image, return_tensors="pt")).logits
    result = run(hub, tmp_path, LOAD_WITH_PACKAGE, json.dumps(places), tmp_path / "out.pt", token=None)
    assert result.returncode == 0, result.stderr
    tensors = torch.load(tmp_path / "out.pt", weights_only=True)
    assert len(tensors) == 4 * (8 + 2)
    for name, logits in tensors.items():
        assert torch.equal(logits, expected), name


PUSH_WITHOUT_RIGHTS = """
import json, os, sys, traceback
from transformers import AutoModel
import sam2unet_hf

model = AutoModel.from_pretrained(sys.argv[1])
for token, repo in json.loads(sys.argv[2]):
    os.environ["HF_TOKEN"] = token
    try:
        model.push_to_hub(repo, private=True)
    except Exception:
        print(json.dumps(traceback.format_exc()))
"""


def test_a_push_without_rights_fails_before_any_upload(hub, folder, pushed, tmp_path):
    before = len(hub.uploads()), len(hub.commits("models", REPO))
    cases = {
        ("hf_read", REPO): "403 Forbidden",
        ("hf_write", "stranger/model"): "403 Forbidden",
        ("hf_wrong", REPO): "Invalid username or password|401 Unauthorized",
    }
    result = run(hub, tmp_path, PUSH_WITHOUT_RIGHTS, folder, json.dumps(list(cases)))
    assert result.returncode == 0, result.stderr
    for said, message in zip(result.stdout.splitlines(), cases.values(), strict=True):
        assert re.search(message, json.loads(said)), said
    for token, _ in cases:
        assert token not in result.stdout + result.stderr
    assert (len(hub.uploads()), len(hub.commits("models", REPO))) == before


LOAD_METRIC = """
import sys

sys.modules["sam2unet_hf"] = None
import evaluate

print(evaluate.load("tester/dice").compute(predictions=[[[0.2, 0.9]]], references=[[[0, 1]]])["dice"])
"""


def test_a_metric_written_as_a_space_loads_from_the_hub(hub, tmp_path, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["metric", "dice", str(tmp_path / "space")])
    assert exit_info.value.code == 0
    files = {path.name: path.read_bytes() for path in (tmp_path / "space").iterdir()}
    assert sorted(files) == [
        "README.md",
        "app.py",
        "dice.py",
        "functional.py",
        "requirements.txt",
        "segmentation_metric.py",
        "streaming_metric.py",
    ]
    hub.create("spaces", "tester/dice", files)
    result = run(hub, tmp_path, LOAD_METRIC)
    assert result.returncode == 0, result.stderr
    assert result.stdout == "1.0\n"


def test_the_app_of_a_space_reads_what_is_typed_into_it(tmp_path):
    # Gradio itself is not installed; this is what evaluate's widget does with a row of its table.
    write_metric_space("dice", tmp_path)
    assert 'with_name("dice.py")' in (tmp_path / "app.py").read_text()
    metric = evaluate.load(str(tmp_path / "dice.py"))
    features = metric.features[0]
    assert infer_gradio_input_types(features.values()) == ["json", "json"]
    table = pandas.DataFrame({"predictions": ["[[0.2, 0.9]]"], "references": ["[[0, 1]]"]})
    assert metric.compute(**parse_gradio_data(table, ["json", "json"]))["dice"] == 1


@pytest.mark.parametrize("name", sorted(METRIC_CLASSES))
def test_every_metric_loads_from_its_space(name, tmp_path):
    write_metric_space(name, tmp_path)
    metric = evaluate.load(str(tmp_path / f"{name}.py"))
    mask = np.zeros((6, 6), int)
    mask[1:4, 2:5] = 1
    if (tmp_path / "volume_metric.py").exists():
        scores = metric.compute(predictions=[mask[None]], references=[mask[None]], regions={"WT": [1]})
    else:
        scores = metric.compute(predictions=[mask], references=[mask])
    scores = {key: value for key, value in scores.items() if isinstance(value, float)}
    best = {key: 0 if re.search("^mae|hausdorff95", key) else 1 for key in scores}
    assert scores
    assert scores == pytest.approx(best, abs=0.03)


def test_the_requirements_of_a_space_are_those_of_the_package(tmp_path):
    write_metric_space("mae", tmp_path)
    needed = set((tmp_path / "requirements.txt").read_text().split())
    declared = (Path(__file__).parent.parent / "pyproject.toml").read_text()
    assert len(needed) == 4
    assert all(f'"{requirement}"' in declared for requirement in needed)


def test_a_space_is_not_written_over_other_files_or_for_no_metric(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(FileExistsError, match="is not empty. Name another folder"):
        write_metric_space("dice", tmp_path)
    with pytest.raises(ValueError, match="`name` must be one of dice, e_measure, .*, got 'functional'"):
        write_metric_space("functional", tmp_path / "new")
    assert not (tmp_path / "new").exists()
