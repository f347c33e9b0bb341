"""What `${...}` in `conf/` may call: importing this module registers it with OmegaConf."""

from __future__ import annotations

from omegaconf import OmegaConf


def unless(given: object, default: object) -> object:
    """Return `default`, or None where another key is given that takes its place.

    So that ``privacy.epsilon=4`` alone is enough: the default noise stands back for it.
    """
    return default if given is None else None


OmegaConf.register_new_resolver("unless", unless, replace=True)
