"""I-LoRA over several processes: DDP and both versions of FSDP, with two gloo processes on the CPU.

Every kind trains two steps, saves, loads and trains a third. A single process with the samples of both must come to the
same gradients and the same saved tensors. ZeRO-3 is not run, since DeepSpeed is no dependency. Hooks do what it does to
modules: a weight is empty outside the forward pass of its own module.
"""

import time
import traceback
import warnings
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
from ilora_models import base_model as small_model
from ilora_models import config, equal, refuses
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from crab.ilora import record_routing

# "layers" shards each decoder layer as one. "parts" also shards A, B and the router alone, as HF Trainer does, and
# there one router serves several modules of a layer.
KINDS = ("ddp", "fsdp2 layers", "fsdp2 parts", "fsdp1 layers", "fsdp1 parts")
PROCESSES = 2
TOKENS = torch.randint(32, (2 * PROCESSES, 6), generator=torch.Generator().manual_seed(0))
QUIET = 60  # seconds a process waits for the other
LONGEST = 240  # seconds until all processes are ended


def base_model():
    return small_model().double()


def adapted(kind="ddp"):
    base = base_model()
    torch.manual_seed(1)
    choices = dict(r=3, lora_alpha=6, target_modules=["q_proj", "up_proj", "down_proj"], init_weights=False)
    return get_peft_model(base, config(router_sharing="layer" if "parts" in kind else "module", **choices))


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)


def step(model, samples, gradients):
    """One step of gradient descent -> what `gradients` reads before it."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer.zero_grad()
    model(input_ids=samples, labels=samples).loss.backward()
    values = gradients(model)
    optimizer.step()
    return values


def plain_gradients(model):
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


# ---- what the processes run


def wrapped(model, kind):
    """The wrapped model, and the function that reads whole gradients."""
    if kind == "ddp":
        return DistributedDataParallel(model), plain_gradients
    if kind.startswith("fsdp2"):
        mesh = init_device_mesh("cpu", (PROCESSES,))
        leaves = [m for m in model.modules() if list(m.parameters(recurse=False))] if "parts" in kind else []
        trained = [module for module in leaves if all(p.requires_grad for p in module.parameters())]
        for module in (*trained, *model.base_model.model.model.layers, model):
            fully_shard(module, mesh=mesh)
        return model, lambda m: {n: p.grad.full_tensor() for n, p in m.named_parameters() if p.requires_grad}

    def summoned(m):
        with FullyShardedDataParallel.summon_full_params(m, with_grads=True):
            return {n.replace("_fsdp_wrapped_module.", ""): g for n, g in plain_gradients(m).items()}

    policy = fsdp_auto_wrap_policy(model) if "parts" in kind else ModuleWrapPolicy({Qwen2DecoderLayer})
    options = dict(use_orig_params=True, auto_wrap_policy=policy, device_id=torch.device("cpu"))
    return FullyShardedDataParallel(model, **options), summoned


def gathered(model, whole, kind):
    """The whole state dict on every process, as accelerate's get_state_dict gathers it."""
    if kind == "ddp":
        return model.state_dict()
    if kind.startswith("fsdp2"):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with FullyShardedDataParallel.state_dict_type(whole, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        return whole.state_dict()


def work(rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    meeting = dict(init_method=f"file://{folder}/meeting", timeout=timedelta(seconds=QUIET))
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES, **meeting)
    samples = TOKENS.chunk(PROCESSES)[rank]
    for kind in KINDS:
        model = adapted(kind)
        whole, gradients = wrapped(model, kind)
        result = {"gradients": [step(whole, samples, gradients) for _ in range(2)]}
        if kind.startswith("fsdp2") and rank == 0:
            try:
                model.save_pretrained(folder / f"shards of {kind}")
            except Exception as error:
                result["shards"] = f"{type(error).__name__}: {error}"
        state = gathered(model, whole, kind)
        # accelerate may gather to the main process alone
        model.save_pretrained(folder / kind, state_dict={} if rank else state, is_main_process=rank == 0)
        dist.barrier()
        model = PeftModel.from_pretrained(base_model(), folder / kind, is_trainable=True)
        whole, gradients = wrapped(model, kind)
        with record_routing(model) as routing:
            result["gradients"].append(step(whole, samples, gradients))
        result["routing"] = {name: weights for name, (weights,) in routing.items()}
        torch.save(result, folder / f"{kind}-{rank}.part")
        (folder / f"{kind}-{rank}.part").rename(folder / f"{kind}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


# ---- what they must come to


@cache
def lone(kind):
    """One process with all samples: gradients of three steps, routing in the third, the adapter after two."""
    model = adapted(kind)
    gradients = [step(model, TOKENS, plain_gradients) for _ in range(2)]
    after = {name: value.clone() for name, value in model.state_dict().items()}
    with record_routing(model) as routing:
        gradients.append(step(model, TOKENS, plain_gradients))
    return gradients, {name: weights for name, (weights,) in routing.items()}, after


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The results of the processes, and `failure.txt` if they did not end well."""
    folder = tmp_path_factory.mktemp("processes")
    processes = torch.multiprocessing.start_processes(work, (folder,), PROCESSES, join=False, start_method="spawn")
    end = time.monotonic() + LONGEST
    try:
        while not processes.join(timeout=max(0.1, end - time.monotonic())):
            if time.monotonic() > end:
                raise TimeoutError(f"the processes had not ended after {LONGEST} s")
    except Exception:
        (folder / "failure.txt").write_text(traceback.format_exc(), encoding="utf-8")
    finally:
        for process in processes.processes:
            process.kill()
            process.join()
    return folder


@pytest.mark.parametrize("kind", KINDS)
def test_several_processes_equal_one(folder, kind):
    files = [folder / f"{kind}-{rank}.pt" for rank in range(PROCESSES)]
    if not all(file.exists() for file in files):
        pytest.fail(f"{kind} did not end\n{(folder / 'failure.txt').read_text(encoding='utf-8')}")
    results = [torch.load(file, weights_only=True) for file in files]
    gradients, routing, after = lone(kind)
    for result in results:
        for ours, expected in zip(result["gradients"], gradients, strict=True):
            assert ours.keys() == expected.keys() and len(ours) == 2 * (3 + 3 + (2 if "parts" in kind else 3))
            for name in expected:
                close(ours[name], expected[name])
    first, second = (result["routing"] for result in results)  # each process records its own samples
    assert first.keys() == second.keys() == routing.keys()
    for name, weights in routing.items():
        close(torch.cat((first[name], second[name])), weights)
    saved = load_file(folder / kind / "adapter_model.safetensors")
    expected = {name.replace(".default", ""): value for name, value in after.items() if "ilora_" in name}
    assert saved.keys() == expected.keys()
    for name, value in expected.items():
        close(saved[name], value)
    loaded = PeftModel.from_pretrained(base_model(), folder / kind).state_dict()
    assert all(torch.equal(loaded[name.replace(".weight", ".default.weight")], value) for name, value in saved.items())
    if kind.startswith("fsdp2"):
        assert "Error" in results[0]["shards"], "shards are not an adapter"
        assert not (folder / f"shards of {kind}/adapter_model.safetensors").exists()


# ---- ZeRO-3


def partition(model):
    """Empty every weight, and fill it by hooks for the forward pass of its own module -> name -> whole weight."""
    whole = {}

    def hooks(module, own):
        def gather(module, args):
            for name, p in own.items():
                p.data = whole[name]

        def release(module, args, out):
            for p in own.values():
                p.data = torch.empty(0, dtype=p.dtype)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(None, None, None)

    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}": p for name, p in module.named_parameters(recurse=False)}
        whole |= {name: p.data for name, p in own.items()}
        if own:
            hooks(module, own)
    return whole


@pytest.mark.parametrize("grad", [True, False])
def test_weights_are_used_in_their_own_modules_alone(grad):
    model = adapted()
    with torch.no_grad():
        expected = model(input_ids=TOKENS).logits
    whole = partition(model)
    assert not any(p.numel() for p in model.parameters())
    with torch.set_grad_enabled(grad):
        result = model(input_ids=TOKENS, labels=TOKENS)
    close(result.logits, expected)
    if grad:
        for name, p in model.named_parameters():
            p.data = whole[name]  # ZeRO-3 does this module by module
        result.loss.backward()
        for name, gradient in plain_gradients(model).items():
            close(gradient, lone("ddp")[0][0][name])


def test_a_partitioned_model_saves_what_was_gathered_and_nothing_less(tmp_path):
    from torch.testing._internal.distributed.fake_pg import FakeStore  # its import also registers the backend

    model = adapted()
    expected = {name: value.clone() for name, value in model.state_dict().items()}
    whole = partition(model)
    with refuses(r"Cannot save adapter 'default': .*q_proj.ilora_A.* has shape \[0\].*Gather by"):
        model.save_pretrained(tmp_path / "parts")
    model.save_pretrained(tmp_path / "whole", state_dict=whole)
    assert equal(PeftModel.from_pretrained(base_model(), tmp_path / "whole").state_dict(), expected)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)  # not the main process
    try:
        model.save_pretrained(tmp_path / "no", state_dict={}, is_main_process=False)
        with refuses("Cannot save adapter 'default': .* give it as `state_dict` on the main one"):
            model.save_pretrained(tmp_path / "no", state_dict=None, is_main_process=False)
    finally:
        dist.destroy_process_group()
    assert not list((tmp_path / "no").glob("*"))


def test_parts_inside_wrappers_keep_their_names():
    model = adapted()
    names = sorted(model.base_model.targeted_module_names)
    layers = model.base_model.model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    assert "_checkpoint_wrapped_module" in "".join(name for name, _ in model.named_modules())
    with record_routing(model) as routing:
        model(input_ids=TOKENS)
    assert sorted(routing) == names
