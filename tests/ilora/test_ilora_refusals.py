"""What I-LoRA does not take: sizes, targets and saved adapters that do not fit, each refused by the name of the module."""

import json

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from torch import nn

from crab.ilora import ILoraConfig, ILoraLayer


class Block(nn.Module):
    def __init__(self, wide, narrow):
        super().__init__()
        self.up = nn.Linear(wide, narrow)
        self.down = nn.Linear(narrow, wide)
        self.norm = nn.LayerNorm(wide)
        self.filter = nn.Conv1d(wide, wide, 3, padding=1)
        self.attention = nn.MultiheadAttention(wide, 2)


class Tower(nn.Module):
    def __init__(self, blocks=2, wide=8, narrow=4):
        super().__init__()
        self.embed = nn.Embedding(5, wide)
        self.layers = nn.ModuleList(Block(wide, narrow) for _ in range(blocks))

    def forward(self, ids):
        x = self.embed(ids)
        for block in self.layers:
            x = x + block.down(block.up(block.norm(x)).relu())
        return x


def config(**choices):
    return ILoraConfig(**(dict(r=2, lora_alpha=4, num_heads=3, target_modules=["up", "down"], init_weights=False) | choices))


def refused(base, message, **choices):
    with pytest.raises(ValueError, match=message):
        get_peft_model(base, config(**choices))
    assert not any(isinstance(module, ILoraLayer) for module in base.modules()), "a refusal leaves the base as it was"


@pytest.mark.parametrize("field", ["r", "num_heads"])
@pytest.mark.parametrize("value", [0, -1, -128, 2.0, "8", None, True])
def test_ranks_and_heads_are_whole_numbers_from_one_up(field, value):
    with pytest.raises(ValueError, match=f"`{field}` must be a whole number of at least 1, got {value!r}"):
        config(**{field: value})


@pytest.mark.parametrize("value", [None, 0, -4, float("nan"), float("inf"), "8"])
def test_alpha_is_given_and_above_zero(value):
    with pytest.raises(ValueError, match=f"`lora_alpha` must be given and above 0 .*, got {value!r}"):
        config(lora_alpha=value)


@pytest.mark.parametrize("field, value", [("rank_pattern", 0), ("rank_pattern", 1.5), ("alpha_pattern", 0)])
def test_a_pattern_names_the_module_of_the_bad_number(field, value):
    with pytest.raises(ValueError, match=rf"`{field}` must be .*'layers.1.up': {value}"):
        config(**{field: {"layers.1.up": value}})


@pytest.mark.parametrize("choices, message", [
    (dict(target_modules=r".*gate_proj"), "gate_proj not found"),
    (dict(target_modules=["gate_proj"]), "'gate_proj'.*not found"),
    (dict(target_modules=["up", "gate_proj"]), "`target_modules` entry 'gate_proj' matches no module"),
    (dict(target_modules=["up"], exclude_modules=["up"]), "No modules were targeted.*excluded"),
    (dict(target_modules=["up"], layers_to_transform=[7]), r"'up'.*not found.*\[7\]"),
    (dict(target_modules=[]), "No `target_modules`"),
    (dict(rank_pattern={"gate_proj": 4}), "`rank_pattern` key 'gate_proj' matches none"),
    (dict(alpha_pattern={"gate_proj": 4}), "`alpha_pattern` key 'gate_proj' matches none"),
    (dict(target_modules="all-linear", exclude_modules=["out_proj"], rank_pattern={"gate_proj": 4}),
     "`rank_pattern` key 'gate_proj' matches none"),
])
def test_targets_that_match_nothing(choices, message):
    refused(Tower(), message, **choices)


@pytest.mark.parametrize("target, name, kind", [
    ("embed", "embed", "Embedding"), ("norm", r"layers\.0\.norm", "LayerNorm"), ("filter", r"layers\.0\.filter", "Conv1d"),
    ("attention", r"layers\.0\.attention", "MultiheadAttention"), (r"layers\.1", r"layers\.1", "Block"),
    # its own module never calls it, but reads the weight
    ("out_proj", r"layers\.0\.attention\.out_proj", "NonDynamicallyQuantizableLinear"),
])
def test_targets_that_are_not_linear(target, name, kind):
    refused(Tower(), f"matches '{name}', which is a {kind}", target_modules=rf"(.*\.)?({target}|up)")


def test_all_linear_modules_are_checked_before_the_first_is_replaced():
    refused(Tower(), r"matches 'layers\.0\.attention\.out_proj', which is a NonDyn", target_modules="all-linear")
    model = get_peft_model(Tower(), config(target_modules="all-linear", exclude_modules=["out_proj"], rank_pattern={"up": 1}))
    model.add_adapter("second", config(target_modules="all-linear", exclude_modules=["out_proj"], rank_pattern={"down": 1}))
    layers = {name: layer.r for name, layer in model.base_model.model.named_modules() if isinstance(layer, ILoraLayer)}
    up, down = {"default": 1, "second": 2}, {"default": 2, "second": 1}
    assert layers == {"layers.0.up": up, "layers.0.down": down, "layers.1.up": up, "layers.1.down": down}


def test_an_adapter_for_each_sample():
    model = get_peft_model(Tower(), config())
    model.add_adapter("second", config())
    ids = torch.tensor([[0, 1], [2, 3]])
    with pytest.raises(ValueError, match=r"`adapter_names`.*not supported.*model\.set_adapter"):
        model(ids, adapter_names=["default", "second"])
    model(ids, adapter_names=None)


# ---- saved adapters

@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    get_peft_model(Tower(), config()).save_pretrained(tmp_path)
    return tmp_path


def change(folder, **values):
    """Values of the saved configuration; None takes one out."""
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text()) | values
    file.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))


UP = "layers.0.up.ilora_"


@pytest.mark.parametrize("base, message", [
    (dict(wide=16), rf"{UP}A\.default\.weight has shape \[2, 8\], this base and configuration need \[2, 16\]"),
    (dict(narrow=6), rf"{UP}B\.default\.weight has shape \[4, 6\], this base and configuration need \[6, 6\]"),
    (dict(blocks=1), r"spare layers\.1\.down\.ilora_A\.weight"),
    (dict(blocks=3), r"missing layers\.2\.up\.ilora_A\.default\.weight"),
])
def test_an_adapter_of_another_base(saved, base, message):
    with pytest.raises(ValueError, match=f"Cannot load adapter 'default': .*{message}.* made for another base model"):
        PeftModel.from_pretrained(Tower(**base), saved)


@pytest.mark.parametrize("values, message", [
    (dict(lora_alpha=None), "`lora_alpha` must be given"), (dict(lora_alpha=0), "`lora_alpha` must be given"),
    (dict(r=0), "`r` must be"), (dict(num_heads=-3), "`num_heads` must be"),
    (dict(r=3), rf"{UP}A\.default\.weight has shape \[2, 8\].* need \[3, 8\]"),
    (dict(num_heads=2), rf"{UP}B\.default\.weight has shape \[4, 6\].* need \[4, 4\]"),
    (dict(rank_pattern={r"layers\.1\.up": 4}), r"layers\.1\.up\.ilora_A\.default\.weight has shape \[2, 8\].* need \[4, 8\]"),
    (dict(router="uniform"), rf"spare {UP}router"),
    (dict(target_modules=["up"]), r"spare layers\.0\.down\.ilora_A"),
    (dict(target_modules=["up", "down", "filter"]), r"'layers\.0\.filter', which is a Conv1d"),
])
def test_a_configuration_that_does_not_fit_its_tensors(saved, values, message):
    change(saved, **values)
    with pytest.raises(ValueError, match=message):
        PeftModel.from_pretrained(Tower(), saved)


def test_tensors_put_into_a_model_by_hand_are_held_against_it_too():
    state = get_peft_model_state_dict(get_peft_model(Tower(), config(r=3)))
    model = get_peft_model(Tower(), config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=rf"Cannot load adapter 'default': {UP}A\.default\.weight has shape \[3, 8\]"):
        set_peft_model_state_dict(model, state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
