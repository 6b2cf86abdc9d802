"""Energy of an NVIDIA GPU from NVML's counter, where the driver's library and the card offer it."""

import ctypes

import torch

_LIBRARY = "libnvidia-ml.so.1"
_SUCCESS = 0


class EnergyMeter:
    """Joules since the driver was loaded; `None` everywhere where they cannot be read."""

    def __init__(self, device: torch.device) -> None:
        self._nvml: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        if device.type != "cuda":
            return
        try:
            nvml = ctypes.CDLL(_LIBRARY)
        except OSError:
            return
        uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        opened = nvml.nvmlInit_v2() == _SUCCESS
        if opened and nvml.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._handle)) == _SUCCESS:
            self._nvml = nvml

    def joules(self) -> float | None:
        """The counter now."""
        if self._nvml is None:
            return None
        millijoules = ctypes.c_ulonglong()
        found = self._nvml.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(millijoules))
        return millijoules.value / 1e3 if found == _SUCCESS else None
