"""The helper as a second service: real sockets, real TLS, and what a restart must not forget."""

import datetime as dt
import ipaddress
import os
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import grpc
import numpy as np
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.x509.oid import NameOID

from fedcore.crypto import KeyPair, ReplayedEntropy, SystemEntropy
from fedcore.crypto.signatures import SigningKey
from fedcore.errors import ConfigurationError, PeerProtocolError, RoundAbortedError
from fedcore.secagg.identity import Certificate, Identity
from fedcore.secagg.seed_helper import (
    CloseRequest,
    HelperPlan,
    MaskSum,
    SeedBox,
    collect,
    mask_and_seal,
)
from strategies.helper_client import HelperAddress, HelperClient, InProcessHelper
from strategies.helper_rounds import (
    AnsweredFolder,
    AnsweredInMemory,
    HelperLimits,
    HelperRounds,
    RefusedRoundError,
)
from strategies.helper_service import (
    CHUNK_BYTES,
    SERVICE,
    HelperSettings,
    create_helper_key,
    load_helper_key,
    serve,
)

ENTROPY = ReplayedEntropy(b"helper service")
DAY = dt.timedelta(days=1)


class Authority:
    """A certificate authority that lives as long as the test."""

    def __init__(self, folder, name):
        self.folder, self.name = folder, name
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        self.certificate = self._sign(self.subject, self.key.public_key(), ca=True)
        self.path = self._write(f"{name}.pem", self.certificate)

    def issue(self, name):
        """Paths of a certificate for 127.0.0.1 and of its key."""
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._write(
            f"{self.name}-{name}.pem", self._sign(subject, key.public_key(), ca=False)
        )
        secret = self.folder / f"{self.name}-{name}.key"
        secret.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        secret.chmod(0o600)
        return {"certificate": certificate, "private_key": str(secret)}

    def _sign(self, subject, public_key, *, ca):
        now = dt.datetime.now(dt.UTC)
        local = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
        return (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.subject)
            .public_key(public_key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - DAY)
            .not_valid_after(now + DAY)
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([local]), critical=False)
            .sign(self.key, hashes.SHA256())
        )

    def _write(self, name, certificate):
        path = self.folder / name
        path.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        return str(path)


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("authority"), "ours")


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    return Authority(tmp_path_factory.mktemp("foreign"), "theirs")


@pytest.fixture(scope="module")
def settings(authority, tmp_path_factory):
    folder = tmp_path_factory.mktemp("helper")
    create_helper_key(folder / "secret", SystemEntropy())
    return HelperSettings(
        folder=str(folder),
        secret_key=str(folder / "secret"),
        client_authority=authority.path,
        address="127.0.0.1:0",
        **authority.issue("helper"),
    )


@pytest.fixture(scope="module")
def server(settings):
    with serve(settings) as running:
        yield running


def client_of(server, issuer, name="coordinator", **changes):
    values = {
        "address": f"127.0.0.1:{server.port}",
        "public_key": server.rounds.public_key.hex(),
        "authority": issuer.path,
        "seconds": 5.0,
    }
    return HelperClient(HelperAddress(**(values | issuer.issue(name) | changes)))


@pytest.fixture(scope="module")
def remote(server, authority):
    with client_of(server, authority) as client:
        yield client


@pytest.fixture(params=["remote", "in process"])
def helper(request):
    return request.getfixturevalue("remote") if request.param == "remote" else InProcessHelper()


def plan_for(helper, clients=4, **changes):
    values = {"minimum_survivors": 2, "ring_bits": 16, "dim": 6, "context": os.urandom(32)}
    return HelperPlan(clients, **(values | changes), helper_key=helper.public_key)


def upload_of(plan, client, vector=None, **changes):
    vector = plan.ring.zeros(plan.dim) if vector is None else vector
    entropy = ENTROPY.child(f"{plan.digest().hex()}-{client}")
    return mask_and_seal(
        vector, plan, client, **({"pinned_key": plan.helper_key, "entropy": entropy} | changes)
    )


def request_of(plan, *survivors):
    return CloseRequest(plan.digest(), frozenset(survivors))


def opened(helper, *clients, **changes):
    plan = plan_for(helper, **changes)
    helper.open(plan)
    for client in clients:
        helper.deposit(plan, upload_of(plan, client).box)
    return plan


def sum_with(helper, plan, inputs):
    """What the coordinator does, in the order in which it does it."""
    helper.open(plan)
    adding = collect(plan)
    for client, vector in inputs.items():
        upload = upload_of(plan, client, vector)
        adding.check(client)
        try:
            helper.deposit(plan, upload.box)
        except PeerProtocolError:
            continue
        adding = adding.on_input(client, upload.vector)
    unmasking, request = adding.close()
    return unmasking.on_mask_sum(helper.close(plan, request))


# One interface, two ways to the helper


def test_a_round_gives_the_exact_sum_over_whoever_uploaded(helper):
    plan = plan_for(helper, clients=6, ring_bits=12)
    inputs = {client: np.arange(6, dtype=np.uint16) * 600 + client for client in (0, 2, 3, 5)}
    inputs = {client: plan.ring.reduce(vector) for client, vector in inputs.items()}
    outcome = sum_with(helper, plan, inputs)
    assert outcome.survivors == {0, 2, 3, 5}
    assert outcome.total.tolist() == [(2400 * place + 10) % 4096 for place in range(6)]


def test_a_bad_box_costs_its_client_and_nobody_else(helper):
    plan = opened(helper, 0)
    other = replace(plan, context=bytes(32))
    with pytest.raises(PeerProtocolError, match="box of client 1 does not open"):
        helper.deposit(plan, upload_of(other, 1).box)
    with pytest.raises(PeerProtocolError, match="client 0 has already sent a box"):
        helper.deposit(plan, upload_of(plan, 0).box)
    helper.deposit(plan, upload_of(plan, 2).box)
    assert helper.close(plan, request_of(plan, 0, 2)).vector.shape == (6,)


def test_a_round_is_answered_once(helper):
    plan = opened(helper, 0, 1, 2)
    helper.close(plan, request_of(plan, 0, 1, 2))
    for again in (
        lambda: helper.close(plan, request_of(plan, 0, 1, 2)),
        lambda: helper.close(plan, request_of(plan, 0, 1)),
        lambda: helper.open(plan),
        lambda: helper.deposit(plan, upload_of(plan, 3).box),
    ):
        with pytest.raises(RoundAbortedError, match="answered before"):
            again()


def test_a_refused_request_answers_nothing_and_leaves_the_round_open(helper):
    plan = opened(helper, 0, 1, minimum_survivors=2)
    with pytest.raises(RoundAbortedError, match="needed 2 clients, found 1"):
        helper.close(plan, request_of(plan, 0))
    with pytest.raises(RoundAbortedError, match=r"found also \[2\]"):
        helper.close(plan, request_of(plan, 0, 1, 2))
    assert helper.close(plan, request_of(plan, 0, 1)).vector.shape == (6,)


def test_a_round_that_was_never_opened_or_is_for_another_helper_is_refused(helper):
    plan = plan_for(helper)
    for call in (
        lambda: helper.deposit(plan, upload_of(plan, 0).box),
        lambda: helper.close(plan, request_of(plan, 0, 1)),
    ):
        with pytest.raises(RoundAbortedError, match="is not open"):
            call()
    other = replace(plan, helper_key=KeyPair.generate(ENTROPY, "other").public)
    with pytest.raises(RoundAbortedError, match="correct the coordinator's helper key"):
        helper.open(other)


def test_opening_a_round_again_keeps_the_boxes(helper):
    plan = opened(helper, 0, 1)
    helper.open(plan)
    assert helper.close(plan, request_of(plan, 0, 1)).digest == plan.digest()


# The service


def test_status_says_which_helper_it_is(remote, server):
    before = remote.status().open_rounds
    opened(remote)
    status = remote.status()
    assert status.public_key == server.rounds.public_key == remote.public_key
    assert status.open_rounds == before + 1


def test_an_answer_larger_than_a_message_arrives_in_chunks(remote):
    plan = plan_for(remote, clients=2, dim=3_000_000)
    inputs = {client: np.full(plan.dim, 30_000 + client, np.uint16) for client in (0, 1)}
    outcome = sum_with(remote, plan, inputs)
    assert set(outcome.total.tolist()) == {60_001}
    again = opened(remote, 0, 1, dim=3_000_000)
    stream = remote._channel.unary_stream(f"/{SERVICE}/Close")
    sizes = [len(chunk) for chunk in stream(request_of(again, 0, 1).to_bytes(), timeout=20)]
    assert sum(sizes) == MaskSum.size(again) > 4 << 20 > max(sizes) == CHUNK_BYTES


@contextmanager
def impostor(settings, chunks):
    """A server with the helper's certificate that answers every Close with `chunks`."""
    files = [Path(p).read_bytes() for p in (settings.private_key, settings.certificate)]
    handler = grpc.unary_stream_rpc_method_handler(lambda request, context: iter(chunks))
    server = grpc.server(
        ThreadPoolExecutor(1),
        handlers=[grpc.method_handlers_generic_handler(SERVICE, {"Close": handler})],
    )
    port = server.add_secure_port("127.0.0.1:0", grpc.ssl_server_credentials([tuple(files)]))
    server.start()
    yield f"127.0.0.1:{port}"
    server.stop(None).wait()


@pytest.mark.parametrize(
    "chunks", [[], [b"short"], [b"fC\x01\x23" + bytes(44)], [bytes(1000)] * 50], ids=len
)
def test_a_helper_that_answers_nonsense_aborts_the_round(settings, server, authority, chunks):
    with (
        impostor(settings, chunks) as address,
        client_of(server, authority, address=address) as client,
    ):
        plan = plan_for(client)
        with pytest.raises(RoundAbortedError, match="answers nonsense"):
            client.close(plan, request_of(plan, 0, 1))


def test_a_round_takes_one_call_per_upload_and_none_for_a_dropout(server, authority):
    calls = []

    class Counted(HelperClient):
        def _call(self, method, request):
            calls.append(method)
            return super()._call(method, request)

    with Counted(client_of(server, authority).address) as helper:
        plan = plan_for(helper, clients=5)
        sum_with(helper, plan, dict.fromkeys((0, 3), plan.ring.zeros(6)))
    assert calls == ["Open", "Deposit", "Deposit"]


def test_a_helper_that_restarts_has_not_forgotten_what_it_answered(settings, authority, tmp_path):
    own = replace(settings, folder=str(tmp_path))
    with serve(own) as server, client_of(server, authority) as client:
        plan = opened(client, 0, 1, 2)
        pending = opened(client, 0, 1)
        client.close(plan, request_of(plan, 0, 1, 2))
    with serve(own) as server, client_of(server, authority) as client:
        for again in (
            lambda: client.open(plan),
            lambda: client.close(plan, request_of(plan, 0, 1)),
        ):
            with pytest.raises(RoundAbortedError, match="answered before"):
                again()
        with pytest.raises(RoundAbortedError, match="is not open"):
            client.close(pending, request_of(pending, 0, 1))


def test_a_round_belongs_to_the_coordinator_that_opened_it(server, remote, authority):
    plan = opened(remote, 0, 1)
    with client_of(server, authority, "another") as other:
        for call in (
            lambda: other.deposit(plan, upload_of(plan, 2).box),
            lambda: other.close(plan, request_of(plan, 0, 1)),
        ):
            with pytest.raises(RoundAbortedError, match="somebody else"):
                call()
        with pytest.raises(RoundAbortedError, match="somebody else's round"):
            other.open(plan)
    assert remote.close(plan, request_of(plan, 0, 1)).vector.shape == (6,)


def test_a_peer_with_another_authoritys_certificate_is_refused(server, authority, foreign):
    with client_of(server, foreign, authority=authority.path) as client:
        with pytest.raises(ConfigurationError, match="does not answer"):
            client.status()
        with pytest.raises(RoundAbortedError, match="UNAVAILABLE"):
            client.open(plan_for(client))


def test_a_helper_with_another_authoritys_certificate_is_refused(server, authority, foreign):
    with (
        client_of(server, authority, authority=foreign.path) as client,
        pytest.raises(ConfigurationError, match="does not answer"),
    ):
        client.status()


def status_over(channel):
    with channel:
        return channel.unary_unary(f"/{SERVICE}/Status")(b"", timeout=5)


def test_a_peer_without_a_certificate_or_without_tls_reaches_no_method(server, authority):
    target = f"127.0.0.1:{server.port}"
    anonymous = grpc.ssl_channel_credentials(Path(authority.path).read_bytes())
    for channel in (grpc.secure_channel(target, anonymous), grpc.insecure_channel(target)):
        with pytest.raises(grpc.RpcError) as caught:
            status_over(channel)
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


def test_a_client_that_expects_another_helper_key_says_so(server, authority):
    with (
        client_of(server, authority, public_key="ab" * 32) as client,
        pytest.raises(ConfigurationError, match=r"correct helper\.public_key"),
    ):
        client.status()


def test_a_helper_that_is_gone_aborts_the_round(authority, settings, tmp_path):
    with serve(replace(settings, folder=str(tmp_path))) as server:
        client = client_of(server, authority)
        plan = opened(client, 0, 1)
    with client:
        for call in (
            lambda: client.open(plan),
            lambda: client.deposit(plan, upload_of(plan, 2).box),
            lambda: client.close(plan, request_of(plan, 0, 1)),
        ):
            with pytest.raises(RoundAbortedError, match="UNAVAILABLE"):
                call()


def test_a_helper_that_does_not_answer_in_time_aborts_the_round(server, authority):
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with (
            client_of(server, authority, address=address, seconds=0.3) as client,
            pytest.raises(RoundAbortedError, match=r"DEADLINE_EXCEEDED|UNAVAILABLE"),
        ):
            client.open(plan_for(client))


def test_wild_bytes_are_refused_by_every_method_and_the_service_lives_on(remote):
    plan = opened(remote, 0, 1)
    for method, code in (("Open", "FAILED_PRECONDITION"), ("Deposit", "INVALID_ARGUMENT")):
        for data in (b"", b"\0", plan.to_bytes()[:-1], os.urandom(500)):
            with pytest.raises(grpc.RpcError) as caught:
                remote._call(method, data)
            assert caught.value.code().name == code
    close = remote._channel.unary_stream(f"/{SERVICE}/Close")
    for data in (b"", b"fC\x01\x22", os.urandom(500)):
        with pytest.raises(grpc.RpcError) as caught:
            list(close(data, timeout=5))
        assert caught.value.code().name == "INVALID_ARGUMENT"
    assert remote.close(plan, request_of(plan, 0, 1)).vector.shape == (6,)


def test_a_service_that_pins_the_enrolment_root_refuses_invented_clients(
    settings, authority, tmp_path
):
    root, key = (SigningKey.generate(ENTROPY.child(name)) for name in ("root", "device"))
    (tmp_path / "root.pem").write_bytes(root.public.to_pem())
    own = replace(settings, folder=str(tmp_path), device_authority=str(tmp_path / "root.pem"))
    certificate = Certificate.issue(root, name="press-7", key=key.public.raw, expires_at=1 << 40)
    with serve(own) as server, client_of(server, authority) as client:
        plan = opened(client)
        client.deposit(plan, upload_of(plan, 0, identity=Identity(certificate, key)).box)
        with pytest.raises(PeerProtocolError, match="is unsigned"):
            client.deposit(plan, upload_of(plan, 1).box)


# Limits and memory


def rounds_with(limits=None, answered=None, now=lambda: 0.0):
    key = KeyPair.generate(ENTROPY, "helper-key")
    return HelperRounds(key, answered or AnsweredInMemory(), limits, now=now)


def test_an_open_round_expires():
    clock = [0.0]
    rounds = rounds_with(HelperLimits(seconds=60), now=lambda: clock[0])
    plan = plan_for(rounds)
    rounds.open(plan.to_bytes(), "us")
    clock[0] = 60.0
    assert rounds.open_rounds == 1
    clock[0] = 60.1
    assert rounds.open_rounds == 0
    with pytest.raises(RefusedRoundError, match="expired after 60 s"):
        rounds.deposit(plan.digest(), upload_of(plan, 0).box.to_bytes(), "us")


def test_a_helper_holds_a_limited_number_of_rounds():
    rounds = rounds_with(HelperLimits(rounds=2))
    for _ in range(2):
        rounds.open(plan_for(rounds).to_bytes(), "us")
    with pytest.raises(RefusedRoundError, match="2 of at most 2 open rounds"):
        rounds.open(plan_for(rounds).to_bytes(), "us")


@pytest.mark.parametrize(
    ("change", "name"),
    [({"clients": 11}, "clients"), ({"dim": 101}, "dim"), ({"minimum_survivors": 2}, "survivors")],
)
def test_a_plan_beyond_the_helpers_limits_is_refused(change, name):
    rounds = rounds_with(HelperLimits(clients=10, dim=100, minimum_survivors=3))
    rounds.open(plan_for(rounds, clients=10, dim=100, minimum_survivors=3).to_bytes(), "us")
    with pytest.raises(RefusedRoundError, match=f"plans with.*{name}"):
        rounds.open(plan_for(rounds, **({"minimum_survivors": 3} | change)).to_bytes(), "us")


@pytest.mark.parametrize("name", ["rounds", "clients", "dim", "minimum_survivors", "seconds"])
def test_limits_out_of_range_are_refused(name):
    with pytest.raises(ConfigurationError, match=f"helper.limits.{name} must be in"):
        HelperLimits(**{name: 0})


def test_of_many_that_claim_a_round_at_once_one_succeeds(tmp_path):
    """Two helpers may share the folder; the file system decides."""
    winners = []
    barrier = threading.Barrier(8)

    def claim():
        barrier.wait()
        try:
            AnsweredFolder(tmp_path).claim(b"d" * 32)
        except RefusedRoundError:
            return
        winners.append(1)

    threads = [threading.Thread(target=claim) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(winners) == 1
    assert b"d" * 32 in AnsweredFolder(tmp_path)
    assert b"e" * 32 not in AnsweredFolder(tmp_path)


def test_a_round_that_cannot_be_recorded_is_not_answered(tmp_path):
    rounds = rounds_with(answered=AnsweredFolder(tmp_path / "missing"))
    plan = plan_for(rounds)
    rounds.open(plan.to_bytes(), "us")
    for client in (0, 1):
        rounds.deposit(plan.digest(), upload_of(plan, client).box.to_bytes(), "us")
    with pytest.raises(RefusedRoundError, match="cannot record that it answers"):
        rounds.close(request_of(plan, 0, 1), "us")


def test_the_record_is_made_before_the_masks_are_added():
    order = []

    class Spy(AnsweredInMemory):
        def claim(self, digest):
            order.append("claimed")

    rounds = rounds_with(answered=Spy())
    plan = plan_for(rounds)
    rounds.open(plan.to_bytes(), "us")
    for client in (0, 1):
        rounds.deposit(plan.digest(), upload_of(plan, client).box.to_bytes(), "us")
    closed = rounds.close(request_of(plan, 0, 1), "us")
    order.append(type(closed).__name__)
    assert order == ["claimed", "Closed"]


# Files


def test_a_new_key_is_its_owners_alone_and_is_never_overwritten(tmp_path):
    path = tmp_path / "secret"
    public = create_helper_key(path, SystemEntropy())
    assert path.stat().st_mode & 0o777 == 0o600
    assert load_helper_key(path).public == public
    with pytest.raises(ConfigurationError, match="exists and is never overwritten"):
        create_helper_key(path, SystemEntropy())


def test_a_key_may_be_in_pem(tmp_path):
    key, path = X25519PrivateKey.generate(), tmp_path / "secret.pem"
    path.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    path.chmod(0o600)
    assert load_helper_key(path).public == key.public_key().public_bytes_raw()


def test_a_key_that_others_may_read_or_that_is_none_is_refused(tmp_path):
    path = tmp_path / "secret"
    with pytest.raises(ConfigurationError, match="cannot be read"):
        load_helper_key(path)
    path.write_bytes(bytes(31))
    path.chmod(0o640)
    with pytest.raises(ConfigurationError, match="by others: chmod 600 it"):
        load_helper_key(path)
    path.chmod(0o600)
    with pytest.raises(ConfigurationError, match="must hold an X25519 secret key"):
        load_helper_key(path)


@pytest.mark.parametrize(
    "change", [{"public_key": "ab" * 31}, {"public_key": "AB" * 32}, {"seconds": 0}]
)
def test_an_address_out_of_range_is_refused(change):
    values = {"address": "a:1", "public_key": "ab" * 32, "authority": "a", "certificate": "c"}
    with pytest.raises(ConfigurationError, match="helper"):
        HelperAddress(**(values | {"private_key": "k"} | change))


def test_an_address_that_is_taken_is_refused(server, settings, tmp_path):
    with pytest.raises(ConfigurationError, match="cannot be bound"):
        serve(replace(settings, folder=str(tmp_path), address=f"127.0.0.1:{server.port}"))


def test_an_in_process_helper_can_be_replayed_and_pins_an_authority():
    one, other = (InProcessHelper(ENTROPY) for _ in range(2))
    assert one.public_key == other.public_key != InProcessHelper().public_key
    strict = InProcessHelper(authority=b"r" * 32)
    plan = opened(strict)
    with pytest.raises(PeerProtocolError, match="is unsigned"):
        strict.deposit(plan, SeedBox(0, bytes(80)))
