"""On a device that is not the CPU nothing is left on the CPU: tried without one, on a stand-in that refuses to mix."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from torch.utils import backend_registration

STAND_IN = Path(__file__).parent / "second_device.py"


@pytest.mark.skipif(
    not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
    reason="this torch knows no devices that are made in Python",
)
def test_training_anchoring_fitting_merging_and_calibrating_stay_on_the_device():
    result = subprocess.run([sys.executable, str(STAND_IN)], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr[-4000:]
    assert result.stdout.splitlines() == [
        "trained {'quantization': 'nf4'}",
        "trained {'quantization': 'int8'}",
        "trained {'quantization_calibration': 'absmax', 'frozen_rank_init': 'svd'}",
        "anchored, fitted and merged AdaptQConfig",
        "anchored, fitted and merged LoraConfig",
        "quantized a base",
    ]
