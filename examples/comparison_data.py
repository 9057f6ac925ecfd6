"""What all systems of a comparison share: splits, regions, transforms, and the images of its picture."""

import argparse
import itertools
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import datasets
import numpy as np
from arguments import DataArguments
from case_names import case_ids, case_names
from data_sources import find_columns, find_regions, load_data
from PIL import Image
from torch.utils.data import DataLoader

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.training import SegmentationTransform, collate
from sam2unet_hf.training.augmentation import augmentation


class Example(NamedTuple):
    """A test image that the picture shows, and the label map of its reference."""

    row: int
    name: str
    image: Image.Image
    reference: np.ndarray


class ComparisonData:
    """The data of all systems, for the options of the comparison; exits if it cannot be used."""

    def __init__(self, args: argparse.Namespace):
        # Of a phantom, take the slices that show enough tumour.
        data_args = DataArguments(args.data, slices=["tumor"], min_tumor_pixels=20, allow_leaks=args.allow_leaks)
        self.splits = load_data(data_args)
        if "test" not in self.splits:
            raise SystemExit("The data set has no split named test, which the systems are scored on.")
        self.image_column, self.mask_column = find_columns(self.splits, data_args)
        self.regions, label_mapping = find_regions(self.splits, self.image_column, self.mask_column, None)
        self.augment = augmentation(*(name for name in args.augmentation if name != "none"))
        size = {"height": args.image_size, "width": args.image_size}
        self.processor = Sam2UNetImageProcessor(regions=self.regions, size=size)
        columns = (self.image_column, self.mask_column)
        self.transform = partial(SegmentationTransform, self.processor, *columns, label_mapping=label_mapping)

    def train(self) -> datasets.Dataset:
        """Return the training images with augmentation."""
        return self.splits["train"].with_transform(self.transform(augment=self.augment))

    def training_batches(self, batch_size: int, num_workers: int = 0) -> Iterator[dict[str, Any]]:
        """Return training batches without end, for timing."""
        options = {"shuffle": True, "drop_last": True, "collate_fn": collate, "num_workers": num_workers}
        return itertools.chain.from_iterable(itertools.repeat(DataLoader(self.train(), batch_size, **options)))

    def evaluation(self, split: str) -> datasets.Dataset:
        """Return images with masks at their own size."""
        return self.splits[split].with_transform(self.transform(resize_masks=False))

    @cached_property
    def examples(self) -> list[Example]:
        """Up to four test images of different cases, each the one of its case with the most to find."""
        rows = self.splits["test"]
        references = [self.transform().to_label_ids(mask).numpy() for mask in rows[self.mask_column]]
        sizes = [int((reference > 0).sum()) for reference in references]
        largest: dict[Any, int] = {}
        for row, case in enumerate(case_ids("test", rows) or range(len(rows))):
            if sizes[row] > sizes[largest.setdefault(case, row)]:
                largest[case] = row
        # Take them evenly over the order of the data, so that the choice is not a matter of taste.
        places = np.unique(np.linspace(0, len(largest) - 1, 4).round().astype(int))
        chosen = np.array(list(largest.values()))[places].tolist()
        names = case_names(rows)
        return [Example(row, names[row], rows[row][self.image_column], references[row]) for row in chosen]
