"""What I-LoRA refuses: options, targets and saved adapters that do not fit. The error names the field or module."""

import json

import pytest
import torch
from ilora_models import config as small_config
from ilora_models import equal, refuses
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
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
    return small_config(**dict(target_modules=["up", "down"], init_weights=False, task_type=None) | choices)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize(
    "field, values, message",
    [
        ("r", [0, -1, 2.0, "8", None, True], "a whole number of at least 1"),
        ("num_heads", [0, -128, 2.0, "8", None, True], "a whole number of at least 1"),
        ("lora_alpha", [None, 0, -4, NAN, INF, "8", True], r"given and above 0"),
        ("lora_dropout", [1.0, -0.1, "0"], r"in \[0, 1\)"),
        ("router", ["top", None], r"one of \('token', 'uniform'\)"),
        ("router_input", ["prompt"], r"one of \('token', 'instruction'\)"),
        ("router_sharing", ["block"], r"one of \('module', 'layer', 'model'\)"),
        ("bias", ["lora_only"], r"one of \('none', 'all', 'ilora_only'\)"),
        ("router_temperature", [0, -1, NAN], "above 0"),
        ("router_init_std", [0], "above 0"),
        ("top_k", [0, 4, True, 1.0], "None or a whole number from 1 to num_heads=3"),
        ("rank_pattern", [{"layers.1.up": 0}, {"up": 1.5}, None], "a map to numbers like"),
        ("alpha_pattern", [{"layers.1.up": 0}, [4]], "a map to numbers like"),
        ("shared_A", [1, None], "True or False"),
        ("use_rslora", ["false"], "True or False"),
        ("init_weights", ["no"], "True or False"),
        ("modules_to_save", ["lm_head"], "a list of names"),
    ],
)
def test_options_out_of_range(field, values, message):
    for value in values:
        with refuses(f"ILoraConfig: `{field}` must be {message}.*, got ") as error:
            config(**{field: value})
        assert str(error.value).endswith(f"got {value!r}.")


@pytest.mark.parametrize("choices", [dict(top_k=1), dict(router_input="instruction"), dict(router_sharing="layer")])
def test_a_uniform_router_has_nothing_to_choose(choices):
    (field,) = choices
    with refuses(f"`{field}` must be .* if router='uniform'"):
        config(router="uniform", **choices)


def test_expressions_and_unknown_options():
    with refuses("`target_modules` is not a valid regular expression"):
        config(target_modules="(up")
    with pytest.raises(TypeError, match="unexpected keyword argument 'heads'"):
        config(heads=3)
    assert all(option.metadata.get("help") for option in ILoraConfig.__dataclass_fields__.values())


def test_equal_choices_give_equal_files(tmp_path):
    for name, targets in (("one", ["up", "down", "embed"]), ("two", ["embed", "down", "up"])):
        config(target_modules=targets).save_pretrained(tmp_path / name)
    one, two = ((tmp_path / name / "adapter_config.json").read_bytes() for name in ("one", "two"))
    assert one == two


# ---- targets


def refused(base, message, **choices):
    with refuses(message):
        get_peft_model(base, config(**choices))
    assert not any(isinstance(module, ILoraLayer) for module in base.modules()), "a refusal leaves the base as it was"


@pytest.mark.parametrize(
    "choices, message",
    [
        (dict(target_modules=None), "specify `target_modules`"),
        (dict(target_modules=[]), "No `target_modules`"),
        (dict(target_modules=r".*gate_proj"), "gate_proj not found"),
        (dict(target_modules=["gate_proj"]), "'gate_proj'.*not found"),
        (dict(target_modules=["up", "gate_proj"]), "`target_modules` entry 'gate_proj' matches no module"),
        (dict(target_modules=["up"], exclude_modules=["up"]), "No modules were targeted.*excluded"),
        (dict(exclude_modules=["attn"]), "`exclude_modules` entry 'attn' matches no module"),
        (dict(exclude_modules=r".*layers\.9\..*"), r"`exclude_modules` entry .* matches no module"),
        (dict(rank_pattern={"*up": 4}), r"`rank_pattern` is not a valid regular expression: '\*up'"),
        (dict(alpha_pattern={"(up": 4}), r"`alpha_pattern` is not a valid regular expression: '\(up'"),
        (dict(rank_pattern={"gate_proj": 4}), "`rank_pattern` entry 'gate_proj' matches no adapted module"),
        (dict(alpha_pattern={"embed": 4}), "`alpha_pattern` entry 'embed' matches no adapted module"),
        (
            dict(target_modules="all-linear", exclude_modules=["out_proj"], rank_pattern={"no": 4}),
            "`rank_pattern` entry",
        ),
        (dict(modules_to_save=["embed", "lmhead"]), "`modules_to_save` entry 'lmhead' matches no module of the model"),
        (dict(modules_to_save=["score"]), "`modules_to_save` entry 'score' matches no module"),
        # all are checked before the first is replaced
        (dict(target_modules="all-linear"), r"matches 'layers\.0\.attention\.out_proj', which is a NonDyn"),
    ],
)
def test_entries_that_match_nothing(choices, message):
    refused(Tower(), message, **choices)


NOT_LINEAR = dict(norm="LayerNorm", filter="Conv1d", attention="MultiheadAttention")
NOT_LINEAR |= {"attention.out_proj": "NonDynamicallyQuantizableLinear"}  # its module reads the weight, never calls it


@pytest.mark.parametrize("name, kind", [("embed", "Embedding"), *((f"layers.0.{n}", k) for n, k in NOT_LINEAR.items())])
def test_targets_that_are_not_linear(name, kind):
    refused(Tower(), f"matches '{name}', which is a {kind}", target_modules=rf"{name}|.*\.up")


def test_patterns_of_two_adapters_on_all_linear_modules():
    choices = dict(target_modules="all-linear", exclude_modules=["out_proj"])
    model = get_peft_model(Tower(), config(**choices, rank_pattern={"up": 1}))
    model.add_adapter("second", config(**choices, rank_pattern={"down": 1}))
    layers = {name: layer.r for name, layer in model.base_model.model.named_modules() if isinstance(layer, ILoraLayer)}
    up, down = {"default": 1, "second": 2}, {"default": 2, "second": 1}
    assert layers == {"layers.0.up": up, "layers.0.down": down, "layers.1.up": up, "layers.1.down": down}


def test_one_adapter_per_sample():
    model = get_peft_model(Tower(), config())
    ids = torch.tensor([[0, 1], [2, 3]])
    with refuses(r"no `adapter_names`.*model\.set_adapter"):
        model(ids, adapter_names=["default", "default"])
    model(ids, adapter_names=None)


# ---- saved adapters


@pytest.fixture
def saved(tmp_path):
    torch.manual_seed(0)
    get_peft_model(Tower(), config()).save_pretrained(tmp_path)
    return tmp_path


def change(folder, **values):
    """Change values of the saved configuration; ... removes one."""
    file = folder / "adapter_config.json"
    fields = json.loads(file.read_text(encoding="utf-8")) | values
    fields = {name: value for name, value in fields.items() if value is not ...}
    file.write_text(json.dumps(fields), encoding="utf-8")


UP = "layers.0.up.ilora_"


@pytest.mark.parametrize(
    "base, message",
    [
        (dict(wide=16), rf"{UP}A\.default\.weight has shape \[2, 8\] and needs \[2, 16\]"),
        (dict(narrow=6), rf"{UP}B\.default\.weight has shape \[4, 6\] and needs \[6, 6\]"),
        (dict(blocks=1), r"unexpected layers\.1\.down\.ilora_A\.weight"),
        (dict(blocks=3), r"missing layers\.2\.up\.ilora_A\.default\.weight"),
    ],
)
def test_an_adapter_of_another_base(saved, base, message):
    with refuses(f"Cannot load adapter 'default': .*{message}.* made for another base"):
        PeftModel.from_pretrained(Tower(**base), saved)


@pytest.mark.parametrize(
    "values, message",
    [
        (dict(lora_alpha=...), "`lora_alpha` must be given"),
        (dict(r=0), "`r` must be"),
        (dict(r=3), rf"{UP}A\.default\.weight has shape \[2, 8\] and needs \[3, 8\]"),
        (dict(num_heads=2), rf"{UP}B\.default\.weight has shape \[4, 6\] and needs \[4, 4\]"),
        (dict(rank_pattern={r"layers\.1\.up": 4}), r"layers\.1\.up\.ilora_A\.default\.weight .* needs \[4, 8\]"),
        (dict(router="uniform"), rf"unexpected {UP}router"),
        (dict(target_modules=["up"]), r"unexpected layers\.0\.down\.ilora_A"),
        (dict(target_modules=["up", "down", "filter"]), r"'layers\.0\.filter', which is a Conv1d"),
        (dict(heads=3), r"adapter_config.json has fields that ILoraConfig does not know: \{'heads': 3\}"),
        (dict(shared_head=True), r"\{'shared_head': True\}; correct them, or use the version of crab that wrote"),
        (dict(router_noise=0.5, balance_weight=0.0), r"know: \{'router_noise': 0.5\}"),
    ],
)
def test_a_configuration_that_does_not_fit_its_tensors(saved, values, message):
    change(saved, **values)
    with refuses(message):
        PeftModel.from_pretrained(Tower(), saved)


def test_options_of_earlier_versions_that_change_nothing(saved):
    expected = PeftModel.from_pretrained(Tower(), saved)
    change(saved, shared_head=False, router_noise=0.0, balance_weight=0.0, orthogonality_weight=0, layers_pattern=None)
    change(saved, top_k=..., router_input=..., router_sharing=..., shared_A=...)  # not yet written then
    loaded = PeftModel.from_pretrained(Tower(), saved)
    assert loaded.peft_config["default"] == expected.peft_config["default"]
    change(saved, shared_head=True)
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['balance_weight'.*'shared_head'\]"):
        PeftConfig.from_pretrained(saved)  # PEFT's general reader only warns


OTHERS = dict(lora_alpha=40, router_temperature=0.2, top_k=1, use_rslora=True, modules_to_save=["embed"])


@pytest.mark.parametrize("field, value", [*OTHERS.items(), ("alpha_pattern", {"up": 1.0})])
def test_an_adapter_over_another_of_the_same_name(saved, field, value):
    model = get_peft_model(Tower(), config(**{field: value}))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with refuses(rf"Cannot load adapter 'default': .*`{field}` is .*Load it under another name"):
        model.load_adapter(saved, "default")
    assert equal(model.state_dict(), before)
    model.load_adapter(saved, "other")
    model.delete_adapter("default")
    model.save_pretrained(saved / "again", selected_adapters=["other"])
    model.load_adapter(saved / "again/other", adapter_name="other")


def test_the_same_adapter_again_takes_the_saved_tensors(saved):
    model = get_peft_model(Tower(), config(lora_dropout=0.5, target_modules=r".*\.(up|down)"))
    model.load_adapter(saved, "default", is_trainable=True)
    states = [get_peft_model_state_dict(m) for m in (model, PeftModel.from_pretrained(Tower(), saved))]
    assert equal(*states)


def test_tensors_put_into_a_model_by_hand_are_checked_too():
    state = get_peft_model_state_dict(get_peft_model(Tower(), config(r=3)))
    model = get_peft_model(Tower(), config())
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with refuses(rf"Cannot load adapter 'default': {UP}A\.default\.weight has shape \[3, 8\]"):
        set_peft_model_state_dict(model, state)
    assert equal(model.state_dict(), before)
