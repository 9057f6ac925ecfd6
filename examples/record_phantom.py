#!/usr/bin/env python
"""Keep what the run on the phantom gave: its picture in the README, its record, and its figures in the guides.

python examples/run_segmentation.py && python examples/record_phantom.py
"""

import argparse
import datetime
import hashlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo


GUIDES = Path(__file__).parent
PICTURE, RECORD = GUIDES / "results/phantom_predictions.png", GUIDES / "results/phantom.json"
PACKAGES = ("python", "sam2unet-hf", "torch", "torchvision", "transformers", "datasets", "numpy")
SCORES = ("eval_dice", "test_dice", "test_iou", "test_mae", "eval_patient_dice", "test_patient_dice")


def read_run(folder: Path) -> dict[str, Any]:
    """Return what is kept of a finished run on the phantom, all but its picture.

    The date is that of the file of results, which a run writes last.
    """
    names = ("run", "all_results", "train_results", "training_info", "test_patients")
    files = {name: json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names}
    run, results = files["run"], files["all_results"]
    if run["arguments"]["brats_dir"] or run["arguments"]["dataset_name"]:
        raise SystemExit(f"{folder} is no run on the phantom. Train without --brats_dir and --dataset_name.")
    program, *words = run["command"]
    program = f"python {program}" if program.endswith(".py") else Path(program).name
    ended = datetime.datetime.fromtimestamp((folder / "all_results.json").stat().st_mtime, datetime.UTC)
    return {
        "command": shlex.join([*program.split(), *words]),
        "date": ended.date().isoformat(),
        "commit": run["git"]["commit"],
        "versions": {name: run["versions"][name] for name in PACKAGES if name in run["versions"]},
        "hardware": files["training_info"]["recipe"]["hardware"],
        "bf16": run["arguments"]["bf16"],
        "training_s": round(files["train_results"]["train_runtime"], 1),
        "scores": {name: round(results[name], 4) for name in SCORES},
        "test_patients": {row["patient"]: round(row["volume_dice"], 4) for row in files["test_patients"]["patients"]},
    }


def sentences(record: dict[str, Any]) -> dict[str, list[tuple[str, list[str]]]]:
    """Return what the guides state of a run: by guide, sentences with a gap for each figure, and the figures."""
    minutes, seconds = divmod(round(record["training_s"]), 60)
    validation, test, iou, mae, validation_patients, test_patients = (
        f"{record['scores'][name]:.3f}" for name in SCORES
    )
    name, worst = min(record["test_patients"].items(), key=lambda item: item[1])
    row = "bfloat16 (two CPU cores, {}) | {} min {} s of training | {} | {} | {} | {} |"
    patients = "have a Dice of {} (validation) and {} (test), the worst {},"
    volumes = "{} on slices, {} on the volumes of the six test patients, and {} on that of `{}`, the worst"
    volumes += " (two CPU cores, {})"
    return {
        "training.md": [
            (row, [record["date"], str(minutes), str(seconds), validation, test, iou, mae]),
            (patients, [validation_patients, test_patients, f"{worst:.3f}"]),
        ],
        "volumes.md": [(volumes, [test, test_patients, f"{worst:.3f}", name, record["date"]])],
    }


def fill(text: str, sentence: str, figures: list[str]) -> str:
    """Return a text with the figures in the gaps `{}` of a sentence, which must be in it once, wrapped in any way."""
    parts = [re.escape(part).replace(r"\ ", r"\s+") for part in sentence.split("{}")]
    pattern = r"[\w.-]+".join(f"({part})" for part in parts)
    found = list(re.finditer(pattern, text))
    if len(found) != 1:
        raise SystemExit(f"The guide must hold once, not {len(found)} times: {sentence}")
    kept = [*found[0].groups()]
    filled = "".join(part + figure for part, figure in zip(kept, [*figures, ""], strict=True))
    return text[: found[0].start()] + filled + text[found[0].end() :]


def state_figures(guide: str, text: str, record: dict[str, Any]) -> str:
    """Return the text of a guide with the figures of a run in their places."""
    for sentence, figures in sentences(record)[guide]:
        text = fill(text, sentence, figures)
    return text


def record_run(folder: Path) -> dict[str, Any]:
    """Write picture and record of a run on the phantom, and its figures into the guides; return the record."""
    record = read_run(folder)
    about = PngInfo()
    about.add_text("Description", f"{record['command']}, {record['date']}, commit {record['commit']}")
    with Image.open(folder / "predictions.png") as picture:
        picture.save(PICTURE, pnginfo=about, optimize=True)
    record["picture_sha256"] = hashlib.sha256(PICTURE.read_bytes()).hexdigest()
    RECORD.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name in sentences(record):
        guide = GUIDES / name
        guide.write_text(state_figures(name, guide.read_text(encoding="utf-8"), record), encoding="utf-8")
    return record


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", nargs="?", type=Path, default="runs/phantom", help="folder of the run")
    folder = parser.parse_args(argv).run
    if not (folder / "all_results.json").exists():
        raise SystemExit(f"{folder} holds no finished run. `python examples/run_segmentation.py` makes one.")
    record = record_run(folder)
    print(f"{record['command']} of {record['date']}: {PICTURE}, {RECORD}, and figures in training.md and volumes.md.")


if __name__ == "__main__":
    main()
