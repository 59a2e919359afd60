"""The way out of this machine: proxies and certificates, as the server's environment names them.

Read here rather than by the HTTP library, which would take passwords from ``~/.netrc`` as well and send them to
endpoints that are to be called without a key.
"""

from __future__ import annotations

import ipaddress
import os
import ssl
from collections.abc import Mapping
from pathlib import Path
from urllib.parse import urlsplit

from llmkit.errors import UpstreamUnreachable


def proxy_for(url: str, environ: Mapping[str, str]) -> str | None:
    """Give the proxy that a URL is reached through, or None.

    ``HTTPS_PROXY``, ``HTTP_PROXY`` and ``ALL_PROXY`` name it, in small letters too, which count first; ``NO_PROXY``
    lists hosts, domains, addresses and networks that are reached without, ``*`` is all. This machine itself is.

    Raises
    ------
    UpstreamUnreachable
        If it is of a kind that cannot be used.
    """
    parts = urlsplit(url)
    host = (parts.hostname or "").lower().rstrip(".")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    if host == "localhost" or _is_loopback(host) or _is_exempt(host, port, _variable(environ, "no_proxy")):
        return None
    proxy = _variable(environ, f"{parts.scheme}_proxy") or _variable(environ, "all_proxy")
    if not proxy:
        return None
    proxy = proxy if "://" in proxy else f"http://{proxy}"
    if not proxy.startswith(("http://", "https://")):
        raise UpstreamUnreachable(
            f"A proxy of the kind {proxy.partition(':')[0]} cannot be used.",
            hint="Set HTTPS_PROXY or HTTP_PROXY of the Jupyter server to an http:// proxy, or NO_PROXY to this host.",
        )
    return proxy


def _variable(environ: Mapping[str, str], name: str) -> str:
    return environ.get(name) or environ.get(name.upper()) or ""


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_exempt(host: str, port: int, rules: str) -> bool:
    for rule in filter(None, (part.strip().lower() for part in rules.split(","))):
        name = rule.removeprefix("*").removeprefix(".")  # of a domain, which stands for itself, too
        name = name.replace("[", "").replace("]", "")  # of an IPv6 address
        if rule == "*" or name in (host, f"{host}:{port}") or (name and host.endswith(f".{name}")):
            return True
        if "/" in rule:
            try:
                if ipaddress.ip_address(host) in ipaddress.ip_network(rule, strict=False):
                    return True
            except ValueError:
                continue
    return False


def trusted_certificates(environ: Mapping[str, str]) -> ssl.SSLContext:
    """Make the context of TLS connections; reads files.

    ``SSL_CERT_FILE`` and ``SSL_CERT_DIR`` take the place of the system's certificates, as OpenSSL has it;
    ``REQUESTS_CA_BUNDLE`` and ``CURL_CA_BUNDLE`` are taken where these are not set.

    Raises
    ------
    UpstreamUnreachable
        If a file that is named cannot be read.
    """
    named = {name: environ[name] for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if environ.get(name)}
    if not named:
        name = next((name for name in ("REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE") if environ.get(name)), None)
        if name is None:
            return ssl.create_default_context()
        named = {name: environ[name]}
    try:
        context: ssl.SSLContext | None = None
        places = [place for value in named.values() for place in value.split(os.pathsep) if place]
        for place in [one for one in places if Path(one).exists()] or places:
            file, folder = (None, place) if Path(place).is_dir() else (place, None)
            if context is None:  # made with the first of them: without any it would trust the system's
                context = ssl.create_default_context(cafile=file, capath=folder)
            else:
                context.load_verify_locations(cafile=file, capath=folder)
        return context or ssl.create_default_context()
    except (OSError, ssl.SSLError) as error:
        raise UpstreamUnreachable(
            f"The certificates of {' and '.join(named)} cannot be read: {error.strerror or type(error).__name__}.",
            hint="Correct the variable in the environment of the Jupyter server, and restart it.",
        ) from error
