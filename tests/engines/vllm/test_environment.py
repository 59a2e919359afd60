from __future__ import annotations

from pathlib import Path

import pytest

from llmkit.engines.vllm.environment import engine_environ

RUN_DIR = Path("/tmp/engine")


NEEDED = """
PATH HOME LANG LC_ALL TZ LD_LIBRARY_PATH LD_PRELOAD CUDA_VISIBLE_DEVICES NVIDIA_VISIBLE_DEVICES
HF_HOME HF_TOKEN HUGGING_FACE_HUB_TOKEN HF_ENDPOINT VLLM_CPU_OMP_THREADS_BIND VLLM_LOGGING_LEVEL TORCH_HOME
OMP_NUM_THREADS https_proxy NO_PROXY SSL_CERT_FILE REQUESTS_CA_BUNDLE PYTHONPATH XDG_CACHE_HOME
"""
SECRET_OR_HARMFUL = """
OPENAI_API_KEY ANTHROPIC_API_KEY JUPYTER_TOKEN JPY_API_TOKEN JUPYTERHUB_API_TOKEN LLMKIT_TOKEN
AWS_SECRET_ACCESS_KEY GITHUB_TOKEN DATABASE_URL VLLM_API_KEY VLLM_LOGGING_CONFIG_PATH
VLLM_ALLOW_INSECURE_SERIALIZATION VLLM_PORT VLLM_SERVER_DEV_MODE VLLM_DP_RANK
PYTHONSTARTUP PYTHONINSPECT BASH_ENV MY_PATH XPATH
"""


@pytest.mark.parametrize("name", NEEDED.split())
def test_what_an_engine_needs_is_passed(name: str) -> None:
    assert engine_environ({name: "value"}, RUN_DIR)[name] == "value"


@pytest.mark.parametrize("name", SECRET_OR_HARMFUL.split())
def test_what_is_secret_or_harmful_is_not(name: str) -> None:
    assert name not in engine_environ({name: "value"}, RUN_DIR)


def test_everything_temporary_lies_in_the_folder_of_the_engine_and_caches_do_not() -> None:
    environ = engine_environ({"HOME": "/home/me", "TMPDIR": "/elsewhere"}, RUN_DIR)
    assert environ["TMPDIR"] == environ["VLLM_RPC_BASE_PATH"] == str(RUN_DIR)
    assert environ["TORCHINDUCTOR_CACHE_DIR"].startswith("/home/me/.cache/")


def test_every_listener_stays_on_this_machine_whatever_the_server_has_set() -> None:
    given = {"VLLM_HOST_IP": "192.0.2.1", "GLOO_SOCKET_IFNAME": "eth0", "NCCL_SOCKET_IFNAME": "eth0"}
    environ = engine_environ(given, RUN_DIR)
    assert environ["VLLM_HOST_IP"] == "127.0.0.1"
    assert environ["GLOO_SOCKET_IFNAME"] == environ["NCCL_SOCKET_IFNAME"] == "lo"


def test_nothing_is_told_to_others() -> None:
    environ = engine_environ({"VLLM_NO_USAGE_STATS": "0"}, RUN_DIR)
    assert (environ["VLLM_NO_USAGE_STATS"], environ["DO_NOT_TRACK"]) == ("1", "1")


def test_arguments_win_over_variables() -> None:
    given = {"VLLM_CPU_KVCACHE_SPACE": "40", "HF_HUB_OFFLINE": "0"}
    assert engine_environ(given, RUN_DIR)["VLLM_CPU_KVCACHE_SPACE"] == "40"
    assert "VLLM_CPU_KVCACHE_SPACE" not in engine_environ(given, RUN_DIR, sets_kv_cache=True)
    assert engine_environ(given, RUN_DIR, offline=True)["HF_HUB_OFFLINE"] == "1"
