"""The tables of the app, as HTML: regions and lesions of a patient, and what changed between two time points.

Each checkbox and each button names the lesions that it is for as `PageState.lesions_of` reads them.
"""

import html
import math
from collections.abc import Sequence

import numpy as np
from review import LISTED, PageState, Review

from sam2unet_hf.lesions import Lesion
from sam2unet_hf.metrics.volume_functional import count_voxels, dice
from sam2unet_hf.time_points import sums_of_products


# Tells Python which checkbox or button of the table was pressed, and shows the slices that a button jumps to.
ON_LOAD = """
element.addEventListener("click", (event) => {
  const control = event.target.closest("[data-lesion]");
  if (!control || control.disabled) return;
  const isCheckbox = control.type === "checkbox";
  trigger("click", {lesion: control.dataset.lesion, hide: isCheckbox ? !control.checked : null});
  if (!isCheckbox) document.querySelector("#axial").scrollIntoView({behavior: "smooth"});
});
"""
MINUS = "\N{MINUS SIGN}"


def format_change(earlier: float, later: float, unit: str, digits: int) -> str:
    """Say by how much a value has changed, in its unit and in percent of the earlier one."""
    difference = round(later - earlier, digits)
    signed = f"{difference:+.{digits}f}".replace("-", MINUS)
    percent = (
        f"{100 * (later - earlier) / earlier:+.0f}&nbsp;%".replace("-", MINUS) if earlier else "new" if later else ""
    )
    if not difference:
        return "no change"
    return f"{signed}&nbsp;{unit}" + (f" ({percent})" if percent else "")


def format_diameters(lesion: Lesion) -> str:
    """Return both diameters."""
    return f"{lesion.diameter_mm:.1f}&nbsp;× {lesion.perpendicular_mm:.1f}"


def checkbox(control: str, is_kept: bool, name: str, goes_with: Lesion | None = None) -> str:
    """Return a checkbox that hides lesions; disabled if they are hidden with one that holds them."""
    disabled = f' disabled title="hidden with {html.escape(goes_with.region)} {goes_with.number}"' if goes_with else ""
    checked = " checked" if is_kept else ""
    return f'<input type="checkbox" data-lesion="{control}" aria-label="keep {html.escape(name)}"{checked}{disabled}>'


def button(control: str, text: str) -> str:
    """Return a button that jumps to a lesion."""
    return f'<button type="button" data-lesion="{control}" title="show its slice">{html.escape(text)}</button>'


def make_table(name: str, header: Sequence[str], rows: Sequence[str], style: str = "") -> str:
    """Return a table from the cells of its header and its rows."""
    start = f'<div class="scroll"><table id="{name}" class="{style}">'
    cells = "".join(f"<th>{cell}</th>" for cell in header)
    return f"{start}<thead><tr>{cells}</tr></thead>{''.join(rows)}</table></div>"


def make_row(cells: Sequence[str], is_hidden: bool = False) -> str:
    """Return a row of a table."""
    start = '<tr class="removed">' if is_hidden else "<tr>"
    return start + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def region_cell(state: PageState, region: str) -> tuple[str, bool]:
    """Return the name of a region with the checkbox that hides all of it, and whether none of it is left."""
    places = "".join(map(str, range(len(state.reviews))))
    control = f"{places}-{state.regions.index(region)}-all"
    lesions = state.lesions_of(control)
    shown = [lesion for place, lesion in lesions if not state.reviews[place].is_hidden(lesion)]
    if not lesions:
        return html.escape(region), False
    return f"<label>{checkbox(control, bool(shown), region)} {html.escape(region)}</label>", not shown


def volume_table(state: PageState) -> str:
    """Return the volumes of what is left, and Dice if there is a reference, or the change between time points."""
    if len(state.reviews) == 2:
        rows = []
        for region in state.regions:
            cell, is_hidden = region_cell(state, region)
            volumes = [review.left.volumes_ml[region] for review in state.reviews]
            rows.append(
                make_row([cell, *(f"{volume:.1f}" for volume in volumes), format_change(*volumes, "ml", 1)], is_hidden)
            )
        return make_table("volumes", ("region", "earlier (ml)", "later (ml)", "change"), rows)
    (review,) = state.reviews
    header, rows = ["region", "volume (ml)"], []
    if review.view.reference is not None:
        header += ["reference (ml)", "Dice"]
    for region, volume in review.left.volumes_ml.items():
        cell, is_hidden = region_cell(state, region)
        cells = [cell, f"{volume:.1f}"]
        if review.view.reference is not None:
            masks = (np.isin(labels, review.view.regions[region]) for labels in (review.labels, review.view.reference))
            counts = count_voxels(*masks)
            reference_ml = counts.reference * math.prod(review.view.spacing_mm) / 1000
            cells += [f"{reference_ml:.1f}", f"{dice(counts):.3f}"]
        rows.append(make_row(cells, is_hidden))
    return make_table("volumes", header, rows)


def product_table(state: PageState) -> str:
    """Return the sums of products of diameters at two time points, and their change."""
    rows = []
    for region in state.regions:
        sums = sums_of_products(state.changes(region))
        rows.append(
            make_row([html.escape(region), *(f"{value:.0f}" for value in sums), format_change(*sums, "mm²", 0)])
        )
    header = ("sum of products", "earlier (mm²)", "later (mm²)", "change")
    return make_table("products", header, rows)


def lesion_rows(state: PageState, review: Review, region: str) -> list[str]:
    """Return the lesions of a region at one time point."""
    number, rows = state.regions.index(region), []
    for ((lesion,),) in state.lines[region][:LISTED]:
        control, name = f"0-{number}-{lesion.number}", f"{region} {lesion.number}"
        cells = [
            checkbox(control, not review.is_hidden(lesion), name, review.goes_with(lesion)) + button(control, name),
            f"{lesion.volume_ml:.2f}",
            format_diameters(lesion),
            str(lesion.slice_index),
        ]
        rows.append(make_row(cells, review.is_hidden(lesion)))
    return rows


def compared_rows(state: PageState, region: str) -> list[str]:
    """Return the lesions of a region at two time points, those that are the same in one row."""
    number, rows = state.regions.index(region), []
    for line in state.lines[region][:LISTED]:
        cells = []
        for place, (review, lesions) in enumerate(zip(state.reviews, line, strict=True)):
            parts = []
            for lesion in lesions:
                control, name = f"{place}-{number}-{lesion.number}", f"{region} {lesion.number}"
                keep = checkbox(control, not review.is_hidden(lesion), name, review.goes_with(lesion))
                sizes = f"{lesion.volume_ml:.2f} ml<br>{format_diameters(lesion)} mm"
                gone = " class='removed'" if review.is_hidden(lesion) else ""
                parts.append(f"<div{gone}>{keep}{button(control, name)}<br>{sizes}</div>")
            cells.append("".join(parts))
        change = state.change_of(region, line)
        is_hidden = not (change.earlier or change.later)
        if is_hidden:
            text = "hidden"
        elif change.kind in ("new", "gone"):
            text = change.kind
        else:
            text = (
                f"{change.kind}<br>{format_change(*change.volumes_ml, 'ml', 1 if max(change.volumes_ml) > 10 else 2)}"
            )
        rows.append(make_row([*cells, text], is_hidden))
    return rows


def lesion_table(state: PageState) -> str:
    """Return all lesions, and for each region one row with those that are smaller than the listed ones."""
    is_compared = len(state.reviews) == 2
    header = ("earlier", "later", "change") if is_compared else ("lesion", "ml", "diameters (mm)", "slice")
    rows = []
    for index, region in enumerate(state.regions):
        rows += compared_rows(state, region) if is_compared else lesion_rows(state, state.reviews[0], region)
        control = f"{'01' if is_compared else '0'}-{index}-rest"
        if rest := state.lesions_of(control):
            found = [[lesion for at, lesion in rest if at == place] for place in range(len(state.reviews))]
            left = list(map(Review.shown, state.reviews, found))
            count = len(state.lines[region][LISTED:])  # a line of two time points is one lesion
            name = f"{count} smaller {'lesion' if count == 1 else 'lesions'} of {region}"
            label = f"<label>{checkbox(control, any(left), name)} {html.escape(name)}</label>"
            volumes, volumes_left = (
                [sum(lesion.volume_ml for lesion in lesions) for lesions in sides] for sides in (found, left)
            )
            if is_compared:
                change = format_change(*volumes_left, "ml", 2) if any(left) else "hidden"
                cells = [f"{label}<br>{volumes[0]:.2f} ml", f"{volumes[1]:.2f} ml", change]
            else:
                longest_mm = max(lesion.diameter_mm for _, lesion in rest)
                cells = [label, f"{volumes[0]:.2f}", f"up to {longest_mm:.1f}", ""]
            rows.append(make_row(cells, not any(left)))
    return make_table("lesions", header, rows, "compared" if is_compared else "") if rows else ""


def review_tables(state: PageState) -> str:
    """Return all tables of a page."""
    if len(state.reviews) == 2:
        tables = volume_table(state) + product_table(state)
        return f'<div class="tables compared"><div>{tables}</div><div>{lesion_table(state)}</div></div>'
    return f'<div class="tables"><div>{volume_table(state)}</div><div>{lesion_table(state)}</div></div>'
