"""From raw data sets, as their authors ship them, to the AV-UIE v2 layout.

``convert("ave", "/raw/AVE_Dataset", "/data")`` writes ``/data/AVUIE_2/ave/{train,test}.json`` and their media;
``convert_all({"ave": ..., "avvp": ...}, "/data")`` does so for several slots. Every answer is a chain that says no more
than the labels do, then the label in the slot's tags. :mod:`rewrite` lets a chat model word the chains.

To add a converter, write one function in the module of its form of annotation (:mod:`events`, :mod:`questions`,
:mod:`classes`, :mod:`masks`) and name it under its slot in ``SOURCES`` of :mod:`convert`. The function gets (raw, slot,
split), reads its files with :class:`~crab.data.sources.raw.Raw` and yields one Draft per record::

    def clap(raw, slot, split):
        for row in raw.rows(f"{split}.csv", ("clip", "label")):
            with raw.reading(row):  # a fault, or media that are missing, leave out this row
                label = row.one_of("label", LABELS)
                yield raw.clip(Draft(row.place, {"label": label}, label, f"i hear {label} .", (label,)), row["clip"])
"""

from crab.data.sources.convert import SOURCES, convert, convert_all, drafts, finished
from crab.data.sources.raw import Draft, LeftOut, Raw, Row, SourceError

__all__ = ["SOURCES", "Draft", "LeftOut", "Raw", "Row", "SourceError", "convert", "convert_all", "drafts", "finished"]
