"""A folder of pictures without masks, segmented on the command line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from common import small_backbone_config, small_model
from PIL import ExifTags, Image

from sam2unet_hf import Sam2UNetForSemanticSegmentation, Sam2UNetImageProcessor
from sam2unet_hf.pictures import main, read_picture, write_label_map


REGIONS = {"cells": [1, 2], "nuclei": [2]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    small_model(regions=REGIONS).save_pretrained(folder)
    Sam2UNetImageProcessor(REGIONS, size={"height": 64, "width": 64}, white_level=4095).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def pictures(tmp_path):
    generator = np.random.default_rng(0)
    colours = generator.integers(0, 256, (70, 90, 3)).astype(np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    for name, picture, options in (
        ("a.png", Image.fromarray(colours), {}),
        ("b/c.JPG", Image.fromarray(colours[:65]), {"exif": exif}),
        ("b/d.tif", Image.fromarray(generator.integers(0, 4096, (66, 80)).astype(np.uint16)), {}),
        ("b/e.f.webp", Image.fromarray(colours[..., 0]), {}),
    ):
        path = tmp_path / "pictures" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        picture.save(path, "JPEG" if name.endswith("JPG") else None, **options)
    (tmp_path / "pictures" / "notes.txt").write_text("x")
    (tmp_path / "pictures" / ".hidden.png").write_text("x")
    return tmp_path / "pictures"


def run(capsys, *arguments):
    main([*map(str, arguments), "--device", "cpu"])
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_a_folder_is_segmented_as_by_model_and_processor(model, pictures, tmp_path, capsys, caplog, recwarn):
    caplog.set_level("INFO")
    lines = run(capsys, model, pictures, "-o", tmp_path / "out", "--batch_size", "3")
    written = sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png"))
    assert written == ["a.png", "b/c.png", "b/d.png", "b/e.f.png"]
    loaded = Sam2UNetForSemanticSegmentation.from_pretrained(model)
    processor = Sam2UNetImageProcessor.from_pretrained(model)
    assert [os.path.basename(line["picture"]) for line in lines] == ["a.png", "c.JPG", "d.tif", "e.f.webp"]
    for line in lines:
        picture = read_picture(Path(line["picture"]))
        outputs = loaded(**processor(picture, return_tensors="pt"))
        size = (picture.height, picture.width)
        (expected,) = processor.post_process_semantic_segmentation(outputs, target_sizes=[size])
        with Image.open(line["segmentation"]) as opened:
            assert opened.mode == "L"
            np.testing.assert_array_equal(opened, expected)
        assert line["pixels"] == {"cells": int((expected > 0).sum()), "nuclei": int((expected == 2).sum())}
    assert 0 < sum(line["pixels"]["cells"] for line in lines) < sum(70 * 90 for _ in lines)
    with Image.open(tmp_path / "out" / "b" / "c.png") as turned:
        assert turned.size == (65, 90)  # as EXIF says
    assert "4 pictures. Label ids: 0 background, 1 cells without nuclei, 2 nuclei." in caplog.text
    assert "notes.txt: not read" in caplog.text
    assert not [warning for warning in recwarn if "nearly black" in str(warning.message)]


def test_single_pictures_are_taken_too(model, pictures, tmp_path, capsys):
    lines = run(capsys, model, pictures / "a.png", pictures / "b" / "d.tif", "-o", tmp_path / "out")
    assert [os.path.basename(line["segmentation"]) for line in lines] == ["a.png", "d.png"]


def test_pictures_that_cannot_be_segmented_are_named_and_the_others_go_on(model, pictures, tmp_path, capsys, caplog):
    (pictures / "a.png").write_bytes((pictures / "a.png").read_bytes()[:99])
    frames = [Image.new("L", (64, 64)), Image.new("L", (64, 64), 9)]
    frames[0].save(pictures / "b" / "g.tif", save_all=True, append_images=frames[1:])
    Image.fromarray(np.full((64, 64), 5000, np.uint16)).save(pictures / "b" / "h.png")
    with pytest.raises(SystemExit, match="3 of 6 pictures could not be segmented, see above"):
        run(capsys, model, pictures, "-o", tmp_path / "out")
    assert f"Left out: {pictures / 'a.png'} cannot be read" in caplog.text
    assert (
        f"Left out: {pictures / 'b/g.tif'} has 2 pages, of which one would be read. Save them as files" in caplog.text
    )
    assert f"Left out: {pictures / 'b/h.png'}: `images` must be non-negative; integer images in 0..4095" in caplog.text
    assert len(list((tmp_path / "out").rglob("*.png"))) == 3


def test_folders_that_cannot_be_used_are_named_before_the_work(model, pictures, tmp_path, capsys):
    def refuse(match, *arguments):
        with pytest.raises(SystemExit, match=match):
            run(capsys, model, *arguments)

    refuse("nowhere does not exist. Pass a folder of pictures", tmp_path / "nowhere", "-o", tmp_path / "out")
    refuse("lies in .*pictures, so that the results would be taken for", pictures, "-o", pictures / "out")
    refuse("a.png would be replaced by a result", pictures / "a.png", "-o", pictures)
    (tmp_path / "empty").mkdir()
    refuse(r"empty holds no pictures \(.png", tmp_path / "empty", "-o", tmp_path / "out")
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.bmp").write_bytes((pictures / "a.png").read_bytes())
    refuse(r"a.png and .*a.bmp would be written to the same file", pictures, tmp_path / "more", "-o", tmp_path / "out")
    (pictures / "a.jpg").write_bytes((pictures / "a.png").read_bytes())
    refuse("a.jpg and .*a.png have the same name. Remove one", pictures, "-o", tmp_path / "out")


def test_models_of_several_contrasts_or_slices_segment_no_pictures(pictures, tmp_path, capsys):
    small_model(backbone_config=small_backbone_config(num_channels=6)).save_pretrained(tmp_path / "model")
    processor = Sam2UNetImageProcessor(num_channels=6, neighbours=1, modalities=["flair", "t2"])
    processor.save_pretrained(tmp_path / "model")
    match = r"takes images of 6 channels \(flair, t2, 1 neighbouring .*Segment scans by `python -m sam2unet_hf.volume`"
    with pytest.raises(SystemExit, match=match):
        run(capsys, tmp_path / "model", pictures, "-o", tmp_path / "out")


def test_large_ids_are_written_with_16_bits(tmp_path):
    write_label_map(np.array([[0, 300]]), tmp_path / "x" / "y.png")
    with Image.open(tmp_path / "x" / "y.png") as opened:
        assert np.asarray(opened).tolist() == [[0, 300]]
