"""Whole torch models: their batch normalization exchanged for evennorm's, what follows it fused, and the way back."""

from evennorm.torch.conversion.convert import convert, revert
from evennorm.torch.conversion.report import Layer, Report, report

__all__ = ["Layer", "Report", "convert", "report", "revert"]
