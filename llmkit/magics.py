"""Magics for notebooks: ``%load_ext llmkit``, then ``%llm`` and ``%%llm``.

.. code-block:: text

    %llm models                  a table of all models
    %llm load NAME               load a model; with a progress bar
    %llm unload NAME             unload it
    %llm use NAME                ask this model where a cell names none
    %llm status                  the server, and the models that are loaded

    %%llm [NAME] [--system TEXT] [--temperature F] [--max-tokens N]
          [--as markdown|json|code] [--to VARIABLE] [--no-stream]
    The prompt, in which {name}, {row.city} or {price:.2f} stand for variables of the notebook.
    A brace itself is written {{ or }}.

The answer comes as it is made; the stop button ends it on the server too. ``--as markdown`` shows it formatted,
``--as json`` reads it and gives the value, ``--as code`` puts its code into a new cell below. ``--to VARIABLE`` keeps
its text (of JSON: the value; of code: the code), and if you stop it, the text that has come. ``_llm`` is the last
whole answer with its provenance.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import keyword
import re
import shlex
import string
import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from IPython.core.error import UsageError
from IPython.core.interactiveshell import InteractiveShell
from IPython.core.magic import no_var_expand
from IPython.display import Markdown, display

from llmkit.client import Answer, Client, ModelList, connect
from llmkit.client.markdown import harmless
from llmkit.client.stopping import Stopped
from llmkit.errors import ConnectError, DoesNotFit, EngineGone, LLMKitError, NotAllowed, NotAuthenticated

REDRAW_SECONDS = 0.1
"""Formatted text is drawn again at most that often."""
NAMES_SECONDS = 10.0
"""So long the names of models that are offered with Tab count as known."""
ANSWER_VARIABLE = "_llm"
COMMANDS = ("models", "load", "unload", "use", "status")
USAGE = (__doc__ or "").split(".. code-block:: text\n", 1)[-1].strip("\n")
_loaded: weakref.WeakValueDictionary[int, Magics] = weakref.WeakValueDictionary()
"""By the shell's identity: the shell has them, and they have the shell."""
_BLOCK = re.compile(r"^ {0,3}```[^\n`]*\n(.*?)^ {0,3}```[ \t]*$", re.DOTALL | re.MULTILINE)


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Add ``%llm`` and ``%%llm``; called by ``%load_ext llmkit``.

    Parameters
    ----------
    shell
        The shell of the kernel.

    Examples
    --------
    >>> %load_ext llmkit
    >>> %llm status
    http://127.0.0.1:...: llmkit ..., ok
    model_id  status  model_type    model_name   ...
    ...
    >>> %%llm demo --temperature 0
    ... What is the capital of France?
    The capital of France is Paris.
    """
    magics = _loaded[id(shell)] = Magics(shell)

    # Functions, as IPython marks them: braces are ours, and a variable that is missing is an error.
    @no_var_expand
    def line(line: str) -> Any:
        return magics.line(line)

    @no_var_expand
    def cell(line: str, cell: str) -> Any:
        return magics.cell(line, cell)

    line.__doc__ = cell.__doc__ = f"Ask models of the Jupyter server.\n\n{USAGE}"
    shell.magics_manager.register_function(line, "line", "llm")
    shell.magics_manager.register_function(cell, "cell", "llm")
    for name in ("%llm", "%%llm"):
        shell.set_hook("complete_command", magics.complete, str_key=name)  # type: ignore[no-untyped-call]


def unload_ipython_extension(shell: InteractiveShell) -> None:
    """Take ``%llm`` and ``%%llm`` away; called by ``%unload_ext llmkit`` and ``%reload_ext llmkit``.

    Parameters
    ----------
    shell
        The shell of the kernel.

    Examples
    --------
    >>> %unload_ext llmkit
    """
    for kind in ("line", "cell"):
        shell.magics_manager.magics[kind].pop("llm", None)
    for name in ("%llm", "%%llm"):
        shell.strdispatchers["complete_command"].strs.pop(name, None)
    if (magics := _loaded.pop(id(shell), None)) is not None:
        magics.close()


class Magics:
    """The magics of one shell; the server is looked for when it is first needed."""

    def __init__(self, shell: InteractiveShell) -> None:
        self._shell = shell
        self._client: Client | None = None
        self._model_id: str | None = None
        self._names: list[str] = []
        self._names_until = 0.0

    # -- %llm ------------------------------------------------------------------------------------------------------

    def line(self, line: str) -> Any:
        """Run ``%llm``."""
        command, *arguments = _split(line) or [""]
        if command in ("", "help", "-h", "--help"):
            print(USAGE)
            return None
        if command not in COMMANDS:
            raise UsageError(f"%llm knows no `{command}`: it has {', '.join(COMMANDS)}.")
        wants_name = command in ("load", "unload", "use")
        if len(arguments) != wants_name:
            raise UsageError(f"Write %llm {command}{' NAME' if wants_name else ''}.")
        with self._connected() as client:
            return self._run(client, command, *[expand(name, self._shell.user_ns) for name in arguments])

    def _run(self, client: Client, command: str, model_id: str = "") -> Any:
        if command == "models":
            return client.models()
        if command == "load":
            return client.load(model_id)
        if command == "unload":
            client.unload(model_id)
            return client.model(model_id)
        if command == "use":
            self._model_id = client.model(model_id).model_id
            return None
        health = client.health()
        print(f"{client.place}: llmkit {health.version}, {health.status}")
        for problem in health.problems:
            print(f"  {problem}")
        if self._model_id is not None:
            print(f"%%llm asks {self._model_id}.")
        live = ModelList(model for model in client.models() if model.status != "unloaded")
        print(repr(live) if live else "No model is loaded.")
        return None

    # -- %%llm -----------------------------------------------------------------------------------------------------

    def cell(self, line: str, cell: str) -> Any:
        """Run ``%%llm``."""
        options = _parser().parse_args(_split(line))
        if options.help:
            print(USAGE)
            return None
        if options.to is not None and (not options.to.isidentifier() or keyword.iskeyword(options.to)):
            raise UsageError(f"--to wants the name of a variable, and `{options.to}` can be none.")
        variables = self._shell.user_ns
        prompt = expand(cell, variables).strip()
        if not prompt:
            raise UsageError("The cell has no prompt: write it below the line with %%llm.")
        parameters: dict[str, Any] = {
            "system": expand(options.system, variables) if options.system is not None else None,
            "temperature": options.temperature,
            "max_tokens": options.max_tokens,
        }
        parameters = {name: value for name, value in parameters.items() if value is not None}
        with self._connected() as client:
            model_id = expand(options.model, variables) if options.model else self._default(client)
            screen = _screen(options.form)
            if options.stream:
                answer = self._stream(client, model_id, prompt, parameters, screen, options.to)
            else:
                answer = client.prompt(model_id, prompt, **parameters)
                screen.end(answer.response)
        variables[ANSWER_VARIABLE] = answer
        return self._hand_over(answer.response, options.form, options.to)

    def _stream(
        self,
        client: Client,
        model_id: str,
        prompt: str,
        parameters: Mapping[str, Any],
        screen: _Silent,
        to: str | None,
    ) -> Answer:
        # Whatever ends the loop ends the generation on the server with the stream.
        with client.stream(model_id, prompt, **parameters) as stream:
            try:
                for _ in stream:
                    screen.come(stream.text)
                screen.end(stream.text)
            except BaseException as error:
                self._keep(to, stream.text)
                if isinstance(error, KeyboardInterrupt):
                    with contextlib.suppress(KeyboardInterrupt):
                        screen.end(stream.text)
                    kept = f" What has come is in `{to}`." if to else ""
                    raise Stopped(f"Stopped.{kept}") from None
                raise
        if stream.answer is None:
            raise EngineGone("The answer ended before it was complete.", hint="Ask again.")
        return stream.answer

    def _hand_over(self, text: str, form: str | None, to: str | None) -> Any:
        if form == "json":
            self._keep(to, text)
            value = read_json(text)
            self._keep(to, value)
            return value
        if form == "code":
            code = read_code(text)
            self._keep(to, code)
            self._shell.set_next_input(code)
            return None
        self._keep(to, text)
        return None

    def _keep(self, to: str | None, value: Any) -> None:
        if to is not None:
            self._shell.user_ns[to] = value

    def _default(self, client: Client) -> str:
        if self._model_id is not None:
            return self._model_id
        loaded = [model.model_id for model in client.models() if model.status == "loaded"]
        if len(loaded) == 1:
            return loaded[0]
        said = f"Loaded are {', '.join(loaded)}." if loaded else "None is loaded: %llm load NAME does that."
        raise UsageError(f"Which model? Write %%llm NAME, or %llm use NAME once. {said}")

    def close(self) -> None:
        """Close the connections to the server."""
        client, self._client = self._client, None
        if client is not None:
            client.close()

    # -- the server ------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _connected(self) -> Iterator[Client]:
        if self._client is None:
            self._client = connect()
        try:
            yield self._client
        except (ConnectError, NotAuthenticated, NotAllowed):
            # It may be back on another port, or with another token: the next magic looks for it.
            self.close()
            raise

    def complete(self, _: Any, event: Any) -> list[str]:
        """Give what Tab offers after ``%llm`` or ``%%llm``."""
        words = event.line.split()
        if words[0] == "%llm" and len(words) + (not event.symbol) <= 2:
            return list(COMMANDS)
        if time.monotonic() > self._names_until:
            with contextlib.suppress(LLMKitError), self._connected() as client:
                self._names = [model.model_id for model in client.models()]
            self._names_until = time.monotonic() + NAMES_SECONDS
        return self._names


def expand(template: str, variables: Mapping[str, Any]) -> str:
    """Put variables into a text, as `str.format` does; ``{{`` and ``}}`` are braces.

    Raises
    ------
    UsageError
        If there is no such variable, or the braces do not match.

    Examples
    --------
    >>> expand("{n:.1f} {unit} in {{braces}}", {"n": 2, "unit": "m"})
    '2.0 m in {braces}'
    """
    own = "A brace that is none of a variable is written {{ or }}."
    try:
        return _Template().vformat(template, (), variables)
    except _NoVariable as error:
        raise UsageError(f"There is no variable `{error}`. {own}") from None
    except UsageError:
        raise
    except Exception as error:  # noqa: BLE001  # the variables' own code runs here
        raise UsageError(f"The variables cannot be put in: {type(error).__name__}: {error}. {own}") from None


class _NoVariable(Exception):
    """A template names a variable that there is not."""


class _Template(string.Formatter):
    def get_value(self, key: int | str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        if not isinstance(key, str) or key not in kwargs:
            raise _NoVariable(key)
        return kwargs[key]

    def parse(self, format_string: str) -> Iterator[Any]:
        for part in super().parse(format_string):
            if part[1] == "":  # which would be the first of what is counted
                raise _NoVariable("{}")
            yield part

    def get_field(self, field_name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        try:
            return super().get_field(field_name, args, kwargs)
        except (AttributeError, LookupError) as error:
            raise UsageError(f"`{{{field_name}}}` has no value: {type(error).__name__}: {error}.") from None


def read_json(text: str) -> Any:
    r"""Read the JSON of an answer, also from within a block of code.

    Raises
    ------
    DoesNotFit
        If it is none.

    Examples
    --------
    >>> read_json('```json\n{"city": "Paris"}\n```')
    {'city': 'Paris'}
    """
    blocks = _BLOCK.findall(text)
    try:
        return json.loads(blocks[0] if blocks else text)
    except (ValueError, RecursionError) as error:
        start = text.strip()[:60]
        why = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)
        raise DoesNotFit(
            f"The answer is no JSON: {why}. It begins: {start!r}.",
            hint=f"Ask for JSON alone in the prompt. The text of the answer is {ANSWER_VARIABLE}.response.",
        ) from None


def read_code(text: str) -> str:
    r"""Give the code of an answer: its blocks of code, or all of it if there is none.

    Examples
    --------
    >>> read_code("Try:\n```python\nprint(1)\n```\nThat is all.")
    'print(1)'
    """
    blocks = [block.rstrip() for block in _BLOCK.findall(text)]
    return "\n\n".join(blocks) if blocks else text.strip()


class _Silent:
    """Shows nothing: what is made of the answer follows at its end."""

    def come(self, text: str) -> None:
        """Show the text that has come so far."""

    def end(self, text: str) -> None:
        """Show the text, of which that is all."""


class _Plain(_Silent):
    """Prints what is new."""

    def __init__(self) -> None:
        self._shown = 0

    def come(self, text: str) -> None:
        print(text[self._shown :], end="", flush=True)
        self._shown = len(text)

    def end(self, text: str) -> None:
        self.come(text)
        print()


class _Formatted(_Silent):
    """Draws Markdown again and again, in one place."""

    def __init__(self) -> None:
        self._handle: Any = None
        self._drawn = 0.0

    def come(self, text: str) -> None:
        if time.monotonic() - self._drawn >= REDRAW_SECONDS:
            self.end(text)

    def end(self, text: str) -> None:
        self._drawn = time.monotonic()
        drawn = Markdown(harmless(text))  # type: ignore[no-untyped-call]
        if self._handle is None:
            self._handle = display(drawn, display_id=True)  # type: ignore[no-untyped-call]
        else:
            self._handle.update(drawn)


def _screen(form: str | None) -> _Silent:
    return {None: _Plain, "markdown": _Formatted}.get(form, _Silent)()


def _split(line: str) -> list[str]:
    try:
        return shlex.split(line)
    except ValueError as error:
        raise UsageError(f"The line cannot be read: {error}. Quotes go around a text with blanks.") from None


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(f"%%llm: {message}. %llm help shows what there is.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser("%%llm", add_help=False, allow_abbrev=False)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--system")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--as", dest="form", choices=("markdown", "json", "code"))
    parser.add_argument("--to")
    parser.add_argument("--no-stream", dest="stream", action="store_false")
    parser.add_argument("-h", "--help", action="store_true")
    return parser
