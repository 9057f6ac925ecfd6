"""The fine-tuning script, run as a user runs it on small data."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from common import small_backbone_config, small_model
from datasets import Dataset, DatasetDict
from PIL import Image
from safetensors.torch import save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoImageProcessor, AutoModelForSemanticSegmentation

from dataset_scripts.brats_slices.__main__ import main as write_brats_slices
from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.crop_sam2unet import head_mask
from sam2unet_hf.finetuning import provenance, run_segmentation
from sam2unet_hf.finetuning.case_names import case_names
from sam2unet_hf.finetuning.data_sources import (
    DataArguments,
    describe_split,
    find_columns,
    find_regions,
    load_data,
    make_images,
)
from sam2unet_hf.finetuning.parsing import (
    card_arguments,
    parse_arguments,
    resume_arguments,
)
from sam2unet_hf.finetuning.recipes import PHANTOM, RECIPES
from sam2unet_hf.finetuning.splits import with_all_splits


QUICK = [
    "--use_cpu",
    "--disable_tqdm",
    "true",
    "--per_device_train_batch_size",
    "4",
    "--per_device_eval_batch_size",
    "4",
]


@pytest.fixture(scope="session")
def cohort(tmp_path_factory):
    return write_phantom_cohort(tmp_path_factory.mktemp("cohort") / "brats", num_patients=13, shape=(40, 40, 26))


@pytest.fixture(scope="module")
def few_patients(tmp_path_factory):
    """Five to train on, and one each to validate and test, for runs on many slices of each."""
    return write_phantom_cohort(tmp_path_factory.mktemp("few") / "brats", num_patients=7, shape=(40, 40, 26))


@pytest.fixture
def checkpoint(tmp_path):
    """Return a function that saves a small model to start from."""

    def save(**kwargs):
        model = small_model(**kwargs)
        model.save_pretrained(tmp_path / "start")
        Sam2UNetImageProcessor(regions=model.config.regions, size={"height": 64, "width": 64}).save_pretrained(
            tmp_path / "start"
        )
        return str(tmp_path / "start")

    return save


@pytest.fixture
def pictures(tmp_path):
    """A folder of photographs and masks of 0 and 255, of mixed sizes and suffixes."""
    generator = np.random.default_rng(0)
    for index in range(12):
        height, width = 64 + 3 * index, 80 - index
        mask = np.zeros((height, width), dtype=np.uint8)
        mask[10 : 30 + index, 15:50] = 255
        image = (mask // 2 + generator.integers(0, 99, mask.shape)).astype(np.uint8)
        for name, pixels, suffix in (("images", np.dstack([image] * 3), "jpg"), ("masks", mask, "png")):
            path = tmp_path / "pictures" / name / f"photo_{index:02d}.{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)
    return tmp_path / "pictures"


def test_brats_folder_to_checkpoint_scores_and_pictures(few_patients, checkpoint, tmp_path):
    output_dir = tmp_path / "run"
    results = run_segmentation.main(
        ["--brats_dir", str(few_patients), "--slices", "tumor", "--min_tumor_pixels", "5", "--do_predict"]
        + ["--model_name_or_path", checkpoint(), "--num_train_epochs", "2", "--output_dir", str(output_dir), *QUICK]
        + ["--report_to", "tensorboard"]
    )
    assert results == json.loads((output_dir / "all_results.json").read_text())
    (events,) = (output_dir / "runs").iterdir()
    assert events.name == json.loads((output_dir / "run.json").read_text())["training_arguments"]["run_name"]
    found = EventAccumulator(str(events), size_guidance={"images": 0})
    found.Reload()
    assert [picture.step for picture in found.Images("eval/prediction_1")] == [
        score.step for score in found.Scalars("eval/dice")
    ]
    for split in ("eval", "test"):
        assert found.Scalars(f"{split}/dice")[-1].value == pytest.approx(results[f"{split}_dice"], rel=1e-6)
    for split in ("eval", "test"):
        assert 0 <= results[f"{split}_dice"] <= 1
        assert results[f"{split}_iou"] <= results[f"{split}_dice"]
        assert results[f"{split}_mae_WT"] == results[f"{split}_mae"]
    for name in ("training_curve.png", "predictions.png"):
        with Image.open(output_dir / name) as picture:
            assert min(picture.size) > 300
            assert np.asarray(picture.convert("L")).std() > 10
    predictions = sorted((output_dir / "predictions").glob("*.png"))
    with Image.open(predictions[0]) as prediction:
        assert prediction.size == (40, 40)
    assert predictions[0].name.startswith("Phantom_")

    model = AutoModelForSemanticSegmentation.from_pretrained(output_dir)
    processor = AutoImageProcessor.from_pretrained(output_dir)
    assert processor.regions == model.config.regions == {"WT": [1, 2, 3]}
    assert processor.modalities == ["flair"]
    state = json.loads((output_dir / "trainer_state.json").read_text())
    best = AutoModelForSemanticSegmentation.from_pretrained(output_dir / Path(state["best_model_checkpoint"]).name)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, best.get_parameter(name)), name


def test_modalities_neighbours_and_window_from_scans_to_scores(few_patients, checkpoint, tmp_path):
    """Six channels of the window about the head, in memory and streamed, which are scored again as they were."""
    backbone_config = small_backbone_config(num_channels=6)
    start = Path(checkpoint(backbone_config=backbone_config))
    channels = {"num_channels": 6, "neighbours": 1, "modalities": ["t1ce", "flair"]}
    Sam2UNetImageProcessor(**channels).save_pretrained(start)
    recipe = ["--model_name_or_path", str(start), "--head_crop_size", "auto", "--foreground_share", "0.5", *QUICK]
    recipe += ["--num_train_epochs", "2", "--augmentation", "flips", "rotation", "--metric_for_best_model"]
    recipe += ["patient_dice", "--do_predict"]
    slices = ["--slices", "head"]
    data = tmp_path / "data"
    write_brats_slices(["--brats_dir", str(few_patients), "--output_dir", str(data), *slices])
    results = run_segmentation.main(
        ["--brats_dir", str(few_patients), *slices, *recipe, "--output_dir", str(tmp_path / "scans")]
    )
    assert 0 <= results["test_patient_dice"] <= 1
    processor = AutoImageProcessor.from_pretrained(tmp_path / "scans")
    assert (processor.modalities, processor.neighbours, processor.num_channels) == (["t1ce", "flair"], 1, 6)
    assert processor.head_crop_size == {"height": 64, "width": 64}
    rows = load_data(DataArguments(brats_dir=str(few_patients), slices=["head"]))["train"]
    num_foreground = sum(count > 0 for count in rows["wt_pixels"])
    assert num_foreground < len(rows) / 2
    state = json.loads((tmp_path / "scans" / "trainer_state.json").read_text())
    assert state["max_steps"] == 2 * -(-2 * num_foreground // 4)
    card = (tmp_path / "scans" / "README.md").read_text()
    assert "t1ce, flair" in card
    assert "1 slice below and 1 above" in card
    assert "50% of each epoch" in card
    # Nothing is predicted outside of the head, also where the pictures are written.
    split = load_data(DataArguments(brats_dir=str(few_patients), slices=["head"], modalities=["t1ce", "flair"]))[
        "test"
    ]
    for name, row in zip(case_names(split), split, strict=True):
        with Image.open(tmp_path / "scans" / "predictions" / f"{name}.png") as prediction:
            pixels = torch.from_numpy(np.stack([row["t1ce"], row["flair"]]))
            assert not torch.from_numpy(np.array(prediction))[~head_mask(pixels, (40, 40))].any()

    scores = {name: value for name, value in results.items() if name.startswith("test")}
    again = ["--dataset_name", str(data), "--model_name_or_path", str(tmp_path / "scans"), "--do_train", "false"]
    for number, streaming in enumerate(([], ["--streaming"])):
        options = [*again, *streaming, *QUICK, "--output_dir", str(tmp_path / f"again-{number}")]
        repeated = run_segmentation.main(options)
        assert {name: repeated[name] for name in scores} == scores
    with pytest.raises(SystemExit, match="takes images of 6 channels, the images have 2. Leave out --modalities"):
        run_segmentation.main([*again, "--neighbours", "0", *QUICK, "--output_dir", str(tmp_path / "other")])


def test_pictures_of_mixed_sizes_with_masks_of_0_and_255(pictures, checkpoint, tmp_path, caplog):
    output_dir = tmp_path / "run"
    results = run_segmentation.main(
        ["--dataset_name", str(pictures), "--model_name_or_path", checkpoint(regions={"foreground": [1]})]
        + ["--num_train_epochs", "1", "--do_predict", "--output_dir", str(output_dir), *QUICK]
    )
    assert "taking 255 as the foreground" in caplog.text
    assert "cut it into 9 train, 1 validation, 2 test" in caplog.text
    assert "eval_dice_foreground" in results
    predictions = sorted((output_dir / "predictions").glob("*.png"))
    assert len(predictions) == 2
    for path in predictions:
        source = pictures / "masks" / path.name
        with Image.open(path) as prediction, Image.open(source) as mask:
            assert prediction.size == mask.size
            assert set(np.unique(prediction)) <= {0, 255}


def test_a_resumed_run_ends_as_an_uninterrupted_one(cohort, checkpoint, tmp_path, caplog):
    start = checkpoint()

    def run(output_dir):
        run_segmentation.main(
            ["--brats_dir", str(cohort), "--slices", "12", "--model_name_or_path", start]
            + ["--num_train_epochs", "3", "--save_total_limit", "5", "--output_dir", str(output_dir), *QUICK]
        )
        return AutoModelForSemanticSegmentation.from_pretrained(output_dir).state_dict()

    expected = run(tmp_path / "whole")
    checkpoints = sorted((tmp_path / "whole").glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    assert len(checkpoints) == 3
    (tmp_path / "cut").mkdir()
    shutil.copytree(checkpoints[0], tmp_path / "cut" / checkpoints[0].name)
    caplog.clear()
    resumed = run(tmp_path / "cut")
    assert "Going on with the unfinished run" in caplog.text
    for name, value in expected.items():
        assert torch.equal(value, resumed[name]), name


def test_resuming_what_is_finished_names_what_to_raise_and_writes_nothing(cohort, checkpoint, tmp_path):
    output_dir = tmp_path / "run"
    arguments = ["--brats_dir", str(cohort), "--slices", "12", "--model_name_or_path", checkpoint()]
    arguments += ["--output_dir", str(output_dir), *QUICK]  # nine images, and so three steps an epoch
    run_segmentation.main([*arguments, "--num_train_epochs", "1"])

    def files():
        return {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}

    before = files()
    resume = ["--resume_from_checkpoint", "true", "--learning_rate", "0.01"]
    for asked, steps in ((["--num_train_epochs", "1"], 3), (["--max_steps", "2"], 2)):
        match = (
            f"nothing is left to train after .*checkpoint-3, which is at step 3: {' '.join(asked)} asks for {steps}"
        )
        match += rf"\. Raise {asked[0]} to train further"
        with pytest.raises(SystemExit, match=match):
            run_segmentation.main([*arguments, *resume, *asked])
        assert files() == before
    run_segmentation.main([*arguments, *resume, "--num_train_epochs", "2"])
    assert json.loads((output_dir / "run.json").read_text())["arguments"]["learning_rate"] == 0.01
    assert json.loads((output_dir / "trainer_state.json").read_text())["global_step"] == 6
    # One that was killed before its results were written only lacks these.
    results = (output_dir / "all_results.json").read_bytes()
    (output_dir / "all_results.json").unlink()
    run_segmentation.main([*arguments, *resume, "--num_train_epochs", "2"])
    assert (output_dir / "all_results.json").read_bytes() == results


def test_from_scratch_trains_everything(cohort, tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(
        "sam2unet_hf.configuration_sam2unet.preset_backbone_config",
        lambda preset, num_channels: small_backbone_config(num_channels=num_channels),
    )
    run_segmentation.main(
        ["--brats_dir", str(cohort), "--slices", "12", "--image_size", "64", "--regions", "TC=1,3", "ET=3"]
        + ["--max_steps", "1", "--eval_strategy", "no", "--save_strategy", "no", "--load_best_model_at_end", "false"]
        + ["--iou_over_batch", "true", "--output_dir", str(tmp_path / "run"), *QUICK]
    )
    assert "from scratch" in caplog.text
    config = AutoModelForSemanticSegmentation.from_pretrained(tmp_path / "run").config
    assert config.iou_over_batch
    info = json.loads((tmp_path / "run" / "training_info.json").read_text())
    assert info["recipe"]["loss"].startswith("IoU over the batch and plain BCE")
    assert not config.freeze_encoder
    assert config.regions == {"TC": [1, 3], "ET": [3]}


def test_the_recipe_of_the_paper_is_what_the_paper_says(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model_args, data_args, args = parse_arguments(["--recipe", "paper", "--brats_dir", "BraTS2020"])
    # Table 2 of doi 10.3390/app15063267: epochs, optimiser, learning rate, weight decay, batch and image size.
    assert (args.num_train_epochs, args.learning_rate, args.weight_decay) == (30, 1e-4, 1e-4)
    assert (args.per_device_train_batch_size, args.optim.value) == (1, "adamw_torch_fused")
    assert (model_args.image_size, model_args.head_crop_size) == (352, None)
    assert (data_args.slices, data_args.modalities, data_args.neighbours) == (["95"], ["flair"], None)
    assert (args.lr_scheduler_type.value, args.lr_scheduler_kwargs) == ("cosine_with_min_lr", {"min_lr": 1e-7})
    assert (args.augmentation, args.ema_decay, data_args.foreground_share) == (["flips"], 0, None)
    assert not model_args.iou_over_batch
    assert args.warmup_steps == 0
    assert args.output_dir == "runs/BraTS2020"
    # Images without a recipe have the same defaults.
    *_, plain = parse_arguments(["--dataset_name", "photographs"])
    for name in ("num_train_epochs", "learning_rate", "weight_decay", "augmentation", "metric_for_best_model"):
        assert getattr(plain, name) == getattr(args, name)


def test_scans_are_trained_by_the_recipe_for_volumes_and_options_win(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    model_args, data_args, args = parse_arguments(["--brats_dir", "BraTS2020", "--learning_rate", "0.01"])
    assert data_args.recipe == "volume"
    assert (args.learning_rate, args.per_device_train_batch_size) == (
        0.01,
        RECIPES["volume"]["per_device_train_batch_size"],
    )
    assert (data_args.slices, data_args.neighbours, model_args.head_crop_size) == (["head"], 1, ["auto"])
    assert args.metric_for_best_model == "patient_dice"
    model_args, data_args, args = parse_arguments([])
    assert (data_args.recipe, args.output_dir) == ("volume", "runs/phantom")
    assert args.num_train_epochs == PHANTOM["num_train_epochs"]
    assert parse_arguments(["--image_size", "96"])[0].head_crop_size is None
    model_args, data_args, _ = parse_arguments(["--brats_dir", "BraTS2020", "--model_name_or_path", "mine"])
    assert (model_args.head_crop_size, data_args.neighbours, data_args.slices) == (None, None, ["head"])
    assert parse_arguments(["--dataset_name", "photographs"])[1].recipe is None


@pytest.mark.parametrize(
    ("devices", "options", "expected"),
    [
        ({"cpu", "cuda"}, [], True),
        ({"cuda"}, ["--use_cpu"], False),
        ({"cpu"}, [], False),
        ({"cpu"}, ["--use_cpu"], True),
        ({"cpu", "cuda"}, ["--bf16", "false"], False),
        ({"cpu", "cuda"}, ["--fp16"], False),
        ({"cpu", "cuda"}, ["--recipe", "paper"], False),
        ({"cpu", "cuda"}, ["--dataset_name", "photographs"], False),
    ],
)
def test_volumes_are_trained_in_bfloat16_on_devices_that_have_it(monkeypatch, tmp_path, devices, options, expected):
    monkeypatch.chdir(tmp_path)
    for module in ("arguments", "parsing"):
        monkeypatch.setattr(f"sam2unet_hf.finetuning.{module}.default_device", lambda: "cuda")
    monkeypatch.setattr("sam2unet_hf.finetuning.parsing.has_bfloat16", devices.__contains__)
    workers = {"cuda": 3, "cpu": 0}.get
    monkeypatch.setattr("sam2unet_hf.finetuning.parsing.choose_num_workers", workers)
    *_, args = parse_arguments(options)
    assert args.bf16 is expected
    assert args.dataloader_num_workers == (0 if "--use_cpu" in options else 3)


def test_bfloat16_that_is_asked_for_needs_no_further_option_on_a_cpu(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    *_, args = parse_arguments(["--recipe", "paper", "--bf16"])
    assert (args.bf16, args.use_cpu, args.device.type) == (True, True, "cpu")


@pytest.mark.parametrize(("arguments", "frozen"), [([], True), (["--freeze_encoder", "false"], False)])
def test_going_on_from_a_checkpoint_keeps_its_regions_and_size(checkpoint, arguments, frozen):
    start = checkpoint(regions={"TC": [1, 3], "ET": [3]})
    model_args, data_args, _ = parse_arguments(["--model_name_or_path", start, *arguments])
    model, processor = run_segmentation.load_model(model_args, {"TC": [1, 3], "ET": [3]})
    assert processor.size["height"] == 64
    assert model.config.freeze_encoder == frozen
    with pytest.raises(SystemExit, match="segments .*'TC'.*, not .*'WT'"):
        run_segmentation.load_model(model_args, {"WT": [1, 2, 3]})
    assert not model.config.iou_over_batch
    model_args.image_size, model_args.iou_over_batch = 96, True
    assert run_segmentation.load_model(model_args, {"TC": [1, 3], "ET": [3]})[0].config.iou_over_batch
    assert run_segmentation.load_model(model_args, {"TC": [1, 3], "ET": [3]})[1].size["width"] == 96


def find_checkpoint(*arguments):
    model_args, data_args, args = parse_arguments(["--use_cpu", *arguments])
    values = resume_arguments(model_args, data_args, args)
    record = {"arguments": values, "data": {}, "versions": {}, "git": {}}
    return provenance.find_checkpoint(values, args), record, args


def test_a_finished_run_is_not_overwritten_unasked(tmp_path):
    (tmp_path / "all_results.json").write_text('{"test_dice_TC": 1}')
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions" / "a.png").touch()
    (tmp_path / "checkpoint-7").mkdir()
    (tmp_path / "notes.txt").touch()
    with pytest.raises(SystemExit, match="holds a finished run. Pass --overwrite_output_dir"):
        find_checkpoint("--output_dir", str(tmp_path))
    checkpoint, record, args = find_checkpoint("--output_dir", str(tmp_path), "--overwrite_output_dir")
    assert checkpoint is None
    provenance.start_run(record, args)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.txt", "run.json"]


def test_bad_data_costs_no_older_run(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "all_results.json").write_text("{}")
    arguments = ["--dataset_name", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "run")]
    with pytest.raises(SystemExit, match="--dataset_name .*nowhere: "):
        run_segmentation.main([*arguments, "--overwrite_output_dir"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["all_results.json"]


def test_batches_larger_than_the_data_are_refused_and_cost_no_older_run(pictures, checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "all_results.json").write_text("{}")
    arguments = ["--dataset_name", str(pictures), "--model_name_or_path", checkpoint(regions={"mask": [1]}), *QUICK]
    arguments += ["--output_dir", str(tmp_path / "run"), "--overwrite_output_dir", "--dataloader_drop_last"]
    with pytest.raises(SystemExit, match="leaves nothing to train on: there are 9 training images, and a batch .* 16"):
        run_segmentation.main([*arguments, "--per_device_train_batch_size", "16"])
    with pytest.raises(SystemExit, match="`label_smoothing_factor` must be 0 for SAM2-UNet, .* got 0.1"):
        run_segmentation.main([*arguments, "--label_smoothing_factor", "0.1"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["all_results.json"]


def test_bad_options_cost_no_older_run(pictures, checkpoint, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "all_results.json").write_text("{}")
    arguments = ["--dataset_name", str(pictures), "--model_name_or_path", checkpoint(regions={"mask": [1]}), *QUICK]
    arguments += ["--output_dir", str(tmp_path / "run"), "--overwrite_output_dir"]
    with pytest.raises(SystemExit, match="dicee"):
        run_segmentation.main([*arguments, "--metric_for_best_model", "dicee"])
    with pytest.raises(SystemExit, match="`dataloader_persistent_workers` must be False"):
        run_segmentation.main([*arguments, "--dataloader_num_workers", "1", "--dataloader_persistent_workers", "true"])
    with pytest.raises(SystemExit, match="You need to install `lomo_optim` in order to use LOMO optimizers"):
        run_segmentation.main([*arguments, "--optim", "lomo"])
    with pytest.raises(
        SystemExit, match="`use_liger_kernel` must be False for SAM2-UNet: it has kernels for language"
    ):
        run_segmentation.main([*arguments, "--use_liger_kernel"])
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["all_results.json"]


def test_contrasts_and_plane_go_with_the_checkpoint(cohort, checkpoint, tmp_path, caplog):
    arguments = ["--brats_dir", str(cohort), "--slices", "20", "--model_name_or_path"]
    first = [checkpoint(regions={"WT": [1, 2, 3]}), *QUICK, "--max_steps", "1", "--load_best_model_at_end", "false"]
    scans = ["--modalities", "t1", "--plane", "coronal"]
    run_segmentation.main([*arguments, *first, *scans, "--output_dir", str(tmp_path / "t1")])
    processor = Sam2UNetImageProcessor.from_pretrained(tmp_path / "t1")
    assert (processor.modalities, processor.plane) == (["t1"], "coronal")
    assert "The model is one of" not in caplog.text
    again = [str(tmp_path / "t1"), *QUICK, "--do_train", "false"]
    run_segmentation.main([*arguments, *again, *scans, "--output_dir", str(tmp_path / "same")])
    assert "The model is one of" not in caplog.text
    run_segmentation.main([*arguments, *again, "--output_dir", str(tmp_path / "axial")])
    assert "The model is one of modalities" not in caplog.text
    others = ["--modalities", "flair", "--output_dir", str(tmp_path / "other")]
    with pytest.raises(SystemExit, match="was trained on t1, and is to segment flair. Leave out --modalities"):
        run_segmentation.main([*arguments, *again, *others])
    run_segmentation.main([*arguments, *again, *others, "--allow_other_modalities"])
    assert "The model is one of modalities ['t1'], and sees ['flair'] now (--modalities)." in caplog.text
    assert "The model is one of plane coronal, and sees axial now (--plane)." in caplog.text


def test_a_checkpoint_that_is_named_must_be_complete(tmp_path):
    (tmp_path / "checkpoint-3").mkdir()
    with pytest.raises(SystemExit, match=r"checkpoint-3 is incomplete \(no trainer_state.json\)"):
        find_checkpoint("--resume_from_checkpoint", str(tmp_path / "checkpoint-3"), "--output_dir", str(tmp_path))


def test_checkpoints_must_hold_what_resuming_needs(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--save_only_model"])
    assert "--save_only_model leaves nothing that a run could go on from" in capsys.readouterr().err


def test_an_unfinished_run_goes_on_with_the_same_arguments_alone(tmp_path):
    arguments = ["--output_dir", str(tmp_path), "--slices", "20", "21"]
    checkpoint, record, args = find_checkpoint(*arguments)
    assert checkpoint is None
    provenance.start_run(record, args)
    for step in (7, 14):
        (tmp_path / f"checkpoint-{step}").mkdir()
        for name in ("model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
            writer = save_file if name.endswith("safetensors") else torch.save
            writer({"a": torch.zeros(3)}, tmp_path / f"checkpoint-{step}" / name)
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text('{"global_step": 7}')
    assert find_checkpoint(*arguments)[0] == str(tmp_path / "checkpoint-7")  # the other one is not at its end
    with pytest.raises(SystemExit, match="other values of learning_rate.*--learning_rate 0.001"):
        find_checkpoint(*arguments, "--learning_rate", "0.1")
    with pytest.raises(SystemExit, match="unfinished run with other values of slices.*--slices 20 21"):
        find_checkpoint("--output_dir", str(tmp_path))
    record["arguments"]["augment"] = record["arguments"].pop("augmentation")
    provenance.write_json(tmp_path / provenance.RECORD, record)
    match = (
        "Another version of this package or of transformers began the unfinished run in .*: only one of the two has "
        "the arguments augment, augmentation. Pass --overwrite_output_dir or another --output_dir"
    )
    with pytest.raises(SystemExit, match=match):
        find_checkpoint(*arguments, "--learning_rate", "0.1")
    assert find_checkpoint(*arguments, "--overwrite_output_dir")[0] is None


@pytest.mark.parametrize(
    ("arguments", "name", "value"),
    [
        ([], "lr_scheduler_kwargs", {"min_lr": 1e-7}),
        (["--lr_scheduler_type", "linear"], "lr_scheduler_kwargs", None),
        ([], "greater_is_better", True),
        (["--metric_for_best_model", "mae_WT"], "greater_is_better", False),
        (["--metric_for_best_model", "patient_missed_ml_WT"], "greater_is_better", False),
        (["--metric_for_best_model", "patient_dice"], "greater_is_better", True),
        (["--metric_for_best_model", "loss"], "greater_is_better", False),
        (["--do_train", "false", "--model_name_or_path", "x"], "output_dir", "runs/phantom-evaluation"),
    ],
)
def test_training_arguments_fit_each_other(arguments, name, value, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert getattr(parse_arguments(arguments)[2], name) == value


def test_case_names_are_names_of_files():
    rows = Dataset.from_dict({"case_id": ["../../etc/passwd", "a", "a", "b c"]})
    assert case_names(rows) == ["_.._etc_passwd", "a_row00001", "a_row00002", "b_c"]
    rows = Dataset.from_dict({"case_id": ["a", "a"], "slice_index": [3, 40]})
    assert case_names(rows) == ["a_003", "a_040"]


def test_brats_label_4_is_refused():
    rows = DatasetDict({"train": Dataset.from_dict({"image": [], "mask": [], "wt_pixels": []})})
    with pytest.raises(SystemExit, match=r"Region ET has the label ids \[4\].*BraTS' label 4 is 3 here"):
        find_regions(rows, ["image"], "mask", {"WT": [1, 2, 3], "ET": [4]})


def test_fourth_label_is_a_region_where_the_task_has_it():
    rows = {"image": [None], "mask": [None], "wt_pixels": [1]}
    treated = DatasetDict({"train": Dataset.from_dict({**rows, "case_id": ["BraTS-GLI-00005-100"]})})
    with_cavity = {"WT": [1, 2, 3], "RC": [4]}
    assert find_regions(treated, ["image"], "mask", with_cavity)[0] == with_cavity
    assert find_regions(treated, ["image"], "mask", None)[0] == {"WT": [1, 2, 3]}
    children = DatasetDict({"train": Dataset.from_dict({**rows, "case_id": ["BraTS-PED-00001-000"]})})
    assert find_regions(children, ["image"], "mask", None)[0] == {"WT": [1, 2, 3, 4]}  # with the cysts
    renamed = DatasetDict({"train": Dataset.from_dict({**rows, "case_id": ["Site_7"]})})
    with pytest.raises(SystemExit, match=r"Region RC has the label ids \[4\].*BraTS' label 4 is 3 here"):
        find_regions(renamed, ["image"], "mask", with_cavity)
    assert find_regions(renamed, ["image"], "mask", with_cavity, "gli2024")[0] == with_cavity


@pytest.mark.parametrize("layout", ["{split}/{kind}", "{kind}/{split}"])
def test_folders_of_splits(pictures, layout):
    for number, split in enumerate(("train", "val", "test")):
        for kind in ("images", "masks"):
            target = pictures / "sorted" / layout.format(split=split, kind=kind)
            target.mkdir(parents=True)
            for path in sorted((pictures / kind).glob("photo_*"))[number::3]:
                shutil.copy(path, target)
    data = load_data(DataArguments(dataset_name=str(pictures / "sorted")))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 4, "validation": 4, "test": 4}
    assert data["validation"]["case_id"] == ["photo_01", "photo_04", "photo_07", "photo_10"]
    assert data["test"][0]["mask"].size == data["test"][0]["image"].size


def test_data_set_of_the_builder_keeps_its_splits(cohort, tmp_path):
    write_brats_slices(["--brats_dir", str(cohort), "--output_dir", str(tmp_path / "slices"), "--slices", "12"])
    data = load_data(DataArguments(dataset_name=str(tmp_path / "slices")))
    assert {split: len(rows) for split, rows in data.items()} == {"train": 9, "validation": 1, "test": 3}
    assert find_columns(data, DataArguments()) == (["flair"], "mask")
    assert "t1" not in data["train"].column_names  # only what is trained on is read
    assert find_regions(data, ["flair"], "mask", None) == ({"WT": [1, 2, 3]}, {}, None)


def test_evaluation_alone(cohort, checkpoint, tmp_path):
    results = run_segmentation.main(
        ["--brats_dir", str(cohort), "--slices", "12", "--model_name_or_path", checkpoint(), "--do_train", "false"]
        + ["--output_dir", str(tmp_path / "run"), *QUICK]
    )
    assert "eval_dice" in results
    assert "train_loss" not in results
    assert (tmp_path / "run" / "predictions.png").exists()
    assert not (tmp_path / "run" / "training_curve.png").exists()


@pytest.mark.parametrize(
    ("data", "match"),
    [
        ({"rest": 5}, "has no split named train, only rest"),
        ({"train": 1}, "1 image of 1 case are too few"),
        ({"train": 5, "validation": 0}, "The split validation of the data set is empty"),
    ],
)
def test_splits_that_cannot_be_used(data, match):
    splits = {name: Dataset.from_dict({"image": list(range(count))}) for name, count in data.items()}
    with pytest.raises(SystemExit, match=match):
        with_all_splits(DatasetDict(splits), seed=0)


def card_data(arguments):
    """What the card says of the data of a run with these arguments, and its other facts."""
    model_args, data_args, args = parse_arguments([*arguments, "--use_cpu"])
    data = load_data(data_args)
    columns, mask_column = find_columns(data, data_args)
    images = make_images(data, columns, mask_column)
    facts = card_arguments(images, model_args, data_args, args, describe_split(images, data_args))
    return facts["data"], facts


def test_the_card_says_how_ones_own_images_were_split(pictures, tmp_path):
    arguments = ["--dataset_name", str(pictures), "--split_seed", "3"]
    assert card_data(arguments)[0]["split"] == "by image, seed 3"
    for kind in ("images", "masks"):
        for path in sorted((pictures / kind).iterdir()):
            patient = path.with_name(f"patient_{int(path.stem[-2:]) // 2}")
            patient.mkdir(exist_ok=True)
            path.rename(patient / path.name)
    assert card_data(arguments)[0]["split"] == "by patient, seed 3"
    for kind in ("images", "masks"):
        (pictures / "train").mkdir(exist_ok=True)
        (pictures / kind).rename(pictures / "train" / kind)
        (pictures / "validation" / kind).mkdir(parents=True)
        (pictures / "train" / kind / "patient_0").rename(pictures / "validation" / kind / "patient_0")
    assert card_data(arguments)[0]["split"] == "as the data set has it"


def test_the_card_of_a_phantom_cites_nobody_and_counts_as_people_do(cohort, tmp_path):
    arguments = ["--brats_dir", str(cohort), "--slices", "tumor", "--neighbours", "1"]
    rows, facts = card_data(arguments)
    assert rows["slices"] == "axial, tumor (at least 1 pixel of it)"
    assert rows["validation images"].endswith(" of 1 scan")
    assert rows["split"] == "by patient, seed 0"
    assert facts["data_citation"] is None
    assert facts["dataset"] == "a phantom cohort in BraTS' layout"
    assert facts["share_predictions"] is False  # names alone prove too little for that
    scans = tmp_path / "scans"
    for path in sorted(cohort.glob("Phantom_00*/*")):
        name = path.name.replace("Phantom_", "BraTS20_Training_")
        (scans / name[:20]).mkdir(parents=True, exist_ok=True)
        shutil.copy(path, scans / name[:20] / name)
    _, facts = card_data(["--brats_dir", str(scans), "--slices", "tumor"])
    assert "10.1109/TMI.2014.2377694" in facts["data_citation"]
    assert (facts["dataset"], facts["share_predictions"]) == ("BraTS", False)


def test_splits_are_by_case():
    rows = Dataset.from_dict({"case_id": [f"patient_{index // 5:02d}" for index in range(100)]})
    data = with_all_splits(DatasetDict({"train": rows}), seed=0)
    cases = {split: set(part["case_id"]) for split, part in data.items()}
    assert {split: len(names) for split, names in cases.items()} == {"train": 15, "validation": 1, "test": 4}
    assert not cases["train"] & cases["test"]
    assert sum(len(part) for part in data.values()) == 100


def test_sam2_checkpoint_is_named_in_its_errors(pictures, tmp_path):
    with pytest.raises(SystemExit, match="--sam2_checkpoint: No checkpoint file at nowhere.pt"):
        run_segmentation.main(
            ["--dataset_name", str(pictures), "--sam2_checkpoint", "nowhere.pt", "--output_dir", str(tmp_path / "run")]
        )


def test_nothing_to_resume_from(tmp_path):
    with pytest.raises(SystemExit, match="there is no checkpoint in"):
        run_segmentation.main(["--output_dir", str(tmp_path), "--resume_from_checkpoint", "true"])


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["--dataset_name", "a", "--brats_dir", "b"], "pass one of --dataset_name and --brats_dir"),
        (["--model_name_or_path", "a", "--sam2_checkpoint", "b"], "pass one of --model_name_or_path and"),
        (["--push_to_hub", "--do_train", "false"], "pushes what was trained"),
        (["--preset", "huge"], "invalid choice: 'huge'"),
        (["--report_to", "tensorboard"], "--report_to tensorboard is not installed. Try `pip install tensorboard`"),
        (["--augmentation", "strong", "flips"], "--augmentation takes none and strong alone, got strong flips"),
        (["--deepspeed", "absent.json"], "error: No package metadata was found for The 'deepspeed"),
        (["--accelerator_config", "absent.json"], "error: [Errno 2] No such file or directory: 'absent.json'"),
        (["--per_device_train_batch_size", "0"], "--per_device_train_batch_size must be at least 1, got 0."),
        (["--per_device_eval_batch_size", "-1"], "--per_device_eval_batch_size must be at least 1, got -1."),
        (["--gradient_accumulation_steps", "0"], "--gradient_accumulation_steps must be at least 1, got 0."),
        (["--dataloader_num_workers", "-1"], "--dataloader_num_workers must be at least 0, got -1."),
        (["--learning_rate", "nan"], "--learning_rate must not be negative, such as 1e-4, got nan."),
        (["--seed", "-1"], "--seed must be in 0..2**32 - 1, got -1."),
    ],
)
def test_arguments_that_exclude_each_other(arguments, match, capsys, monkeypatch):
    name = "sam2unet_hf.finetuning.arguments.get_available_reporting_integrations"
    monkeypatch.setattr(name, lambda: ["wandb"])
    with pytest.raises(SystemExit):
        run_segmentation.main(arguments)
    assert match in capsys.readouterr().err


def test_unknown_slices(cohort, tmp_path):
    with pytest.raises(SystemExit, match="`slices` must be an index .* got '12 most'"):
        run_segmentation.main(["--brats_dir", str(cohort), "--slices", "12", "most", "--output_dir", str(tmp_path)])


def test_no_brats_folder(tmp_path):
    with pytest.raises(SystemExit, match="Give the folder that holds the BraTS cases"):
        run_segmentation.main(["--brats_dir", str(tmp_path / "nowhere"), "--output_dir", str(tmp_path / "run")])


def spoil_pair(pictures):
    (pictures / "masks" / "photo_03.png").unlink()


def spoil_masks_folder(pictures):
    shutil.rmtree(pictures / "masks")


def spoil_with_background(pictures):
    for path in (pictures / "masks").iterdir():
        with Image.open(path) as mask:
            Image.new("L", mask.size).save(path)


def spoil_with_grey(pictures):
    gradient = np.arange(80, dtype=np.uint8)[None].repeat(64, axis=0)
    Image.fromarray(gradient).save(pictures / "masks" / "photo_00.png")


def spoil_with_namesake(pictures):
    shutil.copy(pictures / "images" / "photo_00.jpg", pictures / "images" / "photo_00.jpeg")


def spoil_with_colour(pictures):
    Image.new("RGB", (80, 64), (255, 0, 0)).save(pictures / "masks" / "photo_00.png")


def spoil_with_jpeg(pictures):
    path = pictures / "masks" / "photo_04.png"
    with Image.open(path) as mask:
        mask.save(path.with_suffix(".jpg"))
    path.unlink()


def spoil_with_half_a_file(pictures):
    path = pictures / "images" / "photo_05.jpg"
    path.write_bytes(path.read_bytes()[:900])


@pytest.mark.parametrize(
    ("spoil", "arguments", "match"),
    [
        (spoil_pair, [], r"1 files have no partner of the same name: .*photo_03\.jpg"),
        (spoil_masks_folder, [], "has no masks beside it"),
        (spoil_with_background, [], "masks .* are all background"),
        (spoil_with_grey, [], "hold more than 64 different values"),
        (spoil_with_namesake, [], "have the same name"),
        (spoil_with_colour, [], "image photo_00.*Map colours to ids"),
        (spoil_with_jpeg, [], "image photo_04: its mask is a JPEG, which blurs label ids. Save masks as PNG"),
        (spoil_with_half_a_file, [], "image photo_05: .*truncated"),
        (None, ["--regions", "WT"], r"--regions: Regions are NAME=ID\[,ID\.\.\.\]"),
        (None, ["--regions", "liver=2"], r"Region liver has the label ids \[2\], the masks hold \[1\] \(255 is taken"),
        (None, ["--regions", "a=1,2", "b=2,3"], "--regions: `regions` must be nested or disjoint"),
        (None, ["--mask_column", "truth"], r"--mask_column: 'truth' is no column of images"),
    ],
)
def test_bad_data_is_named(spoil, arguments, match, pictures, tmp_path):
    if spoil is not None:
        spoil(pictures)
    with pytest.raises(SystemExit, match=match):
        run_segmentation.main(["--dataset_name", str(pictures), "--output_dir", str(tmp_path / "run"), *arguments])


def test_image_and_mask_of_different_size_are_named(pictures, checkpoint, tmp_path):
    Image.fromarray(np.full((70, 90), 255, dtype=np.uint8)).save(pictures / "masks" / "photo_02.png")
    with pytest.raises(SystemExit, match=r"image photo_02 is 70x78 pixels, its mask 70x90"):
        run_segmentation.main(["--dataset_name", str(pictures), "--output_dir", str(tmp_path / "run")])
