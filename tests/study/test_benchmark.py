"""The benchmark counts right: its clock, its ratios, its FLOPs and bytes; what it times is what it says."""

import json
import math

import matplotlib
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

matplotlib.use("Agg")

from crab.data import records  # noqa: E402
from crab.study import benchmark, benchmark_data, benchmark_layer, benchmark_model  # noqa: E402
from crab.study.benchmark_layer import BASE, ILORA, LOOP, LORA, VARIANTS, WIDE, Point  # noqa: E402
from crab.study.dataset import load_base  # noqa: E402
from crab.study.figures.benchmark import growth_lines, memory_bars, shape_bars  # noqa: E402
from crab.tasks import MediaItem  # noqa: E402

POINT = Point("shape", 24, 40, 4, 16, 3)


class Clock:
    """A clock that goes when told to."""

    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for name in ("thread_time", "perf_counter"):
        monkeypatch.setattr(benchmark.time, name, clock)
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

    times = benchmark.interleaved({"a": contender("a", 1, 10), "b": contender("b", 2, 20)}, seconds=0, least=3)
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

    times = benchmark.interleaved({"a": contender("a"), "b": contender("b")}, seconds=0, least=2)
    assert ran == [(-1, "b"), (-1, "a")] + [(0, "a")] * 4 + [(0, "b")] * 4 + [(1, "b")] * 4 + [(1, "a")] * 4
    assert all(taken == pytest.approx(0.01) for name in "ab" for taken in times[name][0])


def test_repetitions_end_with_the_time_or_at_most(clock):
    def step(_):
        clock.now += 1
        yield

    assert benchmark.interleaved({"a": step}, seconds=7.5, least=2)["a"].shape == (1, 8)
    assert benchmark.interleaved({"a": step}, seconds=7.5, least=2, most=5)["a"].shape == (1, 5)


def test_ratios_are_of_pairs_so_that_drift_cancels():
    slow = np.linspace(1, 9, 9)
    found = benchmark.estimate(benchmark.quotient("x", "y"), {"x": 3 * slow, "y": 2 * slow})
    assert found == {"value": 1.5, "low": 1.5, "high": 1.5}
    alone = benchmark.quotient_without("base", "x", "y")
    found = benchmark.estimate(alone, {"base": slow, "x": slow + 6, "y": slow + 2})
    assert found == pytest.approx({"value": 3, "low": 3, "high": 3})
    assert benchmark.estimate(alone, {"base": slow, "x": slow + 6, "y": slow - 1})["value"] == math.inf


def test_intervals_widen_with_noise():
    draw = np.random.default_rng(1)
    widths = []
    for noise in (0.01, 0.1):
        found = benchmark.estimate(benchmark.quotient("x", "y"), {"x": 2 + noise * draw.standard_normal(30), "y": np.ones(30)})
        assert found["low"] <= found["value"] <= found["high"]
        widths.append(found["high"] - found["low"])
    assert 0 < 4 * widths[0] < widths[1]


def test_machine_sets_the_threads():
    facts = benchmark.machine(1)
    assert torch.get_num_threads() == facts["threads used"] == 1
    assert facts["CPU"] and facts["bfloat16 on the CPU"].split(",")[0] in ("measured", "emulated")


def test_emulated_formats_are_not_timed(monkeypatch):
    both = ["float32", "bfloat16"]
    for found, wanted in (({"avx2": True}, ["float32"]), ({"avx512_bf16": True}, both), ({"bf16": True}, both)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda found=found: found)
        assert benchmark.formats(both, "cpu") == wanted
    for native, wanted in ((True, both), (False, ["float32"])):
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation, native=native: native or including_emulation)
        assert benchmark.formats(both, "cuda") == wanted


def reference(x, W, A, R, heads, scaling):
    """The formula of the paper, token by token."""
    rows = []
    for token in x:
        z, logits = A @ token, R @ token
        weights = torch.exp(logits) / torch.exp(logits).sum()
        rows.append(W @ token + scaling * sum(w * (B @ z) for w, B in zip(weights, heads)))
    return torch.stack(rows)


def test_loop_and_ilora_compute_the_published_formula():
    layers = benchmark_layer.variants(POINT, torch.float64, "cpu")
    loop, ilora = layers[LOOP], layers[ILORA]
    with torch.no_grad():
        ilora.ilora_A["default"].weight.copy_(loop.A.weight)
        ilora.ilora_router["default"].weight.copy_(loop.R.weight)
        ilora.ilora_B["default"].weight.copy_(torch.cat([B.weight for B in loop.B], 1))
    x = torch.randn(POINT.tokens, POINT.width_in, dtype=torch.float64)
    wanted = reference(x, layers[BASE].weight, loop.A.weight, loop.R.weight, [B.weight for B in loop.B], scaling=2)
    # the softmax of both may run in float32
    torch.testing.assert_close(loop(x), wanted, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(ilora(x), wanted, rtol=1e-5, atol=1e-6)


def test_variants_share_one_frozen_base_and_have_the_ranks_they_name():
    layers = benchmark_layer.variants(POINT, torch.bfloat16, "cpu")
    assert tuple(layers) == VARIANTS
    base = layers[BASE].weight
    assert not base.requires_grad
    sizes = {}
    for name, layer in layers.items():
        assert any(p is base for p in layer.parameters()) and {p.dtype for p in layer.parameters()} == {torch.bfloat16}
        trained = [p for p in layer.parameters() if p.requires_grad]
        assert all(p.abs().sum() > 0 for p in trained)  # nothing is spared by zeros
        sizes[name] = sum(p.numel() for p in trained)
    assert sizes == {BASE: 0, LORA: 4 * 64, WIDE: 12 * 64, LOOP: 7 * 24 + 12 * 40, ILORA: 7 * 24 + 12 * 40}


@pytest.mark.parametrize("point", [POINT, Point("heads", 64, 32, 2, 128, 16)])
@pytest.mark.parametrize("variant", VARIANTS)
def test_flops_are_those_that_torch_counts(variant, point):
    layer = benchmark_layer.variants(point, torch.float32, "cpu")[variant]
    x = torch.randn(point.tokens, point.width_in, requires_grad=True)
    # torch does not count products that add in place by itself
    in_place = {torch.ops.aten.addmm_: lambda total, left, right, **_: 2 * left[0] * left[1] * right[1]}
    with FlopCounterMode(display=False, custom_mapping=in_place) as counter:
        layer(x).sum().backward()
    assert sum(flops for flops, _ in benchmark_layer.operations(variant, point)) == counter.get_total_flops()


def test_rooflines_take_the_longer_of_computing_and_moving():
    point = Point("shape", 2, 3, 1, 5, 2)  # the base: 2 products of 60 FLOPs, moving 10 + 6 + 15 numbers each
    assert benchmark_layer.rooflines(point, 4, rate=60, bandwidth=1e9)[BASE] == pytest.approx(2)
    assert benchmark_layer.rooflines(point, 4, rate=1e9, bandwidth=31)[BASE] == pytest.approx(8)
    with pytest.raises(ValueError, match="variant 'other' is unknown; use one of frozen base"):
        benchmark_layer.operations("other", point)


def test_bytes_kept_for_backward():
    T, i, o, r, N = 16, 24, 40, 4, 3
    layers = benchmark_layer.variants(Point("shape", i, o, r, T, N), torch.float32, "cpu")
    x = torch.randn(T, i, requires_grad=True)
    kept = {name: benchmark_layer.kept_bytes(layer, x) for name, layer in layers.items()}
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
@torch.backends.mkldnn.flags(enabled=False)  # for bfloat16 it takes what it packs from torch, and only on some processors
def test_peak_of_memory_by_hand(dtype, capfd):
    T, i, o = 16, 24, 40
    layers = benchmark_layer.variants(Point("shape", i, o, 4, T, 3), dtype, "cpu")
    x, grad = torch.randn(T, i, dtype=dtype, requires_grad=True), torch.randn(T, o, dtype=dtype)
    peak = {name: benchmark_layer.peak_bytes(layer, x, grad) for name, layer in layers.items()}
    both = T * (i + o) * dtype.itemsize  # the output, which lives until backward is over, and the input's gradient
    assert peak[BASE] == both and type(peak[BASE]) is int
    wasteful = torch.nn.Sequential(layers[BASE], torch.nn.Module())
    wasteful[1].forward = Waste.apply
    # backward's waste comes before the input's gradient is there
    assert benchmark_layer.peak_bytes(wasteful, x, grad) == max(both, T * o * dtype.itemsize + 1000)
    # what is kept for backward is held beside the output; the loop's outputs of three heads are
    assert all(peak[name] >= T * o * dtype.itemsize + benchmark_layer.kept_bytes(layer, x) - x.nbytes
               for name, layer in layers.items() if name != BASE)
    assert peak[LOOP] > 4 * T * o * dtype.itemsize and peak[LOOP] > max(peak[LORA], peak[WIDE], peak[ILORA])
    assert x.grad is None and all(p.grad is None for layer in layers.values() for p in layer.parameters())
    assert capfd.readouterr().err == ""  # the profiler's own words


def test_points_vary_one_size_at_a_time():
    found = benchmark_layer.points([[8, 9, 2, 10]], {"at": [4, 5, 1, 6], "heads": [1, 16], "rank": [2], "tokens": [7]})
    assert [tuple(p) for p in found] == [
        ("shape", 8, 9, 2, 10, 3), ("heads", 4, 5, 1, 6, 1), ("heads", 4, 5, 1, 6, 16), ("rank", 4, 5, 2, 6, 3), ("tokens", 4, 5, 1, 7, 3),
    ]  # fmt: skip


@pytest.fixture(scope="module")
def measured():
    sweep = {"at": [8, 8, 2, 8], "heads": [1, 16], "rank": [2, 4], "tokens": [8, 16]}
    chosen = benchmark_layer.points([[8, 8, 2, 16], [8, 12, 2, 16]], sweep)
    with pytest.MonkeyPatch.context() as context:
        context.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
        return benchmark_layer.layer(chosen, ["float32", "bfloat16"], seconds=0)


def test_layer_tables_are_whole(measured):
    costs, ratios = measured
    devices = 2 if torch.cuda.is_available() else 1
    assert len(costs) == devices * 2 * 8 * 2 * len(VARIANTS) and list(ratios.columns[: len(benchmark.RATIO)]) == benchmark.RATIO
    assert (costs["peak_bytes"] > 0).all()
    assert (costs["q1"] <= costs["seconds"]).all() and (costs["seconds"] <= costs["q3"]).all() and (costs["seconds"] > 0).all()
    wide = costs.pivot_table(index=["dtype", "sweep", "width_out", "tokens", "rank", "heads", "variant"], columns="pass", values="seconds")
    assert (wide["forward"] < wide["forward + backward"]).all()
    assert set(ratios["ratio"]) >= {target.ratio for target in benchmark.TARGETS if target.part == "layer"}
    assert len(benchmark_layer.rates(costs)) == devices * 2


@pytest.mark.parametrize("draw", [shape_bars, growth_lines, memory_bars])
def test_figures_name_what_they_show_and_are_the_same_for_the_same_table(draw, measured, tmp_path):
    figure = draw(measured[0], tmp_path / "sub" / "a.png")
    assert figure.get_suptitle() and any(axes.get_xlabel() for axes in figure.axes) and any(axes.get_ylabel() for axes in figure.axes)
    draw(measured[0], tmp_path / "b.png")
    assert (tmp_path / "b.png").read_bytes() == (tmp_path / "sub" / "a.png").read_bytes()


def ratio(value, low, high, roofline=None, plain=None, **sizes):
    sizes = {"width_in": 576, "width_out": 576, "heads": 3, **sizes}
    about = {"part": "layer", "device": "cpu", "dtype": "float32", "where": str(sizes), "ratio": "ilora_over_lora"}
    return {**about, "value": value, "low": low, "high": high, "roofline": roofline, "plain": plain, **sizes}


def test_verdicts(tmp_path):
    ratios = pd.DataFrame(
        [
            ratio(1.0, 0.9, 1.04),
            ratio(1.0, 0.9, 1.2),
            ratio(1.1, 1.06, 1.2, 1.01),
            ratio(1.1, 1.0, 1.2, 1.07),
            ratio(9.0, 9.0, 9.0, heads=16),  # the target is about 3 heads
            ratio(1.1, 1.0, 1.12, width_in=128),
        ]
    )
    held = benchmark.hold(ratios)
    assert held["key"].tolist() == ["wide"] * 4 + ["narrow"]
    assert held["verdict"].tolist() == [
        "reached", "reached, narrowly", "missed", "missed, narrowly, even at the roofline", "reached",
    ]  # fmt: skip
    table = benchmark.summary(held)
    assert table["reached"].tolist() == ["2 of 4", "1 of 1"] and table["worst"].tolist() == [1.1, 1.1]
    benchmark.write(tmp_path, {"CPU": "x"}, {"ratios": ratios}, held)
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert metrics["reached"] == 3 and metrics["of"] == 5 and metrics["wide"] == {"cpu float32": {"median": 1.05, "worst": 1.1}}
    assert len(pd.read_csv(tmp_path / "ratios.csv")) == len(ratios)
    assert "verdict" in benchmark.style(held).to_html() and "worst" in benchmark.style(table).to_html()


def test_at_least_is_the_other_way_round():
    target = benchmark.Target("alone", "says", "layer", "ilora_over_lora", 5, at_least=True)
    held = benchmark.hold(pd.DataFrame([ratio(4, 3, 4.5, 9), ratio(4, 3, 4.5, 4.8), ratio(math.inf, 6, math.inf)]), [target])
    assert held["verdict"].tolist() == ["missed", "missed, even at the roofline", "reached"]
    assert benchmark.summary(held)["worst"].tolist() == [4] and held["wanted"].iloc[0] == "≥ 5"


def test_a_miss_that_plain_lora_would_share_says_so():
    target = benchmark.Target("alone", "says", "layer", "ilora_over_lora", 5, at_least=True)
    held = benchmark.hold(pd.DataFrame([ratio(4, 3, 4.5, plain=4.5), ratio(4, 3, 4.5, plain=6), ratio(6, 5.5, 7, plain=4)]), [target])
    assert held["verdict"].tolist() == ["missed, even at plain LoRA's time", "missed", "reached"]
    assert held["plain"].tolist() == [4.5, 6, 4]


@pytest.fixture
def clips(monkeypatch, tmp_path):
    """Three records that share one drawn clip, in place of a data set's."""
    like = {"id": "a", "label": "Church bell", "media": [MediaItem("video", "", "video_path"), MediaItem("audio", "", "audio_path")]}
    like |= {"event": "Church bell", "start": 1, "end": 3}
    record = benchmark_data.filmed(tmp_path, like, fps=3, width=32, height=48, seconds=4)
    monkeypatch.setattr(records, "read", lambda root, slot, split: [record] * 3)
    return record


def test_decoding_alone_decodes_every_frame(clips):
    video, sound = clips["media"]
    assert benchmark_data.decode_alone({"media": [video]}) == 12
    assert benchmark_data.decode_alone(clips) > 12
    frames, wave = records.load(clips, 4)
    assert frames[0].shape == (4, 224, 224, 3) and len(wave) == 4 * 16_000
    assert frames[0].std() > 10  # something is to be seen


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_data_costs(base, clips, monkeypatch):
    monkeypatch.setattr(benchmark_data.tasks, "instruction", lambda slot, record: "which action ?")
    clip = {"fps": 2, "width": 32, "height": 32}
    costs, ratios = benchmark_data.data_costs(base, "root", "ave", 3, clip, [1, 2, 3], seconds=0)
    assert (costs["seconds"] > 0).all() and len(costs) == 2 * 4 + 2 * 3
    assert set(ratios["ratio"]) == {"prepare_over_decode", "decode_over_pyav", "both_over_pyav", "workers_2_over_1", "workers_3_over_1"}
    assert benchmark_data.data_table(costs)["workers"].tolist() == ["none"] * 8 + ["1", "2", "3"] * 2
    assert ratios.set_index("ratio")["roofline"].notna().to_dict() == {name: name.startswith("workers") for name in ratios["ratio"]}
    with pytest.raises(ValueError, match="ave/train has 3 records, 4 are wanted; lower `samples`"):
        benchmark_data.data_costs(base, "root", "ave", 4, clip, [1], seconds=0)


def test_model_costs(base, clips, monkeypatch):
    monkeypatch.setattr(benchmark_model.tasks, "instruction", lambda slot, record: "which action ?")
    monkeypatch.setattr(benchmark_model.tasks, "target", lambda slot, record, form: "<answer>red</answer>")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"bf16": True})
    costs, ratios = benchmark_model.model_costs(base, "root", "ave", 2, 3, 2, 3, ["float32", "bfloat16"], seconds=0)
    assert (costs["seconds"] > 0).all() and len(costs) == 2 * 2 * 4 + 1
    assert ratios["roofline"].notna().tolist() == [False, True, False, False]
    assert ratios["ratio"].tolist() == ["train_ilora_over_lora", "decode_ilora_over_lora"] * 2
    table = benchmark_model.model_table(costs, ratios)
    assert len(table) == 2 and " to " in table[("train", "I-LoRA / LoRA")].iloc[0]

    def in_bfloat16(path):  # as a published base is loaded on a GPU
        model, processor = load_base(path)
        return model.to(torch.bfloat16), processor

    monkeypatch.setattr(benchmark_model, "load_base", in_bfloat16)
    costs, ratios = benchmark_model.model_costs(base, "root", "ave", 2, 3, 2, 3, ["float32", "bfloat16"], seconds=0)
    assert set(costs["dtype"]) == {"bfloat16"} and len(ratios) == 2


def test_operations_alone_are_the_whole_formula(base):
    model, _ = benchmark_model.load_base(base)
    made = benchmark_model.adapted(model, rank=2, heads=3)["I-LoRA"].eval()
    for name, weight in made.named_parameters():
        if "ilora_" in name:
            torch.nn.init.normal_(weight, std=0.1)
    bare, ids = benchmark_model.operations_alone(made), torch.arange(14).view(2, 7)
    with torch.no_grad():
        wanted, found = (m(input_ids=ids, attention_mask=torch.ones_like(ids)).logits for m in (made, bare))
        with made.disable_adapter():
            assert not torch.allclose(made(input_ids=ids, attention_mask=torch.ones_like(ids)).logits, wanted, atol=1e-2)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    assert {p.data_ptr() for p in bare.parameters()} == {p.data_ptr() for p in made.parameters()}


def test_adapted_models_share_the_base_and_decode_to_the_end(base):
    model, _ = benchmark_model.load_base(base)
    frozen = {p.data_ptr() for p in model.parameters()}
    models = benchmark_model.adapted(model, rank=2, heads=3)
    trained = {}
    for name, made in models.items():
        assert {p.data_ptr() for p in made.parameters() if not p.requires_grad} == frozen
        assert made.generation_config.eos_token_id is None
        trained[name] = {n.rpartition(".default")[0].rpartition(".")[2] for n, p in made.named_parameters() if p.requires_grad}
    assert trained == {"LoRA": {"lora_A", "lora_B"}, "I-LoRA": {"ilora_A", "ilora_B", "ilora_router"}}
    assert not any("ilora" in n or "lora" in n for n, _ in model.named_parameters())  # the base itself is as it was
