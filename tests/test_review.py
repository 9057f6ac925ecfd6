"""The reviewer's page without a browser: what is hidden, downloaded and compared, and what its tables say."""

import re
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from scan_files import make_segmentation, make_tumours

from sam2unet_hf.lesions import number_lesions, remove_lesions
from sam2unet_hf.scans_sam2unet import ScanError


gr = pytest.importorskip("gradio")
sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
import app  # noqa: E402 - the scripts are no package
import case_upload  # noqa: E402
import review  # noqa: E402
from case_view import CaseView, draw_slice, share_head_box  # noqa: E402
from review import PageState, Review  # noqa: E402
from review_table import format_change, review_tables  # noqa: E402


def make_review(labels, tmp_path, axes="RAS", reference=None):
    segmentation = make_segmentation(labels, tmp_path, axes)
    head = np.pad(np.full(np.subtract(labels.shape, 2), 100, np.uint8), 1)
    return Review(CaseView("Case", segmentation, {"flair": head}, "flair", reference))


def rows_of(page, table):
    """The cells of a table, without tags, line by line."""
    (content,) = re.findall(rf'<table id="{table}".*?</table>', page, re.DOTALL)
    rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr.*?</tr>", content)]
    return [[re.sub(r"<[^>]+>", " ", cell).replace("&nbsp;", " ").split() for cell in row] for row in rows]


def labels_in(path):
    image = nib.load(path)
    return np.asarray(image.dataobj), image.affine


def test_what_is_left_is_downloaded_on_the_grid_of_the_scan(tmp_path):
    labels = make_tumours()
    state = PageState([make_review(labels, tmp_path, "RAS", reference=labels)])
    (own,) = state.reviews
    scan = own.view.segmentation.scan

    def saved():
        (path,) = state.save(3)
        assert Path(path).name == "Case_seg.nii.gz"
        voxels, affine = labels_in(path)
        np.testing.assert_array_equal(affine, scan.affine)
        return scan.from_file_grid(voxels)

    np.testing.assert_array_equal(saved(), labels)
    assert rows_of(review_tables(state), "volumes")[1][3] == ["1.000"]
    state.hide("0-2-2", True)  # ET 2 becomes core
    numbers = number_lesions(own.view.segmentation, "ET")
    np.testing.assert_array_equal(saved(), np.where(numbers == 2, 1, labels))
    volumes = rows_of(review_tables(state), "volumes")
    assert volumes[1][1] == volumes[1][2] == ["1.7"]
    assert float(volumes[3][3][0]) < 1
    state.hide("0-1-all", True)  # all core becomes tumour, and its enhancing parts go with it
    np.testing.assert_array_equal(saved(), np.where(labels > 0, 2, 0))
    table = review_tables(state)
    assert table.count("disabled") == 3
    assert 'title="hidden with TC 1"' in table
    state.hide("0-1-all", False)  # what was hidden by itself stays hidden
    np.testing.assert_array_equal(saved(), np.where(numbers == 2, 1, labels))
    state.hide("0-0-1", True)
    tumour = number_lesions(own.view.segmentation, "WT")
    np.testing.assert_array_equal(saved(), np.where(tumour == 1, 0, labels))
    before = set(own.hidden)
    for control in ("0-9-1", "1-0-1", "0-0-77", "../x", "0-0-rest"):
        state.hide(control, True)
        assert own.hidden == before, control
    state.hide("0-0-all", True)
    assert not saved().any()


def test_two_presses_at_once_leave_the_table_and_the_file_alike(tmp_path, monkeypatch):
    state = PageState([make_review(make_tumours(), tmp_path)])
    (own,) = state.reviews
    has_begun = threading.Event()

    def remove_slowly_at_first(segmentation, keys):
        left = remove_lesions(segmentation, keys)
        if not has_begun.is_set():
            has_begun.set()
            time.sleep(0.3)
        return left

    monkeypatch.setattr(review, "remove_lesions", remove_slowly_at_first)
    first, second = (
        threading.Thread(target=state.hide, args=(control, True), daemon=True) for control in ("0-0-1", "0-0-2")
    )
    first.start()
    assert has_begun.wait(10)
    second.start()
    for thread in (first, second):
        thread.join(10)
    assert own.hidden == {("WT", 1), ("WT", 2)}
    assert not own.labels.any()
    assert not labels_in(state.save(3)[0])[0].any()


def test_the_list_of_lesions(tmp_path, monkeypatch):
    state = PageState([make_review(make_tumours(), tmp_path)])
    lesions = rows_of(review_tables(state), "lesions")
    assert [row[0] for row in lesions[1:]] == [
        [region, str(number)] for region, count in (("WT", 2), ("TC", 2), ("ET", 3)) for number in range(1, count + 1)
    ]
    first = state.reviews[0].lesions[0]
    assert lesions[1][1:] == [["1.68"], [f"{first.diameter_mm:.1f}", "×", f"{first.perpendicular_mm:.1f}"], ["2"]]
    # Specks share a line.
    monkeypatch.setattr(review, "LISTED", 1)
    monkeypatch.setattr("review_table.LISTED", 1)
    lesions = rows_of(review_tables(state), "lesions")
    assert [row[0] for row in lesions[5:]] == [["ET", "1"], ["2", "smaller", "lesions", "of", "ET"]]
    state.hide("0-2-rest", True)
    assert state.reviews[0].hidden == {("ET", 2), ("ET", 3)}
    empty = PageState([make_review(np.zeros_like(make_tumours()), tmp_path)])
    assert "lesions" not in review_tables(empty)
    assert app.describe(empty.reviews) == "Case: no tumour found"


def test_names_of_regions_are_text(tmp_path):
    segmentation = make_segmentation(make_tumours(), tmp_path, regions={"<b>'\"&": [1, 2, 3]})
    table = review_tables(PageState([Review(CaseView("Case", segmentation, {}, "flair"))]))
    assert "<b>" not in table
    assert "&lt;b&gt;" in table


def test_the_diameters_of_the_chosen_lesion_are_drawn(tmp_path):
    state = PageState([make_review(make_tumours(), tmp_path)])
    (own,) = state.reviews
    assert state.select("0-0-rest") is None
    lesion = state.select("0-0-1")
    lines = (lesion.diameter, lesion.perpendicular)
    plain, crossed = (draw_slice(own.view, own.labels, "axial", 2, "flair", [], 0.5, drawn) for drawn in ((), lines))
    assert lesion.slice_index == 2
    assert (plain != crossed).any()
    shown = app.draw_pictures(state, ["axial"], "flair", [], 0.5, 2)
    assert [picture.visible for picture in shown] == [True, False]
    # The white line runs from end to end.
    white = np.argwhere((crossed == 255).all(axis=-1) & (plain != 255).any(axis=-1))
    corner = np.array([side.start for side in own.view.head_box(3)[:2]])
    scale = crossed.shape[1] / own.view.crop(own.labels, "axial", 2, 3).shape[1]
    for end in lesion.diameter:
        row, column = ((np.array(end) - corner + 0.5) * scale)[::-1]
        assert np.linalg.norm(white - (row, column), axis=1).min() < 3
    state.hide("0-0-1", True)
    assert state.selected_lesion(0) is None


@pytest.fixture
def two(tmp_path):
    earlier, later = make_tumours(), make_tumours()
    earlier[2:6, 3:15, 2:9] = 0
    later[28:32] = 0
    later[34:38, 2:6, 5] = 2
    reviews = [make_review(labels, tmp_path, axes) for labels, axes in ((earlier, "LPS"), (later, "RAS"))]
    return PageState(reviews)


def test_two_time_points_side_by_side(two):
    page = review_tables(two)
    volumes = rows_of(page, "volumes")
    assert volumes[0] == [["region"], ["earlier", "(ml)"], ["later", "(ml)"], ["change"]]
    assert volumes[1] == [["WT"], ["1.4"], ["1.7"], ["+0.3", "ml", "(+26", "%)"]]
    lesions = [row for row in rows_of(page, "lesions") if "WT" in row[0] + row[1]]
    assert [row[2][0] for row in lesions] == ["matched", "new", "gone"]
    products = rows_of(page, "products")
    assert float(products[1][1][0]) < float(products[1][2][0])
    assert products[3][1:3] == [["0"], ["0"]]  # none of 10 mm
    two.hide("1-0-2", True)
    two.hide("01-2-all", True)
    assert two.reviews[0].hidden == {("ET", 1), ("ET", 2), ("ET", 3)}
    assert two.reviews[1].hidden == {("WT", 2), ("ET", 1), ("ET", 2)}
    assert rows_of(review_tables(two), "volumes")[3][1:3] == [["0.0"], ["0.0"]]
    earlier, later = (labels_in(path)[0] for path in two.save(3))
    assert 3 not in earlier
    assert 3 not in later
    assert np.count_nonzero(later) == 20 * 12 * 7


def test_smaller_lesions_of_two_time_points_are_counted_once(two, monkeypatch):
    monkeypatch.setattr(review, "LISTED", 0)
    monkeypatch.setattr("review_table.LISTED", 0)
    row = rows_of(review_tables(two), "lesions")[1]
    # One is there at both times, one is new and one is gone.
    volumes = [own.left.volumes_ml["WT"] for own in two.reviews]
    assert row[0] == ["3", "smaller", "lesions", "of", "WT", f"{volumes[0]:.2f}", "ml"]
    assert row[1] == [f"{volumes[1]:.2f}", "ml"]
    assert row[2][:2] == [f"{volumes[1] - volumes[0]:+.2f}", "ml"]
    monkeypatch.setattr(review, "LISTED", 1)
    monkeypatch.setattr("review_table.LISTED", 1)
    rows = [row for row in rows_of(review_tables(two), "lesions") if "smaller" in row[0]]
    assert rows[0][0][:5] == ["2", "smaller", "lesions", "of", "WT"]
    two.hide("01-0-rest", True)
    rows = [row for row in rows_of(review_tables(two), "lesions") if "smaller" in row[0]]
    assert rows[0][2] == ["hidden"]


def test_a_lesion_of_which_a_part_is_hidden(two):
    (line,) = [line for line in two.lines["WT"] if all(line)]
    assert two.change_of("WT", line).kind == "matched"
    two.hide(f"1-0-{line[1][0].number}", True)
    assert two.change_of("WT", line).kind == "gone"


def test_patients_are_told_by_the_names_of_cohorts(two):
    same = [("BraTS-GLI-00001-000", "BraTS-GLI-00001-001"), ("Brats18_CBICA_AAB_1", "Brats18_CBICA_AAB_2")]
    assert all(app.known_patient(first) == app.known_patient(second) is not None for first, second in same)
    names = "BraTS20_Training_001 BraTS20_Training_002 BraTS2021_00001 Brats17_TCIA_101_1 BraTS19_2013_10_1"
    names += " Phantom_001 BRATS_001 BraTS-MET-00001-000"
    assert len({app.known_patient(name) for name in names.split()} - {None}) == 8
    assert app.known_patient("AX_FLAIR") is app.known_patient("Case") is None
    assert app.describe(two.reviews).endswith("which the names Case and Case do not tell.")
    two.reviews[0].view.name = two.reviews[1].view.name = "Phantom_031"
    assert app.describe(two.reviews) == "Earlier scan, Phantom_031: done; later scan, Phantom_031: done"


def test_new_scans_take_the_place_of_the_earlier_ones_too(monkeypatch):
    monkeypatch.setattr(app, "phantom_files", lambda: (["later"], ["earlier"]))
    page = app.build_page(lambda model: None, ["tiny"])
    elements = {block.elem_id: block for block in page.blocks.values()}
    files, earlier = elements["files"], elements["earlier"]

    def handler(block, event):
        (found,) = [one for one in page.fns.values() if (block._id, event) in one.targets]
        return found

    cleared = handler(files, "upload")
    assert (cleared.outputs, cleared.fn()) == ([earlier], None)
    example = handler(elements["phantom"], "click")
    assert example.outputs == [files, earlier]
    assert example.fn() == (["later"], None)
    folders = [block for block in page.blocks.values() if isinstance(block, gr.UploadButton)]
    found = next(handler(folder, "upload") for folder in folders if folder.label == "Case folder")
    assert (found.outputs, found.fn(["a"])) == ([files, earlier], (["a"], None))


def test_changes_in_words():
    assert format_change(10, 12.5, "ml", 1) == "+2.5&nbsp;ml (+25&nbsp;%)"
    assert format_change(10, 5, "ml", 1) == "\N{MINUS SIGN}5.0&nbsp;ml (\N{MINUS SIGN}50&nbsp;%)"
    assert format_change(0, 3, "ml", 1) == "+3.0&nbsp;ml (new)"
    assert format_change(3, 3.01, "ml", 1) == format_change(0, 0, "ml", 1) == "no change"


def test_two_heads_are_cropped_alike(tmp_path):
    first, second = (make_review(make_tumours(), tmp_path).view for _ in range(2))
    second = replace(second, grey={"flair": np.roll(second.grey["flair"], 1, axis=0)})
    share_head_box([first, second])
    assert first.head_box(0) == second.head_box(0) == (slice(1, 40), slice(1, 29), slice(1, 11))
    empty = replace(second, grey={"flair": np.zeros_like(second.grey["flair"])})  # is shown whole
    share_head_box([first, empty])
    assert first.head_box(0) == empty.head_box(0) == (slice(0, 40), slice(0, 30), slice(0, 12))


def test_uploads_that_cannot_be_compared(tmp_path):
    """They are told before the segmentation, which takes minutes."""

    class Segment:
        modalities = ["flair"]

    def upload(labels, name, folder):
        path = tmp_path / folder / name
        path.parent.mkdir(exist_ok=True)
        nib.save(nib.Nifti1Image(labels, np.eye(4)), path)
        return [str(path)]

    def segment(*uploads):
        folder = tmp_path / f"links{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        return folder, lambda: app.segment_uploads(Segment(), uploads, folder)

    scan = np.random.default_rng(0).integers(1, 99, (6, 7, 8)).astype(np.int16)
    first = upload(scan, "BraTS-GLI-00001-000-t2f.nii.gz", "a")
    folder, run = segment(first, upload(scan[1:], "BraTS-GLI-00001-001-t2f.nii.gz", "b"))
    with pytest.raises(ScanError, match="The two time points are not in the same space.* Register") as raised:
        run()
    assert str(tmp_path) not in case_upload.explain_upload(raised.value, folder)
    assert "`earlier/BraTS-GLI-00001-000-t2f.nii.gz`" in case_upload.explain_upload(raised.value, folder)
    _, run = segment(first, upload(scan, "BraTS-GLI-00002-000-t2f.nii.gz", "c"))
    with pytest.raises(ValueError, match="The scans are of two patients: BraTS-GLI-00001 and BraTS-GLI-00002"):
        run()
    _, run = segment(
        upload(scan, "BraTS20_Training_001_flair.nii.gz", "f"), upload(scan, "BraTS20_Training_002_flair.nii.gz", "g")
    )
    with pytest.raises(ValueError, match="two patients: BraTS20_Training_001 and BraTS20_Training_002"):
        run()
    _, run = segment(upload((scan > 50).astype(np.uint8), "mask.nii.gz", "d"))
    with pytest.raises(ValueError, match="mask.nii.gz is no scan: it holds 2 different values, as a mask does"):
        run()
    folder, run = segment(upload(scan, "Case_t1.nii.gz", "e"))
    with pytest.raises(ScanError, match="no flair scan") as raised:
        run()
    text = case_upload.explain_upload(raised.value, folder)
    assert text.endswith("expected Case_flair.nii[.gz] or Case-t2f.nii[.gz]. Upload it together with the others.")


def test_the_handler_of_the_table(tmp_path):
    page = app.build_page(lambda model: None, ["tiny"])
    block = next(block for block in page.fns.values() if getattr(block.fn, "__name__", "") == "press")
    press = block.fn
    state = PageState([make_review(make_tumours(), tmp_path)])

    def send(lesion, hide=None):
        return press(state, 3, "flair", ["WT"], 0.5, 1, 2, 3, gr.EventData(None, {"lesion": lesion, "hide": hide}))

    kept, table, download, earlier, *indices = send("0-0-1", hide=True)[:7]
    assert kept is state
    assert "removed" in table
    assert not earlier.visible
    assert np.count_nonzero(labels_in(download.value["path"])[0]) == 7
    assert indices == [1, 2, 3]
    changed = send("0-0-2")
    lesion = state.selected_lesion(0)
    assert changed[4:7] == [lesion.slice_index, *np.mean(lesion.diameter, axis=0).round().astype(int)[::-1]]
    assert len(changed) == len(send("0-0-nothing")) == len(block.outputs) == 13
    # Gradio counts the hour from the last event that has the state among its outputs.
    assert isinstance(block.outputs[0], gr.State)
    assert changed[0] is send("0-0-nothing")[0] is state
    state.is_replaced = True
    hidden = set(state.reviews[0].hidden)
    assert all("value" not in answer for answer in send("0-0-1", hide=False))  # leaves all as it is
    assert state.reviews[0].hidden == hidden
    with pytest.raises(gr.Error, match="no longer kept"):
        press(None, 3, "flair", ["WT"], 0.5, 1, 2, 3, gr.EventData(None, {"lesion": "0-0-1", "hide": True}))
