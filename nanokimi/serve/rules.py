"""Who may ask the server. Imports nothing heavy: the command line checks its flags with this."""

from __future__ import annotations

import base64
import binascii
import hmac
import ipaddress
from dataclasses import dataclass, field
from urllib.parse import urlsplit


@dataclass(frozen=True)
class Rules:
    """Who may ask.

    Attributes:
        host: the address that the server listens on.
        allowed_hosts: names beside it, in lower case.
        allowed_origins: pages elsewhere whose scripts may use the server, such as ``https://example.org``.
        api_key: None: no key.
    """

    host: str = "127.0.0.1"
    allowed_hosts: tuple[str, ...] = ()
    allowed_origins: tuple[str, ...] = ()
    api_key: str | None = field(default=None, repr=False)

    def host_is_ours(self, value: str) -> bool:
        """Whether a Host header names this server.

        A foreign page can reach a server on loopback by a name of its own that resolves to 127.0.0.1 (DNS rebinding).
        An address cannot be rebound, so on all interfaces any address will do.
        """
        name = _host_name(value)
        if name in ("localhost", self.host, *self.allowed_hosts):
            return True
        address = _address(name)
        own = _address(self.host)
        return address is not None and (address.is_loopback or (own is not None and own.is_unspecified))

    def origin_is_ours(self, origin: str, host: str) -> bool:
        """Whether an Origin header names the page that came from ``host``, or an allowed one; ``null`` does not."""
        if origin.lower() in self.allowed_origins:
            return True
        scheme, _, place = origin.lower().partition("://")
        port = {"http": ":80", "https": ":443"}.get(scheme)
        return port is not None and place.removesuffix(port) == host.lower().removesuffix(port)

    def key_is_right(self, authorization: str) -> bool:
        """Whether the header holds the key: as ``Bearer``, or as the password of ``Basic``, which browsers ask for."""
        if self.api_key is None:
            return True
        scheme, _, value = authorization.partition(" ")
        if scheme.lower() == "basic":
            try:
                value = base64.b64decode(value.strip(), validate=True).decode().partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        return hmac.compare_digest(value.strip().encode(), self.api_key.encode())


def _host_name(value: str) -> str:
    """A Host header without its port, in lower case; empty if it is none."""
    try:
        return (urlsplit(f"//{value}").hostname or "").removesuffix(".")
    except ValueError:
        return ""


def is_address(name: str) -> bool:
    """Whether ``name`` is an IP address."""
    return _address(name) is not None


def _address(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    try:
        return ipaddress.ip_address(name)
    except ValueError:
        return None


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches a server that listens on ``host``."""
    address = _address(host)
    return host == "localhost" or (address is not None and address.is_loopback)
