"""What a type checker knows of the clients; checked by mypy in ``test_typed.py``, and never run."""

from __future__ import annotations

from pathlib import Path
from typing import Any, assert_type

import llmkit
from llmkit.client import Answer, AsyncAnswerStream, AsyncClient, Client, Configuration, Model, ModelList
from llmkit.client.conversations import KeptConversations
from llmkit.client.transfer import ImportedList
from llmkit.schemas import Health, LoadPlan, Memory


def sync_calls(client: Client) -> None:
    assert_type(llmkit.connect(), Client)
    assert_type(client.prompt("demo", "Hello", temperature=0.5), Answer)
    assert_type(client.models(), ModelList)
    client.map([{"a": 1}], "{a}", model="demo", concurrency=2, on_engine_lost="fail")
    client.map([{"a": 1}], "{a}")  # type: ignore[call-arg]  # without a model
    client.map([{"a": 1}], "{a}", model="demo", concurrency="2")  # type: ignore[arg-type]


async def awaited_calls(client: AsyncClient) -> None:
    assert_type(await AsyncClient.connect(), AsyncClient)
    assert_type(await client.configure("demo", "llmkit/demo", "vllm"), Configuration)
    assert_type(await client.check("demo", "llmkit/demo", "vllm"), LoadPlan | None)
    assert_type(await client.configurations(), list[Configuration])
    assert_type(await client.import_configurations(Path("a.json"), replace=True), ImportedList)
    assert_type(await client.load("demo", progress=False), Model)
    assert_type(await client.unload("demo", drain=1.0), Memory)
    assert_type(await client.prompt("demo", "Hello"), Answer)
    assert_type(client.stream("demo", "Hello"), AsyncAnswerStream)
    assert_type(await client.health(), Health)
    assert_type(await client.conversations(), KeptConversations)
    await client.map([{"a": 1}], "{a}", model="demo", concurrency=2, on_engine_lost="fail")
    await client.map([{"a": 1}], "{a}")  # type: ignore[call-arg]  # without a model
    await client.map([{"a": 1}], "{a}", model="demo", on_engine_lost="ignore")  # type: ignore[arg-type]
    await client.unload()  # type: ignore[call-arg]
    await client.modles()  # type: ignore[attr-defined]
    anything: Any = client.model("demo")
    anything.close()
