"""params.yaml: the sections of a profile, checked; and the notebooks' parameters cells, which hold the defaults."""

import ast
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from crab.core.files import atomic_file
from crab.pipeline.schema import SECTIONS, faults, nearest

# nbformat imports jsonschema, which takes a second to compile a grammar of internet addresses that no notebook has;
# jsonschema does without it if this package is absent
sys.modules.setdefault("rfc3987_syntax", None)  # type: ignore[arg-type]
import nbformat  # noqa: E402

STAGES = [name for name in SECTIONS if name != "shared"]
#: Maps whose keys the user chooses: a profile's replaces the default's as a whole.
REPLACED = {
    ("build", "raw"), ("base", "gates"), ("train", "methods"), ("train", "given_rates"),
    ("experiments", "variants"), ("experiments", "maps"), ("experiments", "routed"),
}  # fmt: skip


def load(folder: Path) -> dict[str, Any]:
    """Contents of params.yaml, as DVC reads it (YAML 1.2: ``5e-3`` is a number).

    ValueError: the file is missing or malformed, or chooses a profile that it does not hold.
    """
    path = folder / "params.yaml"
    try:
        # the pure reader: the one in C reads YAML 1.1, where 5e-3 is text and `no` is False
        params = YAML(typ="safe", pure=True).load(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; restore it with git") from None
    except YAMLError as error:
        raise ValueError(f"{path}: malformed YAML; correct it there: {error}") from None
    if not isinstance(params, dict) or not isinstance(params.get("profiles"), dict):
        raise ValueError(f"{path}: the keys `profile` and `profiles` are missing; restore them with git")
    _check_profile(params, params.get("profile"))
    return params


def _check_profile(params: Mapping, profile: Any) -> None:
    for name in params["profiles"]:
        if not re.fullmatch(r"[\w-]+", str(name)):  # it names folders
            raise ValueError(f"params.yaml: profiles: {name!r} is no name of a folder; use letters, digits, _ and -")
    if profile not in params["profiles"]:
        raise ValueError(f"params.yaml: profile {profile!r} is unknown; {nearest(profile, params['profiles'])}")


def _merge(default: Any, changes: Any, place: tuple[str, ...] = ()) -> Any:
    if not isinstance(default, dict) or not isinstance(changes, dict) or place in REPLACED:
        return changes
    merged = {**default, **changes}
    return {k: _merge(default[k], v, (*place, k)) if k in default and k in changes else v for k, v in merged.items()}


def sections(params: Mapping, profile: str) -> dict[str, Any]:
    """All sections of a profile: the defaults with what the profile changes. Not checked."""
    defaults = {name: value for name, value in params.items() if name not in ("profile", "profiles")}
    merged = _merge(defaults, params["profiles"][profile] or {})
    match merged:  # a map of the experiments takes from them what it leaves out
        case {"experiments": {"maps": dict() as maps, "slots": slots, "passes": passes, "seeds": seeds} as plan}:
            rest = {"passes": passes, "samples": None, "conventions": 1, "seeds": seeds, "routed": None}
            filled = dict(maps)
            for name, each in maps.items():
                if isinstance(each, dict) and isinstance(each.get("slots", slots), list):
                    filled[name] = {"slots": slots, **rest, "tasks": len(each.get("slots", slots)), **each}
            merged["experiments"] = {**plan, "maps": filled}
    return merged


def resolve(folder: Path, profile: str | None = None) -> dict[str, Any]:
    """The sections of a profile, by default the chosen one, checked; ``profile`` is its name.

    ValueError: naming every parameter that is unknown, missing or wrong, and how to fix it.
    """
    params = load(folder)
    profile = profile or params["profile"]
    _check_profile(params, profile)
    values = sections(params, profile)
    wrong = faults(values)
    if not wrong:
        others = values["strength"]["others"].items()
        wrong = [(f"strength.others.{label}", f"is {name!r}, which is no profile; {nearest(name, params['profiles'])}")
                 for label, name in others if name not in params["profiles"]]  # fmt: skip
    lines = [f"params.yaml, profile {profile}: {place} {fix}" for place, fix in wrong]
    if lines:
        raise ValueError("\n".join(lines))
    return {"profile": profile, **values}


def choose(folder: Path, profile: str) -> None:
    """Set ``profile:`` in params.yaml. All other bytes stay as they are."""
    params = load(folder)
    _check_profile(params, profile)
    if params["profile"] != profile:
        path = folder / "params.yaml"
        line = f"profile: {profile}".encode()
        with atomic_file(path) as temporary:
            temporary.write_bytes(re.sub(rb"(?m)^profile:[^#\r\n]*?(?=\s*(#|$))", line, path.read_bytes(), count=1))


def notebooks(folder: Path) -> dict[str, Path]:
    """Notebooks by stage: ``NN_<stage>.ipynb``. Notebooks without a number are no stages.

    ValueError: a stage has no notebook or two, or params.yaml has no section of that name.
    """
    paths: dict[str, Path] = {}
    for path in sorted((folder / "notebooks").glob("[0-9]*_*.ipynb")):
        stage = path.stem.partition("_")[2]
        if stage not in STAGES:
            raise ValueError(f"{path}: there is no stage {stage!r}; {nearest(stage, STAGES)}")
        if stage in paths:
            raise ValueError(f"{path}: {paths[stage].name} is the same stage; delete one, or take its number away")
        paths[stage] = path
    if missing := [stage for stage in STAGES if stage not in paths]:
        raise ValueError(f"{folder / 'notebooks'}: no notebook NN_{missing[0]}.ipynb; restore it with git")
    return paths


def read_notebook(path: Path) -> Any:
    """A notebook in the current format. ValueError: it cannot be read, with the line where the fault is."""
    content = path.read_bytes()
    if mark := re.search(rb"^(<{7}|={7}|>{7})( \S*)?", content, re.MULTILINE):
        line = content.count(b"\n", 0, mark.start()) + 1
        raise ValueError(f"{path}: line {line} is a merge's mark, '{mark[0].decode()}'; resolve the conflict there")
    try:
        text = content.decode()
        json.loads(text)
        return nbformat.reads(text, as_version=4)
    except Exception as error:  # of many kinds, for files that are JSON but no notebooks
        place = f", line {error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = str(error).partition("\n")[0]
        raise ValueError(f"{path}{place}: not a notebook ({reason}); correct it, or restore it with git") from None


def cell(path: Path, notebook: Any) -> tuple[Any, dict[str, Any]]:
    """A notebook's parameters cell, and the names and values in it.

    ValueError: not exactly one code cell is tagged, or it holds more than ``name = value`` lines.
    """
    tagged = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1 or tagged[0].cell_type != "code":
        raise ValueError(f"{path}: {len(tagged)} cells are tagged `parameters`; tag exactly one code cell")
    values = {}
    for node in ast.parse(tagged[0].source).body:
        try:
            (target,) = node.targets
            values[target.id] = ast.literal_eval(node.value)
        except (ValueError, AttributeError):
            place = f"{path}: line {node.lineno} of the parameters cell"
            raise ValueError(f"{place} is not `name = value`; write the value out") from None
    return tagged[0], values


def parameters(path: Path, notebook: Any, stage: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """What the notebook of ``stage`` is run with: ``profile``, its section, and the shared values that its cell names.

    ValueError: the cell names something else, or lacks a parameter of its section.
    """
    _, old = cell(path, notebook)
    own = {"profile": values["profile"], **values[stage]}
    if missing := [name for name in own if name not in old]:
        fix = "run python -m crab.pipeline defaults"
        raise ValueError(f"{path}: {missing[0]!r} is missing in the parameters cell; {fix}")
    for name in old:
        if name not in own and name not in values["shared"]:
            fault = f"{name!r} in the parameters cell is not in section {stage} of params.yaml"
            raise ValueError(f"{path}: {fault}; {nearest(name, [*own, *values['shared']])}")
    return {name: own.get(name, values["shared"].get(name)) for name in old}


def write_defaults(folder: Path) -> list[str]:
    """Write the default values into the notebooks' parameters cells; returns the names of changed files.

    Names of the section that are missing are added; names that are no parameters are taken out.
    """
    default = next((name for name, changes in load(folder)["profiles"].items() if not changes), None)
    if default is None:
        raise ValueError("params.yaml: every profile changes something; keep one without changes, as `tiny: {}`")
    values, changed = resolve(folder, default), []
    for stage, path in notebooks(folder).items():
        notebook = read_notebook(path)
        target, old = cell(path, notebook)
        known = {**values["shared"], "profile": default, **values[stage]}
        names = dict.fromkeys(["profile", *(name for name in old if name in known), *values[stage]])
        if [(name, known[name]) for name in names] != list(old.items()):
            source = "\n".join(f"{name} = {known[name]!r}" for name in names)
            ruff = [sys.executable, "-m", "ruff", "format", "--line-length", "120", "-"]
            done = subprocess.run(ruff, input=source, capture_output=True, check=True, encoding="utf-8")
            target.source = done.stdout.rstrip("\n")
            with atomic_file(path) as temporary:
                nbformat.write(notebook, temporary)
            changed.append(path.name)
    return changed
