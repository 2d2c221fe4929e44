"""Where time, memory and energy go. A leaf: everything may import it."""

from .allocations import AllocationCounter
from .memory import peak_memory_bytes
from .meter import GpuMeter
from .profiler import Profiler
from .regions import Regions

__all__ = ["AllocationCounter", "GpuMeter", "Profiler", "Regions", "peak_memory_bytes"]
