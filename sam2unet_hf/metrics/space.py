"""A metric as a Space on the Hugging Face Hub: its code, an app, and a card made of its facts."""

import inspect
import re
import shutil
from pathlib import Path

from huggingface_hub import SpaceCard, SpaceCardData

from .. import metrics
from .streaming_metric import StreamingMetric


# Name of its file -> metric, of all that the package exports.
METRIC_CLASSES: dict[str, type[StreamingMetric]] = {
    value.file_name(): value
    for value in vars(metrics).values()
    if inspect.isclass(value) and issubclass(value, StreamingMetric)
}
_TEMPLATE = Path(__file__).with_name("metric_card.md")
_REQUIREMENTS = "datasets>=5.1\nevaluate>=0.4.6\nnumpy>=2.0\nscipy>=1.13\n"
_APP = '''"""Try the metric in a browser."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget


launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("{name}.py"))))
'''


def render_metric_card(name: str) -> str:
    """Return the card of a metric, with the front matter of a Space.

    Args:
        name: Name of the module, a key of `METRIC_CLASSES`.
    """
    metric = METRIC_CLASSES[name]
    card_data = SpaceCardData(title=metric.facts.title, description=metric.facts.description)
    return str(SpaceCard.from_template(card_data, template_path=str(_TEMPLATE), metric=metric))


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
    if name not in METRIC_CLASSES:
        raise ValueError(f"`name` must be one of {', '.join(sorted(METRIC_CLASSES))}, got {name!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty. Name another folder, or empty it first.")
    here = Path(__file__).parent
    code = (here / f"{name}.py").read_text()
    # `evaluate.load` copies what a module itself imports, and no further.
    for module in (name, *sorted(set(re.findall(r"^from \.(\w+) import", code, re.MULTILINE)))):
        shutil.copyfile(here / f"{module}.py", folder / f"{module}.py")
    (folder / "README.md").write_text(render_metric_card(name), encoding="utf-8")
    (folder / "app.py").write_text(_APP.format(name=name))
    (folder / "requirements.txt").write_text(_REQUIREMENTS)
    return sorted(folder.iterdir())


__all__ = ["METRIC_CLASSES", "render_metric_card", "write_metric_space"]
