"""A saved model loads where this package is not installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from common import BRATS_REGIONS, CODE, MODEL_CODE, small_model
from PIL import Image

from sam2unet_hf import Sam2UNetImageProcessor


# Run in another folder with another cache; the arguments are the checkpoint, an image and where to write.
LOADER = """
import json, sys

sys.modules["sam2unet_hf"] = None  # an import of it fails, installed or not

import torch
from PIL import Image
from transformers import AutoConfig, AutoImageProcessor, AutoModel, AutoModelForSemanticSegmentation

folder, image, output = sys.argv[1:]
processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
pixel_values = processor(Image.open(image), return_tensors="pt")["pixel_values"]
result = {"regions": [config.regions, processor.regions], "modules": [type(config).__module__]}
tensors = {"pixel_values": pixel_values}
for auto_class in (AutoModel, AutoModelForSemanticSegmentation):
    model = auto_class.from_pretrained(folder, trust_remote_code=True)
    with torch.inference_mode():
        outputs = model(pixel_values, labels=torch.ones(1, 80, 70, dtype=torch.long))
    tensors[auto_class.__name__] = outputs.logits
    result["modules"].append(type(model).__module__)
tensors["label_map"] = processor.post_process_semantic_segmentation(outputs, [(80, 70)])[0]
# Reading SAM 2 weights travels too.
try:
    type(model).from_sam2("absent.pt")
except FileNotFoundError as error:
    result["from_sam2"] = str(error)
# A checkpoint saved from here, as after fine-tuning, must load again.
model.save_pretrained(output + "/again")
processor.save_pretrained(output + "/again")
again = AutoModel.from_pretrained(output + "/again", trust_remote_code=True)
with torch.inference_mode():
    tensors["again"] = again(pixel_values).logits
torch.save(tensors, output + "/tensors.pt")
with open(output + "/result.json", "w") as file:
    json.dump(result, file)
"""


@pytest.fixture(scope="module")
def model():
    return small_model(regions=BRATS_REGIONS)


@pytest.fixture(scope="module")
def processor():
    return Sam2UNetImageProcessor(regions=BRATS_REGIONS, size={"height": 96, "width": 64})


@pytest.fixture(scope="module")
def checkpoint(model, processor, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hub") / "sam2unet-brats"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def auto_maps(folder):
    files = [folder / "config.json", folder / "preprocessor_config.json"]
    return [json.loads(file.read_text())["auto_map"] for file in files]


EXPECTED_AUTO_MAPS = [
    {
        "AutoConfig": "configuration_sam2unet.Sam2UNetConfig",
        "AutoModel": "modeling_sam2unet.Sam2UNetForSemanticSegmentation",
        "AutoModelForSemanticSegmentation": "modeling_sam2unet.Sam2UNetForSemanticSegmentation",
    },
    {"AutoImageProcessor": "image_processing_sam2unet.Sam2UNetImageProcessor"},
]


def test_checkpoint_holds_its_code_and_names_its_classes(checkpoint):
    assert sorted(path.name for path in checkpoint.glob("*.py")) == CODE
    assert auto_maps(checkpoint) == EXPECTED_AUTO_MAPS


def test_checkpoint_loads_without_the_package(checkpoint, model, processor, tmp_path):
    torch.manual_seed(0)
    image = Image.fromarray(torch.randint(0, 256, (80, 70), dtype=torch.uint8).numpy())
    image.save(tmp_path / "slice.png")
    output = tmp_path / "output"
    output.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "HF_"))}
    environment.update(HF_HOME=str(tmp_path / "hf_home"), HF_HUB_OFFLINE="1")
    run = subprocess.run(
        [sys.executable, "-c", LOADER, str(checkpoint), str(tmp_path / "slice.png"), str(output)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr

    tensors = torch.load(output / "tensors.pt", weights_only=True)
    pixel_values = processor(image, return_tensors="pt")["pixel_values"]
    with torch.inference_mode():
        outputs = model(pixel_values)
    assert torch.equal(tensors["pixel_values"], pixel_values)
    for name in ("AutoModel", "AutoModelForSemanticSegmentation", "again"):
        assert torch.equal(tensors[name], outputs.logits), name
    label_map = processor.post_process_semantic_segmentation(outputs, [(80, 70)])[0]
    assert label_map.unique().numel() > 1
    assert torch.equal(tensors["label_map"], label_map)

    result = json.loads((output / "result.json").read_text())
    assert all(module.startswith("transformers_modules.") for module in result["modules"])
    assert [list(regions.items()) for regions in result["regions"]] == [list(BRATS_REGIONS.items())] * 2
    assert result["from_sam2"] == "No checkpoint file at absent.pt."
    assert sorted(path.name for path in (output / "again").glob("*.py")) == MODEL_CODE
    assert auto_maps(output / "again") == EXPECTED_AUTO_MAPS
