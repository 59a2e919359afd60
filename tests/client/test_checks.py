"""A configuration checked by the real server, as a form asks for it while somebody types."""

from __future__ import annotations

import time

import pytest

from llmkit.client import Client
from llmkit.errors import ConfigurationExists, DoesNotFit


def test_a_check_gives_the_plan_of_a_load_and_stores_nothing(client: Client) -> None:
    before = client.configurations()
    plan = client.check("checked", "gpt-3", "openai", {"temperature": 0.5}, description="a test")
    assert plan is not None
    assert (plan.model_id, plan.config_id, plan.estimate, plan.fits) == ("checked", "", None, True)
    with pytest.raises(DoesNotFit) as raised:
        client.check("checked", "", "openai", {"temprature": 1})
    assert raised.value.details["fields"]
    assert client.configurations() == before


def test_a_check_of_a_replacement_names_the_configuration(client: Client) -> None:
    made = client.configure("checked", "gpt-3", "openai")
    with pytest.raises(ConfigurationExists):
        client.check("checked", "gpt-4", "openai")
    plan = client.check("checked", "gpt-4", "openai", config_id=made.config_id, reload=True)
    assert plan is not None
    assert plan.config_id == made.config_id
    assert client.configuration(made.config_id) == made


@pytest.mark.alone
def test_a_check_is_quick_enough_for_somebody_who_types(client: Client) -> None:
    seconds = []
    for size in range(20):
        started = time.perf_counter()
        client.check("checked", "llmkit/demo", "vllm", {"max_model_len": 128 + size})
        seconds.append(time.perf_counter() - started)
    print(f"a check: {sorted(seconds)[10] * 1e3:.1f} ms, at most {max(seconds) * 1e3:.1f} ms")
    assert sorted(seconds)[10] < 0.2
