"""The page of examples/app.py: what it draws, and in a browser what a user does."""

import os
import re
import shutil
import sys
import tempfile
import time
from pathlib import Path
from urllib.parse import quote

import nibabel as nib
import numpy as np
import pytest
import torch
from common import small_model

from dataset_scripts.phantom import make_phantom_case, write_phantom_cohort
from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.cases_sam2unet import find_cases
from sam2unet_hf.scans_sam2unet import DECATHLON_ORDER, ScanError, take_slice
from sam2unet_hf.volume import Sam2UNetVolumePipeline


gr = pytest.importorskip("gradio")
httpx = pytest.importorskip("httpx")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import app  # noqa: E402 - the scripts are no package
import case_upload  # noqa: E402
import case_view  # noqa: E402
from case_view import PLANE_ORDER, REGION_COLOURS, draw_slice, largest_slice, segment_case  # noqa: E402
from review import PageState, Review  # noqa: E402
from review_table import volume_table  # noqa: E402


REGIONS = {"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}
THREE = ["flair", "t1ce", "t2"]


def bright_voxels(pixel_values, **kwargs):
    """Stand in for the model: regions are the voxels above thresholds, as certain as they can be."""
    grey = pixel_values.mean(dim=1)
    return type("Output", (), {"logits": torch.stack([grey + 1.2, grey + 0.4, grey - 0.4], dim=1) * 30})


@pytest.fixture(scope="module")
def cohort(tmp_path_factory):
    return write_phantom_cohort(tmp_path_factory.mktemp("app") / "brats", num_patients=2, shape=(40, 44, 26))


@pytest.fixture(scope="module")
def segment():
    model = small_model(regions=REGIONS).eval()
    processor = Sam2UNetImageProcessor(regions=REGIONS, do_resize=False)
    model.forward = bright_voxels
    return Sam2UNetVolumePipeline(model, processor, THREE)


@pytest.fixture(scope="module")
def view(cohort, segment):
    return segment_case(segment, find_cases(cohort)[0])


def test_uploads_are_linked_by_their_last_name_alone(tmp_path):
    (tmp_path / "links").mkdir()
    (tmp_path / "x.nii").write_bytes(b"")
    case = case_upload.gather_case([f"{tmp_path}/links/../x.nii"], ["flair"], tmp_path / "links")
    assert case.files["flair"] == tmp_path / "links" / "x.nii"
    with pytest.raises(ScanError, match=r"x.nii` is not a NIfTI file"):
        case.read_images(["flair"])


def test_a_picture_shows_the_scan_its_regions_and_its_sides(view, monkeypatch):
    monkeypatch.setattr(case_view, "draw_orientation_labels", lambda picture, letters: None)
    index = int((view.reference == 3).sum(axis=(0, 1)).argmax())

    def draw(regions, opacity):
        return draw_slice(view, view.reference, "axial", index, "flair", regions, opacity)

    plain = draw([], 0.5)
    assert max(plain.shape) <= case_view.PICTURE_PIXELS
    np.testing.assert_array_equal(plain, draw(list(REGIONS), 0.0))
    full = draw(list(REGIONS), 1.0)
    labels = view.crop(view.reference, "axial", index, case_view.PICTURE_MARGIN)
    rows, columns = np.indices(labels.shape)
    scale = np.array(full.shape[:2]) / labels.shape
    at = [((grid + 0.5) * factor).astype(int) for grid, factor in zip((rows, columns), scale, strict=True)]
    # Id 1 is in TC, 2 in WT alone, 3 in ET.
    colours = {0: None, 1: REGION_COLOURS[1], 2: REGION_COLOURS[0], 3: REGION_COLOURS[2]}
    for label_id, colour in colours.items():
        inside = labels == label_id
        assert inside.any(), label_id
        shown = full[at[0][inside], at[1][inside]]
        expected = plain[at[0][inside], at[1][inside]]
        if colour is not None:
            expected = np.broadcast_to(tuple(bytes.fromhex(colour[1:])), shown.shape)
        np.testing.assert_array_equal(shown, expected)
    half = draw(["ET"], 0.5).astype(int)
    changed = (half != plain).any(axis=-1)
    np.testing.assert_array_equal(changed[at[0], at[1]], labels == 3)
    mixed = (plain.astype(int) + tuple(bytes.fromhex(REGION_COLOURS[2][1:]))) / 2
    assert np.abs(half - mixed)[changed].max() <= 1.5


def test_pictures_are_at_one_scale_whatever_the_voxels(cohort, segment, tmp_path):
    """A file with voxels of 1 x 1 x 2 mm is shown as high in the coronal plane as the one it was made from."""
    case = find_cases(cohort)[0]
    paths = {}
    for name in THREE:
        image = nib.load(case.path(name))
        affine = image.affine @ np.diag([1, 1, 2, 1])
        paths[name] = tmp_path / f"Thick_{name}.nii.gz"
        nib.save(nib.Nifti1Image(np.asarray(image.dataobj)[:, :, ::2], affine), paths[name])
    views = [segment_case(segment, found) for found in (case, find_cases(tmp_path)[0])]
    thin, thick = (draw_slice(view, view.prediction, "coronal", 20, "flair", [], 0) for view in views)
    ratio = np.divide(*thin.shape[:2]) / np.divide(*thick.shape[:2])
    assert ratio == pytest.approx(1, abs=0.25)  # the margin around the head is of voxels


def test_a_mark_on_the_patients_left_is_where_l_stands():
    """The letters name the sides that `take_slice` puts there."""
    marks = {name: np.zeros((9, 9, 9), bool) for name in "LRAPSI"}
    marks["L"][-1] = marks["R"][0] = marks["A"][:, 0] = marks["P"][:, -1] = marks["S"][:, :, -1] = marks["I"][
        :, :, 0
    ] = True
    for plane, letters in case_view.ORIENTATION_LABELS.items():
        left, right, top, bottom = (take_slice(marks[letter], plane, 4) for letter in letters)
        assert left[:, 0].all()
        assert right[:, -1].all()
        assert top[0].all()
        assert bottom[-1].all()


def start(view, plane):
    """Where the page starts."""
    return largest_slice(plane, view.prediction, view.reference)


def test_pages_start_where_the_most_tumour_is(view):
    labels = view.prediction
    for axis, plane in enumerate(("sagittal", "coronal", "axial")):
        pixels = np.count_nonzero(np.moveaxis(labels, axis, 0), axis=(1, 2))
        assert pixels[start(view, plane)] == pixels.max()
    assert start(view, "axial") == view.segmentation.largest_slice


def test_a_model_of_many_regions_has_colours_for_all_and_names_are_text():
    names = [f"<b>{number}" for number in range(7)]
    assert case_view.region_colours(names)[names[6]] == REGION_COLOURS[1]
    assert "<b>" not in app.legend(names)
    assert app.legend(names).count("background:") == 7


def test_the_table_has_volumes_and_dice(view):
    table = volume_table(PageState([Review(view)]))
    rows = [re.findall(r"<td>(?:<label>.*?> )?([^<]+)<?", row) for row in re.findall("<tr>.*?</tr>", table)[1:]]
    assert [row[0] for row in rows] == list(REGIONS)
    voxel_ml = np.prod(view.spacing_mm) / 1000
    for region, volume, reference, dice in rows:
        masks = [np.isin(labels, REGIONS[region]) for labels in (view.prediction, view.reference)]
        assert (float(volume), float(reference)) == pytest.approx([mask.sum() * voxel_ml for mask in masks], abs=0.051)
        overlap = 2 * (masks[0] & masks[1]).sum() / (masks[0].sum() + masks[1].sum())
        assert float(dice) == pytest.approx(overlap, abs=6e-4)


def test_files_are_gathered_as_cases(cohort, tmp_path):
    paths = [str(path) for path in (cohort / "Phantom_001").iterdir()]

    def gather(paths, modalities=THREE):
        folder = Path(tempfile.mkdtemp(dir=tmp_path))
        return case_upload.gather_case(paths, modalities, folder)

    case = gather([*paths, "notes.txt"])
    assert case.case_id == "Phantom_001"
    assert set(case.files) == {"t1", "t1ce", "t2", "flair", "seg"}
    shutil.copy(cohort / "Phantom_001" / "Phantom_001_flair.nii.gz", tmp_path / "scan.nii.gz")
    case = gather([str(tmp_path / "scan.nii.gz")], ["flair"])
    assert (case.case_id, list(case.files)) == ("scan", ["flair"])
    with pytest.raises(ValueError, match=r"takes flair, t1ce, t2. Upload them .* Case_flair.nii.gz, got scan.nii.gz"):
        gather([str(tmp_path / "scan.nii.gz")])
    with pytest.raises(ValueError, match=r"No scan among the files"):
        gather(["notes.txt"])
    with pytest.raises(ValueError, match=r"Two files are named Phantom_001_t1.* Upload each scan of one patient once"):
        gather([*paths, *[path for path in paths if "_t1." in path]])
    case = gather([path for path in paths if "_t2" not in path])
    with pytest.raises(ScanError, match="Phantom_001: no t2"):
        case.read_images(THREE)
    upper = tmp_path / "CASE_FLAIR.NII.GZ"
    shutil.copy(cohort / "Phantom_001" / "Phantom_001_flair.nii.gz", upper)
    assert gather([str(upper)], ["flair"]).files["flair"].name == upper.name


def test_a_scan_of_the_decathlon_and_its_mask_of_the_same_name_are_one_case(cohort, segment, tmp_path):
    files = {name: cohort / "Phantom_001" / f"Phantom_001_{name}.nii.gz" for name in (*DECATHLON_ORDER, "seg")}
    images = {name: nib.load(path) for name, path in files.items()}
    scan = np.stack([np.asarray(images[name].dataobj) for name in DECATHLON_ORDER], axis=-1)
    mask = np.choose(np.asarray(images["seg"].dataobj), [0, 2, 1, 0, 3]).astype(np.uint8)  # the numbering of the task
    paths = []
    for folder, voxels in (("image", scan), ("mask", mask)):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "BRATS_007.nii.gz"
        nib.save(nib.Nifti1Image(voxels, images["flair"].affine), path)
        paths.append(str(path))

    def gather(paths, modalities=THREE):
        return case_upload.gather_case(paths, modalities, Path(tempfile.mkdtemp(dir=tmp_path)))

    case = gather(paths)
    assert case.case_id == "BRATS_007"
    view, expected = segment_case(segment, case), segment_case(segment, find_cases(cohort)[0])
    np.testing.assert_array_equal(view.prediction, expected.prediction)
    np.testing.assert_array_equal(view.reference, expected.reference)
    assert "seg" not in gather(paths[:1]).files
    with pytest.raises(
        ValueError, match=r"Two files are named BRATS_007.nii.gz. Upload each scan of one patient once."
    ):
        gather([*paths, paths[0]])
    shutil.copy(paths[0], tmp_path / "BRATS_008.nii.gz")
    with pytest.raises(ValueError, match="The files are of 2 patients: BRATS_007, BRATS_008. Upload those of one."):
        gather([*paths, str(tmp_path / "BRATS_008.nii.gz")])
    with pytest.raises(ValueError, match="The model takes flair, t1ce, t2.*, got BRATS_007.nii.gz"):
        gather(paths[1:])


def test_files_of_two_patients_are_told_by_their_names(segment, cohort):
    page = app.build_page(lambda model: segment, ["tiny"])
    functions = (block.fn for block in page.fns.values())
    segment_files = next(function for function in functions if getattr(function, "__name__", "") == "segment_files")
    paths = [str(path) for patient in ("Phantom_001", "Phantom_002") for path in (cohort / patient).iterdir()]
    with pytest.raises(gr.Error) as raised:
        segment_files(paths, "tiny", [], False, 3, None)
    assert raised.value.message == "The files are of 2 patients: Phantom_001, Phantom_002. Upload those of one."


def test_the_example_is_a_patient_that_no_example_trains_on():
    files, earlier = case_upload.phantom_files()
    assert {Path(path).name for path in files} == {
        f"Phantom_031_{name}.nii.gz" for name in ("t1", "t1ce", "t2", "flair", "seg")
    }
    drawn = make_phantom_case([0, 31])
    for path in files:
        name = Path(path).name.removeprefix("Phantom_031_").removesuffix(".nii.gz")
        np.testing.assert_array_equal(np.asarray(nib.load(path).dataobj), drawn[name])
    assert [Path(path).name for path in files if "_seg" not in path] == sorted(Path(path).name for path in earlier)
    for path in (files[0], earlier[0]):
        np.testing.assert_array_equal(nib.load(path).affine, nib.load(files[0]).affine)


# -------------------------------------------------------------------------------------------------------- as a server


@pytest.fixture(scope="module")
def loaded():
    """Names of the models that the page loaded."""
    return []


@pytest.fixture(scope="module")
def address(segment, loaded, tmp_path_factory):
    def load(model):
        loaded.append(model)
        return segment

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(tmp_path_factory.mktemp("gradio")))
        page = app.build_page(load, ["tiny"], ["axial"])
        _, url, _ = page.launch(prevent_thread_lock=True, quiet=True, **app.LAUNCH)
        yield url
        page.close()


def test_main_listens_on_this_machine_alone(segment, monkeypatch):
    """Whatever Gradio's variables say."""
    monkeypatch.setattr("gradio.http_server.LOCALHOST_NAME", "0.0.0.0")  # what GRADIO_SERVER_NAME says when imported
    for name, value in {"GRADIO_SERVER_NAME": "0.0.0.0", "GRADIO_SHARE": "True", "GRADIO_RUN_HISTORY": "True"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("SPACE_ID", raising=False)
    monkeypatch.setattr(app.Sam2UNetVolumePipeline, "from_pretrained", lambda *args, **kwargs: segment)
    launch, pages = gr.Blocks.launch, []

    def launch_and_return(page, **kwargs):
        pages.append(page)
        return launch(page, prevent_thread_lock=True, quiet=True, **kwargs)

    monkeypatch.setattr(gr.Blocks, "launch", launch_and_return)
    app.main(["--model", "tiny"])
    (page,) = pages
    try:
        sockets = [socket for server in page.server.servers for socket in server.sockets]
        assert [socket.getsockname()[0] for socket in sockets] == ["127.0.0.1"]
        assert page.share_url is None
        assert not page.analytics_enabled
        assert not getattr(page, "run_history", False)
    finally:
        page.close()
    monkeypatch.setenv("SPACE_ID", "tester/page")
    assert app.parse_arguments([]).server_name == "0.0.0.0"


def upload(address, name, content):
    """Return where the page keeps a file that is sent to it."""
    answer = httpx.post(f"{address}gradio_api/upload", files={"files": (name, content)})
    assert answer.status_code == 200
    return Path(answer.json()[0])


def test_the_page_gives_out_what_was_sent_to_it_and_no_other_file(address, cohort):
    kept = upload(address, "../../../escaped_flair.nii.gz", b"scan")
    root = kept.parents[1]
    assert str(root) == gr.utils.get_upload_folder()
    assert kept.name == "escaped_flair.nii.gz"
    assert httpx.get(f"{address}gradio_api/file={kept}").content == b"scan"
    scan = next((cohort / "Phantom_001").iterdir())
    roundabout = f"{kept.parent}/{os.path.relpath(scan, kept.parent)}"
    for path in (scan, roundabout, app.__file__, os.path.relpath(app.__file__), "/etc/hostname"):
        assert httpx.get(f"{address}gradio_api/file={quote(str(path), safe='')}").status_code in (403, 404), path


def segment_by_request(address, scan, model="tiny"):
    """Press the button as a program does, and return the last event."""
    data = [[{"path": str(scan), "meta": {"_type": "gradio.FileData"}}], model, ["axial"], False, 3, None]
    call = f"{address}gradio_api/call/segment_files"
    event = httpx.post(call, json={"data": data}).json()["event_id"]
    return re.findall(r"event: (\w+)", httpx.get(f"{call}/{event}", timeout=60).text)[-1]


def test_a_request_names_uploaded_files_and_offered_models_only(address, loaded, cohort):
    scan = cohort / "Phantom_001" / "Phantom_001_flair.nii.gz"
    kept = upload(address, scan.name, scan.read_bytes())
    loaded.clear()
    assert segment_by_request(address, scan) == "error"
    assert segment_by_request(address, kept, "someone/else") == "error"
    assert loaded == []
    segment_by_request(address, kept)
    assert loaded == ["tiny"]


# ------------------------------------------------------------------------------------------------------- in a browser


@pytest.fixture
def browser(tmp_path_factory):
    webdriver = pytest.importorskip("selenium.webdriver")
    binaries = [shutil.which(name) for name in ("chromium", "chromedriver")]
    if None in binaries:
        pytest.skip("needs chromium and chromedriver")
    options = webdriver.ChromeOptions()
    options.binary_location = binaries[0]
    options.page_load_strategy = "eager"
    # Gradio's page asks for a script from the internet; a name server that is silent would hold it up.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost, EXCLUDE 127.0.0.1")
    downloads = tmp_path_factory.mktemp("downloads")
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--window-size=1400,1000"):
        options.add_argument(argument)
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    driver = webdriver.Chrome(options, webdriver.ChromeService(binaries[1]))
    driver.set_page_load_timeout(30)
    driver.downloads = downloads
    yield driver
    driver.quit()


def wait(condition, seconds=30):
    """Return what a condition gives once it gives something."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        if time.monotonic() > end:
            raise TimeoutError(condition)
        time.sleep(0.1)
    return found


class Page:
    """The page as a user has it."""

    def __init__(self, browser, address):
        self.browser = browser
        browser.get(address)
        wait(lambda: self.all("#run"))

    def all(self, selector):
        return self.browser.find_elements("css selector", selector)

    def one(self, selector):
        return wait(lambda: self.all(selector))[0]

    def picture(self, name):
        """Return the pixels that the browser shows, or `None`."""
        script = """
            const [name, done] = arguments, image = document.querySelector(`#${name} img`);
            if (!image || !image.complete || !image.naturalWidth) return done(null);
            const canvas = document.createElement("canvas");
            [canvas.width, canvas.height] = [image.naturalWidth, image.naturalHeight];
            const context = canvas.getContext("2d");
            context.drawImage(image, 0, 0);
            const data = context.getImageData(0, 0, canvas.width, canvas.height).data;
            done([canvas.height, canvas.width, Array.from(data)]);
        """
        found = self.browser.execute_async_script(script, name)
        return None if found is None else np.array(found[2], np.uint8).reshape(*found[:2], 4)[..., :3]

    def wait_for(self, name, expected):
        def shown():
            # Browsers load pictures that are far down the page once they are scrolled to.
            self.browser.execute_script("document.querySelector(`#${arguments[0]}`)?.scrollIntoView()", name)
            pixels = self.picture(name)
            return pixels is not None and np.array_equal(pixels, expected)

        wait(shown)

    def upload(self, paths):
        self.one("#files input[type=file]").send_keys("\n".join(map(str, paths)))
        # Every file is listed once it is on the server.
        wait(lambda: all(path.name.split(".")[0] in self.one("#files").text for path in paths))


def test_a_user_segments_scrolls_reviews_and_downloads(browser, address, cohort, view, tmp_path):
    page = Page(browser, address)
    assert "Research use only" in page.one("body").text
    page.upload(sorted((cohort / "Phantom_001").iterdir()))
    page.one("#run").click()

    def expected(plane, index, regions=tuple(REGIONS), side="model", opacity=0.5):
        labels = view.prediction if side == "model" else view.reference
        return draw_slice(view, labels, plane, index, "flair", regions, opacity)

    starts = {plane: start(view, plane) for plane in PLANE_ORDER}
    for plane in PLANE_ORDER:
        for side in ("model", "reference"):
            page.wait_for(f"{plane}-{side}", expected(plane, starts[plane], side=side))
    table = page.one("#volumes").text
    assert all(f"{volume:.1f}" in table for volume in view.segmentation.volumes_ml.values())

    # The wheel over a picture: toward the feet, in that plane alone, and the page stays.
    browser.execute_script(
        "document.querySelector('#axial-model').scrollIntoView();"
        "for (let i = 0; i < 2; i++) document.querySelector('#axial-model img').dispatchEvent("
        "new WheelEvent('wheel', {deltaY: 100, bubbles: true, cancelable: true}));"
    )
    page.wait_for("axial-model", expected("axial", starts["axial"] - 2))
    page.wait_for("axial-reference", expected("axial", starts["axial"] - 2, side="reference"))
    np.testing.assert_array_equal(page.picture("coronal-model"), expected("coronal", starts["coronal"]))
    # The slider, by the keyboard.
    slider = page.one("#coronal input[type=range]")
    slider.send_keys("\ue014")  # arrow right
    page.wait_for("coronal-model", expected("coronal", starts["coronal"] + 1))

    page.one("#regions input[type=checkbox]").click()
    page.wait_for("axial-model", expected("axial", starts["axial"] - 2, ["TC", "ET"]))
    page.wait_for("sagittal-reference", expected("sagittal", starts["sagittal"], ["TC", "ET"], side="reference"))

    # A lesion that is pressed is shown in its slices, with its diameters.
    kept = Review(view)
    lesion = kept.lesions[0]
    page.one('#lesions button[data-lesion="0-0-1"]').click()
    lines = (lesion.diameter, lesion.perpendicular)
    choice = (lesion.slice_index, "flair", ["TC", "ET"], 0.5, lines)
    page.wait_for("axial-model", draw_slice(view, view.prediction, "axial", *choice))
    assert page.one("#axial input[type=number]").get_attribute("value") == str(lesion.slice_index)
    # What is hidden is neither in the pictures nor in the file.
    page.one('#volumes input[data-lesion="0-2-all"]').click()
    kept.change([one.key for one in kept.lesions if one.region == "ET"], hide=True)
    page.wait_for("axial-model", draw_slice(view, kept.labels, "axial", *choice))
    assert not page.one('#volumes input[data-lesion="0-2-all"]').is_selected()

    page.one("#download").click()
    path = wait(lambda: list(browser.downloads.glob("*.nii.gz")))[0]
    assert path.name == "Phantom_001_seg.nii.gz"
    kept.left.save(tmp_path / "direct.nii.gz")
    written, direct = nib.load(path), nib.load(tmp_path / "direct.nii.gz")
    np.testing.assert_array_equal(np.asarray(written.dataobj), np.asarray(direct.dataobj))
    np.testing.assert_array_equal(written.affine, direct.affine)
    assert set(np.unique(written.dataobj)) == {0, 1, 2}


def first_picture(view, plane):
    """The model's picture that the page shows first."""
    return draw_slice(view, view.prediction, plane, start(view, plane), "flair", REGIONS, 0.5)


def test_a_phone_shows_all_without_scrolling_sideways(browser, address, cohort, view):
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride", {"width": 390, "height": 844, "deviceScaleFactor": 2, "mobile": True}
    )
    page = Page(browser, address)
    page.upload(sorted((cohort / "Phantom_001").iterdir()))
    page.one("#run").click()
    page.wait_for("sagittal-model", first_picture(view, "sagittal"))
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 390
    boxes = [page.one(f"#{plane}-model img").rect for plane in PLANE_ORDER]
    assert all(box["width"] > 250 for box in boxes)
    assert boxes[0]["y"] < boxes[1]["y"] < boxes[2]["y"]
    edges = (
        "const r = arguments[0].getBoundingClientRect(); return [r.left, r.right, arguments[0].scrollWidth - r.width]"
    )
    seen = [cell for cell in page.all("#volumes th") if cell.text == "Dice"] + page.all(
        "#files .filename, #lesions td"
    )
    assert len(seen) > 6
    for element in seen:
        left, right, cut_off = browser.execute_script(edges, element)
        assert left >= 0
        assert right <= 390
        assert cut_off < 1, element.text


def test_what_is_wrong_is_said_and_can_be_put_right(browser, address, cohort, view):
    page = Page(browser, address)
    page.one("#run").click()
    wait(lambda: "Upload the files of one patient" in page.one("body").text)
    files = sorted((cohort / "Phantom_001").iterdir())
    page.upload([path for path in files if "_t2" not in path.name])
    page.one("#run").click()
    wait(lambda: "no t2 scan" in page.one("body").text)
    assert "/tmp" not in page.one("body").text
    page = Page(browser, address)
    page.upload([path for path in files if "_seg" not in path.name])
    page.one("#run").click()
    page.wait_for("axial-model", first_picture(view, "axial"))
    assert not [image for image in page.all("#axial-reference img") if image.is_displayed()]
    assert "Dice" not in page.one("#volumes").text
