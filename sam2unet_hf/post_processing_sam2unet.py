"""From the logits of SAM2-UNet to region probabilities and label maps of the images."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F

from .crop_sam2unet import OUTSIDE_LOGIT, uncrop
from .regions_sam2unet import region_levels, regions_from_pairs


class Sam2UNetPostProcessingMixin:
    """The half of [`Sam2UNetImageProcessor`] that reads what the model gives."""

    regions: Any

    def post_process_regions(
        self, outputs: Any, target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None
    ) -> list[torch.Tensor]:
        """Turn logits into region probabilities.

        Args:
            outputs: Output of [`Sam2UNetForSemanticSegmentation`], or anything with `logits` of shape
                `(batch_size, num_regions, height, width)`, and with `crop_boxes` if these are of windows.
            target_sizes: `(height, width)` per image; the logits' own size when `None`. For windows those of the
                images that they were cut out of.

        Returns:
            One tensor per image of shape `(num_regions, height, width)`, float32 in [0, 1], in the order of `regions`;
            0 outside a window.

        Raises:
            ValueError: If there is not one target size per image, or not one channel per region.
        """
        logits = outputs.logits
        if logits.shape[1] != len(self.regions):
            raise ValueError(
                f"`regions` {list(self.regions)} must name one region per channel of the logits, got "
                f"{logits.shape[1]} channels. Set `processor.regions = model.config.regions`."
            )
        if target_sizes is None:
            return list(logits.float().sigmoid())
        if len(target_sizes) != len(logits):
            raise ValueError(
                f"`target_sizes` must hold one (height, width) per image, got {len(target_sizes)} for "
                f"{len(logits)} images."
            )
        sizes = [(int(height), int(width)) for height, width in target_sizes]
        crop_boxes = getattr(outputs, "crop_boxes", None)
        if crop_boxes is None:
            resized = [
                F.interpolate(scores[None], size=size, mode="bilinear")[0]
                for scores, size in zip(logits.float(), sizes, strict=True)
            ]
        else:
            resized = [
                uncrop(scores, box, size, OUTSIDE_LOGIT)
                for scores, box, size in zip(logits.float(), crop_boxes.tolist(), sizes, strict=True)
            ]
        return [scores.sigmoid() for scores in resized]

    def post_process_semantic_segmentation(
        self,
        outputs: Any,
        target_sizes: Sequence[tuple[int, int]] | torch.Tensor | None = None,
        threshold: float = 0.5,
    ) -> list[torch.Tensor]:
        """Turn logits into label maps.

        Nested regions are written from the outermost inward: for BraTS whole tumour as 2, then tumour core as 1, then
        enhancing tumour as 3. Where disjoint regions are above the threshold, the most probable one is written.
        `model.config.id2label` names the ids.

        Args:
            outputs: As in [`~Sam2UNetImageProcessor.post_process_regions`].
            target_sizes: As there.
            threshold: A pixel belongs to a region if its probability is above this, in [0, 1].

        Returns:
            One tensor of label ids per image of shape `(height, width)`, int64; 0 is the background.

        Raises:
            ValueError: As there, or if `threshold` is not in [0, 1].
        """
        found = self.post_process_regions(outputs, target_sizes)
        return [self.regions_to_label_map(probabilities, threshold) for probabilities in found]

    def regions_to_label_map(self, probabilities: torch.Tensor, threshold: float = 0.5) -> torch.Tensor:
        """Turn probabilities `(num_regions, height, width)` of one image into label ids `(height, width)`, int64.

        [`~Sam2UNetImageProcessor.post_process_semantic_segmentation`] says how.
        """
        if not 0 <= threshold <= 1:
            raise ValueError(f"`threshold` must be a probability in [0, 1], got {threshold}.")
        regions = regions_from_pairs(self.regions)
        label_map = torch.zeros(probabilities.shape[1:], dtype=torch.int64, device=probabilities.device)
        for level in region_levels(regions):
            ids = torch.tensor(list(level.values()), device=probabilities.device)
            highest, winner = probabilities[[list(regions).index(name) for name in level]].max(dim=0)
            label_map = torch.where(highest > threshold, ids[winner], label_map)
        return label_map
