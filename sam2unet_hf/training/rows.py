"""Images made of columns of a data set: modalities as channels, each with its neighbouring slices."""

import copy
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision import tv_tensors

from ..images_sam2unet import count_channels
from .streaming import ParquetRows


WINDOW_STEP = 32  # pixels, the coarsest stride of the model


class ImageRows(Dataset):
    """Rows of a data set whose image is made of one column or several, each with its neighbouring slices.

    Each row holds `image`; `mask`, unless there is no column of masks; `head_box`, `[x_min, y_min, x_max, y_max]`, if
    the data set has the column `head_boxes`; and all columns that hold no images. It has what training needs of a
    `datasets.Dataset`: `len(rows)`, `rows[3]`, `rows[3:7]`, `rows[[3, 7]]`, `rows["case_id"]`, `column_names` and
    `with_transform`.

    Of one column without neighbours the image is what the data set holds, a PIL image. Otherwise it is a
    `tv_tensors.Image`, uint8 of shape `(channels, height, width)`: of each column in turn the slices from `neighbours`
    below the row's own to `neighbours` above it. They are looked up among the rows of the same `case_id` by
    `slice_index`; for one that is missing the nearest one there is takes its place, which at the ends of a scan is the
    last one again.

    Other columns of images are not read, and each image is decoded once for a batch.

    Args:
        rows: A `datasets.Dataset` or [`ParquetRows`].
        image_columns: Columns of the image, such as `["flair", "t1ce"]`. With several of them, or neighbours, all must
            hold grey images.
        mask_column: Column of the masks, or `None` for images alone.
        neighbours: Slices on each side that the image takes in.

    Raises:
        ValueError: If a column is missing or holds no images, or the columns do not tell which slices are neighbours.

    Example:
        ```python
        >>> import numpy as np
        >>> from datasets import Dataset, Features, Image, Value
        >>> from sam2unet_hf.training import ImageRows

        >>> flair = [np.full((4, 5), 10 * index, np.uint8) for index in range(3)]
        >>> columns = {"flair": flair, "case_id": ["a"] * 3, "slice_index": [7, 8, 9]}
        >>> types = {"flair": Image(), "case_id": Value("string"), "slice_index": Value("int32")}
        >>> data = Dataset.from_dict(columns, features=Features(types))
        >>> rows = ImageRows(data, ["flair"], mask_column=None, neighbours=1)
        >>> rows[2]["image"][:, 0, 0].tolist()  # the slices 8, 9 and, in place of 10, 9 again
        [10, 20, 20]

        ```
    """

    def __init__(
        self,
        rows: datasets.Dataset | ParquetRows,
        image_columns: str | Sequence[str] = "image",
        mask_column: str | None = "mask",
        neighbours: int = 0,
    ):
        self.image_columns = [image_columns] if isinstance(image_columns, str) else list(image_columns)
        self.mask_column = mask_column
        self.neighbours = neighbours
        used = [*self.image_columns, *([] if mask_column is None else [mask_column])]
        check_columns(rows, self.image_columns, used, neighbours)
        images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
        self._other_columns = [name for name in rows.column_names if name not in images]
        rows = rows.select_columns([*dict.fromkeys(used), *self._other_columns])
        rows = rows.with_transform(None) if isinstance(rows, ParquetRows) else rows.with_format(None)
        for name in used:
            rows = rows.cast_column(name, datasets.Image(decode=False))
        self.rows = rows
        self.transform: Callable[[Any], Mapping[str, Sequence[Any]]] | None = None
        # The rows of the slices of each image, of shape (rows, 2 * neighbours + 1).
        self._sources = np.arange(len(rows))[:, None]
        if neighbours:
            self._sources = find_neighbours(rows["case_id"][:], rows["slice_index"][:], neighbours)
            if isinstance(rows, ParquetRows):
                rows.spare_groups = 2

    @property
    def column_names(self) -> list[str]:
        """Names of the columns."""
        own = ["image", *(["mask"] if self.mask_column else []), *(["head_box"] if self.has_head_boxes else [])]
        return own + [name for name in self._other_columns if name not in own]

    @property
    def num_channels(self) -> int:
        """Channels that the model has for these images; a grey image is repeated to three."""
        return count_channels(self.image_columns, self.neighbours)

    @property
    def has_head_boxes(self) -> bool:
        """Whether the rows tell the box of the head in the scans of the image."""
        boxes = self.rows.features.get("head_boxes")
        return isinstance(boxes, Mapping) and set(self.image_columns) <= set(boxes)

    def with_transform(self, transform: Callable[[Any], Mapping[str, Sequence[Any]]] | None) -> "ImageRows":
        """Return the same rows, changed by a function of batches (a list per column) when they are read."""
        rows = copy.copy(self)
        rows.transform = transform
        return rows

    def mask(self, index: int) -> Image.Image:
        """Return the mask of a row, without decoding its image."""
        return self._decode(str(self.mask_column), self.rows[index][self.mask_column], index)

    def own_slice(self, image: Any) -> Any:
        """Return the channels of an image that are the row's own slice; a PIL image has no others."""
        return image if isinstance(image, Image.Image) else image[self.neighbours :: 2 * self.neighbours + 1]

    def head_boxes(self) -> list[list[int]]:
        """Return the box of the head of each row, `[x_min, y_min, x_max, y_max]` in pixels; raise without them."""
        if not self.has_head_boxes:
            raise ValueError(
                f"The rows do not tell where the head is in {', '.join(self.image_columns)}: they need a column "
                f"`head_boxes` with these names, and have {', '.join(self.rows.column_names)}. Build them anew by "
                "`python -m dataset_scripts.brats_slices`."
            )
        return [self._head_box(boxes) for boxes in self.rows["head_boxes"]]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, key: int | slice | Sequence[int] | str) -> Any:
        if isinstance(key, str):
            if key not in self._other_columns:
                raise KeyError(f"There is no column {key} without images, only {', '.join(self._other_columns)}.")
            return self.rows[key]
        if isinstance(key, slice):
            return self._batch(range(*key.indices(len(self))))
        if isinstance(key, (int, np.integer)):
            return {name: values[0] for name, values in self._batch([key]).items()}
        return self._batch(key)

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Any]]:
        """Return the rows of a batch, for PyTorch."""
        batch = self._batch(indices)
        return [{name: values[row] for name, values in batch.items()} for row in range(len(indices))]

    def _batch(self, indices: Sequence[int]) -> Mapping[str, Sequence[Any]]:
        """Return a list per column, or what the transform makes of them."""
        own = [range(len(self))[index] for index in indices]
        sources = self._sources[own]
        needed, places = np.unique(sources, return_inverse=True)
        places = places.reshape(sources.shape)
        found = self.rows[needed.tolist()]
        images = self._images(found, needed.tolist(), places)
        # Each slice's own row is in the middle of its neighbours.
        middle = places[:, self.neighbours].tolist()
        batch = {name: [found[name][place] for place in middle] for name in self._other_columns}
        batch["image"] = images
        if self.mask_column is not None:
            files = [found[self.mask_column][place] for place in middle]
            batch["mask"] = [self._decode(self.mask_column, *item) for item in zip(files, own, strict=True)]
        if self.has_head_boxes:
            batch["head_box"] = [self._head_box(boxes) for boxes in batch["head_boxes"]]
        if self.transform is None:
            return batch
        try:
            return self.transform(batch)
        except ValueError as err:
            raise ValueError(f"One of the rows {', '.join(map(self._describe_row, own))}: {err}") from err

    def _head_box(self, boxes: Mapping[str, Sequence[int]]) -> list[int]:
        return join_boxes([boxes[name] for name in self.image_columns])

    def _images(self, found: Mapping[str, Sequence[Any]], numbers: Sequence[int], places: np.ndarray) -> list[Any]:
        """Make images of the files `found` in the rows `numbers`; `places` says which of them make each image."""
        decoded = {
            name: [self._decode(name, file, number) for file, number in zip(found[name], numbers, strict=True)]
            for name in self.image_columns
        }
        if len(self.image_columns) == 1 and not self.neighbours:
            return [decoded[self.image_columns[0]][place] for place in places[:, 0]]
        greys = {
            name: [self._to_grey(name, image, number) for image, number in zip(images, numbers, strict=True)]
            for name, images in decoded.items()
        }
        images = []
        for slices in places:
            channels = [greys[name][place] for name in self.image_columns for place in slices]
            if len({channel.shape for channel in channels}) > 1:
                number = numbers[slices[self.neighbours]]
                raise ValueError(
                    f"Row {self._describe_row(number)}: its images of {', '.join(self.image_columns)} and those of "
                    f"neighbouring slices must have one size, got {[channel.shape for channel in channels]}."
                )
            images.append(tv_tensors.Image(torch.from_numpy(np.stack(channels))))
        return images

    def _to_grey(self, column: str, image: Image.Image, number: int) -> np.ndarray:
        if image.mode != "L":
            raise ValueError(
                f"Row {self._describe_row(number)}: a channel of an image must be an 8-bit grey image, got mode "
                f"{image.mode} in column `{column}`. Choose a single column, without neighbours, or save it as L."
            )
        return np.asarray(image)

    def _decode(self, column: str, file: Any, number: int) -> Image.Image:
        if file is None:
            raise ValueError(f"Row {self._describe_row(number)} holds no image in column `{column}`.")
        try:
            return datasets.Image().decode_example(file)
        except (OSError, SyntaxError, ValueError) as err:  # what Pillow raises
            raise ValueError(
                f"Row {self._describe_row(number)}: the image in column `{column}` cannot be read ({err})."
            ) from err

    def _describe_row(self, number: int) -> str:
        """Say which row it is."""
        if isinstance(self.rows, ParquetRows):
            return self.rows.describe_row(number)
        row = self.rows.select_columns(self._other_columns)[number]
        known = [f"{name} {row[name]}" for name in ("case_id", "slice_index") if row.get(name) is not None]
        return f"{number} ({', '.join(known)})" if known else str(number)


def check_columns(rows: Any, image_columns: Sequence[str], used: Sequence[str], neighbours: int) -> None:
    """Raise a `ValueError` if columns of images are missing, or those that tell neighbouring slices."""
    if type(neighbours) is not int or neighbours < 0:
        raise ValueError(f"`neighbours` must be a number of slices from 0 on, got {neighbours!r}.")
    if not image_columns or len(set(image_columns)) < len(image_columns):
        raise ValueError(f"`image_columns` must name columns, each of them once, got {list(image_columns)}.")
    for name in used:
        if not isinstance(rows.features.get(name), datasets.Image):
            images = [column for column, feature in rows.features.items() if isinstance(feature, datasets.Image)]
            raise ValueError(f"{name!r} is no column of images; those are {', '.join(images) or 'none'}.")
    if neighbours and (missing := {"case_id", "slice_index"} - set(rows.column_names)):
        raise ValueError(
            f"`neighbours` must be 0 for rows without the column {', '.join(sorted(missing))}, which tells which "
            f"slices lie side by side, got {neighbours}."
        )


def find_neighbours(case_ids: Sequence[Any], slice_indices: Sequence[int], neighbours: int) -> np.ndarray:
    """Return for each row the rows of its neighbouring slices, from below to above, itself in the middle.

    For a slice that is missing the nearest one of the case is taken; of two that are equally near, the one on the side
    of the row's own slice.

    Args:
        case_ids: The case of each row.
        slice_indices: The slice of each row, each of them once in a case.
        neighbours: Slices on each side.

    Returns:
        Numbers of rows of shape `(rows, 2 * neighbours + 1)`, int64.

    Raises:
        ValueError: If a row has no case or slice, or a case has a slice twice.
    """
    rows_of_case: dict[Any, list[int]] = {}
    for row, (case, index) in enumerate(zip(case_ids, slice_indices, strict=True)):
        if case is None or index is None:
            raise ValueError(f"Row {row} has `case_id` {case} and `slice_index` {index}; neighbours need both.")
        rows_of_case.setdefault(case, []).append(row)
    offsets = np.arange(-neighbours, neighbours + 1)
    found = np.empty((len(slice_indices), len(offsets)), np.int64)
    for case, numbers in rows_of_case.items():
        rows = np.array(sorted(numbers, key=slice_indices.__getitem__))
        slices = np.array([slice_indices[row] for row in rows])
        if (np.diff(slices) == 0).any():
            twice = slices[:-1][np.diff(slices) == 0][0]
            raise ValueError(f"Case {case} has slice {twice} in two rows, so its neighbours cannot be told.")
        wanted = slices[:, None] + offsets
        # The first slice from the wanted one on, and the last one up to it.
        above = np.searchsorted(slices, wanted).clip(max=len(slices) - 1)
        below = (np.searchsorted(slices, wanted, side="right") - 1).clip(min=0)
        to_above, to_below = np.abs(slices[above] - wanted), np.abs(slices[below] - wanted)
        takes_below = (to_below < to_above) | ((to_below == to_above) & (offsets > 0))
        found[rows] = rows[np.where(takes_below, below, above)]
    return found


def join_boxes(boxes: Iterable[Sequence[int]]) -> list[int]:
    """Return the smallest box that holds all of some, each `[x_min, y_min, x_max, y_max]`."""
    x_min, y_min, x_max, y_max = zip(*boxes, strict=True)
    return [min(x_min), min(y_min), max(x_max), max(y_max)]


def choose_head_crop_size(head_boxes: Iterable[Sequence[int]], head_crop_scale: int = 1) -> dict[str, int]:
    """Return the smallest window that holds each of some heads, in multiples of 32 pixels from 64 on when enlarged.

    Args:
        head_boxes: Half-open boxes `[x_min, y_min, x_max, y_max]` in pixels, such as `rows.head_boxes()` of the
            training rows of [`ImageRows`].
        head_crop_scale: How many times the image processor will enlarge the window.

    Returns:
        `{"height": ..., "width": ...}` for `head_crop_size` of the image processor.

    Raises:
        ValueError: If there are no boxes, or one is empty.

    Example:
        ```python
        >>> from sam2unet_hf.training import choose_head_crop_size

        >>> choose_head_crop_size([[40, 30, 180, 210], [50, 20, 186, 190]])
        {'height': 192, 'width': 160}
        >>> choose_head_crop_size([[40, 30, 180, 210], [50, 20, 186, 190]], head_crop_scale=2)
        {'height': 192, 'width': 144}

        ```
    """
    boxes = np.array(list(head_boxes)).reshape(-1, 4)
    sides = boxes[:, 2:] - boxes[:, :2]
    if not len(boxes) or (sides <= 0).any():
        wrong = boxes[(sides <= 0).any(axis=1)].tolist()
        raise ValueError(f"`head_boxes` must hold boxes with pixels in them, got {wrong[0] if wrong else 'none'}.")
    step = WINDOW_STEP // math.gcd(WINDOW_STEP, head_crop_scale)
    least = -(-2 * WINDOW_STEP // (head_crop_scale * step))
    width, height = np.maximum(-(-sides.max(axis=0) // step), least).tolist()
    return {"height": height * step, "width": width * step}


def size_of(image: Any) -> tuple[int, int]:
    """Return height and width of an image of [`ImageRows`]."""
    return (image.height, image.width) if isinstance(image, Image.Image) else tuple(image.shape[-2:])


def streamed_rows(dataset: Any) -> ParquetRows | None:
    """Return the rows that a data set streams, if it does."""
    rows = dataset.rows if isinstance(dataset, ImageRows) else dataset
    return rows if isinstance(rows, ParquetRows) else None


__all__ = ["ImageRows", "choose_head_crop_size"]
