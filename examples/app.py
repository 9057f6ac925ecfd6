#!/usr/bin/env python
"""A page that segments a patient's scans, shows the tumour in three planes, and lists its lesions for a reviewer.

python examples/app.py --model runs/phantom
python examples/app.py --model runs/phantom runs/regions --planes axial coronal --server_port 7861
"""

import argparse
import functools
import html
import os
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import review_table
from case_upload import explain_upload, gather_case, phantom_files
from case_view import (
    PLANE_ORDER,
    CaseView,
    draw_slice,
    largest_slice,
    region_colours,
    segment_case,
    share_head_box,
)
from review import PageState, Review

from sam2unet_hf.cases_sam2unet import patient_of
from sam2unet_hf.devices import default_device, device_name, fast_dtype
from sam2unet_hf.scans_sam2unet import MODALITIES, PLANES
from sam2unet_hf.time_points import check_same_space
from sam2unet_hf.volume import Sam2UNetVolumePipeline


TITLE = "Brain tumour segmentation with SAM2-UNet"
WARNING = (
    "**Research use only.** This is no medical device: nothing here may guide the care of a patient. Scans and "
    "results stay on the server that runs this page, and are deleted about an hour after they came."
)
LIFETIME_S = 3600
HELP = (
    "Untick a region or a lesion to take it out of the pictures, of the volumes and of the mask to download. Press a "
    "lesion to see its slice and diameters: the longest in an axial slice, and the longest one at right angles. Your "
    "choice is kept for an hour after the last press of a checkbox or a lesion: download the mask before."
)
# Names that tell the patient: those of BraTS from 2023 on, of 2017 to 2019, of 2020 and 2021, of the phantom and the
# Decathlon.
COHORT_NAME = re.compile(
    r"BraTS-.+-\d+|BraTS1[789]_\w+_\d+|BraTS20_\w+_\d+|BraTS2021_\d+|Phantom_\d+|BRATS_\d+", re.IGNORECASE
)
ALL_INTERFACES = "0.0.0.0"  # nosec B104 # not the default
LAUNCH: dict[str, Any] = {
    "state_session_capacity": 20,
    "max_file_size": "500mb",
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    "css_paths": Path(__file__).with_name("app.css"),
    "head_paths": Path(__file__).with_name("app.html"),
    "footer_links": [],
}


def legend(regions: Sequence[str]) -> str:
    """Return the colours of the regions as HTML."""
    items = region_colours(regions).items()
    squares = "".join(f'<span style="background:{colour}"></span>{html.escape(region)}' for region, colour in items)
    return f'<div class="legend">{squares}</div>'


def known_patient(case_id: str) -> str | None:
    """Return the patient that the name of a case of a known cohort tells, and `None` for other names."""
    if not COHORT_NAME.fullmatch(case_id):
        return None
    return re.sub(r"\A(BraTS1[789]_.+)_\d+\Z", r"\1", patient_of(case_id), flags=re.IGNORECASE)


def segment_uploads(
    segment: Sam2UNetVolumePipeline, uploads: Sequence[Sequence[str]], folder: Path, **options: Any
) -> list[CaseView]:
    """Segment the files of one time point, or of two in the same space, which are checked before."""
    names = ["earlier", "later"] if len(uploads) == 2 else [""]
    cases = []
    for name, paths in zip(names, uploads, strict=True):
        (folder / name).mkdir(exist_ok=True)
        cases.append(gather_case(paths, segment.modalities, folder / name))
    if len(cases) == 2:
        # All scans of a cohort may lie on one grid, so that the check of the space does not tell patients apart.
        patients = [known_patient(case.case_id) for case in cases]
        if None not in patients and patients[0] != patients[1]:
            raise ValueError(f"The scans are of two patients: {' and '.join(patients)}. Upload two scans of one.")
        check_same_space(*(case.read_images(segment.modalities[:1])[0] for case in cases))
    views = [segment_case(segment, case, **options) for case in cases]
    share_head_box(views)
    return views


def describe(reviews: Sequence[Review]) -> str:
    """Say what was segmented, where nothing was found, and whether two names may be of two patients."""
    times = [""] if len(reviews) == 1 else ["Earlier scan, ", "later scan, "]
    text = "; ".join(
        f"{time}{review.view.name}: {'done' if review.lesions else 'no tumour found'}"
        for time, review in zip(times, reviews, strict=True)
    )
    names = [review.view.name for review in reviews]
    if len(names) == 2 and None in map(known_patient, names):
        text += f". **Check that both are of one patient**, which the names {names[0]} and {names[1]} do not tell."
    return text


def draw_pictures(
    state: PageState, planes: Sequence[str], modality: str, regions: Sequence[str], opacity: float, *indices: float
) -> list[gr.Image]:
    """Draw two pictures of each plane: model and reference, or the earlier and the later scan."""
    drawn = []
    labels_of_sides = ("Model", "Reference") if len(state.reviews) == 1 else ("Earlier", "Later")
    for plane, index in zip(planes, indices, strict=True):
        shown = [(review.view, review.labels) for review in state.reviews]
        if len(shown) == 1:
            shown.append((shown[0][0], shown[0][0].reference))
        for place, ((view, labels), label) in enumerate(zip(shown, labels_of_sides, strict=True)):
            if labels is None:
                drawn.append(gr.Image(visible=False))
                continue
            lesion = state.selected_lesion(place) if plane == "axial" else None
            lines = (lesion.diameter, lesion.perpendicular) if lesion and lesion.slice_index == int(index) else ()
            picture = draw_slice(view, labels, plane, int(index), modality, regions, opacity, lines)
            drawn.append(gr.Image(picture, visible=True, label=label))
    return drawn


def offer_downloads(state: PageState, enhancing_label: int) -> list[gr.DownloadButton]:
    """Write what is left, and offer it: the later of two time points, then the earlier one."""
    paths = state.save(enhancing_label)
    earlier = gr.DownloadButton(value=paths[0] if len(paths) == 2 else None, visible=len(paths) == 2)
    return [gr.DownloadButton(value=paths[-1], visible=True), earlier]


def build_page(load: Any, models: Sequence[str], planes: Sequence[str] = ()) -> gr.Blocks:
    """Lay out the page; `load` returns the pipeline of a model's name, `planes` are those to average over at first."""
    # Turn off usage statistics, which would be sent to Gradio.
    options: dict[str, Any] = {"analytics_enabled": False, "delete_cache": (LIFETIME_S // 6, LIFETIME_S)}
    upload = functools.partial(gr.File, file_count="multiple", file_types=[".nii", ".gz"], height=180)
    folder_button = functools.partial(gr.UploadButton, file_count="directory", size="sm", min_width=120)
    with gr.Blocks(title=TITLE, fill_width=True, **options) as page:
        state = gr.State(None, time_to_live=LIFETIME_S)
        gr.Markdown(f"# {TITLE}")
        gr.Markdown(WARNING, elem_classes="warning")
        with gr.Row():
            with gr.Column(min_width=300):
                files = upload(
                    label="Scans of one patient (.nii, .nii.gz) under their BraTS names, and the mask if there is one",
                    elem_id="files",
                )
                with gr.Row():
                    folder = folder_button("Case folder")
                    phantom = gr.Button("Phantom example", size="sm", min_width=120, elem_id="phantom")
                with gr.Accordion("Compare with an earlier scan", open=False, elem_id="compare"):
                    earlier_files = upload(
                        label="Earlier scans of the same patient, registered to those above: upload those first",
                        elem_id="earlier",
                    )
                    with gr.Row():
                        earlier_folder = folder_button("Earlier case folder")
                        two_phantoms = gr.Button(
                            "Phantom at two times", size="sm", min_width=120, elem_id="two-phantoms"
                        )
            with gr.Column(min_width=300):
                model = gr.Dropdown(list(models), value=models[0], label="Model", visible=len(models) > 1)
                with gr.Accordion("Options", open=False):
                    chosen_planes = gr.CheckboxGroup(
                        PLANE_ORDER, value=list(planes), label="Average over planes; none: the one of the training"
                    )
                    flips = gr.Checkbox(False, label="Average over mirror images (four times the time)")
                    enhancing_label = gr.Radio(
                        [("3, BraTS from 2023 on", 3), ("4, before", 4)], value=3, label="Label of enhancing tumour"
                    )
                run = gr.Button("Segment", variant="primary", elem_id="run")
                status = gr.Markdown("Upload scans or take the example, then segment.", elem_id="status")
                downloads = [
                    gr.DownloadButton(f"Download {which} (NIfTI)", visible=False, elem_id=name)
                    for which, name in (("mask", "download"), ("earlier mask", "download-earlier"))
                ]
        with gr.Column(visible=False) as results:
            tables = gr.HTML(elem_id="review", js_on_load=review_table.ON_LOAD, apply_default_css=False)
            gr.Markdown(HELP, elem_classes="help")
            with gr.Row():
                modality = gr.Dropdown([], label="Modality", min_width=140)
                regions = gr.CheckboxGroup([], label="Regions in the pictures", min_width=220, elem_id="regions")
                opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", min_width=180, elem_id="opacity")
            colours = gr.HTML()
            sliders, pictures = [], []
            image = functools.partial(gr.Image, format="png", buttons=[], interactive=False, elem_classes="slice")
            with gr.Row(elem_classes="planes"):
                for plane in PLANE_ORDER:
                    with gr.Column(min_width=300):
                        sliders.append(gr.Slider(0, 1, 0, step=1, label=f"{plane.title()} slice", elem_id=plane))
                        sides = ("model", "reference")
                        with gr.Row(elem_classes="sides"):
                            pictures.append([image(elem_id=f"{plane}-{side}", min_width=140) for side in sides])

        def segment_files(
            paths,
            model,
            planes,
            flips,
            enhancing_label,
            earlier_paths,
            shown=None,
            progress=gr.Progress(track_tqdm=True),  # noqa: B008
        ):
            if not paths:
                raise gr.Error("No scans. Upload the files of one patient, or take the phantom example.")
            progress(0, "Loading the model")
            uploads = [earlier_paths, paths] if earlier_paths else [paths]
            with tempfile.TemporaryDirectory() as temporary:
                links = Path(temporary, "upload")
                links.mkdir()
                try:
                    segment = load(model)
                    views = segment_uploads(segment, uploads, links, planes=planes or None, flips=flips)
                    kept = PageState([Review(view) for view in views])
                except (OSError, ValueError) as err:
                    raise gr.Error(explain_upload(err, links), duration=None) from err
            view, modalities = views[-1], list(dict.fromkeys([*segment.modalities, *kept.modalities]))
            found = {
                state: kept,
                status: describe(kept.reviews),
                results: gr.Column(visible=True),
                tables: review_table.review_tables(kept),
                modality: gr.Dropdown(modalities, value="flair" if "flair" in modalities else view.modality),
                regions: gr.CheckboxGroup(kept.regions, value=kept.regions),
                colours: legend(kept.regions),
                **dict(zip(downloads, offer_downloads(kept, enhancing_label), strict=True)),
            }
            for slider, plane in zip(sliders, PLANE_ORDER, strict=True):
                last = view.prediction.shape[PLANES[plane]] - 1
                found[slider] = gr.Slider(maximum=last, value=largest_slice(plane, view.prediction, view.reference))
            if shown is not None:  # a press that is answered later must not bring back the patient before
                with shown.lock:
                    shown.is_replaced = True
            return found

        def draw(planes, state, *choices):
            check_is_kept(state)
            return draw_pictures(state, planes, *choices)

        def press(state, enhancing_label, modality, regions, opacity, axial, coronal, sagittal, event: gr.EventData):
            """Hide or show lesions again, or jump to one."""
            check_is_kept(state)
            indices = [axial, coronal, sagittal]
            nothing = [gr.skip()] * (3 + len(sliders) + 2 * len(pictures))
            with state.lock:  # so that table and files are those of the same lesions
                if state.is_replaced:
                    return [gr.skip(), *nothing]
                if event.hide is not None:
                    state.hide(event.lesion, event.hide)
                    changed = [review_table.review_tables(state), *offer_downloads(state, enhancing_label)]
                elif (lesion := state.select(event.lesion)) is not None:
                    left, posterior = np.mean(lesion.diameter, axis=0).round()
                    indices = [lesion.slice_index, posterior, left]
                    changed = [gr.skip()] * 3
                else:
                    return [state, *nothing]
                drawn = draw_pictures(state, PLANE_ORDER, modality, regions, opacity, *indices)
            # Return the state, because Gradio deletes it an hour after the last event that did.
            return [state, *changed, *map(int, indices), *drawn]

        def save(state, enhancing_label):
            return [gr.skip()] * 2 if state is None else offer_downloads(state, enhancing_label)

        quiet = {"show_progress": "hidden", "queue": False, "trigger_mode": "always_last"}
        choices = [state, modality, regions, opacity]
        draw_all = (functools.partial(draw, PLANE_ORDER), [*choices, *sliders], sum(pictures, []))
        outputs = [state, status, *downloads, results, tables, modality, regions, colours, *sliders]
        run.click(
            segment_files,
            [files, model, chosen_planes, flips, enhancing_label, earlier_files, state],
            outputs,
            show_progress_on=status,
        ).success(*draw_all, **quiet)
        for control in (modality, regions, opacity):
            control.input(*draw_all, **quiet)
        for plane, slider, sides in zip(PLANE_ORDER, sliders, pictures, strict=True):
            slider.input(functools.partial(draw, [plane]), [*choices, slider], sides, **quiet)
        tables.click(
            press,
            [state, enhancing_label, modality, regions, opacity, *sliders],
            [state, tables, *downloads, *sliders, *sum(pictures, [])],
            show_progress="hidden",
            queue=False,
            trigger_mode="multiple",
            api_visibility="private",
        )
        enhancing_label.input(save, [state, enhancing_label], downloads, **quiet)
        # Without the earlier scans that are there, because they may be those of the patient before.
        files.upload(lambda: None, None, earlier_files, queue=False, show_progress="hidden", api_visibility="private")
        folder.upload(lambda paths: (paths, None), folder, [files, earlier_files])
        earlier_folder.upload(lambda paths: paths, earlier_folder, earlier_files)
        phantom.click(lambda: (phantom_files()[0], None), None, [files, earlier_files])
        two_phantoms.click(phantom_files, None, [files, earlier_files])
    return page


def check_is_kept(state: PageState | None) -> None:
    """Say so if what a tab shows has been deleted."""
    if state is None:
        raise gr.Error("The result is no longer kept. Segment again.")


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a Space names its models in SAM2UNET_MODEL."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = os.environ.get("SAM2UNET_MODEL", "runs/phantom").split()
    parser.add_argument("--model", nargs="+", default=models, help="Hub ids or folders of models or ensembles")
    parser.add_argument("--modalities", nargs="+", choices=MODALITIES, help="default: those the checkpoint names")
    parser.add_argument(
        "--planes", nargs="+", default=[], choices=PLANE_ORDER, help="averaged over; default: that of the training"
    )
    parser.add_argument("--device", type=device_name, help="such as cpu or cuda:1; default: a GPU if there is one")
    parser.add_argument(
        "--server_name",
        # Do not take it from GRADIO_SERVER_NAME, as Gradio does unasked. A Space is reached from outside only.
        default=ALL_INTERFACES if "SPACE_ID" in os.environ else "127.0.0.1",
        help=f"{ALL_INTERFACES} for others in the network; default: this machine alone",
    )
    parser.add_argument("--server_port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="through Gradio's public link: never with real patients")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the page until it is stopped."""
    args = parse_arguments(argv)
    # Turn off the history of Gradio, which keeps scans and results in the browser for good.
    os.environ["GRADIO_RUN_HISTORY"] = "False"

    @functools.lru_cache(maxsize=2)
    def load(model: str) -> Sam2UNetVolumePipeline:
        dtype = fast_dtype(args.device or default_device())
        return Sam2UNetVolumePipeline.from_pretrained(model, args.modalities, args.device, dtype=dtype)

    try:
        load(args.model[0])
    except (OSError, ValueError) as err:
        raise SystemExit(
            f"--model {args.model[0]}: {err} Train one with `python examples/run_segmentation.py`."
        ) from err
    page = build_page(load, args.model, args.planes)
    page.launch(server_name=args.server_name, server_port=args.server_port, share=args.share, **LAUNCH)


if __name__ == "__main__":
    main()
