"""One label a clip: emotions (MELD, CREMA-D) and actions (UCF-101, Kinetics-Sounds). None has times."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

from crab.data.sources.raw import VIDEO, Draft, Raw, SourceError, one_of, plain, whole

MELD = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")
# The folders of MELD's archives.
_MELD_FOLDERS = {"train": "train_splits", "test": "output_repeated_splits_test"}

CREMAD = {"NEU": "neutral", "HAP": "happy", "SAD": "sad", "FEA": "fear", "DIS": "disgust", "ANG": "anger"}
LEVELS = {"LO": "at a low level", "MD": "at a medium level", "HI": "at a high level", "XX": ""}
SENTENCES = {
    "IEO": "it's eleven o'clock", "TIE": "that is exactly what happened", "IOM": "i'm on my way to the meeting",
    "IWW": "i wonder what this is about", "TAI": "the airplane is almost full", "MTI": "maybe tomorrow it will be cold",
    "IWL": "i would like a new alarm clock", "ITH": "i think i have a doctor's appointment", "DFA": "don't forget a jacket",
    "ITS": "i think i've seen this before", "TSI": "the surface is slick", "WSI": "we'll stop in a couple of minutes",
}


def meld_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Lines of train_sent_emo.csv or test_sent_emo.csv."""
    return raw.rows(f"{split}_sent_emo.csv", ("Utterance", "Emotion", "Dialogue_ID", "Utterance_ID"))


def meld(raw: Raw, slot: str, split: str, where: str, row: dict) -> Iterator[Draft]:
    """MELD labels what is said and what the speaker feels. Clips of train and test share names."""
    emotion = one_of(where, row["Emotion"], MELD)
    name = f"dia{whole(where, 'Dialogue_ID', row['Dialogue_ID'])}_utt{whole(where, 'Utterance_ID', row['Utterance_ID'])}"
    within = _MELD_FOLDERS[split]
    fields, files = raw.clip(name, within=within, folder=split)
    # Quotes and dashes of Windows' code page stand there as control characters; brackets would be read as an answer's.
    said = re.sub(r"[\x80-\x9f]", lambda c: bytes([ord(c[0])]).decode("cp1252", "ignore"), row["Utterance"])
    said = " ".join(re.sub(r"[<>\[\]]", " ", said).split())
    yield Draft(where, {**fields, "Emotion": emotion}, emotion, f"i hear \" {said} \" ." if said else "someone speaks .",
                files, (emotion,))


def cremad_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Clips named `<actor>_<sentence>_<emotion>_<level>`, all in one list.

    The set has no split of its own: train.csv and test.csv (clip, emotion, without a header) tell it where they are
    there, else actors whose number ends in 0, nine of 91, are for test.
    """
    if raw.has("train.csv") and raw.has("test.csv"):
        yield from raw.rows(f"{split}.csv", ("clip", "emotion"), header=False)
        return
    pattern = re.compile(r"\d{4}_[A-Z]{3}_[A-Z]{3}_[A-Z]{1,2}")
    for path in raw.paths:
        if path.suffix.lower() in VIDEO and pattern.fullmatch(path.stem) and (path.stem[3] == "0") == (split == "test"):
            yield str(path), {"clip": path.stem}


def cremad(raw: Raw, slot: str, split: str, where: str, row: dict) -> Iterator[Draft]:
    """CREMA-D: the name tells the sentence, the emotion that the actor was asked for, and at what level."""
    parts = plain(where, "clip", row["clip"]).split("_")
    if len(parts) != 4:
        raise SourceError(f"{where}: {row['clip']!r} is not named <actor>_<sentence>_<emotion>_<level>; name it as the set does")
    sentence = SENTENCES[one_of(where, parts[1], tuple(SENTENCES), "sentence")]
    emotion = CREMAD[one_of(where, parts[2], tuple(CREMAD), "emotion")]
    level = LEVELS.get(parts[3], "")  # one clip of the set has a level of one letter
    if row.get("emotion", parts[2]) != parts[2]:
        raise SourceError(f"{where}: emotion {row['emotion']!r} is not that of the clip's name, {parts[2]!r}; correct the line")
    fields, files = raw.clip(row["clip"])
    chain = f"i hear \" {sentence} \" . face and voice act {emotion}{f' {level}' if level else ''} ."
    yield Draft(where, {**fields, "emotion": emotion}, emotion, chain, files, (emotion,))


def ucf_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Lines `Class/v_Class_g01_c01.avi` (and a number in trainlist01) of the set's first split; classInd.txt lists the classes."""
    classes = tuple(line.split()[-1] for _, line in raw.lines("classInd.txt"))
    for where, line in raw.lines(f"{split}list01.txt"):
        yield where, {"line": line, "classes": classes}


def ucf(raw: Raw, slot: str, split: str, where: str, row: dict) -> Iterator[Draft]:
    """UCF-101: the class of a clip, in words. About half of the classes have no sound; their clips are left out later."""
    folder, slash, name = row["line"].split()[0].partition("/")
    if not slash:
        raise SourceError(f"{where}: {row['line']!r:.80} is not <class>/<clip>.avi; correct the line")
    folder = one_of(where, folder, row["classes"])
    label = " ".join(re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*|[a-z]+|\d+", folder)).lower()
    fields, files = raw.clip(plain(where, "clip", name).rpartition(".")[0], within=folder, folder=folder)
    yield Draft(where, {**fields, "label": label}, label, f"what is done in the video : {label} .", files, (label,))


def ks_rows(raw: Raw, slot: str, split: str) -> Iterator[tuple[str, dict]]:
    """Clips of `train/<class>/` or `test/<class>/` (`val/` or `validation/` where there is no test); train's folders are the classes."""
    found: dict[str, list[Path]] = {}
    for path in raw.paths:
        if path.suffix.lower() in VIDEO and len(path.relative_to(raw.root).parts) > 2:
            found.setdefault(path.parent.parent.name, []).append(path)
    folder = next((name for name in ((split,) if split == "train" else ("test", "val", "validation")) if name in found), None)
    if folder is None:
        raise SourceError(f"{raw.root}: no folder '{split}' with clips in a folder for each class; lay them out so")
    classes = tuple(sorted({path.parent.name for path in found.get("train", found[folder])}))
    for path in found[folder]:
        yield str(path), {"class": path.parent.name, "stem": path.stem, "folder": folder, "classes": classes}


def ks(raw: Raw, slot: str, split: str, where: str, row: dict) -> Iterator[Draft]:
    """Kinetics-Sounds: the class of a clip."""
    action = one_of(where, row["class"], row["classes"]).replace("_", " ")
    fields, files = raw.clip(row["stem"], within=row["folder"], folder=f"{split}/{row['class']}")
    yield Draft(where, {**fields, "action": action}, action, f"what is done in the clip : {action} .", files, (action,))
