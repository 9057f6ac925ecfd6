"""Which checkpoints of a training run are whole: a run that was killed may have left half of one."""

import json
import logging
import os
import zipfile
from pathlib import Path


logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"  # the Trainer writes it last
# Weights, optimizer, schedule and random numbers, by one process or several, in one piece or by FSDP.
PARTS = (("model*.safetensors", "pytorch_model*"), ("optimizer*",), ("scheduler.pt",), ("rng_state*.pth",))


def last_whole_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """Return the newest checkpoint of a run that was written to its end, and warn of those that were not.

    Args:
        output_dir: Output folder of the run, with `checkpoint-{step}` in it.

    Returns:
        Path of the checkpoint, or `None` if there is no whole one.
    """
    numbered = [path for path in Path(output_dir).glob("checkpoint-*") if path.name.split("-")[-1].isdecimal()]
    for path in sorted(numbered, key=lambda path: int(path.name.split("-")[-1]), reverse=True):
        fault = find_fault(path)
        if fault is None:
            return str(path)
        logger.warning("%s is incomplete (%s), passing it over.", path, fault)
    return None


def find_fault(checkpoint: str | os.PathLike) -> str | None:
    """Say why a checkpoint of [`~transformers.Trainer`] cannot be resumed from, without loading it.

    A checkpoint is whole if all files are there and none is cut off. Sizes are checked, contents are not. One without
    optimizer, as `save_only_model=True` writes it, is not whole.

    Args:
        checkpoint: Folder `checkpoint-{step}`.

    Returns:
        What is missing or cut off, or `None` if the checkpoint is whole.
    """
    folder = Path(checkpoint)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        if not isinstance(state, dict) or "global_step" not in state:
            return f"{STATE_FILE} holds no state"
    except FileNotFoundError:
        return f"no {STATE_FILE}"
    except ValueError:
        return f"{STATE_FILE} is cut off"
    for patterns in PARTS:
        if not any(any(folder.glob(pattern)) for pattern in patterns):
            return f"no {patterns[0]}"
    for path in sorted(folder.rglob("*.safetensors")):
        if not _is_whole_safetensors(path):
            return f"{path.name} is cut off"
    # `torch.save` writes ZIP files, whose directory is at their end.
    for path in sorted(path for ending in ("*.pt", "*.pth", "*.bin") for path in folder.rglob(ending)):
        if not zipfile.is_zipfile(path):
            return f"{path.name} is cut off"
    return None


def _is_whole_safetensors(path: Path) -> bool:
    """Compare the size of a file with what its header promises."""
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if 8 + length > size:
            return False
        try:
            header = json.loads(file.read(length))
        except ValueError:
            return False
    ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
    return 8 + length + max(ends, default=0) == size


__all__ = ["find_fault", "last_whole_checkpoint"]
