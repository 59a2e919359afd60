"""Keys are found wherever a notebook can have them, and are never printed."""

from __future__ import annotations

import contextlib
import json
import random
import string
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from support import REPOSITORY

from llmkit.cli import main
from llmkit.cli.keys_in_notebooks import Unreadable, check_notebook, secrets_of

LETTERS = string.ascii_letters + string.digits
TAIL = "aB3dE5gH7jK9mN1pQ3sT5vW7yZ9bC1eF3hJ5kL7nP9"  # of no key that there is
KEYS = {
    "OpenAI key": [f"sk-{TAIL}", f"sk-proj-{TAIL[:20]}_{TAIL[20:]}-x", "sk-or-v1-" + "0123456789abcdef" * 4],
    "Anthropic key": [f"sk-ant-api03-{TAIL}"],
    "Hugging Face token": [f"hf_{TAIL[:34]}", "hf_AbcDefGhiJklMnoPqrStuVwxYzAbcDefGh"],
    "Google key": [f"AIza{TAIL[:35]}"],
    "Google key of a service account": [f"AQ.Ab8{TAIL}"],
    "GitHub token": [f"ghp_{TAIL[:36]}"],
    "GitHub token of an app's user": [f"gho_{TAIL[:36]}"],
    "GitHub token for an app's user": [f"ghu_{TAIL[:36]}"],
    "GitHub token of an app": [f"ghs_{TAIL[:36]}"],
    "GitHub fine-grained token": [f"github_pat_11ABCDEFG0{TAIL}"],
    "Replicate token": [f"r8_{TAIL[:37]}"],
    "NVIDIA key": [f"nvapi-{TAIL}{TAIL[:20]}"],
    "Perplexity key": [f"pplx-{TAIL}"],
    "Fireworks key": [f"fw_{TAIL[:24]}"],
    "Together key": [f"tgp_v1_{TAIL}"],
    "AWS key": ["AKIA" + "IOSF0DNN7EXAMPLQ"],
    "Slack token": ["xoxb-123456789012-1234567890123-" + TAIL[:24]],
    "Slack token of a user": ["xoxp-123456789012-1234567890123-" + TAIL[:24]],
    "Groq key": [f"gsk_{TAIL}"],
    "xAI key": [f"xai-{TAIL}"],
}
ALL = [(kind, key) for kind, keys in KEYS.items() for key in keys]


def notebook(*cells: dict[str, Any], **metadata: Any) -> dict[str, Any]:
    return {"cells": list(cells), "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}


def code(source: Any = "", outputs: Any = (), **metadata: Any) -> dict[str, Any]:
    parts = {"metadata": metadata, "source": source, "outputs": list(outputs)}
    return {"cell_type": "code", "execution_count": 1, **parts}


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "a.ipynb"


def found(file: Path, content: Any, **secrets: str) -> list[tuple[int | None, str, int, str]]:
    file.write_text(json.dumps(content))
    values = {value: name for name, value in secrets.items()}
    return [(one.cell, one.place, one.line, one.kind) for one in check_notebook(file, values)]


@pytest.mark.parametrize(("kind", "key"), ALL)
def test_every_well_known_key_is_found_by_its_name_and_is_not_shown(
    file: Path, capsys: pytest.CaptureFixture[str], kind: str, key: str
) -> None:
    file.write_text(json.dumps(notebook(code(f"import os\nkey = '{key}'"))))
    assert main(["check", str(file)]) == 1
    said = capsys.readouterr()
    assert said.out.startswith(f"{file}: cell 1, source, line 2: {kind} ")
    assert f"*** ({len(key)} characters)" in said.out
    assert main(["check", str(file), "--json"]) == 1
    told = capsys.readouterr()
    (finding,) = json.loads(told.out)["findings"]
    assert (finding["cell"], finding["line"], finding["kind"]) == (1, 2, kind)
    for text in (said.out, said.err, told.out, told.err):
        assert key[-8:] not in text
        assert key[8:16] not in text


KEY = f"sk-{TAIL}"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        (notebook(code(["a = 1\n", f"key = '{KEY}'\n"])), (1, "source", 2)),
        (notebook(code(), {"cell_type": "markdown", "metadata": {}, "source": KEY}), (2, "source", 1)),
        (notebook(code(outputs=[{"output_type": "stream", "text": ["ok\n", KEY]}])), (1, "output 1", 2)),
        (notebook(code(outputs=[{}, {"data": {"text/plain": f"'{KEY}'"}}])), (1, "output 2", 1)),
        (notebook(code(outputs=[{"traceback": [f"\x1b[0;32m'\x1b[38;5;21m{KEY}'"]}])), (1, "output 1", 1)),
        (notebook(code(outputs=[{"data": {"application/json": {"a": [{KEY: 1}]}}}])), (1, "output 1", 1)),
        (notebook(code(outputs=[{"data": {"text/plain": f"'a\\n{KEY}'"}}])), (1, "output 1", 1)),
        (notebook(code(papermill={"parameters": {"key": KEY}})), (1, "metadata", 1)),
        (notebook({"cell_type": "raw", "source": "", "attachments": {"a": {"b": KEY}}}), (1, "attachments", 1)),
        (notebook(widgets={"application/x": {"state": {"1": {"state": {"value": KEY}}}}}), (None, "widget state", 1)),
        (notebook(papermill={"environment": {"k": KEY}}), (None, "metadata", 1)),
        ({**notebook(), "extra": KEY}, (None, "notebook", 1)),
        ({"worksheets": [{"cells": [{"input": KEY}]}], "metadata": {}}, (1, "source", 1)),
    ],
)
def test_it_is_found_wherever_it_is(file: Path, content: Any, place: tuple[int | None, str, int]) -> None:
    assert found(file, content) == [(*place, "OpenAI key")]


def test_a_bearer_token_is_found_whoever_it_is_for(file: Path) -> None:
    header = f'curl -H "Authorization: Bearer {TAIL}"'
    assert found(file, notebook(code(header))) == [(1, "source", 1, "Bearer token")]
    assert found(file, notebook(code(f"Bearer {KEY}"))) == [(1, "source", 1, "OpenAI key")]


HEX = "0f1e2d3c4b5a69788796a5b4c3d2e1f0" + "0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (f"-H 'Authorization: token {HEX}'", "Jupyter token"),
        (f'{{"Authorization": "token {HEX}"}}', "Jupyter token"),
        (f"http://localhost:8888/lab?token={HEX}", "Jupyter token"),
        (f"https://x.org/a?b=c&access_token={TAIL}", "token in an address"),
        (f"export LLMKIT_TOKEN={HEX}", "value of a variable"),
        (f"AWS_SECRET_ACCESS_KEY={TAIL}", "value of a variable"),
        (f"MISTRAL_API_KEY={TAIL[:32]}", "value of an API key"),
        (f"Client(api_key='{TAIL[:40]}')", "value of an API key"),
        (f'api_key="{HEX[:32]}"', "value of an API key"),
        (f"x-api-key: {TAIL[:40]}", "value of an API key"),
        (f"https://x.org/sk-{TAIL}", "OpenAI key"),
        (f"MY_sk-{TAIL}", "OpenAI key"),
        (f"?key%3Dsk-{TAIL}", "OpenAI key"),
        (f"https://x/hf_{TAIL[:34]}", "Hugging Face token"),
    ],
)
def test_a_key_is_found_by_what_stands_before_it(file: Path, text: str, kind: str) -> None:
    assert found(file, notebook(code(text))) == [(1, "source", 1, kind)]


def test_a_value_is_found_as_it_is_printed(file: Path) -> None:
    value = 'pa\\ss"&word1'
    for written in (value, repr(value), json.dumps(value), "pa\\ss&quot;&amp;word1", "pa%5Css%22%26word1"):
        assert found(file, notebook(code(outputs=[{"text": written}])), MY_PASSWORD=value) == [
            (1, "output 1", 1, "value of MY_PASSWORD")
        ]


def test_a_folder_without_notebooks_is_no_clean_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path)]) == 2
    assert "it has no notebooks" in capsys.readouterr().err


def test_the_values_of_variables_are_found_as_what_they_are(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COMPANY_API_KEY", "no-known-beginning")
    monkeypatch.setenv("SHORT_TOKEN", "print")
    file.write_text(json.dumps(notebook(code("print('no-known-beginning')"))))
    assert main(["check", str(file)]) == 1
    out = capsys.readouterr().out
    assert "value of COMPANY_API_KEY *** (18 characters)" in out
    assert "no-known" not in out
    told = {"A_API_KEY": KEY, "B_TOKEN": KEY, "C_TOKEN": "short", "HOME": "/home/somebody", "D_KEY": "/home/d/.ssh/id"}
    assert secrets_of(told) == {KEY: "B_TOKEN"}
    assert secrets_of({"OPENAI_KEY": "password1", "DB_PASSWORD": "password2", "A_SECRET": "password3"}) == {
        "password1": "OPENAI_KEY",
        "password2": "DB_PASSWORD",
        "password3": "A_SECRET",
    }
    assert found(file, notebook(code(KEY)), A_API_KEY=KEY) == [(1, "source", 1, "value of A_API_KEY")]


@pytest.mark.parametrize(
    "text",
    [
        'api_key="sk-..."',
        "sk-xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx",
        "sk-1111111111111111111111111111",
        "<div class='sk-toggleable__label-arrow sk-container-id-1 sk-text-repr-fallback sk-estimator-doc-link'>",
        "client.set_key('gpt'); 'env:OPENAI_API_KEY'",
        "hf_hub_download(repo_id='a/b')",
        "Authorization: Bearer $LLMKIT_TOKEN",
        "Bearer token authentication is used",
        f"commit {HEX[:40]}",
        f"'{HEX[:40]}' 123e4567-e89b-42d3-a456-426614174000",
        "tokenizer.eos_token = '<|endoftext|>'; CACHE_KEY = 'd41d8cd98f00b204e9800998ecf8427e'",
        "api_key=os.environ['OPENAI_API_KEY'], token=get_token_of_user_number_12(1)",
        "to_hf_AutoModelForCausalLanguageModeling",
        f"task-{TAIL}",
        f"risk-{TAIL}",
    ],
)
def test_what_is_no_key_is_let_pass(file: Path, text: str) -> None:
    assert found(file, notebook(code(text, [{"data": {"text/html": text}}]))) == []


def test_images_are_no_keys(file: Path) -> None:
    dice = random.Random(1)
    image = "".join(dice.choices(LETTERS + "+/", k=2_000_000))
    image = image[:1000] + "AIza" + image[1004:]
    assert found(file, notebook(code(outputs=[{"data": {"image/png": image}}]))) == []


def test_a_folder_and_several_files_are_gone_through(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "deep").mkdir()
    for name, source in (("clean", "1"), ("deep/one", KEY), ("deep/two", f"hf_{TAIL}")):
        (tmp_path / f"{name}.ipynb").write_text(json.dumps(notebook(code(source))))
    assert main(["check", "--json", str(tmp_path / "clean.ipynb")]) == 0
    assert json.loads(capsys.readouterr().out) == {"findings": [], "unreadable": [], "checked": 1}
    assert main(["check", "--json", str(tmp_path)]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (len(told["findings"]), told["checked"]) == (2, 3)


@pytest.mark.parametrize(
    "data", [None, b"", b"\xff\xfe", b"[]", b'{"a": 1}', b"[" * 100_000, b'{"cells": [', b"\x00\x01"]
)
def test_a_file_that_cannot_be_read_is_status_2(
    tmp_path: Path, file: Path, capsys: pytest.CaptureFixture[str], data: bytes | None
) -> None:
    if data is not None:
        file.write_bytes(data)
    assert main(["check", str(file)]) == 2
    assert f"{file} cannot be read" in capsys.readouterr().err
    bad = tmp_path / "bad.ipynb"
    bad.write_text(json.dumps(notebook(code(KEY))))
    assert main(["check", str(file), str(bad), "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (len(told["findings"]), len(told["unreadable"])) == (1, 1)


@pytest.mark.parametrize(
    "content", [{"cells": None}, {"cells": [1, "a", None], "metadata": []}, {"cells": [{"outputs": 3}]}]
)
def test_a_notebook_of_another_shape_is_gone_through_all_the_same(file: Path, content: Any) -> None:
    assert found(file, content) == []
    assert found(file, {**content, "x": {"y": KEY}}) == [(None, "notebook", 1, "OpenAI key")]


def test_the_hook_of_pre_commit_runs_a_command_that_finds_a_key(file: Path) -> None:
    (hook,) = yaml.safe_load((REPOSITORY / ".pre-commit-hooks.yaml").read_text())
    assert (hook["id"], hook["language"], hook["types"]) == ("llmkit-check", "python", ["jupyter"])
    program, *arguments = hook["entry"].split()
    # As pre-commit does: the program from the environment that it has installed the package into.
    command = [str(Path(sys.executable).with_name(program)), *arguments, str(file)]
    for source, expected in (("print(1)", 0), (f"key = '{KEY}'", 1)):
        file.write_text(json.dumps(notebook(code(source))))
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, KEY in done.stdout + done.stderr) == (expected, False), done.stderr


WORDS = st.text("abc ()='\"\n.,:\u00e9", max_size=20)
NESTED = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(WORDS, inner, max_size=3),
    max_leaves=6,
)


@st.composite
def notebooks_with_a_key(draw: st.DrawFn) -> tuple[Any, str]:
    """Make something like a notebook, with a key anywhere in it."""
    _, key = draw(st.sampled_from(ALL))
    part: Any = draw(WORDS) + "\n" + key + "\n" + draw(WORDS)
    for wrap in draw(st.lists(st.sampled_from(["list", "name", "value"]), max_size=4)):
        if wrap == "list":
            part = [*draw(st.lists(NESTED, max_size=2)), part]
        elif wrap == "name" and isinstance(part, str):
            part = {part: draw(NESTED)}
        else:
            part = {draw(WORDS): part}
    where = draw(st.sampled_from(["source", "outputs", "attachments", "cell metadata", "metadata", "elsewhere"]))
    cell = {"cell_type": "code", "source": draw(WORDS), "outputs": [], "metadata": {}}
    content: dict[str, Any] = {"cells": [draw(NESTED), cell], "metadata": {}, "nbformat": 4}
    if where == "metadata":
        content["metadata"] = {draw(WORDS): part}
    elif where == "elsewhere":
        content["something"] = part
    else:
        cell[where.removeprefix("cell ")] = [part] if where == "outputs" else part
    return content, key


@given(notebooks_with_a_key())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_key_is_found_wherever_it_stands(file: Path, made: tuple[Any, str]) -> None:
    content, key = made
    file.write_text(json.dumps(content))
    findings = check_notebook(file, {})
    assert findings, content
    assert all(key not in str(finding) and key not in str(finding.to_wire()) for finding in findings)


@given(st.binary(max_size=80) | NESTED.map(lambda told: json.dumps(told).encode()))
@example(b"[" * 100_000)
@example(b'{"cells": ' + b"[" * 900 + b"]" * 900 + b"}")
@example(b'{"cells": ' + b"9" * 5000 + b"}")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_file_holds_is_read_or_refused(file: Path, content: bytes) -> None:
    file.write_bytes(content)
    with contextlib.suppress(Unreadable):
        check_notebook(file, {"value-of-a-variable": "NAME"})
