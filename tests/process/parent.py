"""A server in miniature: keeps a chain of processes, prints what it is called, then waits for its end.

.. code-block:: text

    python parent.py RUN_DIR [fork] TREE_ARGUMENTS...

With ``fork`` a child of its own inherits everything it has open, the pipe to the guardian too.
"""

import asyncio
import os
import sys
import time
from pathlib import Path

from llmkit.process.keeper import KeptProcess

TREE = Path(__file__).with_name("tree.py")


def start_bystander() -> int:
    pid = os.fork()
    if not pid:
        time.sleep(60)
    return pid


async def main() -> None:
    run_dir, *arguments = sys.argv[1:]
    fork = "fork" in arguments
    command = [sys.executable, "-I", "-S", str(TREE), *(a for a in arguments if a != "fork")]
    kept = KeptProcess(command, dict(os.environ), run_dir=Path(run_dir), log_file=Path(run_dir + ".log"))
    await kept.start()
    bystander = start_bystander() if fork else 0
    print(kept.engine_id, bystander, flush=True)
    await asyncio.sleep(60)


asyncio.run(main())
