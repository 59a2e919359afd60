"""The synchronous client: one method for each thing that the server does.

Its parts are in `configurations`, `models`, `tables`, `conversations` and `tool_keys`; here is what they share, and how
a model is asked.
"""

from __future__ import annotations

import json
import uuid
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from llmkit.client.configurations import Configurations
from llmkit.client.connection import Connection, path_to
from llmkit.client.conversations import Conversations
from llmkit.client.models import Models
from llmkit.client.provenance import KnownConfigurations, Prompt
from llmkit.client.results import Answer
from llmkit.client.streaming import AnswerStream
from llmkit.client.tables import Tables
from llmkit.client.tool_keys import ToolKeys
from llmkit.client.usage import Usage
from llmkit.errors import LLMKitError
from llmkit.schemas import RequestList, UsageList

if TYPE_CHECKING:
    from openai import AsyncOpenAI, OpenAI

    from llmkit.client.async_client import AsyncClient

PERMISSIONS = frozenset({"read", "write", "execute"})
"""Names of what Jupyter's authorizer is asked for; ``execute`` is to prompt."""


class Client(Configurations, Models, Tables, Conversations, ToolKeys):
    """Configure, load, prompt and unload the models of one Jupyter server.

    Made by `llmkit.connect`. Threads may share it. Every method raises an `LLMKitError` of the class that fits,
    with the server's words.

    Parameters
    ----------
    connection
        The server; it is closed with the client.

    Examples
    --------
    >>> client = llmkit.connect()
    >>> configuration = client.configure("demo", "llmkit/demo", "vllm")
    >>> client.load("demo")
    <Model demo: loaded>
    >>> print(client.prompt("demo", "What is the capital of France?"))
    The capital of France is Paris.
    """

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        self._known = KnownConfigurations(connection)

    @property
    def url(self) -> str:
        """Base URL of the server.

        Examples
        --------
        >>> client.url
        'http://127.0.0.1:...'
        """
        return self.connection.server.url

    @property
    def shared(self) -> bool:
        """Whether many people share the server, as a service of their JupyterHub.

        Examples
        --------
        >>> client.shared
        False
        """
        return self.connection.server.shared

    @property
    def place(self) -> str:
        """The server in words for people: its address, and whether it is a shared one.

        Examples
        --------
        >>> client.place
        'http://127.0.0.1:...'
        """
        return f"{self.url} (shared)" if self.shared else self.url

    def __repr__(self) -> str:
        return f"<llmkit.Client {self.place}>"

    def close(self) -> None:
        """Close the connections to the server; the models stay as they are.

        Examples
        --------
        >>> client.close()
        """
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def permissions(self) -> frozenset[str]:
        """Say what this user may do here: ``read``, ``execute`` (prompt), ``write`` (configure, load, unload, delete).

        A server that cannot tell is taken to allow everything: whatever is not allowed it refuses all the same.

        Examples
        --------
        >>> sorted(client.permissions())
        ['execute', 'read', 'write']
        """
        params = {"permissions": json.dumps({"llm": sorted(PERMISSIONS)})}
        try:
            told = self.connection.call("GET", "api/me", params=params)
            return PERMISSIONS & frozenset(told["permissions"]["llm"])
        except (LLMKitError, LookupError, TypeError):
            return PERMISSIONS

    # -- prompts -----------------------------------------------------------------------------------------------

    def prompt(self, model_id: str, prompt: str, **inference_kwargs: Any) -> Answer:
        """Ask a model and give its answer.

        Interrupting ends the generation on the server.

        Parameters
        ----------
        model_id
            A loaded model.
        prompt
            What to ask.
        **inference_kwargs
            ``system``, ``messages``, ``idle_ttl`` and OpenAI's generation parameters, for example ``temperature``,
            ``max_tokens``.

        Raises
        ------
        ModelNotLoaded
            If it has to be loaded first.

        Examples
        --------
        >>> answer = client.prompt("demo", "What is the capital of France?", temperature=0)
        >>> print(answer)
        The capital of France is Paris.
        """
        body = {"model_id": model_id, "prompt": prompt, "inference_kwargs": inference_kwargs}
        return Prompt(self.connection, self._known, body).ask()

    def stream(self, model_id: str, prompt: str, **inference_kwargs: Any) -> AnswerStream:
        """Ask a model and give its answer as it comes; the parameters are those of `prompt`.

        Examples
        --------
        >>> for piece in client.stream("demo", "What is the capital of France?", max_tokens=50):
        ...     print(piece, end="")
        The capital of France is Paris.
        """
        request_id = str(inference_kwargs.setdefault("request_id", f"req-{uuid.uuid4().hex}"))
        inference_kwargs["stream"] = True
        body = {"model_id": model_id, "prompt": prompt, "inference_kwargs": inference_kwargs}
        return AnswerStream(Prompt(self.connection, self._known, body), request_id)

    def cancel(self, request_id: str) -> None:
        """End a running request, or raise `RequestNotFound`.

        Examples
        --------
        >>> requests = client.requests()
        >>> for one in requests.running:
        ...     client.cancel(one.request_id)
        """
        self.connection.call("DELETE", path_to("llm/inference", request_id))

    def requests(self, limit: int = 100, model_id: str | None = None) -> RequestList:
        """Give the requests that run now, and the last ones that are over.

        Parameters
        ----------
        limit
            So many of those that are over, at most.
        model_id
            Only those of this model.

        Raises
        ------
        ModelNotFound
            If there is no such model.

        Examples
        --------
        >>> answer = client.prompt("demo", "What is the capital of France?")
        >>> requests = client.requests(limit=1)
        >>> [one.outcome for one in requests.recent]
        ['ok']
        """
        params = {"limit": limit, **({"model_id": model_id} if model_id is not None else {})}
        return RequestList.model_validate(self.connection.call("GET", "llm/requests/", params=params))

    def usage(self) -> Usage:
        """Give requests and tokens by day, user and model, and what is left of your limits, where many share a server.

        Administrators see everybody's, others their own.

        Returns
        -------
        Usage
            Shows as a table; ``to_frame()`` makes one of pandas.

        Raises
        ------
        NotSupported
            If the server keeps no usage, since it tells no people apart; one of your own does not.

        Examples
        --------
        >>> client.usage()
        Traceback (most recent call last):
        llmkit.errors.NotSupported: http://127.0.0.1:... tells no people apart, so it keeps no usage and has no budgets.
        client.requests gives what ran; usage is kept by a server that many share under JupyterHub.
        """
        told = UsageList.model_validate(self.connection.call("GET", "llm/usage/"))
        return Usage.read(told, self.place)

    # -- other faces -------------------------------------------------------------------------------------------

    def openai(self, **kwargs: Any) -> OpenAI:
        """Give a client of the ``openai`` package that asks the models of this server; ``model`` is a ``model_id``.

        Parameters
        ----------
        **kwargs
            Arguments of ``openai.OpenAI``, for example ``timeout`` (seconds) and ``max_retries``.

        Examples
        --------
        >>> openai = client.openai()
        >>> messages = [{"role": "user", "content": "What is the capital of France?"}]
        >>> reply = openai.chat.completions.create(model="demo", messages=messages)
        >>> reply.choices[0].message.content
        'The capital of France is Paris.'
        >>> openai.close()
        """
        from openai import OpenAI  # slow to import

        return OpenAI(**self.connection.openai_arguments(kwargs))

    def async_openai(self, **kwargs: Any) -> AsyncOpenAI:
        """Give an ``openai.AsyncOpenAI`` that asks the models of this server; see `openai`.

        Examples
        --------
        >>> openai = client.async_openai()
        >>> messages = [{"role": "user", "content": "What is the capital of France?"}]
        >>> reply = await openai.chat.completions.create(model="demo", messages=messages)
        >>> reply.choices[0].message.content
        'The capital of France is Paris.'
        >>> await openai.close()
        """
        from openai import AsyncOpenAI  # slow to import

        return AsyncOpenAI(**self.connection.openai_arguments(kwargs, is_async=True))

    def as_async(self) -> AsyncClient:
        """Give the same client for ``await``; both share the connections, and closing one closes the other.

        Examples
        --------
        >>> awaited = client.as_async()
        >>> print(await awaited.prompt("demo", "What is the capital of France?"))
        The capital of France is Paris.
        """
        from llmkit.client.async_client import AsyncClient

        return AsyncClient(self)
