"""What a reviewer keeps of the lesions that were found in a patient, at one time point or at two."""

import re
import tempfile
import threading
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from case_view import CaseView

from sam2unet_hf.lesions import Lesion, measure_lesions, region_around, remove_lesions
from sam2unet_hf.time_points import LesionChange, match_lesions
from sam2unet_hf.volume import VolumeSegmentation


LISTED = 15  # lesions of a region that have a line of their own; the others, mostly specks, share one
CONTROL = re.compile(r"(0|1|01)-(\d{1,6})-(\d{1,9}|all|rest)")


class Review:
    """A segmented patient at one time point, and which lesions the reviewer has hidden.

    Attributes:
        view: The patient, as the model segmented it.
        lesions: All lesions that the model found.
        hidden: Keys of those that were hidden.
        left: The segmentation without them.
    """

    def __init__(self, view: CaseView):
        self.view = view
        self.lesions = measure_lesions(view.segmentation)
        self.by_key = {lesion.key: lesion for lesion in self.lesions}
        self.hidden: set[tuple[str, int]] = set()
        self.left: VolumeSegmentation = view.segmentation

    @property
    def labels(self) -> np.ndarray:
        """Label ids that are left, with the axes (left, posterior, superior)."""
        return self.left.scan.from_file_grid(self.left.label_map)

    def change(self, keys: Iterable[tuple[str, int]], hide: bool) -> None:
        """Hide lesions, or show them again."""
        known = set(keys) & set(self.by_key)
        self.hidden = self.hidden | known if hide else self.hidden - known
        self.left = remove_lesions(self.view.segmentation, self.hidden)

    def goes_with(self, lesion: Lesion) -> Lesion | None:
        """Return the hidden lesion that holds another one, which is hidden with it."""
        region = region_around(self.view.regions, lesion.region)
        while region is not None and lesion.inside is not None:
            lesion = self.by_key[region, lesion.inside]
            if lesion.key in self.hidden:
                return lesion
            region = region_around(self.view.regions, region)
        return None

    def is_hidden(self, lesion: Lesion) -> bool:
        """Whether a lesion is hidden, itself or by one that holds it."""
        return lesion.key in self.hidden or self.goes_with(lesion) is not None

    def shown(self, lesions: Iterable[Lesion]) -> list[Lesion]:
        """Return those lesions that are not hidden."""
        return [lesion for lesion in lesions if not self.is_hidden(lesion)]


@dataclass(eq=False)
class PageState:
    """What one tab keeps: one or two time points, and the folder of files to download, deleted with the state.

    Each press in the table runs in a thread of its own, so `hide` and `save` hold the lock, and so must a caller that
    does several things with one state of the lesions.

    Attributes:
        reviews: The patient, at the earlier time point first if there are two.
        lines: Region -> lines of its table. A line holds one list of lesions for each time point: a single lesion, or
            with two time points all those that are one lesion.
        selected: Time point and key of the lesion whose diameters are drawn.
        lock: Held while lesions are hidden or files are written; the same thread may take it again.
        is_replaced: Whether the tab shows another patient since.
    """

    reviews: list[Review]
    folder: tempfile.TemporaryDirectory = field(default_factory=tempfile.TemporaryDirectory)
    selected: tuple[int, tuple[str, int]] | None = None
    lines: dict[str, list[tuple[list[Lesion], ...]]] = field(init=False)
    lock: threading.RLock = field(init=False, default_factory=threading.RLock)
    is_replaced: bool = field(init=False, default=False)

    def __post_init__(self):
        self.lines = {region: [] for region in self.regions}
        if len(self.reviews) == 1:
            for lesion in self.reviews[0].lesions:
                self.lines[lesion.region].append(([lesion],))
        else:
            segmentations = [review.view.segmentation for review in self.reviews]
            for change in match_lesions(*segmentations, *(review.lesions for review in self.reviews)):
                self.lines[change.region].append((change.earlier, change.later))

    @property
    def regions(self) -> list[str]:
        """Names of the regions."""
        return list(self.reviews[0].view.regions)

    @property
    def modalities(self) -> list[str]:
        """Modalities that all time points have."""
        return [name for name in self.reviews[0].view.grey if all(name in review.view.grey for review in self.reviews)]

    def change_of(self, region: str, line: tuple[list[Lesion], ...]) -> LesionChange:
        """Return what is not hidden of a line of the table of two time points."""
        return LesionChange(region, *map(Review.shown, self.reviews, line))

    def changes(self, region: str) -> list[LesionChange]:
        """Return what is left of the lesions of a region at two time points, those that are the same together."""
        kept = [self.change_of(region, line) for line in self.lines[region]]
        return [change for change in kept if change.earlier or change.later]

    def lesions_of(self, control: str) -> list[tuple[int, Lesion]]:
        """Return the lesions that a control of the table is for, with their time points; none if it is not known.

        Args:
            control: Time points, number of the region, and number of the lesion, `"all"`, or `"rest"` for those
                without a line of their own, such as `"0-2-1"` and `"01-2-all"`.
        """
        match = CONTROL.fullmatch(control)
        if match is None or int(match[2]) >= len(self.regions):
            return []
        region = self.regions[int(match[2])]
        lines = self.lines[region][LISTED:] if match[3] == "rest" else self.lines[region]
        places = [int(place) for place in match[1] if int(place) < len(self.reviews)]
        found = [(place, lesion) for line in lines for place in places for lesion in line[place]]
        return [
            (place, lesion) for place, lesion in found if match[3] in ("all", "rest") or lesion.number == int(match[3])
        ]

    def hide(self, control: str, hide: bool) -> None:
        """Hide the lesions that a control is for, or show them again."""
        lesions = self.lesions_of(control)
        with self.lock:
            for place in sorted({place for place, _ in lesions}):
                self.reviews[place].change([lesion.key for at, lesion in lesions if at == place], hide)

    def select(self, control: str) -> Lesion | None:
        """Choose the lesion whose diameters are drawn, and return it."""
        lesions = self.lesions_of(control)
        if len(lesions) != 1:
            return None
        ((place, lesion),) = lesions
        self.selected = place, lesion.key
        return lesion

    def selected_lesion(self, place: int) -> Lesion | None:
        """Return the lesion of a time point whose diameters are drawn."""
        if self.selected is None or self.selected[0] != place:
            return None
        lesion = self.reviews[place].by_key[self.selected[1]]
        return None if self.reviews[place].is_hidden(lesion) else lesion

    def save(self, enhancing_label: int) -> list[str]:
        """Write what is left of the label map of each time point, and return the paths."""
        paths = []
        with self.lock:
            for place, review in enumerate(self.reviews):
                path = Path(self.folder.name, str(place), f"{review.view.name}_seg.nii.gz")
                review.left.save(path, enhancing_label)
                paths.append(str(path))
        return paths
