#!/usr/bin/env python
"""A page that segments a patient's scans and shows the tumour in three planes.

python examples/app.py --model runs/phantom
python examples/app.py --model runs/phantom runs/regions --planes axial coronal --server_port 7861
"""

import argparse
import functools
import html
import itertools
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageDraw

from dataset_scripts.phantom import write_phantom_cohort
from sam2unet_hf.cases_sam2unet import BratsCase, find_cases
from sam2unet_hf.metrics import score_volume
from sam2unet_hf.scans_sam2unet import MODALITIES, PLANES, intensity_window, pixel_size_mm, take_slice
from sam2unet_hf.volume import Sam2UNetVolumePipeline, VolumeSegmentation


TITLE = "Brain tumour segmentation with SAM2-UNet"
WARNING = (
    "**Research use only.** This is no medical device: nothing here may guide the care of a patient. Scans and "
    "results stay on the server that runs this page, and are deleted about an hour after they came."
)
SHOWN = ("axial", "coronal", "sagittal")
EDGES = {"axial": "RLAP", "coronal": "RLSI", "sagittal": "APSI"}  # left, right, top and bottom of `take_slice`
COLOURS = ("#F0E442", "#D55E00", "#56B4E9", "#009E73", "#CC79A7")  # Okabe and Ito's, for colour-blind eyes too
PICTURE_PIXELS = 480  # longest side of the head
LIFETIME_S = 3600
EVERYWHERE = "0.0.0.0"  # nosec B104 # not the default
# Turning the wheel over a picture moves its slider.
WHEEL = """
<script>
document.addEventListener("wheel", (event) => {
  const picture = event.target.closest(".slice");
  const slider = picture && document.querySelector(`#${picture.id.split("-")[0]} input[type=range]`);
  if (!slider || event.deltaY === 0) return;
  event.preventDefault();
  slider.value = Number(slider.value) + (event.deltaY > 0 ? -1 : 1);
  slider.dispatchEvent(new Event("input", { bubbles: true }));
}, { passive: false });
</script>
"""
CSS = """
.slice img { width: 100%; object-fit: contain; image-rendering: auto }
.legend span { display: inline-block; width: 0.9em; height: 0.9em; margin: 0 0.3em 0 1em; vertical-align: -0.1em }
.warning { border-left: 4px solid #D55E00; padding-left: 0.8em }
.warning .warning { border: 0; padding: 0 }
#volumes td, #volumes th { white-space: nowrap; word-break: normal; padding: 0.3em 0.7em }
"""
LAUNCH: dict[str, Any] = {
    "state_session_capacity": 20,
    "max_file_size": "500mb",
    "theme": gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["monospace"]),
    "css": CSS,
    "head": WHEEL,
    "footer_links": [],
}


@dataclass(eq=False)
class View:
    """One patient on the page, with volumes of shape `(left, posterior, superior)`.

    Attributes:
        name: The case.
        found: The segmentation, on the grid of the file.
        grey: 8-bit volume of each contrast that there is.
        label_maps: Label ids of `"model"` and, if the case has a mask, `"expert"`.
        folder: Where the file to download lies; it goes when the view goes.
    """

    name: str
    found: VolumeSegmentation
    grey: dict[str, np.ndarray]
    label_maps: dict[str, np.ndarray]
    folder: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory)

    @functools.cached_property
    def head(self) -> tuple[slice, ...]:
        """Where the head is in the volumes, with a margin."""
        head = np.any([volume != 0 for volume in self.grey.values()], axis=0)
        box = []
        for axis in range(3):
            inside = np.flatnonzero(head.any(axis=tuple({0, 1, 2} - {axis})))
            first, last = inside[[0, -1]] if inside.size else (0, head.shape[axis] - 1)
            box.append(slice(max(int(first) - 3, 0), int(last) + 4))
        return tuple(box)

    def start(self, plane: str) -> int:
        """Return the slice with the most tumour, found or marked, or else that in the middle."""
        others = tuple({0, 1, 2} - {PLANES[plane]})
        for labels in self.label_maps.values():
            pixels = np.count_nonzero(labels, axis=others)
            if pixels.any():
                return int(pixels.argmax())
        return self.found.scan.voxels.shape[PLANES[plane]] // 2

    def in_head(self, volume: np.ndarray, plane: str, index: int) -> np.ndarray:
        """Cut one slice, without what is around the head."""
        box = tuple(slice(None) if axis == PLANES[plane] else part for axis, part in enumerate(self.head))
        return take_slice(volume[box], plane, index)

    def picture(
        self, side: str, plane: str, index: int, contrast: str, regions: Sequence[str], opacity: float
    ) -> np.ndarray | None:
        """Draw a slice with its regions.

        Args:
            side: `"model"` or `"expert"`.
            plane: `"axial"`, `"coronal"` or `"sagittal"`.
            index: Position along the axis that the plane cuts.
            contrast: The scan to show.
            regions: Those to colour; of nested ones the innermost has its colour.
            opacity: In [0, 1].

        Returns:
            RGB picture of shape `(height, width, 3)`, `uint8`, at the same scale in mm along both axes and in all
            planes; `None` if there is no such side.
        """
        if side not in self.label_maps:
            return None
        height_mm, width_mm = pixel_size_mm(self.found.scan.spacing_mm, plane)
        grey = np.ascontiguousarray(self.in_head(self.grey[contrast], plane, index))
        scale = PICTURE_PIXELS / max(
            (part.stop - part.start) * mm for part, mm in zip(self.head, self.found.scan.spacing_mm, strict=True)
        )
        size = (round(grey.shape[1] * width_mm * scale), round(grey.shape[0] * height_mm * scale))
        picture = Image.fromarray(grey).resize(size, Image.Resampling.BILINEAR).convert("RGB")
        labels = self.in_head(self.label_maps[side], plane, index)
        colours = region_colours(self.found.regions)
        innermost = np.zeros(labels.shape, np.uint8)
        chosen = sorted(regions, key=lambda region: -len(self.found.regions[region]))
        for number, region in enumerate(chosen, start=1):
            innermost[np.isin(labels, self.found.regions[region])] = number
        overlay = Image.fromarray(innermost).resize(size, Image.Resampling.NEAREST)
        for number, region in enumerate(chosen, start=1):
            where = overlay.point([round(255 * opacity) * (value == number) for value in range(256)])
            picture.paste(colours[region], (0, 0), where)
        draw_orientation_labels(picture, EDGES[plane])
        return np.asarray(picture)

    def table(self) -> str:
        """Return volumes, and Dice if there is an expert's mask, as a Markdown table."""
        volumes_ml = self.found.volumes_ml
        if "expert" not in self.label_maps:
            rows = [f"| {region} | {volume_ml:.1f} |" for region, volume_ml in volumes_ml.items()]
            return "\n".join(["| region | volume (ml) |", "| --- | ---: |", *rows])
        model, expert = self.label_maps["model"], self.label_maps["expert"]
        scores = score_volume(model, expert, ["volume_dice"], regions=self.found.regions)
        voxel_ml = math.prod(self.found.scan.spacing_mm) / 1000
        rows = ["| region | volume (ml) | expert (ml) | Dice |", "| --- | ---: | ---: | ---: |"]
        for region, volume_ml in volumes_ml.items():
            expert_ml = np.count_nonzero(np.isin(expert, self.found.regions[region])) * voxel_ml
            rows.append(f"| {region} | {volume_ml:.1f} | {expert_ml:.1f} | {scores[region]['volume_dice']:.3f} |")
        return "\n".join(rows)

    def save(self, et_label: int) -> str:
        """Write the label map and return its path."""
        path = Path(self.folder.name) / f"{self.name}_seg.nii.gz"
        self.found.save(path, et_label)
        return str(path)


def draw_orientation_labels(picture: Image.Image, letters: str) -> None:
    """Write which side of the patient lies left, right, at the top and at the bottom."""
    draw = ImageDraw.Draw(picture)
    middle = (picture.width // 2, picture.height // 2)
    places = [(4, middle[1]), (picture.width - 4, middle[1]), (middle[0], 3), (middle[0], picture.height - 3)]
    for letter, place, anchor in zip(letters, places, ("lm", "rm", "ma", "md"), strict=True):
        draw.text(place, letter, fill="white", font_size=15, anchor=anchor, stroke_width=1, stroke_fill="black")


def gather_case(paths: Sequence[str], modalities: Sequence[str], folder: Path) -> BratsCase:
    """Bring uploaded files together as a case.

    Args:
        paths: Scans under their BraTS names, and perhaps the mask; or one scan for a model of one contrast.
        modalities: What the model takes.
        folder: Empty, for links to the files.

    Raises:
        ValueError: If they are no case of the model's contrasts.
    """
    scans = [Path(path) for path in paths if path.endswith((".nii", ".nii.gz"))]
    if not scans:
        raise ValueError("No scan among the files. Upload files that end in .nii or .nii.gz.")
    linked = []
    for scan in scans:
        linked.append(folder / scan.name)
        if linked[-1].exists():
            raise ValueError(f"Two files are named {scan.name}. Upload one patient at a time.")
        linked[-1].symlink_to(scan.resolve())
    try:
        cases = find_cases(linked[0] if len(linked) == 1 and linked[0].name.startswith("BRATS_") else folder)
    except FileNotFoundError:
        if len(linked) > 1 or len(modalities) > 1:
            raise ValueError(
                f"The model takes {', '.join(modalities)}. Upload them under their BraTS names, such as "
                f"Case_{modalities[0]}.nii.gz, got {', '.join(scan.name for scan in scans)}."
            ) from None
        name = re.sub(r"\.nii(\.gz)?$", "", linked[0].name)
        return BratsCase(name, folder, {modalities[0]: linked[0]})
    return cases[0]


def look_at(case: BratsCase, segment: Sam2UNetVolumePipeline, **options: Any) -> View:
    """Segment a case, and read the contrasts and the mask that it has."""
    # What cannot be read is better known before the work than after it. The first is what will be segmented.
    names = list(dict.fromkeys([*segment.modalities, *(name for name in MODALITIES if name in case.files)]))
    scans = case.read_images(names)
    expert = case.read_mask(same_grid_as=scans[0]).voxels if "seg" in case.files else None
    found = segment(case, **options)
    label_maps = {"model": found.scan.from_file_grid(found.label_map)}
    if expert is not None:
        label_maps["expert"] = expert
    grey = {name: intensity_window(scan).apply(scan.voxels) for name, scan in zip(names, scans, strict=True)}
    return View(case.case_id, found, grey, label_maps)


def phantom_files() -> list[str]:
    """Return the files of a patient that never was."""
    return sorted(map(str, next(phantom_cohort().glob("Phantom_*")).iterdir()))


@functools.cache
def phantom_cohort() -> Path:
    """Draw it once, in the size of the phantom that the examples train on."""
    folder = Path(tempfile.mkdtemp(prefix="phantom_")) / "cohort"
    return write_phantom_cohort(folder, num_patients=1, seed=1)


def region_colours(regions: Sequence[str]) -> dict[str, str]:
    """Return a colour for each region; from the sixth on they come again."""
    return dict(zip(regions, itertools.cycle(COLOURS)))


def legend(regions: Sequence[str]) -> str:
    """Return the colours of the regions as HTML."""
    items = region_colours(regions).items()
    squares = "".join(f'<span style="background:{colour}"></span>{html.escape(region)}' for region, colour in items)
    return f'<div class="legend">{squares}</div>'


def build_page(load: Any, models: Sequence[str], planes: Sequence[str] = ()) -> gr.Blocks:
    """Lay out the page.

    Args:
        load: Returns the pipeline of a model's name.
        models: Names to choose from.
        planes: Planes that the model looks at, unless the user chooses others; without any that of its training.
    """
    # Without usage statistics, which are sent to Gradio.
    options: dict[str, Any] = {"analytics_enabled": False, "delete_cache": (LIFETIME_S // 6, LIFETIME_S)}
    with gr.Blocks(title=TITLE, fill_width=True, **options) as page:
        view = gr.State(None, time_to_live=LIFETIME_S)
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
                        list(SHOWN), value=list(planes), label="Average over planes; none: the one of the training"
                    )
                    flips = gr.Checkbox(False, label="Average over mirror images (four times the time)")
                    et_label = gr.Radio(
                        [("3, BraTS from 2023 on", 3), ("4, before", 4)], value=3, label="Label of enhancing tumour"
                    )
                run = gr.Button("Segment", variant="primary", elem_id="run")
                status = gr.Markdown("Upload scans or take the example, then segment.", elem_id="status")
                download = gr.DownloadButton("Download mask (NIfTI)", visible=False, elem_id="download")
        with gr.Column(visible=False) as result:
            table = gr.Markdown(elem_id="volumes")
            with gr.Row():
                contrast = gr.Dropdown([], label="Contrast", min_width=140)
                regions = gr.CheckboxGroup([], label="Regions", min_width=220, elem_id="regions")
                opacity = gr.Slider(0, 1, 0.5, step=0.05, label="Opacity", min_width=180, elem_id="opacity")
            colours = gr.HTML()
            sliders, pictures = [], {}
            with gr.Row():
                for plane in SHOWN:
                    with gr.Column(min_width=300):
                        sliders.append(gr.Slider(0, 1, 0, step=1, label=f"{plane.title()} slice", elem_id=plane))
                        for side in ("model", "expert"):
                            pictures[side, plane] = gr.Image(
                                label=side.title(),
                                format="png",
                                buttons=[],
                                interactive=False,
                                elem_id=f"{plane}-{side}",
                                elem_classes="slice",
                            )

        def segment_files(paths, model, planes, flips, et_label, progress=gr.Progress(track_tqdm=True)):  # noqa: B008
            if not paths:
                raise gr.Error("No scans. Upload the files of one patient, or take the phantom example.")
            progress(0, "Loading the model")
            with tempfile.TemporaryDirectory() as links:
                try:
                    segment = load(model)
                    case = gather_case(paths, segment.modalities, Path(links))
                    seen = look_at(case, segment, planes=planes or None, flips=flips)
                except (OSError, ValueError) as err:
                    raise gr.Error(
                        str(err).replace(f"{links}/", "").replace(links, "the upload"), duration=None
                    ) from err
            names = list(seen.found.regions)
            lengths = [seen.found.scan.voxels.shape[PLANES[plane]] for plane in SHOWN]
            largest = seen.found.largest_slice
            shown = "flair" if "flair" in seen.grey else next(iter(seen.grey))
            return {
                view: seen,
                status: f"{seen.name}: " + ("no tumour found." if largest is None else "done."),
                download: gr.DownloadButton(value=seen.save(et_label), visible=True),
                result: gr.Column(visible=True),
                table: seen.table(),
                contrast: gr.Dropdown(list(seen.grey), value=shown),
                regions: gr.CheckboxGroup(names, value=names),
                colours: legend(names),
                **{
                    slider: gr.Slider(maximum=length - 1, value=seen.start(plane))
                    for slider, plane, length in zip(sliders, SHOWN, lengths, strict=True)
                },
            }

        def draw(planes, seen, contrast, regions, opacity, *indices):
            if seen is None:
                raise gr.Error("The result is no longer kept. Segment again.")
            return [
                gr.Image(picture, visible=picture is not None)
                for plane, index in zip(planes, indices, strict=True)
                for side in ("model", "expert")
                for picture in [seen.picture(side, plane, int(index), contrast, regions, opacity)]
            ]

        quiet = {"show_progress": "hidden", "queue": False, "trigger_mode": "always_last"}
        of_view = [view, contrast, regions, opacity]
        draw_all = {
            "fn": functools.partial(draw, SHOWN),
            "inputs": [*of_view, *sliders],
            "outputs": [pictures[side, plane] for plane in SHOWN for side in ("model", "expert")],
        }
        outputs = [view, status, download, result, table, contrast, regions, colours, *sliders]
        run.click(
            segment_files, [files, model, chosen_planes, flips, et_label], outputs, show_progress_on=status
        ).success(**draw_all, **quiet)
        for control in (contrast.input, regions.input, opacity.input):
            control(**draw_all, **quiet)
        for plane, slider in zip(SHOWN, sliders, strict=True):
            shown = [pictures[side, plane] for side in ("model", "expert")]
            slider.input(functools.partial(draw, [plane]), [*of_view, slider], shown, **quiet)
        et_label.input(
            lambda seen, label: gr.skip() if seen is None else seen.save(label), [view, et_label], download, **quiet
        )
        folder.upload(lambda paths: paths, folder, files)
        phantom.click(phantom_files, None, files)
    return page


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line; a Space names its models in SAM2UNET_MODEL."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    models = os.environ.get("SAM2UNET_MODEL", "runs/phantom").split()
    parser.add_argument("--model", nargs="+", default=models, help="Hub ids or folders of SAM2-UNet to choose from")
    parser.add_argument("--modalities", nargs="+", choices=MODALITIES, help="default: those the checkpoint names")
    parser.add_argument(
        "--planes", nargs="+", default=[], choices=SHOWN, help="planes to average over; default: that of the training"
    )
    parser.add_argument("--device", help="such as cpu or cuda:1; default: a GPU if there is one")
    parser.add_argument(
        "--server_name",
        # Not what GRADIO_SERVER_NAME says, unseen. A Space is reached from outside only.
        default=EVERYWHERE if "SPACE_ID" in os.environ else "127.0.0.1",
        help=f"{EVERYWHERE} for others in the network; default: this machine alone",
    )
    parser.add_argument("--server_port", type=int, help="default: the first free one from 7860 on")
    parser.add_argument("--share", action="store_true", help="through Gradio's public link: never with real patients")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the page until it is stopped."""
    args = parse_arguments(argv)
    # Gradio would keep scans and results in the browser, for good.
    os.environ["GRADIO_RUN_HISTORY"] = "False"

    @functools.lru_cache(maxsize=2)
    def load(model: str) -> Sam2UNetVolumePipeline:
        return Sam2UNetVolumePipeline.from_pretrained(model, args.modalities, args.device)

    try:
        load(args.model[0])
    except (OSError, ValueError) as err:
        raise SystemExit(
            f"--model {args.model[0]}: {err} Train one with `python examples/run_segmentation.py`."
        ) from err
    try:
        build_page(load, args.model, args.planes).launch(
            server_name=args.server_name,
            server_port=args.server_port,
            share=args.share,
            **LAUNCH,
        )
    finally:
        if phantom_cohort.cache_info().currsize:
            shutil.rmtree(phantom_cohort().parent, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
