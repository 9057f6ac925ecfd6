"""A metric as a Space on the Hugging Face Hub: its code, an app, and a card made of its facts."""

import importlib
import inspect
import re
import shutil
from pathlib import Path

from .streaming_metric import StreamingMetric, wrap


_PACKAGE = importlib.import_module(__name__.rpartition(".")[0])
_EXPORTS = [getattr(_PACKAGE, name) for name in _PACKAGE.__all__]
# Name of its file -> metric, of all that the package exports.
METRIC_CLASSES: dict[str, type[StreamingMetric]] = {
    value.name_of_file(): value for value in _EXPORTS if inspect.isclass(value) and issubclass(value, StreamingMetric)
}
_REQUIREMENTS = "datasets>=5.1\nevaluate>=0.4.6\nnumpy>=2.0\nscipy>=1.13\n"
_APP = '''"""Try the metric in a browser."""

from pathlib import Path

import evaluate
from evaluate.utils import launch_gradio_widget


launch_gradio_widget(evaluate.load(str(Path(__file__).with_name("{name}.py"))))
'''
_CARD = """\
---
title: {title}
emoji: 🧠
colorFrom: blue
colorTo: gray
sdk: gradio
sdk_version: 3.19.1
app_file: app.py
pinned: false
license: apache-2.0
tags:
  - evaluate
  - metric
  - image-segmentation
description: >-
{front_matter_description}
---

# {title}

{paragraphs}

## How to use

In the folder of `{name}.py`, or with the id of a Space in place of its path:

```python
>>> import evaluate
>>> metric = evaluate.load("./{name}.py")
{example}

```

{further_use}

```python
{further_example}

```

## Inputs

{inputs}

{rules}

## Output

{range}

| key | value |
| --- | --- |
{outputs}

## Special {sample_data}s

{special_cases}

## Citation

```bibtex
{citation}
```
"""


def render_metric_card(name: str) -> str:
    """Return the card of a metric, with the front matter of a Space.

    Args:
        name: Name of the module, a key of `METRIC_CLASSES`.
    """
    metric = METRIC_CLASSES[name]
    facts, inputs = metric.facts, metric.inputs()
    further_use, further_example = facts.further_example
    also = "".join(f"; `{name}` also to `add` and `add_batch`" for name in metric.sample_options if name in inputs)
    rules = f"Options go to `evaluate.load` or to `compute`{also}. {metric.refused_inputs} raise an error."
    return _CARD.format(
        name=name,
        title=facts.title,
        front_matter_description=wrap(facts.description, "  ", "  "),
        paragraphs="\n\n".join(wrap(text) for text in (facts.description, facts.details, metric.notes) if text),
        example=inspect.cleandoc(facts.example),
        further_use=wrap(further_use),
        further_example=inspect.cleandoc(further_example),
        inputs="\n".join(wrap(f"`{argument}`: {text}", "- ", "  ") for argument, text in inputs.items()),
        rules=wrap(rules),
        range=wrap(f"A dictionary; range: {facts.range} {metric.output_notes}"),
        outputs="\n".join(f"| {keys} | {text} |" for keys, text in metric.outputs().items()),
        sample_data=metric.sample_data,
        special_cases="\n".join(wrap(f"{case}: {text}", "- ", "  ") for case, text in facts.special_cases.items()),
        citation=inspect.cleandoc(facts.citation),
    )


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
