"""What a person sees who has pressed the stop button, or Ctrl+C."""

from __future__ import annotations


class Stopped(KeyboardInterrupt):
    """The person has stopped a call, and what it ran on the server is ended; IPython shows it in one line."""

    def _render_traceback_(self) -> list[str]:
        return [str(self)]
