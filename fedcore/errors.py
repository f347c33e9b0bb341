"""Every error that fedcore raises on purpose.

Choose the class by asking who can repair it:

    ConfigurationError    the operator, before any data has moved
    PeerProtocolError     nobody here: drop that peer, the round goes on
    RoundAbortedError     the server, by starting a new round
    BudgetExhaustedError  the operator, by granting more privacy budget
    VerificationError     the publisher: a release is not what was signed
    LocalProtocolError    us: it is a bug, please report it

A message states what was expected, what was found, and what to do.
It never contains key material, a mask, a share or a model value.
"""

from functools import partial


class FedcoreError(Exception):
    """Base class; `except FedcoreError` catches everything in this module."""


class ConfigurationError(FedcoreError, ValueError):
    """Parameters that cannot work together."""


class DataError(ConfigurationError):
    """A data set that is missing, malformed, or does not fit the model."""


class HeadroomError(ConfigurationError):
    """The sum over all clients would wrap around the ring.

    Attributes:
        needed_bits: The narrowest ring that would do.
    """

    def __init__(
        self, *, clients: int, magnitude: int, bits: int, needed_bits: int | None = None
    ) -> None:
        exact = (2 * clients * magnitude).bit_length()
        self.needed_bits = exact if needed_bits is None else needed_bits
        self._facts = {"clients": clients, "magnitude": magnitude, "bits": bits}
        super().__init__(
            f"a sum of {clients} vectors with entries up to {magnitude} needs a ring of "
            f"{self.needed_bits} bits, got {bits}: raise ring.bits or lower quantize.bits"
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from the facts: keyword arguments do not pickle by default."""
        return (partial(HeadroomError, **self._facts, needed_bits=self.needed_bits), ())


class BudgetExhaustedError(FedcoreError):
    """A release would cost more privacy than the operator granted."""


class VerificationError(FedcoreError):
    """A model release whose hash, signature or version is not the expected one."""


class ProtocolError(FedcoreError):
    """Somebody broke the protocol: see the two subclasses."""


class PeerProtocolError(ProtocolError):
    """A peer broke the protocol; its contribution must be discarded."""


class LocalProtocolError(ProtocolError):
    """We broke the protocol ourselves; the state must not be used again."""


class StateReusedError(LocalProtocolError):
    """A one-shot protocol state was stepped twice, which could unmask a client."""


class RoundAbortedError(FedcoreError):
    """The round cannot finish safely; nothing was released.

    Attributes:
        stage: The protocol stage that was short of clients.
        needed: How many clients the stage needs.
        found: How many it had.
    """

    def __init__(self, *, stage: str, needed: int, found: int, reason: str = "") -> None:
        self.stage = stage
        self.needed = needed
        self.found = found
        detail = f" ({reason})" if reason else ""
        super().__init__(
            f"round aborted at {stage}: needed {needed} clients, found {found}{detail}; "
            "nothing was released, start a new attempt"
        )

    def __reduce__(self) -> tuple[object, ...]:
        """Rebuild from the formatted text: keyword arguments do not pickle by default."""
        return (_rebuild_abort, (self.stage, self.needed, self.found, str(self)))


def _rebuild_abort(stage: str, needed: int, found: int, text: str) -> RoundAbortedError:
    error = RoundAbortedError(stage=stage, needed=needed, found=found)
    error.args = (text,)
    return error
