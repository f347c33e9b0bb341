"""What the coordinator publishes: a small, signed, checked model file."""

from fedcore.release.check import DeviceCheck, check_on_device
from fedcore.release.export import export_onnx, quantize_int8, run_onnx
from fedcore.release.model import ReleaseReport, int8_file, release_model
from fedcore.release.publish import load_or_create_key, public_key_path, publish
from fedcore.release.size import Measured, measure

__all__ = [
    "DeviceCheck",
    "Measured",
    "ReleaseReport",
    "check_on_device",
    "export_onnx",
    "int8_file",
    "load_or_create_key",
    "measure",
    "public_key_path",
    "publish",
    "quantize_int8",
    "release_model",
    "run_onnx",
]
