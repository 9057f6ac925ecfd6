"""The mistakes that people make on the command line: each is told what is wrong, where, and what to do instead."""

import shutil
import subprocess
import sys
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from common import small_model
from PIL import Image
from transformers import Sam2Config

from dataset_scripts.brats_slices import __main__ as brats_slices
from dataset_scripts.phantom import __main__ as phantom
from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import (
    Sam2UNetConfig,
    Sam2UNetForSemanticSegmentation,
    Sam2UNetImageProcessor,
    conversion,
    hub,
    pictures,
    volume,
)
from sam2unet_hf.export import __main__ as export
from sam2unet_hf.finetuning import run_segmentation
from sam2unet_hf.metrics import __main__ as metrics


sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import error_analysis  # noqa: E402 - the scripts are no package


@pytest.fixture(scope="module")
def there(tmp_path_factory):
    """A folder with images and masks, images alone, pictures alone, scans, and a model of pictures in `runs`."""
    folder = tmp_path_factory.mktemp("there")
    for number in range(5):
        image = np.random.default_rng(number).integers(0, 256, (64, 64)).astype(np.uint8)
        for path in (f"data/images/{number}.png", f"pictures/{number}.png", f"named/{number}.png"):
            (folder / path).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image).save(folder / path)
        (folder / "data" / "masks").mkdir(exist_ok=True)
        Image.fromarray((image > 99).astype(np.uint8) * (1 + number % 2)).save(folder / f"data/masks/{number}.png")
    write_phantom_cohort(folder / "scans", num_patients=1, shape=(24, 24, 16))
    (folder / "nothing").mkdir()
    write_phantom_cohort(folder / "unmarked", num_patients=1, shape=(24, 24, 16))
    next((folder / "unmarked").rglob("*_seg.nii.gz")).unlink()
    write_phantom_cohort(folder / "empty_masks", num_patients=4, shape=(24, 24, 16))
    for path in (folder / "empty_masks").rglob("*_seg.nii.gz"):
        mask = nib.load(path)
        nib.save(nib.Nifti1Image(np.zeros(mask.shape, np.uint8), mask.affine), path)
    small_model(regions={"foreground": [1]}).save_pretrained(folder / "runs" / "data")
    Sam2UNetImageProcessor({"foreground": [1]}).save_pretrained(folder / "runs" / "data")
    small_model(regions={"WT": [1, 2, 3]}).save_pretrained(folder / "runs" / "flair")
    processor = Sam2UNetImageProcessor(size={"height": 64, "width": 64}, modalities=["flair"])
    processor.save_pretrained(folder / "runs" / "flair")
    torch.save(torch.nn.Linear(2, 2), folder / "none.pth")
    shutil.copytree(folder / "data" / "masks", folder / "found")
    scan = folder / "scans" / "Phantom_001" / "Phantom_001"
    for source, copies in (
        ("t2", ("t2only/A/A_t2", "t2only/B/B_t2")),
        ("flair", ("some/A/A_flair", "some/B/B_flair", "twice/1/A/A_flair", "twice/2/A/A_flair")),
        ("seg", ("some/A/A_seg", "plain")),
    ):
        for copy in copies:
            (folder / copy).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(f"{scan}_{source}.nii.gz", folder / f"{copy}.nii.gz")
    (folder / "dicom").mkdir()
    for number in range(5):
        (folder / "dicom" / f"IM{number:04d}").write_bytes(bytes(128) + b"DICM")
    return folder


@pytest.fixture
def refused(there, monkeypatch, capsys):
    """Run a command line that must end with a message, and return the message in one line."""
    monkeypatch.chdir(there)

    def run(main, line):
        before = sorted(there.rglob("*"))
        with pytest.raises(SystemExit) as caught:
            main(line.split())
        assert sorted(there.rglob("*")) == before, "something was written"
        code, output = caught.value.code, capsys.readouterr().err
        return " ".join((code if isinstance(code, str) else output).split())

    return run


# Training


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--epochs 3", "there is no option --epochs, perhaps --num_train_epochs was meant"),
        ("--lerning-rate=1", "there is no option --lerning-rate, perhaps --learning_rate or"),
        ("--frobnicate", "there is no option --frobnicate"),
        ("data", "data belongs to no option. Name data by --dataset_name or --brats_dir"),
        ("--modalities FLAIR", "argument --modalities: invalid choice: 'FLAIR' (choose from"),
        (
            "--do_train false",
            "--do_train false scores a model that was trained before: name it by --model_name_or_path",
        ),
        ("--dataset_name data --output_dir data/", "--output_dir data/ is the folder of --dataset_name: name another"),
        ("--device cuda", "there is no option --device, perhaps --use_cpu was meant"),
        ("--lr 1e-3", "there is no option --lr, perhaps --learning_rate was meant"),
        ("--brats_dir=", "--brats_dir is empty, such as by a variable that is not set"),
        ("--image_size 20", "--image_size must be at least 64, got 20."),
        ("--num_train_epochs 0", "--num_train_epochs must be above 0, got 0. To score a model alone pass --do_train"),
        ("--fp16 --use_cpu", "--fp16 needs a GPU, and there is none. Leave it out, or pass --bf16."),
        ("--model_name_or_path runs/data --preset large", "--preset is the size of an encoder from scratch, and runs"),
        ("--output_dir pictures/0.png", "--output_dir pictures/0.png is a file: name a folder"),
        (
            "--resume_from_checkpoint runs/checkpoint-9",
            "runs/checkpoint-9 does not exist. In runs/phantom there is no",
        ),
        ("--brats_dir scans --output_dir ./scans", "--output_dir ./scans is the folder of --brats_dir: name another"),
    ],
)
def test_words_of_a_training(refused, line, message):
    text = refused(run_segmentation.main, line)
    assert message in text
    assert len(text) < 300, "what is wrong is lost among options"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--dataset_name nowhere", "--dataset_name nowhere: there is no such folder, and no such data set could be"),
        ("--dataset_name scans", "Phantom_001_flair.nii.gz is a scan: name a folder of scans by --brats_dir."),
        (
            "--brats_dir data",
            "data/images/0.png is a picture, and there is no scan. Name images and masks by --dataset",
        ),
        (
            "--brats_dir scans --slices all",
            "images of 1 case are too few to train and to validate. Name a folder of se",
        ),
        (
            "--dataset_name pictures",
            "There are 0.png, 1.png, 2.png, 3.png, 4.png: move them into such folders. Without masks, images are "
            "segmented by a trained model: `python -m sam2unet_hf.pictures`.",
        ),
        (
            "--dataset_name data --regions liver=1 tumor=3",
            "Region tumor has the label ids [3], the masks hold [1, 2]. Name some of these by --regions, or leave the",
        ),
        (
            "--dataset_name data --do_train false --model_name_or_path runs/data --test_dir nowhere",
            "--test_dir nowhere: there is no such folder, and no such data set could be read",
        ),
        (
            "--brats_dir unmarked",
            "unmarked: none of 1 case has a mask, such as Phantom_001_seg.nii.gz, to train on or to score by.",
        ),
        (
            "--brats_dir empty_masks --recipe paper --slices head",
            "No mask has a pixel of tumour. Are these the right masks, and the right slices?",
        ),
        (
            "--do_train false --model_name_or_path runs/data --test_dir data --neighbours 1",
            "--test_dir data holds pictures, and the model takes slices of scans with 1 on each side. Name a folder",
        ),
        ("--do_train false --model_name_or_path runs/data --test_dir nothing", "--test_dir nothing is empty."),
    ],
)
def test_data_of_a_training(refused, caplog, line, message):
    assert message in refused(run_segmentation.main, f"{line} --output_dir runs/new")
    if "pictures" in line:
        assert "no validation split" not in caplog.text, "a split of what cannot be read"


@pytest.mark.parametrize("regions", ["", " --regions a=1"])
def test_no_model_is_named_before_the_data_is_read(refused, regions):
    text = refused(run_segmentation.main, f"--brats_dir nowhere --model_name_or_path runs{regions}")
    assert text.startswith("--model_name_or_path: runs holds no config.json, so that it is no SAM2-UNet.")


# Models


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "data",
            "data holds no config.json, so that it is no SAM2-UNet. Name the folder of a run or of a checkpoint, or",
        ),
        ("runs", "Name the folder of a run or of a checkpoint, such as runs/data, or a Hub id."),
        ("nowhere", "There is no folder nowhere, and none could be fetched from the Hub: HF_HUB_OFFLINE is set, and"),
        (
            "runs/dta",
            "There is no folder runs/dta (did you mean runs/data?), and none could be fetched from the Hub: ",
        ),
        (
            "./rnus/data",
            "There is no folder ./rnus/data (did you mean runs/data?). Name the folder of a run or of a checkpoint,",
        ),
        ("runs/data/model.safetensors", "runs/data/model.safetensors is a file. Name the folder that holds it."),
        ("runs/data/config.json", "runs/data/config.json is a file. Name the folder that holds it."),
    ],
)
def test_models_that_are_none(refused, monkeypatch, name, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for main, line in (
        (run_segmentation.main, f"--dataset_name data --regions foreground=1 --model_name_or_path {name}"),
        (volume.main, f"{name} scans -o runs"),
        (pictures.main, f"{name} data/images -o runs"),
        (export.main, f"{name} runs/out.onnx"),
        (error_analysis.main, f"--model {name} --dataset_name data"),
    ):
        assert message in refused(main, line)


@pytest.mark.parametrize(
    ("main", "line", "message"),
    [
        (
            conversion.main,
            "./runs/dta new",
            "There is no folder ./runs/dta (did you mean runs/data?). Name a folder or",
        ),
        (conversion.main, "runs/dta new", "There is no folder runs/dta (did you mean runs/data?), and none could be"),
        (conversion.main, "one.pth new", "No checkpoint file at one.pth (did you mean none.pth?)."),
        (hub.main, "card runs/dta", "There is no folder runs/dta (did you mean runs/data?). Name that of a run"),
        (
            hub.main,
            "ensemble runs/dta me/it",
            "There is no folder runs/dta (did you mean runs/data?). Name the folder",
        ),
    ],
)
def test_sources_that_are_not_there(refused, monkeypatch, main, line, message):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert message in refused(main, line)


def test_a_file_of_other_objects_is_told_in_one_line(refused):
    text = refused(conversion.main, "none.pth new")
    assert "(Unsupported global: GLOBAL torch.nn.modules.linear.Linear was not an allowed global by default)" in text
    assert "weights_only" not in text


def test_no_command_is_imported_by_the_package():
    code = "import sys, sam2unet_hf; print(*sys.modules)"
    modules = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    package = Path(volume.__file__).parent
    commands = {f"sam2unet_hf.{path.stem}" for path in package.glob("*.py") if '"__main__"' in path.read_text()}
    assert "sam2unet_hf.conversion" in commands
    assert commands.isdisjoint(modules), "Python warns of a module that is imported before it runs as a command"


def test_a_model_of_another_type_is_none(tmp_path):
    Sam2Config().save_pretrained(tmp_path)
    match = "holds a model of type 'sam2', not a SAM2-UNet. Take its encoder by `from_sam2` .`--sam2_checkpoint`."
    for read in (Sam2UNetConfig.from_pretrained, Sam2UNetForSemanticSegmentation.from_pretrained):
        with pytest.raises(ValueError, match=match):
            read(tmp_path)


# Other commands


def test_a_picture_beside_links_to_scans_is_no_mistake(there, tmp_path):
    (tmp_path / "cases").mkdir()
    (tmp_path / "cases" / "Phantom_001").symlink_to(there / "scans" / "Phantom_001")
    Image.new("L", (8, 8)).save(tmp_path / "cases" / "view.png")
    with pytest.raises(SystemExit, match="pass `modalities`"):  # the model is one of pictures
        volume.main([str(there / "runs" / "data"), str(tmp_path / "cases"), "-o", str(tmp_path / "out")])


@pytest.mark.parametrize(
    ("main", "line", "message"),
    [
        (
            volume.main,
            "runs/data data -o runs",
            "data/images/0.png is a picture, no scan. Segment pictures by `python -m",
        ),
        (
            volume.main,
            "runs/data pictures/0.png -o runs",
            "0.png is a picture, no scan. Segment pictures by",
        ),
        (
            volume.main,
            "scans runs/data -o runs",
            "runs/data is a model, no case. Name the model first, then the cases",
        ),
        (
            volume.main,
            "runs/data nowhere -o runs",
            "nowhere does not exist. Pass the folder of one case or of many, or",
        ),
        (volume.main, "runs/data scans -o runs", "pass `modalities` (`--modalities`), such as ['flair'] or"),
        (
            volume.main,
            "runs/flair scans/Phantom_001/Phantom_001_t2.nii.gz -o runs",
            "Phantom_001_t2.nii.gz is a t2 scan by its name; the model was trained on flair. Name the flair scan or "
            "the folder of the case, or pass --allow_other_modalities.",
        ),
        (
            volume.main,
            "runs/flair flair=scans/Phantom_001/Phantom_001_t1.nii.gz -o runs",
            "Phantom_001_t1.nii.gz is a t1 scan by its name; the model was trained on flair.",
        ),
        (
            volume.main,
            "runs/flair scans/Phantom_001/Phantom_001_seg.nii.gz -o runs",
            "Phantom_001_seg.nii.gz is a mask by its name, not a scan.",
        ),
        (
            volume.main,
            "runs/flair t2=plain.nii.gz -o runs",
            "The model segments flair, got t2. Name flair=SCAN of the",
        ),
        (
            volume.main,
            "runs/flair flair=nowhere.nii.gz -o runs",
            "there is no file nowhere.nii.gz. Pass the flair scan",
        ),
        (volume.main, "runs/flair flair=plain.nii.gz scans -o runs", "Segment scans by a command of its own, or name"),
        (volume.main, "runs/flair flair=plain.nii.gz FLAIR=plain.nii.gz -o runs", "the flair scan was named before"),
        (
            volume.main,
            "runs/flair t2only -o runs",
            "The model was trained on flair; none of the 2 cases in t2only has it (they have t2).",
        ),
        (
            volume.main,
            "runs/flair t2only -o runs --score",
            "None of the 2 cases has a mask to score by. Leave out --score to segment them.",
        ),
        (
            volume.main,
            "runs/flair dicom -o runs",
            "5 DICOM files are there: convert them to NIfTI first, e.g. with dcm",
        ),
        (volume.main, "runs/flair dicom/IM0000 -o runs", "IM0000 is a DICOM file: convert its series to NIfTI first"),
        (
            volume.main,
            "scans/Phantom_001 -o runs",
            "scans/Phantom_001 was taken for the model, and no case is named: python -m sam2unet_hf.volume MODEL CASE",
        ),
        (pictures.main, "-o runs data/images", "data/images was taken for the model, and no picture is named: python"),
        (volume.main, "runs/flair scans -o none.pth", "--output_dir none.pth is a file. Name a folder."),
        (volume.main, "runs/flair scans -o none.pth/a", "--output_dir none.pth/a cannot be made: Not a directory."),
        (pictures.main, "runs/data pictures -o none.pth", "--output_dir none.pth is a file. Name a folder."),
        (brats_slices.main, "--brats_dir twice --output_dir new", "Keep one of them. Was a folder too high named?"),
        (
            metrics.main,
            "--pred_dir found --ref_dir data/masks --regions WT=5",
            "Region WT has the label ids [5], the masks hold 1, 2, the predictions 1, 2. Name some of these by",
        ),
        (metrics.main, "--pred_dir found --ref_dir pictures", "5 of 5 masks are rather grey than black and white, as"),
        (
            metrics.main,
            "--pred_dir found --ref_dir ./found",
            "`pred_dir` and `ref_dir` are the same folder, found. Name",
        ),
        (
            metrics.main,
            "--pred_dir found --ref_dir scans/Phantom_001",
            "scans/Phantom_001 holds scans. `python -m sam2unet_hf.volume MODEL CASE -o OUT --score` scores such.",
        ),
        (volume.main, "runs/data scans -o runs", "If on pictures, segment such by `python -m sam2unet_hf.pictures`."),
        (
            pictures.main,
            "runs/data scans -o runs",
            "is a scan, and scans holds no pictures. Segment scans by `python -m",
        ),
        (
            pictures.main,
            "runs/data scans/Phantom_001/Phantom_001_t1.nii.gz -o runs",
            "Phantom_001_t1.nii.gz is a scan. Segment scans by `python -m sam2unet_hf.volume`.",
        ),
        (phantom.main, "--output_dir data", "`output_dir` must be new or empty, got data. Remove it or pass another"),
        (phantom.main, "--output_dir new --num_patients 0", "`num_patients` must be >= 1, got 0."),
    ],
)
def test_inputs_of_other_commands(refused, main, line, message):
    assert message in refused(main, line)


def test_a_folder_too_high_is_not_to_be_mended_by_skipping_cases(refused):
    assert "skip_bad_cases" not in refused(brats_slices.main, "--brats_dir twice --output_dir new")


def test_cases_without_masks_are_segmented_beside_those_that_are_scored(there, tmp_path, caplog):
    volume.main(
        [str(there / "runs" / "flair"), str(there / "some"), "-o", str(tmp_path), "--score", "--device", "cpu"]
    )
    assert "B: not scored, no mask." in caplog.text
    assert "A: not scored" not in caplog.text
    assert {path.name for path in tmp_path.glob("*.nii.gz")} == {"A_seg.nii.gz", "B_seg.nii.gz"}
    assert "A," in (tmp_path / "patients.csv").read_text()
    assert "B," not in (tmp_path / "patients.csv").read_text()


def test_scans_of_any_name_are_named_by_modality(there, tmp_path, caplog):
    scan = tmp_path / "AX_F.nii.gz"
    shutil.copyfile(there / "some" / "A" / "A_flair.nii.gz", scan)
    options = ["-o", str(tmp_path / "out"), "--device", "cpu"]
    model = str(there / "runs" / "flair")
    volume.main([model, f"flair={scan}", f"t1={there / 'plain.nii.gz'}", *options, "--probabilities"])
    assert f"t1={there / 'plain.nii.gz'} is not read: the model takes flair." in caplog.text
    assert "as a mask has" not in caplog.text
    volume.main([model, str(there / "some" / "A"), *options, "--probabilities"])
    files = (tmp_path / "out" / f"{name}_WT_probability.nii.gz" for name in ("AX_F", "A"))
    named, found = (nib.load(file).get_fdata() for file in files)
    assert len(np.unique(named)) > 100
    assert np.array_equal(named, found)
    assert (tmp_path / "out" / "AX_F_seg.nii.gz").exists()
    volume.main([model, str(there / "plain.nii.gz"), *options])
    assert "plain.nii.gz`: flair holds only 3 values, as a mask has." in caplog.text


def test_masks_beside_pictures_are_passed_over(there, tmp_path, caplog):
    options = ["-o", str(tmp_path / "out"), "--device", "cpu"]
    pictures.main([str(there / "runs" / "data"), str(there / "data"), *options])
    assert "5 pictures in" in caplog.text
    assert "are masks by their folders" in caplog.text
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["images"]
    caplog.clear()
    pictures.main([str(there / "runs" / "data"), str(there / "data" / "masks"), *options])
    assert "masks by their folders" not in caplog.text
    assert len(list((tmp_path / "out").glob("*.png"))) == 5


@pytest.mark.parametrize(
    ("content", "fault"), [(b"hello", "it starts with 'hello'"), (b"", "it is empty"), (b"\xff\x01", r"'\xff\x01'")]
)
def test_files_that_are_no_pictures_are_told_by_what_they_start_with(tmp_path, content, fault):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match="a.png is no image") as caught:
        pictures.read_picture(tmp_path / "a.png")
    assert fault in str(caught.value)


def test_one_photograph_among_masks_is_warned_of(there, tmp_path, caplog):
    for folder in ("pred", "ref"):
        (tmp_path / folder).mkdir()
        for number in range(3):
            mask = np.where(np.arange(64)[:, None] > 20 + number, np.full((64, 64), 255), 0).astype(np.uint8)
            Image.fromarray(mask).save(tmp_path / folder / f"{number}.png")
    shutil.copyfile(there / "pictures" / "0.png", tmp_path / "ref" / "0.png")
    metrics.main(["--pred_dir", str(tmp_path / "pred"), "--ref_dir", str(tmp_path / "ref")])
    assert "1 of 3 masks are rather grey than black and white, as photographs are, such as" in caplog.text


def test_a_region_that_is_nowhere_is_empty_where_all_ids_have_one(there):
    folders = ["--pred_dir", str(there / "found"), "--ref_dir", str(there / "data" / "masks")]
    assert metrics.main([*folders, "--regions", "a=1", "b=2", "c=3"])["dice_c"] == 1


@pytest.mark.parametrize("device", ["gpu", f"cuda:{torch.cuda.device_count()}"])
@pytest.mark.parametrize(
    ("main", "line"),
    [
        (volume.main, "runs/data scans -o runs"),
        (pictures.main, "runs/data data/images -o runs"),
        (error_analysis.main, "--model runs/data --dataset_name data"),
    ],
)
def test_devices_that_are_not_there(refused, main, line, device):
    text = refused(main, f"{line} --device {device}")
    assert f"argument --device: '{device}' is {'no device' if device == 'gpu' else 'not there'}, pass cpu" in text


def test_the_app_knows_devices_too(refused):
    pytest.importorskip("gradio")
    import app

    assert "argument --device: 'gpu' is no device, pass cpu" in refused(app.main, "--model runs/data --device gpu")
