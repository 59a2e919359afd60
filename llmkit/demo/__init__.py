"""The embedded demo model: a tiny Llama that knows capitals, so that a real engine runs on any machine.

Its card, ``model/README.md``, says what it answers and how well. ``train.py`` made it.
"""

from __future__ import annotations

from pathlib import Path

DEMO_MODEL_NAME = "llmkit/demo"
"""The ``model_name`` that stands for the embedded model."""


def demo_model_path() -> Path:
    """Give the folder of the model's files, in the form that ``vllm serve`` takes.

    Returns
    -------
    Path
        The folder with weights, tokenizer, chat template and model card.
    """
    return Path(__file__).with_name("model")
