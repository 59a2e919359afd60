"""Where requests may go: which URLs can be called at all, and which addresses never are.

A ``base_url`` comes from whoever may configure, and the server calls it from where it stands. Loopback and private
networks stay open, because local endpoints are what many people have; the link-local network and the metadata
services of clouds are no place for a model, and what they answer opens the account.
"""

from __future__ import annotations

import ipaddress
import re
import socket
from typing import Final
from urllib.parse import urlsplit

from aiohttp.abc import AbstractResolver, ResolveResult
from aiohttp.resolver import DefaultResolver

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

_METADATA: Final = frozenset(
    map(
        ipaddress.ip_address,
        (
            "100.100.100.200",  # Alibaba Cloud
            "168.63.129.16",  # Azure's host
            "192.0.0.192",  # Oracle Cloud
            "fd00:ec2::254",  # AWS; inside the private networks of IPv6
            "fd00:42::42",  # Scaleway
            "fd20:ce::254",  # Google Cloud
        ),
    )
)
_METADATA_NAMES: Final = frozenset(
    {"metadata", "metadata.google.internal", "metadata.goog", "instance-data", "instance-data.ec2.internal"}
)
"""Where a proxy looks names up, no address is seen here."""
_NO_HOST: Final = ipaddress.ip_network("0.0.0.0/8")
_HOST: Final = re.compile(r"(?!.{254})[A-Za-z0-9_-]{1,63}(\.[A-Za-z0-9_-]{1,63})*\.?")
_URL: Final = re.compile(r"[\x21-\x7e]+")
_NUMBERS: Final = re.compile(r"(0x[0-9a-f]*|[0-9]+)(\.(0x[0-9a-f]*|[0-9]+)){0,3}", re.IGNORECASE)
"""Addresses as `inet_aton(3)` reads them, too: ``2852039166``, ``0xa9.0376.43518``."""
_CARRIERS: Final = tuple(
    (ipaddress.IPv6Network(network), shift)
    for network, shift in (
        ("::/96", 0),  # IPv4-compatible
        ("::ffff:0:0/96", 0),  # IPv4-mapped
        ("::ffff:0:0:0/96", 0),  # translated (RFC 2765)
        ("64:ff9b::/96", 0),  # NAT64
        ("64:ff9b:1::/48", 0),  # NAT64 of one's own
        ("2002::/16", 80),  # 6to4
    )
)
"""Networks of IPv6 whose addresses hold one of IPv4, so many bits from their end."""


def origin_of(url: str) -> str:
    """Give ``scheme://host:port`` of a URL, with the port always written.

    Raises
    ------
    ValueError
        If it is no http or https URL with a host, or carries a user name or password.
    """
    if not _URL.fullmatch(url) or "\\" in url:  # what parsers of URLs drop or read each in its own way
        raise ValueError("the address must be printable ASCII without spaces and backslashes")
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https"):
        raise ValueError("the address must begin with http:// or https://")
    if not parts.hostname:
        raise ValueError("the address has no host")
    if "@" in parts.netloc:
        raise ValueError("the address must not carry a user name or password")
    if "?" in url or "#" in url:
        raise ValueError("the address must not have a query or a fragment")
    if ":" in parts.hostname:
        ipaddress.IPv6Address(parts.hostname)  # raises a ValueError that says it
    elif not _HOST.fullmatch(parts.hostname):
        raise ValueError("the host is no host name in ASCII letters")
    host = f"[{parts.hostname}]" if ":" in parts.hostname else parts.hostname
    return f"{parts.scheme}://{host}:{parts.port or (443 if parts.scheme == 'https' else 80)}"


def why_not_called(host: str) -> str | None:
    """Say why a host is never called, or None if it may be; a name is judged again by what it resolves to.

    Parameters
    ----------
    host
        As it stands in a URL, without brackets: a name, or an address in any form that the system takes.

    Examples
    --------
    >>> why_not_called("0xa9fea9fe")
    'is an address of the link-local network, where clouds answer with credentials'
    >>> why_not_called("192.168.1.20") is None
    True
    """
    name = host.lower().rstrip(".")
    if name in _METADATA_NAMES:
        return "is the metadata service of a cloud"
    try:
        address: IPAddress = ipaddress.ip_address(name.partition("%")[0])
    except ValueError:
        if not _NUMBERS.fullmatch(name):
            return None
        try:
            address = ipaddress.IPv4Address(socket.inet_aton(name))
        except OSError:
            return "is neither a name nor an address"
    return _why_not(address)


def _why_not(address: IPAddress) -> str | None:
    if isinstance(address, ipaddress.IPv6Address) and address not in (_UNSPECIFIED, _LOOPBACK):
        for network, shift in _CARRIERS:
            if address in network:
                return _why_not(ipaddress.IPv4Address(int(address) >> shift & 0xFFFFFFFF))
    if address in _METADATA:
        return "is the metadata service of a cloud"
    if address.is_link_local:
        return "is an address of the link-local network, where clouds answer with credentials"
    if address.is_multicast or address == _BROADCAST:
        return "is an address of many machines at once"
    if address.is_unspecified or address in _NO_HOST:
        return "is no address of a machine; this one is 127.0.0.1"
    if isinstance(address, ipaddress.IPv4Address) and address.is_reserved:
        return "is an address that nobody has"
    return None


_UNSPECIFIED: Final = ipaddress.IPv6Address("::")
_LOOPBACK: Final = ipaddress.IPv6Address("::1")
_BROADCAST: Final = ipaddress.IPv4Address("255.255.255.255")


class NotCalled(OSError):
    """A name resolves to nothing but addresses that are never called; the HTTP library passes on an `OSError`."""


class GuardedResolver(AbstractResolver):
    """Looks names up, and leaves out what is never called.

    The connection is made to the very addresses that were judged, so that a name server cannot answer otherwise a
    moment later. A machine of one's own network often has a link-local address beside its own: the others stay.
    """

    def __init__(self, resolver: AbstractResolver | None = None) -> None:
        self._resolver = resolver or DefaultResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_INET
    ) -> list[ResolveResult]:
        """Give the addresses of a host that may be called.

        Raises
        ------
        NotCalled
            If there are only others.
        """
        found = await self._resolver.resolve(host, port, family)
        called = [one for one in found if why_not_called(one["host"]) is None]
        if found and not called:
            raise NotCalled(f"it resolves to {found[0]['host']}, which {why_not_called(found[0]['host'])}")
        return called

    async def close(self) -> None:
        """Close the resolver underneath."""
        await self._resolver.close()
