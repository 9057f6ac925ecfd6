"""Images made of modality columns and neighbouring slices."""

import pickle
from collections import Counter

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from common import BRATS_REGIONS, small_model
from datasets import Dataset, Image
from slice_rows import MODALITIES, make_slices, pixel
from test_streaming import write_parquet
from test_training import make_trainer
from torch.utils.data import DataLoader

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.training import ImageRows, SegmentationTransform, augmentation, choose_head_crop_size, collate
from sam2unet_hf.training.rows import find_neighbours
from sam2unet_hf.training.streaming import ParquetRows, RowGroupSampler, open_parquet


SHOWN = {"a": range(4, 10), "b": range(2, 7), "c": [3, 4, 8]}
TUMOUR = {("a", 6), ("a", 7), ("b", 4), ("c", 8)}


@pytest.fixture(scope="module")
def rows():
    return make_slices(SHOWN, tumour=TUMOUR)


@pytest.fixture(scope="module")
def folder(rows, tmp_path_factory):
    """14 rows in row groups that cut the cases: of 4, 4, 2, then 4 rows."""
    folder = tmp_path_factory.mktemp("rows") / "parquet"
    write_parquet(folder, "train", rows, [(4, 4, 2), (4,)])
    return folder


@pytest.fixture(params=["in memory", "streamed"])
def source(request, rows, folder):
    return rows if request.param == "in memory" else open_parquet(str(folder))["train"]


def corners(image):
    """The value of each channel outside of the tumour."""
    return image[:, 0, 0].tolist()


def test_channels_are_each_modality_from_below_to_above(source):
    images = ImageRows(source, ["t1ce", "flair"], neighbours=1)
    image = images[1]["image"]
    assert image.shape == (6, 64, 64)
    assert image.dtype == torch.uint8
    around = (4, 5, 6)
    assert corners(image) == [pixel("a", name, index) for name in ("t1ce", "flair") for index in around]
    assert corners(ImageRows(source, ["t1ce", "flair"])[1]["image"]) == [pixel("a", "t1ce", 5), pixel("a", "flair", 5)]
    # The tumour of the slice above is in its own channels.
    assert [int((channel == 255).sum()) for channel in image] == [0, 0, 600, 0, 0, 600]


def test_the_nearest_slice_of_the_case_stands_in_for_one_that_is_missing(source):
    images = ImageRows(source, ["flair"], neighbours=2)
    assert len(images) == 14

    def seen(number):
        return [value - pixel("abc"[number], "flair", 0) for value in corners(batch[number])]

    batch = images[[0, 10, 13]]["image"]
    assert seen(0) == [4, 4, 4, 5, 6]  # the first slice of its case, not the last of another
    assert seen(1) == [4, 5, 6, 6, 6]
    # 6 lies as far from 4 as from 8, and 4 is not the row's own; 7 is nearer to 8.
    assert seen(2) == [8, 8, 8, 8, 8]
    assert [value - pixel("c", "flair", 0) for value in corners(images[12]["image"])] == [3, 3, 4, 4, 4]


def test_neighbours_are_found_in_any_order_of_the_rows():
    assert find_neighbours(["x", "y", "x", "x"], [7, 7, 5, 6], 1).tolist() == [
        [3, 0, 0],
        [1, 1, 1],
        [2, 2, 3],
        [2, 3, 0],
    ]
    # 10 and 14 are as near to 12: each row takes the one on its own side.
    assert find_neighbours(["x"] * 2, [10, 14], 2).tolist() == [[0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]
    assert find_neighbours(["x"] * 2, [10, 13], 2).tolist() == [[0, 0, 0, 0, 1], [0, 1, 1, 1, 1]]
    with pytest.raises(ValueError, match="Case x has slice 7 in two rows"):
        find_neighbours(["x", "x"], [7, 7], 1)
    with pytest.raises(ValueError, match="Row 1 has `case_id` x and `slice_index` None; neighbours need both"):
        find_neighbours(["x", "x"], [7, None], 1)


def test_one_column_alone_is_the_image_of_the_data_set(source, rows):
    images = ImageRows(source, "t1ce")
    found = images[-1]
    assert found["image"].mode == "L"
    assert np.array_equal(found["image"], rows[13]["t1ce"])
    assert np.array_equal(found["mask"], rows[13]["mask"])
    assert np.array_equal(images.mask(13), rows[13]["mask"])
    assert found["wt_pixels"] == 600
    assert found["head_box"] == [10, 4, 57, 58]
    assert set(found) == set(images.column_names)
    assert set(found) == {"image", "mask", "head_box", "head_boxes", "case_id", "slice_index", "wt_pixels"}
    assert images[2:9:3]["slice_index"] == [6, 9, 4]
    assert list(images["case_id"]) == list("aaaaaabbbbbccc")
    with pytest.raises(KeyError, match="There is no column t1ce without images, only case_id"):
        images["t1ce"]
    with pytest.raises(IndexError):
        images[14]


def test_images_without_masks(source):
    images = ImageRows(source, "t1ce", mask_column=None)
    assert "mask" not in images[0]
    assert "mask" not in images.column_names


def test_other_modalities_are_not_read(rows, tmp_path, monkeypatch):
    table = rows.cast_column("t1ce", Image(decode=False)).to_dict()
    table["t1ce"] = [{"bytes": b"broken", "path": None}] * len(rows)
    broken = Dataset.from_dict(table, features=rows.features)
    assert corners(ImageRows(broken, ["flair"], neighbours=1)[4]["image"]) == [8, 9, 10]
    write_parquet(tmp_path, "train", broken, [(14,)])
    whole = open_parquet(str(tmp_path))["train"]
    streamed = ImageRows(whole, ["flair"], neighbours=1)
    assert 0 < streamed.rows.num_bytes < whole.num_bytes
    read_row_group, read = pq.ParquetFile.read_row_group, []

    def note(file, index, columns, **kwargs):
        read.extend(columns)
        return read_row_group(file, index, columns=columns, **kwargs)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", note)
    assert corners(streamed[4]["image"]) == [8, 9, 10]
    assert sorted(read) == ["case_id", "flair", "head_boxes", "mask", "slice_index", "wt_pixels"]


def test_each_image_is_decoded_once_for_a_batch(source, monkeypatch):
    images = ImageRows(source, MODALITIES, neighbours=1)
    decode, decoded = Image.decode_example, []

    def note(feature, file, *args, **kwargs):
        decoded.append(file)
        return decode(feature, file, *args, **kwargs)

    monkeypatch.setattr(Image, "decode_example", note)
    images[[2, 3, 4, 3]]
    # The slices 5 to 9 of case a in both modalities, and four masks.
    assert len(decoded) == 5 * 2 + 4


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_are_the_same_streamed_and_in_memory_and_by_workers(rows, folder, num_workers):
    processor = Sam2UNetImageProcessor(size={"height": 32, "width": 32})
    transform = SegmentationTransform(processor, augment=augmentation("flips"))
    transform.set_epoch(1, 7)
    expected = ImageRows(rows, ["flair"], neighbours=1).with_transform(transform)
    streamed = open_parquet(str(folder))["train"]
    found = pickle.loads(pickle.dumps(ImageRows(streamed, ["flair"], neighbours=1).with_transform(transform)))
    batches = list(DataLoader(found, 4, num_workers=num_workers, collate_fn=collate))
    assert torch.equal(
        torch.cat([batch["pixel_values"] for batch in batches]), torch.stack(expected[:]["pixel_values"])
    )
    assert torch.equal(torch.cat([batch["labels"] for batch in batches]), torch.stack(expected[:]["labels"]))


def test_reading_neighbours_takes_few_reads_more(rows, folder, tmp_path, monkeypatch):
    reads = Counter()
    read_group = ParquetRows._read_group

    def count(rows, group):
        reads[group] += 1
        return read_group(rows, group)

    monkeypatch.setattr(ParquetRows, "_read_group", count)

    def reads_of(path, shuffle, epoch=0):
        streamed = open_parquet(str(path), shuffle_buffer=4 if shuffle else 0)["train"]
        images = ImageRows(streamed, ["flair"], neighbours=1)
        streamed.set_epoch(epoch)
        order = RowGroupSampler(streamed, 2, shuffle=shuffle).order().tolist()
        reads.clear()
        for start in range(0, len(order), 2):
            images.__getitems__(order[start : start + 2])
        return reads.total()

    # In their order row groups are read once, though slices beside each other lie in two of them.
    assert reads_of(folder, shuffle=False) == 4
    # Shuffled, each may be read again for the one before it and the one behind it.
    assert max(reads_of(folder, True, epoch) for epoch in range(8)) <= 3 * 4 - 2
    # A row group that holds whole cases is read once in any order.
    for number, case in enumerate("abc"):
        part = rows.filter(lambda row, case=case: row["case_id"] == case)
        write_parquet(tmp_path / case, "train", part, [(len(part),)])
        source = tmp_path / case / "data" / "train-00000-of-00001.parquet"
        (tmp_path / "cases").mkdir(exist_ok=True)
        source.rename(tmp_path / "cases" / f"train-{number:05d}-of-00003.parquet")
    assert [reads_of(tmp_path / "cases", True, epoch) for epoch in range(8)] == [3] * 8


def test_head_boxes_join_those_of_the_chosen_modalities(source):
    assert ImageRows(source, ["flair"]).head_boxes()[0] == [8, 4, 50, 60]
    boxes = ImageRows(source, MODALITIES).head_boxes()
    assert boxes[0] == boxes[5] == [8, 2, 55, 60]
    assert boxes[-1] == [10, 4, 57, 60]
    assert ImageRows(source, MODALITIES)[13]["head_box"] == boxes[13]


def test_rows_without_head_boxes_have_none(rows):
    images = ImageRows(rows.remove_columns("head_boxes"), MODALITIES)
    assert "head_box" not in images[0]
    with pytest.raises(ValueError, match="where the head is in flair, t1ce: they need a column `head_boxes`"):
        images.head_boxes()


@pytest.mark.parametrize(
    ("boxes", "scale", "size"),
    [
        ([[0, 0, 65, 64]], 1, (64, 96)),
        ([[5, 5, 9, 133]], 1, (128, 64)),  # the least that the model takes
        ([[0, 0, 10, 129], [10, 10, 171, 12]], 1, (160, 192)),  # the highest and the widest of all heads
        ([[0, 0, 10, 65], [10, 10, 60, 12]], 2, (80, 64)),  # 160 x 128 for the model
        ([[0, 0, 9, 17]], 2, (32, 32)),  # 64 x 64
        ([[0, 0, 65, 20]], 3, (32, 96)),  # 96 x 288
    ],
)
def test_the_window_is_the_smallest_that_holds_each_head(boxes, scale, size):
    window = {"height": size[0], "width": size[1]}
    assert choose_head_crop_size(boxes, scale) == window
    Sam2UNetImageProcessor(head_crop_size=window, head_crop_scale=scale)  # takes it


def test_boxes_that_hold_nothing_are_refused():
    with pytest.raises(ValueError, match="`head_boxes` must hold boxes with pixels in them, got none"):
        choose_head_crop_size([])
    with pytest.raises(ValueError, match=r"got \[3, 4, 3, 8\]"):
        choose_head_crop_size([[0, 0, 5, 5], [3, 4, 3, 8]])


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"image_columns": ["flair", "t2"]}, "'t2' is no column of images; those are flair, t1ce, mask"),
        ({"image_columns": ["flair"], "mask_column": "case_id"}, "'case_id' is no column of images"),
        ({"image_columns": ["flair", "flair"]}, r"each of them once, got \['flair', 'flair'\]"),
        ({"image_columns": []}, "`image_columns` must name columns"),
        ({"image_columns": ["flair"], "neighbours": -1}, "`neighbours` must be a number of slices from 0 on, got -1"),
    ],
)
def test_columns_that_cannot_be_are_named(source, options, match):
    with pytest.raises(ValueError, match=match):
        ImageRows(source, **options)


def test_neighbours_need_cases_and_slices(rows):
    with pytest.raises(ValueError, match="`neighbours` must be 0 for rows without the column slice_index, .* got 1"):
        ImageRows(rows.remove_columns("slice_index"), ["flair"], neighbours=1)


def test_images_that_make_no_channels_are_named(source, rows, tmp_path):
    def changed(number, image, name):
        images = list(rows["t1ce"])
        images[number] = image
        data = rows.remove_columns("t1ce").add_column("t1ce", [None] * len(rows)).cast_column("t1ce", Image())
        data = Dataset.from_dict({**data.to_dict(), "t1ce": images}, features=rows.features)
        if isinstance(source, Dataset):
            return data
        write_parquet(tmp_path / name, "train", data, [(14,)])
        return open_parquet(str(tmp_path / name))["train"]

    where = r"Row 6 \(case_id b, slice_index 2\)" if isinstance(source, Dataset) else r"Row 6 \(row 6 of `.*parquet`\)"
    colour = changed(6, rows[6]["t1ce"].convert("RGB"), "colour")
    with pytest.raises(ValueError, match=where + ": a channel of an image must be .*, got mode RGB in column `t1ce`"):
        ImageRows(colour, MODALITIES)[6]
    assert ImageRows(colour, "t1ce")[6]["image"].mode == "RGB"
    small = changed(6, rows[6]["t1ce"].resize((9, 9)), "small")
    with pytest.raises(ValueError, match=where + ": its images of flair, t1ce .* must have one size, got .*9, 9"):
        ImageRows(small, MODALITIES)[6]
    with pytest.raises(ValueError, match=where + " holds no image in column `t1ce`"):
        ImageRows(changed(6, None, "none"), MODALITIES)[5:8]


def test_broken_images_name_their_row(source, rows, tmp_path):
    table = rows.cast_column("flair", Image(decode=False)).to_dict()
    table["flair"][3]["bytes"] = table["flair"][3]["bytes"][:40]
    broken = Dataset.from_dict(table, features=rows.features)
    if not isinstance(source, Dataset):
        write_parquet(tmp_path, "train", broken, [(14,)])
        broken = open_parquet(str(tmp_path))["train"]
    with pytest.raises(ValueError, match=r"Row 3 \(.*\): the image in column `flair` cannot be read \("):
        ImageRows(broken, ["flair"], neighbours=1)[2]


def test_scores_and_training_on_neighbours_are_the_same_streamed_and_in_memory(rows, folder, tmp_path):
    options = {"max_steps": 1, "per_device_train_batch_size": 14, "save_strategy": "no"}
    scores, losses = [], []
    for number, data in enumerate((rows, open_parquet(str(folder))["train"])):
        images = ImageRows(data, ["flair"], neighbours=1)
        trainer = make_trainer(small_model(regions=BRATS_REGIONS), images, tmp_path / str(number), **options)
        scores.append({name: score for name, score in trainer.evaluate().items() if "_per_s" not in name})
        losses.append(trainer.train().training_loss)
    times = ("eval_runtime", "eval_model_preparation_time")
    assert {name: scores[0][name] for name in scores[0] if name not in times} == {
        name: scores[1][name] for name in scores[1] if name not in times
    }
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)  # of one batch in two orders
