"""The coordinator side of a federation as Flower grids and ServerApps."""

from strategies.linear import refuse_nonlinear
from strategies.secure_grid import SecureGrid

__all__ = ["SecureGrid", "refuse_nonlinear"]
