"""Tries one library in a process that may crash: `python -m align.stages.probe torch`. The last line is JSON."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable
from typing import Any

WIDTH = 64
"""Features of the layer that is tried."""
TOLERANCE = 1e-4
"""Relative difference of an NF4 layer from its own dequantised weights; it computes in fp32."""


def torch_here() -> dict[str, Any]:
    """Version, and every GPU that torch can use."""
    import torch

    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return {
        "built_for_cuda": torch.version.cuda,
        "gpus": [
            {"name": gpu.name, "memory_bytes": gpu.total_memory, "sm": gpu.major * 10 + gpu.minor} for gpu in gpus
        ],
        "bf16": bool(gpus) and torch.cuda.is_bf16_supported(),
    }


def bitsandbytes_here() -> dict[str, Any]:
    """Devices on which an NF4 layer computes what its weights say, with the same gradient after an evaluation."""
    import torch

    devices = ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    for device in devices:
        _try_nf4(device)
    return {"devices": devices}


def _try_nf4(device: str) -> None:
    import torch

    from align.models.platform import prepare_bitsandbytes

    prepare_bitsandbytes()
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn import Linear4bit

    torch.manual_seed(0)
    layer = Linear4bit(WIDTH, WIDTH, bias=False, compute_dtype=torch.float32, quant_type="nf4").to(device)
    x = torch.randn(4, WIDTH, device=device)
    weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    before = _input_gradient(layer, x)
    with torch.no_grad():
        output = layer.eval()(x)
    after = _input_gradient(layer.train(), x)
    for what, found, expected in (
        ("output", output, x @ weight.t()),
        ("gradient", before, weight.sum(0).expand_as(x)),
        ("gradient after an evaluation", after, before),
    ):
        error = float((found - expected).abs().max() / expected.abs().max())
        if not error < TOLERANCE:
            raise RuntimeError(f"the {what} of an NF4 layer on {device} is off by {error:.1e}")


def _input_gradient(layer: Any, x: Any) -> Any:
    x = x.clone().requires_grad_(True)
    layer(x).sum().backward()
    return x.grad


def methods_here() -> dict[str, Any]:
    """The kinds that each method plug-in registers, or why it registers none."""
    from importlib.metadata import entry_points

    from align.errors import AlignError
    from align.methods import GROUP, load_plugin

    plugins: dict[str, Any] = {}
    for entry in entry_points(group=GROUP):
        try:
            plugins[entry.name] = {"kinds": load_plugin(entry), "value": entry.value}
        except AlignError as error:
            plugins[entry.name] = {"error": error.message, "fix": error.fix or ""}
    return {"plugins": plugins}


def import_of(name: str) -> Callable[[], dict[str, Any]]:
    """A probe that only imports."""

    def here() -> dict[str, Any]:
        importlib.import_module(name)
        return {}

    return here


PROBES: dict[str, Callable[[], dict[str, Any]]] = {
    "torch": torch_here,
    "bitsandbytes": bitsandbytes_here,
    "methods": methods_here,
    **{name: import_of(name) for name in ("peft", "datasets", "deepspeed")},
}


if __name__ == "__main__":
    print(json.dumps(PROBES[sys.argv[1]]()))  # noqa: T201
