"""The notebooks run from the first to the last cell as they are stored, which is without outputs.

Only the cell that is tagged `parameters` is replaced, by smaller numbers; the slow test runs them as they are.
"""

import base64
import io
import json
import os
import re
from pathlib import Path

import nbformat
import numpy as np
import pytest
from nbclient import NotebookClient
from PIL import Image


EXAMPLES = Path(__file__).parent.parent / "examples"
SMALL = {
    "quickstart": "num_patients, shape, num_train_epochs = 7, (40, 40, 26), 0.1",
    "own_images": 'data, num_pictures, num_train_epochs, image_size = "made_up_data", 12, 0.4, 64',
}


def read(name):
    notebook = nbformat.read(EXAMPLES / f"{name}.ipynb", as_version=4)
    nbformat.validate(notebook)
    return notebook


def run(name, folder, monkeypatch, parameters=None, threads=1):
    """Run a notebook in a folder; return it with its outputs."""
    variables = {"PYTHONPATH": str(EXAMPLES.parent), "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf")}
    for variable, value in {**variables, "OMP_NUM_THREADS": str(threads), "MPLBACKEND": "Agg"}.items():
        monkeypatch.setenv(variable, value)
    notebook = read(name)
    (cell,) = (cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", ()))
    cell.source += f"\n{parameters or ''}"  # which then hold, as with papermill
    client = NotebookClient(notebook, timeout=3000, resources={"metadata": {"path": str(folder)}})
    # What `interact` shows stays an output of its cell. Else nbclient sends it back to the kernel while it waits for a
    # reply, which it then misses in about one of ten such cells: https://github.com/jupyter/nbclient/issues/312
    client.widget_registry = {}
    return client.execute()


def texts(notebook):
    """Return all text that the cells gave."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    kinds = ("text/plain", "text/html")
    return "\n".join(
        str(output.get("text", "")) + "".join(output.get("data", {}).get(kind, "") for kind in kinds)
        for output in outputs
    )


def pictures(notebook):
    """Return the pictures that the cells show without a live kernel."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    shown = [output.data["image/png"] for output in outputs if "image/png" in output.get("data", ())]
    return [Image.open(io.BytesIO(base64.b64decode(png))) for png in shown]


@pytest.mark.parametrize("name", SMALL)
def test_a_notebook_is_stored_without_outputs(name):
    assert sorted(path.stem for path in EXAMPLES.glob("*.ipynb")) == sorted(SMALL)
    for cell in read(name).cells:
        assert cell.cell_type == "markdown" or (cell.outputs == [] and cell.execution_count is None), cell.id
    assert os.path.getsize(EXAMPLES / f"{name}.ipynb") < 20_000


def test_quickstart_from_scans_to_a_scored_segmentation(tmp_path, monkeypatch):
    notebook = run("quickstart", tmp_path, monkeypatch, SMALL["quickstart"])
    curve, predictions, planes, at_sliders = pictures(notebook)
    assert min(*curve.size, *predictions.size) > 300
    assert at_sliders == planes  # where the sliders begin
    assert len(np.unique(np.asarray(planes).reshape(-1, 3), axis=0)) > 50
    said = texts(notebook)
    assert "volumes in ml: {'WT':" in said
    assert "Dice 0." in said
    assert re.search(r"Epoch 0[\d.]+: validation loss", said)
    assert "Adaptive Dice" not in said  # the column of the table of all scores that transformers shows
    (patient, *_) = json.loads((tmp_path / "runs/quickstart/splits.json").read_text())["test"]
    assert (tmp_path / f"{patient}_seg.nii.gz").exists()


def test_own_images_from_folders_to_masks(tmp_path, monkeypatch):
    notebook = run("own_images", tmp_path, monkeypatch, SMALL["own_images"])
    pair, curve, predictions, overlay = pictures(notebook)
    assert pair.size == (256, 128)
    assert min(*curve.size, *predictions.size) > 300
    assert overlay.size == (256, 128)
    assert len(list((tmp_path / "segmentations").glob("*.png"))) == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "score", "least"), [("quickstart", "test_patient_dice", 0.8), ("own_images", "test_dice", 0.8)]
)
def test_a_notebook_at_full_size_ends_in_sensible_masks(name, score, least, tmp_path, monkeypatch):
    run(name, tmp_path, monkeypatch, threads=os.cpu_count())
    assert json.loads((tmp_path / f"runs/{name}/all_results.json").read_text())[score] > least
