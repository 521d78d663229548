"""I-LoRA (interaction-aware LoRA) as a PEFT method: one shared down-projection, several routed up-projections.

This room needs torch and peft only, so any PEFT project can use it. `config.py`, `layer.py` and `model.py` are the PEFT
method; a new option starts there. `fused.py` and `kernels.py` compute the same as `layer.py`, faster. Importing the
package makes the method known to PEFT, and PEFT's own calls do the rest::

    import crab.ilora
    from peft import PeftModel, get_peft_model

    config = crab.ilora.ILoraConfig(r=4, lora_alpha=8, num_heads=3, target_modules=["q_proj", "v_proj"])
    model = get_peft_model(base, config)          # train, model.save_pretrained(path), ...
    model = PeftModel.from_pretrained(base, path)

    with crab.ilora.record_routing(model) as routing:
        model.generate(**inputs)
    routing["model.layers.0.self_attn.q_proj"]    # a list of [batch, tokens, heads], one per forward pass
"""

from .config import ILoraConfig
from .layer import ILoraLayer, Linear
from .model import ILoraModel, parameter_groups
from .registration import register
from .routing import (
    RoutingMeans,
    instruction_tokens,
    record_routing,
    record_routing_means,
    routing_entropy,
    routing_information,
)
from .static import fixed_routing, to_static

register(ILoraConfig, ILoraModel)

__all__ = [
    "ILoraConfig", "ILoraLayer", "ILoraModel", "Linear", "RoutingMeans", "fixed_routing", "instruction_tokens",
    "parameter_groups", "record_routing", "record_routing_means", "routing_entropy", "routing_information", "to_static",
]  # fmt: skip
