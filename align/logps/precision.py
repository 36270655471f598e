"""In which dtype a pass really computes."""

from __future__ import annotations

import torch


def computed_in(device: torch.device, own: torch.dtype) -> torch.dtype:
    """Autocast's dtype where it is on, for weights and some activations stay in fp32 there; `own` elsewhere."""
    return torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else own
