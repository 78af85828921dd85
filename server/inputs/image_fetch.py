"""From the URL in a request to the bytes of an image file. The only code in the server that connects to anything.

A URL is a request to connect from inside our network, so it is judged as an attack first: it is parsed once, its name
is resolved once, every address must be publicly routable, and that very address is dialled; each redirect starts over.
Messages are constants with limits in them; no address or name is ever echoed.
"""

from __future__ import annotations

import asyncio
import binascii
import functools
import ipaddress
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import unquote_to_bytes

import httpx

from server.errors import ClientError

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
IPNetwork = ipaddress.IPv4Network | ipaddress.IPv6Network
# (host, port) to the addresses of the host, as text; an empty answer or an OSError means that there is none.
Resolver = Callable[[str, int], Awaitable[Sequence[str]]]

MAX_URL_LENGTH = 8192
MAX_REDIRECTS = 3

_MAX_ADDRESSES = 3
_CONNECT_SECONDS = 2.0
_REDIRECTS = frozenset({301, 302, 303, 307, 308})
_HEADERS = {"Accept": "image/*", "Accept-Encoding": "identity", "User-Agent": "idefics2-server"}

# Parsers disagree about these; whoever sends them wants two of them to.
_FORBIDDEN = re.compile(r"[\s\\\x00-\x1f\x7f-\x9f]")
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
_HOST_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})*")  # a trailing dot does not match
_NUMBER = re.compile(r"[0-9]+|0x[0-9a-f]*")

_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
_IPV6_UNICAST = ipaddress.IPv6Network("2000::/3")  # all that has been given out so far
_IPV6_TUNNELS = (ipaddress.IPv6Network("2001::/32"), ipaddress.IPv6Network("2002::/16"))  # Teredo, 6to4

_WHITESPACE = " \t\n\r\f"
_BAD_ESCAPE = re.compile(rb"%(?![0-9a-fA-F]{2})")
_SLICE = 256 << 10  # decoding holds the interpreter lock: in slices, other threads get their turn


def parse_data_url(url: str, *, max_bytes: int, param: str) -> bytes:
    """The bytes in a data URL, never empty and at most `max_bytes` long; what it says about their type is ignored.

    Takes tens of milliseconds for a large URL: call it in a thread. Raises ClientError with `param`:
    `invalid_image_url` (not a data URL, or a bad percent escape), `invalid_base64_image` (alphabet or padding),
    `image_file_too_large`, `empty_image_file`.
    """
    try:
        return _data_url_bytes(url, max_bytes)
    except ClientError as error:
        error.param = param
        raise


class ImageFetcher:
    """Downloads images over http and https, from public addresses only."""

    def __init__(
        self,
        max_bytes: int,
        timeout: float,
        *,
        concurrency: int = 32,
        resolver: Resolver | None = None,
        tls: ssl.SSLContext | None = None,
        extra_networks: Sequence[IPNetwork] = (),
        extra_ports: Sequence[int] = (),
    ) -> None:
        """`timeout` is seconds for one image in all, redirects included, not counting the wait for a free slot.

        The last four are for tests, which need a server on this machine; no setting leads to them.
        """
        self._max_bytes = max_bytes
        self._timeout = timeout
        self._slots = asyncio.Semaphore(concurrency)
        # Threads of our own: a name server that never answers must not starve what else uses the loop's threads.
        self._threads = ThreadPoolExecutor(max_workers=concurrency, thread_name_prefix="resolve")
        self._resolve = resolver or self._resolve_with_system
        self._tls = tls or httpx.create_ssl_context(trust_env=False)
        self._extra_networks = tuple(extra_networks)
        self._ports = frozenset({80, 443, *extra_ports})

    async def close(self) -> None:
        """Let go of the resolver's threads; no fetch may be running."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    async def fetch(self, url: str, *, param: str) -> bytes:
        """The body behind `url`, never empty and at most `max_bytes` long.

        Raises ClientError with `param`: `invalid_image_url` (malformed, or not a public http(s) address on port 80 or
        443), `failed_to_download_image` (network, TLS, status, time), `image_file_too_large`, `empty_image_file`.
        """
        try:
            target = self._parse(url)  # before the queue: most bad URLs cost nothing
            async with self._slots, asyncio.timeout(self._timeout):
                return await self._follow(target)
        except TimeoutError:
            raise _failed(f"the image was not downloaded within {self._timeout:g} seconds", param) from None
        except (httpx.HTTPError, OSError):
            raise _failed("the image could not be downloaded", param) from None
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
            host = parsed.raw_host.decode("ascii")
            if parsed.scheme not in ("http", "https"):
                raise _invalid("the image URL must be a data URL or start with http:// or https://")
            if parsed.userinfo:
                raise _invalid("the image URL must not hold a user name or password")
            if _default_port(parsed) not in self._ports:
                raise _invalid("the image URL must use port 80 or 443")
        except (httpx.InvalidURL, ValueError):  # ValueError: a host that IDNA refuses
            raise _invalid("the image URL is malformed") from None
        if _literal_address(host) is None and (len(host) > 253 or not _HOST_NAME.fullmatch(host)):
            raise _invalid("the host of the image URL is malformed")
        return parsed

    async def _follow(self, target: httpx.URL) -> bytes:
        for _ in range(MAX_REDIRECTS + 1):
            answer = await self._get(target)
            if isinstance(answer, bytes):
                return answer
            target = answer
        raise _failed(f"the image URL redirects more than {MAX_REDIRECTS} times")

    async def _get(self, target: httpx.URL) -> bytes | httpx.URL:
        """The body, or where the answer redirects to. Tries the next address if one cannot be connected to."""
        addresses = await self._public_addresses(target)
        for address in addresses[:-1]:
            try:
                return await self._get_from(address, target)
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
        return await self._get_from(addresses[-1], target)

    async def _public_addresses(self, target: httpx.URL) -> list[str]:
        """One to three addresses to dial. A name with one private answer among public ones is refused altogether."""
        host = target.raw_host.decode("ascii")
        literal = _literal_address(host)
        answers = [host] if literal else await self._resolve(host, _default_port(target))
        if not answers:
            raise _failed("the image could not be downloaded")
        addresses = [ipaddress.ip_address(answer) for answer in answers]
        if not all(self._may_dial(address) for address in addresses):
            raise _invalid("the image URL must lead to a public address")
        return [str(address) for address in dict.fromkeys(addresses)][:_MAX_ADDRESSES]

    def _may_dial(self, address: IPAddress) -> bool:
        return is_public(address) or any(address in network for network in self._extra_networks)

    async def _resolve_with_system(self, host: str, port: int) -> list[str]:
        lookup = functools.partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
        found = await asyncio.get_running_loop().run_in_executor(self._threads, lookup)
        return [str(sockaddr[0]) for _, _, _, _, sockaddr in found]

    async def _get_from(self, address: str, target: httpx.URL) -> bytes | httpx.URL:
        """One GET over a connection of its own to `address`, with the Host header and TLS name of `target`.

        The transport is used without a client: no cookies, no redirects, no proxies from the environment, no log line
        with the URL. A connection is never reused: it was verified for one name, and addresses are shared by many.
        """
        request = httpx.Request(
            "GET",
            target.copy_with(host=address),
            headers={"Host": target.netloc.decode("ascii"), **_HEADERS},
            extensions={"sni_hostname": target.raw_host.decode("ascii"), "timeout": {"connect": _CONNECT_SECONDS}},
        )
        async with httpx.AsyncHTTPTransport(verify=self._tls, trust_env=False) as transport:
            response = await transport.handle_async_request(request)
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
        async for chunk in response.aiter_raw():
            body += chunk
            if len(body) > self._max_bytes:
                raise ClientError(
                    f"the image file is larger than the limit of {self._max_bytes} bytes", code="image_file_too_large"
                )
        if not body:
            raise ClientError("the image file is empty", code="empty_image_file")
        return bytes(body)


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


def _literal_address(host: str) -> IPAddress | None:
    """The address if `host` is one, None if it is a name. Raises ClientError for any other spelling of an address.

    Resolvers also take 2130706433, 0177.1 and 0x7f.1 for addresses; nobody writes a picture's address like that.
    """
    try:
        if ":" in host:
            if "%" in host:
                raise _invalid("the host of the image URL is malformed")
            return ipaddress.IPv6Address(host)
        if _NUMBER.fullmatch(host.rpartition(".")[2]):
            return ipaddress.IPv4Address(host)
    except ValueError:
        raise _invalid("the host of the image URL is malformed") from None
    return None


def _default_port(url: httpx.URL) -> int:
    return url.port if url.port is not None else {"http": 80, "https": 443}[url.scheme]


def _invalid(message: str) -> ClientError:
    return ClientError(message, code="invalid_image_url")


def _failed(message: str, param: str | None = None) -> ClientError:
    return ClientError(message, code="failed_to_download_image", param=param)


def _data_url_bytes(url: str, max_bytes: int) -> bytes:
    comma = url.find(",", 0, MAX_URL_LENGTH)
    if url[:5].lower() != "data:" or comma < 0:
        raise _invalid("the image URL is not a data URL of the form data:[type][;base64],data")
    start = comma + 1
    _, *parameters = url[5:comma].lower().split(";")
    is_base64 = any(parameter.strip() == "base64" for parameter in parameters)
    size = len(url) - start - 2 * url.count("%", start)
    if is_base64:
        size -= sum(url.count(space, start) for space in _WHITESPACE)
        size = size * 3 // 4 - sum(url.count(padding, start) for padding in ("=", "%3D", "%3d"))
    if size > max_bytes:
        raise ClientError(
            f"the image file has {size} bytes: the limit is {max_bytes} bytes", code="image_file_too_large"
        )
    pieces = _unescaped(url, start)
    try:
        data = b"".join(_from_base64(pieces) if is_base64 else pieces)
    except ValueError:  # characters outside ASCII, outside the alphabet, or bad padding
        if not is_base64:
            raise _invalid("the data URL holds characters that must be percent-encoded") from None
        raise ClientError("the data URL is not valid base64", code="invalid_base64_image") from None
    if not data:
        raise ClientError("the image file is empty", code="empty_image_file")
    return data


def _unescaped(url: str, start: int) -> Iterator[bytes]:
    """The bytes of `url` from `start` on, percent escapes undone. Raises ClientError, or ValueError if not ASCII."""
    held = b""
    for position in range(start, len(url), _SLICE):
        piece = held + url[position : position + _SLICE].encode("ascii")
        held = b""
        split_escape = piece.rfind(b"%", len(piece) - 2) if position + _SLICE < len(url) else -1
        if split_escape >= 0:
            piece, held = piece[:split_escape], piece[split_escape:]
        if b"%" in piece:
            if _BAD_ESCAPE.search(piece):
                raise _invalid("the data URL holds a malformed percent escape")
            piece = unquote_to_bytes(piece)
        yield piece


def _from_base64(pieces: Iterable[bytes]) -> Iterator[bytes]:
    """Raises ValueError for anything but the standard alphabet, ASCII whitespace and exact padding at the end."""
    held = b""
    ended = False
    for piece in pieces:
        symbols = held + piece.translate(None, _WHITESPACE.encode())
        whole = len(symbols) // 4 * 4
        symbols, held = symbols[:whole], symbols[whole:]
        if ended and symbols:
            raise ValueError("data after padding")
        yield binascii.a2b_base64(symbols, strict_mode=True)
        ended = ended or symbols.endswith(b"=")
    if held:
        raise ValueError("not a multiple of four symbols")
