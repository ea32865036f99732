"""Which device a command runs on."""

from __future__ import annotations

import torch

from nanokimi.errors import UserError


def resolve_device(name: str) -> torch.device:
    """``auto`` is the best device there is; any other name must be one that is there.

    Raises:
        UserError: no such device here.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda", "mps"):
        raise UserError(f"--device {name}: unknown; choose auto, cpu, cuda, cuda:N or mps")
    missing = {
        "cpu": False,
        "cuda": (device.index or 0) >= torch.cuda.device_count(),
        "mps": not torch.backends.mps.is_available(),
    }
    if missing[device.type]:
        raise UserError(f"--device {name}: not available on this machine; use --device cpu or auto")
    return device
