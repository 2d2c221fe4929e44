"""Energy and utilisation of one NVIDIA GPU, as its driver counts them (NVML)."""

import torch


class GpuMeter:
    """Reads a GPU's counters.

    Parameters
    ----------
    device: a CUDA device; on any other one there is nothing to read.

    Attributes
    ----------
    missing: why there are no readings, or None.
    """

    def __init__(self, device: torch.device | str) -> None:
        self.missing: str | None = None
        self._handle = self._nvml = None
        device = torch.device(device)
        if device.type != "cuda":
            self.missing = "no GPU"
            return
        try:
            import pynvml
        except ImportError:
            self.missing = "nvidia-ml-py is not installed"
            return
        try:
            pynvml.nvmlInit()
            # By its identity: CUDA_VISIBLE_DEVICES renumbers torch's GPUs, not the driver's.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self._nvml = pynvml
        except (pynvml.NVMLError, AttributeError) as error:
            self.missing = f"NVML: {error}"

    def joules(self) -> float | None:
        """Energy since the driver was loaded; None where it is not counted."""
        if self._nvml is None:
            return None
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3

    def utilization(self) -> int | None:
        """Percent of the last sample period (up to a second) in which a kernel ran; None where it is not counted."""
        if self._nvml is None:
            return None
        return self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
