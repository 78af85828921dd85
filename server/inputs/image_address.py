"""Which hosts and addresses a picture may be fetched from, and which spellings of them are taken. Knows no network."""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Container

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network

_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")  # a trailing dot does not match
_MAX_HOST_NAME = 253
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that has been given out so far
_IPV6_TUNNELS = (ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16"))  # Teredo, 6to4


def is_public(address: IPAddress) -> bool:
    """Whether an address is one of the public internet's; an IPv4 address inside an IPv6 one decides for it."""
    if isinstance(address, ipaddress.IPv4Address):
        return address.is_global and not address.is_multicast and not address.is_reserved
    if address.ipv4_mapped is not None:
        return is_public(address.ipv4_mapped)
    if address in _NAT64:
        return is_public(ipaddress.IPv4Address(int(address) & 0xFFFF_FFFF))
    # No server lives behind Teredo or 6to4, but an embedded address could lead back inside.
    return address.is_global and address in _IPV6_UNICAST and not any(address in tunnel for tunnel in _IPV6_TUNNELS)


def literal_address(host: str) -> IPAddress | None:
    """The address that a URL's host is, None if it is a name. `host` is lower case ASCII, as IDNA leaves it.

    Raises ValueError for what is neither. Resolvers also take 2130706433, 0177.1 and 0x7f.1 for addresses; nobody
    writes a picture's address like that.
    """
    if ":" in host:
        if "%" in host:
            raise ValueError("an address with a zone")
        return ipaddress.IPv6Address(host)
    if _NUMBER.fullmatch(host.rpartition(".")[2]):
        return ipaddress.IPv4Address(host)
    if len(host) > _MAX_HOST_NAME or not _HOST_NAME.fullmatch(host):
        raise ValueError("not a host name")
    return None


def is_within(host: str, domains: Container[str]) -> bool:
    """Whether `host` is one of the domains or below one. All of them as IDNA leaves them."""
    while host not in domains:
        _, dot, host = host.partition(".")
        if not dot:
            return False
    return True
