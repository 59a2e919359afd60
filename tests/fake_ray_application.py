"""What `llmkit.engines.ray_application` is to the server, without Ray: ``python fake_ray_application.py ORDER``.

The cluster is a folder, the ``address`` of the order; an application is a file in it that holds the name of its
deployment. A file ``NAME.says`` of an application holds lines that are printed as soon as they are there; ``quit`` in
it ends the program at once. With a file ``not-ready`` in the folder an application is deployed and nothing more.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

MARK = "llmkit-ray: "


def tell(event: str, **more: Any) -> None:
    print(MARK + json.dumps({"event": event, **more}), flush=True)


def main() -> None:
    order = json.loads(sys.argv[1])
    folder, stopping = Path(order["address"]), []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    application, says = folder / order["name"], folder / f"{order['name']}.says"
    if not folder.is_dir():
        tell("failed", code="unreachable", message="nobody there")
        sys.exit(1)
    if order["do"] == "delete":
        application.unlink(missing_ok=True)
        tell("deleted")
        return
    tell("connected")
    adopted = application.exists() and application.read_text() == order["deployment"]
    application.write_text(order["deployment"])
    tell("state", status="DEPLOYING", running=0, wanted=order["min"], placed=order["min"], message="")
    print("[abc123] (EngineCore pid=1) INFO 01-01 00:00:00 [a.py:1] Starting to load model fake...", flush=True)
    if not (folder / "not-ready").exists():
        tell("state", status="RUNNING", running=order["min"], wanted=order["min"], placed=order["min"], message="")
        tell("ready", url=order["http_url"], adopted=adopted)
    said = 0
    while not stopping:
        lines = says.read_text().splitlines() if says.exists() else []
        for line in lines[said:]:
            if line == "quit":
                os._exit(3)
            print(line, flush=True)
            said += 1
        time.sleep(0.02)
    if not order["keep"] or Path(order["delete_file"]).exists():
        application.unlink(missing_ok=True)
        tell("deleted")


if __name__ == "__main__":
    main()
