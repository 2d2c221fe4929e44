"""Where the time of an iteration goes. A leaf: everything may import it."""

from .regions import Regions

__all__ = ["Regions"]
