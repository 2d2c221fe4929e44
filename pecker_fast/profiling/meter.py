"""Energy and utilisation of one NVIDIA GPU, from its driver's counters (NVML)."""

import torch


class GpuMeter:
    """Reads a GPU's counters.

    Parameters
    ----------
    device : torch.device or str
        A CUDA device. Other devices have no counters.

    Attributes
    ----------
    missing : str or None
        Why there are no readings.
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
            # By UUID: CUDA_VISIBLE_DEVICES renumbers the GPUs for torch but not for the driver.
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
            self._handle = pynvml.nvmlDeviceGetHandleByUUID(uuid)
            pynvml.nvmlDeviceGetTotalEnergyConsumption(self._handle)
            self._nvml = pynvml
        except (pynvml.NVMLError, AttributeError) as error:
            self.missing = f"NVML: {error}"

    def joules(self) -> float | None:
        """Energy in joules since the driver was loaded; None if it is not measured."""
        if self._nvml is None:
            return None
        return self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1e3

    def utilization(self) -> int | None:
        """Percentage of the last sample period (up to a second) in which a kernel ran; None if it is not measured."""
        if self._nvml is None:
            return None
        return self._nvml.nvmlDeviceGetUtilizationRates(self._handle).gpu
