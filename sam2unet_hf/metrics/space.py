"""One metric as a Space of the Hub."""

import re
import shutil
from pathlib import Path


_METRICS = Path(__file__).parent

_REQUIREMENTS = "datasets>=5.1\nevaluate>=0.4.6\nnumpy>=2.0\nscipy>=1.13\n"

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
    code = (_METRICS / f"{name}.py").read_text()
    # `evaluate.load` copies what a module itself imports, and no further.
    for module in (name, *sorted(set(re.findall(r"^from \.(\w+) import", code, re.MULTILINE)))):
        shutil.copyfile(_METRICS / f"{module}.py", folder / f"{module}.py")
    shutil.copyfile(_METRICS / "cards" / f"{name}.md", folder / "README.md")
    (folder / "app.py").write_text(_APP.format(name=name))
    (folder / "requirements.txt").write_text(_REQUIREMENTS)
    return sorted(folder.iterdir())


__all__ = ["write_metric_space"]
