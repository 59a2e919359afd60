from __future__ import annotations

import json
import time
from collections.abc import Callable
from typing import Any

import ipywidgets as w
import pytest
from mock_upstream import MockUpstream
from support import wait_until

from llmkit.client import Client, Configuration
from llmkit.errors import DoesNotFit, NotReady
from llmkit.panel.configure_tab import ConfigureTab
from llmkit.panel.desk import Desk
from llmkit.panel.fields import Field
from llmkit.panel.form_values import ENGINE, GENERATION, OWN, Place
from llmkit.panel.key_field import KeyField
from llmkit.panel.lane import Lane
from llmkit.panel.widgets import Kit
from llmkit.schemas import LoadPlan, MemoryEstimate

CANARY = "sk-canary-Zq3vT8wL"
QUIET = 0.05


class Page:
    """Stands for the page of a key field: keeps what is typed, as its JavaScript does."""

    def __init__(self, field: KeyField) -> None:
        self.typed = ""
        self._field = field
        field.send = self.receive

    def type(self, text: str) -> None:
        self.typed = text
        self._field._receive(None, {"type": "typed", "any": bool(text)}, None)

    def receive(self, message: dict[str, Any]) -> None:
        if message["type"] == "forget":
            self.typed = ""
        else:
            answer = {"type": "key", "request": message["request"], "value": self.typed}
            self._field._receive(None, answer, None)


class Person:
    """Does what a person does with the tab."""

    page: Page
    """Of the key field."""

    def __init__(self, client: Client, lane: Lane, may: frozenset[str]) -> None:
        self.client = client
        self.lane = lane
        self.shown_models = 0
        desk = Desk(client, lane, Kit(), may, *[lambda *_: None] * 5)
        desk.open_models = self._count
        self.tab = ConfigureTab(desk)
        types = client.model_types()
        lane.call(lambda: self.tab.offer(types))
        self.settle()

    def _count(self) -> None:
        self.shown_models += 1

    def settle(self) -> None:
        assert self.lane.settle(5)

    @property
    def fields(self) -> dict[Place, Field]:
        return dict(self.tab.form.fields)

    def field(self, name: str, part: str = "") -> Field:
        return next(f for (where, what), f in self.fields.items() if what == name and part in ("", where))

    def choose(self, name: str) -> None:
        self.tab.form.model_type.value = name
        self.settle()

    def fold(self, title: str) -> Any:
        return next(section for section in self.tab.form.sections if section.title == title)

    def press_fold(self, title: str) -> None:
        self.fold(title).header.click()
        self.settle()

    def fill(self, **values: Any) -> None:
        for name, value in values.items():
            self.field(name.replace("__", ".")).control.value = value

    def open(self, config_id: str, *, as_copy: bool = False) -> None:
        self.lane.call(lambda: self.tab.open(config_id, as_copy=as_copy))

    def edit(self, config_id: str) -> None:
        self.open(config_id)
        wait_until(lambda: "Editing" in self.tab._what.value, "the configuration in the form", 5)
        self.settle()

    def duplicate(self, config_id: str) -> None:
        self.open(config_id, as_copy=True)
        wait_until(lambda: "A copy of" in self.tab._what.value, "the copy in the form", 5)
        self.settle()

    def press(self, button: w.Button) -> None:
        assert not hidden(button)
        button.click()
        self.settle()

    def save(self, button: w.Button | None = None) -> None:
        self.press(button or self.tab.save)
        wait_until(lambda: "is saved" in self.tab._result.value, "the note", 5)
        self.settle()

    def complaint(self, name: str, part: str = "") -> str:
        return str(self.field(name, part)._error.value).lower()

    def wait_for_complaint(self, name: str, text: str) -> None:
        wait_until(lambda: text.lower() in self.complaint(name), f"{text} at {name}", 5)


def hidden(widget: w.DOMWidget) -> bool:
    return "llmkit-hidden" in widget._dom_classes


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("llmkit.panel.form_check.QUIET_SECONDS", QUIET)


@pytest.fixture
def person(client: Client, lane: Lane) -> Person:
    """Give a person before an empty form, set to an openai model."""
    made = Person(client, lane, frozenset({"read", "execute", "write"}))
    made.choose("openai")
    made.page = Page(made.field("api_key").control)
    return made


@pytest.fixture
def stored(client: Client, upstream: MockUpstream) -> Configuration:
    """Give a configuration with something of everything."""
    return client.configure(
        "full",
        "gpt-3",
        "openai",
        {
            "base_url": upstream.base_url,
            "api_key": CANARY,
            "engine": {"max_retries": 1},
            "generation": {"temperature": 0.25, "stop": ["a", "b"], "seed": 7},
        },
        description="two\nlines",
        auto_load=True,
        idle_ttl=90.5,
        restart="on_failure",
        max_in_flight=3,
        max_queued=0,
        prices={"input": 1.0, "output": 2.5, "currency": "EUR"},
        fallback="other",
    )


def models_of(client: Client) -> list[str]:
    return [one.model_id for one in client.configurations()]


# -- a new one -----------------------------------------------------------------------------------------------------


def test_the_form_makes_the_configuration_that_was_entered(person: Person, upstream: MockUpstream) -> None:
    for title in ("Generation defaults", "Policies", "More engine arguments"):
        person.press_fold(title)
    person.fill(model_id="formed", model_name="gpt-3", base_url=upstream.base_url, temperature="0.25")
    person.fill(max_retries="4", description="For tests.", auto_load=True, idle_ttl="-1", restart="on_failure")
    person.fill(max_in_flight="2", max_queued="5", prices__input="1", prices__output="2.5", fallback="other")
    person.save()
    made = person.client.configuration(person.client.model("formed").config_id)
    assert made.model_kwargs == {"base_url": upstream.base_url, "temperature": 0.25, "max_retries": 4}
    assert (made.description, made.auto_load, made.idle_ttl, made.restart) == ("For tests.", True, -1, "on_failure")
    assert (made.max_in_flight, made.max_queued, made.fallback) == (2, 5, "other")
    assert made.prices is not None
    assert made.prices.model_dump() == {"input": 1.0, "output": 2.5, "currency": "USD"}
    assert person.client.model("formed").status == "unloaded"
    assert not any(field.is_set for field in person.fields.values())
    assert not person.tab.form.is_changed
    assert person.shown_models == 0


def test_what_was_saved_is_still_said_when_the_empty_form_has_been_looked_at(
    person: Person, upstream: MockUpstream
) -> None:
    person.fill(model_id="formed", model_name="gpt-3", base_url=upstream.base_url)
    person.save()
    time.sleep(QUIET * 4)
    person.settle()
    assert "formed is saved." in person.tab._result.value
    assert person.complaint("model_id") == ""


def test_what_is_typed_while_it_is_saved_stays(
    person: Person, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure = person.client.configure

    def slowly(**body: Any) -> Configuration:
        person.fill(temperature="0.5")
        return configure(**body)

    person.press_fold("Generation defaults")
    person.fill(model_id="formed", model_name="gpt-3", base_url=upstream.base_url)
    monkeypatch.setattr(person.client, "configure", slowly)
    person.save()
    assert "temperature" not in person.client.configuration(person.client.model("formed").config_id).model_kwargs
    assert person.field("temperature").control.value == "0.5"
    time.sleep(QUIET * 4)  # what was typed is checked now, which must not hide the note
    person.settle()
    assert "still here" in person.tab._result.value
    person.fill(temperature="0.6")
    wait_until(lambda: not person.tab._result.value, "the end of the note when more is typed", 5)


def test_save_and_load_does_both_and_shows_the_models(person: Person, upstream: MockUpstream) -> None:
    person.fill(model_id="formed", model_name="gpt-3", base_url=upstream.base_url)
    person.save(person.tab.save_and_load)
    wait_until(lambda: person.client.model("formed").status == "loaded", "the load", 5)
    assert person.shown_models == 1


def test_what_is_missing_is_said_at_its_field_until_it_is_there(person: Person) -> None:
    person.press(person.tab.save)
    assert "is missing" in person.complaint("model_id")
    assert "is missing" in person.complaint("model_name")
    assert not person.tab.save.disabled
    person.fill(model_name="gpt-3")
    wait_until(lambda: person.complaint("model_name") == "", "the end of the complaint", 5)
    assert "is missing" in person.complaint("model_id")


def test_a_name_of_two_parts_goes_to_the_part_that_was_meant(person: Person) -> None:
    person.choose("vllm")
    for title in ("More engine arguments", "Generation defaults"):
        person.press_fold(title)
    person.fill(model_id="formed", model_name="llmkit/demo")
    person.field("seed", ENGINE).control.value = "1"
    person.field("seed", GENERATION).control.value = "2"
    person.save()
    made = person.client.configuration(person.client.model("formed").config_id)
    assert made.model_kwargs == {"engine": {"seed": 1}, "seed": 2}


def test_a_key_reaches_the_endpoint_and_nothing_else(
    person: Person, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    upstream.key = CANARY
    page = person.page
    person.fill(model_id="formed", model_name="gpt-3", base_url=upstream.base_url)
    page.type(CANARY)
    checked: list[Any] = []
    monkeypatch.setattr(person.client, "check", lambda **body: checked.append(body))
    person.fill(model_name="gpt-3.5")
    wait_until(lambda: checked, "the check", 5)
    person.fill(model_name="gpt-3")
    person.save(person.tab.save_and_load)
    wait_until(lambda: person.client.model("formed").status == "loaded", "the load", 5)
    assert upstream.requests[-1][1]["Authorization"] == f"Bearer {CANARY}"
    assert page.typed == ""
    assert CANARY not in repr(checked)
    assert CANARY not in json.dumps(w.Widget.get_manager_state(), default=str)
    assert CANARY not in repr(person.tab._code.widget._code)
    assert CANARY not in repr(person.client.configurations())


def test_a_key_of_a_refused_configuration_need_not_be_typed_again(person: Person, upstream: MockUpstream) -> None:
    page = person.page
    page.type(CANARY)
    person.fill(model_id="formed", model_name="gpt-3", base_url="nonsense")
    person.press(person.tab.save)
    person.wait_for_complaint("base_url", "http")
    assert page.typed == CANARY
    person.fill(base_url=upstream.base_url)
    person.save()
    made = person.client.configuration(person.client.model("formed").config_id)
    assert made.model_kwargs["api_key"]["secret"] is True


def test_a_page_that_does_not_answer_is_said_and_the_form_stays_usable(
    person: Person, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.panel.key_field.ANSWER_SECONDS", 0.05)
    person.page.type(CANARY)
    control = person.field("api_key").control
    control.send = lambda message: None
    person.fill(model_id="formed", model_name="gpt-3")
    person.press(person.tab.save)
    wait_until(lambda: "Reload the page" in person.tab._result.value, "the complaint", 2)
    assert not person.tab.save.disabled


def test_start_anew_empties_the_form_after_asking(person: Person) -> None:
    page = person.page
    page.type(CANARY)
    person.fill(model_id="draft")
    person.press(person.tab.start_anew)
    assert "not saved" in person.tab._question.value
    person.press(person.tab.keep)
    assert hidden(person.tab._confirmation)
    assert (person.field("model_id").control.value, page.typed) == ("draft", CANARY)
    person.press(person.tab.start_anew)
    person.press(person.tab.throw_away)
    assert (person.field("model_id").control.value, page.typed) == ("", "")
    assert hidden(person.tab._confirmation)
    person.press(person.tab.start_anew)  # nothing to lose: nothing to ask
    assert hidden(person.tab._confirmation)


# -- types and folds -----------------------------------------------------------------------------------------------


def test_another_type_brings_its_own_fields_and_nothing_is_lost_on_the_way_there_and_back(person: Person) -> None:
    person.fill(model_id="kept", model_name="kept-too", base_url="http://127.0.0.1:9/v1")
    person.press_fold("Generation defaults")
    person.fill(temperature="0.5")
    person.choose("vllm")
    assert (ENGINE, "dtype") in person.fields
    assert (ENGINE, "api_key") not in person.fields
    assert person.field("model_id").control.value == "kept"
    assert person.field("temperature").control.value == "0.5"
    assert "base_url" not in person.tab.form.body()["model_kwargs"]
    person.choose("openai")
    assert person.field("base_url").control.value == "http://127.0.0.1:9/v1"


def test_folds_open_close_and_say_which(person: Person) -> None:
    policies = person.fold("Policies")
    assert policies.fields == {}
    assert policies.header.tooltip == "Policies: press to show"
    person.press_fold("Policies")
    assert {name for part, name in policies.fields if part == OWN} == {
        "description",
        "auto_load",
        "idle_ttl",
        "restart",
        "max_in_flight",
        "max_queued",
        "prices.input",
        "prices.output",
        "prices.currency",
        "fallback",
    }
    assert policies.header.tooltip == "Policies: shown, press to hide"
    assert "llmkit-open" in policies.header._dom_classes
    person.press_fold("Policies")
    assert hidden(policies.body)
    assert "llmkit-open" not in policies.header._dom_classes


def test_who_may_not_configure_is_told_so_and_gets_no_form(client: Client, lane: Lane) -> None:
    person = Person(client, lane, frozenset({"read", "execute"}))
    (line,) = person.tab.widget.children
    assert "not configure" in line.value
    person.open("anything", as_copy=True)
    person.settle()
    assert person.tab._what.value == ""


# -- checked while it is filled ------------------------------------------------------------------------------------


def test_the_servers_words_come_while_a_person_types_and_go_again(person: Person, upstream: MockUpstream) -> None:
    person.fill(base_url="nonsense")
    person.wait_for_complaint("base_url", "http")
    assert "llmkit-wrong" in person.field("base_url").control._dom_classes
    # What nobody has come to yet is not wrong.
    assert (person.complaint("model_id"), person.complaint("model_name")) == ("", "")
    person.fill(base_url=upstream.base_url, model_id="not a name")
    person.wait_for_complaint("model_id", "does not fit")
    person.fill(model_id="a-name")
    wait_until(lambda: person.complaint("model_id") == person.complaint("base_url") == "", "no complaint", 5)
    assert "a-name" not in models_of(person.client)


def test_a_field_that_is_emptied_again_is_missing(person: Person) -> None:
    person.fill(model_id="a", model_name="b")
    person.fill(model_id="")
    person.wait_for_complaint("model_id", "is missing")


def test_every_wrong_field_is_named_in_its_own_part(person: Person) -> None:
    person.choose("vllm")
    for title in ("More engine arguments", "Generation defaults"):
        person.press_fold(title)
    person.field("seed", ENGINE).control.value = "-1"
    person.field("seed", GENERATION).control.value = "many"
    person.fill(max_model_len="x", temperature="9")
    person.wait_for_complaint("temperature", "less than or equal to 2")
    assert "greater than or equal to 0" in person.complaint("seed", ENGINE)
    assert "valid integer" in person.complaint("seed", GENERATION)
    assert "valid integer" in person.complaint("max_model_len")


def test_a_wrong_name_does_not_hide_what_else_is_wrong(person: Person) -> None:
    person.press_fold("Policies")
    person.fill(model_id="not a name", base_url="nonsense", max_queued="many")
    person.press_fold("More engine arguments")
    person.fill(max_retries="99")
    person.wait_for_complaint("max_retries", "less than or equal to 10")
    assert "does not fit" in person.complaint("model_id")
    assert "valid integer" in person.complaint("max_queued")
    assert person.complaint("model_name") == ""


def test_a_name_that_is_taken_is_said_at_the_name(person: Person, configure: Callable[[str], None]) -> None:
    configure("formed")
    person.fill(model_id="formed", model_name="gpt-4o-mini")
    person.wait_for_complaint("model_id", "configured already")
    assert "put /llm" not in person.complaint("model_id")
    person.press(person.tab.save)
    wait_until(lambda: "another value" in person.tab._result.value, "the refusal", 5)


def test_words_about_no_field_stand_under_the_form(person: Person) -> None:
    tab = person.tab
    odd = DoesNotFit("x", hint="Do <that>.", details={"fields": [{"path": "elsewhere", "message": "is odd"}]})
    tab._refused(odd)
    assert "elsewhere: is odd" in tab._result.value
    assert "Do &lt;that&gt;." in tab._result.value
    tab._refused(NotReady("The server is stopping."))
    assert "The server is stopping." in tab._result.value
    tab._check_failed(NotReady("The server is stopping."))
    assert "The server is stopping." in tab._problem.value


def test_what_a_load_takes_is_said_before_it(person: Person) -> None:
    person.choose("vllm")
    person.fill(model_id="new", model_name="llmkit/demo")
    wait_until(lambda: "Will take" in person.tab._memory.value, "the estimate", 5)
    assert not hidden(person.tab._memory)
    person.fill(max_model_len="x")
    wait_until(lambda: "llmkit-stale" in person.tab._memory._dom_classes, "the mark of an old estimate", 5)
    person.fill(max_model_len="")
    wait_until(lambda: "llmkit-stale" not in person.tab._memory._dom_classes, "the new estimate", 5)
    person.choose("openai")
    wait_until(lambda: hidden(person.tab._memory), "the end of the estimate", 5)


def test_an_answer_about_an_older_form_is_not_shown(person: Person, monkeypatch: pytest.MonkeyPatch) -> None:
    plans = {"old": 1 << 30, "new": 2 << 30}
    asked: list[str] = []

    def answer(model_name: str, **_: Any) -> LoadPlan:
        asked.append(model_name)
        time.sleep(0.5 if model_name == "old" else 0)
        estimate = MemoryEstimate(device="cpu", total_bytes=plans[model_name])
        return LoadPlan(model_id="m", config_id="", estimate=estimate, fits=True)

    monkeypatch.setattr(person.client, "check", answer)
    seen: list[str] = []
    person.tab._memory.observe(lambda change: seen.append(change["new"]), "value")
    person.fill(model_id="m", model_name="old")
    wait_until(lambda: asked == ["old"], "the first check", 5)
    person.fill(model_name="new")
    wait_until(lambda: "2.0 GiB" in person.tab._memory.value, "the estimate", 5)
    assert asked == ["old", "new"]
    assert not any("1.0 GiB" in one for one in seen)


# -- as code -------------------------------------------------------------------------------------------------------


def shown_code(person: Person) -> str:
    return "\n".join(code.python + code.curl for _, code in person.tab._code.widget._code)


def test_the_form_is_shown_as_code_without_its_key(person: Person, upstream: MockUpstream) -> None:
    person.page.type(CANARY)
    person.fill(model_id="coded", model_name="gpt-3", base_url=upstream.base_url)
    wait_until(lambda: "client.configure" in shown_code(person), "the code", 5)
    assert upstream.base_url in shown_code(person)
    assert "The key is left out" in shown_code(person)
    assert "typed" not in shown_code(person)


def test_a_change_is_shown_as_code_too(person: Person, stored: Configuration) -> None:
    person.edit(stored.config_id)
    wait_until(lambda: "client.update" in shown_code(person), "the code", 5)
    person.fill(description="")
    wait_until(lambda: "description=None" in shown_code(person), "the code of the change", 5)


# -- edit ----------------------------------------------------------------------------------------------------------


def test_editing_shows_everything_and_saving_it_unchanged_changes_nothing(
    person: Person, stored: Configuration
) -> None:
    person.edit(stored.config_id)
    shown = {name: field.control.value for (_, name), field in person.fields.items() if hasattr(field.control, "value")}
    expected = {
        "model_id": "full",
        "max_retries": "1",
        "temperature": "0.25",
        "stop": '["a", "b"]',
        "seed": "7",
        "description": "two\nlines",
        "auto_load": True,
        "idle_ttl": "90.5",
        "restart": "on_failure",
        "max_in_flight": "3",
        "max_queued": "0",
        "prices.input": "1.0",
        "prices.output": "2.5",
        "prices.currency": "EUR",
        "fallback": "other",
    }
    assert {name: shown[name] for name in expected} == expected
    assert person.field("model_id").control.disabled
    assert "a key is stored" in person.field("api_key").control.placeholder
    assert not hidden(person.fold("Policies").body)
    assert not person.tab.form.is_changed
    person.save()
    assert person.client.configuration(stored.config_id) == stored
    assert hidden(person.tab._editing_row)
    assert not person.field("model_id").control.disabled


def test_what_is_changed_or_emptied_is_changed_or_removed_and_all_else_stays(
    person: Person, stored: Configuration
) -> None:
    person.edit(stored.config_id)
    person.fill(temperature="0.75", stop="", description="", max_queued="9", prices__input="")
    person.fill(prices__output="", prices__currency="")
    person.save()
    told = person.client.configuration(stored.config_id).to_wire()
    expected = stored.to_wire()
    expected["model_kwargs"]["generation"] = {"temperature": 0.75, "seed": 7}
    expected["max_queued"] = 9
    del expected["description"], expected["prices"]
    assert told == expected


def test_a_stored_key_can_be_replaced_and_removed(person: Person, stored: Configuration) -> None:
    person.edit(stored.config_id)
    person.page.type("sk-another")
    person.save()
    replaced = person.client.configuration(stored.config_id).model_kwargs["api_key"]
    assert replaced["secret"] is True
    assert replaced != stored.model_kwargs["api_key"]
    person.edit(stored.config_id)
    forget = person.field("api_key").forget
    assert forget is not None
    person.press(forget)
    assert person.tab.form.is_changed
    person.save()
    assert "api_key" not in person.client.configuration(stored.config_id).model_kwargs


def test_a_page_that_has_lost_a_new_key_leaves_the_stored_one(person: Person, stored: Configuration) -> None:
    person.edit(stored.config_id)
    person.page.type("sk-another")
    person.page.typed = ""
    person.save()
    assert person.client.configuration(stored.config_id) == stored


def test_another_address_asks_for_its_key_until_one_is_typed(person: Person, stored: Configuration) -> None:
    person.edit(stored.config_id)
    page = person.page
    person.fill(base_url="http://127.0.0.1:9/v1")
    person.wait_for_complaint("api_key", "The stored key is for")
    page.type("sk-another")
    wait_until(lambda: person.complaint("api_key") == "", "the end of the complaint", 5)


def test_values_that_the_form_has_no_field_for_are_kept(person: Person, stored: Configuration) -> None:
    form = person.tab.form
    told = stored.to_wire()
    told["model_kwargs"]["engine"]["of_a_newer_server"] = {"a": 1}

    def fill() -> None:
        form.fill(told)

    person.lane.call(fill)
    person.settle()
    assert form.body()["model_kwargs"] == told["model_kwargs"]
    person.choose("vllm")
    assert "of_a_newer_server" not in repr(form.body())


def test_the_words_of_a_type_that_is_not_installed_here_are_shown(
    person: Person, stored: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        person.client, "configuration", lambda _: stored.model_copy(update={"model_type": "of_a_package"})
    )
    person.open(stored.config_id)
    wait_until(lambda: "of_a_package" in person.tab._result.value, "the words", 5)
    assert hidden(person.tab._editing_row)


def test_what_the_operator_declared_is_not_edited_but_can_be_duplicated(
    person: Person, stored: Configuration, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(person.client, "configuration", lambda _: stored.model_copy(update={"declared": True}))
    person.open(stored.config_id)
    wait_until(lambda: "operator" in person.tab._result.value, "the words", 5)
    assert hidden(person.tab._editing_row)
    person.duplicate(stored.config_id)
    assert person.tab._result.value == ""


def test_a_configuration_that_is_gone_is_said(person: Person) -> None:
    person.open("nothing-like-it")
    wait_until(lambda: "There is no configuration" in person.tab._result.value, "the words", 5)


def test_a_live_model_is_changed_at_once_or_with_a_reload(
    person: Person, stored: Configuration, upstream: MockUpstream
) -> None:
    upstream.key = CANARY
    person.client.load("full", progress=False)
    person.edit(stored.config_id)
    person.fill(temperature="1")
    person.save()  # generation defaults need no reload
    person.edit(stored.config_id)
    person.fill(max_retries="2")
    wait_until(lambda: not hidden(person.tab.save_and_reload), "the offer", 5)
    assert "full" in person.tab._problem.value
    assert hidden(person.tab.save)
    person.fill(max_retries="1")
    wait_until(lambda: hidden(person.tab.save_and_reload), "the end of the offer", 5)
    person.fill(max_retries="2")
    wait_until(lambda: not hidden(person.tab.save_and_reload), "the offer", 5)
    person.save(person.tab.save_and_reload)
    assert person.client.configuration(stored.config_id).model_kwargs["engine"] == {"max_retries": 2}
    wait_until(lambda: person.client.model("full").status == "loaded", "the reload", 5)


def test_a_save_that_needs_a_reload_offers_it_also_without_a_check(
    person: Person, stored: Configuration, upstream: MockUpstream, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llmkit.panel.form_check.QUIET_SECONDS", 60)
    upstream.key = CANARY
    person.client.load("full", progress=False)
    person.edit(stored.config_id)
    person.fill(max_retries="2")
    person.press(person.tab.save)
    wait_until(lambda: not hidden(person.tab.save_and_reload), "the offer", 5)
    assert "full" in person.tab._result.value
    person.save(person.tab.save_and_reload)


def test_cancel_leaves_everything_as_it_is(person: Person, stored: Configuration) -> None:
    person.edit(stored.config_id)
    person.press(person.tab.cancel)
    assert "full stays as it is." in person.tab._result.value
    person.edit(stored.config_id)
    person.fill(temperature="1")
    person.press(person.tab.cancel)
    assert "changes of full" in person.tab._question.value
    person.press(person.tab.throw_away)
    assert "full stays as it is." in person.tab._result.value
    assert person.client.configuration(stored.config_id) == stored


def test_a_draft_is_not_thrown_away_unasked(person: Person, stored: Configuration) -> None:
    person.fill(model_id="draft", model_name="mine")
    person.open(stored.config_id)
    wait_until(lambda: not hidden(person.tab._confirmation), "the question", 5)
    assert person.field("model_id").control.value == "draft"
    person.press(person.tab.keep)
    assert person.field("model_id").control.value == "draft"
    person.open(stored.config_id)
    wait_until(lambda: not hidden(person.tab._confirmation), "the question", 5)
    person.press(person.tab.throw_away)
    assert person.field("model_id").control.value == "full"
    assert "Editing" in person.tab._what.value


# -- duplicate -----------------------------------------------------------------------------------------------------


def test_a_copy_has_everything_but_name_and_key(person: Person, stored: Configuration) -> None:
    person.duplicate(stored.config_id)
    assert "Its key is not copied" in person.tab._what.value
    assert person.field("model_id").control.value == "full-2"
    assert not person.field("model_id").control.disabled
    assert "stored" not in person.field("api_key").control.placeholder
    person.save()
    copy = person.client.configuration(person.client.model("full-2").config_id).to_wire()
    expected = stored.to_wire() | {"model_id": "full-2", "config_id": copy["config_id"]}
    del expected["model_kwargs"]["api_key"]
    assert copy == expected
    person.duplicate(stored.config_id)
    assert person.field("model_id").control.value == "full-3"
    person.press(person.tab.cancel)
    assert "Nothing is saved." in person.tab._result.value


def test_the_name_of_a_variable_is_copied(person: Person, upstream: MockUpstream) -> None:
    kwargs = {"base_url": upstream.base_url, "api_key": "env:SOME_API_KEY"}
    made = person.client.configure("referring", "gpt-3", "openai", kwargs)
    person.duplicate(made.config_id)
    assert "not copied" not in person.tab._what.value
    assert "env:SOME_API_KEY" in person.field("api_key").control.placeholder
    person.save()
    copy = person.client.configuration(person.client.model("referring-2").config_id)
    assert copy.model_kwargs == kwargs
