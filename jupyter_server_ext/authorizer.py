"""A role for people who may use the models of a server, but not change them."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Mapping
from typing import Any

from jupyter_server.auth.authorizer import AllowAllAuthorizer, Authorizer
from traitlets import Instance, List, Type, Unicode, default

from jupyter_server_ext.handlers.base import RESOURCE

PROMPTING = frozenset({"read", "execute"})


class PromptOnlyAuthorizer(Authorizer):
    """Lets everybody see and prompt the models, and operators alone configure, load, unload and delete.

    Notes
    -----
    Who has a kernel or a terminal of the server can do whatever its account can. This is a border where they have
    none, as with ``jupyter llmkit``.

    Examples
    --------
    In ``jupyter_server_config.py``::

        c.ServerApp.authorizer_class = "jupyter_server_ext.authorizer.PromptOnlyAuthorizer"
        c.PromptOnlyAuthorizer.operators = ["ada"]
    """

    operators = List(
        Unicode(),
        help="Names of the users who may do everything with models. A server with one token for all knows no names.",
    ).tag(config=True)
    operator_groups = List(
        Unicode(), help="Groups whose users are operators, where the identity provider tells of groups, as JupyterHub."
    ).tag(config=True)
    other_authorizer_class = Type(
        AllowAllAuthorizer,
        klass=Authorizer,
        help="Decides on everything else of the server: kernels, files, events. By default it is as without this.",
    ).tag(config=True)
    other = Instance(Authorizer)

    @default("other")
    def _make_other(self) -> Authorizer:
        return self.other_authorizer_class(parent=self.parent, identity_provider=self.identity_provider)

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> Awaitable[bool] | bool:
        """Decide on the models; leave the rest to the other authorizer."""
        if resource != RESOURCE:
            decided: Awaitable[bool] | bool = self.other.is_authorized(handler, user, action, resource)
            return decided
        return action in PROMPTING or self._is_operator(user)

    def _is_operator(self, user: Any) -> bool:
        return user.username in self.operators or not _groups_of(user).isdisjoint(self.operator_groups)


def _groups_of(user: Any) -> set[str]:
    told = getattr(user, "groups", None)
    if told is None:
        hub_user = getattr(user, "hub_user", None)  # of JupyterHub's identity provider
        told = hub_user.get("groups") if isinstance(hub_user, Mapping) else None
    return {str(group) for group in told} if isinstance(told, Iterable) and not isinstance(told, str) else set()
