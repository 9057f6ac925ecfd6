"""Ensembles: the mean over models of a folder or repository, and what they disagree on."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import forks
import nibabel as nib
import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, CODE, small_backbone_config, small_model
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from slice_rows import make_slices

from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.clean_up_sam2unet import GAIN_VALUES, CleanUp, RegionRule
from sam2unet_hf.ensemble_sam2unet import Sam2UNetEnsemble
from sam2unet_hf.hub import push_ensemble
from sam2unet_hf.patient_checks import read_splits
from sam2unet_hf.patient_table import PatientTable
from sam2unet_hf.scans_sam2unet import take_slice, to_grey
from sam2unet_hf.training import ImageRows, SegmentationTransform
from sam2unet_hf.volume import Sam2UNetVolumePipeline, main
from sam2unet_hf.volume_sam2unet import make_label_map


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import error_analysis  # noqa: E402 - the scripts are no package
from error_metrics import Analysis  # noqa: E402


MEMBERS = ["fold_0", "fold_1"]
REPO = "tester/folds"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    cohort = write_phantom_cohort(tmp_path_factory.mktemp("ensembles") / "brats", num_patients=1, shape=(24, 24, 16))
    return find_cases(cohort)[0]


def make_processor(size=64, **kwargs):
    options = {"regions": BRATS_REGIONS, "modalities": ["flair"], "size": {"height": size, "width": size}}
    return Sam2UNetImageProcessor(**{**options, **kwargs})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two members, whose models and image sizes differ, and files that a run leaves beside them."""
    folder = tmp_path_factory.mktemp("runs") / "cv"
    for number, member in enumerate(MEMBERS):
        small_model(seed=9 + number, regions=BRATS_REGIONS).save_pretrained(folder / member)
        make_processor(64 + 32 * number).save_pretrained(folder / member)
        splits = {"train": [f"Secret_{1 - number}"], "test": [f"Secret_{number}"]}
        (folder / member / "splits.json").write_text(json.dumps(splits))
        (folder / member / "training_args.bin").write_bytes(b"pickle")
        (folder / member / "checkpoint-3").mkdir()
        (folder / member / "checkpoint-3" / "optimizer.pt").write_bytes(b"pickle")
        info = {"license": "cc-by-nc-4.0", "recipe": {"`seed`": 1, "training time": f"{number} min"}}
        (folder / member / "training_info.json").write_text(json.dumps(info))
    (folder / "ensemble.json").write_text(json.dumps({"members": MEMBERS}))
    table = PatientTable()
    for number in range(2):
        scores = {"volume_dice": 0.5 + number / 4, "hausdorff95_mm": 3.0, "reference_ml": 5.0, "predicted_ml": 4.0}
        table.add(f"Secret_{number}", dict.fromkeys(BRATS_REGIONS, scores))
    table.write(folder)
    return folder


def load(folder):
    return Sam2UNetVolumePipeline.from_pretrained(folder, device="cpu")


@pytest.fixture(scope="module")
def segment(folder):
    return load(folder)


@pytest.fixture(scope="module")
def found(segment, case):
    """Mean and disagreement of both members by plane, and each member's own probabilities by plane."""
    options = {"return_probabilities": True, "progress": False}
    planes = ["axial", "coronal"]
    singles = [
        Sam2UNetVolumePipeline(*member)(case, planes=[plane], **options).probabilities
        for plane in planes
        for member in zip(segment.ensemble.models, segment.ensemble.processors, strict=True)
    ]
    together = [segment(case, planes=own, return_disagreement=True, **options) for own in (planes[:1], planes)]
    return singles, together


def test_probabilities_are_the_mean_over_members_bit_for_bit(found):
    singles, (axial, both) = found
    assert np.abs(singles[0] - singles[1]).max() > 0.1
    assert np.array_equal(axial.probabilities, np.mean(singles[:2], axis=0))
    np.testing.assert_allclose(both.probabilities, np.mean(singles, axis=0), rtol=0, atol=1e-7)


def test_disagreement_is_the_standard_deviation_of_all_that_is_averaged(found, tmp_path):
    singles, (axial, both) = found
    for segmentation, maps in ((axial, singles[:2]), (both, singles)):
        assert segmentation.disagreement.dtype == np.float32
        expected = np.std(np.asarray(maps, np.float64), axis=0)
        np.testing.assert_allclose(segmentation.disagreement, expected, rtol=0, atol=1e-6)
        assert expected.max() > 0.1
    axial.save_disagreement(tmp_path / "ET.nii.gz", "ET")
    written = nib.load(tmp_path / "ET.nii.gz")
    assert np.array_equal(written.get_fdata(dtype=np.float32), axial.disagreement[2])
    assert np.array_equal(written.affine, axial.scan.affine)


def test_disagreement_is_over_mirror_images_of_every_member_too(tmp_path):
    processor = make_processor(64)
    models = [small_model(seed=seed, regions=BRATS_REGIONS) for seed in (9, 10)]
    voxels = np.random.default_rng(0).integers(1, 999, (64, 64, 1)).astype(np.int16)
    nib.save(nib.Nifti1Image(voxels, np.diag([-1.0, -1, 1, 1])), tmp_path / "scan.nii.gz")
    options = {"flips": True, "return_probabilities": True, "return_disagreement": True, "progress": False}
    for own in (models[:1], models):
        found = Sam2UNetVolumePipeline(own, [processor] * len(own))(tmp_path / "scan.nii.gz", **options)
        image = processor(take_slice(to_grey(found.scan), "axial", 0), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            maps = [
                model(image.flip(axes)).logits.sigmoid().flip(axes)[0].numpy()
                for model in own
                for axes in ((), (2,), (3,), (2, 3))
            ]
        assert len(maps) == 4 * len(own)
        for volumes, expected in ((found.probabilities, np.mean(maps, 0)), (found.disagreement, np.std(maps, 0))):
            np.testing.assert_allclose(volumes[..., 0], expected.transpose(0, 2, 1), atol=1e-5)
        assert found.disagreement.max() > 0.01


def test_one_member_is_the_single_model_bit_for_bit(folder, case, tmp_path):
    (tmp_path / "ensemble.json").write_text('{"members": ["fold_1"]}')
    shutil.copytree(folder / "fold_1", tmp_path / "fold_1")
    options = {"flips": True, "return_probabilities": True, "progress": False}
    one, single = (load(place)(case, **options) for place in (tmp_path, folder / "fold_1"))
    assert np.array_equal(one.probabilities, single.probabilities)
    assert np.array_equal(one.label_map, single.label_map)
    assert one.label_map.any()


def test_a_single_model_that_sees_slices_once_has_no_disagreement(segment, case):
    single = Sam2UNetVolumePipeline(segment.model, segment.processor)
    with pytest.raises(
        ValueError, match="nothing to disagree with. Average over mirror images .* or take an ensemble"
    ):
        single(case, return_disagreement=True)
    found = single(case, progress=False)
    with pytest.raises(ValueError, match="Segment with `return_disagreement=True`"):
        found.save_disagreement("x.nii.gz", "WT")


# What differs in the second member, and what is said of it.
DIFFERENCES = {
    "regions": (
        {"regions": {"WT": [1, 2, 3]}},
        {},
        r"`regions`, got {'WT'.*'ET'.* and {'WT': \[1, 2, 3\]} in member 1",
    ),
    "order of regions": (
        {"regions": dict(reversed(BRATS_REGIONS.items()))},
        {},
        r"`regions`, got {'WT'.* in member 0 and {'ET'.* in member 1. Leave one of them out",
    ),
    "modalities": ({}, {"modalities": ["t2"]}, r"`modalities`, got \['flair'\] in .* and \['t2'\] in member 1"),
    "neighbours": ({}, {"neighbours": 1}, "`neighbours`, got 0 in .* and 1 in member 1"),
    "plane": ({}, {"plane": "coronal"}, "`plane`, got axial in .* and coronal in member 1"),
    "channels": (
        {"backbone_config": small_backbone_config(num_channels=6)},
        {},
        "`num_channels`, got 3 in .* and 6 in",
    ),
}


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_members_that_differ_are_refused(difference):
    of_model, of_processor, message = DIFFERENCES[difference]
    models = [small_model(regions=BRATS_REGIONS), small_model(**{"regions": BRATS_REGIONS, **of_model})]
    processors = [
        make_processor(plane="axial" if difference == "modalities" else None),
        make_processor(**of_processor),
    ]
    with pytest.raises(ValueError, match=message):
        Sam2UNetVolumePipeline(models, processors)
    with pytest.raises(ValueError, match="one image processor per model, .* got 2 models and 1 image processors"):
        Sam2UNetEnsemble(models, processors[:1])


def test_folders_of_members_that_differ_are_named(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "cv")
    make_processor(plane="coronal").save_pretrained(tmp_path / "cv" / "fold_1")
    with pytest.raises(ValueError, match="same `plane`, got axial in fold_0 and coronal in fold_1"):
        load(tmp_path / "cv")


@pytest.mark.parametrize(
    "content", ['{"members": []}', '["fold_0"]', '{"members": ["fold_0", "fold_0"]}', '{"members": ["../fold_0"]}']
)
def test_members_are_distinct_folders_beside_their_list(content, tmp_path):
    (tmp_path / "ensemble.json").write_text(content)
    with pytest.raises(ValueError, match="ensemble.json` must list the folders beside it, each once, such as"):
        load(tmp_path)


def test_what_is_no_ensemble_is_told_from_one_with_the_remedy(folder, tmp_path):
    (tmp_path / "ensemble.json").write_text("{")
    with pytest.raises(ValueError, match="ensemble.json` is no JSON file"):
        load(tmp_path)
    (tmp_path / "ensemble.json").write_text('{"members": ["fold_0", "fold_10"]}')
    with pytest.raises(OSError, match="Member fold_0 of the ensemble .* cannot be loaded"):
        load(tmp_path)
    (tmp_path / "ensemble.json").unlink()
    for name in ("fold_10", "fold_2"):
        shutil.copytree(folder / "fold_0", tmp_path / name)
    with pytest.raises(
        OSError, match=r'fold_2, fold_10 but no ensemble.json, .* \{"members": \["fold_2", "fold_10"\]\}'
    ):
        load(tmp_path)
    shutil.copy(folder / "fold_0" / "config.json", tmp_path)
    shutil.copy(folder / "ensemble.json", tmp_path)
    with pytest.raises(ValueError, match=r"single checkpoint \(config.json\) and an ensemble \(ensemble.json\). Move"):
        load(tmp_path)


def test_command_writes_the_disagreement_of_an_ensemble(folder, found, case, tmp_path, capsys):
    options = ["-o", str(tmp_path), "--device", "cpu", "--dtype", "float32", "--probabilities", "--disagreement"]
    with pytest.raises(SystemExit, match="nothing to disagree with"):
        main([str(folder / "fold_0"), str(case.folder), *options])
    main([str(folder), str(case.folder), *options])
    axial = found[1][0]
    for number, region in enumerate(BRATS_REGIONS):
        for kind, volumes in (("probability", axial.probabilities), ("disagreement", axial.disagreement)):
            written = nib.load(tmp_path / f"{case.case_id}_{region}_{kind}.nii.gz")
            assert np.array_equal(written.get_fdata(dtype=np.float32), volumes[number])
    assert json.loads(capsys.readouterr().out)["volumes_ml"] == pytest.approx(axial.volumes_ml, abs=1e-3)


def test_an_ensemble_has_seen_the_patients_of_all_members(folder):
    both = ["Secret_0", "Secret_1"]
    assert read_splits(folder) == {"train": both, "test": both}
    assert read_splits(folder / "fold_0") == {"train": ["Secret_1"], "test": ["Secret_0"]}


def test_the_page_of_the_app_takes_an_ensemble(folder, found, case, monkeypatch):
    pytest.importorskip("gradio")
    import app

    loaders = []

    def build_page(load, *args):
        loaders.append(load)
        return SimpleNamespace(launch=lambda **kwargs: None)

    monkeypatch.setattr(app, "build_page", build_page)
    monkeypatch.setattr(app, "fast_dtype", lambda device: torch.float32)
    app.main(["--model", str(folder), "--device", "cpu"])
    view = app.segment_case(loaders[0](str(folder)), case, return_probabilities=True)
    assert np.array_equal(view.segmentation.probabilities, found[1][0].probabilities)


def test_the_error_report_scores_the_mean_of_an_ensemble(folder):
    rows = ImageRows(make_slices({"a": [3, 4]}, size=(80, 70), tumour={("a", 4)}), ["flair"])
    ensemble = error_analysis.load_model(error_analysis.AnalysisArguments(model=str(folder), device="cpu"))
    parts = [ensemble, *map(Sam2UNetEnsemble, ensemble.models, ensemble.processors)]
    transform = SegmentationTransform(ensemble.processors[0], resize_masks=False)
    together, *singles = ([image[2] for image in Analysis(part, rows, transform).read([0, 1], 2)] for part in parts)
    assert len(together) == 2
    for mean, own in zip(together, zip(*singles, strict=True), strict=True):
        assert np.array_equal(mean, np.mean(own, axis=0))
        assert not np.array_equal(*own)


PUSH = """
import json, sys
from pathlib import Path
from sam2unet_hf import Sam2UNetForSemanticSegmentation
from sam2unet_hf.hub import main

folder, repo = sys.argv[1:]

def push():
    try:
        main(["ensemble", folder, repo, "--private"])
    except SystemExit as done:
        if done.code:
            raise

push()
# Pushed again with one member less and no clean-up, and then a single model in its place.
Path(folder, "clean_up.json").unlink()
Path(folder, "ensemble.json").write_text(json.dumps({"members": ["fold_1"], "note": "of Secret_0"}))
push()
Sam2UNetForSemanticSegmentation.from_pretrained(f"{folder}/fold_0").push_to_hub(repo)
"""

SEGMENT = """
import json, sys

sys.modules["sam2unet_hf"] = None  # an import of it fails, installed or not

import numpy as np
from transformers import AutoModelForSemanticSegmentation
from transformers.dynamic_module_utils import get_class_from_dynamic_module

repo, revision, folder, output = sys.argv[1:]
pipeline_class = get_class_from_dynamic_module("volume_sam2unet.Sam2UNetVolumePipeline", repo, revision=revision)
segment = pipeline_class.from_pretrained(repo, device="cpu", revision=revision)
options = {"planes": ["axial", "coronal"], "return_probabilities": True, "return_disagreement": True}
found = segment(folder, progress=False, **options)
np.savez(output, label_map=found.label_map, probabilities=found.probabilities, disagreement=found.disagreement)
options = {"subfolder": "fold_1", "revision": revision, "trust_remote_code": True}
member = AutoModelForSemanticSegmentation.from_pretrained(repo, **options)
assert all((own == other).all() for own, other in zip(member.parameters(), segment.ensemble.models[1].parameters()))
"""

SEGMENT_WITH_PACKAGE = """
import sys

import numpy as np
from sam2unet_hf.volume import Sam2UNetVolumePipeline

repo, revision, folder, output = sys.argv[1:]
segment = Sam2UNetVolumePipeline.from_pretrained(repo, device="cpu", revision=revision)
np.savez(output, label_map=segment(folder, progress=False, planes=["axial", "coronal"]).label_map)
"""


RULES = {"WT": RegionRule(threshold=0.6, min_component_ml=0.5), "ET": RegionRule()}


def test_a_pushed_ensemble_loads_elsewhere_and_gives_equal_volumes(folder, segment, found, case, tmp_path):
    copy = tmp_path / "cv"
    shutil.copytree(folder, copy)
    values = {"WT": (0.8, 3.25, 0.85, 0.5), "ET": (0.5, 1, 0.4, 0)}
    gains = {region: dict(zip(GAIN_VALUES, own, strict=True)) for region, own in values.items()}
    rules = CleanUp(RULES, {"chosen_on": "2 patients in 2 folds", "patients_of_other_folds": gains})
    rules.save(copy)
    with LoopbackHub() as hub:

        def run(code, *arguments, **variables):
            environment = hub.environment(tmp_path / "hf_home", "hf_write") | variables
            done = forks.run(["-c", code, *arguments], cwd=tmp_path, env=environment)
            assert done.returncode == 0, done.stderr

        run(PUSH, copy, REPO, PYTHONPATH=str(forks.ROOT))
        third, second, first = [commit.sha for commit in hub.commits("models", REPO)][:3]
        of_member = ["config.json", "model.safetensors", "preprocessor_config.json", *CODE]
        at_top = ["README.md", "ensemble.json", *CODE]
        expected = {*at_top, "clean_up.json", *(f"{member}/{name}" for member in MEMBERS for name in of_member)}
        files = set(hub.files("models", REPO, first)) - {".gitattributes"}
        assert files == expected
        assert hub.repos["models", REPO].private
        for name in files:
            content = hub.file("models", REPO, name, first)
            assert b"Secret" not in content, name
            assert str(tmp_path).encode() not in content, name
        files = set(hub.files("models", REPO, second)) - {".gitattributes"}
        assert files == {*at_top, *(f"fold_1/{name}" for name in of_member)}
        assert json.loads(hub.file("models", REPO, "ensemble.json", second)) == {"members": ["fold_1"]}
        files = hub.files("models", REPO, third)
        assert "config.json" in files
        assert "ensemble.json" not in files

        assert json.loads(hub.file("models", REPO, "clean_up.json", first))["patients_of_other_folds"] == gains
        text = hub.file("models", REPO, "README.md", first).decode()
        facts = ModelCard(text).data.to_dict()
        assert (facts["license"], facts["inference"]) == ("cc-by-nc-4.0", False)
        assert "widget" not in facts
        assert "Ensemble of 2 SAM2-UNets that segment WT, TC, ET" in text
        assert f'checkpoint = "{REPO}"' in text
        assert "2 patients, each scored as a whole, by the member that was not trained on this patient" in text
        assert "| WT | Dice | 0.625 | 0.177 | 0.625 | 0.500 |" in text
        assert "| 1 | WT | 0.750 | 3.0 | 5.0 | 4.0 |" in text
        assert "| `seed` | 1 |" in text
        assert "training time" not in text  # the members differ in it
        assert "No results are recorded" not in text
        assert "The rules\nwere chosen on 2 patients in 2 folds." in text
        rows = [
            "WT | 0.6 | 0.5 | 0 | 0.800 | 3.2 | 0.850 | 0.5",
            "ET | 0.5 | 0 | 0 | 0.500 | 1.0 | 0.400 | 0.0",
        ]
        assert all(f"| {row} |\n" in text for row in rows)
        assert "### Clean-up" not in hub.file("models", REPO, "README.md", second).decode()

        both = found[1][1]
        masks = rules.apply(both.probabilities, both.regions, both.scan.spacing_mm)
        cleaned = make_label_map(both.probabilities, segment.processor, 0, masks)
        assert not np.array_equal(cleaned, both.label_map)
        run(SEGMENT, REPO, first, case.folder, tmp_path / "found.npz")
        there = np.load(tmp_path / "found.npz")
        for name in ("probabilities", "disagreement"):
            assert np.array_equal(there[name], getattr(both, name)), name
        assert np.array_equal(there["label_map"], cleaned)
        # From the cache, by the package.
        variables = {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(forks.ROOT)}
        run(SEGMENT_WITH_PACKAGE, REPO, first, case.folder, tmp_path / "again.npz", **variables)
        assert np.array_equal(np.load(tmp_path / "again.npz")["label_map"], cleaned)
        assert hub.unknown_requests == []


def test_what_cannot_be_loaded_elsewhere_is_not_pushed(folder, tmp_path):
    with pytest.raises(FileNotFoundError, match="fold_0 holds no ensemble: there is no ensemble.json in it"):
        push_ensemble(folder / "fold_0", REPO)
    shutil.copytree(folder, tmp_path / "cv")
    config = json.loads((tmp_path / "cv" / "fold_1" / "config.json").read_text())
    config |= {"encoder_source": "/data/sam2", "encoder_sha256": "0" * 64}
    (tmp_path / "cv" / "fold_1" / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="fold_1 leaves out its encoder, which comes from /data/sam2 on this machine"):
        push_ensemble(tmp_path / "cv", REPO)
    CleanUp({"cavity": RegionRule()}).save(tmp_path / "cv")
    (tmp_path / "cv" / "fold_1" / "config.json").write_bytes((folder / "fold_1" / "config.json").read_bytes())
    with pytest.raises(ValueError, match=r"cv/clean_up.json` has rules for \['cavity'\]"):
        push_ensemble(tmp_path / "cv", REPO)
    (tmp_path / "cv" / "fold_0" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"fold_0 lacks model.safetensors. Finish its training"):
        push_ensemble(tmp_path / "cv", REPO)
