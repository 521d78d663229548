"""The only place that changes PEFT: it learns the name of the method, and how to load an adapter over another."""

from functools import wraps

from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "ilora"
PREFIX = "ilora_"


def _member() -> PeftType:
    """`PeftType.ILORA`, added to the enum by the first call: `register_peft_method` takes only names that are in it."""
    value = NAME.upper()
    if value in PeftType.__members__:
        return PeftType[value]
    member = str.__new__(PeftType, value)
    member._name_ = member._value_ = value
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(value)
    PeftType._member_map_[value] = member
    PeftType._value2member_map_[value] = member
    type.__setattr__(PeftType, value, member)  # Python 3.12 looks members up as attributes
    return member


ILORA = _member()


def register(config_class, model_class) -> None:
    """Register the method with PEFT, also again after a reload. RuntimeError if a later PEFT has the name itself."""
    present = PEFT_TYPE_TO_CONFIG_MAPPING.get(ILORA)
    if present is not None:
        if present.__module__ != config_class.__module__:
            other = f"{present.__module__}.{present.__name__}"
            raise RuntimeError(f"PEFT already has a method called '{NAME}' ({other}); use it or crab.ilora, not both.")
        del PEFT_TYPE_TO_CONFIG_MAPPING[ILORA], PEFT_TYPE_TO_TUNER_MAPPING[ILORA], PEFT_TYPE_TO_PREFIX_MAPPING[ILORA]
    register_peft_method(name=NAME, config_cls=config_class, model_cls=model_class, prefix=PREFIX)
    PeftModel.load_adapter = _strict(getattr(PeftModel.load_adapter, "lenient", PeftModel.load_adapter))


def _strict(load_adapter):
    """PEFT's `load_adapter`, which never leaves an I-LoRA adapter with settings or tensors that are not its own.

    If the model has an adapter of the name, PEFT loads only the tensors, and keeps the alpha, temperature, ... of the
    old one. And an adapter whose tensors were refused would stay in the model.
    """

    @wraps(load_adapter)
    def strict(self, model_id, adapter_name, *args, **kwargs):
        config = self.peft_config.get(adapter_name)
        if config is not None and config.peft_type == ILORA:
            saved = type(config).from_pretrained(model_id, **self._split_kwargs(kwargs)[0])
            if different := config.differences(saved):
                fields = "; ".join(f"`{name}` is {a!r} there, {b!r} in the file" for name, (a, b) in different.items())
                reason = f"{model_id}/adapter_config.json does not fit the adapter of this name in the model: {fields}"
                fix = "Load it under another name, or call delete_adapter first."
                raise ValueError(f"Cannot load adapter '{adapter_name}': {reason}. {fix}")
        try:
            return load_adapter(self, model_id, adapter_name, *args, **kwargs)
        except Exception:
            if config is None and getattr(self.peft_config.get(adapter_name), "peft_type", None) == ILORA:
                self.delete_adapter(adapter_name)
            raise

    strict.lenient = load_adapter
    return strict
