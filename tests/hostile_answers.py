"""What an upstream can do wrong, by mistake or on purpose; each is a mode of `scripted_upstream`."""

from __future__ import annotations

import asyncio
import functools
import gzip
import json
from typing import Any, Final

from scripted_upstream import EVENT_STREAM, Behaviour, Exchange, event, token

from llmkit.engines.sse import MAX_EVENT_BYTES

JSON: Final = "application/json"
BLOCK: Final = 64 << 10
REALM: Final = "realm-of-the-upstream"
HUGE_NUMBER: Final = "9" * 400


def kind_of(exchange: Exchange) -> str:
    """Give the content type that was asked for."""
    return EVENT_STREAM if exchange.body.get("stream") else JSON


async def without_end(exchange: Exchange, block: bytes) -> None:
    """Send the same again and again, as fast as it is taken."""
    while True:
        await exchange.send(block)
        await asyncio.sleep(0)


@functools.cache
def zeros() -> bytes:
    """Give 64 MiB, compressed; it takes a while, but only once."""
    return gzip.compress(bytes(64 << 20))


async def gzip_bomb(exchange: Exchange) -> None:
    """Compress what nobody asked to have compressed, a thousandfold."""
    await exchange.answer(zeros(), kind_of(exchange), "Content-Encoding: gzip")


async def gzip_without_a_word(exchange: Exchange) -> None:
    """Compress, and do not say so."""
    await exchange.answer(gzip.compress(token("x") * 1000), kind_of(exchange))


async def endless_events(exchange: Exchange) -> None:
    """Send valid events without end."""
    await exchange.head(EVENT_STREAM)
    await without_end(exchange, token("flood " * 20) * 400)


async def endless_empty_events(exchange: Exchange) -> None:
    """Send events in which nothing is said, without end."""
    await exchange.head(EVENT_STREAM)
    await without_end(exchange, event({"choices": []}) * 1000)


async def endless_comments(exchange: Exchange) -> None:
    """Send comments without end."""
    await exchange.head(EVENT_STREAM)
    await without_end(exchange, b": nothing\n\n" * 5000)


async def endless_line(exchange: Exchange) -> None:
    """Send a line without end."""
    await exchange.head(EVENT_STREAM)
    await exchange.send(b"data: ")
    await without_end(exchange, b"x" * BLOCK)


async def endless_lines(exchange: Exchange) -> None:
    """Send an event of lines without end."""
    await exchange.head(EVENT_STREAM)
    await without_end(exchange, b"data: x\n" * (BLOCK // 8))


async def many_lines(exchange: Exchange) -> None:
    """Send an event of very many lines, just short of what is taken."""
    await exchange.head(EVENT_STREAM)
    await exchange.send(b"data: 1\n" * (MAX_EVENT_BYTES // 8 - 1) + b"\n")
    exchange.close()


async def endless_body(exchange: Exchange) -> None:
    """Send a whole answer without end."""
    await exchange.head(JSON)
    await exchange.send(b'{"choices": [{"message": {"content": "')
    await without_end(exchange, b"x" * BLOCK)


async def endless_refusal(exchange: Exchange) -> None:
    """Say without end what was wrong."""
    await exchange.head(JSON, status="400 Bad Request")
    await exchange.send(b'{"error": {"message": "')
    await without_end(exchange, b"x" * BLOCK)


async def endless_continue(exchange: Exchange) -> None:
    """Announce an answer again and again."""
    await without_end(exchange, b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


async def bad_utf8(exchange: Exchange) -> None:
    """Send JSON that is not UTF-8."""
    bad = b'{"choices": [{"message": {"content": "\xff\xfe"}, "delta": {"content": "\xff\xfe"}}]}'
    if exchange.body.get("stream"):
        await exchange.head(EVENT_STREAM)
        await exchange.send(b"data: " + bad + b"\n\ndata: [DONE]\n\n")
        exchange.close()
    else:
        await exchange.answer(bad)


async def half_a_character(exchange: Exchange) -> None:
    """Send JSON with halves of surrogate pairs, which no UTF-8 can have, wherever there is text."""
    half = "\\ud800"
    part: dict[str, Any] = {
        "content": half,
        "reasoning_content": half,
        "tool_calls": [{"index": 0, "id": half, "function": {"name": half, "arguments": half}}],
    }
    logprobs = {"content": [{"token": half, "logprob": -1.0}]}
    choice = {"delta": part, "message": part, "logprobs": logprobs, "finish_reason": half}
    text = json.dumps({"choices": [choice]}).replace("\\\\", "\\").encode()
    if exchange.body.get("stream"):
        await exchange.head(EVENT_STREAM)
        await exchange.send(b"data: " + text + b"\n\ndata: [DONE]\n\n")
        exchange.close()
    else:
        await exchange.answer(text)


async def absurd_usage(exchange: Exchange) -> None:
    """Count more tokens than any number type holds."""
    usage = f'{{"prompt_tokens": {HUGE_NUMBER}, "completion_tokens": {HUGE_NUMBER}, "total_tokens": {HUGE_NUMBER}}}'
    choice = '{"message": {"content": "x"}, "delta": {"content": "x"}, "finish_reason": "stop"}'
    text = f'{{"choices": [{choice}], "usage": {usage}}}'.encode()
    if exchange.body.get("stream"):
        await exchange.head(EVENT_STREAM)
        await exchange.send(b"data: " + text + b"\n\ndata: [DONE]\n\n")
        exchange.close()
    else:
        await exchange.answer(text)


async def swelling(exchange: Exchange) -> None:
    """Send JSON of which a parser makes twenty times as much."""
    bomb = b'{"choices": [' + b"[]," * (int(exchange.number("mib", 16)) * 350_000) + b"[]]}"
    await exchange.answer(bomb)


async def deep_nesting(exchange: Exchange) -> None:
    """Nest what is sent more deeply than a parser can follow."""
    deep = b"[" * 1_000_000
    if exchange.body.get("stream"):
        await exchange.head(EVENT_STREAM)
        await exchange.send(b"data: " + deep + b"\n\n")
        exchange.close()
    else:
        await exchange.answer(deep)


async def basic_challenge(exchange: Exchange) -> None:
    """Ask for a password."""
    challenge = f'WWW-Authenticate: Basic realm="{REALM}"'
    said = json.dumps({"error": {"message": f"log in to {REALM}"}}).encode()
    await exchange.answer(said, JSON, challenge, status="401 Unauthorized")


async def proxy_challenge(exchange: Exchange) -> None:
    """Ask for a password as a proxy does."""
    challenge = f'Proxy-Authenticate: Basic realm="{REALM}"'
    await exchange.answer(b"{}", JSON, challenge, status="407 Proxy Authentication Required")


async def drip(exchange: Exchange) -> None:
    """Send a byte each 50 ms."""
    await exchange.head(kind_of(exchange))
    for byte in token("a" * 10_000):
        await exchange.send(bytes([byte]))
        await asyncio.sleep(0.05)


async def dripping_head(exchange: Exchange) -> None:
    """Send a byte of the head each 50 ms."""
    for byte in b"HTTP/1.1 200 OK\r\nX-Slow: " + b"a" * 10_000:
        await exchange.send(bytes([byte]))
        await asyncio.sleep(0.05)


async def silence(exchange: Exchange) -> None:
    """Say nothing after the head."""
    await exchange.head(kind_of(exchange))
    await asyncio.Event().wait()


async def silence_in_the_middle(exchange: Exchange) -> None:
    """Begin to answer, and say nothing more."""
    await exchange.head(EVENT_STREAM)
    await exchange.send(token("begun "))
    await asyncio.Event().wait()


async def no_answer(exchange: Exchange) -> None:
    """Say nothing at all."""
    await asyncio.Event().wait()


async def hang_up(exchange: Exchange) -> None:
    """Close the connection without a word."""
    exchange.close()


async def redirect(exchange: Exchange) -> None:
    """Send elsewhere: to ``to``."""
    await exchange.answer(b"", "text/html", f"Location: {exchange.values['to']}", status="307 Temporary Redirect")


async def too_short(exchange: Exchange) -> None:
    """Promise more bytes than are sent."""
    whole = token("begun ") if exchange.body.get("stream") else b'{"choices": [{"message": {"content": "begun"}}]}'
    await exchange.head(kind_of(exchange), f"Content-Length: {len(whole) + 1000}")
    await exchange.send(whole)
    exchange.close()


async def two_lengths(exchange: Exchange) -> None:
    """Give two lengths."""
    await exchange.head(kind_of(exchange), "Content-Length: 2", "Content-Length: 20")
    await exchange.send(b"{}")
    exchange.close()


async def bad_chunks(exchange: Exchange) -> None:
    """Break the chunks of the transfer encoding."""
    await exchange.head(kind_of(exchange), "Transfer-Encoding: chunked")
    await exchange.chunk(token("begun "))
    await asyncio.sleep(0.05)  # after the head was read
    await exchange.send(b"no number\r\nno chunk\r\n")
    exchange.close()


async def no_http(exchange: Exchange) -> None:
    """Speak another protocol."""
    await exchange.send(b"\x00\x01 SSH-2.0-OpenSSH \xff\xff\r\n\r\n")
    exchange.close()


async def html(exchange: Exchange) -> None:
    """Show a page."""
    await exchange.answer(b"<html><body>Log in, please</body></html>", "text/html")


async def html_said_to_be_json(exchange: Exchange) -> None:
    """Show a page, and call it what was asked for."""
    await exchange.answer(b"<html><body>Log in, please</body></html>", kind_of(exchange))


async def huge_header(exchange: Exchange) -> None:
    """Send one enormous header."""
    await exchange.head(kind_of(exchange), "X-Huge: " + "a" * (1 << 20))
    exchange.close()


async def endless_headers(exchange: Exchange) -> None:
    """Send headers without end."""
    await exchange.send(b"HTTP/1.1 200 OK\r\n")
    await without_end(exchange, b"X-Another: one\r\n" * 1000)


async def odd_headers(exchange: Exchange) -> None:
    """Send headers that are no ASCII, in an answer that is as it should be."""
    head = f"HTTP/1.1 200 OK\r\nContent-Type: {kind_of(exchange)}\r\nx-ratelimit-limit-requests: ".encode()
    body = b'{"choices": [{"message": {"content": "x"}}]}'
    if exchange.body.get("stream"):
        body = token("x") + b"data: [DONE]\n\n"
    odd = b"\xe6\x97\xa5 \xff \xf0\x9f\x8c\x8d"
    await exchange.send(head + odd + b"\r\nRetry-After: " + odd + b"\r\nContent-Length: %d\r\n\r\n" % len(body) + body)


async def odd_busy(exchange: Exchange) -> None:
    """Be busy for a time that is none."""
    await exchange.answer(b"{}", JSON, f"Retry-After: {HUGE_NUMBER}", status="429 Too Many Requests")


async def broken_in_an_event(exchange: Exchange) -> None:
    """Close in the middle of an event."""
    await exchange.head(EVENT_STREAM)
    await exchange.send(token("begun ") + token("broken")[:-8])
    exchange.close()


async def no_done(exchange: Exchange) -> None:
    """End a stream before its end."""
    await exchange.head(EVENT_STREAM)
    await exchange.send(token("begun "))
    exchange.close()


async def events_for_json(exchange: Exchange) -> None:
    """Stream, whether it was asked for or not."""
    await exchange.head(EVENT_STREAM)
    await exchange.send(token("x") + b"data: [DONE]\n\n")
    exchange.close()


async def no_form(exchange: Exchange) -> None:
    """Send JSON that has not the form of an answer, after a beginning that has."""
    await exchange.head(EVENT_STREAM)
    await exchange.send(token("begun ") + b'data: {"choices": {"delta": 7}}\n\ndata: [DONE]\n\n')
    exchange.close()


async def error_event(exchange: Exchange) -> None:
    """Fail in the middle of a stream, in an event."""
    await exchange.head(EVENT_STREAM)
    await exchange.send(token("begun ") + event({"error": {"message": "out of order", "code": HUGE_NUMBER}}))
    exchange.close()


async def odd_status(exchange: Exchange) -> None:
    """Answer with a status that there is not."""
    await exchange.answer(b"{}", status="999 Whatever")


HOSTILE: Final[dict[str, Behaviour]] = {
    behaviour.__name__: behaviour
    for behaviour in (
        gzip_bomb,
        gzip_without_a_word,
        endless_events,
        endless_empty_events,
        endless_comments,
        endless_line,
        endless_lines,
        many_lines,
        endless_body,
        endless_refusal,
        endless_continue,
        bad_utf8,
        half_a_character,
        absurd_usage,
        swelling,
        deep_nesting,
        basic_challenge,
        proxy_challenge,
        drip,
        dripping_head,
        silence,
        silence_in_the_middle,
        no_answer,
        hang_up,
        redirect,
        too_short,
        two_lengths,
        bad_chunks,
        no_http,
        html,
        html_said_to_be_json,
        huge_header,
        endless_headers,
        odd_headers,
        odd_busy,
        broken_in_an_event,
        no_done,
        events_for_json,
        no_form,
        error_event,
        odd_status,
    )
}
