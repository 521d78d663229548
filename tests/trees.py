"""Lists of records on disk, to read and to spoil, for the tests of several rooms."""

import hashlib
import json

from crab import tasks

PARTS = [(slot.name, split) for slot in tasks.SLOTS.values() for split in slot.splits]


def listed(root, slot, split="train"):
    return root / "AVUIE_2" / slot / f"{split}.json"


def rows_of(root, slot, split="train"):
    return json.loads(listed(root, slot, split).read_text(encoding="utf-8"))


def spoil(root, slot, change, split="train"):
    """Let ``change`` alter a list of records in place, or return another list."""
    rows = rows_of(root, slot, split)
    result = change(rows)
    listed(root, slot, split).write_text(json.dumps(result if isinstance(result, list) else rows), encoding="utf-8")


def digests(root):
    """The digest of every file, by its path under the root."""
    files = (path for path in root.rglob("*") if path.is_file())
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
