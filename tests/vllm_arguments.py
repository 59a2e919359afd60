"""Engine arguments of vLLM: a valid value of each that is taken, and what the installed parser makes of flags."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

# Prints every option of `vllm serve`, and what its parser makes of each list of flags of the standard input.
_REAL_PARSER = """
import json, sys
from llmkit.engines.vllm.launch import name_the_cpu_build
name_the_cpu_build()
from vllm.entrypoints.cli.serve import ServeSubcommand
from vllm.utils.argparse_utils import FlexibleArgumentParser
parser = FlexibleArgumentParser()
serve = ServeSubcommand().subparser_init(parser.add_subparsers())
options = sorted({option for action in serve._actions for option in action.option_strings})
print("options", json.dumps(options))
for flags in json.load(sys.stdin):
    try:
        parsed = vars(parser.parse_args(["serve", "some/model", *flags]))
        print("parsed", json.dumps({name: repr(value) for name, value in parsed.items()}))
    except SystemExit:
        print("parsed null")
"""

EVERY_ARGUMENT: dict[str, Any] = {
    "max_model_len": 128,
    "dtype": "bfloat16",
    "quantization": "fp8",
    "revision": "main",
    "enforce_eager": True,
    "gpu_memory_utilization": 0.5,
    "kv_cache_memory_bytes": 1 << 27,
    "kv_cache_dtype": "auto",
    "block_size": 16,
    "cpu_offload_gb": 1.5,
    "kv_offloading_size": 2.0,
    "mm_processor_cache_gb": 1.0,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 256,
    "enable_prefix_caching": False,
    "enable_chunked_prefill": True,
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "data_parallel_size": 2,
    "enable_expert_parallel": False,
    "disable_custom_all_reduce": True,
    "tokenizer": "some/tokenizer",
    "tokenizer_mode": "hf",
    "tokenizer_revision": "v1.0",
    "load_format": "safetensors",
    "safetensors_load_strategy": "eager",
    "seed": 7,
    "generation_config": "vllm",
    "max_logprobs": 5,
    "reasoning_parser": "qwen3",
    "enable_auto_tool_choice": True,
    "tool_call_parser": "hermes",
    "chat_template_content_format": "string",
    "default_chat_template_kwargs": {"enable_thinking": False},
    "limit_mm_per_prompt": {"image": 2},
    "trust_remote_code": True,
    "scheduling_policy": "priority",
}


def run_parser(flags: Sequence[Sequence[str]]) -> tuple[list[str], list[dict[str, str]]]:
    """Give the options of the installed vLLM, and what its parser makes of each list of flags.

    That is the `repr` of each value, by name, and nothing where the parser refuses.
    """
    done = subprocess.run(
        [sys.executable, "-c", _REAL_PARSER],
        input=json.dumps([list(some) for some in flags]),
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = done.stdout.splitlines()
    options: list[str] = json.loads(next(line for line in lines if line.startswith("options ")).partition(" ")[2])
    parsed = [json.loads(line.partition(" ")[2]) or {} for line in lines if line.startswith("parsed ")]
    assert len(parsed) == len(flags)
    return options, parsed


def parse_really(flags: Sequence[Sequence[str]]) -> list[dict[str, str]]:
    """Give what the installed vLLM's parser makes of each list of flags."""
    return run_parser(flags)[1]
