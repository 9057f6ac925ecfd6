"""Base class of all `evaluate` modules: it scores samples as they come, and makes their texts of a few facts."""

import abc
import inspect
import re
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import evaluate


@dataclass
class MetricFacts:
    """What there is to know of a module; its docstring and its card are made of that.

    Texts may be indented and have line breaks; examples and citation keep theirs.
    """

    title: str
    description: str  # what it is, in a paragraph
    range: str  # range of the values and which of them are better, and what else to know of them
    special_cases: Mapping[str, str]  # kind of sample, such as an empty mask -> its value
    example_score: float  # of the first of `metrics` in the example of all modules
    further_use: str  # a sentence about another use
    further_example: str  # doctest of that, which goes on after the first
    citation: str  # BibTeX entry with a DOI
    details: str = ""  # further paragraph for the card

    def __post_init__(self) -> None:
        for name in ("description", "range", "details"):
            setattr(self, name, " ".join(getattr(self, name).split()))
        for name in ("further_example", "citation"):
            setattr(self, name, inspect.cleandoc(getattr(self, name)))


class StreamingMetric(evaluate.Metric, abc.ABC):
    """Base class of the modules: an [`evaluate.Metric`] that scores samples in `add` and `add_batch` already.

    Options go to `evaluate.load(path, normalize="minmax")`, or to `compute` if no sample was added before. No sample
    is kept, on disk or in memory, but its scores or their sums.

    A module sets `score_function`, `metrics`, `options` and `facts`; the classes of all metrics of images and of all
    metrics of volumes set the rest. `evaluate` takes the first class in a file that is not abstract for its module.
    """

    metrics: ClassVar[tuple[str, ...]]  # as `score_function` takes them
    options: ClassVar[tuple[str, ...]]  # arguments of `score_function`, where their defaults are
    facts: ClassVar[MetricFacts]
    sample: ClassVar[str]  # what is scored: an image or a patient
    sample_data: ClassVar[str]  # what there is of a sample: an image or a volume
    sample_options: ClassVar[tuple[str, ...]] = ()  # `add` and `add_batch` take them too, for their samples
    result_options: ClassVar[tuple[str, ...]] = ()  # further options, of `scores_class.result`, which are `None` there
    scores_class: ClassVar[Any]  # of an object with `add`, `merge`, `result` and a length, for the scores of samples
    input_texts: ClassVar[dict[str, str]]  # what the arguments of `compute` and all options mean
    output_notes: ClassVar[str] = ""  # what else to know of the result
    input_features: ClassVar[Any]  # types of prediction and reference for `evaluate`
    example_samples: ClassVar[str]  # prediction and reference in the example of all modules
    example_key: ClassVar[str] = ""  # what comes behind the name of a metric in its result

    @staticmethod
    @abc.abstractmethod
    def score_function(*args: Any, **kwargs: Any) -> Any:
        """Score one sample: `score` or `score_volume`."""

    @abc.abstractmethod
    def _samples(self, predictions: Any, references: Any, options: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield `prediction` and `reference` of each sample, and its `sample_options`."""

    @classmethod
    @abc.abstractmethod
    def outputs(cls) -> dict[str, str]:
        """Return the keys of the result, in Markdown, and what their values are."""

    def __init_subclass__(cls, **kwargs: Any):
        super().__init_subclass__(**kwargs)
        if "facts" in vars(cls):
            cls.__doc__ = f"{cls.__doc__}\n\n{textwrap.fill(cls.facts.description, 119)}\n{cls._describe_inputs()}"

    def __init__(self, *args: Any, **kwargs: Any):
        self._options = self.default_options()
        arguments = inspect.signature(evaluate.Metric).parameters
        self._options = self._merge_options({name: kwargs.pop(name) for name in {*kwargs} - {*arguments}})
        if kwargs.get("num_process", 1) != 1:
            raise ValueError(
                f"`num_process` must be 1 for {type(self).__name__}, got {kwargs['num_process']}. Gather the scores "
                f"of `sam2unet_hf.metrics.{self.score_function.__name__}` instead."
            )
        super().__init__(*args, **kwargs)
        self._scores = self.scores_class(self.metrics)

    @classmethod
    def file_name(cls) -> str:
        """Return the name of the module's file, without suffix."""
        return cls.__module__.rpartition(".")[2]

    @classmethod
    def default_options(cls) -> dict[str, Any]:
        """Return the options of the module and their defaults."""
        parameters = inspect.signature(cls.score_function).parameters
        return {name: parameters[name].default for name in cls.options} | dict.fromkeys(cls.result_options)

    @classmethod
    def inputs(cls) -> dict[str, str]:
        """Return what the arguments of `compute` and the options of the module mean."""
        names = {"predictions", "references", *cls.default_options()}
        return {name: text for name, text in cls.input_texts.items() if name in names}

    @classmethod
    def example(cls) -> str:
        """Return a doctest that scores one sample with `metric`, the module."""
        spacing = ", spacing=(1, 1, 3)" if "spacing" in cls.options else ""
        return f"""\
>>> prediction, reference = {cls.example_samples}
>>> scores = metric.compute(predictions=[prediction], references=[reference]{spacing})
>>> round(scores["{cls.metrics[0]}{cls.example_key}"], 4)
{cls.facts.example_score}"""

    @classmethod
    def _describe_inputs(cls) -> str:
        def items(texts: Mapping[str, str], bullet: str = "") -> list[str]:
            fill = textwrap.TextWrapper(119, f"    {bullet}", " " * (6 if bullet else 8), break_on_hyphens=False).fill
            return [fill(f"{name}: {text}") for name, text in texts.items()]

        returns = textwrap.fill(
            f"Dictionary; range: {cls.facts.range} {cls.output_notes}", 115, break_on_hyphens=False
        )
        lines = ["\nArgs:", *items(cls.inputs()), "\nReturns:", textwrap.indent(returns, "    "), ""]
        lines += [*items(cls.outputs(), "- "), f"\nSpecial {cls.sample_data}s:"]
        lines += [*items(cls.facts.special_cases, "- "), "\nExamples:", "    >>> import evaluate"]
        lines += [f'    >>> metric = evaluate.load("{cls.file_name()}.py")  # path of this file, or id of its Space']
        return "\n".join([*lines, textwrap.indent(cls.example(), "    "), ""])

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description=self.facts.description,
            citation=self.facts.citation,
            inputs_description=self._describe_inputs(),
            features=self.input_features,
            reference_urls=[f"https://doi.org/{doi}" for doi in re.findall(r"doi = \{(.+)\}", self.facts.citation)],
        )

    def _merge_options(self, options: Mapping[str, Any]) -> dict[str, Any]:
        if unknown := sorted(options.keys() - self._options.keys()):
            raise TypeError(
                f"{type(self).__name__} has no option {', '.join(unknown)}; it has {', '.join(self._options)}."
            )
        return {**self._options, **options}

    def __len__(self) -> int:
        """Return the number of samples added since the last `compute`."""
        return len(self._scores)

    def _score(self, predictions: Any, references: Any, options: Mapping[str, Any]) -> Any:
        scores = self.scores_class(self.metrics)
        options = {name: options[name] for name in self.options}
        for index, sample in enumerate(self._samples(predictions, references, options)):
            try:
                scores.add(self.score_function(**{**options, **sample}, metrics=self.metrics))
            except ValueError as err:
                raise ValueError(f"{self.sample.capitalize()} {index}: {err}") from err
        return scores

    def add_batch(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> None:
        """Score several samples; if one of them is wrong, none of them counts."""
        if kwargs.keys() - {*self.sample_options} or predictions is None or references is None:
            but = "".join(f" but `{name}`" for name in self.sample_options)
            raise TypeError(
                f"`add_batch` takes `predictions` and `references`, got {', '.join(kwargs) or None}. Options{but} go "
                "to `evaluate.load`."
            )
        self._scores.merge(self._score(predictions, references, self._merge_options(kwargs)))

    def add(self, *, prediction: Any = None, reference: Any = None, **kwargs: Any) -> None:
        """Score one sample."""
        # `evaluate.combine` passes one sample under the plural names.
        prediction, reference = kwargs.pop("predictions", prediction), kwargs.pop("references", reference)
        if prediction is None or reference is None:
            raise TypeError("`add` takes `prediction` and `reference` together.")
        self.add_batch(predictions=[prediction], references=[reference], **kwargs)

    def compute(self, *, predictions: Any = None, references: Any = None, **kwargs: Any) -> dict[str, Any]:
        """Return the averages over these samples and those added before, and start anew."""
        if (predictions is None) != (references is None):
            raise TypeError("`compute` takes `predictions` and `references` together.")
        options = self._merge_options(kwargs)
        # Other options concern the result alone, and `sample_options` concern the samples of this call.
        own = {*self.options} - ({*self.sample_options} if predictions is not None else set())
        changed = sorted(name for name in own & {*kwargs} if repr(options[name]) != repr(self._options[name]))
        if changed and len(self):
            raise ValueError(
                f"{len(self)} {self.sample}s were added with another value of {', '.join(changed)}. Pass options to "
                "`evaluate.load` instead."
            )
        scores = self.scores_class(self.metrics)
        scores.merge(self._scores)
        if predictions is not None:
            scores.merge(self._score(predictions, references, options))
        result = scores.result(**{name: options[name] for name in self.result_options})
        # Start anew only after the result is there, so that a mistake costs no sample.
        self._scores = self.scores_class(self.metrics)
        return result
