"""The ClientApp of a real device: everything that its owner decides is in its node configuration.

    identity, identity-key     who the device is                     `clients.identity`
    authority                  file with the root's public key; rounds of others are refused
    journal, feedback          what a restart must not forget        `clients.journal`
    state-key                  seals both                            `clients.at_rest`
    guard-..., nice, oom-score when it works, and how far it stands back  `clients.limits`
    teacher-path, teacher-key  its own copy of a signed release      `clients.teacher`
    helper-key                 the seed helper that it pins          `clients.policy`
    minimum-cohort, minimum-noise-multiplier, largest-clip           `clients.policy`
    minimum-same-model         company with its own model            `docs/asynchronous.md`
    least-trainers, allow-parts                                      `docs/fleet.md`
    profile, profile-link-kbps, profile-examples                     `clients.profile`
    data-path, partition-id    its examples, and its number          `clients.client_app`
    rehearsal-seed             see below

A coordinator sees none of it and can change none of it. A device with `rehearsal-seed`
draws all its randomness from that number, so that a deployment gives the same model as a
simulation of the same seed, bit for bit. Its masks and its noise then hide nothing from
whoever knows the seed: it is for trials with public data, and only the owner can ask for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Final

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from clients.client_app import build_client_app, replayed_entropy, system_entropy
from clients.policy import DevicePolicy
from fedcore.crypto import Entropy
from fedcore.errors import ConfigurationError
from fedcore.keyfiles import load_authority

REHEARSAL: Final = "rehearsal-seed"
Setting = str | int | float | bool


def policy_of(config: Mapping[str, Setting]) -> DevicePolicy:
    """Return what the node's configuration demands of every round.

    Raises:
        ConfigurationError: A value has the wrong type, or the authority's file holds no key.
    """
    wanted = _typed(config, "authority", str)
    cohort = _typed(config, "minimum-cohort", int)
    alike = _typed(config, "minimum-same-model", int)
    noise = _typed(config, "minimum-noise-multiplier", float)
    trainers = _typed(config, "least-trainers", int)
    return DevicePolicy(
        minimum_cohort=DevicePolicy().minimum_cohort if cohort is None else int(cohort),
        minimum_same_model=DevicePolicy().minimum_same_model if alike is None else int(alike),
        minimum_noise_multiplier=0.0 if noise is None else float(noise),
        largest_clip=_number(_typed(config, "largest-clip", float)),
        least_trainers=DevicePolicy().least_trainers if trainers is None else int(trainers),
        allow_parts=_switch(config, "allow-parts"),
        authority=None if wanted is None else load_authority(Path(str(wanted))).hex(),
        helper_key=_text(_typed(config, "helper-key", str)),
    )


def entropy_of(context: Context) -> Entropy:
    """Return the system's randomness, or a seed's if the device's owner rehearses."""
    seed = _typed(context.node_config, REHEARSAL, int)
    return system_entropy(context) if seed is None else replayed_entropy(int(seed))(context)


class DeployedApp(ClientApp):
    """The ClientApp whose policy is the node's own."""

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer as a device with this node configuration."""
        return _app(tuple(sorted(context.node_config.items())))(message, context)


@lru_cache(maxsize=256)
def _app(config: tuple[tuple[str, Setting], ...]) -> ClientApp:
    return build_client_app(policy_of(dict(config)), entropy=entropy_of)


def _typed(
    config: Mapping[str, Setting], key: str, kind: type[str | int | float]
) -> Setting | None:
    """Return a value of the configuration or None; an int may stand for a float."""
    value = config.get(key)
    kinds = (int, float) if kind is float else (kind,)
    if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
        msg = (
            f"{key} must be a {kind.__name__} in the node's configuration, found "
            f"{type(value).__name__}: correct it on the device"
        )
        raise ConfigurationError(msg)
    return value


def _switch(config: Mapping[str, Setting], key: str) -> bool:
    """Return what a switch says that is on unless it is turned off."""
    value = config.get(key, True)
    if not isinstance(value, bool):
        msg = (
            f"{key} must be true or false in the node's configuration, found "
            f"{type(value).__name__}: correct it on the device"
        )
        raise ConfigurationError(msg)
    return value


def _number(value: Setting | None) -> float | None:
    return None if value is None else float(value)


def _text(value: Setting | None) -> str | None:
    return None if value is None else str(value)


app = DeployedApp()
