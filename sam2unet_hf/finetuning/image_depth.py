"""Images of more than 8 bits: which of their values is white, the same for all images of a data set."""

import logging
from typing import NamedTuple

import numpy as np
from PIL import Image

from sam2unet_hf import Sam2UNetImageProcessor


logger = logging.getLogger("image_depth")

WHITE_LEVELS = (1023, 4095, 65535)  # of cameras and scanners with 10, 12 and 16 bits


class Brightest(NamedTuple):
    """The largest value in images of more than 8 bits, and the image that holds it."""

    value: int
    name: str


def brighter(image: Image.Image, name: str, before: Brightest | None) -> Brightest | None:
    """Return the brightest of images of more than 8 bits, this one among them if it is one."""
    if not image.mode.startswith("I"):
        return before
    value = int(np.asarray(image).max())
    # Up to 255 a picture of 32-bit integers is one of bytes.
    if not value or (image.mode == "I" and value <= 255) or (before is not None and value <= before.value):
        return before
    return Brightest(value, name)


def fit_white_level(
    processor: Sam2UNetImageProcessor,
    brightest: Brightest | None,
    given: int | None = None,
    has_trained: bool = True,
    is_sample: bool = False,
) -> None:
    """Set which value of deep images is white in an image processor, or exit if images are brighter.

    Args:
        processor: That of the model.
        brightest: Of the images that it will prepare; `None` if they have 8 bits.
        given: The level asked for. By default that of the processor, else the least one that no image exceeds.
        has_trained: Whether the model was trained on images as the processor prepares them.
        is_sample: Whether there are other images, which may be brighter.
    """
    if brightest is None:
        return
    level = given or (processor.white_level if has_trained else None)
    if level is None and is_sample and brightest.value <= WHITE_LEVELS[-2]:
        raise SystemExit(
            f"The first images have more than 8 bits, and values up to {brightest.value} ({brightest.name}). Say "
            f"which value is white, such as --white_level {WHITE_LEVELS[-2]} for 12 bits, or {WHITE_LEVELS[-1]}."
        )
    if level is None:
        level = next(level for level in WHITE_LEVELS if brightest.value <= level)
    if brightest.value > level:
        raise SystemExit(
            f"{brightest.name} holds values up to {brightest.value}, and {level} is white. Images of one scale are "
            f"needed: pass --white_level {next(level for level in WHITE_LEVELS if brightest.value <= level)} when "
            "training, or scale the images as those of the training are."
        )
    if processor.white_level not in (None, level):
        logger.warning("The model takes %d for white, and sees images of %d now.", processor.white_level, level)
    if brightest.value * 16 < level:
        logger.warning(
            "The images hold values up to %d alone, where %d is white, so that they are nearly black. Scale them as "
            "those of the training are, or train with another --white_level.",
            brightest.value,
            level,
        )
    elif processor.white_level != level and level != WHITE_LEVELS[-1]:
        text = "The images have more than 8 bits, with values up to %d: taking %d for white (--white_level)."
        logger.warning(text, brightest.value, level)
    processor.white_level = level
