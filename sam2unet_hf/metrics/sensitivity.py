"""Sensitivity of tumour regions in volumes, per patient, as an `evaluate` module."""

from .streaming_metric import MetricFacts
from .volume_functional import score_volume
from .volume_metric import BRATS_CITATION, VolumeMetric


class Sensitivity(VolumeMetric):
    """Sensitivity of tumour regions in volumes, per patient."""

    score_function = staticmethod(score_volume)
    metrics = ("sensitivity",)
    options = ("regions",)
    facts = MetricFacts(
        title="Sensitivity",
        description="""
            Sensitivity (recall) of predicted regions in label volumes: the share of the reference that was found, per
            region and patient, averaged over patients.
        """,
        range="0 to 1, higher is better.",
        special_cases={
            "Reference empty": "1, whatever was predicted, since there was nothing to miss. The code of BraTS 2023 "
            "has 1 if nothing was predicted, else 0.",
            "Prediction empty, reference not": "0.",
            "Region fills the volume": "as any other.",
        },
        example_score=1.0,
        further_use="One mask in place of label ids, with the scores of each patient:",
        further_example="""
            >>> found, mask = [[[True, False, True]]], [[[True, True, False]]]
            >>> metric = evaluate.load("./sensitivity.py", regions={"lesion": [1]})
            >>> scores = metric.compute(predictions=[found, mask], references=[mask, mask])
            >>> scores["sensitivity"], scores["sensitivity_per_patient"]
            (0.75, {'lesion': [0.5, 1.0]})
        """,
        citation=BRATS_CITATION,
    )
