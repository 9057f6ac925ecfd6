"""Sharing on the Hugging Face Hub.

python -m sam2unet_hf.hub metric dice my_dice_space
"""

import argparse
import shutil
from collections.abc import Sequence
from pathlib import Path


_METRICS = Path(__file__).parent / "metrics"
# Beside every module, see `evaluate.load`.
_SHARED_CODE = ("functional.py", "segmentation_metric.py")
_REQUIREMENTS = "datasets>=4.0\nevaluate>=0.4.3\nnumpy>=1.26\nscipy>=1.11\n"
_APP = '''"""Try the metric in a browser."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget


launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("{name}.py"))))
'''


def write_metric_space(name: str, folder: str | Path) -> list[Path]:
    """Write one metric as a Space in the layout of `evaluate`: code, card, app and requirements.

    `evaluate.load("<user>/<name>")` loads the module once the folder is uploaded to a Space of that name.

    Args:
        name: Name of the module, such as `"dice"` or `"segmentation_report"`.
        folder: Folder to write to; made if need be.

    Returns:
        The files written.

    Raises:
        FileExistsError: If the folder is not empty.
        ValueError: If there is no such metric.
    """
    names = sorted(path.stem for path in (_METRICS / "cards").glob("*.md"))
    if name not in names:
        raise ValueError(f"`name` must be one of {', '.join(names)}, got {name!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Name another folder, or empty it first.")
    for file in (f"{name}.py", *_SHARED_CODE):
        shutil.copyfile(_METRICS / file, folder / file)
    shutil.copyfile(_METRICS / "cards" / f"{name}.md", folder / "README.md")
    (folder / "app.py").write_text(_APP.format(name=name))
    (folder / "requirements.txt").write_text(_REQUIREMENTS)
    return sorted(folder.iterdir())


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line.

    Args:
        argv: Arguments, those of the process by default.
    """
    parser = argparse.ArgumentParser(
        prog="python -m sam2unet_hf.hub", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    metric = commands.add_parser("metric", help="write one metric as a Space, ready to upload")
    metric.add_argument("name", help="such as dice or segmentation_report")
    metric.add_argument("folder", type=Path, help="empty or new folder")
    args = parser.parse_args(argv)
    try:
        files = write_metric_space(args.name, args.folder)
    except (FileExistsError, ValueError) as err:
        parser.error(str(err))
    names = ", ".join(file.name for file in files)
    parser.exit(
        message=f"Wrote {names} to {args.folder}. Upload them with\n"
        f"  hf upload YOUR_NAME/{args.name} {args.folder} --repo-type space\n"
    )


__all__ = ["write_metric_space"]


if __name__ == "__main__":
    main()
