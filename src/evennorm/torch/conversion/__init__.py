"""Convert whole torch models: exchange their batch normalization for evennorm's, fuse what follows it, and revert both."""

from evennorm.torch.conversion.convert import convert, revert
from evennorm.torch.conversion.report import Layer, Report, report

__all__ = ["Layer", "Report", "convert", "report", "revert"]
