"""What all systems of a comparison share: splits, regions, transforms, and the images of its picture."""

import argparse
import itertools
from collections.abc import Iterator
from functools import cached_property, partial
from typing import Any, NamedTuple

import numpy as np
from torch.utils.data import DataLoader
from transformers import PreTrainedModel

from sam2unet_hf import Sam2UNetImageProcessor
from sam2unet_hf.finetuning.arguments import DataArguments
from sam2unet_hf.finetuning.case_names import case_ids, case_names
from sam2unet_hf.finetuning.data_sources import find_columns, find_regions, load_data, make_images
from sam2unet_hf.finetuning.image_depth import fit_white_level
from sam2unet_hf.finetuning.plots import name_of_image
from sam2unet_hf.finetuning.predictions import predict_label_maps
from sam2unet_hf.finetuning.processes import exit_on
from sam2unet_hf.overlays import image_to_show
from sam2unet_hf.regions_sam2unet import parse_regions
from sam2unet_hf.training import ImageRows, SegmentationTransform, collate
from sam2unet_hf.training.augmentation import augmentation


class Example(NamedTuple):
    """A test image as `overlays.image_to_show` returns it, and the label map `(height, width)` of its reference."""

    row: int
    name: str
    image: np.ndarray
    reference: np.ndarray


class ComparisonData:
    """The data of all systems, for the options of the comparison; exits if it cannot be used."""

    def __init__(self, args: argparse.Namespace):
        # Of a phantom, take the slices that show enough tumour.
        same = {name: getattr(args, name) for name in ("modalities", "allow_leaks", "group_by", "binarize")}
        data_args = DataArguments(args.data, slices=["tumor"], min_tumor_pixels=20, **same)
        with exit_on(ValueError, prefix="--regions: "):
            regions = None if args.regions is None else parse_regions(args.regions)
        self.splits = load_data(data_args)
        if "test" not in self.splits:
            raise SystemExit("The data set has no split named test, which the systems are scored on.")
        columns, mask_column = find_columns(self.splits, data_args)
        self.regions, label_mapping, brightest = find_regions(
            self.splits, columns, mask_column, regions, binarize=args.binarize
        )
        self.images = make_images(self.splits, columns, mask_column)
        size = {"height": args.image_size, "width": args.image_size}
        self.processor = Sam2UNetImageProcessor(regions=self.regions, size=size)
        fit_white_level(self.processor, brightest)
        names = [name for name in args.augmentation if name != "none"]
        self.augment = augmentation(*names, white_level=self.processor.white_level)
        self.transform = partial(SegmentationTransform, self.processor, label_mapping=label_mapping)

    def train(self) -> ImageRows:
        """Return the training images with augmentation."""
        return self.images["train"].with_transform(self.transform(augment=self.augment))

    def training_batches(self, batch_size: int, num_workers: int = 0) -> Iterator[dict[str, Any]]:
        """Return training batches without end, for timing."""
        options = {"shuffle": True, "drop_last": True, "collate_fn": collate, "num_workers": num_workers}
        return itertools.chain.from_iterable(itertools.repeat(DataLoader(self.train(), batch_size, **options)))

    def evaluation(self, split: str) -> ImageRows:
        """Return images with masks at their own size."""
        return self.images[split].with_transform(self.transform(resize_masks=False))

    @cached_property
    def examples(self) -> list[Example]:
        """Up to four test images of different cases, each the one of its case with the most to find."""
        rows = self.images["test"]
        references = [self.transform().to_label_ids(rows.mask(row)).numpy() for row in range(len(rows))]
        sizes = [int((reference > 0).sum()) for reference in references]
        largest: dict[Any, int] = {}
        for row, case in enumerate(case_ids("test", rows) or range(len(rows))):
            if sizes[row] > sizes[largest.setdefault(case, row)]:
                largest[case] = row
        # Take them evenly over the order of the data, so that the choice is not a matter of taste.
        places = np.unique(np.linspace(0, len(largest) - 1, 4).round().astype(int))
        chosen = np.array(list(largest.values()))[places].tolist()
        names = case_names(rows)
        images = [image_to_show(rows.own_slice(rows[row]["image"]), rows.image_columns) for row in chosen]
        return [Example(row, names[row], image, references[row]) for row, image in zip(chosen, images, strict=True)]

    @property
    def image_title(self) -> str:
        """What the examples show of an image, as a title."""
        return name_of_image(self.images["test"].image_columns)

    def predict_examples(self, model: PreTrainedModel) -> dict[str, np.ndarray]:
        """Return the label map that a model predicts for each of the examples, by the number of its row."""
        rows = [example.row for example in self.examples]
        maps = predict_label_maps(model, self.transform(), self.images["test"][rows])
        return {str(row): label_map.astype(np.uint8) for row, label_map in zip(rows, maps, strict=True)}
