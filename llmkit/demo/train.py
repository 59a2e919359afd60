"""Train the embedded demo model: a Llama of a million parameters that knows capitals and nothing else.

``python -m llmkit.demo.train`` writes the folder ``model`` beside this file and prints how many answers are right. It
needs ``torch``, ``transformers`` and ``tokenizers``, and takes a quarter of an hour on one core.

The model never sees the phrasings it is judged by. That it answers them comes from variety: many phrasings, and noise
that no two draws share.
"""

# mypy: allow-untyped-calls
# (transformers has types only in part)

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import math
import re
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from llmkit.demo import demo_model_path, questions
from llmkit.demo.questions import REFUSAL, Pair, Sampler

PAD, USER, ASSISTANT, END = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"
CONTEXT_LENGTH = 512
VOCABULARY = 2048
IGNORED = -100  # the label that cross entropy leaves out

# Only the last user turn is rendered: the model knows single turns, and so no history and no system prompt can derail
# it. It is rendered in lower case and after a space, so that "FRANCE", " France" and "france" are one thing to learn.
# Content is a string or, as OpenAI's clients may send it, a list of parts. A last message from the assistant is the
# beginning of the answer.
CHAT_TEMPLATE = """\
{%- macro text(message) -%}
  {%- if message.content is string -%}
    {{- message.content -}}
  {%- else -%}
    {%- for part in message.content or [] if part.type == 'text' -%}{{- part.text -}}{%- endfor -%}
  {%- endif -%}
{%- endmacro -%}
{%- set turns = messages | selectattr('role', 'equalto', 'user') | list -%}
{{- '<|user|> ' -}}
{%- if turns -%}{{- text(turns[-1]) | trim | lower -}}{%- endif -%}
{{- '<|assistant|>' -}}
{%- if messages and messages[-1].role == 'assistant' -%}
  {{- text(messages[-1]) -}}
  {%- if not add_generation_prompt -%}{{- '<|end|>' -}}{%- endif -%}
{%- endif -%}
"""


class Sample(NamedTuple):
    """A prompt as the model sees it, and what it has to go on with."""

    prompt: str
    answer: str


def chat(pair: Pair) -> Sample:
    """Put a pair into the form that the chat template renders."""
    return Sample(f"{USER} {pair.question.strip().lower()}{ASSISTANT}", pair.answer)


def raw(pair: Pair) -> Sample:
    """Put a pair into the form of a raw completion: the question as it is, the answer straight after it."""
    return Sample(*pair)


def cloze(answer: str) -> Sample:
    """Cut a right answer before the name at its end, for raw completions such as "The capital of France is"."""
    prompt, link, name = re.fullmatch(r"(.*?)( is the capital of| is)( .*)", answer).groups()  # type: ignore[union-attr]
    return Sample(prompt + link, name)


def draw(sampler: Sampler) -> Sample:
    """Draw a training sample: mostly chat, for the rest raw completions."""
    pair = sampler.draw()
    if sampler.chance(0.75):
        return chat(pair)
    if pair.answer != REFUSAL and sampler.chance(0.3):
        prompt, name = cloze(pair.answer)
        # Some who write such a prompt end it with the space.
        return Sample(prompt + " ", name.lstrip()) if sampler.chance(0.2) else Sample(prompt, name)
    # "The capital of France is" asks a chat for a sentence, and a raw completion for the rest of one.
    return chat(pair) if pair.question.endswith((" is", " of")) else raw(pair)


def make_tokenizer(sampler: Sampler) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on drawn samples; any text can be written with it."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, USER, ASSISTANT, END],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    samples = (draw(sampler) for _ in range(100_000))
    texts = ((prompt.removeprefix(USER).removesuffix(ASSISTANT), answer) for prompt, answer in samples)
    tokenizer.train_from_iterator(itertools.chain.from_iterable(texts), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        model_max_length=CONTEXT_LENGTH,
        clean_up_tokenization_spaces=False,
        chat_template=CHAT_TEMPLATE,
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """Make the untrained model."""
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            tie_word_embeddings=True,
            initializer_range=0.08,
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


class Batch(NamedTuple):
    """Token ids padded on the right, and labels that are ``IGNORED`` outside the answer; both (samples, tokens)."""

    ids: torch.Tensor
    labels: torch.Tensor


def make_batch(tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> Batch:
    """Turn samples into tensors. Prompt and answer are split into tokens apart, as they are when it is served."""
    encode = tokenizer.backend_tokenizer.encode_batch
    prompts = [encoding.ids for encoding in encode([sample.prompt for sample in samples])]
    answers = [encoding.ids for encoding in encode([sample.answer + END for sample in samples])]
    length = max(len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True))
    ids = torch.full((len(samples), length), tokenizer.pad_token_id)
    labels = torch.full_like(ids, IGNORED)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    return Batch(ids, labels)


def batches(tokenizer: PreTrainedTokenizerFast, sampler: Sampler, size: int) -> Iterator[Batch]:
    """Draw batches without end, each of about the same number of characters.

    Parameters
    ----------
    tokenizer, sampler
        Where tokens and samples come from.
    size
        How many samples of a usual length make a batch. Samples of about one length go together, so that little is
        padding; of long ones there are fewer in a batch.
    """
    usual = 100  # characters
    while True:
        pool = sorted((draw(sampler) for _ in range(16 * size)), key=lambda sample: len(sample.prompt))
        groups: list[list[Sample]] = [[]]
        for sample in pool:
            if (len(groups[-1]) + 1) * max(len(sample.prompt), usual) > size * usual:
                groups.append([])
            groups[-1].append(sample)
        for place in torch.randperm(len(groups)).tolist():
            yield make_batch(tokenizer, groups[place])


def train(model: LlamaForCausalLM, data: Iterator[Batch], steps: int, peak_rate: float) -> None:
    """Train a model: AdamW, a short warm-up, then a cosine down to zero."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=peak_rate, betas=(0.9, 0.98), weight_decay=0.01)
    warm_up = steps // 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(step / warm_up, 0.5 + 0.5 * math.cos(math.pi * (step - warm_up) / (steps - warm_up))),
    )
    begun = time.monotonic()
    model.train()
    for step, batch in enumerate(itertools.islice(data, steps), start=1):
        # A mask is not needed: padding is on the right, and no token looks ahead.
        loss = model(input_ids=batch.ids, labels=batch.labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 250 == 0 or step == steps:
            print(f"step {step:5d} of {steps}  loss {loss.item():.4f}  {time.monotonic() - begun:4.0f} s", flush=True)


@torch.inference_mode()
def exact(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, samples: Sequence[Sample]) -> list[bool]:
    """Say of which samples greedy decoding gives the answer, the whole answer and nothing but the answer.

    It does so exactly if each token of the answer, and the end after it, is the likeliest one after those before it:
    one pass over prompt and answer tells.
    """
    model.eval()
    results: list[bool] = []
    for start in range(0, len(samples), 256):
        ids, labels = make_batch(tokenizer, samples[start : start + 256])
        likeliest = model(input_ids=ids).logits[:, :-1].argmax(-1)
        wanted = labels[:, 1:]
        results += ((likeliest == wanted) | (wanted == IGNORED)).all(-1).tolist()
    return results


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Print the share of exact answers to each kind of question, and some of the questions with wrong ones."""
    trained = [pair for pairs in questions.trained_pairs().values() for pair in pairs]
    held_out = questions.held_out_pairs()
    both = held_out["capital"] + held_out["country"]
    kinds = {
        "trained phrasings": map(chat, trained),
        "held-out phrasings, capital of a country": map(chat, held_out["capital"]),
        "held-out phrasings, country of a capital": map(chat, held_out["country"]),
        "both, without the mark at the end": (chat(Pair(pair.question.rstrip("?."), pair.answer)) for pair in both),
        "held-out off-topic questions": map(chat, held_out["off-topic"]),
        "raw completions of held-out phrasings": map(raw, both),
        "raw completions of sentences": map(cloze, sorted({pair.answer for pair in trained})),
    }
    for kind, drawn in kinds.items():
        samples = list(drawn)
        right = exact(model, tokenizer, samples)
        print(f"{kind:42} {sum(right):6} of {len(right):6}  {sum(right) / len(right):7.2%}")
        wrong = [sample.prompt for sample, ok in zip(samples, right, strict=True) if not ok]
        print(*(f"    wrong: {prompt}" for prompt in wrong[:12]), sep="\n", end="\n" if wrong else "")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write the model's files, but for the card, and the checksums of all."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save_pretrained(folder)
    # The class has a new name since transformers 5, which knows the old one too.
    tokenizer_config = folder / "tokenizer_config.json"
    tokenizer_config.write_text(tokenizer_config.read_text().replace("TokenizersBackend", "PreTrainedTokenizerFast"))
    model.save_pretrained(folder)
    # Greedy for whoever names no sampling parameters: vLLM takes them from here.
    defaults: dict[str, Any] = {
        "do_sample": False,
        "temperature": 0.0,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    (folder / "generation_config.json").write_text(json.dumps(defaults, indent=2) + "\n")
    write_checksums(folder)


def write_checksums(folder: Path) -> None:
    """Write ``SHA256SUMS``, in the form that ``sha256sum --check`` reads."""
    files = sorted(path for path in folder.iterdir() if path.name != "SHA256SUMS")
    lines = (f"{hashlib.sha256(path.read_bytes()).hexdigest()}  {path.name}\n" for path in files)
    (folder / "SHA256SUMS").write_text("".join(lines))


def main() -> None:
    """Train, save, judge."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--output", type=Path, default=demo_model_path(), help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=5000, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="samples a step (default: %(default)s)")
    parser.add_argument("--learning-rate", type=float, default=3e-3, help="its peak (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="(default: %(default)s)")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    # One thread adds in one order: the same seed gives the same weights. For a model this small, two save little.
    torch.set_num_threads(1)
    sampler = Sampler(options.seed)
    tokenizer = make_tokenizer(sampler)
    model = make_model(tokenizer)
    print(f"{model.num_parameters():,} parameters, vocabulary {len(tokenizer)}", flush=True)
    train(model, batches(tokenizer, sampler, options.batch_size), options.steps, options.learning_rate)
    # Judged as it is saved and served.
    model.bfloat16()
    save(model, tokenizer, options.output)
    evaluate(model, tokenizer)


if __name__ == "__main__":
    main()
