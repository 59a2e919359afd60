from __future__ import annotations

from typing import Any

import pytest

from llmkit.engines.base import Endpoint
from llmkit.errors import DoesNotFit, ParameterForbidden
from llmkit.inference.reserving import RESERVED_TOKENS, answer_bound, check_bounded, most_tokens, with_bound

HERE = Endpoint(base_url="http://127.0.0.1:1/v1", model="m")
OPENAI = Endpoint(base_url="https://api.openai.com/v1", model="m")


@pytest.mark.parametrize(
    ("asked", "most"),
    [
        ({"prompt": ""}, 16 + 50),
        ({"prompt": "héllo"}, 16 + 6 + 50),
        ({"prompt": "", "n": 3}, 16 + 150),
        ({"prompt": "", "n": 2, "best_of": 4}, 16 + 200),
        ({"prompt": [1, 2, 3]}, 16 + 3 + 50),
        ({"prompt": ["ab", "c"]}, 16 + 3 + 100),
        ({"prompt": [[1, 2], [3]], "n": 2}, 16 + 3 + 200),
        ({"prompt": []}, 16 + 50),
        ({"messages": [{"role": "user", "content": "abc"}]}, 16 + 16 + 4 + 3 + 50),
        ({"messages": [{"image_url": {"url": "data:" + "x" * 100_000}}]}, 16 + 16 + 4096 + 50),
        ({"messages": [{"input_audio": {"data": "x" * 100}}]}, 16 + 16 + 16 + 100 + 50),
        ({"input": "data:" + "x" * 100_000}, 16 + 100_005 + 50),
        ({"prompt": "", "tools": [{"name_that_is_a_key": 1.5}]}, 16 + 2 * len('[{"name_that_is_a_key":1.5}]') + 50),
        ({"prompt": "", "response_format": None}, 16 + 50),
    ],
)
def test_the_most_that_a_request_takes(asked: dict[str, Any], most: int) -> None:
    assert most_tokens(asked, 50) == most


@pytest.mark.parametrize(
    ("api", "asked", "bound"),
    [
        ("chat/completions", {"max_tokens": 5}, 5),
        ("chat/completions", {"max_tokens": 50, "max_completion_tokens": 5}, 50),
        ("chat/completions", {"max_tokens": 5, "max_completion_tokens": 50}, 50),
        ("chat/completions", {"max_output_tokens": 1}, 20),  # no engine reads that here
        ("chat/completions", {"max_tokens": None}, 20),
        ("completions", {"max_completion_tokens": 5}, 20),
        ("responses", {"max_output_tokens": 7, "max_tokens": 1}, 7),
        ("inference", {"max_completion_tokens": 9}, 9),
        ("embeddings", {"max_tokens": 9}, 0),
    ],
)
def test_what_bounds_an_answer(api: str, asked: dict[str, Any], bound: int) -> None:
    assert answer_bound(api, asked, {"max_tokens": 20}) == bound
    if bound == 20:
        assert answer_bound(api, asked, {}) == RESERVED_TOKENS


@pytest.mark.parametrize("value", [True, False, 0, -1, 5.0, 5000.5, "5000", [5]])
@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens", "n"])
def test_a_bound_that_engines_read_differently_is_refused(name: str, value: object) -> None:
    with pytest.raises(DoesNotFit, match=f"inference_kwargs.{name}"):
        check_bounded("inference", {name: value}, "inference_kwargs")
    check_bounded("inference", {name: None})
    check_bounded("inference", {name: 1 << 40})
    check_bounded("embeddings", {name: value})  # nothing is generated


@pytest.mark.parametrize("name", ["previous_response_id", "conversation", "background", "n_predict", "max_new_tokens"])
def test_what_has_no_bound_is_refused(name: str) -> None:
    with pytest.raises(ParameterForbidden, match="tokens are limited"):
        check_bounded("responses", {name: "x"})
    check_bounded("responses", {name: None})


@pytest.mark.parametrize(
    ("api", "endpoint", "name"),
    [
        ("chat/completions", HERE, "max_tokens"),
        ("chat/completions", OPENAI, "max_completion_tokens"),
        ("completions", OPENAI, "max_tokens"),
        ("responses", OPENAI, "max_output_tokens"),
    ],
)
def test_an_answer_that_nobody_bounds_is_bounded_by_the_name_that_is_known(
    api: str, endpoint: Endpoint, name: str
) -> None:
    # Null is no bound, and the default of a fallback may be more than was reserved.
    body = {"model": "m", "max_tokens": 9000, "max_output_tokens": 9000}
    sent = with_bound(api, body, {"max_tokens": None}, 30, endpoint, None)
    assert sent[name] == 30
    if api == "chat/completions":
        assert ("max_tokens" in sent) == (name == "max_tokens")
    assert with_bound(api, body, {name: 9000}, 30, endpoint, None) == body
    assert with_bound(api, body, {}, None, endpoint, None) == body
    assert with_bound(api, body, {}, 30, endpoint, 40)[name] == 20
    assert with_bound("embeddings", body, {}, 0, endpoint, None) == body
