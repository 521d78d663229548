"""Chains worded by a chat model, through a text-generation pipeline of transformers, and checked before they are taken.

The model is given the question, the template's chain and the answer, and returns JSON (:data:`SCHEMA`).  Its chain is
taken only if the answer that it repeats parses and equals the label's, and if the chain names no label but the record's
own, no number, time or denial that the template's does not have, and leaves the answer readable.  Else the template's
chain stays, and the reason is counted.  What is not checked: adjectives and verbs that the model adds.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from crab import tasks
from crab.data.sources.convert import finished
from crab.data.sources.raw import Draft

SYSTEM = (
    "You word the reasoning behind an answer about a video and its sound, for training data. You see neither: you get the "
    "question, facts that were labelled by people, and the answer. Say in one to three short sentences how the facts lead to "
    "the answer. Use no object, sound, person, number, time, place, colour or feeling that the facts do not have, and deny "
    "nothing that they do not deny. Keep the labels' own words. Reply with one JSON object and nothing else: "
    '{"chain": "<your sentences, without tags or brackets>", "answer": "<the answer, character for character>"}'
)
SCHEMA: dict[str, Any] = {
    "type": "object", "additionalProperties": False, "required": ["chain", "answer"],
    "properties": {"chain": {"type": "string", "minLength": 1, "maxLength": 1000}, "answer": {"type": "string"}},
}
_NUMBERS = "zero one two three four five six seven eight nine ten eleven twelve once twice first second third last".split()
_DENIALS = "no not none never nothing nobody neither nor without cannot".split()
_TIMES = "before after while then until during throughout always whole entire begin begins start starts end ends".split()


class Rewriter:
    """Rewrites the chains of drafts: ``convert(..., rewrite=Rewriter(pipeline))``.

    Args:
        pipeline: a ``transformers.pipeline("text-generation", ...)`` of a chat model, or what is called and answers like one.
        batch_size: prompts a call.
        generation: further arguments of the call, such as ``max_new_tokens`` (256).
    """

    def __init__(self, pipeline: Callable[..., Any], batch_size: int = 8, **generation: Any) -> None:
        self.pipeline, self.batch_size = pipeline, batch_size
        self.generation = {"max_new_tokens": 256, "do_sample": False, **generation}

    @classmethod
    def load(cls, name: str) -> Rewriter:
        """One with the chat model of this name on the Hugging Face hub, or in this folder.

        Raises:
            ValueError: it cannot be loaded, or is no chat model; the message names the parameter that asked for it.
        """
        from transformers import pipeline  # seconds, for who rewrites alone

        try:
            loaded = pipeline("text-generation", model=name)
        except (OSError, ValueError) as error:
            raise ValueError(f"build: rewrite is {name!r}, which cannot be loaded ({str(error)[:300]}); name a chat model that "
                             "transformers can load, or its folder, or set rewrite to null") from error
        if not loaded.tokenizer.chat_template:
            raise ValueError(f"build: rewrite is {name!r}, which has no chat template and thus is no chat model; name one that has")
        return cls(loaded)

    def __call__(self, slot: str, drafts: Sequence[Draft]) -> tuple[list[Draft], dict[str, int]]:
        """The drafts with their new chains, or with the template's; how many were "taken", and the others by reason."""
        vocabulary = {name for draft in drafts for label in draft.labels + draft.others for name in names(label)}
        out, counts = [], Counter()
        for first in range(0, len(drafts), self.batch_size):
            batch = drafts[first:first + self.batch_size]
            replies = self.pipeline([messages(slot, d) for d in batch], batch_size=len(batch), return_full_text=False, **self.generation)
            for draft, reply in zip(batch, replies, strict=True):
                chain, refusal = judge(slot, draft, _text(reply), vocabulary)
                counts[refusal or "taken"] += 1
                out.append(draft if chain is None else draft._replace(chain=chain))
        return out, dict(counts)


def messages(slot: str, draft: Draft) -> list[dict[str, str]]:
    """The chat that asks for one chain."""
    record = finished(slot, draft)
    asked = {"question": tasks.instruction(slot, record), "facts": draft.chain, "labels": list(draft.labels),
             "answer": tasks.answer(slot, draft.truth)}
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": json.dumps(asked, ensure_ascii=False)}]


def judge(slot: str, draft: Draft, reply: str, vocabulary: set[str]) -> tuple[str | None, str]:
    """(chain, "") of a reply that may be taken, else (None, why not).

    Args:
        vocabulary: all names (:func:`names`) of the set's labels.
    """
    found = _object(reply)
    if found is None or set(found) != {"chain", "answer"} or not all(isinstance(v, str) for v in found.values()):
        return None, "not the JSON asked for"
    chain, answer = " ".join(found["chain"].split()), tasks.answer(slot, draft.truth)
    if not 0 < len(chain) <= SCHEMA["properties"]["chain"]["maxLength"]:
        return None, "an empty or too long chain"
    true = tasks.parse(slot, answer)
    if tasks.parse(slot, found["answer"]) != true:
        return None, "another answer"
    if tasks.parse(slot, f"{chain} {answer}") != true or re.search(r"[<>\[\]]", chain):
        return None, "tags or brackets in the chain"
    facts, said = _words(f"{draft.chain} {' '.join(draft.labels)}"), _words(chain)
    own = {name for label in draft.labels for name in names(label)}
    rest = said
    for name in sorted(own, key=len, reverse=True):
        rest = re.sub(_pattern(name), " | ", rest)
    if any(re.search(_pattern(name), rest) for name in vocabulary - own):
        return None, "another label"
    if own and rest == said and any(re.search(_pattern(name), facts) for name in own):
        return None, "no label"
    if set(re.findall(r"\d+(?:\.\d+)?", chain)) - set(re.findall(r"\d+(?:\.\d+)?", f"{draft.chain} {' '.join(draft.labels)}")):
        return None, "another number"
    added = set(said.split()) - set(facts.split())
    timed = re.search(r"from \d", draft.chain)
    if added & set(_NUMBERS) - ({"second"} if timed else set()):
        return None, "another number"
    if added & set(_DENIALS) or "n't" in chain.replace("’", "'"):
        return None, "a denial"
    if not timed and added & set(_TIMES):
        return None, "a time"
    return chain, ""


def names(label: str) -> Iterator[str]:
    """What a label may be called: all of it, and its parts between commas and brackets ("male speech", "man speaking")."""
    parts = [_words(part) for part in (label, *re.split(r"[,()/]", label))]
    yield from dict.fromkeys(part for part in parts if part)


def _words(text: str) -> str:
    return " ".join(re.sub(r"[^\w'.]|_|\.(?!\d)", " ", text.casefold()).split())


def _pattern(name: str) -> str:
    return rf"(?<!\w){re.escape(name)}(?:s|es)?(?!\w)"


def _object(reply: str) -> dict | None:
    """The first JSON object of a reply; what a model thinks aloud before it does not count."""
    reply = reply.rpartition("</think>")[2]
    try:
        value, _ = json.JSONDecoder().raw_decode(reply, reply.index("{"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _text(reply: Any) -> str:
    """The generated text of a pipeline's reply, in either of the forms that transformers gives."""
    while isinstance(reply, list) and reply:
        reply = reply[-1]
    text = reply.get("generated_text", reply.get("content", "")) if isinstance(reply, dict) else reply
    return _text(text) if isinstance(text, list) else str(text)
