"""Put batch normalization in one place of each hidden layer of a torch model."""

from evennorm.torch.placement.place import PLACEMENTS, place, sites
from evennorm.torch.placement.sites import Site

__all__ = ["PLACEMENTS", "Site", "place", "sites"]
