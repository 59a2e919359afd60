"""R4: ids are what one full match says, wherever they come in; anything else reaches nothing."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from typing import Any
from urllib.parse import quote, unquote

import aiohttp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from openapi_story import story_server
from pydantic import TypeAdapter, ValidationError
from support import JupyterServer, scaled
from yarl import URL

from jupyter_server_ext.handlers import ROUTES
from jupyter_server_ext.openapi import Described, described
from llmkit.schemas import ConversationId, ModelId, RequestId

RULES = {
    "model_id": (ModelId, re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@-]{0,127}")),
    "request_id": (RequestId, re.compile(r"[A-Za-z0-9][A-Za-z0-9._:-]{0,127}")),
    "conversation_id": (ConversationId, re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")),
}
GENERATED = scaled(10_000) // len(RULES)
SEEDS = [
    " ", ".", "..", "...", "../x", "..%2fx", "%2e%2e", "%2e%2e%2f", "%252e%252e", "/", "//", "/etc/passwd", "a/b",
    "a//b", "a\\b", "..\\..\\x", "\x00", "a\x00", "a\x00.json", "%00", "\n", "a\n", "\na", "a\r\nInjected: 1",
    "a%0d%0aInjected:%201", "\r", "\t", "a\t", "\x0b", "\x0c", "\x1b[31m", "\x7f", "\x85", "\u2028", "\u2029",
    "--flag", "--config=/etc/x", "-x", "-", "_x", ":x", "@x", ".x", "a b", "a;b", "a|b", "a&b", "a&&b", "$HOME",
    "${HOME}", "$(id)", "`id`", "a'b", 'a"b', "a' OR '1'='1", "'; DROP TABLE x; --", "<script>", "<b>", "&lt;", "%",
    "a%", "%zz", "%ff", "%c0%ae", "a?b", "a#b", "?", "#", "{}", "{x}", "{{7*7}}", "%s%n", "[x]", "~", "~root", "a*",
    "*", "\ufeff", "\ufeffa", "a\u200b", "\u202ea", "\u0430", "\u0391", "\uff41", "\u0661", "\xb2", "\xe9", "a\u0301",
    "\xdf", "\u0130", "\u017f", "\u212a", "\U0001f600", "\U000e0041", "\ufffd", "\uffff", "a,b", "a=b", "a+b", "(a)",
    "a!", "a^b", "con", "nul", "null", "None", "undefined", "true", "0", "-1", "1e9", "__proto__", "__class__",
    "constructor", "a" * 64, "a" * 65, "a" * 128, "a" * 129, "a" * 5000, "\xe9" * 64, "file:///x",
    "http://127.0.0.1/", "data:x", "javascript:x", "\\\\host\\x", "C:\\x", "a:b@c", "a..b", "a--", "a.", "a-", "a:",
    "a@", "env:HOME", "logs", "metrics",
]  # fmt: skip
CORPUS = list(dict.fromkeys([*SEEDS, *(f"a{seed}" for seed in SEEDS), *(f"{seed}z" for seed in SEEDS)]))
"""Hostile and harmless strings: by themselves, after and before a letter."""
IDS_OF_BODIES = {
    "configure_model: model_id": ("model_id", "llm/configure_model/?dry_run=true", "POST", 200),
    "configure_model: fallback": ("model_id", "llm/configure_model/?dry_run=true", "POST", 200),
    "inference: model_id": ("model_id", "llm/inference/", "POST", 404),
    "inference: request_id": ("request_id", "llm/inference/", "POST", 404),
    "put_conversation: model_id": ("model_id", "llm/conversations/c", "PUT", 200),
    "put_conversation: turn": ("model_id", "llm/conversations/c", "PUT", 200),
}
"""Where a body has an ID: the rule, the address, and what answers to one that fits."""


@pytest.mark.parametrize("name", RULES)
def test_r04_the_validator_is_one_full_match(name: str) -> None:
    kind, rule = RULES[name]
    adapter = TypeAdapter(kind)
    near = st.text("abzAZ09._:@-/ \n\x00%é", max_size=8) | st.text("a0.", min_size=60, max_size=130)
    accepted = Counter[bool]()

    def check(text: str) -> None:
        try:
            adapter.validate_python(text)
        except ValidationError:
            fits = False
        else:
            fits = True
        accepted[fits] += 1
        assert fits == (rule.fullmatch(text) is not None), repr(text)

    for text in ["", *CORPUS]:
        check(text)
    for strategy in (st.text(max_size=8), near):
        settings(max_examples=GENERATED // 2, deadline=None, database=None)(given(strategy)(check))()
    print(f"\nR4: {name}: {accepted.total()} strings, {accepted[True]} of them accepted, all by the rule")
    assert accepted[True] > 100
    assert accepted[False] > 100


def test_r04_hostile_ids_reach_nothing_on_any_route() -> None:
    assert len(CORPUS) >= 300
    with story_server() as (server, _):
        server.request("GET", "llm/conversations/")
        before = files(server)
        outcomes = asyncio.run(try_everywhere(server))
        assert server.request("GET", "llm/health").json()["status"] == "ok"
        assert server.request("GET", "llm/configurations/").json() == []
        log = server.log
        after = files(server)
    places = len({place for place, _ in outcomes})
    told = ", ".join(
        f"{sum(n for (_, s), n in outcomes.items() if s == status)} x {status}"
        for status in sorted({status for _, status in outcomes})
    )
    print(f"\nR4: {len(CORPUS)} strings in {places} places: {told}")
    assert after == before
    assert not re.search(r"^Injected", log, re.MULTILINE)
    assert "Traceback" not in log


def files(server: JupyterServer) -> set[str]:
    """Give the files of a server's folders, without those of databases that are opened when they are needed."""
    folders = (server.state_dir, server.run_dir, server.root_dir)
    found = {str(path) for folder in folders for path in folder.rglob("*")}
    return {path for path in found if not re.search(r"/(conversations|requests)\.sqlite(-wal|-shm|\.lock)?$", path)}


async def try_everywhere(server: JupyterServer) -> Counter[tuple[str, int]]:
    """Send every string as every ID of a path and of a body; count the statuses of each place."""
    outcomes: Counter[tuple[str, int]] = Counter()
    headers = {"Authorization": f"token {server.token}"}
    work: asyncio.Queue[Any] = asyncio.Queue()
    for one in described(ROUTES):
        for text in CORPUS if one.path_parameters else ():
            for form in {quote(text, safe=""), text if is_sent_as_it_is(text) else quote(text, safe="")}:
                work.put_nowait((one, text, form))
    for place in IDS_OF_BODIES:
        for text in CORPUS:
            work.put_nowait((place, text, ""))

    async def send(client: aiohttp.ClientSession) -> None:
        while not work.empty():
            what, text, form = work.get_nowait()
            if isinstance(what, Described):
                outcomes[what.id, await in_path(client, server, what, text, form)] += 1
            else:
                outcomes[what, await in_body(client, server, what, text)] += 1

    async with aiohttp.ClientSession(headers=headers, timeout=aiohttp.ClientTimeout(total=60)) as client:
        await asyncio.gather(*(send(client) for _ in range(8)))
    return outcomes


def is_sent_as_it_is(text: str) -> bool:
    """Say whether a string can stand in the first line of a request as it is."""
    return text.isascii() and text.isprintable() and not re.search(r"[ ?#/]", text)


async def in_path(client: aiohttp.ClientSession, server: JupyterServer, one: Described, text: str, form: str) -> int:
    """Send a string as the ID of a path; nothing is found that has not been made with an ID that fits."""
    path = re.sub(r"\{\w+\}", lambda _: form, one.path)
    body: Any = {"model_id": "m", "model_name": "n", "model_type": "openai"} if one.id == "put_configuration" else {}
    data = json.dumps(body) if one.body is not None else None
    async with client.request(one.method, URL(server.url + path.removeprefix("/"), encoded=True), data=data) as answer:
        told = await answer.json()
        where = (one.id, text, answer.status, told)
        if "conversation_id" in one.path_parameters and RULES["conversation_id"][1].fullmatch(unquote(form)):
            assert answer.status in (200, 404), where  # chosen by the client: one that fits may be there by now
        elif answer.status != 405:  # a path of its own, such as /llm/models/logs
            assert answer.status in (400, 404, 422), where
            assert told["error"]["code"], where
        if answer.status == 400 and one.body is None:  # refused before the body, which Tornado then does not read
            assert answer.headers["Connection"] == "close", where
        assert "Injected" not in answer.headers
        assert answer.headers["Content-Type"] == "application/json", where
        return answer.status


async def in_body(client: aiohttp.ClientSession, server: JupyterServer, place: str, text: str) -> int:
    """Send a string as an ID in a body; only one that fits is taken."""
    name, path, method, good = IDS_OF_BODIES[place]
    model = {"model_id": "m", "model_name": "n", "model_type": "openai"}
    body: dict[str, Any] = {
        "configure_model: model_id": {**model, "model_id": text},
        "configure_model: fallback": {**model, "fallback": text},
        "inference: model_id": {"model_id": text, "prompt": "x"},
        "inference: request_id": {"model_id": "nobody", "prompt": "x", "inference_kwargs": {"request_id": text}},
        "put_conversation: model_id": {"model_id": text},
        "put_conversation: turn": {"turns": [{"model_id": text, "prompt": "x"}]},
    }[place]
    async with client.request(method, URL(server.url + path, encoded=True), data=json.dumps(body)) as answer:
        told = await answer.json()
        expected = good if RULES[name][1].fullmatch(text) else 422
        assert answer.status == expected, (place, text, told)
        return answer.status
