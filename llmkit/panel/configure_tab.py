"""The tab *Configure*: a form that the server's own schemas make, checked by the server while it is filled."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from llmkit.client import Configuration, ModelType
from llmkit.errors import ConfigurationReadOnly, LLMKitError, ModelIsLoaded
from llmkit.panel import code, form_text, markup
from llmkit.panel.code_view import CodeView
from llmkit.panel.desk import Desk
from llmkit.panel.form import MISSING, MODEL_ID, Form
from llmkit.panel.form_check import Checked, Checker, check
from llmkit.panel.form_marks import FormMarks
from llmkit.panel.form_values import is_mark, spread, suggest_id
from llmkit.panel.key_field import KeyField
from llmkit.panel.widgets import assign, beside_cells, show
from llmkit.schemas import OPTIONAL_FIELDS

NOT_ALLOWED = "You may look at the models of this server and ask them, but not configure any."


class ConfigureTab:
    """Makes a configuration, or changes one."""

    def __init__(self, desk: Desk) -> None:
        self._desk = desk
        self._editing: Configuration | None = None
        self._sent: dict[str, Any] = {}
        self._saving = False
        self._needs_reload = False
        self._opened = 0
        self._wanted: Callable[[], Any] | None = None
        kit, lane = desk.kit, desk.lane
        self._checker: Checker[Checked] = Checker(lane, self._begin_check, self._checked, self._check_failed)
        self.form = Form(kit, lambda: lane.call(self._on_change), lane.call)

        self._what = kit.html()
        self.cancel = kit.button("Cancel", lambda: lane.call(self._on_cancel), tip="Leave the configuration as it is")
        self._editing_row = kit.row(self._what, self.cancel, name="llmkit-editing")
        self._question = kit.html()
        self.throw_away = kit.button("Throw it away", lambda: lane.call(self._on_throw_away), style="danger")
        self.keep = kit.button("Keep it", lambda: lane.call(self._on_keep))
        self._confirmation = kit.row(self._question, self.throw_away, self.keep, name="llmkit-confirmation")
        self._memory = kit.html()
        self.save_and_load = kit.button("Save and load", lambda: self._on_save(load=True), style="primary")
        self.save = kit.button("Save", self._on_save, tip="Store the configuration")
        self.save_and_reload = kit.button(
            "Save and reload", lambda: self._on_save(reload=True), tip="Unload the model, and load it as changed"
        )
        self.start_anew = kit.button("Start anew", lambda: lane.call(self._on_start_anew), tip="Empty the form")
        self._buttons = (self.save_and_load, self.save, self.save_and_reload, self.start_anew)
        self._problem = kit.html()
        self._result = kit.html()
        self._code = CodeView(kit)
        for hidden in (self._editing_row, self._confirmation, self._memory, self.save_and_reload):
            show(hidden, visible=False)
        parts = (
            self._editing_row,
            self._confirmation,
            self.form.head,
            self.form.essential,
            self._memory,
            self.form.folds,
            self._problem,
            kit.row(*self._buttons, name="llmkit-buttons"),
            self._result,
            self._code.widget,
            kit.make(FormMarks),
        )
        self.may = "write" in desk.may
        self.widget = kit.box(*(parts if self.may else (kit.html(markup.hint(NOT_ALLOWED)),)), name="llmkit-tab")
        beside_cells(self.widget)

    def offer(self, types: Iterable[ModelType]) -> None:
        """Take the server's model types."""
        if self.may:
            self.form.offer(types)

    # -- what is in the form -----------------------------------------------------------------------------------

    def open(self, config_id: str, *, as_copy: bool) -> None:
        """Show a configuration, to change it or to make another like it; a draft is not thrown away unasked."""
        if not self.may:
            return
        self._opened += 1
        number = self._opened
        client = self._desk.client

        def read() -> tuple[Configuration, list[str]]:
            taken = [model.model_id for model in client.models()] if as_copy else []
            return client.configuration(config_id), taken

        def then(told: tuple[Configuration, list[str]]) -> None:
            configuration, taken = told
            if number != self._opened or self._saving:
                return
            if configuration.declared and not as_copy:
                name = configuration.model_id
                self._tell(ConfigurationReadOnly(f"{name} is the operator's.", hint="Duplicate it to change the copy."))
                return
            self._leave_draft(lambda: self._fill(configuration, suggest_id(configuration.model_id, taken), as_copy))

        self._desk.lane.ask(read, then, self._tell)

    def _fill(self, configuration: Configuration, free_id: str, as_copy: bool) -> None:  # noqa: FBT001  # as `open`
        told = configuration.to_wire()
        try:
            self.form.fill(told, as_copy=free_id if as_copy else None)
        except LLMKitError as error:
            self._tell(error)
            return
        self._set_editing(None if as_copy else configuration)
        self._tell(None)
        if as_copy:
            loses_key = any(map(is_mark, spread(told, {}).values()))
            self._say_what(form_text.copy_of(configuration.model_id, loses_key=loses_key))
        else:
            self._say_what(form_text.editing(configuration.model_id))

    def _set_editing(self, configuration: Configuration | None) -> None:
        self._editing = configuration
        self._say_what("")
        self._set_needs_reload(needed=False)

    def _say_what(self, what: str) -> None:
        assign(self._what, value=what)
        show(self._editing_row, visible=bool(what))

    def _set_needs_reload(self, *, needed: bool) -> None:
        self._needs_reload = needed
        show(self.save_and_reload, visible=needed)
        show(self.save_and_load, visible=not needed)
        show(self.save, visible=not needed)

    def _empty(self) -> None:
        self.form.clear()
        self._set_editing(None)
        self._forget_check()
        self._tell(None)

    def _on_start_anew(self) -> None:
        self._leave_draft(self._empty)

    def _on_cancel(self) -> None:
        def leave() -> None:
            note = f"{self._editing.model_id} stays as it is." if self._editing is not None else "Nothing is saved."
            self._empty()
            assign(self._result, value=markup.note(note))

        self._leave_draft(leave)

    def _leave_draft(self, then: Callable[[], Any]) -> None:
        """Do what empties the form, if need be after asking."""
        if not self.form.is_changed:
            self._ask(None)
            then()
            return
        name = self._editing.model_id if self._editing is not None else ""
        self._ask(then, f"Your changes of {name} are not saved." if name else "What you have entered is not saved.")

    def _ask(self, then: Callable[[], Any] | None, question: str = "") -> None:
        self._wanted = then
        assign(self._question, value=markup.hint(question) if question else "")
        show(self._confirmation, visible=then is not None)

    def _on_throw_away(self) -> None:
        then = self._wanted
        self._ask(None)
        if then is not None and not self._saving:
            then()

    def _on_keep(self) -> None:
        self._ask(None)

    # -- checking ----------------------------------------------------------------------------------------------

    def _on_change(self) -> None:
        if (key := self.form.key) is not None:
            key[1].refresh()
        if self.form.is_changed and not self._saving:
            # Not when a check ends: that may be of what was typed before it was saved, and hide what that gave.
            assign(self._result, value="")
        self._checker.changed()

    def _begin_check(self) -> Callable[[], Checked] | None:
        self._show_code()
        if self._saving:
            return None
        if self._editing is None and not self.form.is_changed and not self.form.has_id:
            self._forget_check()
            return None
        client, body = self._desk.client, self.form.body_to_check()
        config_id = self._editing.config_id if self._editing is not None else None
        return lambda: check(client, body, config_id)

    def _checked(self, told: Checked) -> None:
        self._end_check(None)
        self._set_needs_reload(needed=told.needs_reload is not None)
        if told.needs_reload is not None:
            assign(self._problem, value=markup.hint(str(told.needs_reload.message)))
        # A name that is missing stands for no model whose memory could be told.
        plan = told.plan if all(field is self.form.names[MODEL_ID] for field in self.form.missing) else None
        line = form_text.memory_line(plan) if plan is not None else ""
        assign(self._memory, value=line)
        show(self._memory, visible=bool(line))
        self._memory.remove_class("llmkit-stale")

    def _check_failed(self, error: LLMKitError) -> None:
        self._end_check(error)
        # Of an older state: it stays, so that nothing jumps, and it looks like it.
        self._memory.add_class("llmkit-stale")

    def _end_check(self, error: LLMKitError | None) -> None:
        rest = self.form.complain(error, typing=True)
        assign(self._problem, value=markup.error_card(rest) if rest is not None else "")

    def _forget_check(self) -> None:
        self._checker.drop()
        self.form.complain(typing=True)
        assign(self._problem, value="")
        show(self._memory, visible=False)
        assign(self._memory, value="")

    def _show_code(self) -> None:
        body = self.form.body_to_show()
        if self._editing is not None:
            one = code.update(self._editing.config_id, self._editing.model_id, body, reload=self._needs_reload)
            self._code.show((f"Change {self._editing.model_id}", one))
        elif self.form.missing:
            self._code.show()
        else:
            self._code.show(("Configure", code.configure(body)))

    # -- saving ------------------------------------------------------------------------------------------------

    def _on_save(self, *, load: bool = False, reload: bool = False) -> None:
        def begin() -> None:
            if self._saving:
                return
            self._ask(None)
            if missing := self.form.missing:
                for field in missing:
                    field.touched = True
                    field.complain(MISSING)
                assign(self._result, value=markup.field_error("Some fields are missing."))
                return
            self._allow(saving=True)
            self._sent = self.form.body()
            self._checker.drop()
            place = self.form.key
            if place is None or not isinstance(place[1].control, KeyField):
                self._send(self.form.body(), load=load, reload=reload)
                return
            # The key comes in a message of its own, goes into the request, and is nowhere after that.
            lane = self._desk.lane
            place[1].control.collect(
                lambda key: lane.call(lambda: self._send(self.form.body_with_key(key), load=load, reload=reload)),
                lambda error: lane.call(lambda: self._refused(error)),
            )

        self._desk.lane.call(begin)

    def _send(self, body: dict[str, Any], *, load: bool, reload: bool) -> None:
        client, editing = self._desk.client, self._editing

        def work() -> Configuration:
            if editing is None:
                made = client.configure(**body)
            else:
                # What is not in the form any more is to go.
                absent = {name: None for name in OPTIONAL_FIELDS if name not in body}
                changes = {name: value for name, value in body.items() if name != "model_id"}
                made = client.update(editing.model_id, reload=reload, **changes, **absent)
            if load:
                client.start_loading(made.model_id)
            return made

        self._desk.lane.ask(work, lambda made: self._saved(made, shown=load or reload), self._refused)

    def _saved(self, made: Configuration, *, shown: bool) -> None:
        self._allow(saving=False)
        said = f"{made.model_id} is saved."
        if self.form.body() == self._sent:
            self._empty()
        else:
            said += " What you have changed since is not, and still here."
        assign(self._result, value=markup.note(said))
        if shown:
            self._desk.open_models()

    def _refused(self, error: LLMKitError) -> None:
        self._allow(saving=False)
        rest = self.form.complain(error)
        assign(self._problem, value="")
        if isinstance(error, ModelIsLoaded):
            self._set_needs_reload(needed=True)
        if rest is not None:
            self._tell(rest)
        else:
            assign(self._result, value=markup.field_error("Some fields need another value."))

    def _tell(self, error: LLMKitError | None) -> None:
        assign(self._result, value=markup.error_card(error) if error is not None else "")

    def _allow(self, *, saving: bool) -> None:
        self._saving = saving
        for each in (*self._buttons, self.cancel):
            assign(each, disabled=saving)
