"""One label per clip, without times: emotions (MELD, CREMA-D) and actions (UCF-101, Kinetics-Sounds)."""

import re
from collections.abc import Iterator
from pathlib import Path

from crab.data.sources.raw import VIDEO, Draft, Raw, Row, SourceError

MELD = ("neutral", "joy", "surprise", "anger", "sadness", "disgust", "fear")
#: The folders of MELD's archives.
MELD_FOLDERS = {"train": "train_splits", "test": "output_repeated_splits_test"}
CREMAD = {"NEU": "neutral", "HAP": "happy", "SAD": "sad", "FEA": "fear", "DIS": "disgust", "ANG": "anger"}
LEVELS = {"LO": " at a low level", "MD": " at a medium level", "HI": " at a high level"}
SENTENCES = {
    "IEO": "it's eleven o'clock",
    "TIE": "that is exactly what happened",
    "IOM": "i'm on my way to the meeting",
    "IWW": "i wonder what this is about",
    "TAI": "the airplane is almost full",
    "MTI": "maybe tomorrow it will be cold",
    "IWL": "i would like a new alarm clock",
    "ITH": "i think i have a doctor's appointment",
    "DFA": "don't forget a jacket",
    "ITS": "i think i've seen this before",
    "TSI": "the surface is slick",
    "WSI": "we'll stop in a couple of minutes",
}


def meld(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """MELD labels what is said and what the speaker feels. Train and test clips share names, so each has a folder."""
    for row in raw.rows(f"{split}_sent_emo.csv", ("Utterance", "Emotion", "Dialogue_ID", "Utterance_ID")):
        with raw.reading(row):
            emotion = row.one_of("Emotion", MELD)
            stem = f"dia{row.whole('Dialogue_ID')}_utt{row.whole('Utterance_ID')}"
            # Quotes and dashes of Windows' code page are control characters here. Brackets would look like an answer.
            text = re.sub(r"[\x80-\x9f]", lambda c: bytes([ord(c[0])]).decode("cp1252", "ignore"), row["Utterance"])
            text = " ".join(re.sub(r"[<>\[\]]", " ", text).split())
            chain = f'i hear " {text} " .' if text else "someone speaks ."
            draft = Draft(row.place, {"Emotion": emotion}, emotion, chain, (emotion,))
            yield raw.clip(draft, stem, within=MELD_FOLDERS[split], folder=split)


def cremad(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """CREMA-D names its clips `<actor>_<sentence>_<emotion>_<level>`; the emotion is the one the actor was asked for.

    The set has no split. If there are train.csv and test.csv (clip, emotion, without a header), they are the split.
    Else actors whose number ends in 0, nine of 91, are for test.
    """
    if raw.has("train.csv") and raw.has("test.csv"):
        rows = raw.rows(f"{split}.csv", ("clip", "emotion"), header=False)
    else:
        pattern = re.compile(r"\d{3}(\d)_[A-Z]{3}_[A-Z]{3}_[A-Z]{1,2}")
        clips = ((path, pattern.fullmatch(path.stem)) for path in raw.paths if path.suffix.lower() in VIDEO)
        rows = (Row(str(p), {"clip": p.stem}) for p, name in clips if name and (name[1] == "0") == (split == "test"))
    for row in rows:
        with raw.reading(row):
            parts = row.name("clip").split("_")
            if len(parts) != 4:
                row.fail("clip", f"{row['clip']!r} is not <actor>_<sentence>_<emotion>_<level>")
            parts = Row(row.place, zip(("actor", "sentence", "emotion", "level"), parts, strict=True))
            sentence, emotion = SENTENCES[parts.one_of("sentence", SENTENCES)], CREMAD[parts.one_of("emotion", CREMAD)]
            if row.get("emotion", parts["emotion"]) != parts["emotion"]:
                row.fail("emotion", f"{row['emotion']!r} is not that of the clip's name, {parts['emotion']!r}")
            level = LEVELS.get(parts["level"], "")  # most clips have none; one clip has a level of one letter
            chain = f'i hear " {sentence} " . face and voice act {emotion}{level} .'
            yield raw.clip(Draft(row.place, {"emotion": emotion}, emotion, chain, (emotion,)), row["clip"])


def ucf(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """UCF-101's first split: lines `Class/v_Class_g01_c01.avi`, in trainlist01.txt with a number; the label in words.

    About half of the classes have no sound; their clips are left out when media are placed.
    """
    classes = [row["line"].split()[-1] for row in raw.rows("classInd.txt", ("line",), "\t", header=False)]
    for row in raw.rows(f"{split}list01.txt", ("line",), "\t", header=False):
        with raw.reading(row):
            folder, slash, name = row["line"].split()[0].partition("/")
            if not slash:
                row.fail("line", f"{row['line']!r:.80} is not <class>/<clip>.avi")
            parts = Row(row.place, {"class": folder, "clip": name})
            words = re.findall(r"[A-Z]+(?![a-z])|[A-Z][a-z]*|[a-z]+|\d+", parts.one_of("class", classes))
            label, stem = " ".join(words).lower(), parts.name("clip").rpartition(".")[0]
            draft = Draft(row.place, {"label": label}, label, f"what is done in the video : {label} .", (label,))
            yield raw.clip(draft, stem, within=folder, folder=folder)


def ks(raw: Raw, slot: str, split: str) -> Iterator[Draft]:
    """Kinetics-Sounds: clips of `train/<class>/` or `test/<class>/`; if there is no test, `val/` or `validation/`.

    The folders in `train` are the classes.
    """
    folders: dict[str, list[Path]] = {}
    for path in raw.paths:
        if path.suffix.lower() in VIDEO and len(path.relative_to(raw.root).parts) > 2:
            folders.setdefault(path.parent.parent.name, []).append(path)
    names = ("train",) if split == "train" else ("test", "val", "validation")
    folder = next((name for name in names if name in folders), "")
    classes = sorted({path.parent.name for path in folders.get("train", folders.get(folder, ()))})
    if not folder:
        raise SourceError(raw.root, f"no folder '{split}' with clips in a folder for each class", "lay them out so")
    for row in (Row(str(path), {"class": path.parent.name, "stem": path.stem}) for path in folders[folder]):
        with raw.reading(row):
            label = row.one_of("class", classes).replace("_", " ")
            draft = Draft(row.place, {"action": label}, label, f"what is done in the clip : {label} .", (label,))
            yield raw.clip(draft, row["stem"], within=folder, folder=f"{split}/{row['class']}")
