"""Generation parameters as a person chooses them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import ipywidgets as w
import traitlets

from llmkit.panel.desk import Desk
from llmkit.panel.widgets import Kit, assign
from llmkit.schemas import Model


class Option:
    """A generation parameter that is only sent if it is switched on.

    Parameters
    ----------
    desk
        What the tabs share.
    name
        OpenAI's name of the parameter.
    label
        What a person reads.
    control
        The widget that holds the value.
    """

    def __init__(self, desk: Desk, name: str, label: str, control: w.DOMWidget) -> None:
        self.name = name
        self.control = control
        kit = desk.kit
        self.switch = kit.make(w.Checkbox, description=label, value=False, indent=False)
        self.switch.tooltip = "Off: as the model's configuration says"
        control.disabled = True
        control.description = label  # for who hears the page: beside its switch it is not seen
        self.switch.observe(lambda change: desk.lane.call(lambda: assign(control, disabled=not change["new"])), "value")
        self.widget = kit.row(self.switch, control, name="llmkit-option")

    @property
    def given(self) -> dict[str, Any]:
        """What to send."""
        return {self.name: self.control.value} if self.switch.value else {}

    def set(self, given: dict[str, Any]) -> None:
        """Take the value out of parameters that were kept; one that is not among them, or makes no sense, is off."""
        wanted = self.name in given
        if wanted:
            try:
                assign(self.control, value=given[self.name])
            except traitlets.TraitError:  # another client kept it
                wanted = False
        assign(self.switch, value=wanted)
        assign(self.control, disabled=not wanted)


def offer_models(field: w.Dropdown, models: Iterable[Model], default: str | None = None) -> None:
    """Offer the models that are loaded. One that was chosen stays, so that nobody asks another one unawares.

    Parameters
    ----------
    field
        Where a person chooses.
    models
        All there are.
    default
        What is chosen if nothing was; by default the first.
    """
    status = {model.model_id: model.status for model in models}
    loaded, chosen = [name for name in status if status[name] == "loaded"], field.value
    options = [(name, name) for name in loaded]
    if chosen in status and chosen not in loaded:
        options.append((f"{chosen} (not loaded)", chosen))
    if tuple(options) != tuple(field.options):
        names = [name for _, name in options]
        field.options = options
        field.value = next((one for one in (chosen, default) if one in names), next(iter(names), None))


def generation_options(desk: Desk) -> dict[str, Option]:
    """Make the parameters that every model knows, by their names."""
    kit = desk.kit
    options = [
        Option(desk, "temperature", "Temperature", _slider(kit, value=0.7, min=0, max=2)),
        Option(desk, "top_p", "Top p", _slider(kit, value=0.95, min=0.01, max=1, step=0.01)),
        Option(desk, "max_tokens", "Max tokens", kit.make(w.BoundedIntText, value=256, min=1, max=1_000_000)),
        Option(desk, "seed", "Seed", kit.make(w.BoundedIntText, value=1, min=0, max=2**31 - 1)),
    ]
    return {option.name: option for option in options}


def _slider(kit: Kit, *, step: float = 0.05, **values: Any) -> w.FloatSlider:
    return kit.make(w.FloatSlider, step=step, readout_format=".2f", **values)
