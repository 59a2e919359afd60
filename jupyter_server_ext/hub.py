"""``jupyter llmkit`` as a service of JupyterHub: many people, one registry.

Who asks is found out by JupyterHub's own extension for Jupyter servers, from the same tokens that open everybody's own
server. What they may is said by scopes that the Hub's configuration defines and gives to users and groups.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from jupyter_server.auth.authorizer import Authorizer
from traitlets import Unicode

from jupyter_server_ext.handlers.base import RESOURCE
from llmkit.errors import NotReady
from llmkit.registry.people import Person

EXTENSION: Final = "jupyterhub"
"""JupyterHub's, which finds out who asks."""
PROMPTING: Final = frozenset({"read", "execute"})
EVERYBODY: Final = frozenset({("api", "read"), ("events", "execute")})
"""Of Jupyter's own resources, what the users of a service need: to be told of it, and of changes."""


def service_name(environ: Mapping[str, str]) -> str | None:
    """Give the name of the Hub's service that this process is, or None.

    A user's own server knows the Hub, too, and has no such name.
    """
    return environ.get("JUPYTERHUB_SERVICE_NAME") or None


def check_identity(provider: Any) -> None:
    """Raise `NotReady` if a server does not ask the Hub who its users are."""
    from jupyterhub.singleuser.extension import JupyterHubIdentityProvider  # nobody else has it installed

    if not isinstance(provider, JupyterHubIdentityProvider):
        raise NotReady(
            f"This is a service of JupyterHub, but {type(provider).__name__} says who its users are.",
            hint="Start it with `jupyter llmkit`, and without another identity provider.",
        )


def hide_token(provider: Any) -> None:
    """Let the pages of a service not hold its own token of the Hub, which Jupyter writes into every page of HTML.

    In the server of one user that token is the user's own; here a page of an error would give it to each of them.
    """
    kind: Any = type(provider)
    make: Any = type(kind)
    provider.__class__ = make(kind.__name__, (kind,), {"token": "", "__module__": kind.__module__})


class HubAuthorizer(Authorizer):
    """Decides by JupyterHub's scopes who may prompt, who may load, and who may administer.

    Everything that is not named is the administrators' alone: to shut the server down, to make keys for tools, to
    change what others have configured or loaded.

    Examples
    --------
    ``jupyter llmkit`` uses it whenever it is a service of a Hub. Other names of the scopes, in
    ``jupyter_llmkit_config.py``::

        c.HubAuthorizer.prompt_scope = "custom:models:use"
    """

    prompt_scope = Unicode("custom:llmkit:prompt", help="Lets its holder see and prompt the models.").tag(config=True)
    load_scope = Unicode(
        "custom:llmkit:load", help="Lets its holder configure models too, load them, and undo what they did."
    ).tag(config=True)
    administer_scope = Unicode(
        "custom:llmkit:administer", help="Lets its holder do everything, also to what others have made."
    ).tag(config=True)

    def is_authorized(self, handler: Any, user: Any, action: str, resource: str) -> bool:
        """Decide by the scopes of the user."""
        if getattr(handler, "tool_key", None) is not None:  # it was asked already what it opens
            return resource == RESOURCE and action in PROMPTING
        if self._holds(user, self.administer_scope):
            return True
        may_load = self._holds(user, self.load_scope)
        if not may_load and not self._holds(user, self.prompt_scope):
            return False
        if resource == RESOURCE:
            return may_load or action in PROMPTING
        return (resource, action) in EVERYBODY

    def person(self, user: Any) -> Person:
        """Say who a user is."""
        told = getattr(user, "hub_user", None)
        if told is None:  # a key for tools
            return Person(user.username)
        # Not the user's `name`, which they may choose themselves.
        name = str(told["name"])
        return Person(
            name if told.get("kind") == "user" else f"{told.get('kind')}:{name}",
            administers=self._holds(user, self.administer_scope),
        )

    def _holds(self, user: Any, scope: str) -> bool:
        told = getattr(user, "hub_user", None)
        return told is not None and scope in told["scopes"]
