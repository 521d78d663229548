"""The benchmark counts right: its clock, its ratios and its bytes; what it times is what it says."""

import numpy as np
import pytest
import torch

from crab.analyses import layer_costs, model_costs, timing
from crab.analyses.layer_costs import BASE, ILORA, LOOP, LORA, WIDE
from crab.data import records
from crab.models.checkpoint import load_base
from crab.tasks import MediaItem

POINT = {"varied": "shape", "width_in": 24, "width_out": 40, "rank": 4, "tokens": 16, "heads": 3}


class Clock:
    """A clock that a test sets."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for name in ("thread_time", "perf_counter"):
        monkeypatch.setattr(timing.time, name, clock)
    return clock


def test_contenders_take_turns_and_only_what_lies_before_a_yield_counts(clock):
    ran = []

    def contender(name, first, second):
        def step(n):
            ran.append((n, name))
            clock.now += first * (1 + n)  # nothing in the warm-up, more in each repetition
            yield
            clock.now += second
            yield
            clock.now += 100  # tidying up

        return step

    times = timing.interleaved({"a": contender("a", 1, 10), "b": contender("b", 2, 20)}, seconds=0, least=3)
    assert times["a"].tolist() == [[1, 2, 3], [10, 10, 10]]
    assert times["b"].tolist() == [[2, 4, 6], [20, 20, 20]]
    assert [name for n, name in ran if n == 0] == ["a", "b"] and [name for n, name in ran if n == 1] == ["b", "a"]
    assert {n for n, _ in ran} == {-1, 0, 1, 2}


def test_short_contenders_are_run_warm_before_they_are_timed(clock):
    ran = []

    def contender(name):
        def step(n):
            first = ran[-1:] != [(n, name)]
            ran.append((n, name))
            clock.now += 0.03 if first and n >= 0 else 0.01  # whoever follows another one is slow
            yield

        return step

    times = timing.interleaved({"a": contender("a"), "b": contender("b")}, seconds=0, least=2)
    assert ran == [(-1, "b"), (-1, "a")] + [(0, "a")] * 4 + [(0, "b")] * 4 + [(1, "b")] * 4 + [(1, "a")] * 4
    assert all(taken == pytest.approx(0.01) for name in "ab" for taken in times[name][0])


def test_repetitions_end_with_the_time(clock):
    def step(_):
        clock.now += 1
        yield

    assert timing.interleaved({"a": step}, seconds=7.5, least=2)["a"].shape == (1, 8)
    assert timing.interleaved({"a": step}, seconds=0, least=2)["a"].shape == (1, 2)


def test_ratios_are_of_pairs_so_that_drift_cancels():
    slow = np.linspace(1, 9, 9)
    assert timing.ratio(3 * slow, 2 * slow) == {"value": 1.5, "low": 1.5, "high": 1.5}


def test_intervals_widen_with_noise():
    draw, widths = np.random.default_rng(1), []
    for noise in (0.01, 0.1):
        result = timing.ratio(2 + noise * draw.standard_normal(30), np.ones(30))
        assert result["low"] <= result["value"] <= result["high"]
        widths.append(result["high"] - result["low"])
    assert 0 < 4 * widths[0] < widths[1]


def test_machine_sets_the_threads():
    facts = timing.machine(1)
    assert torch.get_num_threads() == facts["threads used"] == 1
    assert facts["CPU"] and facts["bfloat16 on the CPU"].split(",")[0] in ("measured", "emulated")


def test_emulated_formats_are_not_timed(monkeypatch):
    both = ["float32", "bfloat16"]
    for capabilities, expected in (
        ({"avx2": True}, ["float32"]),
        ({"avx512_bf16": True}, both),
        ({"bf16": True}, both),
    ):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda values=capabilities: values)
        assert timing.formats(both, "cpu") == expected
    for native, expected in ((True, both), (False, ["float32"])):
        monkeypatch.setattr(
            torch.cuda, "is_bf16_supported", lambda including_emulation, own=native: own or including_emulation
        )
        assert timing.formats(both, "cuda") == expected


def reference(x, W, A, R, heads, scaling):
    """The formula of the paper, token by token."""
    rows = []
    for token in x:
        z, logits = A @ token, R @ token
        weights = torch.exp(logits) / torch.exp(logits).sum()
        rows.append(W @ token + scaling * sum(w * (B @ z) for w, B in zip(weights, heads, strict=True)))
    return torch.stack(rows)


def test_loop_and_ilora_compute_the_published_formula():
    layers = layer_costs.layers(POINT, torch.float64, "cpu")
    x, r, heads = torch.randn(5, 24, dtype=torch.float64), 4, 3
    loop, ilora = layers[LOOP], layers[ILORA]
    W = layers[BASE].weight
    expected = reference(x, W, loop.A.weight, loop.R.weight, [B.weight for B in loop.B], 2.0)
    torch.testing.assert_close(loop(x), expected)
    parts = (ilora.ilora_A, ilora.ilora_router, ilora.ilora_B)
    A, R, B = (part["default"].weight for part in parts)
    torch.testing.assert_close(ilora(x), reference(x, W, A, R, B.split(r, dim=1), 2.0), rtol=1e-6, atol=1e-6)
    assert len(R) == heads


def test_contenders_share_one_frozen_layer_and_have_the_ranks_they_name():
    layers = layer_costs.layers(POINT, torch.float32, "cpu")
    frozen = layers[BASE].weight.data_ptr()
    for name, layer in layers.items():
        assert frozen in {p.data_ptr() for p in layer.parameters() if not p.requires_grad}, name
    assert layers[LORA].lora_A["default"].weight.shape == (4, 24)
    assert layers[WIDE].lora_B["default"].weight.shape == (40, 12)


def test_layer_table_is_whole():
    table = layer_costs.layer_costs([POINT], ["float32"], seconds=0)
    table = table[table["device"] == "cpu"].set_index("contender")
    assert list(table.index) == [BASE, LORA, WIDE, LOOP, ILORA] and (table["seconds"] > 0).all()
    assert table.loc[LORA, ["over_lora", "over_lora_low", "over_lora_high"]].tolist() == [1, 1, 1]
    assert table.loc[BASE, "over_base"] == 1 and table.loc[BASE, "kept_bytes"] == 0
    assert (table["over_lora_low"] <= table["over_lora"]).all() and (
        table["over_lora"] <= table["over_lora_high"]
    ).all()


def test_bytes_kept_for_backward():
    T, i, o, r, N = 16, 24, 40, 4, 3
    layers = layer_costs.layers(POINT, torch.float32, "cpu")
    x = torch.randn(T, i, requires_grad=True)
    kept = {name: layer_costs.kept_bytes(layer, x) for name, layer in layers.items()}
    assert kept[BASE] == 0  # its own weight alone
    assert kept[LORA] == 4 * T * (i + r)  # the input, and A x
    assert kept[WIDE] == 4 * T * (i + N * r)
    assert kept[ILORA] == 4 * T * (i + r + N)
    assert kept[LOOP] == 4 * T * (i + r + 2 * N + N * o)  # weights before and after scaling, and each head's output


class Waste(torch.autograd.Function):
    """Passes its input on, and holds a tensor of a thousand bytes for a moment, forward and backward."""

    @staticmethod
    def forward(ctx, x):
        torch.empty(1000, dtype=torch.uint8)
        return x.view_as(x)

    backward = forward


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.backends.mkldnn.flags(
    enabled=False
)  # for bfloat16 it takes what it packs from torch, and only on some processors
def test_peak_of_memory_by_hand(dtype, capfd):
    T, i, o = 16, 24, 40
    layers = layer_costs.layers(POINT, dtype, "cpu")
    x, grad = torch.randn(T, i, dtype=dtype, requires_grad=True), torch.randn(T, o, dtype=dtype)
    peak = {name: layer_costs.peak_bytes(layer, x, grad) for name, layer in layers.items()}
    both = T * (i + o) * dtype.itemsize  # the output, which lives until backward is over, and the input's gradient
    assert peak[BASE] == both and type(peak[BASE]) is int
    wasteful = torch.nn.Sequential(layers[BASE], torch.nn.Module())
    wasteful[1].forward = Waste.apply
    # backward's waste comes before the input's gradient is there
    assert layer_costs.peak_bytes(wasteful, x, grad) == max(both, T * o * dtype.itemsize + 1000)
    # what is kept for backward is held beside the output; the loop's outputs of three heads are
    assert all(
        peak[name] >= T * o * dtype.itemsize + layer_costs.kept_bytes(layer, x) - x.nbytes
        for name, layer in layers.items()
        if name != BASE
    )
    assert peak[LOOP] > 4 * T * o * dtype.itemsize and peak[LOOP] > max(peak[LORA], peak[WIDE], peak[ILORA])
    assert x.grad is None and all(p.grad is None for layer in layers.values() for p in layer.parameters())
    assert capfd.readouterr().err == ""  # the profiler's own words


@pytest.fixture
def clips(monkeypatch, tmp_path):
    """Three records that share one drawn clip, in place of a data set's."""
    like = {
        "id": "a",
        "label": "Church bell",
        "media": [MediaItem("video", "", "video_path"), MediaItem("audio", "", "audio_path")],
    }
    like |= {"event": "Church bell", "start": 1, "end": 3}
    record = model_costs.filmed(tmp_path, like, fps=3, width=32, height=48, seconds=4)
    monkeypatch.setattr(records, "read", lambda root, slot, split: [record] * 3)
    return record


def test_decoding_alone_decodes_every_frame(clips):
    video, sound = clips["media"]
    assert model_costs.decode_alone({"media": [video]}) == 12
    assert model_costs.decode_alone(clips) > 12
    frames, wave = records.load(clips, 4)
    assert frames[0].shape == (4, 224, 224, 3) and len(wave) == 4 * 16_000
    assert frames[0].std() > 10  # something is to be seen


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_data_costs(base, clips, monkeypatch):
    monkeypatch.setattr(model_costs.tasks, "instruction", lambda slot, record: "which action ?")
    clip = {"fps": 2, "width": 32, "height": 32}
    costs, ratios = model_costs.data_costs(base, "root", "ave", 3, clip, [1, 2], seconds=0)
    assert (costs["seconds"] > 0).all() and len(costs) == 2 * 4 + 2 * 2 and len(ratios) == 2 * 3 + 2
    with pytest.raises(ValueError, match="ave/train has 3 records, 4 are wanted; lower it"):
        model_costs.data_costs(base, "root", "ave", 4, clip, [1], seconds=0)


def test_model_costs(base, clips, monkeypatch):
    monkeypatch.setattr(model_costs.tasks, "instruction", lambda slot, record: "which action ?")
    monkeypatch.setattr(model_costs.tasks, "target", lambda slot, record, form: "<answer>red</answer>")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    table = model_costs.model_costs(base, "root", "ave", 2, 3, 2, 3, ["float32", "bfloat16"], seconds=0)
    parts = ["forward", "backward", "optimizer", "training step", "decoding"]
    assert table["part"].tolist() == parts * 2 and (table[["LoRA", "I-LoRA", "value"]] > 0).all(axis=None)

    def in_bfloat16(path):  # as a published base is loaded on a GPU
        model, processor = load_base(path)
        return model.to(torch.bfloat16), processor

    monkeypatch.setattr(model_costs, "load_base", in_bfloat16)
    table = model_costs.model_costs(base, "root", "ave", 2, 3, 2, 3, ["float32", "bfloat16"], seconds=0)
    assert set(table["dtype"]) == {"bfloat16"}
