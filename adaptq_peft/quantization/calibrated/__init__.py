"""Calibrated 4-bit rounding: plain `Linear4bit` layers whose codes were chosen by what the layers see on text."""

from .calibrate import (
    BEST_METHOD,
    CALIBRATION_METHODS,
    CalibratedLinears,
    CalibrationMethod,
    quantize_calibrated,
    resolve_calibration_method,
)
from .text import mixed_calibration_batches, text_written_once

__all__ = [
    "BEST_METHOD",
    "CALIBRATION_METHODS",
    "CalibratedLinears",
    "CalibrationMethod",
    "mixed_calibration_batches",
    "quantize_calibrated",
    "resolve_calibration_method",
    "text_written_once",
]
