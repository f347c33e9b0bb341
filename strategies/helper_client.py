"""The coordinator's way to its seed helper: over gRPC, or in process.

Both ends of the choice have one interface. `deposit` raises `PeerProtocolError` for a
box that the helper refuses: that client is out and the round goes on. Everything else
that goes wrong, the helper gone, late or unwilling, is a `RoundAbortedError`.

    helper.open(plan)                       before the clients are invited
    helper.deposit(plan, box)               for each upload, before it is added
    helper.close(plan, request)             once the survivors are fixed
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, NoReturn, Protocol, Self

import grpc

from fedcore.crypto import KEY_BYTES, Entropy, KeyPair, SystemEntropy
from fedcore.errors import ConfigurationError, PeerProtocolError, RoundAbortedError
from fedcore.keyfiles import read_file
from fedcore.secagg.seed_helper import CloseRequest, HelperPlan, MaskSum, SeedBox
from strategies.helper_rounds import AnsweredInMemory, HelperLimits, HelperRounds, RefusedRoundError
from strategies.helper_service import SERVICE

_MOST_REASON = 400
"""Characters of the helper's own words in an error."""


class Helper(Protocol):
    """The second party, as the coordinator sees it."""

    def open(self, plan: HelperPlan, /) -> None:
        """Announce a round.

        Raises:
            RoundAbortedError: The helper refuses it or is gone.
        """
        ...

    def deposit(self, plan: HelperPlan, box: SeedBox, /) -> None:
        """Forward one client's box.

        Raises:
            PeerProtocolError: The helper refuses this box; leave the client out.
            RoundAbortedError: The helper refuses the round or is gone.
        """
        ...

    def close(self, plan: HelperPlan, request: CloseRequest, /) -> MaskSum:
        """Return the sum of the survivors' masks. The helper answers once per plan.

        Raises:
            RoundAbortedError: The helper refuses, is gone, or answers nonsense.
        """
        ...


class InProcessHelper:
    """A helper without a second party: for simulations, where there is one process anyway.

    Args:
        entropy: Source of the helper's key; the operating system's if None.
        limits: What to accept.
        authority: Public key of the root that enrols devices; None admits any box.
    """

    def __init__(
        self,
        entropy: Entropy | None = None,
        limits: HelperLimits | None = None,
        authority: bytes | None = None,
    ) -> None:
        key = KeyPair.generate(entropy or SystemEntropy(), "helper-key")
        self.public_key = key.public
        self._rounds = HelperRounds(key, AnsweredInMemory(), limits, authority=authority)

    def open(self, plan: HelperPlan, /) -> None:
        """Announce a round; errors as in `Helper`."""
        try:
            self._rounds.open(plan.to_bytes(), "")
        except RefusedRoundError as error:
            _abort(plan, f"the helper refuses: {error}", error)

    def deposit(self, plan: HelperPlan, box: SeedBox, /) -> None:
        """Forward one client's box; errors as in `Helper`."""
        try:
            self._rounds.deposit(plan.digest(), box.to_bytes(), "")
        except RefusedRoundError as error:
            _abort(plan, f"the helper refuses: {error}", error)

    def close(self, plan: HelperPlan, request: CloseRequest, /) -> MaskSum:
        """Return the sum of the survivors' masks; errors as in `Helper`."""
        try:
            return self._rounds.close(request, "").mask_sum()
        except RefusedRoundError as error:
            _abort(plan, f"the helper refuses: {error}", error)


@dataclass(frozen=True, slots=True)
class HelperAddress:
    """How to reach a helper.

    Attributes:
        address: Host and port; the host is in the helper's TLS certificate.
        public_key: The helper's X25519 key that goes into plans, 64 hexadecimal digits.
        authority: PEM file with the certificate authority of the helper.
        certificate: PEM file with the coordinator's TLS certificate.
        private_key: PEM file with its key, mode 0600.
        seconds: To wait for each short call.
        close_seconds: To wait for the sum of the masks.
    """

    address: str
    public_key: str
    authority: str
    certificate: str
    private_key: str
    seconds: float = 20.0
    close_seconds: float = 600.0
    kind: Literal["remote"] = "remote"

    def __post_init__(self) -> None:
        if len(self.public_key) != 2 * KEY_BYTES or set(self.public_key) - set("0123456789abcdef"):
            msg = (
                f"helper.public_key must be {2 * KEY_BYTES} lower-case hexadecimal digits, got "
                f"{self.public_key!r:.80}: the helper prints it when it starts"
            )
            raise ConfigurationError(msg)
        for name, value in (("seconds", self.seconds), ("close_seconds", self.close_seconds)):
            if not 0 < value <= 86_400:
                msg = f"helper.{name} must be in (0, 86400], got {value}"
                raise ConfigurationError(msg)


@dataclass(frozen=True, slots=True)
class HelperStatus:
    """What a helper says about itself.

    Attributes:
        public_key: 32 bytes.
        open_rounds: Waiting for boxes.
    """

    public_key: bytes
    open_rounds: int


@dataclass(slots=True)
class HelperClient:
    """A helper over gRPC with mutual TLS; close its channel by leaving its context."""

    address: HelperAddress
    _channel: Any = field(init=False, repr=False)

    def __post_init__(self) -> None:
        """Prepare the channel; nothing is sent yet.

        Raises:
            ConfigurationError: A file is missing, or the key readable by others.
        """
        files = self.address
        credentials = grpc.ssl_channel_credentials(
            root_certificates=read_file(Path(files.authority)),
            private_key=read_file(Path(files.private_key), secret=True),
            certificate_chain=read_file(Path(files.certificate)),
        )
        self._channel = grpc.secure_channel(files.address, credentials)

    @property
    def public_key(self) -> bytes:
        """The helper's key for plans, as configured."""
        return bytes.fromhex(self.address.public_key)

    def open(self, plan: HelperPlan, /) -> None:
        """Announce a round; errors as in `Helper`."""
        try:
            self._call("Open", plan.to_bytes())
        except grpc.RpcError as error:
            self._abort(plan, error)

    def deposit(self, plan: HelperPlan, box: SeedBox, /) -> None:
        """Forward one client's box; errors as in `Helper`."""
        try:
            self._call("Deposit", plan.digest() + box.to_bytes())
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.INVALID_ARGUMENT:
                raise PeerProtocolError(_words(error)) from error
            self._abort(plan, error)

    def close(self, plan: HelperPlan, request: CloseRequest, /) -> MaskSum:
        """Return the sum of the survivors' masks; errors as in `Helper`."""
        expected, data = MaskSum.size(plan), bytearray()
        answer = self._channel.unary_stream(f"/{SERVICE}/Close")
        try:
            chunks = answer(request.to_bytes(), timeout=self.address.close_seconds)
            for chunk in chunks:
                data += chunk
                if len(data) > expected:
                    chunks.cancel()
                    break
        except grpc.RpcError as error:
            self._abort(plan, error)
        try:
            return MaskSum.from_bytes(bytes(data), plan)
        except PeerProtocolError as error:
            _abort(plan, f"the helper at {self.address.address} answers nonsense: {error}", error)

    def status(self) -> HelperStatus:
        """Ask whether the helper is there, and whether it is the right one.

        Raises:
            ConfigurationError: It cannot be reached, refuses our certificate, or has
                another key than the one configured.
        """
        try:
            data = self._call("Status", b"")
        except grpc.RpcError as error:
            msg = f"the helper at {self.address.address} does not answer: {_words(error)}"
            raise ConfigurationError(msg) from error
        status = HelperStatus(data[:KEY_BYTES], int.from_bytes(data[KEY_BYTES:], "little"))
        if status.public_key != self.public_key:
            msg = (
                f"expected a helper with key {self.address.public_key}, found "
                f"{status.public_key.hex()}: correct helper.public_key, or the address"
            )
            raise ConfigurationError(msg)
        return status

    def _call(self, method: str, request: bytes) -> bytes:
        call = self._channel.unary_unary(f"/{SERVICE}/{method}")
        return bytes(call(request, timeout=self.address.seconds))

    def _abort(self, plan: HelperPlan, error: Any) -> NoReturn:
        _abort(plan, f"the helper at {self.address.address}: {_words(error)}", error)

    def __enter__(self) -> Self:
        """Return the client."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close the channel."""
        self._channel.close()


def _abort(plan: HelperPlan, reason: str, cause: Exception) -> NoReturn:
    raise RoundAbortedError(
        stage="helper", needed=plan.minimum_survivors, found=0, reason=reason
    ) from cause


def _words(error: Any) -> str:
    """Return the status and the reason of a failed call, cut to a line."""
    return f"{error.code().name}, {error.details()}"[:_MOST_REASON]
