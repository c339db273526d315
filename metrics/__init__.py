"""Figures of merit of image sets: OpenAI's ADM evaluator's definitions, and the Fréchet distance of DINOv2 features.

Statistics on features are here; the rooms beside this one hold the image sets, the feature networks and the whole evaluation.
"""

from metrics.precision_recall import precision_recall
from metrics.statistics import RunningStatistics, frechet_distance, inception_score, score_of_logits

__all__ = ["RunningStatistics", "frechet_distance", "inception_score", "precision_recall", "score_of_logits"]
