"""Configurations as a file, without their keys: to share, to keep under version control, to take along."""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from html import escape
from http import HTTPStatus
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, ValidationError

from llmkit.client import keys
from llmkit.errors import DoesNotFit, LLMKitError
from llmkit.schemas import SERVERS_OWN, ModelConfigRequest, Strict

if TYPE_CHECKING:
    from llmkit.client.configurations import Configurations

VERSION = 1
_KEY = "api_key"
_SHOWN_MISTAKES = 10
_MADE_BY = "client.export_configurations makes such a file."


class ConfigurationsFile(Strict):
    """What the file holds; ``configurations`` can be given to ``c.LLMKitApp.configurations`` as it is."""

    llmkit_configurations: Annotated[int, Field(ge=1)] = VERSION
    without_key: list[str] = Field(default_factory=list)
    """The ``model_id`` of each configuration whose key was left out."""
    configurations: list[ModelConfigRequest]


class Imported(Strict):
    """What became of one configuration of a file.

    Attributes
    ----------
    outcome
        ``created``, ``updated``, ``unchanged``; ``refused`` if the server did not take it; ``different`` if it has
        another configuration of this ``model_id``.
    note
        What is left to do, or why it was not taken.

    Examples
    --------
    >>> Imported(model_id="demo", outcome="created").outcome
    'created'
    """

    model_id: str
    outcome: Literal["created", "updated", "unchanged", "different", "refused"]
    note: str = ""


class ImportedList(list[Imported]):
    """What became of each configuration of a file; shows as a table.

    Examples
    --------
    >>> ImportedList([Imported(model_id="gpt", outcome="created", note="give it its key")])
    gpt  created    give it its key
    """

    def __repr__(self) -> str:
        width = max((len(one.model_id) for one in self), default=0)
        lines = (f"{one.model_id.ljust(width)}  {one.outcome.ljust(9)}  {one.note}".rstrip() for one in self)
        return "\n".join(lines) or "The file holds no configurations."

    def _repr_html_(self) -> str:
        cell = '<td style="text-align: left">'
        rows = "".join(
            f"<tr>{cell}{escape(one.model_id)}</td>{cell}{one.outcome}</td>{cell}{escape(one.note)}</td></tr>"
            for one in self
        )
        return f"<table><tbody>{rows}</tbody></table>" if self else f"<p>{self!r}</p>"


def export_configurations(client: Configurations, path: Path) -> list[str]:
    """Write every configuration to a file, and give the ``model_id`` of those whose key was left out."""
    told = [configuration.to_wire() for configuration in client.configurations()]
    without_key = [one["model_id"] for one in told if _drop_key(one["model_kwargs"])]
    kept = [{name: value for name, value in one.items() if name not in SERVERS_OWN} for one in told]
    body = {"llmkit_configurations": VERSION, "without_key": without_key, "configurations": kept}
    scratch = path.with_name(f".{path.name}.{uuid.uuid4().hex}")  # so that the file is whole or as it was
    try:
        scratch.write_text(json.dumps(body, indent=2, ensure_ascii=False) + "\n", "utf-8")
        scratch.replace(path)
    finally:
        scratch.unlink(missing_ok=True)
    return without_key


def import_configurations(client: Configurations, path: Path, *, replace: bool) -> ImportedList:
    """Send every configuration of a file to the server; a file with a mistake changes nothing."""
    file = _read(path)
    return ImportedList(
        _import(client, request, replace=replace, without_key=request.model_id in file.without_key)
        for request in file.configurations
    )


def _import(client: Configurations, request: ModelConfigRequest, *, replace: bool, without_key: bool) -> Imported:
    model_id = request.model_id
    body = request.model_dump(exclude_none=True)
    stored = next((c.to_wire() for c in client.configurations() if c.model_id == model_id), None)
    note = ""
    if without_key:
        key = keys.key_of(stored["model_kwargs"]) if stored is not None else None
        if not isinstance(key, dict):  # none, or the name of a variable
            note = f"The file leaves its key out: client.update({model_id!r}, model_kwargs=...) gives it one."
        else:
            # The mark: the server keeps the key it has.
            body["model_kwargs"] = keys.with_key(body["model_kwargs"], key)
    try:
        if stored is None:
            client.configure(**body)
            return Imported(model_id=model_id, outcome="created", note=note)
        if _same(body, stored):
            return Imported(model_id=model_id, outcome="unchanged")
        if not replace:
            hint = "The server has another of this name; import with replace=True puts this one in its place."
            return Imported(model_id=model_id, outcome="different", note=hint)
        absent = {name: None for name in stored if name not in SERVERS_OWN}
        changes: dict[str, Any] = {**absent, "model_kwargs": {}, **body}
        del changes["model_id"]
        client.update(model_id, **changes)
        return Imported(model_id=model_id, outcome="updated", note=note)
    except LLMKitError as error:
        if error.status not in (HTTPStatus.CONFLICT, HTTPStatus.UNPROCESSABLE_ENTITY):
            raise
        return Imported(model_id=model_id, outcome="refused", note=str(error))


def _same(body: Mapping[str, Any], stored: Mapping[str, Any]) -> bool:
    ours = {name: value for name, value in stored.items() if name not in SERVERS_OWN}
    return {"model_kwargs": {}, **body} == {"model_kwargs": {}, **ours}


def _drop_key(model_kwargs: dict[str, Any]) -> bool:
    """Take the mark of a raw key away, and say whether there was one; names of variables stay."""
    engine = model_kwargs.get("engine")
    places = [model_kwargs, *([engine] if isinstance(engine, dict) else [])]
    marked = [place for place in places if isinstance(place.get(_KEY), dict)]
    for place in marked:
        del place[_KEY]
    return bool(marked)


def _read(path: Path) -> ConfigurationsFile:
    try:
        body = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise DoesNotFit(f"{path} is not JSON: {error}.", hint=_MADE_BY) from None
    version = body.get("llmkit_configurations") if isinstance(body, dict) else None
    if not isinstance(version, int):
        raise DoesNotFit(f"{path} is no file of configurations.", hint=_MADE_BY)
    if version > VERSION:
        raise DoesNotFit(f"{path} is of version {version}; this llmkit reads {VERSION}.", hint="Upgrade llmkit.")
    try:
        file = ConfigurationsFile.model_validate(body)
    except ValidationError as error:
        mistakes = [
            f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()[:_SHOWN_MISTAKES]
        ]
        raise DoesNotFit(f"{path}: {'; '.join(mistakes)}.", hint="Nothing was imported.") from None
    names = [request.model_id for request in file.configurations]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise DoesNotFit(f"{path} has more than one configuration of {', '.join(twice)}.", hint="Nothing was imported.")
    return file
