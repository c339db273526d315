"""Figures of merit of image sets: OpenAI's ADM evaluator's definitions, and others of Inception, DINOv2 and CLIP features.

Statistics on features are here; the rooms beside this one hold the image sets, the feature networks and the whole evaluation.
"""

from metrics.distances import cmmd, kid, mind
from metrics.precision_recall import density_coverage, precision_recall
from metrics.statistics import RunningStatistics, frechet_distance, inception_score, score_of_logits

__all__ = [
    "RunningStatistics",
    "cmmd",
    "density_coverage",
    "frechet_distance",
    "inception_score",
    "kid",
    "mind",
    "precision_recall",
    "score_of_logits",
]
