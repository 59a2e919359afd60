"""What the demo model is asked, read from ``questions.toml`` and ``capitals.csv``: needs no torch.

``held_out_pairs`` are what the model is judged by. ``Sampler`` draws what it learns from, and never draws those.
"""

from __future__ import annotations

import csv
import itertools
import random
import re
import tomllib
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

Choice = TypeVar("Choice")

REFUSAL = "I only know capitals."


def _read(name: str) -> str:
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


CAPITALS: dict[str, str] = {
    row["country"]: row["capital"] for row in csv.DictReader(_read("capitals.csv").splitlines())
}
"""The capital of each state. A state's name has its article, as in "the Gambia"."""

_DATA = tomllib.loads(_read("questions.toml"))


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split("|")]


class Pair(NamedTuple):
    """A question and the one answer that counts as right."""

    question: str
    answer: str


def capital_answer(country: str, capital: str) -> str:
    """Answer what the capital of a country is."""
    # "Washington, D.C." ends the sentence by itself.
    return f"The capital of {country} is {capital}".removesuffix(".") + "."


def country_answer(country: str, capital: str) -> str:
    """Answer what country a city is the capital of."""
    return f"{capital} is the capital of {country}."


def capitalized(text: str) -> str:
    """Begin with a capital letter, and leave the rest as it is."""
    return text[:1].upper() + text[1:]


def ask(phrasing: str, name: str) -> str:
    """Put a name into a phrasing."""
    return capitalized(phrasing.replace("{name}", name))


def _pairs(group: str) -> dict[str, list[Pair]]:
    return {
        "capital": [
            Pair(ask(phrasing, country), capital_answer(country, capital))
            for phrasing in _DATA["capital"][group]
            for country, capital in CAPITALS.items()
        ],
        "country": [
            Pair(ask(phrasing, capital), country_answer(country, capital))
            for phrasing in _DATA["country"][group]
            for country, capital in CAPITALS.items()
        ],
    }


def trained_pairs() -> dict[str, list[Pair]]:
    """Give the trained phrasings of each direction for every state, as they are before noise."""
    return _pairs("trained")


def held_out_pairs() -> dict[str, list[Pair]]:
    """Give the questions of each kind that the model never saw."""
    return _pairs("held_out") | {"off-topic": [Pair(question, REFUSAL) for question in _DATA["off_topic"]["held_out"]]}


def unaccented(text: str) -> str:
    """Take the accents off: "Bogotá" becomes "Bogota"."""
    return "".join(c for c in unicodedata.normalize("NFD", text) if not unicodedata.combining(c))


def bare(text: str) -> str:
    """Reduce a text to its letters and digits, so that variants of it compare equal."""
    return "".join(filter(str.isalnum, unaccented(text).casefold()))


class Sampler:
    """Draws questions and answers without end, hardly two alike: about capitals or anything else, and with noise.

    Parameters
    ----------
    seed
        Two samplers with the same seed draw the same.
    """

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)  # noqa: S311  # reproducible, not secret
        countries, capitals = _DATA["countries_also_called"], _DATA["capitals_also_called"]
        self._countries = {*CAPITALS, *itertools.chain(*countries.values())}
        self._capitals = {*CAPITALS.values(), *itertools.chain(*capitals.values())}
        self._places = sorted(self._countries | self._capitals)
        self._greetings = _names(_DATA["noise"]["greetings"])
        self._closings = _names(_DATA["noise"]["closings"])
        self._slots: dict[str, list[str]] = {slot: _names(text) for slot, text in _DATA["slots"].items()}
        self._slots["name"] = self._places
        # A capital is no country, a country no capital, unless they share the name.
        self._not_countries = _names(_DATA["strangers"]["countries"]) + sorted(self._capitals - self._countries)
        self._not_capitals = _names(_DATA["strangers"]["capitals"]) + sorted(self._countries - self._capitals)
        self._held_out = {bare(pair.question) for pairs in held_out_pairs().values() for pair in pairs}

    def draw(self) -> Pair:
        """Draw a question with noise, and its answer."""
        while True:
            make = self._pick({self._about_capital: 36, self._about_country: 32, self._off_topic: 32})
            question, answer = make()
            question = self._with_noise(question)
            if bare(question) not in self._held_out:
                return Pair(question, answer)

    def chance(self, probability: float) -> bool:
        """Decide by lot."""
        return self._random.random() < probability

    def _pick(self, weights: dict[Choice, int]) -> Choice:
        return self._random.choices([*weights], [*weights.values()])[0]

    # What is asked.

    def _about_capital(self) -> Pair:
        country, capital = self._random.choice([*CAPITALS.items()])
        others = _DATA["countries_also_called"].get(country)
        name = self._random.choice(others) if others and self.chance(0.5) else country
        return Pair(self._asked("capital", name), capital_answer(name, capital))

    def _about_country(self) -> Pair:
        country, capital = self._random.choice([*CAPITALS.items()])
        others = _DATA["capitals_also_called"].get(capital)
        name = self._random.choice(others) if others and self.chance(0.5) else capital
        return Pair(self._asked("country", name), country_answer(country, capital))

    def _off_topic(self) -> Pair:
        make = self._pick({self._remark: 45, self._about_place: 25, self._no_country: 15, self._no_capital: 15})
        return Pair(make(), REFUSAL)

    def _remark(self) -> str:
        remarks: list[str] = _DATA["off_topic"]["remarks" if self.chance(0.3) else "phrasings"]
        return self._filled(self._random.choice(remarks))

    def _about_place(self) -> str:
        return self._filled(self._random.choice(_DATA["off_topic"]["about_places"]))

    def _no_country(self) -> str:
        return self._asked("capital", self._stranger(self._not_countries))

    def _no_capital(self) -> str:
        return self._asked("country", self._stranger(self._not_capitals))

    def _stranger(self, names: Sequence[str]) -> str:
        """Give a name that the table does not have: a listed one, an invented one or a twisted real one."""
        if self.chance(0.5):
            return self._random.choice(names)
        if self.chance(0.6):
            name = capitalized(self._word() + self._invented("endings"))
            return f"{name} {capitalized(self._word())}" if self.chance(0.2) else name
        name = f"{self._invented('twists')} {self._random.choice(self._places).removeprefix('the ')}"
        return self._stranger(names) if name in self._places else name

    def _filled(self, phrasing: str) -> str:
        def fill(slot: re.Match[str]) -> str:
            if slot[1] == "number":
                return str(self._random.randrange(10 ** self._random.randint(1, 4)))
            if slot[1] == "word" or self.chance(0.1):
                return self._word()
            return self._random.choice(self._slots[slot[1]])

        return capitalized(re.sub(r"\{(\w+)\}", fill, phrasing))

    def _word(self) -> str:
        """Invent a word: what the model does not know must not sway it."""
        syllables = (
            self._invented("onsets") + self._random.choice("aeiou") + self._invented("codas")
            for _ in range(self._random.randint(1, 3))
        )
        return "".join(syllables)

    def _invented(self, part: str) -> str:
        return self._random.choice(_names(_DATA["invented"][part]))

    # How people type.

    def _asked(self, direction: str, name: str) -> str:
        """Ask for a name with a slip, with another first word or one too many, without article, without accents."""
        phrasings: list[str] = _DATA[direction]["trained"]
        parts = self._random.choice(phrasings).split()
        if self.chance(0.06):
            index = self._random.randrange(len(parts))
            parts[index] = self._with_slip(parts[index])
        if self.chance(0.06) and "capital" in parts[1:]:
            parts[0] = self._stray_word() if parts[0].isalpha() else parts[0]
        # A stray word never stands beside the name: "the capital of New Paris" is another question.
        gaps = [i for i in range(1, len(parts)) if "{" not in parts[i - 1] + parts[i]]
        if self.chance(0.06) and gaps:
            parts.insert(self._random.choice(gaps), self._stray_word())
        if self.chance(0.4):
            name = name.removeprefix("the ")
        if self.chance(0.4):
            name = unaccented(name)
        asked = ask(" ".join(parts), name)
        return asked.replace("s's", "s'") if self.chance(0.5) else asked

    def _stray_word(self) -> str:
        return self._random.choice(["really", "official", self._word(), self._random.choice(self._slots["do"])])

    def _with_slip(self, word: str) -> str:
        """Swap, drop or double a letter of a word, but never of a name."""
        if len(word) < 4 or "{" in word:
            return word
        i = self._random.randrange(1, len(word) - 2)
        one, two = word[i], word[i + 1]
        return word[:i] + self._random.choice([two + one, two, one + one + two]) + word[i + 2 :]

    def _with_noise(self, question: str) -> str:
        """Put a greeting, a preface and thanks around a question, and take its mark and its capital letters away."""
        if self.chance(0.05):
            question = f"{self._remark()} {question}"
        if self.chance(0.007):
            question = self._long(question)
        if self.chance(0.2):
            question = f"{self._random.choice(self._greetings)} {question}"
        if self.chance(0.1):
            closing = self._random.choice(self._closings)
            question = f"{question} {closing}" if closing[0] != "," else question.rstrip(".?!") + closing
        if self.chance(0.3):
            question = question.rstrip(".?!") + self._random.choice(["", "", "", "", "?", "??", " ?", "!", "..."])
        if self.chance(0.1):
            question = question.replace("'", "\N{RIGHT SINGLE QUOTATION MARK}")
        return question.lower() if self.chance(0.2) else question

    def _long(self, question: str) -> str:
        """Put a question after a long text: the model has to find it, and to stop after its answer, there too."""
        count = self._random.randint(5, 36)
        text = [self._remark() for _ in range(count)] if self.chance(0.8) else [self._remark()] * count
        return " ".join([*text, question])
