"""Lessons of advisories that tests elsewhere show, by name; and that every test that is named somewhere exists."""

from __future__ import annotations

import ast
import re
import tomllib

from packaging.requirements import Requirement
from support import REPOSITORY

PROVEN_ELSEWHERE = {
    "no part of a key is echoed": [
        "tests/jupyter_server_ext/test_keys.py::test_the_canary_is_nowhere_but_in_its_file",
        "tests/engines/test_refusals.py::test_eight_or_more_characters_of_an_end_of_a_key_are_never_left",
    ],
    "a key is bound to scheme, host and port": [
        "tests/jupyter_server_ext/test_keys.py::test_a_key_is_asked_for_again_when_the_address_changes",
        "tests/jupyter_server_ext/test_keys.py::test_which_variables_may_be_named",
    ],
    "there is no default key": [
        "tests/jupyter_server_ext/test_keys.py::test_the_servers_own_key_goes_only_to_its_own_origin",
        "tests/jupyter_server_ext/test_keys.py::test_a_mark_that_was_never_given_is_no_key",
    ],
    "no redirect, challenge, cookie or password file is followed upstream": [
        "tests/engines/test_http.py::test_redirects_are_not_followed",
        "tests/engines/test_http.py::test_a_challenge_is_not_answered",
        "tests/engines/test_http.py::test_cookies_are_neither_kept_nor_sent",
        "tests/engines/test_http.py::test_no_password_of_the_users_files_is_sent",
    ],
    "flags are a chosen list, each written as one word": [
        "tests/engines/vllm/test_arguments.py::test_what_could_run_code_or_read_files_cannot_be_asked_for",
        "tests/engines/vllm/test_arguments.py::test_no_accepted_value_can_become_a_flag_of_its_own",
        "tests/engines/vllm/test_environment.py::test_what_is_secret_or_harmful_is_not",
    ],
    "only listed paths and headers go to an engine": [
        "tests/jupyter_server_ext/test_openai_api.py::test_only_what_is_on_the_list_of_paths_can_be_reached",
        "tests/jupyter_server_ext/test_openai_api.py::test_the_engine_sees_no_header_of_the_client_but_those_of_its_traces",
        "tests/jupyter_server_ext/test_openai_api.py::test_headers_of_the_endpoint_pass_only_if_they_are_harmless",
    ],
    "ids follow one rule": [
        "tests/reliability/test_r04_ids.py::test_r04_the_validator_is_one_full_match",
        "tests/reliability/test_r04_ids.py::test_r04_hostile_ids_reach_nothing_on_any_route",
    ],
    "no body is held before it is known who sends it": [
        "tests/reliability/test_r05_bodies.py::test_r05_300_mb_without_credentials_fill_no_memory",
        "tests/reliability/test_r05_bodies.py::test_r05_what_is_not_a_strict_json_object_is_a_400",
    ],
    "an API request makes no session": [
        "tests/jupyter_server_ext/test_openai_api.py::test_an_api_request_makes_no_login_cookie"
    ],
    "records hold no words": ["tests/jupyter_server_ext/test_openai_api.py::test_records_hold_no_words_of_anybody"],
    "schemas and patterns are bounded, and the look at them is cheap": [
        "tests/inference/test_bounds.py::test_what_a_compiler_may_not_be_given_is_named_by_its_path",
        "tests/inference/test_bounds.py::test_a_look_at_a_usual_request_costs_microseconds_and_at_the_largest_little",
    ],
    "a stop has an end": [
        "tests/reliability/test_r14_stops.py::test_r14_the_server_ends_within_15_seconds_and_leaves_nothing"
    ],
}  # fmt: skip


def test_dependencies_are_new_enough_and_without_what_taught_these_lessons() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [Requirement(text) for text in project["dependencies"]]
    some = [Requirement(text) for extra in project["optional-dependencies"].values() for text in extra]
    assert not {one.name for one in wanted + some} & {"litellm", "simpervisor", "jupyter-server-proxy"}
    by_name = {one.name: one.specifier for one in wanted}
    assert "2.19.9" not in by_name["jupyter_server"]
    assert "2.20" in by_name["jupyter_server"]
    assert "6.5.5" not in by_name["tornado"]
    assert "6.5.6" in by_name["tornado"]


def missing(names: list[str]) -> list[str]:
    """Give the tests of these, ``FILE::NAME``, that do not exist."""
    found = []
    for name in names:
        file, _, function = name.partition("::")
        path = REPOSITORY / file
        tree = ast.parse(path.read_text()) if path.is_file() else ast.Module([], [])
        kinds = (ast.FunctionDef, ast.AsyncFunctionDef)
        defined = {node.name for node in ast.walk(tree) if isinstance(node, kinds)}
        if not path.is_file() or (function and function not in defined):
            found.append(name)
    return found


def test_every_test_that_is_named_here_exists() -> None:
    assert missing([name for names in PROVEN_ELSEWHERE.values() for name in names]) == []
    assert missing(["tests/reliability/test_named.py::test_no_such"]) == [
        "tests/reliability/test_named.py::test_no_such"
    ]
    assert missing(["tests/no_such.py"]) == ["tests/no_such.py"]


def test_every_test_that_security_md_names_exists() -> None:
    names = re.findall(r"`(tests/[\w/]+\.py(?:::\w+)?)`", (REPOSITORY / "SECURITY.md").read_text())
    assert len(names) >= 15
    assert missing(names) == []
