"""What a scene says: GenEval's six tasks, their wording and file format, and captions as word ids."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from fluidscale.spec import InvalidInput, WorldSpec

# GenEval's tasks (djghosh13/geneval, prompts/create_prompts.py); the index of a tag is its int8 code.
TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")

# In an order such that relation r and its inverse are r and r ^ 1.
RELATIONS = ("left of", "right of", "above", "below")

NUMBERS = {2: "two", 3: "three", 4: "four"}

PREFIX = "a photo of "

# The longest sentence: "a red apple and a blue car", where a class name or a relation is one id.
TEXT_LENGTH = 7

# Plurals that are neither the name, name + "s" nor name + "es". GenEval's own generator only ever adds those two.
_IRREGULAR = {
    "person": ("people",),
    "knife": ("knives",),
    "computer mouse": ("computer mice",),
}


@dataclass(frozen=True)
class Content:
    """What is asked of a picture: one icon an entry of `objects`, (class, colour or None).

    relation: where the first object stands relative to the second, or None.
    """

    tag: str
    objects: tuple[tuple[str, str | None], ...]
    relation: str | None = None


def article(phrase: str) -> str:
    """GenEval's rule: "an" before a written vowel."""
    return f"an {phrase}" if phrase[0] in "aeiou" else f"a {phrase}"


def plural(name: str) -> str:
    """GenEval's rule: "es" after an s, else "s" (it writes "knifes"); `encode` reads proper plurals as well."""
    return f"{name}es" if name.endswith("s") else f"{name}s"


def caption(content: Content) -> str:
    """The sentence, without GenEval's "a photo of"."""
    if content.tag == "counting":
        return f"{NUMBERS[len(content.objects)]} {plural(content.objects[0][0])}"
    phrases = [article(f"{color} {name}" if color else name) for name, color in content.objects]
    return f" {content.relation or 'and'} ".join(phrases)


def metadata(content: Content) -> dict[str, Any]:
    """The content as a line of GenEval's prompt file (evaluation_metadata.jsonl)."""
    clauses: list[dict[str, Any]] = [
        {"class": name, "count": 1} | ({"color": color} if color else {}) for name, color in content.objects
    ]
    line: dict[str, Any] = {"tag": content.tag, "include": clauses}
    if content.tag == "counting":
        name, count = content.objects[0][0], len(content.objects)
        line["include"] = [{"class": name, "count": count}]
        line["exclude"] = [{"class": name, "count": count + 1}]
    elif content.relation:
        # The file names the reference first: its index is what the position clause points to.
        line["include"] = [clauses[1], clauses[0] | {"position": [content.relation, 0]}]
    return line | {"prompt": PREFIX + caption(content)}


class Vocabulary:
    """The words of one world; `words[0]` is the padding. A class name or a relation of several words is one id."""

    def __init__(self, spec: WorldSpec) -> None:
        numbers = [NUMBERS[n] for n in range(2, spec.max_objects + 1)]
        # "orange" is a colour and a fruit: one word, as it is for any reader.
        self.words = tuple(dict.fromkeys(["", "a", "and", *numbers, *RELATIONS, *spec.colors, *spec.classes]))
        index = {word: i for i, word in enumerate(self.words) if word}
        self._ids: dict[tuple[str, ...], int] = {("an",): index["a"]}
        for word, i in index.items():
            forms = (word, f"{word}s", f"{word}es", *_IRREGULAR.get(word, ())) if word in spec.classes else (word,)
            self._ids |= {tuple(form.split()): i for form in forms}
        self._longest = max(map(len, self._ids))
        self._known: dict[str, np.ndarray] = {}

    def encode(self, text: str) -> np.ndarray:
        """Word ids of a caption, int64 (TEXT_LENGTH,), padded with 0. Raises InvalidInput on a word not known."""
        if text not in self._known:
            self._known[text] = self._parse(text)
        return self._known[text].copy()

    def _parse(self, text: str) -> np.ndarray:
        words = text.lower().removeprefix(PREFIX).strip(" .\n").split()
        ids = []
        while words:
            for length in range(min(self._longest, len(words)), 0, -1):
                if (known := self._ids.get(tuple(words[:length]))) is not None:
                    break
            else:
                raise InvalidInput(f"caption {text!r}: unknown word {words[0]!r}; known: {', '.join(self.words[1:])}")
            ids.append(known)
            del words[:length]
        if not 0 < len(ids) <= TEXT_LENGTH:
            raise InvalidInput(f"caption {text!r}: {len(ids)} words, expected 1 to {TEXT_LENGTH}")
        return np.array(ids + [0] * (TEXT_LENGTH - len(ids)), np.int64)
