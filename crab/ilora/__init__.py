"""I-LoRA (interaction-aware LoRA) as a PEFT method: one shared down-projection, several routed up-projections.

This room needs torch and peft only, so it can be used in any PEFT project. `config.py`, `layer.py` and `model.py` are
what a PEFT method consists of; start there to add an option. `fused.py` and `kernels.py` hold the fast arithmetic, which
must give the numbers of `layer.py`. Importing the package makes the method known to PEFT. PEFT's own calls do the rest::

    import crab.ilora
    from peft import PeftModel, get_peft_model

    config = crab.ilora.ILoraConfig(r=4, lora_alpha=8, num_heads=3, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)          # train, model.save_pretrained(path), ...
    model = PeftModel.from_pretrained(base, path)

    with crab.ilora.record_routing(model) as routing:
        model.generate(**inputs)
    routing["model.layers.0.self_attn.q_proj"]    # a list of [batch, tokens, heads], one per forward pass

    with crab.ilora.record_routing_means(model) as means:   # means per kind of token, in constant memory
        ...
    crab.ilora.to_static(model, means.weights(), "plain")   # a plain LoRA with these weights, fixed

It trains over several processes as any PEFT method does. Gather what FSDP or ZeRO-3 has sharded before you save it, on
all processes, as HF Trainer does::

    state = accelerator.get_state_dict(wrapped)
    if accelerator.is_main_process:
        model.save_pretrained(path, state_dict=state)
"""

from .config import ILoraConfig
from .instruction import instruction_tokens
from .layer import ILoraLayer, Linear
from .model import ILoraModel, parameter_groups
from .registration import register
from .routing import RoutingMeans, record_routing, record_routing_means, routing_entropy, routing_information
from .static import StaticLora, fixed_routing, to_static

register(ILoraConfig, ILoraModel)

__all__ = [
    "ILoraConfig",
    "ILoraLayer",
    "ILoraModel",
    "Linear",
    "RoutingMeans",
    "StaticLora",
    "fixed_routing",
    "instruction_tokens",
    "parameter_groups",
    "record_routing",
    "record_routing_means",
    "routing_entropy",
    "routing_information",
    "to_static",
]
