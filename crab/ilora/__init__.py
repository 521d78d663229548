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
"""

from .config import ILoraConfig
from .layer import ILoraLayer, Linear
from .model import ILoraModel
from .registration import register
from .routing import join_steps, record_routing

register(ILoraConfig, ILoraModel)

__all__ = ["ILoraConfig", "ILoraLayer", "ILoraModel", "Linear", "join_steps", "record_routing"]
