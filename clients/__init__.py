"""The device side of a federation as Flower ClientApps and mods."""

from clients.policy import DevicePolicy
from clients.secagg_mod import secagg_mod

__all__ = ["DevicePolicy", "secagg_mod"]
