"""What can be chosen about an I-LoRA adapter."""

from __future__ import annotations

import functools
import inspect
import math
import numbers
import re
import textwrap
from dataclasses import dataclass, field, fields
from typing import Literal, Optional, Union

from peft.config import PeftConfig

from .registration import ILORA

ROUTERS = ("token", "uniform")
ROUTER_INPUTS = ("token", "instruction")
ROUTER_SHARING = ("module", "layer", "model")
BIASES = ("none", "all", "ilora_only")
# Left out of the saved file at these values, so that what was saved before they existed is saved the same today.
LATER_FIELDS = {
    "top_k": None, "router_input": "token", "router_sharing": "module", "shared_A": True, "shared_head": False, "router_noise": 0.0,
    "balance_weight": 0.0, "orthogonality_weight": 0.0,
}  # fmt: skip


def _is_positive_int(value) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_positive_number(value) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 < value < math.inf


def _plain(value):
    """A number of another library, such as numpy's, as Python's own, which json can write; anything else as it is."""
    if isinstance(value, numbers.Integral) and not isinstance(value, bool):
        return int(value)
    return float(value) if isinstance(value, numbers.Real) and not isinstance(value, (bool, float)) else value


def _strict(cls):
    """Class decorator: an unknown field is refused for good, and `help()` shows the fields' help.

    PEFT takes what a generated `__init__` says of an unknown argument for a field of a later version, drops it and goes on.
    """
    generated = cls.__init__

    @functools.wraps(generated)
    def __init__(self, *args, **choices):
        unknown = sorted(set(choices) - {f.name for f in fields(self)})
        if unknown:
            raise TypeError(f"{cls.__name__} has no fields {unknown}. Mend the spelling, or use the version of crab that "
                            "wrote them.")
        generated(self, *args, **choices)

    cls.__init__ = __init__
    meanings = [textwrap.fill(f"{f.name}: {f.metadata['help']}", 120, initial_indent=" " * 4, subsequent_indent=" " * 8)
                for f in fields(cls) if f.name in cls.__annotations__]
    cls.__doc__ = inspect.cleandoc(cls.__doc__ or "").replace("\nRaises:", "\n".join(["\nArgs:", *meanings, "\nRaises:"]))
    return cls


@_strict
@dataclass
class ILoraConfig(PeftConfig):
    """Configuration of an [`ILoraModel`].

    The adapted layer computes, with one `A` and `num_heads` matrices `B_i` (Crab+, arXiv 2603.04128)::

        y = W x + scaling * sum_i softmax(R x / router_temperature)_i * B_i A dropout(x)

    where `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with `use_rslora`; `shared_A=False` puts an A_i in
    the place of A, `top_k` takes the softmax over the k largest logits alone, `router_input` says which x the router
    reads, `router_sharing` how many modules have one R, and `shared_head` takes the first head out of the softmax and
    gives it weight 1. `router_noise`, `balance_weight` and `orthogonality_weight` are for training alone. The published run
    is r = 128, lora_alpha = 256, num_heads = 3, lora_dropout = 0.1 on the q, k, v, o, gate, up and down projections. Sets
    given for the module lists are saved sorted, so that the same choice always writes the same bytes.

    Raises:
        ValueError: a value out of its range; the message names the field.
        TypeError: an unknown field. So do `PeftConfig.from_pretrained` and transformers' `load_adapter` for one in a saved
            configuration; `PeftModel.from_pretrained` and its `load_adapter` raise ValueError.
    """

    r: int = field(default=8, metadata={"help": "Rank of the shared down-projection A and of every head. At least 1."})
    lora_alpha: Optional[float] = field(
        default=None,
        metadata={"help": "Numerator of the scaling. Has no default: an adapter read with another alpha than it was "
                          "trained with is silently wrong. Published: 2 * r."},
    )
    num_heads: int = field(
        default=3, metadata={"help": "Number N of up-projections B_i the router chooses between. Published: 3."}
    )
    lora_dropout: float = field(
        default=0.0,
        metadata={"help": "Dropout probability on the input of A, in [0, 1). The router always reads the undropped "
                          "input. Published: 0.1."},
    )
    target_modules: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "Which nn.Linear modules to adapt. A list matches name endings, a string is a regular "
                          "expression matched against the whole name, 'all-linear' means every linear module but the "
                          "output head. In a multimodal model a list also reaches the encoders; use an expression "
                          "such as r'.*language_model.*(q|v)_proj' for the language model alone. An entry of a list that "
                          "matches no module is an error. Must be given."},
    )
    exclude_modules: Optional[Union[list[str], str]] = field(
        default=None, metadata={"help": "Modules to leave out, matched like target_modules; wins over it."}
    )
    router: Literal["token", "uniform"] = field(
        default="token",
        metadata={"help": "'token': a learned softmax per token and module (published). 'uniform': every head weighs "
                          "1/num_heads and nothing is learned, the control without routing; its heads get equal "
                          "gradients, so it can do no more than a plain LoRA of rank r."},
    )
    router_temperature: float = field(
        default=1.0, metadata={"help": "Divides the routing logits; smaller is sharper. Published: 1."}
    )
    top_k: Optional[int] = field(
        default=None,
        metadata={"help": "Let only the k heads with the largest logits work on a token, weighed by a softmax over those "
                          "k. Needs router='token' and 1 <= top_k <= num_heads; top_k = num_heads is the same as none. "
                          "With 1 the weight is always 1, and the router gets no gradient. Published: not used."},
    )
    router_input: Literal["token", "instruction"] = field(
        default="token",
        metadata={"help": "What the router reads. 'token': each token itself (published). 'instruction': the mean of the "
                          "module's input over the sample's instruction tokens, one set of weights for all its tokens; "
                          "media tokens come before the instruction under a causal mask, so a router that reads them "
                          "one by one cannot know the task there. The model must then run inside "
                          "crab.ilora.instruction_tokens(model, mask), which says how far generate works."},
    )
    router_sharing: Literal["module", "layer", "model"] = field(
        default="module",
        metadata={"help": "How far one router serves. 'module': each module has its own (published). 'layer': the "
                          "adapted modules of one numbered layer ('layers.3', 'blocks.0', ...) that read inputs of the "
                          "same width have one together; in a usual decoder layer that is one for q, k, v, o, gate and "
                          "up, and one for down alone, whose input is wider. The layer is the innermost numbered module "
                          "of a list of modules of one class ('stages.1.blocks.0' where both are), experts of a mixture "
                          "('experts.5') being parts of the layer they lie in; where no list is of one class, it is the "
                          "outermost numbered module. layers_pattern names the list where that is not what is meant. A "
                          "module outside any numbered layer keeps its own. 'model': the same over all adapted modules of "
                          "the model, encoders included, so one router a width. Only the router's weight is shared: each "
                          "module still weighs its heads by its own input. It is saved once, under the name of the first "
                          "module that uses it. Under FSDP 'model' needs each router to be a unit of its own, as PEFT's "
                          "fsdp_auto_wrap_policy has it."},
    )
    shared_A: bool = field(
        default=True,
        metadata={"help": "One down-projection A for all heads (published). False gives each head its own A_i, stacked "
                          "in one tensor [num_heads * r, in]."},
    )
    shared_head: bool = field(
        default=False,
        metadata={"help": "Let the first head work on every token with weight 1 (shared), and the router weigh the others "
                          "alone (private); the weights of a token then sum to 2. Needs router='token' and two heads or "
                          "more. Published: not used."},
    )
    router_noise: float = field(
        default=0.0,
        metadata={"help": "Standard deviation of the normal noise that each logit gets in training, as in noisy gating "
                          "(arXiv 1701.06538, without its learned scale). Needs router='token' and two routed heads or "
                          "more. Published: 0."},
    )
    balance_weight: float = field(
        default=0.0,
        metadata={"help": "In training, each adapted module adds so many times N sum_i m_i^2 - 1 to the loss, m_i being the "
                          "mean weight of head i over the tokens of the batch, padding included, and N the number of heads "
                          "that are routed (a shared head is not): 0 where all work equally much. Only the gradient is "
                          "added, in each backward pass: the loss that a trainer reports is the task's, and a loss that was "
                          "scaled before backward (fp16) makes the term smaller by as much. With gradient accumulation it "
                          "comes once a backward pass, while trainers divide the loss by the steps: divide this by the "
                          "accumulation steps too. Needs router='token', two routed heads or more, and not top_k=1. "
                          "Published: 0."},
    )
    orthogonality_weight: float = field(
        default=0.0,
        metadata={"help": "As balance_weight, for the mean over pairs of heads of ||B_i^T B_j||^2 / (||B_i||^2 ||B_j||^2): 0 "
                          "where no two heads write into a common direction. With gradient accumulation divide it by the "
                          "accumulation steps as well. Needs two heads or more, and whole ones: not under ZeRO-3 or FSDP. "
                          "Published: 0."},
    )
    router_init_std: float = field(
        default=0.02,
        metadata={"help": "Standard deviation of the router's normal initialisation. Above 0: with one shared A, zero "
                          "heads and a zero router every head gets the same gradient for ever."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "Start the heads at zero, so that a fresh adapter does not change the base. False draws "
                          "them at random (for tests)."},
    )
    use_rslora: bool = field(
        default=False,
        metadata={"help": "Scale by lora_alpha / sqrt(r) instead of lora_alpha / r (rank-stabilised LoRA, "
                          "arXiv 2312.03732)."},
    )
    rank_pattern: dict = field(
        default_factory=dict,
        metadata={"help": "Name ending or regular expression -> rank, for modules whose rank differs from r. A key "
                          "that matches no adapted module is an error."},
    )
    alpha_pattern: dict = field(
        default_factory=dict, metadata={"help": "As rank_pattern, for lora_alpha."}
    )
    layers_to_transform: Optional[Union[list[int], int]] = field(
        default=None, metadata={"help": "Adapt these layer numbers only. Needs target_modules as a list."}
    )
    layers_pattern: Optional[Union[list[str], str]] = field(
        default=None,
        metadata={"help": "Name of the module list that layers_to_transform counts in, if not the first numbered one, and whose "
                          "members are the layers that router_sharing='layer' means. Needs one of the two."},
    )
    modules_to_save: Optional[list[str]] = field(
        default=None, metadata={"help": "Further modules trained in full and saved with the adapter, by their names' endings. One "
                                "that matches no module is an error."}
    )
    bias: Literal["none", "all", "ilora_only"] = field(
        default="none",
        metadata={"help": "Which of the base's biases are trained while the adapter is active, and saved with it. 'none': "
                          "the base stays frozen (published). 'all': each parameter of the base that is called bias, "
                          "those of norms and convolutions included. 'ilora_only': those of the adapted modules. They are "
                          "changed in place: with the adapter disabled, another one active, or after unload() the model "
                          "then is not the base it was, and disabling warns of it. One adapter of a model may have this "
                          "set. A layer whose bias is being trained runs base and adapter as separate operations."},
    )

    def __post_init__(self):
        super().__post_init__()
        self.peft_type = ILORA
        for f in fields(self):
            setattr(self, f.name, _plain(getattr(self, f.name)))
        for name in ("rank_pattern", "alpha_pattern"):
            if isinstance(getattr(self, name), dict):
                setattr(self, name, {key: _plain(value) for key, value in getattr(self, name).items()})
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, str):
                try:
                    re.compile(value)
                except re.error as error:
                    raise ValueError(f"`{name}` is not a valid regular expression: {value!r} ({error})") from None
            elif value is not None:
                setattr(self, name, set(value))
        self._check_ranges()

    def _check_ranges(self) -> None:
        def require(fine: bool, name: str, wanted: str) -> None:
            if not fine:
                raise ValueError(f"ILoraConfig: `{name}` must be {wanted}, got {getattr(self, name)!r}.")

        require(_is_positive_int(self.r), "r", "a whole number of at least 1")
        require(_is_positive_int(self.num_heads), "num_heads", "a whole number of at least 1")
        require(_is_positive_number(self.lora_alpha), "lora_alpha", "given and above 0 (the published run uses 2 * r)")
        require(self.lora_dropout == 0 or (_is_positive_number(self.lora_dropout) and self.lora_dropout < 1),
                "lora_dropout", "in [0, 1)")
        require(self.router in ROUTERS, "router", f"one of {ROUTERS}")
        require(_is_positive_number(self.router_temperature), "router_temperature", "above 0")
        require(self.top_k is None or (_is_positive_int(self.top_k) and self.top_k <= self.num_heads), "top_k",
                f"left out, or a whole number from 1 to num_heads={self.num_heads}")
        require(self.top_k is None or self.router == "token", "top_k", "left out unless router='token'")
        require(self.router_input in ROUTER_INPUTS, "router_input", f"one of {ROUTER_INPUTS}")
        require(self.router_input == "token" or self.router == "token", "router_input",
                "'token' unless router='token' (a uniform router reads nothing)")
        require(self.router_sharing in ROUTER_SHARING, "router_sharing", f"one of {ROUTER_SHARING}")
        require(self.router_sharing == "module" or self.router == "token", "router_sharing",
                "'module' unless router='token' (a uniform router has no weight to share)")
        for name in ("shared_A", "shared_head", "init_weights", "use_rslora"):
            require(isinstance(getattr(self, name), bool), name, "True or False")
        require(not self.shared_head or self.router == "token" and self.num_heads > 1, "shared_head",
                "False unless router='token' and num_heads is 2 or more (the others are routed)")
        require(self.top_k is None or self.top_k <= self.num_heads - self.shared_head, "top_k",
                f"at most the {self.num_heads - self.shared_head} heads that are routed")
        for name in ("router_noise", "balance_weight", "orthogonality_weight"):
            value = getattr(self, name)
            require(_is_positive_number(value) or value == 0 and not isinstance(value, bool), name, "a number of at least 0")
        for name in ("router_noise", "balance_weight"):
            require(not getattr(self, name) or self.router == "token", name, "0 unless router='token'")
            require(not getattr(self, name) or self.num_heads - self.shared_head > 1, name,
                    "0 for a single routed head, whose weight is always 1")
        require(not self.balance_weight or self.top_k != 1, "balance_weight",
                "0 with top_k=1, whose weights, being 1 or 0, pass no gradient on to the router")
        require(not self.orthogonality_weight or self.num_heads > 1, "orthogonality_weight", "0 for a single head")
        require(_is_positive_number(self.router_init_std), "router_init_std",
                "above 0 (a zero router over zero heads never tells the heads apart)")
        require(not isinstance(self.modules_to_save, str), "modules_to_save", "a list of names")
        require(self.bias in BIASES, "bias", f"one of {BIASES}")
        require(isinstance(self.rank_pattern, dict) and all(map(_is_positive_int, self.rank_pattern.values())),
                "rank_pattern", "a map to ranks of at least 1")
        require(isinstance(self.alpha_pattern, dict) and all(map(_is_positive_number, self.alpha_pattern.values())),
                "alpha_pattern", "a map to alphas above 0")
        require(self.layers_to_transform is None or not isinstance(self.target_modules, str), "layers_to_transform",
                "left out when `target_modules` is a string (put the layer numbers into the expression)")
        require(self.layers_pattern is None or self.layers_to_transform is not None or self.router_sharing == "layer",
                "layers_pattern", "left out without `layers_to_transform` or router_sharing='layer'")

    def to_dict(self) -> dict:
        return {name: sorted(value) if isinstance(value, set) else value for name, value in super().to_dict().items()
                if name not in LATER_FIELDS or value != LATER_FIELDS[name]}

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, subfolder=None, **kwargs):
        config = super().from_pretrained(pretrained_model_name_or_path, subfolder, **kwargs)
        # an argument that PeftModel.load_adapter alone gives: should its tensors be refused, the adapter goes again
        config.__dict__["being_loaded"] = "ephemeral_gpu_offload" in kwargs
        return config

    @classmethod
    def check_kwargs(cls, **kwargs):
        """Refuse a saved configuration with fields this version does not know (PEFT would drop them and go on)."""
        unknown = sorted(set(kwargs) - {f.name for f in fields(cls)})
        if unknown:
            raise ValueError(f"adapter_config.json holds fields that ILoraConfig does not know: {unknown}. "
                             "Mend the spelling, or use the version of crab that wrote it.")
        return super().check_kwargs(**kwargs)
