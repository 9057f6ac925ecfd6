"""Model cards: rendered from a run's files, validated by the Hub, and pushed with what they show and no more."""

import json
import re
from pathlib import Path

import forks
import numpy as np
import pytest
import torch
import yaml
from common import BRATS_REGIONS, CODE, small_backbone_config, small_model
from datasets import Dataset, load_from_disk
from huggingface_hub import ModelCard
from huggingface_hub.repocard_data import eval_results_to_model_index, model_index_to_eval_results
from loopback_hub import LoopbackHub, read_card
from PIL import Image
from transformers import TrainingArguments

from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetConfig, Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.card_scores import eval_results
from sam2unet_hf.clean_up_sam2unet import CleanUp, RegionRule
from sam2unet_hf.hub import CHECKPOINT_FILES, files_to_push, have_equal_weights, main
from sam2unet_hf.metrics.functional import METRICS
from sam2unet_hf.model_card import (
    METRIC_TITLES,
    append_checksum,
    counted,
    has_valid_checksum,
    parse_score,
    render_model_card,
    write_model_card,
)
from sam2unet_hf.patient_table import COLUMN_TITLES, WORST, PatientTable, score_patient
from sam2unet_hf.training import ImageRows, Sam2UNetTrainer, SegmentationMetrics, SegmentationTransform
from sam2unet_hf.training.augmentation import augmentation
from sam2unet_hf.training.run_record import dataset_revision


ROOT = Path(__file__).parent.parent


@pytest.fixture
def folder(tmp_path):
    """A checkpoint folder of nothing but a checkpoint."""
    folder = tmp_path / "tumor_model"
    model = small_model(regions=BRATS_REGIONS)
    model.save_pretrained(folder)
    Sam2UNetImageProcessor(regions=BRATS_REGIONS, size={"height": 96, "width": 64}).save_pretrained(folder)
    return folder


def add_run(folder, **fields):
    scores = dict(enumerate(SegmentationMetrics(list(BRATS_REGIONS)).names()))
    results = {
        split: {name: (i + shift) / 200 for i, name in scores.items()}
        for split, shift in (("validation", 0), ("test", 9))
    }
    info = {
        "license": "cc-by-nc-4.0",
        "tags": ["mri"],
        "dataset": {"id": "tester/slices", "name": "Our slices", "citation": "Somebody 2020"},
        "data": {"training images": 12},
        "recipe": {"`learning_rate`": 3e-4, "checkpoint": "step 5, the best `dice`"},
        "results": results,
        "zero_division": 1.0,
        **fields,
    }
    (folder / "training_info.json").write_text(json.dumps(info))
    for name in ("predictions.png", "training_curve.png"):
        (folder / name).write_bytes(b"picture")
    return info


# Rendering


def test_the_card_of_a_bare_checkpoint_claims_nothing_of_a_run(folder):
    text = render_model_card(folder)
    assert ModelCard(text).data.to_dict() == {
        "library_name": "transformers",
        "pipeline_tag": "image-segmentation",
        "tags": ["sam2-unet", "sam2", "hiera", "unet"],
    }
    for absent in ("## Training", "## Results", "license:", "None", "base_model", "!["):
        assert absent not in text, absent
    assert text.count("# tumor_model\n") == 1
    assert "| TC (tumour core) | 1, 3 |" in text
    assert "| 2 | WT without TC |" in text
    assert "resized to 96 x 64 (height x width)" in text
    assert "No results are recorded with this checkpoint" in text
    assert "must not be used for diagnosis" in text
    for paper in ("2408.08870", "10.3390/app15063267"):
        assert paper in text
    assert not re.search(r"\n{3,}", text)
    assert "{{" not in text.replace("{{SAM2", "")


def test_the_card_says_what_the_model_sees_of_slices(tmp_path):
    backbone_config = small_backbone_config(num_channels=6)
    small_model(backbone_config=backbone_config).save_pretrained(tmp_path)
    text = " ".join(render_model_card(tmp_path).split())
    assert "The model takes 6 channels; a grey image is repeated" in text
    assert "volume-segmentation" not in text
    options = {"num_channels": 6, "neighbours": 1, "modalities": ["flair", "t1ce"]}
    Sam2UNetImageProcessor(head_crop_size={"height": 160, "width": 192}, **options).save_pretrained(tmp_path)
    text = " ".join(render_model_card(tmp_path).split())
    assert "cropped to a window of 160 x 192 pixels (height x width) about the head" in text
    assert "enlarged" not in text
    assert 'pipe = pipeline("volume-segmentation", model="path/to/this/folder", trust_remote_code=True)' in text
    assert 'a folder of scans, or {"flair": "scan.nii.gz", ...}' in text
    processor = Sam2UNetImageProcessor(head_crop_size={"height": 160, "width": 192}, head_crop_scale=2, **options)
    processor.save_pretrained(tmp_path)
    assert "the window is enlarged 2 times, and nothing is found" in " ".join(render_model_card(tmp_path).split())
    assert "takes 6 channels: flair, t1ce, each as 3 adjacent slices from the lowest to the highest; a grey" in text
    assert "does not use the slices around them but for 1 on each side, and" in text
    assert "resized to" not in text


def test_the_card_of_a_run_says_what_its_files_say(folder):
    info = add_run(folder)
    text = render_model_card(folder, "tester/tumor", tags=["extra"])
    data = ModelCard(text).data
    assert (data.license, data.datasets, data.model_name) == ("cc-by-nc-4.0", ["tester/slices"], "tumor")
    assert data.tags[-2:] == ["mri", "extra"]
    assert data.metrics == list(METRIC_TITLES)
    assert set(METRIC_TITLES) == set(METRICS)
    expected = info["results"]["test"]
    found = {(r.metric_type, r.metric_name.partition(", ")[2]): r.metric_value for r in data.eval_results}
    assert len(found) == len(data.eval_results) == len(expected)
    for name, value in expected.items():
        region = next((region for region in BRATS_REGIONS if name.endswith(f"_{region}")), "")
        assert found[name.removesuffix(f"_{region}"), region] == value
    assert {(r.dataset_split, r.dataset_type, r.dataset_name) for r in data.eval_results} == {
        ("test", "tester/slices", "Our slices")
    }
    assert 'checkpoint = "tester/tumor"' in text
    assert f"| Dice, TC | {expected['dice_TC']:.3f} | {expected['mean_dice_TC']:.3f} |" in text
    assert f"| mean absolute error | {info['results']['validation']['mae']:.3f} |" in text
    assert "On the validation split, which also chose the checkpoint:" in text
    assert "| `learning_rate` | 0.0003 |" in text
    assert "Somebody 2020" in text
    assert "The weights are licensed under cc-by-nc-4.0." in text
    assert not re.search(r"\n{3,}", text)


def test_the_table_of_patients_names_none(folder):
    add_run(folder)
    table = PatientTable()
    for name, dice in (("Patient Doe", 0.5), ("Patient Roe", 0.9)):
        scores = {"volume_dice": dice, "hausdorff95_mm": 12.34, "reference_ml": 5, "predicted_ml": 4.5}
        table.add(name, {"WT": scores, "ET": {**scores, "volume_dice": dice / 2}})
    table.write(folder, "test_patients")
    write_model_card(folder)
    text = (folder / "README.md").read_text()
    assert "### Patients of the test split\n\n2 patients, each scored as a whole:" in text
    assert "| WT | Dice | 0.700 | 0.283 | 0.700 | 0.500 |" in text
    assert "| ET | 95 % Hausdorff distance (mm) | 12.3 | 0.0 | 12.3 | 12.3 |" in text
    assert "| 1 | WT | 0.900 | 12.3 | 5.0 | 4.5 |\n| 1 | ET | 0.450 | 12.3 | 5.0 | 4.5 |\n| 2 | WT |" in text
    assert not re.search(r"\n{3,}", text)
    (folder / "splits.json").write_text('{"train": ["Patient Doe"]}')
    files = [path.name for pattern in files_to_push(folder) for path in folder.glob(pattern)]
    assert "README.md" in files
    for name in files:
        assert b"Patient Doe" not in (folder / name).read_bytes(), name
    many = PatientTable()
    for number in range(101):
        many.add(str(number), {"WT": {"volume_dice": 0.5, "reference_pixels": 70, "predicted_pixels": 0}})
    many.write(folder, "test_dir_patients")
    text = render_model_card(folder)
    assert "### Patients of the second cohort\n\n101 patients" in text
    assert "reference (pixels)" not in text
    assert not re.search(r"\n{3,}", text)
    # Who reads what was not tested must not be told less than there is above.
    assert "and for one second cohort. They tell of no further" in text
    assert "were not tested" not in text.split("## Limits")[1]
    (folder / "test_dir_patients.json").unlink()
    assert "preprocessings were not tested" in render_model_card(folder).replace("\n  ", " ")


def test_scores_of_patients_are_in_the_front_matter_apart_from_those_of_images(folder):
    revision = "0123456789" * 4
    dataset = {"id": "tester/slices", "name": "Our slices", "revision": revision}
    info = add_run(folder, dataset=dataset, data={"configuration": "axial"})
    table = PatientTable()
    for patient, dice in (("a", 0.1), ("b", 0.2), ("c", 0.4)):
        for_region = {"volume_dice": dice, "hausdorff95_mm": 10 * dice, "reference_ml": 5, "predicted_ml": 4.5}
        table.add(patient, {"WT": for_region, "ET": {**for_region, "volume_dice": dice / 3}})
    table.write(folder, "test_patients")
    table.write(folder, "test_dir_patients")  # of other data, which have no name
    text = render_model_card(folder)
    assert read_card(text) == (yaml.safe_load(text.split("---")[1]), [], [])
    results = ModelCard(text).data.eval_results
    assert model_index_to_eval_results(eval_results_to_model_index("a", results)) == ("a", results)
    place = {(r.task_type, r.dataset_type, r.dataset_config, r.dataset_split, r.dataset_revision) for r in results}
    assert place == {("image-segmentation", "tester/slices", "axial", "test", revision)}
    of_patients = {(r.metric_type, r.metric_name): r.metric_value for r in results[len(info["results"]["test"]) :]}
    summary = table.summary()
    assert of_patients == {
        (column, f"{title}, {region}, mean over 3 patients"): summary[region][column]["mean"]
        for region in ("WT", "ET")
        for column, title in (("volume_dice", "Dice"), ("hausdorff95_mm", "95 % Hausdorff distance (mm)"))
    }
    assert len({(r.metric_type, r.metric_name) for r in results}) == len(results)

    # Of an ensemble there are patients out of fold alone, which belong to no split.
    table.write(folder)
    of_ensemble = {"dataset": dataset, "results": {}}
    found = eval_results(of_ensemble, ["WT", "ET"], {"patients.json": folder / "patients.json"})
    assert [r.metric_name for r in found][:1] == ["Dice, WT, mean over 3 patients out of fold"]
    assert {(r.dataset_split, r.metric_value) for r in found if r.metric_type == "volume_dice"} == {
        (None, summary[region]["volume_dice"]["mean"]) for region in ("WT", "ET")
    }
    # Without scores of images those of the test patients go before those of the validation patients.
    files = {f"{split}_patients.json": folder / "test_patients.json" for split in ("validation", "test")}
    assert {r.dataset_split for r in eval_results(of_ensemble, ["WT"], files)} == {"test"}
    assert eval_results({"dataset": {}}, ["WT"], files) == []
    assert eval_results({"dataset": dataset}, ["WT"], {}) == []


def test_the_commit_of_a_data_set_is_known_from_where_it_was_loaded(tmp_path):
    rows = Dataset.from_dict({"image": [Image.new("L", (9, 9))], "mask": [Image.new("L", (9, 9))]})
    assert dataset_revision(rows, "tester/slices") is None
    for commit, expected in (("ab" * 20, "ab" * 20), ("ab" * 8, None)):  # of the Hub, and of a folder
        rows.save_to_disk(tmp_path / commit)
        loaded = load_from_disk(tmp_path / commit)
        assert dataset_revision(ImageRows(loaded), "tester/slices") == expected
        assert dataset_revision(loaded, None) is None


def test_the_card_names_the_rules_of_the_clean_up(folder):
    assert "### Clean-up" not in render_model_card(folder)
    CleanUp({"WT": RegionRule(0.4, 0.5), "ET": RegionRule(min_region_ml=0.25)}).save(folder)
    text = render_model_card(folder)
    assert (
        "| smallest region (ml) |\n| --- | ---: | ---: | ---: |\n| WT | 0.4 | 0.5 | 0 |\n| ET | 0.5 | 0 | 0.25 |\n"
        in text
    )
    assert "Dice before" not in text
    assert not re.search(r"\n{3,}", text)
    CleanUp({"cavity": RegionRule()}).save(folder)
    with pytest.raises(ValueError, match=r"clean_up.json` has rules for \['cavity'\], the model segments"):
        render_model_card(folder)


def test_the_card_has_all_metrics_in_the_summary_and_few_of_each_patient(folder):
    add_run(folder)
    table = PatientTable()
    masks = np.zeros((2, 5, 5, 5), np.uint8)
    masks[:, 1:4, 1:4, 1:4], masks[1, 1, 1, 1] = 3, 0
    table.add("Patient Poe", score_patient(*masks, {"ET": [3]}, (1, 1, 1)))
    table.write(folder, "validation_patients")
    text = render_model_card(folder)
    section = text[text.index("### Patients of the validation split") : text.index("</details>")]
    summary, note, listed = re.split(r"(?=\nNSD, the normalised surface distance, is)|(?=<details>)", section)
    assert summary.startswith("### Patients of the validation split\n\n1 patient, each scored as a whole:\n")
    assert "counts as 0, or as a distance of 373.1 mm." in note
    titles = [title for name, title in COLUMN_TITLES.items() if name in WORST]
    assert re.findall(r"^\| ET \| (.+?) \|", summary, re.MULTILINE) == titles
    assert "| ET | Dice | 0.981 |  | 0.981 | 0.981 |\n" in summary
    assert "| ET | NSD at 1 mm | 1.000 |  | 1.000 | 1.000 |\n" in summary
    assert "| ET | lesion-wise 95 % Hausdorff distance, pooled (mm) | 0.0 |" in summary
    assert "| patient | region | Dice | 95 % Hausdorff distance (mm) | reference (ml) | predicted (ml) |\n" in listed
    assert "\n| 1 | ET | 0.981 | 0.0 | 0.0 | 0.0 |\n" in listed
    assert not re.search(r"\n{3,}", text)


@pytest.mark.parametrize("shared", [False, True])
def test_pictures_of_the_data_are_shown_only_if_they_may_be_shared(folder, shared):
    add_run(folder, share_predictions=shared)
    write_model_card(folder)
    text = (folder / "README.md").read_text()
    assert "(training_curve.png)" in text
    assert ("(predictions.png)" in text) == shared
    assert ("predictions.png" in files_to_push(folder)) == shared


def test_paths_of_this_machine_are_not_in_the_card(folder, tmp_path):
    add_run(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "encoder_source": str(tmp_path / "secret" / "sam2.pt")}))
    text = render_model_card(folder)
    assert "secret" not in text
    assert "base_model" not in text
    add_run(folder, finetuned_from="tester/start")
    assert ModelCard(render_model_card(folder)).data.base_model == "tester/start"


def test_an_undefined_score_is_no_number_of_the_front_matter(folder):
    info = add_run(folder)
    info["results"]["test"]["dice_ET"] = float("nan")
    (folder / "training_info.json").write_text(json.dumps(info))
    text = render_model_card(folder)
    assert "Dice, ET" not in [result.metric_name for result in ModelCard(text).data.eval_results]
    assert "| Dice, ET | undefined |" in text


def test_every_score_of_the_trainer_is_understood():
    regions = ["WT", "dice", "a_b", "b"]
    for name in SegmentationMetrics(regions).names():
        kind, measure, region = parse_score(name, regions)
        assert "_".join(filter(None, (kind, measure, region))) == name
    assert parse_score("runtime", regions) is None
    assert parse_score("dice_WT", ["WT"]) is None


def test_the_command_line_writes_the_card(folder, capsys):
    with pytest.raises(SystemExit) as exit_info:
        main(["card", str(folder), "--repo_id", "tester/tumor"])
    assert exit_info.value.code == 0
    assert 'checkpoint = "tester/tumor"' in (folder / "README.md").read_text()
    # Once more, for another place; but not over what somebody wrote.
    write_model_card(folder)
    assert "tester/tumor" not in (folder / "README.md").read_text()
    edited = (folder / "README.md").read_text().replace("# tumor_model", "# My model")
    (folder / "README.md").write_text(edited)
    (folder / "empty").mkdir()
    for argument, message in (
        (folder, "was edited. Move it away"),
        (folder / "empty", "there is no config.json in it"),
    ):
        with pytest.raises(SystemExit) as exit_info:
            main(["card", str(argument)])
        assert exit_info.value.code == 2
        assert message in capsys.readouterr().err
    assert (folder / "README.md").read_text() == edited


def test_an_edit_is_seen_wherever_it_is(folder):
    text = render_model_card(folder)
    assert has_valid_checksum(text)
    for edited in (text.replace("unet", "u-net", 1), text + "more\n", text.rpartition("<!--")[0], "", "# Mine\n"):
        assert not has_valid_checksum(edited)


def test_the_top_level_file_is_the_template_of_the_package():
    assert (ROOT / "model_card.md").read_text() == (ROOT / "sam2unet_hf" / "model_card.md").read_text()


def test_what_is_shared_is_what_a_checkpoint_writes(folder):
    small_model(regions=BRATS_REGIONS).save_pretrained(folder / "shards", max_shard_size="300KB")
    for path in [*folder.glob("*.*"), *(folder / "shards").iterdir()]:
        assert any(path.match(pattern) for pattern in CHECKPOINT_FILES), path
    assert set(CODE) == {path.name for path in folder.glob("*.py")}


def test_checkpoints_are_compared(folder, tmp_path):
    model = Sam2UNetForSemanticSegmentation.from_pretrained(folder)
    model.save_pretrained(tmp_path / "same", max_shard_size="300KB")
    assert have_equal_weights(tmp_path / "same", folder)
    part = {name: value for name, value in model.state_dict().items() if not name.startswith("decode_head.up")}
    model.save_pretrained(tmp_path / "part", state_dict=part)
    assert not have_equal_weights(tmp_path / "part", folder)
    with torch.no_grad():
        model.decode_head.classifier.bias[0] += 1e-6
    model.save_pretrained(tmp_path / "other")
    assert not have_equal_weights(tmp_path / "other", folder)
    assert not have_equal_weights(tmp_path / "other", tmp_path / "nowhere")
    config = json.loads((folder / "config.json").read_text())
    regions = [["a", ids] for _, ids in config["regions"][:1]] + config["regions"][1:]
    (tmp_path / "same" / "config.json").write_text(json.dumps({**config, "regions": regions}))
    assert not have_equal_weights(tmp_path / "same", folder)


def trainer_of(tmp_path, **kwargs):
    rows = Dataset.from_dict({"image": [Image.new("L", (64, 64), 9)], "mask": [Image.new("L", (64, 64), 1)]})
    processor = Sam2UNetImageProcessor(size={"height": 64, "width": 64})
    arguments = {"use_cpu": True, "report_to": "none", "disable_tqdm": True, "num_train_epochs": 1, **kwargs}
    args = TrainingArguments(tmp_path / "run", remove_unused_columns=False, **arguments)
    train = rows.with_transform(SegmentationTransform(processor, augment=augmentation("flips")))
    rows = rows.with_transform(SegmentationTransform(processor))
    return Sam2UNetTrainer(small_model(), args, train_dataset=train, eval_dataset=rows, processing_class=processor)


def test_the_results_of_a_trainer_are_those_of_what_was_trained(tmp_path):
    trainer = trainer_of(tmp_path, learning_rate=0.1, adam_beta2=0.9, max_grad_norm=0.0)
    before = trainer.evaluate()
    trainer.train()
    trainer.save_model()
    trainer.create_model_card()
    info = json.loads((tmp_path / "run" / "training_info.json").read_text())
    assert info["results"] == {}  # nothing was evaluated since
    assert info["recipe"]["augmentation"] == "RandomHorizontalFlip, RandomVerticalFlip"
    assert info["recipe"]["`adam_beta2`"] == 0.9
    assert info["recipe"]["`max_grad_norm`"] == 0.0
    assert "`fp16`" not in info["recipe"]
    after = trainer.evaluate()
    assert after["eval_mae"] != before["eval_mae"]
    trainer.evaluate(trainer.train_dataset)
    trainer.evaluate(trainer.train_dataset, metric_key_prefix="test")
    trainer.create_model_card(finetuned_from=str(tmp_path), license="mit", dataset="Ours")
    info = json.loads((tmp_path / "run" / "training_info.json").read_text())
    assert info["results"]["validation"]["mae"] == after["eval_mae"]
    assert set(info["results"]) == {"validation", "test"}
    assert info["finetuned_from"] is None
    with pytest.raises(TypeError, match="The model card has no licence; it has license, tags, "):
        trainer.create_model_card(licence="mit")
    # `save_model` and `push_to_hub` write it again without these.
    trainer.create_model_card()
    assert json.loads((tmp_path / "run" / "training_info.json").read_text()) == info
    (tmp_path / "run" / "README.md").write_text("# Mine\n")
    trainer.create_model_card()
    assert (tmp_path / "run" / "README.md").read_text() == "# Mine\n"


def run_of(tmp_path, masks, wt_pixels=None, **options):
    """The card of a run on images with these masks, and the facts that it was made from."""
    size = (64, 64)
    data = {"image": [Image.new("L", size, 9)] * len(masks), "mask": [Image.new("L", size, value) for value in masks]}
    rows = Dataset.from_dict(data | ({} if wt_pixels is None else {"wt_pixels": wt_pixels}))
    processor = Sam2UNetImageProcessor({"WT": [1]}, size={"height": 64, "width": 64})
    transform = SegmentationTransform(processor, label_mapping={255: 1})
    rows = ImageRows(rows).with_transform(transform)
    args = TrainingArguments(tmp_path, remove_unused_columns=False, use_cpu=True, report_to="none", disable_tqdm=True)
    trainer = Sam2UNetTrainer(small_model(regions={"WT": [1]}), args, train_dataset=rows, eval_dataset=rows, **options)
    trainer.state.epoch, trainer.state.global_step = 1.0, 1
    trainer.model.save_pretrained(tmp_path)
    trainer.create_model_card()
    info = json.loads((tmp_path / "training_info.json").read_text())
    return " ".join((tmp_path / "README.md").read_text().split()), info


@pytest.mark.parametrize(
    ("masks", "wt_pixels", "expected"),
    [
        ([1, 1], [9, 1], True),
        ([1, 1], [9, 0], False),
        ([1, 255], None, True),  # read from the masks, in which 255 is the foreground
        ([1, 2], None, False),
        ([0, 1], None, False),
    ],
)
def test_the_card_says_that_a_model_was_never_shown_an_empty_image(tmp_path, masks, wt_pixels, expected):
    text, info = run_of(tmp_path, masks, wt_pixels)
    assert info["all_show_foreground"] is expected
    sentence = (
        "Every image that it was trained on shows WT. So it draws one where there is none too, as in most slices"
    )
    assert (sentence in text) == expected


def test_the_card_counts_what_there_was(tmp_path):
    text, info = run_of(tmp_path, [1], batch_norm_images=128)
    assert info["recipe"]["batch norm"] == "statistics estimated anew on 1 training image"
    assert info["recipe"]["trained for"] == "1 epoch, 1 step"
    table = PatientTable()
    table.add("one", {"WT": {"volume_dice": 0.5}})
    table.write(tmp_path, "test_patients")
    assert "\n1 patient, each scored as a whole:" in render_model_card(tmp_path)
    assert [counted(number, "step") for number in (0, 1, 1.0, 1.5, 1_234_567)] == [
        *("0 steps", "1 step", "1 step", "1.5 steps", "1234567 steps")
    ]


# On the Hub


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as hub:
        yield hub
        assert hub.unknown_requests == []


def run(hub, tmp_path, *command, token="hf_write"):
    environment = {**hub.environment(tmp_path / "hf_home", token), "PYTHONPATH": str(ROOT)}
    return forks.run(command, cwd=tmp_path, env=environment)


PUSH = """
import json, sys
import torch
from sam2unet_hf import Sam2UNetForSemanticSegmentation

folder, pushes = sys.argv[1:]
for repo, change in json.loads(pushes):
    model = Sam2UNetForSemanticSegmentation.from_pretrained(folder)
    with torch.no_grad():
        model.decode_head.classifier.bias += change
    model.push_to_hub(repo, tags=["extra"])
"""

VALIDATE = """
import sys
from huggingface_hub import ModelCard

card = ModelCard.load(sys.argv[1])
card.validate()
print(len(card.data.eval_results or []))
"""


def push(hub, tmp_path, folder, *pushes):
    """Push the model of a folder to repositories, with a bias changed by so much."""
    result = run(hub, tmp_path, "-c", PUSH, folder, json.dumps(pushes))
    assert result.returncode == 0, result.stderr


def test_a_pushed_model_takes_the_card_of_its_run_along_unless_it_was_changed(hub, folder, tmp_path):
    add_run(folder, share_predictions=True)
    write_model_card(folder)
    card = render_model_card(folder, "tester/kept", ["extra"])
    hub.create("models", "tester/edited", {"README.md": card.replace("# kept", "# Ours").encode()})
    push(hub, tmp_path, folder, ("tester/kept", 0), ("tester/kept", 1), ("tester/edited", 0))
    changed, first = (commit.sha for commit in hub.commits("models", "tester/kept")[:2])
    assert hub.file("models", "tester/kept", "README.md", first).decode() == card
    assert "## Results" in card
    assert {"predictions.png", "training_curve.png"} <= set(hub.files("models", "tester/kept", first))
    processor = json.loads(hub.file("models", "tester/kept", "preprocessor_config.json", first))
    assert processor["size"] == {"height": 96, "width": 64}
    # Other weights: neither results nor pictures of this run, nor of the one before.
    assert "## Results" not in hub.file("models", "tester/kept", "README.md", changed).decode()
    assert not {"predictions.png", "training_curve.png"} & set(hub.files("models", "tester/kept", changed))
    # What somebody wrote on the Hub stays.
    assert hub.file("models", "tester/edited", "README.md").decode() == card.replace("# kept", "# Ours")
    hub.create("models", "tester/valid", {"README.md": card.encode()})
    result = run(hub, tmp_path, "-c", VALIDATE, "tester/valid")
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == len(SegmentationMetrics(list(BRATS_REGIONS)).names())


PUSH_FROM_SUBFOLDER = """
import sys
from pathlib import Path
from sam2unet_hf import Sam2UNetForSemanticSegmentation

for _ in range(2):
    model = Sam2UNetForSemanticSegmentation.from_pretrained(sys.argv[1], subfolder="tumor_model")
    model.push_to_hub("tester/placed")
    Path(sys.argv[1], "tumor_model", "preprocessor_config.json").unlink(missing_ok=True)
"""


def test_the_image_processor_beside_the_checkpoint_goes_along(hub, folder, tmp_path):
    result = run(hub, tmp_path, "-c", PUSH_FROM_SUBFOLDER, folder.parent)
    assert result.returncode == 0, result.stderr
    # A model without one takes the default, but not over one that is there.
    without, beside = (
        json.loads(hub.file("models", "tester/placed", "preprocessor_config.json", commit.sha))
        for commit in hub.commits("models", "tester/placed")[:2]
    )
    assert beside["size"] == {"height": 96, "width": 64}
    assert without == beside


def test_a_card_that_was_written_by_hand_is_pushed_as_it_is(hub, folder, tmp_path):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# Mine\n")
    push(hub, tmp_path, folder, ("tester/by-hand", 0))
    assert hub.file("models", "tester/by-hand", "README.md") == (folder / "README.md").read_bytes()


REFUSE_CARD = "---\nlicense: my-own\n---\n"


def test_the_validator_of_the_tests_refuses_a_wrong_card(hub, tmp_path):
    # So that the card above passing means something.
    hub.create("models", "tester/wrong", {"README.md": REFUSE_CARD.encode()})
    result = run(hub, tmp_path, "-c", VALIDATE, "tester/wrong")
    assert result.returncode != 0
    assert "license" in result.stderr


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_phantom_cohort(tmp_path_factory.mktemp("cohort") / "brats", num_patients=13, shape=(40, 40, 26))


def fine_tune(hub, cohort, tmp_path, *arguments, token="hf_write"):
    # An older run in the same folder, whose images were shared.
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "README.md").write_text(append_checksum("![](predictions.png)"))
    (tmp_path / "run" / "predictions.png").write_bytes(b"older")
    model = small_model()
    model.save_pretrained(tmp_path / "start")
    Sam2UNetImageProcessor(size={"height": 64, "width": 64}).save_pretrained(tmp_path / "start")
    return run(
        hub, tmp_path, ROOT / "examples" / "run_segmentation.py", "--brats_dir", cohort, "--slices", "12 13",
        "--model_name_or_path", tmp_path / "start", "--use_cpu", "--output_dir", tmp_path / "run", "--push_to_hub",
        "--per_device_train_batch_size", "8", "--augmentation", "flips", "--disable_tqdm", "true", *arguments,
        token=token,
    )  # fmt: skip


def test_a_run_pushes_its_checkpoint_and_card_and_no_image_of_a_patient(hub, cohort, tmp_path):
    result = fine_tune(
        hub, cohort, tmp_path, "--num_train_epochs", "2", "--hub_model_id", "tester/run", "--hub_token", "hf_write",
        "--hub_strategy", "every_save", "--license", "cc-by-nc-4.0", token=None,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    files = set(hub.files("models", "tester/run")) - {".gitattributes"}
    pictures = {"training_curve.png"}
    assert files == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json", *CODE, *pictures}
    assert (tmp_path / "run" / "predictions.png").exists()
    titles = [commit.title for commit in hub.commits("models", "tester/run")]
    assert titles[0] == "End of training"
    assert any(title.startswith("Training in progress") for title in titles)
    assert not any("predictions.png" in commit.files for commit in hub.commits("models", "tester/run"))
    assert not any("README.md" in commit.files for commit in hub.commits("models", "tester/run")[1:])
    every_content = b"".join(path.read_bytes() for path in hub.folder.iterdir())
    for text in [
        result.stdout,
        result.stderr,
        *(path.read_bytes().decode("latin-1") for path in (tmp_path / "run").rglob("*") if path.is_file()),
    ]:
        assert "hf_write" not in text
    assert b"hf_write" not in every_content
    for name in files:
        assert str(tmp_path).encode() not in hub.file("models", "tester/run", name)
    card = ModelCard(hub.file("models", "tester/run", "README.md").decode())
    results = json.loads((tmp_path / "run" / "all_results.json").read_text())
    values = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert values["dice"] == results["test_dice"]
    assert values["weighted_f_beta"] == results["test_weighted_f_beta"]
    assert card.data.license == "cc-by-nc-4.0"
    assert "| `num_train_epochs` | 2.0 |" in card.text
    assert "| `per_device_train_batch_size` | 8 |" in card.text
    assert "| slices | axial, 12 13 |" in card.text
    assert "| augmentation | RandomHorizontalFlip, RandomVerticalFlip |" in card.text
    assert run(hub, tmp_path, "-c", VALIDATE, "tester/run").returncode == 0
    # The checkpoint on the Hub is the one of the run.
    assert (
        hub.file("models", "tester/run", "model.safetensors") == (tmp_path / "run" / "model.safetensors").read_bytes()
    )


def test_a_run_that_may_not_push_ends_before_it_trains(hub, cohort, tmp_path):
    before = len(hub.uploads())
    result = fine_tune(hub, cohort, tmp_path, "--hub_model_id", "stranger/run")
    assert result.returncode != 0
    assert "403 Forbidden" in result.stderr
    assert "Traceback" not in result.stderr
    assert not [*(tmp_path / "run").glob("checkpoint-*")]
    assert len(hub.uploads()) == before


# Cut off

PUSH_SHARDS = """
import sys, time
from sam2unet_hf import Sam2UNetForSemanticSegmentation

time.sleep = lambda seconds: None  # the client waits 23 s in all before it gives up
Sam2UNetForSemanticSegmentation.from_pretrained(sys.argv[1]).push_to_hub("tester/cut", max_shard_size="400KB")
"""


def test_a_push_that_is_cut_off_can_be_repeated(hub, folder, tmp_path):
    before = len(hub.uploads())
    hub.drop_connection_on_lfs_upload(3, times=6)
    result = run(hub, tmp_path, "-c", PUSH_SHARDS, folder)
    assert result.returncode != 0
    assert "hf_write" not in result.stdout + result.stderr
    assert "config.json" not in hub.files("models", "tester/cut")
    stored = [oid for oid, status in hub.uploads()[before:] if status == 200]
    result = run(hub, tmp_path, "-c", PUSH_SHARDS, folder)
    assert result.returncode == 0, result.stderr
    shards = [name for name in hub.files("models", "tester/cut") if name.endswith(".safetensors")]
    assert len(shards) > 3
    # What had arrived is not sent again.
    done = [oid for oid, status in hub.uploads()[before:] if status == 200]
    assert len(done) == len(set(done)) == len(shards)
    assert 0 < len(stored) < len(shards)
    config = Sam2UNetConfig.from_pretrained(folder)
    assert yaml.safe_load(hub.file("models", "tester/cut", "config.json"))["regions"] == [
        [name, ids] for name, ids in config.regions.items()
    ]
