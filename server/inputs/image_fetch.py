"""From the URL in a request to the bytes of an image file. The only code in the server that connects to anything.

A URL is a request to connect from inside our network, so it is judged as an attack first: it is parsed once, its name
is resolved once, every address must be publicly routable, and that very address is dialled; each redirect starts over.
Messages are constants with limits in them; no address or name is ever echoed.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

import httpx

from server.errors import ClientError
from server.inputs.image_address import IPAddress, IPNetwork, is_public, is_within, literal_address
from server.inputs.image_fetch_limits import HostBreaker, KeyShares
from server.inputs.image_resolver import SystemResolver

# (host, port) to the addresses of the host, as text; an empty answer or an OSError means that there is none.
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_URL_LENGTH = 8192
MAX_REDIRECTS = 3

# A connection takes a round trip, and a second more if its first packet is lost and sent again.
_CONNECT_SECONDS = 2.0
# From dialling to the end of the answer's head, for which a server that is well needs far less than a second.
_HEAD_SECONDS = 3.0
# What a body must bring in every window, so that a server that drips does not hold a slot for the whole time limit.
# Any server of pictures gives many times as much; the first window is longer, as connections start slowly.
_MIN_BYTES_PER_SECOND = 50_000
_WINDOW_SECONDS = 1.0
_SLOW_START_SECONDS = 2.0

_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "idefics2-server"}

# Parsers disagree about these; whoever sends them wants two of them to.
_FORBIDDEN = re.compile(r"[\s\\\x00-\x1f\x7f-\x9f]")


@dataclass
class _Trip:
    """One fetch: who wants it, until when (in the loop's time), and how often another address may still be tried."""

    key: str
    deadline: float
    retries: int = 1


class ImageFetcher:
    """Downloads images over http and https, from public addresses only."""

    def __init__(
        self,
        max_bytes: int,
        timeout: float,
        *,
        allowed_domains: Sequence[str] = (),
        concurrency: int = 32,
        resolver: Resolver | None = None,
        tls: ssl.SSLContext | None = None,
        extra_networks: Sequence[IPNetwork] = (),
        extra_ports: Sequence[int] = (),
    ) -> None:
        """`timeout` is seconds for one image in all, redirects included, not counting the wait for a free slot.

        `allowed_domains` are the only ones to fetch from, with what is below them; none given means all. Raises
        ValueError for one that is no domain. The last four are for tests, which need a server on this machine; no
        setting leads to them.
        """
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._domains = frozenset(_normalised(domain) for domain in allowed_domains)
        self._slots = asyncio.Semaphore(concurrency)
        self._shares = KeyShares(concurrency)
        self._breaker = HostBreaker()
        self._resolver = resolver
        self._system = SystemResolver(concurrency)
        self._tls = tls or httpx.create_ssl_context(trust_env=False)
        self._extra_networks = tuple(extra_networks)
        self._ports = frozenset({80, 443, *extra_ports})

    async def fetch(self, url: str, *, param: str, key: str = "") -> bytes:
        """The body behind `url`, never empty and at most `max_bytes` long. `key` names the API key of who wants it.

        Raises ClientError with `param`: `invalid_image_url` (malformed, not a public http(s) address on port 80 or
        443, or not of an allowed domain), `failed_to_download_image` (network, TLS, status, time, or a host that has
        just failed several times), `image_file_too_large`, `empty_image_file`.
        """
        try:
            target = self._parse(url)  # before the queue: most bad URLs cost nothing
            async with self._shares.hold(key), self._slots:
                return await self._follow(target, _Trip(key, asyncio.get_running_loop().time() + self._timeout))
        except ClientError as error:
            error.param = param
            raise

    def _parse(self, url: str) -> httpx.URL:
        """Check everything about a URL that can be checked without the network. Raises ClientError."""
        if len(url) > MAX_URL_LENGTH:
            raise _invalid(f"the image URL has {len(url)} characters: the limit is {MAX_URL_LENGTH}")
        if _FORBIDDEN.search(url):
            raise _invalid("the image URL holds whitespace, a backslash or a control character")
        try:
            parsed = httpx.URL(url)
            if parsed.scheme not in ("http", "https"):
                raise _invalid("the image URL must be a data URL or start with http:// or https://")
            if parsed.userinfo:
                raise _invalid("the image URL must not hold a user name or password")
            if _port(parsed) not in self._ports:
                raise _invalid("the image URL must use port 80 or 443")
        except (httpx.InvalidURL, ValueError):  # ValueError: a host that IDNA refuses
            raise _invalid("the image URL is malformed") from None
        try:
            literal_address(_host(parsed))
        except ValueError:
            raise _invalid("the host of the image URL is malformed") from None
        if self._domains and not is_within(_host(parsed), self._domains):
            raise _invalid("the image URL must lead to one of the domains that this server allows")
        return parsed

    async def _follow(self, target: httpx.URL, trip: _Trip) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get_in_time(target, trip)
            if isinstance(answer, bytes):
                return answer
            target = answer
        raise _failed(f"the image URL redirects more than {MAX_REDIRECTS} times")

    async def _get_in_time(self, target: httpx.URL, trip: _Trip) -> bytes | httpx.URL:
        """The body, or where the answer redirects to. Raises ClientError, whatever went wrong."""
        host = f"{target.scheme}://{_host(target)}:{_port(target)}"
        if self._breaker.is_open(trip.key, host):
            raise _failed("the image's server has failed several times in a row and is left alone for some seconds")
        try:
            async with asyncio.timeout_at(trip.deadline):
                answer = await self._get(target, trip)
        except ClientError:  # what it said is of no use, but it did answer
            self._breaker.record_success(trip.key, host)
            raise
        except TimeoutError:
            problem = f"the image was not downloaded within {self._timeout:g} seconds"
        except _TooSlowError as error:
            problem = str(error)
        except (httpx.HTTPError, OSError):
            problem = "the image could not be downloaded"
        else:
            self._breaker.record_success(trip.key, host)
            return answer
        self._breaker.record_failure(trip.key, host)
        raise _failed(problem)

    async def _get(self, target: httpx.URL, trip: _Trip) -> bytes | httpx.URL:
        """Tries one other address if the first cannot be connected to; what has been answered is never asked again."""
        first, *others = await self._public_addresses(target, trip.key)
        try:
            return await self._get_from(first, target)
        except (httpx.ConnectError, httpx.ConnectTimeout):
            if not others or not trip.retries:
                raise
        trip.retries -= 1
        # Where a whole family of addresses leads nowhere, the other one may do.
        other = next((address for address in others if address.version != first.version), others[0])
        return await self._get_from(other, target)

    async def _public_addresses(self, target: httpx.URL, key: str) -> list[IPAddress]:
        """What may be dialled, at least one. A name with one private answer among public ones is refused altogether.

        Raises ClientError or, if there is no answer, OSError.
        """
        host, port = _host(target), _port(target)
        literal = literal_address(host)
        if literal is not None:
            addresses = [literal]
        else:
            resolving = self._resolver(host, port) if self._resolver else self._system.resolve(host, port, key=key)
            addresses = [ipaddress.ip_address(answer) for answer in await resolving]
        if not addresses:
            raise socket.gaierror(socket.EAI_NONAME, "no address")
        if not all(self._may_dial(address) for address in addresses):
            raise _invalid("the image URL must lead to a public address")
        return list(dict.fromkeys(addresses))

    def _may_dial(self, address: IPAddress) -> bool:
        return is_public(address) or any(address in network for network in self._extra_networks)

    async def _get_from(self, address: IPAddress, target: httpx.URL) -> bytes | httpx.URL:
        """One GET over a connection of its own to `address`, with the Host header and TLS name of `target`.

        The transport is used without a client: no cookies, no redirects, no proxies from the environment, no log line
        with the URL. A connection is never reused: it was verified for one name, and addresses are shared by many.
        """
        request = httpx.Request(
            "GET",
            target.copy_with(host=str(address)),
            headers={"Host": target.netloc.decode("ascii"), **_HEADERS},
            extensions={"sni_hostname": _host(target), "timeout": {"connect": _CONNECT_SECONDS}},
        )
        async with httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
            try:
                async with asyncio.timeout(_HEAD_SECONDS):
                    response = await transport.handle_async_request(request)
            except TimeoutError:
                raise _TooSlowError(f"the image's server did not answer within {_HEAD_SECONDS:g} seconds") from None
            try:
                if response.status_code in _REDIRECTS and "location" in response.headers:
                    return self._redirected(target, response.headers["location"])
                if response.status_code != 200:
                    raise _failed(f"the image's server answered with status {response.status_code}")
                return await self._read(response)
            finally:
                await response.aclose()

    def _redirected(self, target: httpx.URL, location: str) -> httpx.URL:
        if _FORBIDDEN.search(location):  # joining would escape what `_parse` refuses
            raise _invalid("the image URL redirects to a malformed URL")
        try:
            joined = str(target.join(location))
        except (httpx.InvalidURL, ValueError):
            raise _invalid("the image URL redirects to a malformed URL") from None
        return self._parse(joined)

    async def _read(self, response: httpx.Response) -> bytes:
        if response.headers.get("content-encoding", "identity").lower() != "identity":
            raise _failed("the image's server compressed its answer, which was not asked for")
        body = bytearray()
        loop = asyncio.get_running_loop()
        end_of_start = loop.time() + _SLOW_START_SECONDS
        counted = 0  # bytes of windows that are over
        try:
            async with asyncio.timeout_at(end_of_start + _WINDOW_SECONDS) as window:
                async for chunk in response.aiter_raw():
                    body += chunk
                    if len(body) > self._max_bytes:
                        raise ClientError(
                            f"the image file is larger than the limit of {self._max_bytes} bytes",
                            code="image_file_too_large",
                        )
                    if len(body) - counted >= _MIN_BYTES_PER_SECOND * _WINDOW_SECONDS:
                        counted = len(body)
                        window.reschedule(max(end_of_start, loop.time()) + _WINDOW_SECONDS)
        except TimeoutError:
            raise _TooSlowError(f"the image's server sent less than {_MIN_BYTES_PER_SECOND} bytes a second") from None
        if not body:
            raise ClientError("the image file is empty", code="empty_image_file")
        return bytes(body)


class _TooSlowError(Exception):
    """The server answers more slowly than any that is well; the message is for the client."""


def _host(url: httpx.URL) -> str:
    """As IDNA leaves it: the one form that is compared, resolved and shown in a certificate."""
    return url.raw_host.decode("ascii")


def _port(url: httpx.URL) -> int:
    return url.port if url.port is not None else {"http": 80, "https": 443}[url.scheme]


def _normalised(domain: str) -> str:
    """A domain or an address as `_host` gives it. Raises ValueError."""
    try:
        url = httpx.URL(scheme="http", host=domain)
        literal_address(_host(url))
    except (httpx.InvalidURL, ValueError):
        raise ValueError(f"{domain!r} is neither a domain nor an address, like 'example.com'") from None
    return _host(url)


def _invalid(message: str) -> ClientError:
    return ClientError(message, code="invalid_image_url")


def _failed(message: str) -> ClientError:
    return ClientError(message, code="failed_to_download_image")
