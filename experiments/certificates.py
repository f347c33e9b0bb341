"""Who is who on a deployment's network: TLS for the coordinator, keys for its SuperNodes.

Three questions, three keys. TLS tells a device that it speaks with its coordinator; the
SuperNode's key lets the coordinator keep strangers out; and the identity of
`experiments.enrollment` lets devices recognise each other where the coordinator is not
trusted.

TLS uses ECDSA on P-256. Flower demands P-384 and OpenSSH's format of SuperNodes.
"""

from __future__ import annotations

import datetime as dt
import ipaddress
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from fedcore.errors import ConfigurationError
from fedcore.keyfiles import PUBLIC_MODE, SECRET_MODE, create, read_file

CA_KEY: Final = "ca.key"
CA: Final = "ca.crt"
SERVER_KEY: Final = "server.key"
SERVER: Final = "server.crt"
_EARLIER: Final = 300
"""Seconds before now from which a certificate is valid: clocks differ."""


def create_ca(folder: Path, *, days: int, now: int) -> list[Path]:
    """Create the certificate authority of the deployment's TLS.

    Raises:
        ConfigurationError: A file exists, or cannot be written.
    """
    key = ec.generate_private_key(ec.SECP256R1())
    name = _name("fedcore deployment")
    builder = (
        _builder(name, name, key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_usage(signs=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    )
    certificate = builder.sign(key, hashes.SHA256())
    return create(
        {
            folder / CA_KEY: (_pem(key), SECRET_MODE),
            folder / CA: (certificate.public_bytes(Encoding.PEM), PUBLIC_MODE),
        }
    )


def create_server(
    authority_folder: Path, folder: Path, hosts: Sequence[str], *, days: int, now: int
) -> list[Path]:
    """Create the SuperLink's TLS key, and a certificate for it.

    Args:
        authority_folder: Holds the authority's key and certificate.
        folder: Where the server's go.
        hosts: Names and addresses under which devices reach the coordinator.
        days: How long it is valid.
        now: Unix time in seconds.

    Raises:
        ConfigurationError: The authority is missing or ends earlier, a host is no name, or a
            file exists.
    """
    authority = load_tls_certificate(authority_folder / CA)
    issuer = _load_ca_key(authority_folder / CA_KEY)
    if issuer.public_key() != authority.public_key():
        msg = f"{authority_folder}: {CA_KEY} and {CA} do not belong together: create both anew"
        raise ConfigurationError(msg)
    if _time(now + days * 86_400) > authority.not_valid_after_utc:
        msg = (
            f"a certificate of {days} days would outlive the authority, which ends on "
            f"{authority.not_valid_after_utc:%Y-%m-%d}: pass fewer --days"
        )
        raise ConfigurationError(msg)
    key = ec.generate_private_key(ec.SECP256R1())
    certificate = (
        _builder(authority.subject, _name("superlink"), key.public_key(), days, now)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_usage(signs=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.SubjectAlternativeName([_host(host) for host in hosts]), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer.public_key()), critical=False
        )
        .sign(issuer, hashes.SHA256())
    )
    return create(
        {
            folder / SERVER_KEY: (_pem(key), SECRET_MODE),
            folder / SERVER: (certificate.public_bytes(Encoding.PEM), PUBLIC_MODE),
        }
    )


def new_node_key() -> tuple[bytes, bytes]:
    """Return the secret and the public key by which a SuperNode is admitted."""
    key = ec.generate_private_key(ec.SECP384R1())
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption())
    public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
    return secret, public + b"\n"


def load_tls_certificate(path: Path) -> x509.Certificate:
    """Return the TLS certificate in `path`.

    Raises:
        ConfigurationError: It is missing or malformed.
    """
    try:
        return x509.load_pem_x509_certificate(read_file(path))
    except ValueError:
        msg = f"{path} must hold a certificate as PEM: create the authority anew"
        raise ConfigurationError(msg) from None


def _builder(
    issuer: x509.Name,
    subject: x509.Name,
    key: ec.EllipticCurvePublicKey,
    days: int,
    now: int,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_time(now - _EARLIER))
        .not_valid_after(_time(now + days * 86_400))
    )


def _usage(*, signs: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs,
        key_cert_sign=signs,
        crl_sign=signs,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _host(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        pass
    labels = host.split(".")
    plain = all(
        label.isascii()
        and label.replace("-", "a").isalnum()
        and not label.startswith("-")
        and len(label) <= 63
        for label in labels
    )
    if not plain or len(host) > 253:
        msg = f"--host must be a DNS name or an IP address, without port, got {host!r:.80}"
        raise ConfigurationError(msg)
    return x509.DNSName(host)


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _time(seconds: int) -> dt.datetime:
    return dt.datetime.fromtimestamp(seconds, dt.UTC)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _load_ca_key(path: Path) -> ec.EllipticCurvePrivateKey:
    data = read_file(path, secret=True)
    try:
        key = load_pem_private_key(data, None)
    except (ValueError, TypeError):
        key = None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        msg = f"{path} must hold an EC key of this command as PEM: create the authority anew"
        raise ConfigurationError(msg)
    return key
