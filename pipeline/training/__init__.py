"""Fine-tuning: one loop for baselines, pre-folding and post-folding, resumable to the step.

from pipeline.training.loop import FitConfig, fit
from pipeline.training.evaluate import evaluate
"""
