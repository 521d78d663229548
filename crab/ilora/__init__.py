"""I-LoRA (interaction-aware LoRA) as a PEFT method: one shared down-projection, several routed up-projections.

Importing this package makes the method known to PEFT, which must be before a saved adapter is read as well; from then on
PEFT's own calls do everything::

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

Over several processes it trains as any PEFT method does. What FSDP or ZeRO-3 has sharded is gathered before it is saved,
by all processes, as HF Trainer does::

    state = accelerator.get_state_dict(wrapped)     # on all processes; those but the main one may get nothing, or None
    if accelerator.is_main_process:
        model.save_pretrained(path, state_dict=state)
"""

from .config import ILoraConfig
from .instruction import instruction_tokens
from .layer import ILoraLayer, Linear
from .model import ILoraModel, parameter_groups
from .registration import register
from .routing import (
    RoutingMeans,
    join_steps,
    record_routing,
    record_routing_means,
    routing_entropy,
    routing_information,
)
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
    "join_steps",
    "parameter_groups",
    "record_routing",
    "record_routing_means",
    "routing_entropy",
    "routing_information",
    "to_static",
]
