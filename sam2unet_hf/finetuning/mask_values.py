"""What the values in masks mean: label ids, black and white, blurred edges, or a mixture that is refused."""

import logging
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image

from sam2unet_hf.finetuning.image_depth import Brightest


logger = logging.getLogger("mask_values")

IGNORED = 255  # unless a region names it
WHITE = 128  # values above are white where masks are black and white, as in `python -m sam2unet_hf.metrics`
LARGEST_ID = 31  # that is a label id without being named by a region; beyond it values may be grey levels


class LabelIds(NamedTuple):
    """The label ids of masks, those to replace in them, such as `{255: 1}`, and a note for messages on the ids."""

    ids: list[int]
    mapping: dict[int, int]
    note: str = ""


class MaskValues:
    """The values in the masks of a data set, and how bright their images are.

    Attributes:
        first: The first mask that holds just these values, by split and values.
        counts: Pixels of each value.
        brightest: Of the images of more than 8 bits.
    """

    def __init__(self) -> None:
        self.brightest: Brightest | None = None
        self.first: dict[tuple[str, frozenset[int]], str] = {}
        self.counts: Counter[int] = Counter()

    def add(self, split: str, label_map: torch.Tensor, name: str) -> set[int]:
        """Add a mask; return its values."""
        found: Counter[int] = Counter()
        for part in label_map.split(1024):  # `unique` sorts a copy, which for a whole mask would double the memory
            values, counts = part.unique(return_counts=True)
            found.update(dict(zip(values.tolist(), counts.tolist(), strict=True)))
        self.counts += found
        self.first.setdefault((split, frozenset(found)), name)
        return set(found)

    def values(self, split: str | None = None) -> set[int]:
        """Return the values in the masks of a split, or of all."""
        return set().union(*(values for (own, values) in self.first if split in (None, own)))

    def mask_of(self, value: int) -> str:
        """Return the first mask that holds a value."""
        return next(name for (_, values), name in self.first.items() if value in values)

    def mask_like(self, *values: int) -> str | None:
        """Return the first mask that holds these values, and nothing else but 0."""
        return next((name for (_, own), name in self.first.items() if own - {0} == {*values}), None)


def check_transparency(mask: Image.Image, label_map: torch.Tensor, name: str) -> None:
    """Refuse a mask whose shape is in its alpha channel, so that label ids say something else than what one sees."""
    if mask.mode in ("LA", "PA", "RGBA"):
        channel = mask.getchannel("A")
    elif mask.mode == "P" and "transparency" in mask.info:
        channel = mask.convert("RGBA").getchannel("A")
    else:
        return
    alpha = torch.from_numpy(np.array(channel))
    is_empty = alpha.min() == alpha.max()
    if not is_empty and (label_map.min() == label_map.max() or (label_map[alpha == 0] != 0).any()):
        raise SystemExit(
            f"{name}: its mask is transparent in places, and its colours do not show the same shape: label ids are "
            "read from colours alone. Save it without transparency, the shape as label ids or in black and white."
        )


def read_label_ids(masks: MaskValues, regions: Mapping[str, Sequence[int]] | None) -> LabelIds:
    """Return the label ids in masks, or exit if they may mean several things; `regions` are those asked for."""
    named = {label_id for label_ids in (regions or {}).values() for label_id in label_ids}
    is_ignored = IGNORED in masks.values() and IGNORED not in named
    ids = sorted(masks.values() - {0, *([IGNORED] if is_ignored else [])})
    if is_ignored and not ids:
        logger.warning("The masks hold 0 and 255 only: taking 255 as the foreground, label id 1.")
        return LabelIds([1], {IGNORED: 1}, " (255 is taken as 1)")
    grey = [value for value in ids if value > LARGEST_ID and value not in named]
    as_regions = " ".join(f"class_{value}={value}" for value in ids[:3])
    if grey and regions is None:
        examples = dict.fromkeys((ids[0], grey[0], grey[-1]))
        if is_ignored:
            as_regions += f" class_{IGNORED}={IGNORED}, without which 255 is ignored"
        raise SystemExit(
            f"The masks hold {', '.join(f'{value} (in {masks.mask_of(value)})' for value in examples)}: values beyond "
            f"{LARGEST_ID} may be label ids or grey. If they are label ids, name what to segment, such as --regions "
            f"{as_regions}. If the masks are black and white with blurred edges, as resizing and JPEG leave them, "
            "pass --binarize."
        )
    if is_ignored:
        check_mixture(masks, ids)
        share = masks.counts[IGNORED] / (masks.counts.total() - masks.counts[0])
        if share > 0.5 and (grey or regions is None):
            raise SystemExit(
                f"255 is ignored in masks with label ids, and {share:.0%} of what is not 0 in these is 255, such as "
                f"in {masks.mask_of(IGNORED)}; the ids are {', '.join(map(str, ids))}, such as {ids[0]} in "
                f"{masks.mask_of(ids[0])}. If the masks are black and white, pass --binarize; if 255 is a class, name "
                f"it by --regions, too; if so few pixels have a label, name these alone: --regions {as_regions}."
            )
        logger.warning(
            "Pixels of 255 in the masks are ignored in training and evaluation, %.0f %% of those that are not 0, such "
            "as in %s. A region can name 255.",
            100 * share,
            masks.mask_of(IGNORED),
        )
    return LabelIds(ids, {})


def check_mixture(masks: MaskValues, ids: Sequence[int]) -> None:
    """Refuse masks of which some are of 0 and 255, others of 0 and a single id, and none has both."""
    white, other = masks.mask_like(IGNORED), masks.mask_like(*ids) if len(ids) == 1 else None
    if white is None or other is None or masks.mask_like(ids[0], IGNORED) is not None:
        return
    raise SystemExit(
        f"{other} holds nothing but 0 and {ids[0]}, and {white} nothing but 0 and 255. Masks are all of 0 and 255 or "
        f"all of 0 and {ids[0]}: replace {ids[0]} by 255 in those like the first, or take both for the foreground by "
        f"--regions foreground={ids[0]},255. If 255 marks pixels to ignore, remove masks that hold nothing else."
    )


def read_black_and_white(masks: MaskValues) -> LabelIds:
    """Return white, values above 128, as label id 1 and the rest as background, or exit if that cannot be meant."""
    found = masks.values()
    if found <= {0, 1}:
        return LabelIds([1], {})
    for (_, values), name in masks.first.items():
        if 0 < max(values) <= WHITE:
            bright = masks.mask_of(max(found))
            raise SystemExit(
                f"--binarize: {name} holds nothing above {max(values)}, and {bright} values up to {max(found)}. White "
                f"is above {WHITE} of 255: save {name} as 0 and 255."
            )
    if max(found) > 255:
        raise SystemExit(
            f"--binarize: {masks.mask_of(max(found))} holds the value {max(found)}. Save masks with 8 bits, white as "
            "255."
        )
    return LabelIds([1], black_and_white_mapping(found - {0}), f" (values above {WHITE} are taken as 1)")


def black_and_white_mapping(values: Collection[int]) -> dict[int, int]:
    """Return label id 1 for values that are white, and 0 for the others."""
    return {value: int(value > WHITE) for value in sorted(values)}


def check_grey(label_map: torch.Tensor, name: str) -> None:
    """Refuse a mask whose grey is more than blurred edges, of which `--binarize` would make black and white."""
    grey = (label_map > LARGEST_ID) & (label_map < 255 - LARGEST_ID)
    if not grey.any():
        return
    values = label_map[None].float()
    # An edge goes from black to white, so that it is flat nowhere; areas have noise where they were a JPEG.
    flat = F.max_pool2d(values, 3, 1, 1) + F.max_pool2d(-values, 3, 1, 1) <= 4
    if (grey & flat[0]).sum() > 0.1 * grey.sum():
        value = int(label_map[grey & flat[0]].mode().values)
        raise SystemExit(
            f"--binarize: {name} has areas of grey, such as of {value}, and not only blurred edges. If they are a "
            f"class, leave out --binarize and name it, such as by --regions grey={value} white=255. Else save it as 0 "
            "and 255."
        )


def warn_of_untrained(ids: Mapping[str, Collection[int]], regions: Mapping[str, Sequence[int]]) -> None:
    """Warn of regions that other splits show, by their label ids, and training does not."""
    for region, label_ids in regions.items():
        shown = [split for split, own in ids.items() if not set(label_ids).isdisjoint(own)]
        if shown and "train" in ids and "train" not in shown:
            logger.warning(
                "Region %s (%s) is in the split %s and in no training image, so that it cannot be learnt and its "
                "scores say nothing. Put images that show it into the split train.",
                region,
                ", ".join(map(str, label_ids)),
                " and ".join(shown),
            )
