"""connect() and llmkit.start() in a real JupyterHub: real proxy, real single-user server, real kernel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from hub import Hub
from kernels import ServerKernel
from support import START_SECONDS

from llmkit.client import connect
from llmkit.errors import NotAllowed

pytestmark = [pytest.mark.hub, pytest.mark.timeout(6 * START_SECONDS)]

CONNECT = "import llmkit\nclient = llmkit.connect()\nprint(client.url, client.health().status)\n"


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as running:
        yield running


@pytest.fixture(scope="module")
def ada(hub: Hub) -> str:
    """Give the base URL of a user's server."""
    return hub.start_server("ada")


@pytest.fixture(scope="module")
def kernel(hub: Hub, ada: str) -> Iterator[ServerKernel]:
    with ServerKernel(ada, hub.token) as running:
        yield running


def test_a_kernel_finds_the_users_own_server(kernel: ServerKernel) -> None:
    address, status = kernel.run(CONNECT).split()
    assert address.endswith("/user/ada/")
    assert address.startswith("http://127.0.0.1:")
    assert status == "ok"


def test_a_script_that_a_kernel_starts_finds_it_too(kernel: ServerKernel) -> None:
    run = (
        f"import subprocess, sys; print(subprocess.run([sys.executable, '-c', {CONNECT!r}], stdout=-1).stdout.decode())"
    )
    assert kernel.run(run) == kernel.run(CONNECT)


def test_the_hubs_variables_are_enough(kernel: ServerKernel) -> None:
    # As on a machine of a cluster that does not share the server's runtime folder.
    alone = "import os\nos.environ['JUPYTER_RUNTIME_DIR'] = '/nowhere'\nos.environ.pop('JPY_PARENT_PID')\n"
    assert kernel.run(f"{alone}{CONNECT}").endswith("/user/ada/ ok")


def test_start_starts_none_where_the_user_has_a_server(kernel: ServerKernel) -> None:
    assert kernel.run("print(llmkit.start().url == llmkit.connect().url, 'LLMKIT_SERVER_URL' in os.environ)") == (
        "True False"
    )


def test_it_is_reached_from_outside_through_the_proxy_with_a_token_of_the_hub(hub: Hub, ada: str) -> None:
    with connect(f"{ada}lab/tree/a.ipynb", hub.token) as client:
        assert client.url == ada
        assert client.health().status == "ok"
    with pytest.raises(NotAllowed):
        connect(ada, "wrong")
