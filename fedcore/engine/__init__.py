"""Flower apps without a deployment: in-process grid, Ray, scripted faults, clocks."""

from fedcore.engine.clock import Clock, SystemClock, VirtualClock
from fedcore.engine.downloads import unblocked, unblocked_for_good
from fedcore.engine.faults import DroppingGrid, DropScript, Fault, FaultyGrid
from fedcore.engine.grid import InProcessGrid
from fedcore.engine.pace import AtOnce, HeavyTailed, PacedGrid
from fedcore.engine.records import to_arrays, to_record
from fedcore.engine.run import on_grid, run_in_process, run_on_ray
from fedcore.engine.wrapped import WrappedGrid

__all__ = [
    "AtOnce",
    "Clock",
    "DropScript",
    "DroppingGrid",
    "Fault",
    "FaultyGrid",
    "HeavyTailed",
    "InProcessGrid",
    "PacedGrid",
    "SystemClock",
    "VirtualClock",
    "WrappedGrid",
    "on_grid",
    "run_in_process",
    "run_on_ray",
    "to_arrays",
    "to_record",
    "unblocked",
    "unblocked_for_good",
]
