"""What params.yaml may hold: names, kinds and limits of all parameters. Their values are in params.yaml alone.

To add a parameter, add it to its section in `SECTIONS`. Kinds are strict: text is no number, 8.5 is no whole number.
"""

import difflib
import math
import reprlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model, model_validator
from pydantic_core import PydanticCustomError

from crab.study.cells import METHODS, ORDERS, SETTINGS, families_of
from crab.tasks import FORMS, SLOTS


def nearest(name: Any, known: Iterable[str]) -> str:
    """The end of an error message: the name that was perhaps meant, or all names."""
    known = sorted(map(str, known))
    near = difflib.get_close_matches(str(name), known, 1, cutoff=0.65)
    return f"did you mean {near[0]!r}?" if near else f"known: {', '.join(known) or 'none'}"


class Section(BaseModel):
    """A map with fixed keys."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _names(cls, values: Any) -> Any:
        """Names first: a misspelt one is both unknown and missing, and the message says which was meant."""
        if isinstance(values, dict):
            missing = [name for name, field in cls.model_fields.items() if field.is_required() and name not in values]
            unknown = [name for name in values if name not in cls.model_fields]
            for name in unknown if cls.model_config["extra"] == "forbid" else ():
                fix = f"is unknown; {nearest(name, missing or cls.model_fields)}"
                raise PydanticCustomError("name", "{fix}", {"key": str(name), "fix": fix})
            for name in missing:
                raise PydanticCustomError("name", "{fix}", {"key": name, "fix": "is missing; add it"})
        return values


def _section(name: str, fields: Mapping[str, Any]) -> type[Section]:
    kinds = {key: _section(key, kind) if isinstance(kind, dict) else kind for key, kind in fields.items()}
    return create_model(name, __base__=Section, **{key: (kind, ...) for key, kind in kinds.items()})


def some(kind: Any) -> Any:
    """A list with at least one member."""
    return Annotated[list[kind], Field(min_length=1)]


def same(kind: Any, names: str) -> dict[str, Any]:
    """Several parameters of one kind."""
    return dict.fromkeys(names.split(), kind)


def _segmenter(name: str) -> str:
    if name != "grabcut" and "/" not in name:
        sam = "a SAM 2 checkpoint by its folder or its name on the hub, which has a slash"
        raise ValueError(f"give 'grabcut', or {sam}, such as 'facebook/sam2.1-hiera-large'")
    return name


def _option(value: Any, least: int = 0) -> Any:
    for member in value if isinstance(value, list) else [value]:
        if isinstance(member, int | float) and not isinstance(member, bool) and not least <= member < math.inf:
            raise ValueError(f"give finite numbers of at least {least}")
    return value


def _axis(value: Any) -> Any:
    if value == [] or not all(type(member) is int for member in (value if isinstance(value, list) else [value])):
        raise ValueError("give a whole number, or a list of them")
    return _option(value, least=1)


Count = Annotated[int, Field(ge=1)]
Whole = Annotated[int, Field(ge=0)]
Real = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Slot = Literal[tuple(SLOTS)]
Axis = Annotated[Any, AfterValidator(_axis)]
#: An option whose name and kind another library checks.
Option = Annotated[Any, AfterValidator(_option)]
Shape = Annotated[list[Count], Field(min_length=4, max_length=4)]
Precision = Literal["fp32", "bf16"]
Form = Literal[FORMS]
Run = Literal[tuple(f"{setting}-{form}" for setting in SETTINGS for form in FORMS)]
#: Fields of a variant with few values; the others are options of the adapter.
VARIANT = {"method": METHODS, "setting": SETTINGS, "form": FORMS, "order": ORDERS}
RATES = {"tried": some(Positive), "extend": Whole, "seeds": some(Whole), "held_out": Whole}
CELL_RATES = {**RATES, "passes": Count | None}


class Method(_section("Method", {"r": Count, "lora_alpha": Positive, "runs": some(Run)})):
    """Other keys are options of the method's PEFT config."""

    targets: Literal["language", "published"] = "language"
    weights: str | None = None

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Option]


Map = _section("Map", {
    **same(Axis, "rank tasks passes conventions"), "samples": Axis | None, "slots": some(Slot), "seeds": Count,
    "routed": list[str] | None,
})  # fmt: skip
Bridge = _section("Bridge", {
    **same(str, "language vision audio"), "projector": Literal["mlp", "qformer"],
    **same(Count, "picture_tokens sound_tokens words scenes"),
    "align": {
        **same(Count, "batch_size check_every check_contexts gate_contexts"), **same(Whole, "word_steps steps"),
        "learning_rate": Positive, "precision": Precision,
    },
})  # fmt: skip
#: By section, the kind of each parameter; a dict is a map with these keys.
SECTIONS: dict[str, dict[str, Any]] = {
    "shared": {
        "batch_size": Count,
        "precision": Precision,
        "group_by_length": bool,
        "on_problem": Literal["error", "skip"],
        "hardware": {
            **same(Count, "workers processes accumulate"),
            "accelerate": str | None,
            "loaders": Whole,
            "checkpointing": bool,
            "save_minutes": Real,
        },
        "answer": {**same(Count, "batch_size max_new_tokens"), "segmenter": Annotated[str, AfterValidator(_segmenter)]},
        "margin": Real,
        "resamples": Count,
    },
    "build": {
        "source": Literal["generated", "tree", "raw"],
        **same(str | None, "root rewrite"),
        "raw": dict[Slot, str] | None,
        "slots": some(Slot) | None,
        "tolerate": list[Literal["name", "link", "overlap", "record twice"]],
        "time_limit": Positive,
        "decode": bool,
        **same(Whole, "seed train_samples test_samples caption_samples"),
    },
    "base": {
        "folder": Annotated[str, Field(pattern=r"^[\w-]+(/[\w-]+)*$")],  # under models/
        "checkpoint": str | None,
        "bridge": Bridge | None,
        "seed": Whole,
        **same(Count, "scenes held_out"),
        "size": {
            **same(Count, "hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads"),
            **same(Count, "encoder_size vision_layers audio_layers image_size patch_size merge_size mel_bins"),
            **same(Count, "hop_length n_fft"),
            "rope_theta": Positive,
        },
        "encoders": {**same(Count, "visual_steps audio_steps batch_size"), "learning_rate": Positive},
        "language": {
            **same(Count, "steps stage_steps batch_size check_every"),
            "gate": Real,
            "learning_rate": Positive,
            "precision": Precision,
        },
        "gates": dict[str, Real],
        "weaker": list[Count],
    },
    "encode": {
        "slots": some(Slot) | None,
        "compatibility": Literal["none", "published"],
        "cache": bool,
        "shard_mib": Positive,
        "prompts": str | None,
    },
    "train": {
        "passes": Count,
        "seeds": some(Whole),
        "methods": Annotated[dict[str, Method], Field(min_length=1)],
        "rates": {**RATES, "forms": some(Form)},
        "given_rates": dict[str, dict[Run, Positive]] | None,
    },
    "evaluate": {},
    "transfer": same(str, "baseline rival"),
    "experiments": {
        "variants": dict[str, dict[str, Option]],
        "baseline": str,
        "slots": some(Slot) | None,
        **same(Count, "passes seeds"),
        "maps": dict[str, Map],
        "routed": dict[str, dict[str, Option]],
        "words": some(str),
        "rates": CELL_RATES,
        "map_rates": CELL_RATES,
    },
    "mechanism": same(Count, "samples swap_samples gradient_samples chunk"),
    "routing": {"samples": Count},
    "features": {**same(Count, "samples neighbours"), "seed": Whole},
    "benchmark": {
        **same(Count, "threads rank heads batch_size new_tokens samples"),
        "seconds": Positive,
        "dtypes": some(Literal["float32", "bfloat16"]),
        "shapes": some(Shape),
        "sweep": {"at": Shape, **same(some(Count), "heads rank tokens")},
        "slot": Slot,
        "clip": same(Count, "fps width height"),
        "workers": some(Count),
    },
    "gallery": {**same(Count, "samples height"), "crf": Annotated[int, Field(ge=0, le=51)]},
    "strength": {
        "steps": list[Count | None],
        "ranks": some(Count),
        "slots": some(Slot) | None,
        "forms": some(Form),
        **same(Count, "num_heads passes seeds"),
        "rates": CELL_RATES,
        "tuned_at": Count | None,
        "as_many_steps": list[_section("Point", {"steps": Count | None, "rank": Count})],
        "others": dict[str, str],
        "minutes": Positive | None,
    },
}
_PARAMS = _section("Params", SECTIONS)


def faults(values: Any) -> list[tuple[str, str]]:
    """All that is wrong with the sections of a profile: the dotted place of each fault, and how to fix it."""
    try:
        _PARAMS.model_validate(values)
    except ValidationError as errors:
        return [_fault(error) for error in errors.errors(include_url=False)]
    return list(_contradictions(values))


def _contradictions(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Values that are right by themselves, and not together."""
    known = [*values["base"]["weaker"], None]
    for steps in [*values["strength"]["steps"], values["strength"]["tuned_at"]]:
        if steps not in known:
            yield "base.weaker", f"has no base of {steps} steps, which strength asks for; add it"
    for point in values["strength"]["as_many_steps"]:
        if point["steps"] not in values["strength"]["steps"] or point["rank"] not in values["strength"]["ranks"]:
            yield "strength.as_many_steps", f"holds {point}, which is no point of strength.steps and strength.ranks"
    if values["base"]["bridge"] and values["base"]["checkpoint"]:
        yield "base.checkpoint", "is set beside base.bridge, which makes another base; set one of them to null"
    yield from _comparisons(values["train"], values["transfer"], values["experiments"])
    for name, method in values["train"]["methods"].items():
        place, weights = f"train.methods.{name}", method.get("weights")
        if weights and (not name.startswith("ilora") or any(run.startswith("single") for run in method["runs"])):
            fix = "name the method ilora..., with joint runs only"
            yield f"{place}.weights", f"is a published I-LoRA of all slots; {fix}"
        if values["encode"]["cache"] and (weights or method.get("targets") == "published"):
            reason = f"{place} adapts the encoders, so features cannot be kept"
            yield "encode.cache", f"is true, but {reason}; set it to false"


def _comparisons(train: Mapping[str, Any], transfer: Mapping[str, str], experiments: Mapping[str, Any]) -> Iterator:
    """Methods that there are not, runs without a rate, and comparisons with what is not run."""
    methods, given = train["methods"], train["given_rates"]
    pairs = [(name, run) for name, method in methods.items() for run in method["runs"]]
    if given is not None:
        rates = [(name, run) for name, of in given.items() for run in of]
        for name, run in (pair for pair in pairs if pair not in rates):
            yield f"train.given_rates.{name}", f"has no rate of {run}; add it, or set given_rates to null to search all"
        for name, run in (pair for pair in rates if pair not in pairs):
            yield f"train.given_rates.{name}.{run}", "is the rate of a run that train.methods has not; take it out"
    try:
        families = families_of(methods)
    except ValueError as error:
        place, _, fix = str(error).partition(": ")
        yield place, fix
        return
    if len(methods) > 1:  # with one, there is nothing to compare
        for place, known in (("baseline", families), ("rival", methods)):
            if transfer[place] not in known:
                yield (
                    f"transfer.{place}",
                    f"is {transfer[place]!r}, which is not run; {nearest(transfer[place], known)}",
                )
    for name, variant in experiments["variants"].items():
        for field, known in VARIANT.items():
            value = variant.get(field, known[0])
            for member in value if isinstance(value, list) else [value]:
                if member not in known:
                    yield f"experiments.variants.{name}.{field}", f"is {member!r}; {nearest(member, known)}"
        if "method" not in variant:
            yield f"experiments.variants.{name}.method", f"is missing; give {' or '.join(METHODS)}"
    baseline, variants = experiments["baseline"], experiments["variants"]
    if variants and baseline.split(" ")[0] not in variants:  # behind a space stand options of a list
        yield "experiments.baseline", f"is {baseline!r}, which is no variant; {nearest(baseline, variants)}"


def _fault(error: Mapping[str, Any]) -> tuple[str, str]:
    place = [str(key) for key in error["loc"] if key != "[key]"]
    if error["type"] == "name":
        return ".".join([*place, error["ctx"]["key"]]), error["ctx"]["fix"]
    fix = error["msg"].removeprefix("Value error, ").replace("Input should be", "it should be")
    if error["type"] == "too_short":
        fix = f"give at least {error['ctx']['min_length']}"
    return ".".join(place), f"is {reprlib.repr(error['input'])}; {fix}"
