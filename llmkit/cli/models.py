"""What changes models: ``llmkit configure``, ``load``, ``unload`` and ``delete``."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from llmkit.cli.output import note, print_json
from llmkit.cli.values import assignment_without_key, finite, truth
from llmkit.errors import ModelIsLoaded

if TYPE_CHECKING:
    from llmkit.client import Client, Configuration, Model

OPTIONAL = ("description", "auto_load", "idle_ttl", "restart", "max_in_flight", "max_queued", "fallback")


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    _add_configure(commands, shared)
    command = commands.add_parser("load", parents=[shared], help="load a model, and show how far it is")
    command.add_argument("model", metavar="MODEL")
    command.add_argument(
        "--wait",
        type=truth,
        nargs="?",
        const=True,
        default=True,
        metavar="true|false",
        help="until it is loaded (true)",
    )
    command.add_argument("--force", action="store_true", help="unload busy models to make room, and try in any case")
    command.set_defaults(run=load)
    command = commands.add_parser("unload", parents=[shared], help="unload a model, or cancel its load")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--drain", type=finite, default=0.0, metavar="S", help="seconds for running requests (0)")
    command.set_defaults(run=unload)
    command = commands.add_parser("delete", parents=[shared], help="delete a configuration and its key")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("--unload", action="store_true", help="unload the model first, if it is loaded")
    command.set_defaults(run=delete)


def _add_configure(commands: Any, shared: argparse.ArgumentParser) -> None:
    command = commands.add_parser(
        "configure",
        parents=[shared],
        help="store a configuration",
        description="Stores a configuration. Example: llmkit configure demo llmkit/demo --type vllm "
        "--set max_model_len=512 --set temperature=0",
    )
    command.add_argument("model", metavar="MODEL_ID", help="your name for the model")
    command.add_argument("model_name", metavar="MODEL_NAME", help="a hub name, a path, or the name at the endpoint")
    command.add_argument("--type", required=True, dest="model_type", metavar="T", help="the engine: vllm, openai")
    command.add_argument(
        "--set",
        action="append",
        type=assignment_without_key,
        default=[],
        metavar="KEY=VALUE",
        help="an engine argument or a generation default; the value is JSON, else a text; as often as needed",
    )
    key = command.add_mutually_exclusive_group()
    key.add_argument("--key-from-env", metavar="NAME", help="the key is in this variable of the server")
    key.add_argument("--ask-key", action="store_true", help="ask for the key, without showing it")
    command.add_argument("--description", metavar="TEXT", help="for people")
    command.add_argument(
        "--auto-load", type=truth, nargs="?", const=True, metavar="true|false", help="at the first request"
    )
    command.add_argument("--idle-ttl", type=finite, metavar="S", help="unload after so many seconds without a request")
    command.add_argument("--restart", choices=("never", "on_failure"), help="when the engine of the loaded model fails")
    command.add_argument("--max-in-flight", type=int, metavar="N", help="requests running at once")
    command.add_argument("--max-queued", type=int, metavar="N", help="requests waiting at most")
    command.add_argument("--fallback", metavar="MODEL_ID", help="the model that answers when this one fails")
    command.add_argument(
        "--replace", action="store_true", help="take the place of another configuration of this name; its key stays"
    )
    command.add_argument(
        "--reload",
        action="store_true",
        help="as --replace, and where the engine has to start anew for it, unload a live model and load it again; "
        "that ends its running requests",
    )
    command.set_defaults(run=configure)


def configure(arguments: argparse.Namespace) -> int:
    """Store a configuration.

    Raises
    ------
    LLMKitError
        If a field is wrong, the name is taken, or the model is live and would have to be loaded again; why it could
        not be, with ``--reload``.
    """
    from llmkit.client import connect, keys

    kwargs = dict(arguments.set)
    if arguments.key_from_env:
        kwargs = keys.with_key(kwargs, f"env:{arguments.key_from_env}")
    elif arguments.ask_key:
        kwargs = keys.with_key(kwargs, keys.clean_key(keys.ask_key(arguments.model)))
    optional = {name: value for name in OPTIONAL if (value := getattr(arguments, name)) is not None}
    with connect(arguments.url) as client:
        known = {one.model_id: one for one in client.configurations()} if arguments.replace or arguments.reload else {}
        stored = known.get(arguments.model)
        if stored is None:
            made = client.configure(arguments.model, arguments.model_name, arguments.model_type, kwargs, **optional)
            model = None
        else:
            made, model = _replace(client, arguments, stored, kwargs, optional)
    if arguments.json:
        print_json(made.to_wire())
    elif model is not None and model.status == "loaded":
        print(f"{made.model_id} is configured, and loaded.")
    else:
        print(f"{made.model_id} is configured: `llmkit load {made.model_id}` loads it.")
    return 0


def _replace(
    client: Client,
    arguments: argparse.Namespace,
    stored: Configuration,
    kwargs: dict[str, Any],
    optional: dict[str, Any],
) -> tuple[Configuration, Model]:
    """Put a configuration in the place of another, and give it with its model, which is loaded again if it was."""
    from llmkit.cli.loading import watch
    from llmkit.client import keys

    key = keys.key_of(stored.model_kwargs)
    if key is not None and keys.key_of(kwargs) is None:
        kwargs = keys.with_key(kwargs, key)
    try:
        made = client.update(
            stored.model_id,
            reload=arguments.reload,
            model_name=arguments.model_name,
            model_type=arguments.model_type,
            model_kwargs=kwargs,
            **{name: optional.get(name) for name in OPTIONAL},
        )
    except ModelIsLoaded as error:
        error.hint = (
            f"`llmkit unload {stored.model_id}` first, or the same with --reload, which ends its running requests."
        )
        raise
    model = client.model(stored.model_id)
    if arguments.reload and model.status in ("loading", "failed"):
        model = watch(client, stored.model_id, quiet=arguments.json)
    return made, model


def load(arguments: argparse.Namespace) -> int:
    """Load a model and show how far it is.

    Raises
    ------
    LLMKitError
        Why it could not be loaded.
    """
    from llmkit.cli.loading import watch
    from llmkit.client import connect
    from llmkit.client.results import describe_status

    with connect(arguments.url) as client:
        model = client.start_loading(arguments.model, force=arguments.force)
        if arguments.wait and model.status != "loaded":
            try:
                model = watch(client, arguments.model, quiet=arguments.json)
            except KeyboardInterrupt:
                if not arguments.json:
                    note(f"The load goes on; `llmkit unload {arguments.model}` cancels it.")
                raise
    if arguments.json:
        print_json(model.model_dump(mode="json"))
    elif model.status == "loaded":
        seconds = f" in {model.load_seconds:.1f} s" if model.load_seconds is not None else ""
        print(f"{model.model_id} is loaded{seconds}.")
    else:
        print(f"{model.model_id}: {describe_status(model)}. `llmkit ps` shows it, `llmkit load` waits for it.")
    return 0


def unload(arguments: argparse.Namespace) -> int:
    """Unload a model and say what was freed."""
    from llmkit.client import connect
    from llmkit.client.results import describe_memory

    with connect(arguments.url) as client:
        freed = client.unload(arguments.model, drain=arguments.drain)
    if arguments.json:
        print_json({"model_id": arguments.model, "freed": freed.model_dump(mode="json")})
    else:
        size = describe_memory(freed)
        print(f"{arguments.model} is unloaded{f', {size} freed' if size else ''}.")
    return 0


def delete(arguments: argparse.Namespace) -> int:
    """Delete a configuration and its key."""
    from llmkit.client import connect

    with connect(arguments.url) as client:
        client.delete(arguments.model, unload=arguments.unload)
    if arguments.json:
        print_json({"model_id": arguments.model, "deleted": True})
    else:
        print(f"{arguments.model} is deleted.")
    return 0
