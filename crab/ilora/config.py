"""The options of an I-LoRA adapter."""

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args, get_origin

from peft.config import PeftConfig

from .registration import ILORA

# Options of earlier versions, at the values that change nothing. A saved configuration may have these.
REMOVED = {"shared_head": False, "router_noise": 0, "balance_weight": 0, "orthogonality_weight": 0}
REMOVED |= {"layers_to_transform": None, "layers_pattern": None}
# Options that do not change what the saved tensors mean.
FREE = {"lora_dropout", "target_modules", "exclude_modules", "init_weights", "router_init_std"}
FREE |= set(PeftConfig.__dataclass_fields__)


def _require_expression(name: str, value: Any) -> None:
    """Raise ValueError unless the text is a regular expression."""
    try:
        re.compile(value)
    except (re.error, TypeError) as error:
        raise ValueError(f"`{name}` is not a valid regular expression: {value!r} ({error})") from None


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _option(default: Any, meaning: str) -> Any:
    """A field of the configuration, with what it means."""
    return field(default=default, metadata={"help": meaning})


@dataclass
class ILoraConfig(PeftConfig):
    """The configuration of an [`ILoraModel`]. `dataclasses.fields(ILoraConfig)` has the meaning of each field.

    An adapted layer has one matrix A, N = `num_heads` matrices B_i and a router R (Crab+, arXiv 2603.04128)::

        y = W x + scaling * sum_i softmax(R x / router_temperature)_i * B_i A dropout(x)

    `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`. The published run has r = 128,
    lora_alpha = 256, num_heads = 3 and lora_dropout = 0.1 on the q, k, v, o, gate, up and down projections. Raises
    ValueError with the name of a field that is out of range, or of an unknown field of a saved configuration.
    """

    r: int = _option(8, "Rank of A and of each head B_i. At least 1.")
    lora_alpha: float | None = _option(None, "Numerator of the scaling. Must be set: a wrong one gives no error.")
    num_heads: int = _option(3, "Number N of heads B_i.")
    lora_dropout: float = _option(0.0, "Dropout on the input of A, in [0, 1). The router reads the input without it.")
    target_modules: list[str] | str | None = _option(
        None,
        "The nn.Linear modules to adapt. Must be set. A list has endings of names, a string is a regular expression "
        "for whole names, 'all-linear' is all but the output head. In a multimodal model a list also reaches the "
        "encoders; r'.*language_model.*(q|v)_proj' does not.",
    )
    exclude_modules: list[str] | str | None = _option(None, "Modules to leave out, written like target_modules.")
    router: Literal["token", "uniform"] = _option(
        "token",
        "'token': a learned softmax for each token and module. 'uniform': weights of 1/num_heads, as a control. All "
        "heads then get the same gradient, so it is a plain LoRA of rank r.",
    )
    router_temperature: float = _option(1.0, "Divides the logits of the router. Smaller is sharper.")
    top_k: int | None = _option(None, "Use only the k heads with the largest logits. 1 gives the router no gradient.")
    router_input: Literal["token", "instruction"] = _option(
        "token",
        "What the router reads. 'token': each token. 'instruction': for all tokens of a sample the mean of the "
        "module's input over the instruction. Run the model inside crab.ilora.instruction_tokens.",
    )
    router_sharing: Literal["module", "layer", "model"] = _option(
        "module",
        "Which modules share one router weight: none ('module'), those of one numbered 'layer', or all of the "
        "'model', if their inputs have the same width. Each routes by its own input. The first module saves the "
        "weight. Under FSDP 'model' needs PEFT's fsdp_auto_wrap_policy, which wraps each router alone.",
    )
    shared_A: bool = _option(True, "One A for all heads. False: an A_i per head, stacked as [num_heads * r, in].")
    router_init_std: float = _option(0.02, "Of the initial router. Above 0: zero heads and a zero router stay equal.")
    init_weights: bool = _option(True, "Start with B = 0, so that a new adapter changes nothing. False: random B.")
    use_rslora: bool = _option(False, "Scale by lora_alpha / sqrt(r) (rank-stabilised LoRA, arXiv 2312.03732).")
    rank_pattern: dict = field(
        default_factory=dict, metadata={"help": "Ending of names, or regular expression -> rank, in place of r."}
    )
    alpha_pattern: dict = field(default_factory=dict, metadata={"help": "Like rank_pattern, for lora_alpha."})
    modules_to_save: list[str] | None = _option(
        None, "Endings of further modules, which are trained in full and saved too."
    )
    bias: Literal["none", "all", "ilora_only"] = _option(
        "none",
        "Biases of the base to train and save too: 'all', or 'ilora_only' of adapted modules. They change in place, "
        "also for other adapters and after unload(). One adapter of a model may have this.",
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ILORA
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                _require_expression(name, value)
            elif value is not None:
                setattr(self, name, set(value))
        for name, valid, wanted in self._checks():
            if not valid:
                raise ValueError(f"ILoraConfig: `{name}` must be {wanted}, got {getattr(self, name)!r}.")

    def _checks(self) -> Iterator[tuple[str, bool, str]]:
        """(field, whether its value is valid, what it must be). Later checks rely on earlier ones."""
        for name in ("r", "num_heads"):
            yield name, _is_count(getattr(self, name)), "a whole number of at least 1"
        yield "lora_alpha", _is_positive(self.lora_alpha), "given and above 0 (the published run uses 2 * r)"
        dropout = self.lora_dropout
        yield "lora_dropout", dropout == 0 or _is_positive(dropout) and dropout < 1, "in [0, 1)"
        for option in fields(self):
            value, choices = getattr(self, option.name), get_args(option.type)
            if get_origin(option.type) is Literal:
                yield option.name, value in choices, f"one of {choices}"
            elif option.type is bool:
                yield option.name, isinstance(value, bool), "True or False"
        for name in ("router_temperature", "router_init_std"):
            yield name, _is_positive(getattr(self, name)), "above 0"
        top_k = self.top_k is None or _is_count(self.top_k) and self.top_k <= self.num_heads
        yield "top_k", top_k, f"None or a whole number from 1 to num_heads={self.num_heads}"
        for name, default in (("top_k", None), ("router_input", "token"), ("router_sharing", "module")):
            fits = self.router == "token" or getattr(self, name) == default
            yield name, fits, f"{default!r} if router='uniform', which reads nothing and has no weight"
        for name, valid in (("rank_pattern", _is_count), ("alpha_pattern", _is_positive)):
            pattern = getattr(self, name)
            fits = isinstance(pattern, dict) and all(map(valid, pattern.values()))
            yield name, fits, "a map to numbers like `r` or `lora_alpha`"
            for key in pattern:
                _require_expression(name, key)
        yield "modules_to_save", not isinstance(self.modules_to_save, str), "a list of names"

    def to_dict(self) -> dict:
        """Sets become sorted lists, so that equal choices give equal files."""
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()}

    @classmethod
    def check_kwargs(cls, **kwargs):
        """Refuse unknown fields of a saved configuration. PEFT would drop them and go on."""
        kwargs = {name: value for name, value in kwargs.items() if REMOVED.get(name, ...) != value}
        unknown = {name: kwargs[name] for name in sorted(set(kwargs) - {option.name for option in fields(cls)})}
        if unknown:
            fix = "correct them, or use the version of crab that wrote them"
            raise ValueError(f"adapter_config.json has fields that ILoraConfig does not know: {unknown}; {fix}.")
        return super().check_kwargs(**kwargs)

    def differences(self, other: "ILoraConfig") -> dict[str, tuple]:
        """Field -> (value here, value in `other`), where they differ and change what the saved tensors mean."""

        def value(config, name):
            items = getattr(config, name)
            return set(items) if isinstance(items, list) else items  # PEFT may add a module to save twice

        names = [option.name for option in fields(self) if option.name not in FREE]
        pairs = {name: (value(self, name), value(other, name)) for name in names}
        return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
