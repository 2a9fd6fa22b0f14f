"""TLS files of a plane, and the contexts made of them."""

from __future__ import annotations

import hashlib
import ssl
import tempfile
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from dynamo_core.errors import ConfigurationError


class TlsFiles(msgspec.Struct, frozen=True):
    """What a process proves itself with and whom it trusts.

    Each may be a file's name or, as within a kubeconfig, the PEM text itself.

    Attributes:
        ca_file: Certificates of the authorities whose peers are trusted, PEM.
        cert_file: Own certificate with its chain, PEM.
        key_file: Key of the own certificate, PEM.
        server_name: Name that a server's certificate must have; the name that is dialled if empty.
    """

    ca_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    server_name: str = ""

    @property
    def on(self) -> bool:
        """Whether TLS is to be used."""
        return bool(self.ca_file or self.cert_file)

    def check(self) -> None:
        """Read everything once.

        Raises:
            ConfigurationError: naming the file and what is wrong with it.
        """
        if bool(self.cert_file) != bool(self.key_file):
            given, lacks = ("tls_cert", "tls_key") if self.cert_file else ("tls_key", "tls_cert")
            raise ConfigurationError(f"{given} is given without {lacks}; give both or none", param=lacks)
        self.client_context()

    def client_context(self) -> ssl.SSLContext:
        """Return a context for dialling; the own certificate, if there is one, is shown to servers that ask.

        Raises:
            ConfigurationError: naming the file and what is wrong with it.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.ca_file:
            _trust(context, self.ca_file)
        else:
            context.load_default_certs()
        if self.cert_file:
            _prove(context, self.cert_file, self.key_file)
        return context

    def server_context(self) -> ssl.SSLContext:
        """Return a context for listening; with a ``ca_file`` callers must have a certificate of that authority.

        Raises:
            ConfigurationError: naming the file and what is wrong with it.
        """
        if not self.cert_file:
            raise ConfigurationError("tls_ca is given without tls_cert and tls_key, which a server needs; add them")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        _prove(context, self.cert_file, self.key_file)
        if self.ca_file:
            _trust(context, self.ca_file)
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def digest(self) -> bytes:
        """Return a digest of the files' contents, which changes when one of them does."""
        digest = hashlib.blake2b(digest_size=16)
        for name in (self.ca_file, self.cert_file, self.key_file):
            if name:
                try:
                    digest.update(name.encode() if is_pem(name) else Path(name).read_bytes())
                except OSError as error:
                    digest.update(str(error).encode())
            digest.update(b"\0")
        return digest.digest()


def is_pem(name: str) -> bool:
    """Whether it is PEM text and no file's name."""
    return "-----BEGIN " in name


def _trust(context: ssl.SSLContext, name: str) -> None:
    try:
        if is_pem(name):
            context.load_verify_locations(cadata=name)
        else:
            context.load_verify_locations(name)
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigurationError(
            f"tls_ca {_shown(name)} holds no usable PEM certificates: {error}", param="tls_ca"
        ) from error


def _prove(context: ssl.SSLContext, certificate: str, key: str) -> None:
    for param, name in (("tls_cert", certificate), ("tls_key", key)):
        try:
            if not is_pem(name):
                Path(name).read_bytes()
        except OSError as error:
            raise ConfigurationError(f"{param} {name} cannot be read: {error}", param=param) from error
    try:
        with _as_file(certificate) as certificate_file, _as_file(key) as key_file:
            # A key with a passphrase would ask for it on the terminal; the empty answer makes that an error.
            context.load_cert_chain(certificate_file, key_file, password=lambda: "")
    except (OSError, ssl.SSLError, ValueError) as error:
        raise ConfigurationError(
            f"tls_cert {_shown(certificate)} and tls_key {_shown(key)} are no certificate with its unencrypted key: "
            f"{error}",
            param="tls_cert",
        ) from error


@contextmanager
def _as_file(name: str) -> Generator[str]:
    """Yield a file's name; PEM text lies in a private file for just as long, since TLS libraries read files alone."""
    if not is_pem(name):
        yield name
        return
    with tempfile.NamedTemporaryFile("w", prefix="dynamo-", suffix=".pem", encoding="ascii") as file:
        file.write(name)
        file.flush()
        yield file.name


def _shown(name: str) -> str:
    # A key must not end up in a log.
    return "(given as text)" if is_pem(name) else name
