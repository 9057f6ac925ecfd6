"""Specificity of tumour regions in volumes, per patient, as an `evaluate` module."""

from .streaming_metric import MetricFacts
from .volume_functional import score_volume
from .volume_metric import BRATS_CITATION, VolumeMetric


class Specificity(VolumeMetric):
    """Specificity of tumour regions in volumes, per patient."""

    score_function = staticmethod(score_volume)
    metrics = ("specificity",)
    options = ("regions",)
    facts = MetricFacts(
        title="Specificity",
        description="""
            Specificity of predicted regions in label volumes: the share of the volume outside the reference that was
            left empty, per region and patient, averaged over patients.
        """,
        range="""
            0 to 1, higher is better. Tumours are small, so it is close to 1 for any prediction, and depends on how
            much air the volume has.
        """,
        special_cases={
            "Reference fills the volume": "1, since there was no background to get wrong.",
            "Reference empty": "the share of voxels not predicted.",
            "Prediction empty": "1.",
        },
        example_score=0.6667,
        further_use="One mask in place of label ids, with the scores of each patient:",
        further_example="""
            >>> found, mask = [[[True, False, True]]], [[[True, False, False]]]
            >>> metric = evaluate.load("./specificity.py", regions={"lesion": [1]})
            >>> scores = metric.compute(predictions=[found, mask], references=[mask, mask])
            >>> scores["specificity"], scores["specificity_per_patient"]
            (0.75, {'lesion': [0.5, 1.0]})
        """,
        citation=BRATS_CITATION,
    )
