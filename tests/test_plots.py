"""What pictures show of images: colours of photographs, and one modality by name of several."""

import sys
from pathlib import Path

import numpy as np
import pytest
from common import small_model
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image

from sam2unet_hf import Sam2UNetImageProcessor, overlays
from sam2unet_hf.ensemble_sam2unet import Sam2UNetEnsemble
from sam2unet_hf.finetuning import plots
from sam2unet_hf.finetuning.predictions import name_ranks, rows_to_show, show_cases
from sam2unet_hf.training import ImageRows, SegmentationTransform


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
from error_metrics import Analysis  # noqa: E402
from error_report import list_figures, write_report  # noqa: E402


GREEN = (20, 180, 60)


def is_green(pixels):
    pixels = pixels.astype(int)
    return (pixels[..., 1] > pixels[..., 0] + 100) & (pixels[..., 1] > pixels[..., 2] + 80)


def rows_of(**images):
    """Four rows with the same image in each column, of these colours or pixels, and a mask in the first three."""
    masks = np.zeros((4, 80, 70), np.uint8)
    masks[:3, 20:50, 10:40] = 1
    data = {
        name: [np.broadcast_to(np.asarray(image, np.uint8), (80, 70, 3) if np.ndim(image) == 1 else (80, 70))] * 4
        for name, image in images.items()
    }
    data |= {"mask": list(masks), "case_id": ["a", "b", "c", "d"]}
    features = {**dict.fromkeys((*images, "mask"), ImageFeature()), "case_id": Value("string")}
    return ImageRows(Dataset.from_dict(data, features=Features(features)), list(images))


@pytest.fixture
def transform():
    return SegmentationTransform(Sam2UNetImageProcessor({"mask": [1]}, size={"height": 64, "width": 64}))


@pytest.fixture
def titles(monkeypatch):
    """Titles of the panels of the figures that were closed."""
    found, close = [], plots.plt.close

    def note(figure):
        found.extend(axis.get_title() for axis in figure.axes)
        close(figure)

    monkeypatch.setattr(plots.plt, "close", note)
    return found


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (1, {"best": 0}),
        (2, {"best": 0, "worst": 1}),
        (3, {"best": 0, "median": 1, "worst": 2}),
        (6, {"best": 0, "median": 3, "worst": 5}),
    ],
)
def test_no_case_is_shown_twice(count, expected):
    assert name_ranks(range(count)) == expected


def test_photographs_are_in_colours_in_the_picture_of_predictions(transform, tmp_path, titles):
    rows = rows_of(image=GREEN)
    cases = show_cases(rows, {0: "first", 2: "last"}, transform, small_model(regions={"mask": [1]}))
    assert all(np.array_equal(case.image, np.full((80, 70, 3), GREEN)) for case in cases)
    plots.plot_predictions(cases, {"mask": [1]}, tmp_path / "predictions.png")
    drawn = np.asarray(Image.open(tmp_path / "predictions.png").convert("RGB"))
    assert is_green(drawn).mean() > 0.1  # the panels of the image, and what of the others has no region
    assert titles[0] == "image"


def test_photographs_are_in_colours_in_the_error_report(transform, tmp_path):
    analysis = Analysis(
        Sam2UNetEnsemble(small_model(regions={"mask": [1]}), transform.processor), rows_of(image=GREEN), transform
    )
    analysis.run(2, None)
    write_report(analysis, tmp_path, "Errors", 3, ["png"])
    drawn = np.asarray(Image.open(tmp_path / "overlays_mask.png").convert("RGB"))
    assert is_green(drawn).mean() > 0.1


def test_of_several_modalities_one_is_shown_by_name(transform, tmp_path, titles):
    noise = np.random.default_rng(0).integers(1, 255, (80, 70))
    rows = rows_of(t1ce=200, flair=90, t2=noise)
    model = small_model(regions={"mask": [1]})
    cases = show_cases(rows, rows_to_show(rows, np.array([0.9, 0.8, 0.7, 0.0]), transform), transform, model)
    assert all(np.array_equal(case.image, np.full((80, 70), 90)) for case in cases)
    title = plots.name_of_image(rows.image_columns)
    plots.plot_predictions(cases, {"mask": [1]}, tmp_path / "predictions.png", title)
    assert titles[:4] == ["image (flair)", "reference", "prediction", "outlines"]
    analysis = Analysis(Sam2UNetEnsemble(model, transform.processor), rows, transform)
    analysis.run(2, None)
    figures = {name: (caption, plot) for name, caption, _, plot in list_figures(analysis, 3)}
    expected = "mask: worst images (of different cases if possible), median and best; shown is flair"
    assert figures["overlays_mask"][0] == expected
    with plots.plt.rc_context():
        figure = figures["dice_contrast"][1]()
    assert figure.axes[0].get_xlabel() == "contrast of the mean of t1ce, flair, t2 (standard deviations)"


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGB", "RGBA", "I;16"])
def test_grey_pictures_stay_grey(mode):
    grey = Image.fromarray(np.arange(48, dtype=np.uint8).reshape(6, 8) * 5)
    picture = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257) if mode == "I;16" else grey.convert(mode)
    shown = overlays.image_to_show(picture, ["image"])
    assert shown.ndim == 2
    if mode == "I;16":
        assert shown.max() > 255
