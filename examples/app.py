#!/usr/bin/env python
"""A page that segments a patient's scans and shows the tumour in three planes.

python examples/app.py --model runs/phantom
python examples/app.py --model runs/phantom runs/regions --planes axial coronal --server_port 7861
"""

import argparse
import atexit
import functools
import html
import math
import os
import re
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
from case_view import PLANE_ORDER, CaseView, draw_slice, largest_slice, region_colours, segment_case

from dataset_scripts.phantom import NUM_PATIENTS, write_phantom_cohort
from sam2unet_hf.cases_sam2unet import BratsCase, find_cases
from sam2unet_hf.devices import default_device, device_name, fast_dtype
from sam2unet_hf.metrics.volume_functional import count_voxels, dice
from sam2unet_hf.nifti_sam2unet import open_nifti, read_header
from sam2unet_hf.scans_sam2unet import MODALITIES, PLANES
from sam2unet_hf.volume import Sam2UNetVolumePipeline


TITLE = "Brain tumour segmentation with SAM2-UNet"
WARNING = (
    "**Research use only.** This is no medical device: nothing here may guide the care of a patient. Scans and "
    "results stay on the server that runs this page, and are deleted about an hour after they came."
)
LIFETIME_S = 3600
ENDINGS = "|".join(ending for endings in MODALITIES.values() for ending in endings)
SCAN_NAME = re.compile(rf"(.+)(?:{ENDINGS})\.nii(?:\.gz)?", re.IGNORECASE)
DECATHLON_NAME = re.compile(r"(BRATS_\d+)\.nii(?:\.gz)?", re.IGNORECASE)
ALL_INTERFACES = "0.0.0.0"  # nosec B104 # not the default
LAUNCH: dict[str, Any] = {
    "state_session_capacity": 20,
    "max_file_size": "500mb",
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    "css_paths": Path(__file__).with_name("app.css"),
    "head_paths": Path(__file__).with_name("app.html"),
    "footer_links": [],
}


@dataclass(eq=False)
class PageState:
    """What one tab keeps: the patient, and the folder of the file to download, which is deleted with the state."""

    view: CaseView
    folder: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory)

    def save(self, enhancing_label: int) -> str:
        """Write the label map and return its path."""
        path = Path(self.folder.name, f"{self.view.name}_seg.nii.gz")
        self.view.segmentation.save(path, enhancing_label)
        return str(path)


def volume_table(view: CaseView) -> str:
    """Return volumes, and Dice if there is a reference, as a Markdown table."""
    voxel_ml = math.prod(view.spacing_mm) / 1000
    rows = [("region", "volume (ml)", "expert (ml)", "Dice"), ("---", "---:", "---:", "---:")]
    for region, volume_ml in view.segmentation.volumes_ml.items():
        row = (region, f"{volume_ml:.1f}")
        reference, prediction = view.masks(region)
        if reference is not None:
            counts = count_voxels(prediction, reference)
            row += (f"{counts.reference * voxel_ml:.1f}", f"{dice(counts):.3f}")
        rows.append(row)
    return "\n".join(f"| {' | '.join(row[: len(rows[-1])])} |" for row in rows)


def patient_in(name: str) -> str | None:
    """Return the patient that the name of a scan tells, if it is one of BraTS or of the Decathlon."""
    match = SCAN_NAME.fullmatch(name) or DECATHLON_NAME.fullmatch(name)
    return None if match is None else match[1]


def folder_of(scan: Path) -> str:
    """Return the folder of a scan or mask in its case: those of the Decathlon have the same name, in two folders."""
    if not DECATHLON_NAME.fullmatch(scan.name):
        return ""
    with open_nifti(scan, scan.name) as file:
        return "imagesTr" if len(read_header(file, scan.name).get_data_shape()) > 3 else "labelsTr"


def gather_case(paths: Sequence[str], modalities: Sequence[str], folder: Path) -> BratsCase:
    """Link uploaded files in a folder as one case: scans under their BraTS names, or one scan for one modality."""
    scans = [Path(path) for path in paths if path.lower().endswith((".nii", ".nii.gz"))]
    if not scans:
        raise ValueError("No scan among the files. Upload files that end in .nii or .nii.gz.")
    patients = sorted({patient for scan in scans if (patient := patient_in(scan.name)) is not None})
    if len(patients) > 1:
        raise ValueError(f"The files are of {len(patients)} patients: {', '.join(patients)}. Upload those of one.")
    for scan in scans:
        link = folder / folder_of(scan) / scan.name
        if link.exists():
            raise ValueError(f"Two files are named {scan.name}. Upload each scan of one patient once.")
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(scan.resolve())
    try:
        return find_cases(folder)[0]
    except FileNotFoundError:
        if len(scans) > 1 or len(modalities) > 1:
            raise ValueError(
                f"The model takes {', '.join(modalities)}. Upload them under their BraTS names, such as "
                f"Case_{modalities[0]}.nii.gz, got {', '.join(scan.name for scan in scans)}."
            ) from None
        return BratsCase(re.sub(r"\.nii(\.gz)?$", "", link.name), folder, {modalities[0]: link})


@functools.cache
def phantom_files() -> list[str]:
    """Draw a phantom patient once, the first that the examples do not train on, and return its files."""
    folder = tempfile.mkdtemp(prefix="phantom_")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    cohort = write_phantom_cohort(Path(folder, "cohort"), num_patients=1, first=NUM_PATIENTS + 1)
    return sorted(map(str, cohort.glob("*/*")))


def legend(regions: Sequence[str]) -> str:
    """Return the colours of the regions as HTML."""
    items = region_colours(regions).items()
    squares = "".join(f'<span style="background:{colour}"></span>{html.escape(region)}' for region, colour in items)
    return f'<div class="legend">{squares}</div>'


def build_page(load: Any, models: Sequence[str], planes: Sequence[str] = ()) -> gr.Blocks:
    """Lay out the page; `load` returns the pipeline of a model's name, `planes` are those to average over at first."""
    # Turn off usage statistics, which would be sent to Gradio.
    options: dict[str, Any] = {"analytics_enabled": False, "delete_cache": (LIFETIME_S // 6, LIFETIME_S)}
    with gr.Blocks(title=TITLE, fill_width=True, **options) as page:
        state = gr.State(None, time_to_live=LIFETIME_S)
        gr.Markdown(f"# {TITLE}")
        gr.Markdown(WARNING, elem_classes="warning")
        with gr.Row():
            with gr.Column(min_width=300):
                files = gr.File(
                    label="Scans of one patient (.nii, .nii.gz) under their BraTS names, and the mask if there is one",
                    file_count="multiple",
                    file_types=[".nii", ".gz"],
                    height=180,
                    elem_id="files",
                )
                with gr.Row():
                    folder = gr.UploadButton("Case folder", file_count="directory", size="sm", min_width=120)
                    phantom = gr.Button("Phantom example", size="sm", min_width=120, elem_id="phantom")
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
                download = gr.DownloadButton("Download mask (NIfTI)", visible=False, elem_id="download")
        with gr.Column(visible=False) as results:
            table = gr.Markdown(elem_id="volumes")
            with gr.Row():
                modality = gr.Dropdown([], label="Contrast", min_width=140)
                regions = gr.CheckboxGroup([], label="Regions", min_width=220, elem_id="regions")
                opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", min_width=180, elem_id="opacity")
            colours = gr.HTML()
            sliders, pictures = [], []
            image = functools.partial(gr.Image, format="png", buttons=[], interactive=False, elem_classes="slice")
            with gr.Row():
                for plane in PLANE_ORDER:
                    with gr.Column(min_width=300):
                        sliders.append(gr.Slider(0, 1, 0, step=1, label=f"{plane.title()} slice", elem_id=plane))
                        sides = ("model", "expert")
                        pictures.append([image(label=side.title(), elem_id=f"{plane}-{side}") for side in sides])

        def segment_files(paths, model, planes, flips, enhancing_label, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
            if not paths:
                raise gr.Error("No scans. Upload the files of one patient, or take the phantom example.")
            progress(0, "Loading the model")
            with tempfile.TemporaryDirectory() as temporary:
                links = Path(temporary, "upload")
                links.mkdir()
                try:
                    segment = load(model)
                    case = gather_case(paths, segment.modalities, links)
                    view = segment_case(segment, case, planes=planes or None, flips=flips)
                except (OSError, ValueError) as err:
                    text = str(err).replace(f"{links}/", "").replace(str(links), "the upload")
                    raise gr.Error(text, duration=None) from err
            kept = PageState(view)
            names = list(view.regions)
            modalities = list(dict.fromkeys([*segment.modalities, *view.grey]))
            found = {
                state: kept,
                status: f"{view.name}: " + ("done." if view.prediction.any() else "no tumour found."),
                download: gr.DownloadButton(value=kept.save(enhancing_label), visible=True),
                results: gr.Column(visible=True),
                table: volume_table(view),
                modality: gr.Dropdown(modalities, value="flair" if "flair" in view.grey else view.modality),
                regions: gr.CheckboxGroup(names, value=names),
                colours: legend(names),
            }
            for slider, plane in zip(sliders, PLANE_ORDER, strict=True):
                last = view.prediction.shape[PLANES[plane]] - 1
                found[slider] = gr.Slider(maximum=last, value=largest_slice(plane, view.prediction, view.reference))
            return found

        def draw(planes, state, modality, regions, opacity, *indices):
            if state is None:
                raise gr.Error("The result is no longer kept. Segment again.")
            view, drawn = state.view, []
            for plane, index in zip(planes, indices, strict=True):
                for labels in (view.prediction, view.reference):
                    choice = (labels, plane, int(index), modality, regions, opacity)
                    picture = None if labels is None else draw_slice(view, *choice)
                    drawn.append(gr.Image(picture, visible=picture is not None))
            return drawn

        def save(state, enhancing_label):
            return gr.skip() if state is None else state.save(enhancing_label)

        quiet = {"show_progress": "hidden", "queue": False, "trigger_mode": "always_last"}
        choices = [state, modality, regions, opacity]
        draw_all = (functools.partial(draw, PLANE_ORDER), [*choices, *sliders], sum(pictures, []))
        outputs = [state, status, download, results, table, modality, regions, colours, *sliders]
        run.click(
            segment_files, [files, model, chosen_planes, flips, enhancing_label], outputs, show_progress_on=status
        ).success(*draw_all, **quiet)
        for control in (modality, regions, opacity):
            control.input(*draw_all, **quiet)
        for plane, slider, sides in zip(PLANE_ORDER, sliders, pictures, strict=True):
            slider.input(functools.partial(draw, [plane]), [*choices, slider], sides, **quiet)
        enhancing_label.input(save, [state, enhancing_label], download, **quiet)
        folder.upload(lambda paths: paths, folder, files)
        phantom.click(phantom_files, None, files)
    return page


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
