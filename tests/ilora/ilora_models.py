"""Small models, adapters on them, and the published formula, for the tests of crab.ilora."""

import pytest
import torch
from peft import get_peft_model
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import Qwen2Config, Qwen2ForCausalLM

from crab.ilora import ILoraConfig

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOKENS = torch.arange(12).view(2, 6)
MASK = torch.ones_like(TOKENS, dtype=torch.bool)


class Single(nn.Module):
    def __init__(self, in_features=5, out_features=7, bias=True):
        super().__init__()
        self.lin = nn.Linear(in_features, out_features, bias=bias)

    def forward(self, x):
        return self.lin(x)


class Tower(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second = nn.Linear(5, 6, bias=bias), nn.LayerNorm(6), nn.Linear(6, 4)

    def forward(self, x):
        return self.second(self.norm(self.first(x)))


def adapted(dtype=torch.float64, base=None, upcast=True, **choices):
    """A model of one layer with random heads and a router that tells tokens apart."""
    torch.manual_seed(0)
    settings = dict(r=2, lora_alpha=3, num_heads=3, target_modules=["lin"], init_weights=False, router_init_std=1.0)
    model = (base or Single()).to(dtype)
    return get_peft_model(model, ILoraConfig(**settings | choices), autocast_adapter_dtype=upcast)


def parts(model):
    """The layer, and the weights A, B and R."""
    layer = model.base_model.model.lin
    return layer, *(getattr(layer, name)["default"].weight for name in ("ilora_A", "ilora_B", "ilora_router"))


def formula(x, weight, bias, A, B, R, scaling=1.5, temperature=1.0, top_k=None):
    """The published formula, head by head. With top_k the other heads weigh 0."""
    scores = x @ R.T / temperature
    powers = torch.exp(scores - scores.amax(-1, keepdim=True))
    if top_k:
        powers = powers * (scores >= scores.sort(-1, descending=True).values[..., top_k - 1 : top_k])
    weights, y, r = powers / powers.sum(-1, keepdim=True), x @ weight.T + bias, B.shape[1] // len(R)
    for i in range(len(R)):
        own = A if len(A) == r else A[i * r : (i + 1) * r]
        y = y + scaling * weights[..., i : i + 1] * (x @ own.T @ B[:, i * r : (i + 1) * r].T)
    return y


def base_model(layers=2, hidden=16):
    torch.manual_seed(0)
    sizes = dict(vocab_size=32, hidden_size=hidden, intermediate_size=24, num_hidden_layers=layers)
    heads = dict(num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64)
    tokens = dict(bos_token_id=None, eos_token_id=31, pad_token_id=0)
    return Qwen2ForCausalLM(Qwen2Config(**sizes, **heads, **tokens)).eval()


def config(**choices):
    settings = dict(r=2, lora_alpha=4, num_heads=3, target_modules=LINEARS, task_type="CAUSAL_LM", router_init_std=0.5)
    return ILoraConfig(**settings | choices)


def language_model(base=None, **choices):
    """A language model with random heads and routers that tell tokens apart."""
    settings = dict(router_init_std=3.0, init_weights=False)
    return get_peft_model(base or base_model(), config(**settings | choices)).eval()


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(input_ids=tokens).logits


def train(model, steps=3):
    """Train a language model on TOKENS -> the last loss."""
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        loss = model(input_ids=TOKENS, labels=TOKENS, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    return loss.item()


def equal(one, other):
    """Whether two state dicts have the same names and the same bits."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def refuses(message):
    """The block must raise a ValueError that says so."""
    return pytest.raises(ValueError, match=message)


def rewrite(folder, change):
    """Change the tensors of a saved adapter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    change(tensors)
    save_file(tensors, folder / "adapter_model.safetensors")
