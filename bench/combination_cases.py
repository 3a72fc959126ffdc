"""What is combined with every optimizer: how states are stored, and what stands around the step."""

from __future__ import annotations

from typing import Any

import torch

FORMATS: dict[str, Any] = {
    "own": None,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "8bit": "8bit",
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "max_grad_norm": {"max_grad_norm": 0.5},
    "clip_value": {"clip_value": 0.5},
    "skip_nonfinite": {"skip_nonfinite": True},
    "ema_decay": {"ema_decay": 0.9},
    "telemetry": {"telemetry": True},
    "stochastic": {"param_rounding": "stochastic"},
    "kahan": {"param_rounding": "kahan"},
    "master": {"param_rounding": "master"},
    "release_gradients": {},
    "all of them": {
        "max_grad_norm": 0.5,
        "skip_nonfinite": True,
        "ema_decay": 0.9,
        "telemetry": True,
        "param_rounding": "master",
    },
}
