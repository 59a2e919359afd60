from __future__ import annotations

import re

import pytest

from llmkit import errors


def test_every_code_is_given_once_and_drawn_in_the_tree() -> None:
    classes = list(errors.walk())
    codes = [cls.code for cls in classes if cls.__module__ == "llmkit.errors"]
    assert len(codes) == len(set(codes))
    drawn = re.findall(r"[├└]── (\w+)", errors.__doc__ or "")
    ours = [c.__name__ for c in classes if c.__module__ == "llmkit.errors" and c is not errors.LLMKitError]
    assert sorted(drawn) == sorted(ours)
    for cls in classes:
        if cls.__module__ == "llmkit.errors":
            assert re.search(rf"{cls.__name__}\s+.*{cls.code}", errors.__doc__ or ""), cls


@pytest.mark.parametrize("cls", [c for c in errors.walk() if c.__module__ == "llmkit.errors"])
def test_an_error_crosses_the_wire_as_itself(cls: type[errors.LLMKitError]) -> None:
    sent = cls("What went wrong.", hint="What to do.", param="field", details={"limit": 3})
    received = errors.from_wire(sent.status, sent.to_wire())
    assert type(received) is cls
    assert (received.message, received.hint, received.param, received.details) == (
        "What went wrong.",
        "What to do.",
        "field",
        {"limit": 3},
    )
    assert str(received) == "What went wrong.\nWhat to do."


@pytest.mark.parametrize(
    ("status", "body", "cls"),
    [
        (404, "<html>", errors.NotFound),
        (403, {"message": "Forbidden", "reason": None}, errors.NotAllowed),
        (418, None, errors.LLMKitError),
        (409, {"error": {"code": "from_a_later_version", "message": "x"}}, errors.WrongState),
        (400, {"error": "text"}, errors.MalformedRequest),
    ],
)
def test_any_answer_becomes_some_error(status: int, body: object, cls: type[errors.LLMKitError]) -> None:
    assert type(errors.from_wire(status, body)) is cls
