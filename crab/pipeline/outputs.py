"""Recorded outputs as a page shows them: names for people, plain tables, pictures with a text in their place."""

import base64
import re
from collections.abc import Mapping
from html import escape
from typing import Any

from crab.study.figures import display_name

#: A family of runs, and what may follow it in the name of a run: its slot and its seed.
_RUN = re.compile(r"\b((?:single|joint)-(?:lora_matched|lora|ilora)-(?:bare|explicit))((?:-\w+)*)")
_PAIR = re.compile(rf"({_RUN.pattern}) vs ({_RUN.pattern})")
_CELL = re.compile(r"<t([dh])\b[^>]*>(.*?)</t\1>", re.DOTALL)
#: What is aligned as a number: also one with its unit or its interval, and nothing.
_NUMBER = re.compile(r"(?:[-+]?[\d.,]+(?:e[-+]?\d+)?\s?%?(?:\s(?:\[.*\]|\(.*\)|x \d+))?|[\d\s/]+|nan|None|)")
#: A link that holds from the folder of the notebooks, so that it works in JupyterLab, too.
_LINK = re.compile(r'\b(src|href|poster)="\.\./reports/[\w-]+/')
_MARKS = re.compile(r'(<t[dhr]\b[^>]*?) (?:id|class)="[^"]*"')


def for_people(text: str) -> str:
    """``joint-ilora-bare vs single-lora-bare`` as ``I-LoRA minus single-task LoRA``; so with each name of a run."""
    text = _PAIR.sub(r"\1 minus \4", text)
    return _RUN.sub(lambda match: ", ".join([display_name(match[1]), *match[2].split("-")[1:]]), text)


def table(html: str, label: str) -> str:
    """A table of pandas without its marks, in a box that scrolls by itself and can be reached by the keyboard.

    The marks (an id and classes for every cell) are most of the bytes, and differ from run to run. Texts are set apart
    from numbers, so that they can be aligned.
    """
    if "#T_" not in html:  # no style that needs them
        html = re.sub(r"<style[^>]*>\s*</style>", "", html)
        while (plain := _MARKS.sub(r"\1", html)) != html:
            html = plain
        html = re.sub(r'(<table\b[^>]*?) id="[^"]*"', r"\1", html)
    head, end, body = html.partition("</thead>")
    words = [not _NUMBER.fullmatch(text.strip()) for _, text in _CELL.findall(body.partition("</tr>")[0])]
    above, names = head.rpartition("<tr")[::2]
    columns = iter(words if len(_CELL.findall(names)) == len(words) else ())
    names = re.sub(r"<th\b", lambda match: match[0] + ' class="text"' * next(columns, False), names)
    head = re.sub(r"(<th\b[^>]*>)([^<]*)", lambda m: m[1] + m[2].replace("_", " "), f"{above}<tr{names}")
    body = _CELL.sub(
        lambda m: m[0] if _NUMBER.fullmatch(m[2].strip()) else m[0].replace("<td", '<td class="text"'), body
    )
    head, body = head.replace("<th", '<th scope="col"'), body.replace("<th", '<th scope="row"')
    head = head.replace('<th scope="col"ead', "<thead")
    wide = " wide" * (len(words) > 14)
    box = f'<div class="table{wide}" tabindex="0" role="region" aria-label="Table: {escape(label)}">'
    return f"{box}{head}{end}{body}</div>"


def picture(source: str, label: str, size: Mapping[str, int]) -> str:
    """An image that opens at its full size. ``size`` may hold the ``width`` and ``height`` at which it is shown."""
    source = escape(source)
    shape = "".join(f' {side}="{size[side]}"' for side in ("width", "height") if side in size)
    return f'<a class="figure" href="{source}"><img src="{source}"{shape} alt="{escape(label)}" loading="lazy"></a>'


def shown(output: Any, label: str, figures: Mapping[bytes, str], top: str) -> Any:
    """An output of a notebook for readers; changes and returns it.

    Args:
        label: what it shows, for readers who do not see it.
        figures: path from the report's folder to each figure, by the bytes of the PNG. Other images stay embedded.
        top: path from the page to the report's folder, such as ``../``; empty for the front page.
    """
    data = output.get("data", {})
    if png := data.get("image/png"):
        if path := figures.get(base64.b64decode(png)):
            output.data = {"text/html": picture(top + path, label, output.metadata.get("image/png", {}))}
        else:
            output.metadata["image/png"] = {**output.metadata.get("image/png", {}), "alt": label}
        return output
    for kind in ("text/html", "text/markdown"):
        if kind in data:
            data[kind] = for_people(data[kind])
    if "text/html" in data:
        data["text/html"] = _LINK.sub(rf'\1="{top}', data["text/html"])
    if "<table" in data.get("text/html", ""):
        data["text/html"] = table(data["text/html"], label)
    return output
