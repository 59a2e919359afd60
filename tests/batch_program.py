"""A batch in a process of its own, to be killed: ``batch_program.py URL MODEL CHECKPOINT ROWS CONCURRENCY``.

The token is in ``LLMKIT_TOKEN``. It says ``asking`` when it begins, and at the end what became of the rows, as JSON.
"""

from __future__ import annotations

import json
import sys

import pandas as pd

from llmkit.client import connect


def main() -> None:
    """Run it."""
    url, model, checkpoint, rows, concurrency = sys.argv[1:]
    df = pd.DataFrame({"number": range(int(rows))})
    with connect(url) as client:
        print("asking", flush=True)
        answered = client.map(
            df,
            "number {number}",
            model=model,
            checkpoint=checkpoint,
            concurrency=int(concurrency),
            progress=False,
        )
    print(json.dumps({"responses": answered["response"].tolist(), "errors": int(answered["error"].notna().sum())}))


if __name__ == "__main__":
    main()
