"""llmkit as a service of a real JupyterHub, by the configuration that ``jupyter_server_ext/README.md`` documents."""

from __future__ import annotations

import os
import re
import sys
from pathlib import Path

import httpx
from fake_engine_type import PLUGIN
from hub import Hub
from support import REPOSITORY, START_SECONDS, wait_until

from llmkit.client import Client, connect

KEY = "sk-of-the-class"
PAGE = (REPOSITORY / "jupyter_server_ext" / "README.md").read_text(encoding="utf-8")
DOCUMENTED = next(block for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL) if "services" in block)
BEFORE = "_services, _roles = c.JupyterHub.services, c.JupyterHub.load_roles\n"
# What differs from one machine to the next: ports, accounts, folders. The rest is as documented.
AFTER = """
c.JupyterHub.services += _services
c.JupyterHub.load_roles += _roles
c.JupyterHub.load_roles.append(dict(name="loaders", groups=["loaders"], scopes=["custom:llmkit:load"]))
c.JupyterHub.load_groups["loaders"] = {"users": ["ada", "ben"]}
c.Spawner.environment["LLMKIT_SHARED_URL"] = c.JupyterHub.bind_url + "services/llmkit/"
_folder = os.path.join(os.getcwd(), "service")
_service = c.JupyterHub.services[0]
_service["user"] = ""
_service["timeout"] = 60
"""
MANAGED = """
_service["command"] += ["--allow-root", "--LLMKitApp.standby=off", *{more!r}]
_service["environment"] = dict(
    JUPYTER_CONFIG_DIR=_folder, JUPYTER_DATA_DIR=_folder, JUPYTER_RUNTIME_DIR=_folder,
    LLMKIT_STATE_DIR=os.path.join(_folder, "state"), LLMKIT_RUN_DIR=os.environ["LLMKIT_RUN_DIR"],
    CLASS_API_KEY={key!r}, PATH={path!r}, PYTHONPATH={pythonpath!r},
)
"""


def config(port: int, *more: str) -> str:
    """Give the documented configuration for a service that the Hub starts, with more arguments for it."""
    managed = MANAGED.format(
        more=list(more),
        key=KEY,
        path=os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", ""))),
        pythonpath=PLUGIN["PYTHONPATH"],
    )
    return BEFORE + DOCUMENTED.replace("8105", str(port)) + AFTER + managed


def wait_for_service(hub: Hub) -> None:
    """Return when the service answers through the proxy."""

    def answers() -> bool:
        refused = httpx.get(f"{hub.url}services/llmkit/llm/health", trust_env=False, timeout=10)
        return "Not authenticated" in refused.text

    wait_until(answers, "the service", START_SECONDS, interval=0.2)


def person(hub: Hub, name: str) -> Client:
    """Give a client of the service with a token of a user."""
    return connect(f"{hub.url}services/llmkit/", hub.token_of(name))
