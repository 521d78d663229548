"""The words of prompts: those in ``prompts.yaml`` beside this module, or in a file of the user's in the same form."""

import re
from collections.abc import Collection
from dataclasses import dataclass, fields
from itertools import product
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from .fields import Record, describe, listed
from .registry import SLOTS, Slot, get_slot

FILE = Path(__file__).with_suffix(".yaml")
#: A place in a template: names of fields, and whether Python's own text of the value is wanted.
_PLACE = re.compile(r"\{([^{}!]+)(!s)?\}")


@dataclass(frozen=True)
class Prompt:
    """What stands around the media of a prompt: texts, or templates of them. See ``prompts.yaml``."""

    question: str
    system: str = ""
    media: str = ""

    def filled(self, slot: Slot, record: Record) -> "Prompt":
        """The texts for a record. ValueError if it lacks a field that they quote."""
        return Prompt(*(_PLACE.sub(lambda place: _quoted(slot, record, place), text) for text in vars(self).values()))


def read_prompts(path: str | Path, slots: Collection[str] = ()) -> dict[str, Prompt]:
    """The templates in a file, by slot.

    Args:
        slots: those that it must have.

    Raises:
        ValueError: there is no such file, it is malformed, it lacks a slot, or a template quotes a field that records
            of its slot do not have; naming file, slot and field.
    """
    try:
        content = YAML(typ="safe", pure=True).load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise ValueError(f"{path}: cannot be read ({reason}); set encode.prompts to a file like {FILE.name}") from None
    except YAMLError as error:
        raise ValueError(f"{path}: malformed YAML; correct it there: {error}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds no slots; write one entry for each, as in {FILE.name}")
    prompts = {}
    for name, texts in content.items():
        try:
            prompts[get_slot(name).name] = _checked(get_slot(name), texts)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if missing := [name for name in slots if name not in prompts]:
        fix = "add one with a field 'question', or take the slot out of encode.slots"
        raise ValueError(f"{path}: slot {missing[0]}: there is no entry; {fix}")
    return prompts


def _checked(slot: Slot, texts: Any) -> Prompt:
    names = [field.name for field in fields(Prompt)]
    if not isinstance(texts, dict):
        raise ValueError(f"slot {slot.name}: holds no fields; give {', '.join(names)}")
    for name, text in texts.items():
        where = f"slot {slot.name}: field {name!r}"
        if name not in names:
            raise ValueError(f"{where} is unknown; use {', '.join(names)}")
        if not isinstance(text, str):
            raise ValueError(f"{where} is {text!r:.80}; give a text, in quotes")
        for place, split in product(_PLACE.finditer(text), slot.splits):
            known = set(slot.fields(split)) - set(slot.optional(split))
            if not known & set(place[1].split("|")):
                fault = f"quotes {{{place[1]}}}, which {split} records do not have"
                raise ValueError(f"{where} {fault}; they have {', '.join(sorted(known))}")
    if not texts.get("question", "").strip():
        raise ValueError(f"slot {slot.name}: field 'question' is missing; give the question to the model")
    return Prompt(**texts)


def _quoted(slot: Slot, record: Record, place: re.Match) -> str:
    names = place[1].split("|")
    field = next((name for name in names if name in record), None)
    if field is None:
        raise ValueError(f"{describe(slot, record)}: no field '{' or '.join(names)}' to ask about")
    value = listed(record[field]) if field == "multi_choice" and not place[2] else record[field]
    if place[2] or not isinstance(value, list | tuple):
        return str(value)
    words = [str(v) for v in value]
    return " or ".join(part for part in (", ".join(words[:-1]), *words[-1:]) if part)


#: The words of this package, by slot.
PROMPTS = read_prompts(FILE, SLOTS)
