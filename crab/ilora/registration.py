"""The one place that extends PEFT's own tables.

`peft.utils.register_peft_method` accepts only names that are already members of the `PeftType` enum, so a method that
lives outside PEFT must add its member first. Everything after that is PEFT's own registration.
"""

from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_PREFIX_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import PeftType, register_peft_method

NAME = "ilora"
PREFIX = "ilora_"


def _member() -> PeftType:
    """Return `PeftType.ILORA`, adding it to the enum on the first call."""
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
    type.__setattr__(PeftType, value, member)  # attribute access; Enum's metaclass looks members up here from 3.12 on
    return member


ILORA = _member()


def register(config_cls, model_cls) -> None:
    """Register the method with PEFT. Safe to repeat, also after a module reload (IPython's autoreload).

    Raises:
        RuntimeError: a different class already holds the name (for example a PEFT release with its own I-LoRA).
    """
    held = PEFT_TYPE_TO_CONFIG_MAPPING.get(ILORA)
    if held is not None:
        if held.__module__ != config_cls.__module__:
            raise RuntimeError(f"PEFT already has a method called '{NAME}' ({held.__module__}.{held.__name__}); "
                               "crab.ilora cannot take the same name. Use one or the other.")
        del PEFT_TYPE_TO_CONFIG_MAPPING[ILORA], PEFT_TYPE_TO_TUNER_MAPPING[ILORA], PEFT_TYPE_TO_PREFIX_MAPPING[ILORA]
    register_peft_method(name=NAME, config_cls=config_cls, model_cls=model_cls, prefix=PREFIX)
