"""Who asks, where many people share one server, and what only some of them may do to what others made."""

from __future__ import annotations

from dataclasses import dataclass

from llmkit import schemas
from llmkit.errors import NotAllowed
from llmkit.registry.model import Model


@dataclass(frozen=True)
class Person:
    """One of the people who share a server; on a server of one person there is none, and nobody owns anything.

    Attributes
    ----------
    name
        As whoever has authenticated them tells it.
    administers
        Whether they may change what others have made.
    """

    name: str
    administers: bool = False


def check_owner(by: Person | None, owner: str | None, what: str) -> None:
    """Raise `NotAllowed` if somebody may not change what belongs to another person.

    What belongs to nobody, since it was there before the server was shared, is the administrators' alone.

    Parameters
    ----------
    by
        Who asks; None on a server that tells no people apart, where everybody may.
    owner
        The name of the person whose it is.
    what
        Names it, for the message.

    Raises
    ------
    NotAllowed

    Examples
    --------
    >>> check_owner(Person("ada"), "ada", "The configuration of `demo`")
    >>> check_owner(Person("ben"), "ada", "The configuration of `demo`")
    Traceback (most recent call last):
    llmkit.errors.NotAllowed: The configuration of `demo` is that of ada.
    Ask ada or an administrator of this server.
    """
    if by is None or by.administers or by.name == owner:
        return
    if owner is None:
        raise NotAllowed(f"{what} is the administrators' alone.", hint="Ask an administrator of this server.")
    raise NotAllowed(f"{what} is that of {owner}.", hint=f"Ask {owner} or an administrator of this server.")


def check_unload(by: Person | None, model: Model) -> None:
    """Raise `NotAllowed` if somebody may not end a load: it is that of who loaded it, else of who configured it.

    One that is not loaded has nothing to end.
    """
    if model.holding:
        owner = model.loaded_by or model.configuration.configured_by
        check_owner(by, owner, f"The load of `{model.configuration.model_id}`")


def told_to(by: Person | None, model: Model) -> schemas.Model:
    """Give the live state of a model, with what somebody may not do with it, so that they are not offered it.

    The words are those of the refusal; nothing is said where no people are told apart.
    """
    told = model.snapshot()
    if by is None:
        return told
    configuration = model.configuration
    refuses: dict[schemas.Refusable, str] = {}
    try:
        check_unload(by, model)
    except NotAllowed as error:
        refuses["unload"] = refuses["delete"] = str(error)
    try:
        check_owner(by, configuration.configured_by, f"The configuration of `{configuration.model_id}`")
    except NotAllowed as error:
        refuses["update"] = refuses["delete"] = str(error)
    return told.model_copy(update={"refuses": refuses})


def check_force(by: Person | None, *, force: bool) -> None:
    """Raise `NotAllowed` if somebody may not have busy models unloaded, which can be others'."""
    if force and by is not None and not by.administers:
        raise NotAllowed(
            "`force` ends what others are doing; only administrators load so.",
            param="force",
            hint="Load without it: it takes what is free or idle.",
        )
