"""Regions: what a model segments, each one a set of label ids with a name."""

import re
from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any


def regions_from_pairs(regions: Mapping[str, Sequence[int]] | Sequence[Sequence[Any]]) -> dict[str, list[int]]:
    """Return regions as a dict; JSON files hold them as pairs, because transformers sorts the keys of dicts."""
    pairs = regions.items() if isinstance(regions, Mapping) else regions
    return {name: list(label_ids) for name, label_ids in pairs}


def default_ignore_index(regions: Mapping[str, Sequence[int]]) -> int:
    """Return the label id whose pixels count nowhere: 255, or -100, which no mask holds, if a region names 255."""
    return -100 if any(255 in label_ids for label_ids in regions.values()) else 255


def parse_regions(texts: Sequence[str]) -> dict[str, list[int]]:
    """Read regions as command lines give them, one text `NAME=ID[,ID...]` per region, such as `"WT=1,2,3"`."""
    regions: dict[str, list[int]] = {}
    for text in texts:
        match = re.fullmatch(r"([^=]+)=(\d+(?:,\d+)*)", text)
        if match is None or match[1] in regions:
            raise ValueError(f"Regions are NAME=ID[,ID...] with different names, such as WT=1,2,3, got {text!r}.")
        regions[match[1]] = [int(label_id) for label_id in match[2].split(",")]
    region_levels(regions)
    return regions


def region_levels(regions: Mapping[str, Sequence[int]]) -> list[dict[str, int]]:
    """Order regions for rebuilding a label map: one dict per nesting level, from the outermost inward.

    Each dict maps a region to the label id it writes: the smallest of its ids that no region inside it holds. For
    BraTS, `{"WT": [1, 2, 3], "TC": [1, 3], "ET": [3]}` gives `[{"WT": 2}, {"TC": 1}, {"ET": 3}]`, nnU-Net's
    `regions_class_order`.
    """
    if not regions:
        raise ValueError('`regions` must name at least one region, for example {"WT": [1, 2, 3]}.')
    for name, label_ids in regions.items():
        if not label_ids or any(isinstance(i, bool) or not isinstance(i, int) or i < 1 for i in label_ids):
            raise ValueError(
                f"`regions[{name!r}]` must list label ids >= 1 (0 is the background), got {list(label_ids)}."
            )
    ids = {name: set(label_ids) for name, label_ids in regions.items()}
    for (first, first_ids), (second, second_ids) in combinations(ids.items(), 2):
        common = first_ids & second_ids
        if common and not (first_ids < second_ids or second_ids < first_ids):
            raise ValueError(
                f"`regions` must be nested or disjoint, got {first!r} {sorted(first_ids)} and {second!r} "
                f"{sorted(second_ids)}. Split the common ids {sorted(common)} into a region of their own."
            )
    levels: list[dict[str, int]] = []
    for name, own_ids in ids.items():
        inner_ids = set().union(*(other for other in ids.values() if other < own_ids))
        if own_ids == inner_ids:
            raise ValueError(
                f"`regions[{name!r}]` {sorted(own_ids)} is the union of the regions inside it, so no label id is left "
                "to write for it. Drop it, or give it an id of its own."
            )
        depth = sum(other > own_ids for other in ids.values())
        levels.extend({} for _ in range(depth + 1 - len(levels)))
        levels[depth][name] = min(own_ids - inner_ids)
    return levels


def label_names(regions: Mapping[str, Sequence[int]]) -> dict[int, str]:
    """Name the ids of the label map that `regions` rebuild: `{0: "background", 1: "WT without ET", 3: "ET"}`."""
    names = {0: "background"}
    for level in region_levels(regions):
        for name, label_id in level.items():
            inner = [other for other in regions if set(regions[other]) < set(regions[name])]
            # Name only the largest inner regions: "WT without TC" instead of "WT without TC, ET".
            outermost = [a for a in inner if not any(set(regions[a]) < set(regions[b]) for b in inner)]
            names[label_id] = f"{name} without {', '.join(outermost)}" if outermost else name
    return dict(sorted(names.items()))
