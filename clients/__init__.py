"""The device side of a federation as Flower ClientApps and mods."""

from clients.secagg_mod import DevicePolicy, secagg_mod

__all__ = ["DevicePolicy", "secagg_mod"]
