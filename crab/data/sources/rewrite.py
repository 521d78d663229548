"""Chains in the words of a chat model, through a text-generation pipeline of transformers, each checked before use.

The model gets the question, the template's chain and the answer, and returns JSON with a chain and the answer. The
chain is taken only if that answer parses and equals the label's, and if the chain names no label but the record's own,
no number, time or denial that the template does not have, and leaves the answer readable. Otherwise the template's
chain stays, and the reason is counted. Adjectives and verbs that the model adds are not checked.
"""

import json
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Self

from crab import tasks
from crab.data.sources.convert import finished
from crab.data.sources.raw import Draft

SYSTEM = (
    "You word the reasoning behind an answer about a video and its sound, for training data. You see neither: you get "
    "the question, facts that were labelled by people, and the answer. Say in one to three short sentences how the "
    "facts lead to the answer. Use no object, sound, person, number, time, place, colour or feeling that the facts do "
    "not have, and deny nothing that they do not deny. Keep the labels' own words. Reply with one JSON object and "
    'nothing else: {"chain": "<your sentences, without tags or brackets>", '
    '"answer": "<the answer, character for character>"}'
)
LONGEST = 1000  # characters of a chain
NUMBERS = {*"zero one two three four five six seven eight nine ten eleven twelve".split()}
NUMBERS |= {*"once twice first second third last".split()}
DENIALS = {*"no not none never nothing nobody neither nor without cannot".split()}
TIMES = {*"before after while then until during throughout always whole entire".split()}
TIMES |= {*"begin begins start starts end ends".split()}


class Rewriter:
    """Rewrites the chains of drafts: ``convert(..., rewrite=Rewriter(pipeline))``.

    `pipeline` is a ``transformers.pipeline("text-generation", ...)`` of a chat model, or answers like one; `generation`
    are further arguments of its calls.
    """

    def __init__(self, pipeline: Callable[..., Any], batch_size: int = 8, **generation: Any) -> None:
        self.pipeline, self.batch_size = pipeline, batch_size
        self.generation = {"max_new_tokens": 256, "do_sample": False, **generation}

    @classmethod
    def load(cls, name: str) -> Self:
        """A rewriter with a chat model from the Hugging Face hub or a folder; ValueError if that cannot be."""
        from transformers import pipeline  # takes seconds

        try:
            loaded = pipeline("text-generation", model=name)
        except (OSError, ValueError) as error:
            fix = "name a chat model that transformers can load, or its folder, or set rewrite to null"
            fault = f"cannot be loaded ({str(error)[:300]})"
            raise ValueError(f"build: rewrite is {name!r}, which {fault}; {fix}") from error
        if not loaded.tokenizer.chat_template:
            fault = "has no chat template and so is not a chat model"
            raise ValueError(f"build: rewrite is {name!r}, which {fault}; name one that has")
        return cls(loaded)

    def __call__(self, slot: str, drafts: Sequence[Draft]) -> tuple[list[Draft], dict[str, int]]:
        """The drafts with their new chains or the template's, and counts: "taken", and the refused ones by reason."""
        vocabulary = {name for draft in drafts for label in (*draft.labels, *draft.others) for name in names(label)}
        rewritten, counts = [], Counter()
        for first in range(0, len(drafts), self.batch_size):
            batch = drafts[first : first + self.batch_size]
            prompts = [messages(slot, draft) for draft in batch]
            options = {"batch_size": len(batch), "return_full_text": False, **self.generation}
            for draft, reply in zip(batch, self.pipeline(prompts, **options), strict=True):
                chain, refusal = judge(slot, draft, _text(reply), vocabulary)
                counts[refusal or "taken"] += 1
                rewritten.append(draft if refusal else draft._replace(chain=chain))
        return rewritten, dict(counts)


def messages(slot: str, draft: Draft) -> list[dict[str, str]]:
    """The chat that asks for one chain."""
    question, answer = tasks.instruction(slot, finished(slot, draft)), tasks.answer(slot, draft.truth)
    facts = {"question": question, "facts": draft.chain, "labels": list(draft.labels), "answer": answer}
    user = json.dumps(facts, ensure_ascii=False)
    return [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]


def judge(slot: str, draft: Draft, reply: str, vocabulary: set[str]) -> tuple[str | None, str]:
    """(chain, "") of a reply that may be taken, else (None, reason). `vocabulary`: all names of the set's labels."""
    value = _object(reply)
    if value is None or set(value) != {"chain", "answer"} or not all(isinstance(v, str) for v in value.values()):
        return None, "not the JSON asked for"
    chain, answer = " ".join(value["chain"].split()), tasks.answer(slot, draft.truth)
    truth, facts = tasks.parse(slot, answer), f"{draft.chain} {' '.join(draft.labels)}"
    own = {name for label in draft.labels for name in names(label)}
    words = rest = _words(chain)
    for name in sorted(own, key=len, reverse=True):
        rest = re.sub(_pattern(name), " | ", rest)
    added, number = set(words.split()) - set(_words(facts).split()), r"\d+(?:\.\d+)?"
    timed = re.search(r"from \d", draft.chain)
    reasons = {
        "an empty or too long chain": not 0 < len(chain) <= LONGEST,
        "another answer": tasks.parse(slot, value["answer"]) != truth,
        "tags or brackets in the chain": tasks.parse(slot, f"{chain} {answer}") != truth
        or re.search(r"[<>\[\]]", chain),
        "another label": any(re.search(_pattern(name), rest) for name in vocabulary - own),
        "no label": rest == words and any(re.search(_pattern(name), _words(facts)) for name in own),
        "another number": set(re.findall(number, chain)) - set(re.findall(number, facts))
        or added & NUMBERS - ({"second"} if timed else set()),
        "a denial": added & DENIALS or "n't" in chain.replace("’", "'"),
        "a time": not timed and added & TIMES,
    }
    refusal = next((reason for reason, refused in reasons.items() if refused), "")
    return (None if refusal else chain), refusal


def names(label: str) -> Iterator[str]:
    """What a label may be called: all of it, and its parts between commas and brackets."""
    parts = [_words(part) for part in (label, *re.split(r"[,()/]", label))]
    yield from dict.fromkeys(part for part in parts if part)


def _words(text: str) -> str:
    return " ".join(re.sub(r"[^\w'.]|_|\.(?!\d)", " ", text.casefold()).split())


def _pattern(name: str) -> str:
    return rf"(?<!\w){re.escape(name)}(?:s|es)?(?!\w)"


def _object(reply: str) -> dict | None:
    """The first JSON object of a reply. What a model thinks aloud before it does not count."""
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
