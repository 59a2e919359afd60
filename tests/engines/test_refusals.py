"""What an engine's refusals are told as: class, message, hint, details."""

from __future__ import annotations

import json
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multidict import CIMultiDict

from llmkit.engines.base import Endpoint
from llmkit.engines.refusals import is_missing_path, passes_unchanged, redact, refusal, retry_after
from llmkit.errors import (
    ContextLengthExceeded,
    EngineRefused,
    LLMKitError,
    ModelNameNotFound,
    RateLimited,
    UpstreamFailed,
    UpstreamRefusedKey,
)

pytestmark = pytest.mark.timeout(30)

NAME = "https://api.test:443"
KEY = "sk-abcdefghijklmnop-1234567890"


def refused(
    status: int, body: Any = None, *, key: str | None = KEY, headers: dict[str, str] | None = None
) -> LLMKitError:
    """Give the error of an answer; a body that is no bytes is sent as JSON."""
    data = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
    endpoint = Endpoint(base_url="https://api.test/v1", model="gpt-3", api_key=key)
    return refusal(endpoint, NAME, status, data, CIMultiDict(headers or {}))


def said(message: str, **more: Any) -> dict[str, Any]:
    """Give an error body of OpenAI's form."""
    return {"error": {"message": message, "type": "some_error", **more}}


# -- what each status means ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind", "code"),
    [
        (300, UpstreamFailed, "upstream_failed"),
        (307, UpstreamFailed, "upstream_failed"),
        (400, EngineRefused, "engine_refused"),
        (401, UpstreamRefusedKey, "upstream_refused_key"),
        (402, UpstreamFailed, "upstream_failed"),
        (403, UpstreamRefusedKey, "upstream_refused_key"),
        (404, ModelNameNotFound, "model_name_not_found"),
        (405, UpstreamFailed, "upstream_failed"),
        (407, UpstreamFailed, "upstream_failed"),
        (408, UpstreamFailed, "upstream_failed"),
        (409, UpstreamFailed, "upstream_failed"),
        (413, EngineRefused, "engine_refused"),
        (422, EngineRefused, "engine_refused"),
        (429, RateLimited, "rate_limited"),
        (500, UpstreamFailed, "upstream_failed"),
        (502, UpstreamFailed, "upstream_failed"),
        (503, UpstreamFailed, "upstream_failed"),
        (529, UpstreamFailed, "upstream_failed"),
        (999, UpstreamFailed, "upstream_failed"),
    ],
)
@pytest.mark.parametrize("body", [None, said("some words"), b"<html>", b"\xff\xfe", b"[" * 100_000])
def test_each_status_has_its_error(status: int, kind: type[LLMKitError], code: str, body: Any) -> None:
    error = refused(status, body)
    assert type(error) is kind
    assert error.code == code
    assert error.message
    json.dumps(error.to_wire(), allow_nan=False)


@pytest.mark.parametrize("status", [401, 403])
def test_a_refused_key_is_told_without_a_word_of_the_endpoint(status: int) -> None:
    error = refused(status, said(f"Incorrect API key provided: {KEY[:8]}***{KEY[-4:]}", param="secret"))
    assert error.message == f"{NAME} refused the key ({status})."
    assert error.param == "model_kwargs.api_key"
    assert error.hint is not None
    assert "api_key that this endpoint accepts" in error.hint
    assert error.details == {}
    assert KEY[-4:] not in str(error.to_wire())


@pytest.mark.parametrize("status", [401, 403])
@pytest.mark.parametrize("key", [None, ""])
def test_where_no_key_was_sent_it_is_said_so(status: int, key: str | None) -> None:
    assert refused(status, key=key).message == f"{NAME} refused a request without a key ({status})."


@pytest.mark.parametrize("status", [400, 413, 422])
def test_what_is_wrong_with_a_request_is_told_in_the_engines_words_and_with_its_parameter(status: int) -> None:
    error = refused(status, said("temperature must be positive", param="temperature"))
    assert (error.message, error.param, error.hint) == ("temperature must be positive", "temperature", None)
    assert refused(status).message == f"{NAME} refused the request ({status})."
    assert refused(status).param is None


@pytest.mark.parametrize("param", [None, "", 7, ["a"], {"a": 1}])
def test_a_parameter_that_is_no_name_is_left_away(param: Any) -> None:
    assert refused(400, said("no", param=param)).param is None


def test_a_parameter_is_cut_and_a_key_in_it_blanked() -> None:
    assert refused(400, said("no", param="x" * 5000)).param == "x" * 200
    assert refused(400, said("no", param=f"a {KEY}")).param == "a [key]"


def test_an_unknown_model_is_told_in_the_endpoints_words_or_in_ours() -> None:
    error = refused(404, said("The model `gpt-3` does not exist"))
    assert (error.message, error.param) == ("The model `gpt-3` does not exist", "model_name")
    assert error.hint == "Check model_name and base_url."
    assert refused(404).message == f"{NAME} does not know `gpt-3`, or has no such path."


def test_a_limit_of_requests_says_when_to_come_again() -> None:
    error = refused(429, said("Rate limit reached"), headers={"Retry-After": "7"})
    assert (error.message, error.hint) == ("Rate limit reached", "Send it again in 7 s.")
    assert error.details == {"retry_after": 7.0}
    error = refused(429, headers={"Retry-After-Ms": "1500"})
    assert (error.message, error.hint) == (f"{NAME} asks to slow down.", "Send it again in 1.5 s.")
    error = refused(429, headers={"Retry-After": "soon"})
    assert (error.hint, error.details) == ("Wait a little, then send it again.", {})


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_told_without_where_it_leads(status: int) -> None:
    error = refused(status, b"<a href=https://elsewhere.test>", headers={"Location": "https://elsewhere.test"})
    assert error.message == f"{NAME} redirects elsewhere; redirects are not followed."
    assert error.hint == "Set base_url to the final address."


def test_a_failure_is_told_with_status_and_words() -> None:
    error = refused(503, said("model is loading"))
    assert (error.message, error.hint) == (f"{NAME} failed (503): model is loading", "Send it again later.")


# -- whose words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "one"}}, "one"),
        ({"error": "one"}, "one"),
        ({"message": "one"}, "one"),
        ({"object": "error", "message": "one", "type": "BadRequestError", "code": 400}, "one"),
        ({"detail": "one"}, "one"),
        ({"error": {"detail": "one"}}, "one"),
        ({"error": {"message": None, "detail": "one"}}, "one"),
        ({"error": {"message": "  one \n\n two\t three  "}}, "one two three"),
        ({"error": {"message": 7}}, "7"),
        (b"plain words", "plain words"),
        (b"  plain\r\nwords ", "plain words"),
        (b"<html>page</html>", "<html>page</html>"),
        (b"gr\xc3\xbc\xc3\x9fe \xff", "grüße \ufffd"),
    ],
)
def test_the_words_are_found_where_engines_put_them(body: Any, message: str) -> None:
    assert refused(400, body).message == message


@pytest.mark.parametrize("body", [b"", b" ", {"error": {"type": "x"}}, {"error": None}, {"error": {"message": ""}}])
def test_where_there_are_no_words_there_are_ours(body: Any) -> None:
    assert refused(400, body).message == f"{NAME} refused the request (400)."


def test_a_list_of_what_is_wrong_is_told_too() -> None:
    body = {"detail": [{"loc": ["body", "messages"], "msg": "Field required"}]}
    assert "Field required" in refused(422, body).message


@pytest.mark.parametrize("status", [400, 404, 413, 422, 429, 500, 503])
@pytest.mark.parametrize("body", [said("x" * 100_000), b"x" * 100_000])
def test_words_are_cut(status: int, body: Any) -> None:
    message = refused(status, body).message
    assert "x" * 1000 in message
    assert "x" * 1001 not in message


# -- a prompt that is too long -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "message",
    [
        "This model's maximum context length is 4097 tokens. However, your messages resulted in 5000 tokens.",
        "This model's maximum context length is 2048 tokens. However, you requested 3000 tokens in the messages.",
        "The decoder prompt (length 5000) is longer than the maximum model length of 4096.",
        "max_tokens must be at most 100, got 200: max_model_len is 512",
        "However, the model's context length is only 4096 tokens, resulting in a maximum input length of 4000 tokens.",
        "The input (5000 tokens) is longer than the model's context length (4096 tokens).",
        "prompt is too long: 200001 tokens > 200000 maximum",
        "Prompt contains 40000 tokens, too large for model with 32768 maximum context length",
        "too many tokens: total number of tokens in the prompt cannot exceed 4081",
        "This endpoint's maximum context length is 131072 tokens.",
        "CONTEXT_LENGTH exceeded",
    ],
)
@pytest.mark.parametrize("status", [400, 413, 422])
def test_a_prompt_that_is_too_long_is_known_by_the_words_of_many_engines(message: str, status: int) -> None:
    for body in (said(message), {"object": "error", "message": message}, {"detail": message}, message.encode()):
        error = refused(status, body)
        assert type(error) is ContextLengthExceeded
        assert (error.message, error.param) == (message, "prompt")
        assert error.hint == "Shorten the prompt, lower max_tokens, or load with a larger max_model_len."


@pytest.mark.parametrize("message", ["temperature is too large", "no context", "the name is too long", "tokens"])
def test_other_words_of_length_are_no_context_length(message: str) -> None:
    assert type(refused(400, said(message))) is EngineRefused


@pytest.mark.parametrize(("status", "kind"), [(404, ModelNameNotFound), (429, RateLimited), (500, UpstreamFailed)])
def test_words_of_length_count_only_where_the_request_was_wrong(status: int, kind: type[LLMKitError]) -> None:
    assert type(refused(status, said("maximum context length"))) is kind


# -- keys ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "repeated",
    [
        KEY,
        f"Bearer {KEY}",
        f'"{KEY}"',
        f"{KEY},{KEY}",
        f"{KEY[:8]}*****",
        f"{KEY[:8]}...{KEY[-4:]}",
        f"{KEY[:12]}",
        f"...{KEY[-8:]}",
        f"*****{KEY[-12:]}",
        f"{KEY[:8]}***{KEY[-8:]}",
        f"{KEY[1:]}",
        f"{KEY[:-1]}",
    ],
)
@pytest.mark.parametrize("status", [400, 404, 413, 422, 429, 500])
def test_a_key_and_what_begins_or_ends_like_it_is_blanked(status: int, repeated: str) -> None:
    error = refused(status, said(f"the key {repeated} is wrong", param=repeated))
    told = json.dumps(error.to_wire())
    assert error.message.endswith(" is wrong")
    assert "the key [key]" in error.message or "the key Bearer [key]" in error.message or '"[key]"' in error.message
    for part in (KEY[:8], KEY[-8:]):
        assert part not in told


@given(before=st.text(max_size=20), after=st.text(max_size=20), key=st.from_regex(r"[\x21-\x7e]{1,40}", fullmatch=True))
def test_a_whole_key_is_never_left_in_any_words(before: str, after: str, key: str) -> None:
    blanked = redact(before.replace("[key]", "") + key + after.replace("[key]", ""), key)
    assert key in "[key]" or key not in blanked.replace("[key]", "\n")


@given(key=st.from_regex(r"[A-Za-z0-9_-]{9,80}", fullmatch=True), data=st.data())
def test_eight_or_more_characters_of_an_end_of_a_key_are_never_left(key: str, data: st.DataObject) -> None:
    length = data.draw(st.integers(8, len(key)))
    for part in (key[:length], key[-length:]):
        assert part not in redact(f"wrong key: {part}... try again", key).replace("[key]", "\n")


@pytest.mark.parametrize("key", ["k", "12345678"])
def test_of_a_short_key_only_the_whole_is_blanked(key: str) -> None:
    assert redact(f"<{key}>", key) == "<[key]>"
    assert redact("1234567", "12345678") == "1234567"


def test_a_key_of_signs_is_no_pattern() -> None:
    assert redact("aaaaaaaaaaaa", ".*.*.*.*.*") == "aaaaaaaaaaaa"
    assert redact("x (((((((((( y", "((((((((((") == "x [key] y"


@pytest.mark.parametrize("word", ["x" * (1 << 20), KEY[:7] * (1 << 17), KEY[-7:] * (1 << 17), f"{KEY} " * (1 << 15)])
def test_very_long_words_are_looked_through_soon(word: str) -> None:
    begun = time.monotonic()
    assert KEY not in redact(word, KEY)
    assert time.monotonic() - begun < 5


@pytest.mark.parametrize("key", [None, ""])
def test_without_a_key_nothing_is_blanked(key: str | None) -> None:
    assert redact("as it was", key) == "as it was"


# -- paths that are missing, answers that are the client's ---------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "body", "missing"),
    [
        (404, b'{"detail": "Not Found"}', True),
        (404, b'{"detail":"Not Found"}', True),
        (404, b"<html><h1>404 Not Found</h1></html>", True),
        (404, b"404 page not found", True),
        (404, b"", True),
        (404, b"[]", True),
        (404, b"null", True),
        (404, b'{"error": null}', True),
        (404, b"[" * 100_000, True),
        (404, b"\xff\xfe", True),
        (404, b'{"error": {"message": "The model `x` does not exist.", "code": 404}}', False),
        (404, b'{"error": {}}', False),
        (404, b'{"error": "model \'x\' not found"}', False),
        (405, b'{"detail": "Method Not Allowed"}', True),
        (405, b'{"error": {"message": "Method not allowed"}}', True),
        (405, b"", True),
        (400, b'{"detail": "Not Found"}', False),
        (410, b"", False),
        (500, b'{"detail": "Not Found"}', False),
        (501, b"", False),
    ],
)
def test_a_path_that_an_engine_lacks_is_told_from_a_model_that_it_lacks(
    status: int, body: bytes, missing: bool
) -> None:
    assert is_missing_path(status, body) is missing


def test_what_is_wrong_with_a_request_passes_and_what_concerns_us_does_not() -> None:
    ours = {401, 402, 403, 407, 408, 429}
    for status in range(100, 1000):
        assert passes_unchanged(status) is (400 <= status < 500 and status not in ours), status


# -- when to come again --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({}, None),
        ({"Retry-After": "0"}, 0),
        ({"Retry-After": "12"}, 12),
        ({"Retry-After": " 12 "}, 12),
        ({"retry-after": "12"}, 12),
        ({"Retry-After": "100000"}, 86_400),
        ({"Retry-After": "9" * 300}, 86_400),
        ({"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}, 0),
        ({"Retry-After": "Wed, 21 Oct 2015 09:28:00 +0200"}, 0),
        ({"Retry-After": "Fri, 31 Dec 2999 23:59:59 GMT"}, 86_400),
        ({"retry-after-ms": "250"}, 0.25),
        ({"retry-after-ms": "0"}, 0),
        ({"retry-after-ms": "1.5"}, 0.0015),
        ({"retry-after-ms": "-5"}, 0),
        ({"retry-after-ms": "1e300"}, 86_400),
        ({"retry-after-ms": "250", "Retry-After": "7"}, 0.25),
        ({"retry-after-ms": "", "Retry-After": "7"}, 7),
    ],
)
def test_when_to_come_again_is_read_in_all_its_forms(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(CIMultiDict(headers)) == seconds


@pytest.mark.parametrize(
    "value", ["", " ", "soon", "1,5", "½", "²", "Wed, 99 Foo 2015", "0x10", "\udcff", "1 2 3", "nan", "inf", "9" * 5000]
)
@pytest.mark.parametrize("name", ["Retry-After", "retry-after-ms"])
def test_nonsense_is_no_time_to_come_again(name: str, value: str) -> None:
    assert retry_after({name: value}) is None
    error = refused(429, headers={name: value})
    assert (error.hint, error.details) == ("Wait a little, then send it again.", {})


def test_a_time_that_has_passed_is_now_and_a_number_below_none_is_nonsense() -> None:
    assert retry_after({"Retry-After": "-1"}) is None
    assert retry_after({"retry-after-ms": "-1"}) == 0


@pytest.mark.parametrize("seconds", [2, 3600, 90_000])
def test_a_date_is_as_far_as_it_is_from_now(seconds: int) -> None:
    date = format_datetime(datetime.now(UTC) + timedelta(seconds=seconds), usegmt=True)
    found = retry_after({"Retry-After": date})
    assert found is not None
    assert min(seconds, 86_400) - 2 <= found <= min(seconds, 86_400)


def of_api(status: int, body: bytes) -> LLMKitError:
    return refusal(Endpoint("https://api.test/v1", "m"), "X", status, body, {})


def test_a_time_in_milliseconds_that_is_nonsense_does_not_hide_a_good_one() -> None:
    assert retry_after({"retry-after-ms": "soon", "Retry-After": "7"}) == 7


def test_a_time_may_have_a_fraction() -> None:
    assert retry_after({"Retry-After": "1.5"}) == 1.5


def test_a_failure_without_words_ends_with_its_status() -> None:
    assert of_api(500, b"").message == "X failed (500)."


@pytest.mark.parametrize(
    "error",
    [
        # Groq
        {"message": "Please reduce the length of the messages.", "code": "context_length_exceeded"},
        # llama.cpp
        {"message": "request (5000 tokens) exceeds the available context size (4096 tokens)", "code": 400},
        {"message": "too much", "type": "exceed_context_size_error"},
        # TGI
        "Input validation error: `inputs` tokens + `max_new_tokens` must be <= 4096. Given: 5000",
        # Gemini
        {"message": "The input token count (1200000) exceeds the maximum number of tokens allowed (1048576)."},
        # Bedrock
        {"message": "Input is too long for requested model."},
    ],
)
def test_a_prompt_that_is_too_long_is_known_by_more_words(error: Any) -> None:
    assert type(of_api(400, json.dumps({"error": error}).encode())) is ContextLengthExceeded


def test_orders_to_a_terminal_are_not_passed_on() -> None:
    error = refused(500, said(f"\x1b[36mray::Replica\x1b[39m\x07 of {KEY[:9]}\x1b[1m{KEY[9:]}\r\nended"))
    assert error.message == f"{NAME} failed (500): ray::Replica of [key] ended"
