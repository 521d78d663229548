"""I-LoRA (interaction-aware LoRA) as a PEFT method: one shared down-projection, several routed up-projections.

Importing this package makes the method known to PEFT; from then on PEFT's own calls do everything::

    import crab.ilora
    from peft import PeftModel, get_peft_model

    config = crab.ilora.ILoraConfig(r=4, lora_alpha=8, num_heads=3, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)          # train, model.save_pretrained(path), ...
    model = PeftModel.from_pretrained(base, path)

    with crab.ilora.record_routing(model) as routing:
        model.generate(**inputs)
    routing["model.layers.0.self_attn.q_proj"]    # list of [batch, tokens, heads], one a forward pass

    with crab.ilora.record_routing_means(model) as means:   # means by kind of token, in constant memory
        ...
    crab.ilora.to_static(model, means.weights(), "plain")   # a plain LoRA with the weights frozen at those means
"""

from .config import ILoraConfig
from .layer import ILoraLayer, Linear
from .model import ILoraModel, parameter_groups
from .registration import register
from .routing import (
    RoutingMeans,
    StaticLora,
    fixed_routing,
    instruction_tokens,
    join_steps,
    record_routing,
    record_routing_means,
    routing_entropy,
    routing_information,
    to_static,
)

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
    "join_steps",
    "parameter_groups",
    "record_routing",
    "record_routing_means",
    "routing_entropy",
    "routing_information",
    "to_static",
]
