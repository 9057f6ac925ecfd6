"""Training on Parquet files that are read while it runs."""

import json
import os
import pickle
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from common import BRATS_REGIONS, small_model
from datasets import Dataset
from forks import run_two_processes
from loopback_hub import LoopbackHub
from PIL import Image as PILImage
from test_training import make_rows, make_trainer
from torch.utils.data import DataLoader

from dataset_scripts.brats_slices.__main__ import main as write_brats_slices
from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor, Sam2UNetOutput
from sam2unet_hf.finetuning import run_segmentation
from sam2unet_hf.training import SegmentationTransform, collate
from sam2unet_hf.training.streaming import ParquetRows, RowGroupSampler, open_parquet


TESTS = Path(__file__).parent
SCRIPT = TESTS.parent / "examples" / "run_segmentation.py"


QUICK = ["--use_cpu", "--disable_tqdm", "true", "--per_device_train_batch_size", "2"]
QUICK += ["--per_device_eval_batch_size", "1", "--num_train_epochs", "2"]
ONLY_HERE = ("runtime", "per_second", "model_preparation_time", "epoch")


def write_parquet(folder, split, rows, row_groups):
    """Write rows in files of the given sizes of row groups."""
    (folder / "data").mkdir(parents=True, exist_ok=True)
    first = 0
    for number, sizes in enumerate(row_groups):
        part = rows.select(range(first, first + sum(sizes)))
        first += sum(sizes)
        path = folder / "data" / f"{split}-{number:05d}-of-{len(row_groups):05d}.parquet"
        part.to_parquet(path, batch_size=sizes[0])
    assert first == len(rows)


def numbered(count):
    """Images of 64 pixels whose first pixel, and `case_id`, tell their number."""
    rows = make_rows([(64, 64)] * count)
    images = []
    for index, image in enumerate(rows["image"]):
        image.putpixel((0, 0), index)
        images.append(image)
    columns = {"image": images, "mask": list(rows["mask"]), "case_id": [f"case {index}" for index in range(count)]}
    return Dataset.from_dict(columns).cast_column("image", rows.features["image"])


@pytest.fixture(scope="module")
def rows():
    return numbered(37)


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory):
    """37 rows in row groups of 5, 5, 1, then 5, 5, 5, 1, then 10 rows, and five to validate."""
    folder = tmp_path_factory.mktemp("streaming") / "parquet"
    write_parquet(folder, "train", rows, [(5, 5, 1), (5, 5, 5, 1), (10,)])
    write_parquet(folder, "validation", rows.select([3, 1, 4, 0, 5]), [(2, 2, 1)])
    return folder


@pytest.fixture(scope="module")
def slices(tmp_path_factory):
    """Slices as the builder writes them, and a model to start from."""
    folder = tmp_path_factory.mktemp("slices")
    cohort = write_phantom_cohort(folder / "brats", num_patients=13, shape=(40, 40, 26))
    options = ["--slices", "12", "13", "--output_dir", str(folder / "slices")]
    write_brats_slices(["--brats_dir", str(cohort), *options])
    model = small_model(regions={"WT": [1, 2, 3]})
    model.save_pretrained(folder / "start")
    processor = Sam2UNetImageProcessor(regions=model.config.regions, size={"height": 64, "width": 64})
    processor.save_pretrained(folder / "start")
    return folder


def scores_of(folder):
    results = json.loads((folder / "all_results.json").read_text())
    return {
        key: value for key, value in results.items() if not key.startswith("train") and not key.endswith(ONLY_HERE)
    }


def test_rows_are_those_of_load_dataset(folder, rows):
    streamed = open_parquet(str(folder))["train"]
    assert len(streamed) == len(rows)
    assert streamed.features == rows.features
    assert streamed.column_names == rows.column_names
    assert streamed["case_id"] == list(rows["case_id"])
    assert [np.asarray(image).tobytes() for image in streamed[3:36:4]["image"]] == [
        np.asarray(image).tobytes() for image in rows[3:36:4]["image"]
    ]
    assert streamed[-1]["case_id"] == "case 36"
    assert streamed[[7, 3]]["case_id"] == ["case 7", "case 3"]
    assert np.array_equal(streamed["mask"][5], rows["mask"][5])
    assert pickle.loads(pickle.dumps(streamed))[5]["case_id"] == "case 5"  # for workers that are not forked
    with pytest.raises(IndexError, match="no row 37, there are 37"):
        streamed[37]
    with pytest.raises(KeyError, match="no column grade, only image, mask, case_id"):
        streamed["grade"]
    assert streamed.head(3)[:]["case_id"] == ["case 0", "case 1", "case 2"]


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("batch_size", [1, 3, 40])
def test_each_row_comes_once_for_any_number_of_readers(folder, batch_size, shuffle):
    rows = open_parquet(str(folder), shuffle_buffer=8)["train"]
    for num_processes in (1, 2, 3, 8):
        for num_workers in (0, 1, 5):
            order = RowGroupSampler(rows, batch_size, num_processes, num_workers, shuffle).order()
            assert sorted(order) == list(range(37))


@pytest.mark.parametrize(("batch_size", "num_readers"), [(2, 1), (2, 2), (1, 5), (3, 4)])
def test_a_row_group_is_read_once_but_where_two_readers_share_it(folder, monkeypatch, batch_size, num_readers):
    rows = open_parquet(str(folder), shuffle_buffer=8)["train"]
    reads, held = Counter(), []
    read_group = ParquetRows._read_group

    def count(rows, group):
        reads[group] += 1
        return read_group(rows, group)

    monkeypatch.setattr(ParquetRows, "_read_group", count)
    num_cut = 0
    for epoch in range(6):
        rows.set_epoch(epoch)
        order = RowGroupSampler(rows, batch_size, num_processes=num_readers, shuffle=True).order()
        reads.clear()
        # What accelerate gives to each process.
        batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
        rest = len(batches) % num_readers
        for process in range(num_readers):
            reader = rows.with_transform(None)
            for batch in batches[process : len(batches) - rest : num_readers]:
                for index in batch:
                    reader[index]
                    held.append(sum(len(table) for table in reader._cache.values()))
        assert reads.total() <= 8 + num_readers - 1
        for batch in batches[len(batches) - rest :]:
            rows.with_transform(None)[batch]
        assert len(reads) == 8
        # A row group has five rows, or is one of two single ones.
        assert reads.total() <= 8 + num_readers - 1 + rest * 3
        num_cut += reads.total() > 8
    assert (num_cut == 0) == (num_readers == 1)
    assert max(held) <= 8 + 10


def test_a_step_takes_batches_from_places_far_apart(tmp_path):
    write_parquet(tmp_path, "train", numbered(18), [(18,)])
    rows = open_parquet(str(tmp_path))["train"]
    order = RowGroupSampler(rows, 1, num_processes=2, num_workers=2).order().tolist()
    # Four shares of four rows: the first workers of both processes have the first and the third.
    assert order == [0, 8, 4, 12, 1, 9, 5, 13, 2, 10, 6, 14, 3, 11, 7, 15, 16, 17]


def test_shuffling_depends_on_seed_and_epoch_alone(folder):
    rows = open_parquet(str(folder), shuffle_buffer=12)["train"]
    sampler = RowGroupSampler(rows, 2, shuffle=True)
    orders = {}
    for seed, epoch in ((0, 0), (0, 1), (1, 0), (0, 0)):
        rows.set_epoch(epoch, seed)
        torch.rand(1)
        order = sampler.order().tolist()
        assert orders.setdefault((seed, epoch), order) == order
    assert len({tuple(order) for order in orders.values()}) == 3
    # Within 12 rows from as many as three places, not in the order of the files.
    assert max(orders[0, 0][:12]) - min(orders[0, 0][:12]) > 12


def test_workers_and_batches_bring_the_same_rows(folder):
    rows = open_parquet(str(folder), shuffle_buffer=8)["train"]
    sampler = RowGroupSampler(rows, 4, num_workers=2, shuffle=True)
    loader = DataLoader(rows, 4, sampler=sampler, num_workers=2, collate_fn=lambda examples: examples)
    seen = [int(example["case_id"].split()[1]) for batch in loader for example in batch]
    assert seen == sampler.order().tolist()


def test_errors_name_file_and_remedy(folder, rows, tmp_path, monkeypatch):
    (tmp_path / "none.parquet").write_bytes(b"PAR1 is missing at the end")
    with pytest.raises(ValueError, match=r"none\.parquet` is no Parquet file"):
        ParquetRows([str(tmp_path / "none.parquet")])
    with pytest.raises(ValueError, match="`shuffle_buffer` must be a number of rows from 0 on, got -1"):
        ParquetRows([], shuffle_buffer=-1)
    monkeypatch.setattr("sam2unet_hf.training.streaming.MAX_ROW_GROUP_BYTES", 1000)
    with pytest.raises(ValueError, match=r"Row group 0 of `.*train-00000.* MiB.*to_parquet\(path, batch_size=100\)"):
        open_parquet(str(folder))
    monkeypatch.undo()
    raw = rows.cast_column("image", rows.features["image"].__class__(decode=False)).with_format("arrow")[:]
    images = raw["image"].to_pylist()
    images[7] = {"bytes": images[7]["bytes"][:40], "path": None}
    broken = Dataset.from_dict({"image": images, "mask": list(rows["mask"])}).cast_column(
        "image", rows.features["image"]
    )
    write_parquet(tmp_path / "broken", "train", broken, [(37,)])
    streamed = open_parquet(str(tmp_path / "broken"))["train"]
    with pytest.raises(ValueError, match=r"7 \(row 7 of `.*train-00000-of-00001.parquet`\)"):
        streamed[7]


def test_streamed_scores_and_predictions_are_those_of_the_data_set(slices, tmp_path):
    model = ["--model_name_or_path", str(slices / "start"), "--do_train", "false", "--do_predict"]
    arguments = ["--dataset_name", str(slices / "slices"), *QUICK, *model]
    run_segmentation.main([*arguments, "--output_dir", str(tmp_path / "whole")])
    run_segmentation.main([*arguments, "--streaming", "--output_dir", str(tmp_path / "streamed")])
    assert scores_of(tmp_path / "streamed") == scores_of(tmp_path / "whole")
    pictures = sorted((tmp_path / "whole").glob("predictions/*.png")) + [tmp_path / "whole" / "predictions.png"]
    assert len(pictures) > 3
    for picture in pictures:
        other = tmp_path / "streamed" / picture.relative_to(tmp_path / "whole")
        assert other.read_bytes() == picture.read_bytes()


def run(folder, *arguments, **environment):
    """Run Python in a folder that is its home."""
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{TESTS.parent}{os.pathsep}{TESTS}", "HF_HUB_OFFLINE": "1"}
    own |= {"HF_HOME": str(folder / "hf"), "TMPDIR": str(folder), **environment}
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=os.environ | own,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def train(folder, parquet, **kwargs):
    """Train on streamed rows by a loss that costs nothing; return the trainer, and the rows of each batch."""
    streamed = open_parquet(str(parquet), shuffle_buffer=kwargs.pop("shuffle_buffer", 8))
    model = small_model(regions=BRATS_REGIONS)
    forward = model.forward
    seen = []

    def forward_fast(pixel_values, labels=None, **kwargs):
        if labels is None:
            return forward(pixel_values, **kwargs)
        weights = torch.stack([weight.mean() for weight in model.parameters() if weight.requires_grad])
        return Sam2UNetOutput(loss=(weights.sum() - pixel_values.mean()) ** 2, logits=pixel_values)

    class Numbered(SegmentationTransform):
        def __call__(self, rows):
            numbers = {"number": [int(case.split()[1]) for case in rows["case_id"]]} if "case_id" in rows else {}
            return super().__call__(rows) | numbers

    def note(examples):
        if "number" in examples[0]:
            seen.append([example["number"] for example in examples])
        return collate(examples)

    model.forward = forward_fast
    model.requires_grad_(False)
    model.decode_head.classifier.requires_grad_(True)
    options = {"num_train_epochs": 2, "per_device_train_batch_size": 4, "learning_rate": 0.01, "save_steps": 500}
    options |= kwargs.pop("options", {})
    trainer = make_trainer(model, streamed["train"], folder, **options)
    trainer.train_dataset.transform.__class__ = Numbered
    trainer.eval_dataset = streamed["validation"].with_transform(trainer.eval_dataset.transform)
    trainer.data_collator = note
    trainer.train(**kwargs)
    return trainer, seen


def test_an_epoch_is_each_row_once_and_a_resumed_run_ends_alike(folder, tmp_path):
    trainer, seen = train(tmp_path / "run", folder, options={"save_steps": 5})
    assert trainer.state.max_steps == 20
    assert trainer.state.epoch == 2
    assert seen[:10] != seen[10:]
    assert all(sorted(sum(epoch, [])) == list(range(37)) for epoch in (seen[:10], seen[10:]))
    weights = trainer.model.state_dict()
    start = small_model(regions=BRATS_REGIONS).state_dict()
    assert not torch.equal(weights["decode_head.classifier.weight"], start["decode_head.classifier.weight"])
    for step in (10, 15):  # between the epochs, and within the second
        checkpoint = str(tmp_path / "run" / f"checkpoint-{step}")
        options = {"save_strategy": "no"}
        again, seen_again = train(tmp_path / "again", folder, options=options, resume_from_checkpoint=checkpoint)
        assert seen_again == seen[step:]
        assert all(torch.equal(value, weights[name]) for name, value in again.model.state_dict().items())


def test_streamed_batch_norm_is_estimated_on_rows_of_several_places(folder, tmp_path):
    trainer, seen = train(tmp_path, folder, options={"max_steps": 1, "save_strategy": "no"})
    seen.clear()
    trainer.batch_norm_images = 8
    for _ in range(2):
        trainer.estimate_batch_norm()
    assert seen[0] == seen[1]
    assert len(seen) == 2
    assert len(set(seen[0])) == 8
    assert max(seen[0]) - min(seen[0]) > 8
    assert trainer.hyperparameters()["augmentation"] == "RandomHorizontalFlip, RandomVerticalFlip"


def test_streaming_says_what_it_needs(folder, tmp_path, monkeypatch):
    # An earlier run in the working directory must not answer in place of the check.
    monkeypatch.chdir(tmp_path)

    def fails(match, *arguments, name=folder):
        with pytest.raises(SystemExit, match=match):
            run_segmentation.main(["--dataset_name", str(name), "--streaming", *QUICK, *arguments])

    fails(r"does not read all masks beforehand .* --regions foreground=1", "--allow_leaks")
    fails(r"Patient case . is in the splits train .* and validation", "--regions", "a=1")
    with pytest.raises(SystemExit, match="given by --dataset_name"):
        run_segmentation.main(["--streaming", *QUICK])
    (tmp_path / "images").mkdir()
    (tmp_path / "masks").mkdir()
    fails("Images in folders are read one by one without --streaming", name=tmp_path)
    alone = tmp_path / "alone"
    write_parquet(alone, "train", numbered(4), [(4,)])
    fails("cuts off no splits, and .* has none named validation, only train", name=alone)
    text = tmp_path / "text"
    text.mkdir()
    (text / "train.csv").write_text("image,mask\n1,2\n")
    fails(r"Only Parquet files can be streamed, got `.*train.csv`", name=text)
    full = tmp_path / "full"
    white = numbered(4).map(lambda row: {"mask": row["mask"].point(lambda label: 255 * (label > 0))})
    for split in ("train", "validation"):
        write_parquet(full, split, white, [(4,)])
    fails(r"hold \[0, 255\], of which 255 is ignored", "--regions", "a=1", "--allow_leaks", name=full)


def found_by_two_processes(parquet, folder, num_workers):
    """Train in two processes; return what each found."""
    folder.mkdir(parents=True, exist_ok=True)
    run_two_processes(folder, TESTS / "streaming_worker.py", parquet, folder, num_workers)
    return torch.load(folder / "found.pt", weights_only=False)


def evaluate_on_one_thread(trainer):
    """Return the scores; other numbers of threads round otherwise."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    metrics = trainer.evaluate()
    torch.set_num_threads(num_threads)
    return {name: value for name, value in metrics.items() if not name.endswith(ONLY_HERE)}


@pytest.mark.parametrize("num_workers", [0, pytest.param(3, marks=pytest.mark.slow)])
def test_two_processes_share_the_rows_and_score_as_one(folder, tmp_path, num_workers):
    trainer, _ = train(tmp_path / "one", folder, options={"max_steps": 1, "per_device_eval_batch_size": 1})
    trainer.model.load_state_dict(small_model(regions=BRATS_REGIONS).state_dict())
    expected = evaluate_on_one_thread(trainer)
    found = found_by_two_processes(folder, tmp_path / "two", num_workers)
    for process in found:
        metrics = {name: value for name, value in process["metrics"].items() if not name.endswith(ONLY_HERE)}
        assert metrics == expected
        assert np.array_equal(process["image_dice"], trainer.compute_metrics.image_dice)
        counts = {name: own.tolist() for name, own in trainer.compute_metrics.patient_counts.items()}
        assert process["patient_counts"] == counts
        assert len(counts) == 5
        assert process["steps"] == 10  # two epochs of ten batches by two processes
    if num_workers:
        return  # whose rows are noted in the workers
    for epoch in range(2):
        batches = [process["seen"][5 * epoch : 5 * epoch + 5] for process in found]
        rows = Counter(sum(sum(batches, []), []))
        assert set(rows) == set(range(37))
        # Filled up to full batches with rows from the start of the epoch.
        assert rows.total() == 40
        assert {row for row, count in rows.items() if count > 1} <= set(batches[0][0] + batches[1][0])
    # Eight row groups an epoch, one of them cut in two, and the start again for filling up.
    assert all(process["reads"] <= 2 * 7 for process in found)
    assert sum(process["reads"] for process in found) <= 2 * 12


UPLOAD = """
import sys
from huggingface_hub import HfApi

HfApi().create_repo(sys.argv[1], repo_type="dataset")
HfApi().upload_folder(repo_id=sys.argv[1], repo_type="dataset", folder_path=sys.argv[2])
"""


MEASURE = """
import gc, re, sys
from pathlib import Path
from test_streaming import train

def kilobytes(name):
    return int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

options = {"eval_strategy": "no", "save_strategy": "no"}
train(sys.argv[1], sys.argv[2], options=options | {"max_steps": 2}, shuffle_buffer=0)
gc.collect()
Path("/proc/self/clear_refs").write_text("5")  # the peak is counted anew
before = kilobytes("VmRSS")
train(sys.argv[1], sys.argv[2], options=options | {"max_steps": 250}, shuffle_buffer=200)
print("growth", kilobytes("VmHWM") - before)
"""


def files_of(folder):
    return {path for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
def test_a_data_set_of_the_hub_is_streamed_with_nothing_of_it_on_disk(slices, tmp_path):
    arguments = [*QUICK, "--model_name_or_path", slices / "start", "--streaming", "--dataloader_num_workers", "1"]
    run(tmp_path, SCRIPT, "--dataset_name", slices / "slices", *arguments, "--output_dir", tmp_path / "disk")
    with LoopbackHub() as hub:
        online = {name: value for name, value in hub.environment(tmp_path / "hf", "hf_write").items() if "HF_" in name}
        run(tmp_path, "-c", UPLOAD, "tester/slices", slices / "slices", **online)
        before = files_of(tmp_path)
        asked = len(hub.requests)
        arguments += ["--dataset_name", "tester/slices"]
        run(tmp_path, SCRIPT, *arguments, "--output_dir", tmp_path / "hub", **online)
        reads = [status for method, path, status in hub.requests[asked:] if method == "GET" and "parquet" in path]
        assert hub.unknown_requests == []
    new = {path for path in files_of(tmp_path) - before if tmp_path / "hub" not in path.parents}
    assert not [path for path in new if path.suffix in (".parquet", ".arrow") or path.read_bytes()[:4] == b"PAR1"]
    assert sum(path.stat().st_size for path in new) < 100_000  # card and locks; the images take more
    assert reads
    assert set(reads) <= {200, 206, 302}
    assert scores_of(tmp_path / "hub") == scores_of(tmp_path / "disk")
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("hub", "disk")]
    assert weights[0] == weights[1]


@pytest.mark.slow
def test_memory_and_disk_are_bounded_by_the_shuffle_buffer(tmp_path):
    """300 MB of images, of which a reader holds 200 rows of 0.3 MB and one row group of 100."""
    generator = np.random.default_rng(0)
    mask = PILImage.fromarray(np.pad(np.ones((100, 100), np.uint8), 110))

    def rows(count):
        for _ in range(count):
            yield {
                "image": PILImage.fromarray(generator.integers(0, 256, (320, 320, 3), dtype=np.uint8)),
                "mask": mask,
            }

    parquet = tmp_path / "parquet"
    features = make_rows([(64, 64)]).features
    for split, count in (("train", 1000), ("validation", 10)):
        part = Dataset.from_generator(
            rows, features=features, gen_kwargs={"count": count}, cache_dir=tmp_path / "build"
        )
        write_parquet(parquet, split, part, [(100,) * (count // 100) or (count,)])
    size = sum(path.stat().st_size for path in files_of(parquet))
    assert size > 300e6
    before = files_of(tmp_path)
    growth = int(run(tmp_path, "-c", MEASURE, tmp_path / "run", parquet).split("growth")[1].split()[0]) * 1024
    assert growth < 200e6  # 130 MB as it is, 320 if nothing is let go
    new = {path for path in files_of(tmp_path) - before if tmp_path / "run" not in path.parents}
    assert sum(path.stat().st_size for path in new) < 1e6
