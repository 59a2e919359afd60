"""The embedded demo model is whole, small, and answers as its card says."""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Sequence
from typing import Any

import pytest

from llmkit.demo import demo_model_path, questions

MODEL = demo_model_path()
SAMPLE = 150


def stated(kind: str) -> float:
    """Give the share of exact answers, 0 to 1, that the model card states for a kind of question."""
    card = (MODEL / "README.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| {re.escape(kind)} \|.*\| ([\d.]+) % \|$", card, re.MULTILINE)
    assert row, f"the card has no row {kind!r}"
    return float(row[1]) / 100


def test_the_checksums_match_and_name_every_file() -> None:
    lines = (MODEL / "SHA256SUMS").read_text().splitlines()
    listed = {name: checksum for checksum, name in (line.split("  ") for line in lines)}
    files = [path for path in MODEL.iterdir() if path.name != "SHA256SUMS"]
    assert {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files} == listed


def test_the_model_is_small() -> None:
    assert sum(path.stat().st_size for path in MODEL.iterdir()) < 4_000_000


def test_the_table_has_every_state_and_no_capital_twice() -> None:
    assert len(questions.CAPITALS) == 193 + 2 + 2  # members of the United Nations, its observers, Kosovo and Taiwan
    assert len(set(questions.CAPITALS.values())) == len(questions.CAPITALS)


def test_held_out_questions_are_never_drawn_for_training() -> None:
    held_out = {questions.bare(pair.question) for pairs in questions.held_out_pairs().values() for pair in pairs}
    trained = {questions.bare(pair.question) for pairs in questions.trained_pairs().values() for pair in pairs}
    sampler = questions.Sampler(seed=1)
    drawn = {questions.bare(sampler.draw().question) for _ in range(5_000)}
    assert not held_out & (trained | drawn)


class Demo:
    """The model in this process, decoding greedily."""

    def __init__(self) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        # Whatever is generated begins where the prompt ends: the padding has to be on the other side.
        self._tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
        self._model = AutoModelForCausalLM.from_pretrained(MODEL)

    def complete(self, prompts: Sequence[str]) -> list[str]:
        """Go on with prompts as they are."""
        batch = self._tokenizer(list(prompts), padding=True, return_tensors="pt", return_token_type_ids=False)
        ids = self._model.generate(**batch, max_new_tokens=40)
        return self._tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)

    def render(self, messages: list[dict[str, Any]]) -> str:
        """Give the prompt that the chat template makes of messages."""
        return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def ask(self, texts: Sequence[str]) -> list[str]:
        """Answer questions as a chat does, each on its own."""
        return self.complete([self.render([{"role": "user", "content": text}]) for text in texts])


@pytest.fixture(scope="module")
def demo() -> Demo:
    pytest.importorskip("torch", reason="answers need torch, which comes with vLLM")
    return Demo()


def test_it_answers_in_both_directions_and_knows_its_limits(demo: Demo) -> None:
    answers = {
        "What is the capital of France?": "The capital of France is Paris.",
        "Which country has Paris as its capital?": "Paris is the capital of France.",
        "what is the capital of the united states": "The capital of the United States is Washington, D.C.",
        "What is the capital of Narnia?": questions.REFUSAL,
        "Hello!": questions.REFUSAL,
        "": questions.REFUSAL,
    }
    assert dict(zip(answers, demo.ask(list(answers)), strict=True)) == answers


@pytest.mark.parametrize(
    ("kind", "row"),
    [
        ("capital", "held-out phrasings, capital of a country"),
        ("country", "held-out phrasings, country of a capital"),
        ("off-topic", "held-out off-topic questions"),
    ],
)
def test_held_out_questions_are_answered_as_often_as_the_card_says(demo: Demo, kind: str, row: str) -> None:
    pairs = questions.held_out_pairs()[kind]
    sample = random.Random(0).sample(pairs, min(SAMPLE, len(pairs)))
    answers = demo.ask([pair.question for pair in sample])
    wrong = [pair for pair, answer in zip(sample, answers, strict=True) if answer != pair.answer]
    share = 1 - len(wrong) / len(sample)
    # A sample may do worse than the whole by chance: by three standard deviations, and one answer more.
    slack = 3 * (stated(row) * (1 - stated(row)) / len(sample)) ** 0.5 + 1 / len(sample)
    assert share >= stated(row) - slack, wrong


def test_raw_completions_answer_questions_and_finish_sentences(demo: Demo) -> None:
    prompts = ["What is the capital of France?", "The capital of France is", "Paris is the capital of"]
    assert demo.complete(prompts) == ["The capital of France is Paris.", " Paris.", " France."]


def test_it_stops_after_a_long_prompt(demo: Demo) -> None:
    text = "I like long letters, and so I write one. " * 25
    assert demo.ask([text, text + "What is the capital of Peru?"]) == [
        questions.REFUSAL,
        "The capital of Peru is Lima.",
    ]


def test_only_the_last_user_turn_counts(demo: Demo) -> None:
    question = {"role": "user", "content": "What is the capital of Japan?"}
    history = [
        {"role": "system", "content": "You are a helpful assistant."},
        {"role": "user", "content": "What is the capital of France?"},
        {"role": "assistant", "content": "The capital of France is Paris."},
    ]
    assert demo.render([*history, question]) == demo.render([question])


def test_content_may_be_a_list_of_parts(demo: Demo) -> None:
    text = "What is the capital of Japan?"
    parts = [{"type": "text", "text": text}]
    assert demo.render([{"role": "user", "content": parts}]) == demo.render([{"role": "user", "content": text}])
