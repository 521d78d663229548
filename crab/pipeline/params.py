"""params.yaml: one section a stage and profile, checked against the parameters cell of the stage's notebook.

``python -m crab.pipeline.params show`` names the chosen profile, ``choose PROFILE`` changes it, ``check`` holds all of its
sections against the notebooks, which ``dvc repro`` does first of all, and ``defaults`` writes the tiny profile's values
into the parameters cells of the notebooks.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from pprint import pformat
from textwrap import fill
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from crab.data.files import atomic_file
from crab.pipeline.ipynb import nbformat
from crab.pipeline.paths import root

DEFAULT_PROFILE = "tiny"  # its values are the defaults in the notebooks
#: Whole numbers that must be at least 1; of others 0 may mean none.
COUNTS = (
    "batch_size", "passes", "seeds", "resamples", "samples", "swap_samples", "gradient_samples", "chunk", "neighbours", "max_new_tokens",
    "new_tokens", "rank", "heads", "threads",
)  # fmt: skip
NULLABLE = ("given",)  # may be null, though its default is not
#: Maps whose keys the user chooses and the stage checks; all others have their default's keys.
CHOSEN_KEYS = ("settings", "given", "gates", "variants", "maps", "routed", "raw")


def _nearest(name: str, known: Iterable[str]) -> str:
    """What was perhaps meant, or all there is."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(name, known, 1)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"


def load(folder: Path | None = None) -> dict[str, Any]:
    """Contents of params.yaml (YAML 1.2, as DVC reads it: ``5e-3`` is a number).

    Raises:
        ValueError: when it is missing or malformed, or chooses a profile it does not hold.
    """
    path = (folder or root()) / "params.yaml"
    try:
        # the pure reader: the C one speaks YAML 1.1, where 5e-3 is text and `no` is False
        params = YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; take it from git again") from None
    except YAMLError as error:
        raise ValueError(f"{path}: malformed YAML; mend it there: {error}") from None
    if not isinstance(params, dict) or not isinstance(params.get("profiles"), dict):
        raise ValueError(f"{path}: expected the keys `profile` and `profiles`")
    check_profile(params, params.get("profile"))
    return params


def check_profile(params: Mapping, profile: Any) -> None:
    """ValueError unless ``profile`` is one of params.yaml."""
    if profile not in params["profiles"]:
        raise ValueError(f"params.yaml: profile {profile!r} is unknown; {_nearest(str(profile), params['profiles'])}")


def section(params: Mapping, profile: str, stage: str, method: str | None = None) -> dict[str, Any]:
    """Parameters the notebook of ``stage`` is run with: its section and ``profile``.

    With a ``method``, also ``method`` and ``settings``, that method's own section.
    """
    check_profile(params, profile)
    sections = params["profiles"][profile]
    if stage not in sections:
        raise ValueError(f"params.yaml: profiles.{profile} has no section {stage!r}; {_nearest(stage, sections)}")
    if not isinstance(sections[stage], dict):
        raise ValueError(f"params.yaml: profiles.{profile}.{stage} is {sections[stage]!r}; give the parameters of {stage}.ipynb")
    values = {"profile": profile, **sections[stage]}
    if method is not None:
        methods = sections.get("methods") or {}
        if method not in methods:
            raise ValueError(
                f"params.yaml: profiles.{profile}.methods has no {method!r}; {_nearest(method, methods)}"
            )
        values |= {"method": method, "settings": methods[method]}
    return values


def _parameters_cell(path: Path, notebook: Any) -> Any:
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0].cell_type != "code":
        raise ValueError(f"{path}: {len(tagged)} cells are tagged `parameters`; tag exactly one code cell")
    return tagged[0]


def defaults(path: Path) -> dict[str, Any]:
    """Names and default values in the notebook's parameters cell.

    Raises:
        ValueError: when there is not exactly one such cell, or it holds more than ``name = literal`` lines.
    """
    cell = _parameters_cell(path, nbformat.read(path, as_version=4))
    found: dict[str, Any] = {}
    for node in ast.parse(cell.source).body:
        try:
            (target,) = node.targets if isinstance(node, ast.Assign) else ()
            found[target.id] = ast.literal_eval(node.value)
        except (ValueError, AttributeError):
            raise ValueError(
                f"{path}: line {node.lineno} of the parameters cell is not `name = value`, the value written out"
            ) from None
    return found


def check(path: Path, values: Mapping[str, Any]) -> None:
    """Hold ``values`` against the notebook's parameters cell.

    Raises:
        ValueError: naming the notebook, the parameter and the nearest name, when one is unknown, missing or of another kind
            than its default, also inside a map (papermill only warns, and runs with the default), or a number or list that nothing
            can be done with.
    """
    known = defaults(path)
    where = f"{path.name}, profile {values.get('profile')}"
    _check_keys(where, "", known, values)
    for name, default in known.items():
        value = values[name]
        if value == [] and default:
            raise ValueError(f"{where}: parameter {name!r} is an empty list; give at least one, such as {default[0]!r}")
        for place, inner in _leaves(name, value):
            least = int(place in COUNTS)
            if isinstance(inner, int | float) and not isinstance(inner, bool) and not least <= inner < math.inf:
                raise ValueError(f"{where}: parameter {place!r} is {inner!r}; give a number of at least {least}")
            if place.rpartition(".")[2] == "segmenter" and inner != "grabcut" and "/" not in str(inner):  # else told after all answers
                raise ValueError(f"{where}: parameter {place!r} is {inner!r}; give 'grabcut', or a SAM 2 checkpoint by its folder or its name "
                                 "on the hub, which has a slash, such as 'facebook/sam2.1-hiera-large'")  # fmt: skip


def _check_keys(where: str, inside: str, known: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """ValueError unless ``values`` has the keys of ``known``, the defaults, and under each the same kind of thing."""
    for name in values:
        if name not in known:
            missing = [k for k in known if k not in values]
            raise ValueError(f"{where}: parameter {inside + str(name)!r} is unknown; {_nearest(name, missing or known)}")
    for name, default in known.items():
        if name not in values:
            raise ValueError(f"{where}: parameter {inside + name!r} is missing; add it to the notebook's section of params.yaml")
        value = values[name]
        kinds = (int, float) if type(default) is float else type(default)
        fits = isinstance(value, kinds) and isinstance(value, bool) == isinstance(default, bool)
        if default is not None and not fits and not (value is None and name in NULLABLE):
            raise ValueError(
                f"{where}: parameter {inside + name!r} is {value!r}; expected {type(default).__name__}, such as {default!r}"
            )
        if isinstance(default, dict) and name not in CHOSEN_KEYS:
            _check_keys(where, f"{inside}{name}.", default, value)


def _leaves(place: str, value: Any) -> Iterator[tuple[str, Any]]:
    """All numbers and words in a parameter, however deep, each with its place."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _leaves(f"{place}.{key}", inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _leaves(f"{place}[]", inner)
    else:
        yield place, value


def check_all(folder: Path | None = None) -> None:
    """Hold every section of the chosen profile against its notebook, and each method's too.

    Raises:
        ValueError: on the first that does not fit, see `check`, or a section that is no notebook's.
    """
    folder = folder or root()
    params = load(folder)
    profile, sections = params["profile"], params["profiles"][params["profile"]]
    notebooks = {path.stem: path for path in sorted((folder / "notebooks").glob("*.ipynb"))}
    for name in sections:
        if name not in notebooks and name != "methods":
            raise ValueError(f"params.yaml: profiles.{profile}.{name} is the section of no notebook; {_nearest(name, notebooks)}")
    for stage, path in notebooks.items():
        for method in (sections.get("methods") or {}) if "method" in defaults(path) else (None,):
            check(path, section(params, profile, stage, method))


def choose(profile: str, folder: Path | None = None) -> None:
    """Set ``profile:`` in params.yaml, leaving every other byte as it is."""
    folder = folder or root()
    params = load(folder)
    check_profile(params, profile)
    if params["profile"] != profile:
        path = folder / "params.yaml"
        text = re.sub(r"(?m)^profile:[^#\n]*?(?=\s*(#|$))", f"profile: {profile}", path.read_text(), count=1)
        with atomic_file(path) as temporary:
            temporary.write_text(text)


def _literal(value: Any) -> str:
    """A value as Python source, in few lines: `pformat` gives each key of a long dict its own."""
    filled = fill(repr(value), width=110, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    try:
        return filled if ast.literal_eval(filled) == value else pformat(value, width=100, sort_dicts=False)
    except SyntaxError:  # broken inside a string
        return pformat(value, width=100, sort_dicts=False)


def write_defaults(folder: Path | None = None) -> list[str]:
    """Write the tiny profile's values into the notebooks' parameters cells; returns the names of those changed."""
    folder = folder or root()
    params = load(folder)
    changed = []
    for path in sorted((folder / "notebooks").glob("*.ipynb")):
        known = defaults(path)
        values = section(params, DEFAULT_PROFILE, path.stem, known.get("method"))
        if values == known:
            continue
        notebook = nbformat.read(path, as_version=4)
        order = [n for n in known if n in values] + [n for n in values if n not in known]
        _parameters_cell(path, notebook).source = "\n".join(
            f"{n} = {_literal(values[n])}" for n in order
        )
        with atomic_file(path) as temporary:
            nbformat.write(notebook, temporary)
        changed.append(path.name)
    return changed


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m crab.pipeline.params", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("show", help="name the chosen profile")
    commands.add_parser("choose", help="choose a profile").add_argument("profile")
    commands.add_parser("check", help="hold the chosen profile against the notebooks")
    commands.add_parser("defaults", help="write the tiny values into the notebooks' parameters cells")
    options = parser.parse_args(arguments)
    try:
        if options.command == "choose":
            choose(options.profile)
        if options.command == "defaults":
            print("changed:", ", ".join(write_defaults()) or "nothing")
        elif options.command == "check":
            check_all()
        else:
            print(f"profile: {load()['profile']} (params.yaml)")
    except ValueError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
