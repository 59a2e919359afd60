"""``python -m llmkit`` is the ``llmkit`` command."""

from __future__ import annotations

import sys

from llmkit.cli import main

sys.exit(main())
