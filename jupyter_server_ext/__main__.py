"""``python -m jupyter_server_ext`` is ``jupyter llmkit``, whatever lies on the path."""

from __future__ import annotations

from jupyter_server_ext.app import main

if __name__ == "__main__":
    main()  # type: ignore[no-untyped-call]
