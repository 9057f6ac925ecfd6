"""Images and masks from folders and data sets: what is read, what is refused, and what leaks between splits."""

import io
import logging
import os
import struct
import zipfile
import zlib

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Features, Value
from datasets import Image as ImageFeature
from PIL import ExifTags, Image, ImageOps
from slice_rows import make_slices, pixel

from dataset_scripts.brats_slices import BratsSlices
from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.finetuning.case_names import case_names
from sam2unet_hf.finetuning.data_checks import check_images_and_masks
from sam2unet_hf.finetuning.data_sources import (
    DataArguments,
    find_columns,
    find_regions,
    load_data,
    make_images,
)
from sam2unet_hf.finetuning.image_folders import pair_images_and_masks
from sam2unet_hf.finetuning.provenance import fingerprint
from sam2unet_hf.finetuning.splits import with_all_splits


GREY = np.random.default_rng(0).integers(0, 256, (24, 30)).astype(np.uint8)
LABELS = np.random.default_rng(1).integers(0, 4, (24, 30)).astype(np.uint8)


def write(folder, image=GREY, mask=LABELS, name="x", suffix=".png", mask_suffix=".png", **options):
    """Write an image and its mask, arrays or pictures."""
    for kind, pixels, ending in (("images", image, suffix), ("masks", mask, mask_suffix)):
        (folder / kind).mkdir(parents=True, exist_ok=True)
        picture = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
        picture.save(folder / kind / f"{name}{ending}", **(options if kind == "images" else {}))
    return folder


def read(folder):
    rows = pair_images_and_masks(folder / "images", folder / "masks")
    return check_images_and_masks("train", rows, ["image"], "mask"), rows


def oriented(orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return exif


def png_with_size(width, height):
    file = io.BytesIO()
    Image.fromarray(GREY).save(file, "PNG")
    data = file.getvalue()
    head = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + head + struct.pack(">I", zlib.crc32(head)) + data[33:]


# Pictures and masks


def palette(pixels):
    picture = Image.fromarray(pixels, "P")
    picture.putpalette([value for grey in range(256) for value in (grey,) * 3])
    return picture


PICTURES = {
    "L": Image.fromarray(GREY),
    "RGB": Image.fromarray(GREY).convert("RGB"),
    "RGBA": Image.merge("RGBA", [*[Image.fromarray(GREY)] * 3, Image.fromarray(LABELS)]),
    "LA": Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(LABELS)]),
    "P": palette(GREY),
    "16-bit": Image.fromarray(GREY.astype(np.uint16) * 257),
    "CMYK": Image.merge("CMYK", [*[Image.new("L", (30, 24))] * 3, Image.fromarray(255 - GREY)]),
    "32-bit": Image.fromarray(GREY.astype(np.int32)),
    "float": Image.fromarray(GREY.astype(np.float32)),
}


@pytest.mark.parametrize("mode", PICTURES)
def test_the_same_picture_in_any_mode_gives_the_same_tensor(tmp_path, mode):
    suffix = ".tif" if mode in ("CMYK", "32-bit", "float") else ".png"
    found, rows = read(write(tmp_path, PICTURES[mode], suffix=suffix))
    assert found == {0, 1, 2, 3}
    processor = Sam2UNetImageProcessor(do_resize=False, do_normalize=False)
    pixels = processor(rows[0]["image"], return_tensors="np")["pixel_values"][0]
    np.testing.assert_allclose(pixels, np.broadcast_to(GREY / 255, (3, *GREY.shape)), atol=1e-6)


def test_a_mode_without_rgb_values_is_named():
    with pytest.raises(ValueError, match="`images` of mode La have no RGB values. Save them as RGB"):
        Sam2UNetImageProcessor()(Image.new("La", (8, 8)))


@pytest.mark.parametrize("size", [(1, 1), (20000, 20), (20, 20000)])
def test_pictures_of_one_pixel_and_long_ones(tmp_path, size):
    labels = np.ones(size, np.uint8)
    found, rows = read(write(tmp_path, labels * 200, labels))
    assert found == {1}
    inputs = Sam2UNetImageProcessor()(rows[0]["image"], segmentation_maps=rows[0]["mask"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (1, 3, 352, 352)
    assert inputs["labels"].unique().tolist() == [1]


MASKS = {
    "L": Image.fromarray(LABELS),
    "RGB": Image.fromarray(LABELS).convert("RGB"),
    "RGBA": Image.merge("RGBA", [*[Image.fromarray(LABELS)] * 3, Image.fromarray(GREY)]),
    "LA": Image.merge("LA", [Image.fromarray(LABELS), Image.fromarray(GREY)]),
    "P": palette(LABELS),
    "PA": Image.fromarray(np.dstack([LABELS, GREY]), "PA"),
    "16-bit": Image.fromarray(LABELS.astype(np.uint16) * 300),
    "32-bit": Image.fromarray(LABELS.astype(np.int32) * 300),
    "float": Image.fromarray(LABELS.astype(np.float32)),
}


@pytest.mark.parametrize("mode", MASKS)
def test_the_same_mask_in_any_mode_gives_the_same_ids(mode):
    labels = Sam2UNetImageProcessor(do_resize=False)(GREY, segmentation_maps=MASKS[mode], return_tensors="np")
    expected = LABELS.astype(int) * (300 if mode in ("16-bit", "32-bit") else 1)
    np.testing.assert_array_equal(labels["labels"][0], expected)


@pytest.mark.parametrize(
    ("mask", "suffix", "match"),
    [
        (Image.fromarray(GREY).convert("CMYK"), ".tif", "got a picture of mode CMYK. Save it as L"),
        (Image.merge("LAB", [Image.fromarray(GREY)] * 3), ".tif", "got a picture of mode LAB"),
        (
            LABELS.astype(np.int32) - 2,
            ".tif",
            r"its mask holds the label -2\. Label ids are 0 \(background\) to 65535",
        ),
        (LABELS.astype(np.int32) * 70000, ".tif", "its mask holds the label 70000"),
        (LABELS.astype(np.float32) / 2, ".tif", "must hold whole label ids, got fractions"),
        (np.where(LABELS == 2, np.nan, 0).astype(np.float32), ".tif", "must hold whole label ids"),
        (np.where(LABELS == 2, 1e30, 0).astype(np.float32), ".tif", r"values beyond 2\*\*31"),
    ],
)
def test_masks_of_strange_labels_are_named(tmp_path, mask, suffix, match):
    with pytest.raises(SystemExit, match=f"train image x: .*{match}"):
        read(write(tmp_path, mask=mask, mask_suffix=suffix))


@pytest.mark.parametrize(
    ("image", "match"),
    [
        (GREY.astype(np.int32) - 200, "`images` must be non-negative"),
        (np.where(GREY > 9, np.nan, 0).astype(np.float32), "float images must be finite"),
        (np.full(GREY.shape, 1e38, np.float32), "float images must be finite and in 0..1 or 0..255"),
    ],
)
def test_pictures_that_cannot_be_scaled_are_named_before_training(tmp_path, image, match):
    with pytest.raises(SystemExit, match=f"train image x: .*{match}"):
        read(write(tmp_path, image, suffix=".tif"))


@pytest.mark.parametrize("kind", ["images", "masks"])
@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", "cannot be read .*Save it anew, or remove the pair"),
        (b"no picture", "cannot be read .*Save it anew"),
        (png_with_size(24, 30)[:99], "cannot be read .*Save it anew"),
        (png_with_size(10000, 9000), "has more than 89478485 pixels, Pillow's limit. Cut image and mask into tiles"),
        (png_with_size(2**31 - 1, 2**31 - 1), "has more than 89478485 pixels"),
    ],
    ids=["empty", "text", "cut off", "90 megapixels", "2**62 pixels"],
)
def test_broken_files_and_bombs_are_named(tmp_path, kind, data, match):
    write(tmp_path)
    (tmp_path / kind / "x.png").write_bytes(data)
    what = "it" if kind == "images" else "its mask"
    with pytest.raises(SystemExit, match=f"train image x: {what} {match}"):
        read(tmp_path)


@pytest.mark.parametrize(("suffix", "form"), [(".tif", "TIFF"), (".webp", "WEBP"), (".png", "PNG"), (".png", "GIF")])
def test_pages_and_frames_are_not_passed_over(tmp_path, suffix, form):
    write(tmp_path)
    (tmp_path / "images" / "x.png").unlink()
    frames = [Image.fromarray(GREY), Image.fromarray(255 - GREY)]
    frames[0].save(tmp_path / "images" / f"x{suffix}", form, save_all=True, append_images=frames[1:])
    with pytest.raises(SystemExit, match="train image x: it has 2 pages, of which one would be read. Save them as"):
        read(tmp_path)


def test_the_content_counts_not_the_suffix(tmp_path):
    write(tmp_path, suffix=".bmp")
    (tmp_path / "images" / "x.bmp").rename(tmp_path / "images" / "x.jpg")
    found, rows = read(tmp_path)
    assert found == {0, 1, 2, 3}
    np.testing.assert_array_equal(rows[0]["image"], GREY)
    Image.fromarray(LABELS).save(tmp_path / "masks" / "x.png", "JPEG")
    with pytest.raises(
        SystemExit, match="train image x: its mask is a JPEG, which blurs label ids. Save masks as PNG"
    ):
        read(tmp_path)


def test_a_photograph_turned_by_exif_lies_under_an_upright_mask(tmp_path):
    upright = Image.fromarray(GREY)
    stored = upright.transpose(Image.Transpose.ROTATE_90)  # orientation 6 turns it back
    found, rows = read(write(tmp_path / "mask upright", stored, LABELS, exif=oriented(6)))
    np.testing.assert_array_equal(rows[0]["image"], GREY)
    stored_mask = Image.fromarray(LABELS).transpose(Image.Transpose.ROTATE_90)
    with pytest.raises(SystemExit, match="is 24x30 pixels, its mask 30x24. One of them is turned by its EXIF orient"):
        read(write(tmp_path / "mask as stored", stored, stored_mask, exif=oriented(6)))


@pytest.mark.parametrize(("pixels", "orientation"), [(GREY, 3), (GREY, 2), (GREY[:, :24], 6)])
def test_a_turn_that_the_size_does_not_show_is_refused(tmp_path, pixels, orientation):
    labels = LABELS[:, : pixels.shape[1]]
    with pytest.raises(
        SystemExit, match=rf"train image x has the EXIF orientation {orientation}, its mask 1: whether"
    ):
        read(write(tmp_path / "a", pixels, labels, exif=oriented(orientation)))
    write(tmp_path / "b", pixels, labels, exif=oriented(orientation))
    Image.fromarray(labels).save(tmp_path / "b" / "masks" / "x.png", exif=oriented(orientation))
    _, rows = read(tmp_path / "b")
    turned = ImageOps.exif_transpose(Image.open(tmp_path / "b" / "masks" / "x.png"))
    np.testing.assert_array_equal(rows[0]["mask"], turned)


@pytest.mark.parametrize("kind", ["images", "masks"])
def test_a_quarter_turn_of_a_tiff_is_refused(tmp_path, kind):
    write(tmp_path, Image.fromarray(GREY).transpose(Image.Transpose.ROTATE_90))
    pixels = {"images": GREY, "masks": LABELS}[kind]
    (tmp_path / kind / "x.png").unlink()
    stored = Image.fromarray(pixels).transpose(Image.Transpose.ROTATE_90)
    stored.save(tmp_path / kind / "x.tif", exif=oriented(6))
    what = "it" if kind == "images" else "its mask"
    with pytest.raises(SystemExit, match=f"train image x: {what} is a TIFF with the EXIF orientation 6. Save it up"):
        read(tmp_path)


def test_files_that_are_none_and_others_are_not_passed_over_in_silence(tmp_path, caplog):
    write(tmp_path)
    (tmp_path / "images" / "notes.txt").write_text("x")
    (tmp_path / "images" / ".DS_Store").write_text("x")
    with caplog.at_level(logging.WARNING):
        read(tmp_path)
    assert "1 files in" in caplog.text
    assert "notes.txt: not read" in caplog.text
    os.mkfifo(tmp_path / "masks" / "pipe.png")
    with pytest.raises(SystemExit, match="pipe.png is not a file, or a link to none. Remove it"):
        read(tmp_path)


@pytest.mark.parametrize("column", ["image", "mask"])
def test_rows_without_an_image_are_named(column):
    rows = {"image": [Image.fromarray(GREY)] * 2, "mask": [Image.fromarray(LABELS)] * 2}
    rows[column] = [rows[column][0], None]
    features = Features({"image": ImageFeature(), "mask": ImageFeature()})
    with pytest.raises(SystemExit, match="train image 00001: the row holds no image. Fill it, or remove the row"):
        check_images_and_masks("train", Dataset.from_dict(rows, features=features), ["image"], "mask")


# Leaks


def save_splits(folder, **cases):
    """Write a data set of random images with a column `case_id` to a folder, as Parquet."""
    generator = np.random.default_rng(0)
    for split, names in cases.items():
        images = [Image.fromarray(generator.integers(0, 256, (8, 9)).astype(np.uint8)) for _ in names]
        rows = {"image": images, "mask": [Image.new("L", (9, 8), 1) for _ in names], "case_id": names}
        features = Features({"image": ImageFeature(), "mask": ImageFeature(), "case_id": Value("string")})
        folder.mkdir(exist_ok=True)
        Dataset.from_dict(rows, features=features).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


@pytest.mark.parametrize(
    ("train", "test", "match"),
    [
        ("Brats18_1_1", "Brats18_1_1", r"Brats18_1_1 is in the splits train \(case Brats18_1_1\) and test"),
        (
            "BraTS-GLI-00001-000",
            "BraTS-GLI-00001-001",
            r"BraTS-GLI-00001 is in the splits train \(case BraTS-GLI-00001-000\) and test \(case BraTS-GLI-00001",
        ),
    ],
)
def test_patients_in_two_splits_are_refused(tmp_path, caplog, train, test, match):
    data = save_splits(tmp_path / "data", train=["A_1", train], validation=["B_1"], test=["C_1", test])
    with pytest.raises(SystemExit, match=f"Patient {match}.* Keep it in one split, or .* with --allow_leaks"):
        load_data(DataArguments(dataset_name=data))
    with caplog.at_level(logging.WARNING):
        assert len(load_data(DataArguments(dataset_name=data, allow_leaks=True))) == 3
    assert f"Patient {train[:11]}" in caplog.text
    assert "--allow_leaks goes on all the same" in caplog.text


def test_timepoints_of_a_patient_stay_together_where_we_split(tmp_path):
    cases = [f"BraTS-GLI-{patient:05d}-{time:03d}" for patient in range(20) for time in range(3)]
    data = load_data(DataArguments(dataset_name=save_splits(tmp_path / "data", train=cases)))
    patients = [{case.rsplit("-", 1)[0] for case in rows["case_id"]} for rows in data.values()]
    assert [len(part) for part in patients] == [15, 1, 4]
    assert len(set.union(*patients)) == 20


def test_without_a_test_split_its_patients_are_trained_on(tmp_path):
    brats_dir = write_phantom_cohort(tmp_path / "brats", num_patients=10, shape=(24, 24, 16))
    for number in range(10):
        write(tmp_path / "pictures", GREY + np.uint8(number), name=str(number))
    sources = [{"brats_dir": str(brats_dir), "slices": ["head"]}, {"dataset_name": str(tmp_path / "pictures")}]
    for source in sources:
        with_test, without = (load_data(DataArguments(**source, test_split=kept)) for kept in (True, False))
        cases = {split: set(rows["case_id"]) for split, rows in with_test.items()}
        assert {split: set(rows["case_id"]) for split, rows in without.items()} == {
            "train": cases["train"] | cases["test"],
            "validation": cases["validation"],
        }
        assert len(without["train"]) == len(with_test["train"]) + len(with_test["test"])
    save_splits(tmp_path / "split", train="abc", validation="d", test="e")
    with pytest.raises(SystemExit, match="--test_split false: the data set comes with a test split"):
        load_data(DataArguments(dataset_name=str(tmp_path / "split"), test_split=False))


def test_rows_without_a_case_are_named(tmp_path):
    data = save_splits(tmp_path / "data", train=["A_1", None], validation=["B_1"])
    with pytest.raises(
        SystemExit, match="Row 1 of the split train has no `case_id`, .* Fill in the column, or remove"
    ):
        load_data(DataArguments(dataset_name=data))


def image_splits(folder, **numbers):
    for split, indices in numbers.items():
        for index in indices:
            pixels = np.random.default_rng(index).integers(0, 256, (8, 9)).astype(np.uint8) if index else GREY * 0
            write(folder / split, pixels, np.ones(pixels.shape, np.uint8), name=f"{split}_{index}")
    return DataArguments(dataset_name=str(folder))


def test_the_same_image_in_two_splits_is_refused(tmp_path, caplog):
    args = image_splits(tmp_path / "data", train=[1, 2, 3], val=[4], test=[5, 2])
    match = "test image test_2 is the same file as train image train_2.* Remove one of the two, or .* --allow_leaks"
    with pytest.raises(SystemExit, match=match):
        load_data(args)
    args.allow_leaks = True
    with caplog.at_level(logging.WARNING):
        assert {split: len(rows) for split, rows in load_data(args).items()} == {
            "train": 3,
            "validation": 1,
            "test": 2,
        }
    assert "test image test_2 is the same file" in caplog.text


def test_images_in_archives_are_compared_and_named_when_broken(tmp_path):
    def pack(split, indices, broken=False):
        with zipfile.ZipFile(tmp_path / f"{split}.zip", "w") as archive:
            table = ["file_name,mask_file_name"]
            for index in indices:
                pixels = np.random.default_rng(index).integers(0, 256, (8, 9)).astype(np.uint8)
                for name, content in ((f"{index}.png", pixels), (f"{index}_mask.png", pixels // 128)):
                    file = io.BytesIO()
                    Image.fromarray(content).save(file, "PNG")
                    archive.writestr(name, file.getvalue()[: 40 if broken else None])
                table.append(f"{index}.png,{index}_mask.png")
            archive.writestr("metadata.csv", "\n".join(table) + "\n")

    pack("train", [1, 2, 3])
    pack("validation", [4, 5])
    args = DataArguments(dataset_name=str(tmp_path))
    data = load_data(args)
    assert np.array_equal(data["train"][1]["image"], np.random.default_rng(2).integers(0, 256, (8, 9)))
    assert find_regions(data, ["image"], "mask", None)[0] == {"foreground": [1]}
    assert fingerprint(data["train"]) != fingerprint(data["validation"])
    pack("test", [3])
    with pytest.raises(SystemExit, match="test image .* is the same file as train image"):
        load_data(args)
    pack("test", [6], broken=True)
    with pytest.raises(SystemExit, match="test image .* cannot be read"):
        find_regions(load_data(args), ["image"], "mask", None)


def test_black_images_and_equal_names_are_no_leak(tmp_path):
    args = image_splits(tmp_path / "data", train=[0, 1], val=[0, 2], test=[0])
    assert len(load_data(args)) == 3
    for split, seed in (("train", 6), ("val", 7)):
        write(tmp_path / "data" / split, np.random.default_rng(seed).integers(0, 9, LABELS.shape).astype(np.uint8))
    assert len(load_data(args)) == 3


def test_the_same_scan_of_two_names_is_found_in_a_data_set_of_the_builder(tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    cohort = write_phantom_cohort(tmp_path / "cohort", num_patients=5, shape=(24, 24, 16))
    folders = sorted(path for path in cohort.iterdir() if path.is_dir())
    load_data(DataArguments(brats_dir=str(cohort), slices=["7"]))
    builder = BratsSlices(data_dir=str(cohort), slices=7)
    builder.download_and_prepare()
    split_of = {case: split for split, rows in builder.as_dataset().items() for case in rows["case_id"]}
    source = next(folder for folder in folders if split_of[folder.name] == "train")
    target = next(folder for folder in folders if split_of[folder.name] == "test")
    for path in source.iterdir():
        (target / path.name.replace(source.name, target.name)).write_bytes(path.read_bytes())
    with pytest.raises(
        SystemExit, match=rf"image {target.name}_007 is the same file as train image {source.name}_007"
    ):
        load_data(DataArguments(brats_dir=str(cohort), slices=["7"]))


# Columns of modalities


def save_slices(folder, **shown):
    """Write slices as the builder does, by split; cases of one letter are those of `make_slices`."""
    folder.mkdir()
    for split, cases in shown.items():
        make_slices(dict.fromkeys(cases, [3, 4])).to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return str(folder)


def test_columns_of_the_chosen_modalities_are_taken_in_their_order(tmp_path, caplog):
    name = save_slices(tmp_path / "data", train="a", validation="b")
    args = DataArguments(dataset_name=name, modalities=["t1ce", "flair"], neighbours=1)
    data = load_data(args)
    assert find_columns(data, args) == (["t1ce", "flair"], "mask")
    images = make_images(data, *find_columns(data, args), args.neighbours)
    image = images["validation"][1]["image"]
    assert image[:, 0, 0].tolist() == [pixel("b", name, index) for name in ("t1ce", "flair") for index in (3, 4, 4)]
    alone = load_data(DataArguments(dataset_name=name))
    assert find_columns(alone, DataArguments(dataset_name=name)) == (["flair"], "mask")
    assert "t1ce" not in alone["train"].column_names
    assert fingerprint(alone["train"]) != fingerprint(data["train"])
    with pytest.raises(
        SystemExit, match=r"--modalities: 't2' is no column of images. .* are \['flair', 't1ce', 'mask'"
    ):
        load_data(DataArguments(dataset_name=name, modalities=["flair", "t2"]))
    with pytest.raises(SystemExit, match="`neighbours` must be 0 for rows without the column slice_index"):
        make_images({"train": data["train"].remove_columns("slice_index")}, ["flair"], "mask", 1)
    assert {record.message.split(":")[0] for record in caplog.records} == {"There is no test split"}
    pictures = save_splits(tmp_path / "pictures", train=["A_1"], validation=["B_1"])
    load_data(DataArguments(dataset_name=pictures, modalities=["flair"]))
    assert "--modalities is not used: the images are in the column image." in caplog.text


def test_a_scan_that_two_splits_share_is_found_in_any_modality(tmp_path):
    name = save_slices(tmp_path / "data", train="a", validation="b")
    rows = make_slices({"b": [3, 4]})
    marked = [picture.copy() for picture in make_slices({"a": [3, 4]})["t1ce"]]
    for picture in marked:
        picture.putpixel((0, 0), 99)  # images of one colour are no leak
    for split, part in (("train", make_slices({"a": [3, 4]})), ("validation", rows)):
        part = Dataset.from_dict({**part.to_dict(), "t1ce": marked}, features=part.features)
        part.to_parquet(f"{name}/{split}-00000-of-00001.parquet")
    assert len(load_data(DataArguments(dataset_name=name))) == 2
    with pytest.raises(SystemExit, match="validation image b_003 is the same file as train image a_003"):
        load_data(DataArguments(dataset_name=name, modalities=["flair", "t1ce"]))


def test_each_column_of_an_image_is_checked(tmp_path):
    rows = make_slices({"a": [3, 4]}).remove_columns("wt_pixels")
    table = rows.cast_column("t1ce", ImageFeature(decode=False)).to_dict()
    table["t1ce"][1]["bytes"] = table["t1ce"][1]["bytes"][:40]
    broken = Dataset.from_dict(table, features=rows.features)
    assert check_images_and_masks("train", broken, ["flair"], "mask") == {0}
    with pytest.raises(SystemExit, match="train image a_004: it cannot be read"):
        check_images_and_masks("train", broken, ["flair", "t1ce"], "mask")


# Splits and names


def test_empty_folders_and_splits_that_mean_the_same_are_named(tmp_path, caplog):
    args = image_splits(tmp_path / "data", train=[1, 2], val=[3])
    for kind in ("images", "masks"):
        (tmp_path / "data" / "test" / kind).mkdir(parents=True)
    with pytest.raises(SystemExit, match=r"test.images holds no images \(\.png"):
        load_data(args)
    (tmp_path / "data" / "valid").symlink_to("val")
    with pytest.raises(SystemExit, match="are both of the split validation. Remove one"):
        load_data(args)
    rows = Dataset.from_dict({"image": [1, 2]})
    with pytest.raises(SystemExit, match="The splits val and dev of the data set are both validation. Remove one"):
        with_all_splits(DatasetDict(train=rows, val=rows, dev=rows), 0)
    with pytest.raises(SystemExit, match="0 images of 0 cases are too few to train and to validate"):
        with_all_splits(DatasetDict(train=rows.select([])), 0)
    with caplog.at_level(logging.WARNING):
        with_all_splits(DatasetDict(train=rows, val=rows, extra=rows), 0)
    assert "Not used, for their names say neither train, validation nor test: extra" in caplog.text


def test_names_of_files_are_short_and_of_one_row_each():
    names = case_names(Dataset.from_dict({"case_id": ["..", "/", "a" * 400, "a" * 500, "x", "x", "x_row00004"]}))
    assert len(set(names)) == 7
    assert all("/" not in name and not name.startswith(".") and 0 < len(name) < 120 for name in names)
    assert case_names(Dataset.from_dict({"case_id": [7, 8]})) == ["7", "8"]
