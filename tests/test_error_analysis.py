"""The error analysis: metrics on masks drawn by hand, the report of a data set, the figures of a case."""

import csv
import dataclasses
import json
import logging
import math
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from common import small_backbone_config, small_model
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from scipy.spatial.distance import cdist
from slice_rows import make_slices

from dataset_scripts.brats_slices.__main__ import main as write_brats_slices
from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.ensemble_sam2unet import Sam2UNetEnsemble
from sam2unet_hf.finetuning import run_segmentation
from sam2unet_hf.overlays import image_to_show
from sam2unet_hf.scans_sam2unet import Volume
from sam2unet_hf.training import ImageRows, SegmentationMetrics, SegmentationTransform
from sam2unet_hf.volume import Sam2UNetVolumePipeline, VolumeSegmentation


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import error_analysis  # noqa: E402 - the scripts are no package
from case_view import CaseView, largest_slice, segment_case  # noqa: E402
from error_metrics import (  # noqa: E402
    Analysis,
    Calibration,
    boundary_distances,
    box_around,
    contrast_to_noise,
    score_region,
    unmatched_lesions,
)
from error_plots import WIDTH, draw_case, evenly_spread, middle_slices  # noqa: E402
from error_report import choose_examples, write_report  # noqa: E402


REGIONS = {"WT": [1, 2, 3], "TC": [1, 3]}


def mask_of(*boxes, shape=(20, 30)):
    mask = np.zeros(shape, dtype=bool)
    for top, bottom, left, right in boxes:
        mask[top:bottom, left:right] = True
    return mask


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_phantom_cohort(tmp_path_factory.mktemp("errors") / "brats", num_patients=13, shape=(40, 40, 26))


@pytest.fixture(scope="module")
def slices(cohort):
    folder = cohort.parent / "slices"
    arguments = ["--slices", "tumor", "--min_tumor_pixels", "5", "--output_dir", str(folder)]
    write_brats_slices(["--brats_dir", str(cohort), *arguments])
    return folder


def bright_pixels(pixel_values, **kwargs):
    """Stand in for the model: what is bright is tumour, unsure at its edge."""
    grey = pixel_values.mean(dim=1)
    return type("Output", (), {"logits": torch.stack([grey - 0.6, grey - 1.2], dim=1) * 4})


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    """A folder with a model, which finds bright pixels once loaded."""
    model = small_model(regions=REGIONS)
    model.save_pretrained(tmp_path / "model")
    processor = Sam2UNetImageProcessor(regions=REGIONS, size={"height": 64, "width": 64})
    processor.modalities = ["flair"]
    processor.save_pretrained(tmp_path / "model")
    load = error_analysis.load_model

    def load_bright(args):
        ensemble = load(args)
        for model in ensemble.models:
            model.forward = bright_pixels
        return ensemble

    monkeypatch.setattr(error_analysis, "load_model", load_bright)
    return tmp_path / "model"


def read_csv(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_dice_is_one_without_region_and_prediction_and_zero_with_one_of_them():
    def dice(reference, prediction):
        record, _ = score_region(prediction * 1.0, reference, np.ones_like(reference), np.ones(reference.shape))
        return record["dice"]

    assert dice(mask_of((0, 2, 0, 2)), mask_of((0, 2, 1, 3))) == 0.5
    assert dice(mask_of(), mask_of()) == 1
    assert dice(mask_of(), mask_of((0, 1, 0, 1))) == 0


def test_unmatched_lesions_join_corners_and_know_size_and_place():
    reference = mask_of((0, 2, 0, 2), (2, 4, 2, 4), (10, 13, 10, 15), (18, 20, 28, 30))
    prediction = mask_of((3, 5, 3, 5), (10, 13, 15, 20))  # the second only lies beside
    assert unmatched_lesions(reference, prediction) == (
        3,
        [
            {"pixels": 15, "centre_row": 11.0, "centre_column": 12.0},
            {"pixels": 4, "centre_row": 18.5, "centre_column": 28.5},
        ],
    )
    assert unmatched_lesions(prediction, reference) == (
        2,
        [{"pixels": 15, "centre_row": 11.0, "centre_column": 17.0}],
    )
    assert unmatched_lesions(mask_of(), reference) == (0, [])
    assert unmatched_lesions(reference, mask_of())[0] == 3


def test_contrast_is_against_the_ring_inside_the_head():
    reference = mask_of((8, 12, 10, 20))
    grey = np.full(reference.shape, 50.0)
    grey[:, ::2] = 70.0  # mean 60, standard deviation 10
    grey[reference] = 85.0
    head = np.ones_like(reference)
    ring = mask_of((8, 12, 8, 10), (8, 12, 20, 22), (6, 8, 10, 20), (12, 14, 10, 20))
    assert contrast_to_noise(grey, reference, ring) == pytest.approx(2.5)
    # Nothing farther than the width of the ring counts.
    far = grey.copy()
    far[mask_of((0, 20, 0, 30)) & ~mask_of((3, 17, 5, 25))] = 1000
    assert contrast_to_noise(far, reference, head, width=4) == pytest.approx(
        contrast_to_noise(grey, reference, head, width=4)
    )
    assert contrast_to_noise(far, reference, head, width=7) < 0
    assert contrast_to_noise(grey[:, ::-1] * 2 + 5, reference[:, ::-1], head, 4) == pytest.approx(
        contrast_to_noise(grey, reference, head, 4)
    )


def test_contrast_without_tumour_or_surroundings_is_unknown():
    reference = mask_of((8, 12, 10, 20))
    grey = np.where(reference, 9.0, 3.0)
    for arguments in ((grey, mask_of(), ~mask_of()), (grey, reference, reference), (grey, reference, ~mask_of())):
        assert math.isnan(contrast_to_noise(*arguments))


def test_boundary_distances_of_shifted_squares():
    reference, prediction = mask_of((5, 6, 5, 6)), mask_of((8, 9, 9, 10))
    assert boundary_distances(reference, prediction) == (5, 5)
    assert boundary_distances(reference, prediction, (2, 1)) == pytest.approx((52**0.5, 52**0.5))
    assert boundary_distances(reference, reference) == (0, 0)
    assert np.isnan(boundary_distances(reference, mask_of())).all()
    assert np.isnan(boundary_distances(mask_of(), mask_of())).all()
    # A line of 10 pixels and its first 5: nothing from the short one, 0 0 0 0 0 1 2 3 4 5 from the long one.
    average, hausdorff = boundary_distances(mask_of((3, 4, 0, 10)), mask_of((3, 4, 0, 5)))
    assert average == pytest.approx(15 / 15)
    assert hausdorff == pytest.approx(4.55)


def surface_points(mask):
    rows, columns = np.nonzero(mask)
    padded = np.pad(mask, 1)
    inside = [padded[1 + dy : 1 + dy + mask.shape[0], 1 + dx : 1 + dx + mask.shape[1]]
              for dy, dx in ((0, 1), (0, -1), (1, 0), (-1, 0))]  # fmt: skip
    on_surface = ~np.logical_and.reduce(inside)[rows, columns]
    return np.stack([rows, columns], axis=1)[on_surface]


def by_pairs(reference, prediction, spacing):
    """Distances of all surface pixels to all others."""
    distances = cdist(surface_points(reference) * np.array(spacing), surface_points(prediction) * np.array(spacing))
    ways = distances.min(axis=1), distances.min(axis=0)
    return np.concatenate(ways).mean(), max(np.percentile(way, 95) for way in ways)


def test_boundary_distances_are_those_of_all_pairs():
    generator = np.random.default_rng(0)
    for _ in range(5):
        reference, prediction = generator.random((2, 20, 30)) > 0.9
        for mask in (reference, prediction):
            mask[5:12, 6:15] = True
        assert boundary_distances(reference, prediction, (1.5, 0.5)) == pytest.approx(
            by_pairs(reference, prediction, (1.5, 0.5))
        )


def test_calibration_of_calibrated_pixels_has_no_error():
    generator = np.random.default_rng(0)
    whole, parts = Calibration(), Calibration()
    probabilities = generator.random((400, 500)).astype(np.float32)
    reference = generator.random((400, 500)) < probabilities
    whole.add(probabilities, reference)
    for rows in (slice(0, 7), slice(7, 400)):
        parts.add(probabilities[rows], reference[rows])
    assert whole.error() < 0.005
    assert parts.error() == pytest.approx(whole.error())
    pixels, mean, share = whole.curve()
    assert pixels.sum() == 200_000
    np.testing.assert_allclose(mean, (np.arange(15) + 0.5) / 15, atol=0.002)
    np.testing.assert_allclose(share, mean, atol=0.015)


def test_calibration_weights_pixels_equally():
    calibration = Calibration()
    assert math.isnan(calibration.error())
    calibration.add(np.full(30, 0.9), np.arange(30) < 15)  # off by 0.4
    calibration.add(np.full(10, 1.0), np.ones(10, dtype=bool))  # right, in the last bin
    assert calibration.error() == pytest.approx(0.75 * 0.4)
    assert np.flatnonzero(calibration.curve()[0]).tolist() == [13, 14]


def test_a_region_without_prediction_and_with_pixels_that_do_not_count():
    reference = mask_of((2, 6, 2, 6), (10, 12, 10, 12))
    grey = np.where(reference, 9.0, np.arange(30) % 3)
    valid = ~mask_of((9, 20, 0, 30))
    record, lesions = score_region(np.zeros(reference.shape), reference, valid, grey, (2.0, 0.5))
    assert record["found_in"] == "truth only"
    assert (record["truth_pixels"], record["truth_mm2"], record["dice"]) == (16, 16.0, 0.0)
    assert math.isnan(record["surface_distance_mm"])
    assert [(lesion["kind"], lesion["pixels"], lesion["mm2"]) for lesion in lesions] == [("missed", 16, 16.0)]
    record, lesions = score_region(np.where(reference, 0.51, 0.5), reference, valid, grey)
    assert (record["found_in"], record["dice"], record["hausdorff95_px"], lesions) == ("both", 1, 0, [])
    assert score_region(np.zeros(reference.shape), mask_of(), valid, grey)[0]["found_in"] == "neither"


def record_of(case, number, dice, wrong=0, found_in="both"):
    wrong = {"false_positive_pixels": wrong, "false_negative_pixels": 0}
    return {"case_id": case, "image": f"{case}_{number}", "dice": dice, "found_in": found_in, **wrong}


def test_the_worst_are_of_different_cases_while_there_are_others():
    records = [record_of("a", number, dice) for number, dice in enumerate((0.1, 0.2, 0.9))]
    records += [record_of("b", 0, 0.0, 3), record_of("c", 0, 0.0, 8), record_of("d", 0, 1.0, found_in="neither")]
    chosen = [(title, record["image"]) for title, record in choose_examples(records, 3)]
    assert chosen == [("worst 1", "c_0"), ("worst 2", "b_0"), ("worst 3", "a_0"), ("median", "a_0"), ("best", "a_2")]
    assert [record["image"] for _, record in choose_examples(records, 4)][:4] == ["c_0", "b_0", "a_0", "a_1"]
    assert choose_examples(records[-1:], 3) == []


def test_box_and_spread():
    assert box_around(mask_of((5, 9, 0, 7)), margin=2) == (slice(3, 11), slice(0, 9))
    assert box_around(mask_of(), margin=2) == (slice(None), slice(None))
    assert evenly_spread(10, 4).tolist() == [0, 3, 6, 9]
    assert evenly_spread(3, 9).tolist() == [0, 1, 2]
    assert evenly_spread(9, 1).tolist() == [4]
    assert evenly_spread(0, 3).tolist() == []


def test_report_of_a_data_set(slices, checkpoint, tmp_path):
    arguments = ["--model", str(checkpoint), "--dataset_name", str(slices), "--device", "cpu", "--worst", "2"]
    for name, batch_size in (("first", "3"), ("second", "5")):
        options = ["--output_dir", str(tmp_path / name), "--batch_size", batch_size]
        error_analysis.main([*arguments, *options])
    first, second = tmp_path / "first", tmp_path / "second"
    for name in ("images", "lesions", "calibration", "summary"):
        assert (first / f"{name}.csv").read_bytes() == (second / f"{name}.csv").read_bytes()

    rows = error_analysis.load_data(error_analysis.DataArguments(dataset_name=str(slices)))["test"]
    processor = Sam2UNetImageProcessor.from_pretrained(checkpoint)
    records = read_csv(first / "images.csv")
    assert len(records) == 2 * len(rows)
    model = small_model(regions=REGIONS)
    metrics = SegmentationMetrics(list(REGIONS))
    transform = SegmentationTransform(processor, resize_masks=False)
    pixels = {region: ([], []) for region in REGIONS}
    lesions = {("missed", region): 0 for region in REGIONS} | {("false", region): 0 for region in REGIONS}
    for index, row in enumerate(rows):
        batch = transform({"image": [row["flair"]], "mask": [row["mask"]]})
        logits = bright_pixels(batch["pixel_values"][0][None]).logits
        dice = metrics.score(logits, [batch["labels"][0]], model)[0, :, 0]
        grey = np.asarray(row["flair"])
        probabilities = torch.nn.functional.interpolate(logits, (40, 40), mode="bilinear")[0].sigmoid().numpy()
        for number, (region, label_ids) in enumerate(REGIONS.items()):
            record = records[2 * index + number]
            reference, prediction = np.isin(np.asarray(row["mask"]), label_ids), probabilities[number] > 0.5
            assert (record["region"], record["case_id"]) == (region, row["case_id"])
            assert int(record["slice_index"]) == row["slice_index"]
            assert float(record["dice"]) == pytest.approx(dice[number], abs=1e-5)
            assert int(record["true_positive_pixels"]) == (reference & prediction).sum()
            if reference.any() and prediction.any():
                found = float(record["surface_distance_px"]), float(record["hausdorff95_px"])
                assert found == pytest.approx(by_pairs(reference, prediction, (1, 1)), rel=1e-5)
            else:
                assert record["surface_distance_px"] == record["hausdorff95_px"] == ""
            for kind in ("missed", "false"):
                lesions[kind, region] += int(record[f"{kind}_lesions"])
            pixels[region][0].append(probabilities[number][grey > 0])
            pixels[region][1].append(reference[grey > 0])

    listed = read_csv(first / "lesions.csv")
    assert sum(lesions.values()) > 5
    for (kind, region), count in lesions.items():
        assert sum((lesion["kind"], lesion["region"]) == (kind, region) for lesion in listed) == count
    for summary in read_csv(first / "summary.csv"):
        probability, reference = map(np.concatenate, pixels[summary["region"]])
        bins = np.digitize(probability, np.linspace(0, 1, 16)[1:-1])
        gaps = [
            abs(probability[bins == b].mean() - reference[bins == b].mean()) * (bins == b).mean() for b in set(bins)
        ]
        assert float(summary["calibration_error"]) == pytest.approx(sum(gaps), rel=1e-3)
        ours = [record for record in records if record["region"] == summary["region"]]
        assert float(summary["mean_dice"]) == pytest.approx(np.mean([float(row["dice"]) for row in ours]), rel=1e-5)
        distances = [float(row["hausdorff95_px"]) for row in ours if row["found_in"] == "both"]
        assert int(summary["images_both"]) == len(distances)
        assert float(summary["median_hausdorff95_px"]) == pytest.approx(np.median(distances), rel=1e-5)

    report = (first / "report.html").read_text(encoding="utf-8")
    pictures = sorted(path.name for path in first.glob("*.png"))
    names = ("boundaries", "calibration", "dice_contrast", "dice_size", "dice_slice", "overlays_TC", "overlays_WT")
    assert pictures == [f"{name}.png" for name in names]
    assert report.count('src="data:image/png;base64,') == len(pictures)
    assert "the column `grade` of the data set is empty" in report
    for name in pictures:
        with Image.open(first / name) as picture:
            assert min(picture.size) > 400
            assert np.asarray(picture.convert("L")).std() > 10


def test_images_of_channels_are_drawn_by_flair_of_their_own_slice():
    processor = Sam2UNetImageProcessor(
        num_channels=6, neighbours=1, head_crop_size={"height": 64, "width": 64}, regions=REGIONS
    )
    model = small_model(regions=REGIONS, backbone_config=small_backbone_config(num_channels=6))
    data = make_slices({"a": [3, 4, 5]}, size=(80, 90), tumour={("a", 4)})
    rows = ImageRows(data, ["t1ce", "flair"], neighbours=1)
    analysis = Analysis(Sam2UNetEnsemble(model, processor), rows, SegmentationTransform(processor, resize_masks=False))
    (about, image, probabilities, references, _) = list(analysis.read([0, 1, 2], batch_size=2))[1]
    assert (about["image"], about["slice_index"]) == ("a_004", 4)
    np.testing.assert_array_equal(image, np.stack([data[1]["t1ce"], data[1]["flair"]]))
    np.testing.assert_array_equal(image_to_show(image, rows.image_columns), np.asarray(data[1]["flair"]))
    np.testing.assert_array_equal(references[0], np.asarray(data[1]["mask"]) == 2)
    # Outside of the window nothing is predicted, and inside what the model says of it.
    batch = SegmentationTransform(processor, mask_column=None)(rows[[1]])
    with torch.no_grad():
        inside = model(torch.stack(batch["pixel_values"])).logits.sigmoid()[0]
    x_min, y_min, x_max, y_max = batch["crop_boxes"][0].tolist()
    found = np.zeros_like(probabilities)
    left, top, right, bottom = max(x_min, 0), max(y_min, 0), min(x_max, 90), min(y_max, 80)
    found[:, top:bottom, left:right] = inside[:, top - y_min : bottom - y_min, left - x_min : right - x_min]
    np.testing.assert_allclose(probabilities, found, atol=1e-5)
    assert (probabilities > 0).any()
    assert (probabilities == 0).any()


@pytest.mark.parametrize("has_empty", [False, True])
def test_the_report_says_where_it_cannot_know_of_false_lesions(tmp_path, has_empty):
    data = make_slices({"a": [3, 4]}, size=(64, 64), tumour={("a", 3)} if has_empty else {("a", 3), ("a", 4)})
    processor = Sam2UNetImageProcessor(regions=REGIONS, size={"height": 64, "width": 64})
    rows = ImageRows(data, ["flair"])
    ensemble = Sam2UNetEnsemble(small_model(regions=REGIONS), processor)
    analysis = Analysis(ensemble, rows, SegmentationTransform(processor, resize_masks=False))
    analysis.run(2, None)
    write_report(analysis, tmp_path, "Errors", 1, ["png"])
    sentence = f"Every image has {next(iter(REGIONS))}"
    assert (sentence in (tmp_path / "report.html").read_text()) == (not has_empty)


def pictures_with_grades(folder, grades, mask_column="mask"):
    """Squares, one of them unseen and one of them of grey nothing, in a data set that says little of itself."""
    generator = np.random.default_rng(0)
    images, masks = [], []
    for index in range(len(grades)):
        mask = np.zeros((48, 40 + index), dtype=np.uint8)
        mask[10 : 22 + index, 8:20] = 3
        image = (generator.integers(20, 60, mask.shape) + 190 * (mask > 0)).astype(np.uint8)
        images.append(Image.fromarray(image))
        masks.append(Image.fromarray(mask))
    rows = {"image": images, mask_column: masks, "case_id": ["<b>a & b</b>"] * len(grades), "grade": grades}
    rows = {name: values for name, values in rows.items() if values[0] != "no"}
    data = Dataset.from_dict(rows).cast_column("image", ImageFeature()).cast_column(mask_column, ImageFeature())
    folder.mkdir()
    for split in ("train", "validation", "test"):
        data.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def test_grades_millimetres_and_formats_with_text_escaped(checkpoint, tmp_path):
    data = pictures_with_grades(tmp_path / "<data>", ["HGG", "LGG", "HGG", "LGG"])
    arguments = ["--model", str(checkpoint), "--dataset_name", str(data), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit, match=r"Patient <b>a & b</b> is in the splits train .* go on .* --allow_leaks"):
        error_analysis.main(arguments)
    arguments.append("--allow_leaks")
    error_analysis.main([*arguments, "--spacing_mm", "2", "0.5", "--format", "pdf", "--max_images", "3"])
    records = read_csv(tmp_path / "out" / "images.csv")
    assert [record["grade"] for record in records[::2]] == ["HGG", "HGG", "LGG"]
    assert [record["index"] for record in records[::2]] == ["0", "2", "3"]
    assert all(float(record["truth_mm2"]) == int(record["truth_pixels"]) for record in records)
    assert "hausdorff95_mm" in records[0]
    for name in ("dice_grade.pdf", "dice_grade.png", "overlays_WT.pdf"):
        assert (tmp_path / "out" / name).stat().st_size > 3000
    report = (tmp_path / "out" / "report.html").read_text(encoding="utf-8")
    assert "<b>" not in report
    assert "&lt;data&gt;" in report
    assert "the data set has no column `slice_index`" in report
    assert not (tmp_path / "out" / "dice_slice.png").exists()


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--split", "holdout"], "--split holdout: the data set has train, validation, test. Pass one of them"),
        (["--mask_column", "truth"], "--mask_column: 'truth' is no column of images. The data set's columns"),
        (["--regions", "WT=1"], r"--regions: .* segments .*'TC'.*, not .* Leave out --regions"),
        (["--case", "nowhere"], "pass one of --case, --dataset_name and --brats_dir"),
        (["--test_dir", "nowhere"], "--test_dir is analysed alone: pass it without --case, --dataset_name and"),
        (["--folds", "3"], "--folds cuts the data into several splits: name one by --fold"),
        (["--folds", "3", "--fold", "1"], "--split test: the data set has train, validation. Pass one of them"),
        (["--spacing_mm", "0"], r"--spacing_mm takes one or two positive numbers, got \[0.0\]"),
        (["--max_images", "0"], "--max_images must be at least 1, got 0"),
    ],
)
def test_arguments_that_cannot_be(arguments, match, slices, checkpoint, tmp_path, capsys):
    options = ["--model", str(checkpoint), "--dataset_name", str(slices), "--output_dir", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as err:
        error_analysis.main([*options, *arguments])
    assert re.search(match, f"{err.value} {capsys.readouterr().err}")
    assert not (tmp_path / "out").exists()


def test_data_without_masks_or_with_other_labels_is_named(checkpoint, tmp_path):
    options = ["--model", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--allow_leaks", "--dataset_name"]
    data = pictures_with_grades(tmp_path / "unnamed", ["no"] * 3, mask_column="what")
    with pytest.raises(SystemExit, match="--mask_column: no column found. The data set's columns of images are"):
        error_analysis.main([*options, str(data)])
    model = small_model(regions={"liver": [7]})
    model.save_pretrained(checkpoint)
    data = pictures_with_grades(tmp_path / "named", ["no"] * 3)
    with pytest.raises(
        SystemExit, match=r"liver has the label ids \[7\], the masks hold \[3\].* pass data with masks"
    ):
        error_analysis.main([*options, str(data)])
    with pytest.raises(
        SystemExit, match=r"--model nowhere: [\s\S]*Train one with `python examples/run_segmentation.py`"
    ):
        error_analysis.main(["--model", "nowhere", "--dataset_name", str(data)])


def test_without_arguments_it_is_the_phantom_of_the_first_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args, data_args = error_analysis.parse_arguments([])
    assert (args.model, args.split, args.output_dir) == ("runs/phantom", "test", "runs/phantom/errors")
    assert data_args.slices == ["head"]
    _, data_args = error_analysis.parse_arguments(["--brats_dir", "BraTS2020"])
    assert data_args.slices == ["95"]


def write_run(folder, **options):
    """Write the record of a run with these data options."""
    arguments = dataclasses.asdict(error_analysis.DataArguments(**options)) | {"learning_rate": 1e-4}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "run.json").write_text(json.dumps({"arguments": arguments, "data": {}}))
    return folder


SCANS = {
    "brats_dir": "BraTS2020",
    "slices": ["20", "24"],
    "plane": "coronal",
    "min_tumor_pixels": 7,
    "modalities": ["t1ce", "t2", "flair"],
    "skip_bad_cases": True,
    "split_seed": 3,
}


def test_without_data_options_it_scores_the_test_split_of_the_run(cohort, checkpoint, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    run = tmp_path / "run"
    data = ["--brats_dir", str(cohort), "--slices", "12", "14", "--split_seed", "3"]
    quick = ["--max_steps", "1", "--use_cpu", "--disable_tqdm", "true", "--model_name_or_path", str(checkpoint)]
    run_segmentation.main([*data, *quick, "--output_dir", str(run)])
    caplog.clear()
    error_analysis.main(["--model", str(run), "--device", "cpu"])
    found = {row["case_id"] for row in read_csv(run / "errors" / "images.csv")}
    splits = {
        seed: error_analysis.load_data(
            error_analysis.DataArguments(brats_dir=str(cohort), slices=["12", "14"], split_seed=seed)
        )
        for seed in (0, 3)
    }
    assert found == set(splits[3]["test"]["case_id"]) != set(splits[0]["test"]["case_id"])
    assert f"images of {cohort}" in (run / "errors" / "report.html").read_text(encoding="utf-8")
    (line,) = [record.getMessage() for record in caplog.records if "run.json" in record.getMessage()]
    assert line.startswith(
        f"As in {run / 'run.json'}: --brats_dir {cohort} --split_seed 3 --test_split True --slices "
    )
    assert "--slices 12 14 --plane axial " in line
    # Patients that it was trained on are warned of, as the run knows them.
    assert "The model was trained on" not in caplog.text
    error_analysis.main(["--model", str(run), "--device", "cpu", "--split", "train", "--max_images", "2"])
    assert "The model was trained on" in caplog.text


def test_a_second_cohort_is_analysed_whole(cohort, checkpoint, tmp_path):
    write_run(checkpoint, brats_dir="gone", slices=["3"], split_seed=3)
    error_analysis.main(
        ["--model", str(checkpoint), "--test_dir", str(cohort), "--output_dir", str(tmp_path), "--device", "cpu"]
    )
    rows = read_csv(tmp_path / "images.csv")
    every = error_analysis.load_data(error_analysis.DataArguments(brats_dir=str(cohort), slices=["head"]))
    places = [split.select_columns(["case_id", "slice_index"]) for split in every.values()]
    expected = {(row["case_id"], row["slice_index"]) for rows_of_split in places for row in rows_of_split}
    assert {(row["case_id"], int(row["slice_index"])) for row in rows} == expected
    assert len({case for case, _ in expected}) == 13
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert f"on {len(expected)} of {len(expected)} images of {cohort}" in report


def test_the_part_of_the_data_that_is_analysed_is_said(slices, checkpoint, tmp_path, caplog):
    caplog.set_level(logging.INFO)
    data = error_analysis.load_data(error_analysis.DataArguments(dataset_name=str(slices)))
    options = ["--model", str(checkpoint), "--dataset_name", str(slices), "--output_dir", str(tmp_path / "out")]
    error_analysis.main([*options, "--device", "cpu", "--max_images", "1"])
    count, total = len(data["test"]), sum(map(len, data.values()))
    assert f"The test split has {count} of {total} images; --test_dir takes all of a second cohort." in caplog.text


@pytest.mark.parametrize(
    ("run", "argv", "expected"),
    [
        (SCANS, [], SCANS),
        (SCANS | {"folds": 3, "fold": 1}, [], SCANS | {"folds": 3, "fold": 1}),
        # Other data are cut as they are, not into the folds of the run.
        (
            SCANS | {"folds": 3, "fold": 1},
            ["--brats_dir", "other"],
            {"brats_dir": "other", "folds": None, "fold": None},
        ),
        (SCANS, ["--split_seed", "0"], SCANS | {"split_seed": 0}),
        (SCANS, ["--slices=95"], SCANS | {"slices": ["95"]}),
        (SCANS, ["--brats_dir", "other", "--plane", "axial"], SCANS | {"brats_dir": "other", "plane": "axial"}),
        (SCANS, ["--dataset_name", "slices"], SCANS | {"brats_dir": None, "dataset_name": "slices"}),
        (
            {"dataset_name": "pictures", "dataset_config_name": "a", "image_column": "x", "mask_column": "y"},
            ["--mask_column", "z"],
            {"dataset_name": "pictures", "dataset_config_name": "a", "image_column": "x", "mask_column": "z"},
        ),
        (
            {"dataset_name": "pictures", "dataset_config_name": "a", "split_seed": 5},
            ["--dataset_name", "pictures"],
            {"dataset_name": "pictures", "dataset_config_name": "a", "split_seed": 5},
        ),
        (  # a configuration is one of its data set
            {"dataset_name": "pictures", "dataset_config_name": "a", "split_seed": 5},
            ["--dataset_name", "others"],
            {"dataset_name": "others", "dataset_config_name": None, "split_seed": 5},
        ),
        (  # a run on a data set used none of the options of scans, such as the contrasts that the model knows
            {"dataset_name": "pictures", "min_tumor_pixels": 9},
            ["--brats_dir", "BraTS2020"],
            {"dataset_name": None, "brats_dir": "BraTS2020", "min_tumor_pixels": 1, "modalities": None},
        ),
        (
            {"dataset_name": "pictures", "streaming": True, "allow_leaks": True, "regions": ["WT=1"]},
            [],
            {"dataset_name": "pictures", "streaming": False, "allow_leaks": False, "regions": None},
        ),
        (  # the phantom, as the run had it
            {"slices": ["tumor"], "min_tumor_pixels": 30},
            ["--num_proc", "2"],
            {"dataset_name": None, "brats_dir": None, "slices": ["tumor"], "min_tumor_pixels": 30, "num_proc": 2},
        ),
    ],
)
def test_data_options_that_are_left_out_are_those_of_the_run(run, argv, expected, tmp_path, caplog):
    folder = write_run(tmp_path / "run", num_proc=8, **run)
    (folder / "checkpoint-20").mkdir()
    for model in (folder, folder / "checkpoint-20"):
        _, data_args = error_analysis.parse_arguments(["--model", str(model), *argv])
        assert {name: getattr(data_args, name) for name in expected} == expected
        assert data_args.num_proc == expected.get("num_proc")


def test_options_that_make_another_split_than_the_runs_are_warned_of(tmp_path, caplog):
    run = write_run(tmp_path / "run", **SCANS)
    same = ["--split_seed", "3", "--slices", "20", "24", "--modalities", "t1ce", "t2", "flair", "--plane", "coronal"]
    error_analysis.parse_arguments(["--model", str(run), *same, "--min_tumor_pixels", "7"])
    assert not caplog.records
    others = ["--split_seed", "4", "--slices", "tumor", "--modalities", "t2", "--plane", "axial"]
    error_analysis.parse_arguments(["--model", str(run), *others, "--min_tumor_pixels", "1"])
    texts = [record.getMessage() for record in caplog.records]
    for text, ours, theirs in zip(
        texts,
        ("split_seed 4", "slices tumor", "plane axial", "min_tumor_pixels 1", "modalities t2"),
        ("split_seed 3", "slices 20 24", "plane coronal", "min_tumor_pixels 7", "modalities t1ce t2 flair"),
        strict=True,
    ):
        assert f"--{ours} is given, but {run / 'run.json'} has --{theirs}:" in text
    caplog.clear()
    write_run(run, dataset_name="pictures")
    error_analysis.parse_arguments(["--model", str(run), "--brats_dir", "BraTS2020", "--slices", "tumor"])
    assert not caplog.records  # that run cut no scans


def test_the_phantom_is_taken_with_a_word_where_no_record_tells_of_data(checkpoint, slices, caplog):
    error_analysis.parse_arguments(["--model", str(checkpoint), "--dataset_name", str(slices)])
    error_analysis.parse_arguments(["--model", str(checkpoint), "--case", "case"])
    assert not caplog.records
    _, data_args = error_analysis.parse_arguments(["--model", str(checkpoint)])
    assert (data_args.brats_dir, data_args.slices) == (None, ["head"])
    assert re.search(r"no .*run\.json to tell .*: taking the phantom", caplog.text)


@pytest.mark.parametrize("option", ["brats_dir", "dataset_name"])
def test_data_of_the_run_that_are_gone_are_named(option, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_run(checkpoint, **{option: "gone/data"})
    with pytest.raises(SystemExit, match="gone/data"):
        error_analysis.main(["--model", str(checkpoint)])
    assert not (checkpoint / "errors").exists()


@pytest.mark.parametrize("text", ["{", "[]", '{"command": []}', '{"arguments": 3}'])
def test_a_record_that_is_none_is_named(text, checkpoint):
    (checkpoint / "run.json").write_text(text)
    with pytest.raises(SystemExit, match=r"run\.json cannot be read as the record of a run .* name the data by"):
        error_analysis.parse_arguments(["--model", str(checkpoint)])


@pytest.mark.parametrize("what", ["data set", "case"])
def test_a_folder_that_cannot_be_written_to_is_named_before_the_work(
    what, cohort, slices, checkpoint, tmp_path, monkeypatch
):
    for name in ("Analysis", "segment_case"):
        monkeypatch.setattr(error_analysis, name, lambda *_, **__: pytest.fail("the work was done before"))
    case = sorted(path for path in cohort.iterdir() if path.is_dir())[0]
    data = ["--dataset_name", str(slices)] if what == "data set" else ["--case", str(case)]
    (tmp_path / "file").touch()
    with pytest.raises(SystemExit, match=r"file/errors cannot be written to \(.*Pass another folder by --output_dir"):
        error_analysis.main(["--model", str(checkpoint), *data, "--output_dir", str(tmp_path / "file" / "errors")])

    def refuse(dir):
        raise PermissionError(13, "Permission denied", str(dir))

    monkeypatch.setattr(error_analysis.tempfile, "TemporaryFile", refuse)  # root may write anywhere
    with pytest.raises(SystemExit, match=r"model/errors cannot be written to \(.*denied.*Pass another folder by"):
        error_analysis.main(["--model", str(checkpoint), *data])


def test_figures_lie_in_their_folder_whatever_case_and_regions_are_named(tmp_path):
    shape = (4, 5, 6)
    grey = np.arange(120, dtype=np.uint8).reshape(shape)
    scan = Volume("scan", grey, np.eye(4), np.diag([-1.0, -1.0, 1.0, 1.0]), header=None)
    ball = np.ones(shape, np.uint8)
    segmentation = VolumeSegmentation(ball, {"/../WT": [1]}, scan, ball[None].astype(np.float32))
    view = CaseView("../../up", segmentation, {"flair": grey}, "flair", reference=ball)
    draw_case(view, tmp_path / "a" / "b" / "out", ["svg"])
    kinds = ("contrasts", "probabilities", "errors_.._WT", "montage_.._WT", "planes_.._WT")
    names = {path.name for path in (tmp_path / "a" / "b" / "out").iterdir()}
    assert names == {f".._.._up_{kind.replace('_..', '__..')}.svg" for kind in kinds}
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_figures_of_a_case(cohort, checkpoint, tmp_path):
    case = sorted(path for path in cohort.iterdir() if path.is_dir())[0]
    output_dir = tmp_path / "figures"
    arguments = ["--model", str(checkpoint), "--output_dir", str(output_dir)]
    error_analysis.main([*arguments, "--case", str(case), "--format", "png", "pdf"])
    names = ["contrasts", "probabilities"]
    names += [f"{kind}_{region}" for kind in ("errors", "montage", "planes") for region in REGIONS]
    stems = {f"{case.name}_{name}" for name in names}
    assert {path.stem for path in output_dir.iterdir()} == stems
    assert {path.suffix for path in output_dir.iterdir()} == {".png", ".pdf"}
    for path in output_dir.glob("*.png"):
        with Image.open(path) as picture:
            expected = WIDTH * (0.8 if "probabilities" in path.name else 1) * 200
            assert picture.width == pytest.approx(expected, abs=2), path.name
            assert 400 < picture.height < 2200, path.name
            assert np.asarray(picture.convert("L")).std() > 20
            assert picture.info["dpi"] == pytest.approx((200, 200), abs=0.1)


def test_a_case_is_seen_upright_and_as_the_mask_says(cohort, checkpoint):
    case = error_analysis.find_cases(cohort)[0]
    ensemble = error_analysis.load_model(error_analysis.parse_arguments(["--model", str(checkpoint)])[0])
    view = segment_case(Sam2UNetVolumePipeline(ensemble.models, ensemble.processors), case, return_probabilities=True)
    labels = case.read_mask().voxels
    whole, prediction = view.masks("WT")
    np.testing.assert_array_equal(view.masks("TC")[0], np.isin(labels, [1, 3]))
    assert list(view.grey) == ["t1", "t1ce", "t2", "flair"]
    for plane, axis in (("sagittal", 0), ("coronal", 1), ("axial", 2)):
        counts = np.moveaxis(labels > 0, axis, 0).sum(axis=(1, 2))
        assert counts[largest_slice(plane, whole, prediction)] == counts.max()
    indices = middle_slices(whole, 3)
    assert len(indices) == 3
    assert all(whole[:, :, index].any() for index in indices)
    # Brighter than the model's threshold, hence tumour.
    assert view.probability("WT")[prediction].min() > 0.5


def test_a_case_without_mask_or_contrast_and_folders_that_are_none(cohort, checkpoint, tmp_path, caplog):
    first = sorted(path for path in cohort.iterdir() if path.is_dir())[0]
    case = shutil.copytree(first, tmp_path / "cases" / first.name)
    for ending in ("seg", "t2"):
        (path,) = case.glob(f"*_{ending}.nii*")
        path.unlink()
    arguments = ["--model", str(checkpoint), "--output_dir", str(tmp_path / "out"), "--case"]
    error_analysis.main([*arguments, str(case)])
    assert "has no expert's mask" in caplog.text
    names = {path.stem.removeprefix(f"{first.name}_") for path in (tmp_path / "out").iterdir()}
    assert names == {"contrasts", "probabilities", "montage_WT", "montage_TC", "planes_WT", "planes_TC"}
    with pytest.raises(SystemExit, match="--case: .* holds 13 cases, such as .* Pass the folder of one"):
        error_analysis.main([*arguments, str(cohort)])
    with pytest.raises(SystemExit, match="--case: .*nowhere"):
        error_analysis.main([*arguments, str(tmp_path / "nowhere")])
    (path,) = case.glob("*_flair.nii*")
    path.unlink()
    with pytest.raises(SystemExit, match="--case: case .*: no flair scan in"):
        error_analysis.main([*arguments, str(case)])
