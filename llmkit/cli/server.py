"""What there is: ``llmkit status``, ``ps``, ``usage`` and ``logs``."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING, Any

from llmkit.cli.output import print_json, print_table, write

if TYPE_CHECKING:
    from llmkit import schemas
    from llmkit.client import Client

LIVE = ("loading", "loaded", "unloading")


def add(commands: Any, shared: argparse.ArgumentParser) -> None:
    """Add the commands of this module."""
    command = commands.add_parser("status", parents=[shared], help="the server, its models and its devices")
    command.set_defaults(run=status)
    command = commands.add_parser("ps", parents=[shared], help="live models: memory, requests, expiry")
    command.set_defaults(run=ps)
    command = commands.add_parser("usage", parents=[shared], help="who has used how much of a shared server, by day")
    command.add_argument("--csv", action="store_true", help="print a table for a spreadsheet")
    command.set_defaults(run=usage)
    command = commands.add_parser("logs", parents=[shared], help="the log of a model's engine")
    command.add_argument("model", metavar="MODEL")
    command.add_argument("-f", "--follow", action="store_true", help="go on with each new line, until Ctrl+C")
    command.add_argument("--tail", type=_lines, default=200, metavar="N", help="begin N lines before the end (200)")
    command.set_defaults(run=logs)


def status(arguments: argparse.Namespace) -> int:
    """Say which server was found, how it is, and what models and devices it has."""
    from llmkit.client import connect
    from llmkit.client.results import describe_status

    with connect(arguments.url) as client:
        health, models, devices = client.health(), client.models(), client.devices()
        source = source_of(client, arguments.url)
    server = client.connection.server
    if arguments.json:
        print_json(
            {
                "server": {"url": server.url, "uds": server.uds, "pid": server.pid, "found": source},
                "health": health.model_dump(mode="json"),
                "models": [model.model_dump(mode="json") for model in models],
                "devices": devices.model_dump(mode="json"),
            }
        )
        return 0
    place = f"{server.url} (unix socket {server.uds})" if server.uds else server.url
    print(f"Server   {place}\nFound    {source}\nllmkit   {health.version}, {health.status}")
    for problem in health.problems:
        print(f"         {problem}")
    print()
    _print_devices(devices)
    if models:
        print()
        rows = [(one.model_id, describe_status(one), one.model_type, one.model_name) for one in models]
        print_table(("model", "status", "type", "name"), rows)
    else:
        print("\nNo models yet: `llmkit configure demo llmkit/demo --type vllm` makes one.")
    return 0


def source_of(client: Client, url: str | None) -> str:
    """Say how the server of a client was found."""
    from llmkit.client.discovery import candidates

    server = client.connection.server
    found = (one for one in candidates(url, os.environ) if one.server is not None and one.server.url == server.url)
    return next((one.source for one in found), "elsewhere")


def ps(arguments: argparse.Namespace) -> int:
    """Say what is loaded now, what it holds, and when it will be unloaded."""
    from llmkit.client import connect
    from llmkit.client.results import describe_memory, describe_status

    with connect(arguments.url) as client:
        models = [model for model in client.models() if model.status in LIVE]
    if arguments.json:
        print_json({"models": [model.model_dump(mode="json") for model in models]})
    elif not models:
        print("No model is loaded: `llmkit load MODEL` loads one.")
    else:
        columns = ("model", "status", "type", "memory", "requests", "expires")
        rows = [
            (
                model.model_id,
                describe_status(model),
                model.model_type,
                describe_memory(model.memory) or "-",
                f"{model.in_flight} running, {model.queued} waiting" if model.in_flight or model.queued else "-",
                _until(model),
            )
            for model in models
        ]
        print_table(columns, rows)
    return 0


def usage(arguments: argparse.Namespace) -> int:
    """Say who has used how much, as far as one may see it, and what is left of one's limits."""
    from llmkit.client import connect
    from llmkit.client.usage import COLUMNS, describe_left

    with connect(arguments.url) as client:
        told = client.usage()
        if arguments.csv and not arguments.json:
            response = client.connection.raw("GET", "llm/usage.csv")
            if not response.is_success:
                raise client.connection.error_of(response)
            write(response.text)
            return 0
    if arguments.json:
        print_json({"usage": [one.model_dump() for one in told], "limits": told.limits, "left": told.left})
        return 0
    if told:
        print_table(COLUMNS, [[str(value) for value in one.model_dump().values()] for one in told])
    else:
        print("Nothing was asked yet.")
    if left := describe_left(told.limits, told.left):
        print(left)
    return 0


def logs(arguments: argparse.Namespace) -> int:
    """Print the end of a log, and what follows if that is wanted."""
    from llmkit.client import connect

    with connect(arguments.url) as client:
        if arguments.follow:
            for line in client.follow_logs(arguments.model, arguments.tail):
                if arguments.json:
                    print_json({"line": line})
                else:
                    write(f"{line}\n")
            return 0
        lines = client.logs(arguments.model, arguments.tail)
    if arguments.json:
        print_json({"model_id": arguments.model, "lines": lines})
    else:
        write("".join(f"{line}\n" for line in lines))
    return 0


def _print_devices(devices: schemas.Devices) -> None:
    from llmkit.client.results import describe_bytes

    def memory(device: schemas.RAMDevice | schemas.GPUDevice) -> tuple[str, str]:
        held = ", ".join(f"{share.model_id} {describe_bytes(share.bytes) or '?'}" for share in device.shares)
        return f"{describe_bytes(device.free_bytes)} free of {describe_bytes(device.total_bytes)}", held

    rows = [("CPU", f"{devices.cpu.cores:g} cores", devices.cpu.name or ""), ("RAM", *memory(devices.ram))]
    rows += [(f"GPU {gpu.index}", *memory(gpu)) for gpu in devices.gpus]
    print_table(("device", "size", "models" if devices.gpus or devices.ram.shares else ""), rows)


def _until(model: schemas.Model) -> str:
    from datetime import UTC, datetime

    if model.expires_at is None:
        return "-"
    seconds = max(0.0, (model.expires_at - datetime.now(UTC)).total_seconds())
    return f"in {seconds / 60:.0f} min" if seconds >= 90 else f"in {seconds:.0f} s"


def _lines(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no number of lines")
    return int(text)
