"""A type checker knows what both clients give and take: one of their calls that is wrong is found before it is run."""

from __future__ import annotations

from pathlib import Path

import pytest
from mypy import api
from support import REPOSITORY

CALLS = Path(__file__).with_name("typed_calls.py")


def test_a_type_checker_knows_the_calls_of_both_clients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYPYPATH", str(REPOSITORY))
    # --strict also finds an exemption that exempts nothing: every mistake in the file is one for mypy.
    options = ["--strict", "--config-file=", "--follow-imports=silent", f"--cache-dir={tmp_path}"]
    said, trouble, status = api.run([*options, str(CALLS)])
    assert status == 0, said + trouble
