"""Log what happens to the batch normalizations of a model while it trains, whatever framework trains it.

`evennorm.keras.StatisticsMonitor` and `evennorm.torch.monitor` are the way in; this package holds what they share.
"""

from evennorm.monitor.recorder import Recorder
from evennorm.monitor.summary import FIELDS, summary

__all__ = ["FIELDS", "Recorder", "summary"]
