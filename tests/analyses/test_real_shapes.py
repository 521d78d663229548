"""Steps at given shapes, here those of a small thinker on a CPU."""

import torch

from crab.analyses.real_shapes import WARM, training_steps
from crab.study.footprint import flops, read_base

METHODS = {"LoRA": ("lora", {"r": 2, "lora_alpha": 4}), "I-LoRA": ("ilora", {"r": 2, "lora_alpha": 4, "num_heads": 3})}


def test_each_method_trains_for_the_steps_and_work_is_that_of_the_plan(base, monkeypatch):
    steps = []
    adamw = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self, *rest: steps.append(self) or adamw(self, *rest))
    clock = iter(range(1000))
    monkeypatch.setattr("crab.analyses.real_shapes._now", lambda gpu: 0.5 * next(clock))
    small_base = read_base(base)
    rows = training_steps(small_base, METHODS, samples=2, tokens=12, answer=3, steps=2, tflops=1e-3)
    assert rows["method"].tolist() == ["LoRA", "LoRA", "I-LoRA", "I-LoRA"] and (rows["seconds"] == 0.5).all()
    assert len(steps) == 2 * (WARM + 2) and rows["gib"].isna().all()
    work = 2 * flops(small_base, small_base.adapter(*METHODS["I-LoRA"]), 12, 3, checkpointing=False)
    assert rows["mfu"].iloc[-1] == work / 0.5 / 1e9
