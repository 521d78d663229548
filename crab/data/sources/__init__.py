"""From raw data sets, as their authors ship them, to the AV-UIE v2 layout.

``convert("ave", "/raw/AVE_Dataset", "/data")`` writes ``/data/AVUIE_2/ave/{train,test}.json`` with the media they name;
``convert_all({"ave": ..., "avvp": ...}, "/data")`` does so for many.  One module for each form of annotation says how its
sets are read: :mod:`events`, :mod:`questions`, :mod:`classes`, :mod:`masks`, :mod:`matching`; :data:`SOURCES` names them
by slot.  Every answer is a chain, which says no more than the labels do, then the label in the slot's tags;
:mod:`rewrite` lets a chat model word the chains, and checks what it wrote.
"""

from crab.data.sources.convert import REPORT, SOURCES, Source, convert, convert_all, drafts, finished
from crab.data.sources.raw import FAULTS, Draft, LeftOut, Raw, SourceError

__all__ = ["FAULTS", "REPORT", "SOURCES", "Draft", "LeftOut", "Raw", "Source", "SourceError", "convert", "convert_all", "drafts", "finished"]
