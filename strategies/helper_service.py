"""The seed helper as a service of its own: gRPC with mutual TLS.

Whoever runs it is the second party that the protocol needs, so it belongs on another
party's machine. A peer without a certificate of the pinned authority does not get as
far as a method; let that authority certify coordinators only. Messages are the
canonical bytes of `fedcore.secagg.seed_helper`, not protocol buffers.

    Open      plan              >  nothing
    Deposit   digest(32) box    >  nothing
    Close     close request     >  stream of the mask sum's bytes, in chunks
    Status    nothing           >  helper key(32) open rounds(u32)

A box that is refused is INVALID_ARGUMENT, a round that is refused FAILED_PRECONDITION.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Literal, NoReturn, Self, TypeVar

import grpc
from cryptography.exceptions import InternalError, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fedcore.crypto import DIGEST_BYTES, KEY_BYTES, Entropy, KeyPair
from fedcore.errors import ConfigurationError, PeerProtocolError
from fedcore.keyfiles import SECRET_MODE, create, load_authority, read_file
from fedcore.secagg.seed_helper import Closed, CloseRequest
from strategies.helper_rounds import AnsweredFolder, HelperLimits, HelperRounds, RefusedRoundError

SERVICE: Final = "fedcore.SeedHelper"
CHUNK_BYTES: Final = 1 << 20
"""Of a streamed answer; gRPC refuses messages above 4 MiB."""
_MOST_REQUEST_BYTES: Final = 1 << 20
_THREADS: Final = 8
_LOG: Final = logging.getLogger(__name__)
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class HelperSettings:
    """Where a helper listens, and the files it is made of.

    Attributes:
        folder: Holds `answered/`, one file per answered round; never delete from it
            while the helper's key is in use.
        secret_key: File with the X25519 secret, raw or PEM, mode 0600.
        certificate: PEM file with the server's TLS certificate chain.
        private_key: PEM file with its key, mode 0600.
        client_authority: PEM file with the certificate authority of the coordinators.
        device_authority: PEM file with the Ed25519 public key of the root that enrols
            devices; None admits any device, and trusts the coordinator not to invent some.
        address: Host and port; port 0 takes a free one.
        limits: What to accept of any coordinator.
    """

    folder: str
    secret_key: str
    certificate: str
    private_key: str
    client_authority: str
    device_authority: str | None = None
    address: str = "0.0.0.0:9443"
    limits: HelperLimits = field(default_factory=HelperLimits)
    kind: Literal["seed_helper"] = "seed_helper"


class HelperServer:
    """A running helper; leave its context, or `stop` it, to end it."""

    def __init__(self, server: Any, port: int, rounds: HelperRounds) -> None:
        self._server = server
        self.port = port
        self.rounds = rounds

    def wait(self) -> None:
        """Block until the server has ended."""
        self._server.wait_for_termination()

    def stop(self, grace_seconds: float = 5.0) -> None:
        """Refuse new calls, and let running ones finish within `grace_seconds`."""
        self._server.stop(grace_seconds).wait()

    def __enter__(self) -> Self:
        """Return the running server."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Stop."""
        self.stop()


def serve(settings: HelperSettings) -> HelperServer:
    """Start a helper; it answers on its own threads until it is stopped.

    Raises:
        ConfigurationError: A file is missing, malformed or readable by others, or the
            address cannot be bound.
    """
    answered = Path(settings.folder) / "answered"
    answered.mkdir(parents=True, exist_ok=True)
    rounds = HelperRounds(
        load_helper_key(Path(settings.secret_key)),
        AnsweredFolder(answered),
        settings.limits,
        authority=_device_authority(settings.device_authority),
    )
    credentials = grpc.ssl_server_credentials(
        [
            (
                read_file(Path(settings.private_key), secret=True),
                read_file(Path(settings.certificate)),
            )
        ],
        root_certificates=read_file(Path(settings.client_authority)),
        require_client_auth=True,
    )
    server = grpc.server(
        ThreadPoolExecutor(_THREADS, thread_name_prefix="seed-helper"),
        handlers=[_methods(rounds)],
        options=[
            ("grpc.max_receive_message_length", _MOST_REQUEST_BYTES),
            ("grpc.so_reuseport", 0),
        ],
    )
    try:
        port = server.add_secure_port(settings.address, credentials)
    except RuntimeError as error:
        msg = f"helper.address {settings.address} cannot be bound: choose a free one ({error})"
        raise ConfigurationError(msg) from error
    server.start()
    _LOG.info("seed helper %s listens on port %d", rounds.public_key.hex(), port)
    return HelperServer(server, port, rounds)


def create_helper_key(path: Path, entropy: Entropy) -> bytes:
    """Write a new secret key to `path`, mode 0600, and return the public key to pin.

    Raises:
        ConfigurationError: `path` exists or cannot be written.
    """
    pair = KeyPair.generate(entropy, "helper-key")
    create({path: (pair.secret, SECRET_MODE)})
    return pair.public


def load_helper_key(path: Path) -> KeyPair:
    """Return the key pair whose secret is in `path`: 32 raw bytes, or PEM PKCS#8.

    Raises:
        ConfigurationError: Missing, readable by others, or no X25519 key.
    """
    data = read_file(path, secret=True)
    if len(data) == KEY_BYTES:
        return KeyPair.from_secret(data)
    try:
        key = load_pem_private_key(data, password=None)
    except (TypeError, ValueError, UnsupportedAlgorithm, InternalError):
        key = None
    if not isinstance(key, X25519PrivateKey):
        msg = f"{path} must hold an X25519 secret key, {KEY_BYTES} raw bytes or unencrypted PEM"
        raise ConfigurationError(msg)
    return KeyPair.from_secret(key.private_bytes_raw())


def _device_authority(path: str | None) -> bytes | None:
    return None if path is None else load_authority(Path(path))


def _methods(rounds: HelperRounds) -> Any:
    """Return the service's methods: bytes in, bytes out."""

    def open_(request: bytes, context: Any) -> bytes:
        _guard(context, lambda: rounds.open(request, _peer(context)))
        return b""

    def deposit(request: bytes, context: Any) -> bytes:
        digest, box = request[:DIGEST_BYTES], request[DIGEST_BYTES:]
        _guard(context, lambda: rounds.deposit(digest, box, _peer(context)))
        return b""

    def close(request: bytes, context: Any) -> Iterator[bytes]:
        def answer() -> Closed:
            parsed = CloseRequest.from_bytes(request)
            return rounds.close(parsed, _peer(context))

        closed = _guard(context, answer)
        data = closed.mask_sum().to_bytes(closed.plan)
        _LOG.info("answered %s for %d", closed.plan.digest().hex(), len(closed.seeds))
        for start in range(0, len(data), CHUNK_BYTES):
            yield data[start : start + CHUNK_BYTES]

    def status(request: bytes, context: Any) -> bytes:
        del request, context
        return rounds.public_key + rounds.open_rounds.to_bytes(4, "little")

    unary, stream = grpc.unary_unary_rpc_method_handler, grpc.unary_stream_rpc_method_handler
    return grpc.method_handlers_generic_handler(
        SERVICE,
        {
            "Open": unary(open_),
            "Deposit": unary(deposit),
            "Close": stream(close),
            "Status": unary(status),
        },
    )


def _guard(context: Any, call: Callable[[], T]) -> T:
    """Return what `call` returns; a refusal ends the RPC with its reason."""
    try:
        return call()
    except RefusedRoundError as error:
        _refuse(context, grpc.StatusCode.FAILED_PRECONDITION, error)
    except PeerProtocolError as error:
        _refuse(context, grpc.StatusCode.INVALID_ARGUMENT, error)


def _refuse(context: Any, code: Any, error: PeerProtocolError) -> NoReturn:
    _LOG.warning("refused %s: %s", _peer(context)[:12], error)
    context.abort(code, str(error))
    raise error  # abort has raised already


def _peer(context: Any) -> str:
    """Return who calls: the digest of the certificate that TLS has verified."""
    (certificate,) = context.auth_context()["x509_pem_cert"]
    return hashlib.sha256(certificate).hexdigest()
