"""I-LoRA over several processes: DDP and both versions of FSDP, two gloo processes on the CPU.

Every kind trains two steps, saves, loads and trains a third; a single process that sees both processes' samples must
come to the same gradients and the same saved tensors. DeepSpeed is no dependency, so ZeRO-3 itself is not run; what it
does to modules, to leave a weight empty outside its own module's forward pass, is done here by hooks.
"""

import time
import traceback
import warnings
from datetime import timedelta
from functools import cache

import pytest
import torch
import torch.distributed as dist
from peft import PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullStateDictConfig, FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.fsdp.wrap import ModuleWrapPolicy
from torch.nn.parallel import DistributedDataParallel
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from crab.ilora import ILoraConfig, record_routing

# In "layers" a decoder layer is sharded as one; in "parts" A, B and router each by itself too, as HF Trainer has it done,
# and here one router serves several modules of a layer.
KINDS = ("ddp", "fsdp2 layers", "fsdp2 parts", "fsdp1 layers", "fsdp1 parts")
PROCESSES = 2
TOKENS = torch.randint(32, (2 * PROCESSES, 6), generator=torch.Generator().manual_seed(0))
QUIET = 30  # seconds a process waits for the other before it gives up
LONGEST = 120  # seconds until all processes are ended, whatever they do


def base_model():
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(
        vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=None, eos_token_id=31, pad_token_id=0)).double()


def adapted(kind="ddp"):
    base = base_model()
    torch.manual_seed(1)
    return get_peft_model(base, ILoraConfig(
        r=3, lora_alpha=6, num_heads=3, target_modules=["q_proj", "up_proj", "down_proj"], init_weights=False,
        router_init_std=0.5, router_sharing="layer" if "parts" in kind else "module"))


def step(model, samples, gradients):
    """One step of gradient descent -> what `gradients` reads off before it is taken."""
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.5)
    optimizer.zero_grad()
    model(input_ids=samples, labels=samples).loss.backward()
    found = gradients(model)
    optimizer.step()
    return found


def plain_gradients(model):
    return {name.removeprefix("module."): p.grad.clone() for name, p in model.named_parameters() if p.requires_grad}


# ---- what the processes run

def wrapped(model, kind):
    if kind.startswith("ddp"):
        return DistributedDataParallel(model), plain_gradients
    if kind.startswith("fsdp2"):
        mesh = init_device_mesh("cpu", (PROCESSES,))
        parts = [m for m in model.modules() if all(p.requires_grad for p in m.parameters()) and list(m.parameters(recurse=False))]
        for module in (*(parts if "parts" in kind else ()), *model.base_model.model.model.layers, model):
            fully_shard(module, mesh=mesh)
        return model, lambda m: {n: p.grad.full_tensor() for n, p in m.named_parameters() if p.requires_grad}

    def summoned(m):
        with FullyShardedDataParallel.summon_full_params(m, with_grads=True):
            return {n.replace("_fsdp_wrapped_module.", ""): g for n, g in plain_gradients(m).items()}

    policy = fsdp_auto_wrap_policy(model) if "parts" in kind else ModuleWrapPolicy({Qwen2DecoderLayer})
    return FullyShardedDataParallel(model, use_orig_params=True, auto_wrap_policy=policy,
                                    device_id=torch.device("cpu")), summoned


def gathered(model, whole, kind):
    """The whole state dict, on every process, as accelerate's get_state_dict gathers it."""
    if kind.startswith("ddp"):
        return model.state_dict()
    if kind.startswith("fsdp2"):
        return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    with FullyShardedDataParallel.state_dict_type(whole, StateDictType.FULL_STATE_DICT, FullStateDictConfig()):
        return whole.state_dict()


def work(rank, folder):
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES,
                            timeout=timedelta(seconds=QUIET))
    samples = TOKENS.chunk(PROCESSES)[rank]
    for kind in KINDS:
        model = adapted(kind)
        whole, gradients = wrapped(model, kind)
        found = {"gradients": [step(whole, samples, gradients) for _ in range(2)]}
        if kind.startswith("fsdp2") and rank == 0:
            try:
                model.save_pretrained(folder / f"shards of {kind}")
            except Exception as error:
                found["shards"] = f"{type(error).__name__}: {error}"
        state = gathered(model, whole, kind)
        if rank:
            state = {}  # what a gathering to the main process alone leaves the others
        model.save_pretrained(folder / kind, state_dict=state, is_main_process=rank == 0)
        dist.barrier()
        model = PeftModel.from_pretrained(base_model(), folder / kind, is_trainable=True)
        whole, gradients = wrapped(model, kind)
        with record_routing(model) as routing:
            found["gradients"].append(step(whole, samples, gradients))
        found["routing"] = {name: weights for name, (weights,) in routing.items()}
        torch.save(found, folder / f"{kind}-{rank}.part")
        (folder / f"{kind}-{rank}.part").rename(folder / f"{kind}-{rank}.pt")
        dist.barrier()
    dist.destroy_process_group()


# ---- what is asked of them

@cache
def lone(kind):
    """One process on all samples: gradients of three steps, routing in the third, the adapter after two."""
    model = adapted(kind)
    found = [step(model, TOKENS, plain_gradients) for _ in range(2)]
    after = {name: value.clone() for name, value in model.state_dict().items()}
    with record_routing(model) as routing:
        found.append(step(model, TOKENS, plain_gradients))
    return found, {name: weights for name, (weights,) in routing.items()}, after


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the processes left what they found, and `failure.txt` if they came to an end of another kind."""
    folder = tmp_path_factory.mktemp("processes")
    processes = torch.multiprocessing.start_processes(work, (folder,), PROCESSES, join=False, start_method="spawn")
    end = time.monotonic() + LONGEST
    try:
        while not processes.join(timeout=max(0.1, end - time.monotonic())):
            if time.monotonic() > end:
                raise TimeoutError(f"the processes had not ended after {LONGEST} s")
    except Exception:
        (folder / "failure.txt").write_text(traceback.format_exc())
    finally:
        for process in processes.processes:
            process.kill()
            process.join()
    return folder


def results(folder, kind):
    files = [folder / f"{kind}-{rank}.pt" for rank in range(PROCESSES)]
    if not all(file.exists() for file in files):
        pytest.fail(f"{kind} did not come to its end\n{(folder / 'failure.txt').read_text()}")
    return [torch.load(file, weights_only=True) for file in files]


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_one_process(folder, kind):
    for found in results(folder, kind):
        for ours, wanted in zip(found["gradients"], lone(kind)[0], strict=True):
            assert ours.keys() == wanted.keys() and len(ours) == 2 * (3 + 3 + (2 if "parts" in kind else 3))
            for name in wanted:
                torch.testing.assert_close(ours[name], wanted[name], rtol=1e-9, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("kind", KINDS)
def test_saves_and_loads_whole_tensors(folder, kind):
    results(folder, kind)
    saved = load_file(folder / kind / "adapter_model.safetensors")
    wanted = {name.replace(".default", ""): value for name, value in lone(kind)[2].items() if "ilora_" in name}
    assert saved.keys() == wanted.keys()
    for name, value in wanted.items():
        torch.testing.assert_close(saved[name], value, rtol=1e-9, atol=1e-12)
    loaded = PeftModel.from_pretrained(base_model(), folder / kind).state_dict()
    assert all(torch.equal(loaded[name.replace(".weight", ".default.weight")], value) for name, value in saved.items())


@pytest.mark.parametrize("kind", KINDS)
def test_each_process_records_its_own_samples(folder, kind):
    first, second = (found["routing"] for found in results(folder, kind))
    assert first.keys() == second.keys() == lone(kind)[1].keys()
    for name, weights in lone(kind)[1].items():
        torch.testing.assert_close(torch.cat((first[name], second[name])), weights, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind.startswith("fsdp2")])
def test_shards_are_not_saved_as_an_adapter(folder, kind):
    assert "Error" in results(folder, kind)[0]["shards"]
    assert not (folder / f"shards of {kind}/adapter_model.safetensors").exists()


# ---- ZeRO-3's way with modules

def partition(model):
    """Empty every weight and have hooks fill it for its own module's forward pass -> the whole weights by name."""
    whole = {}
    for prefix, module in model.named_modules():
        own = {f"{prefix}.{name}": p for name, p in module.named_parameters(recurse=False)}
        if not own:
            continue
        whole |= {name: p.data for name, p in own.items()}

        def gather(module, args, own=own):
            for name, p in own.items():
                p.data = whole[name]

        def release(module, args, out, own=own):
            for p in own.values():
                p.data = torch.empty(0, dtype=p.dtype)

        module.register_forward_pre_hook(gather)
        module.register_forward_hook(release)
        release(None, None, None)
    return whole


@pytest.mark.parametrize("grad", [True, False])
def test_weights_are_used_in_their_own_modules_alone(grad):
    model = adapted()
    with torch.no_grad():
        wanted = model(input_ids=TOKENS).logits
    whole = partition(model)
    assert not any(p.numel() for p in model.parameters())
    with torch.set_grad_enabled(grad):
        result = model(input_ids=TOKENS, labels=TOKENS)
    torch.testing.assert_close(result.logits, wanted, rtol=1e-9, atol=1e-12)
    if grad:
        for name, p in model.named_parameters():
            p.data = whole[name]  # ZeRO-3 does this module by module
        result.loss.backward()
        for name, gradient in plain_gradients(model).items():
            torch.testing.assert_close(gradient, lone("ddp")[0][0][name], rtol=1e-9, atol=1e-12)


def test_a_partitioned_model_saves_what_was_gathered_and_nothing_less(tmp_path):
    model = adapted()
    wanted = {name: value.clone() for name, value in model.state_dict().items()}
    whole = partition(model)
    with pytest.raises(ValueError, match=r"Cannot save adapter 'default': .*q_proj.ilora_A.* has shape \[0\].*Gather on"):
        model.save_pretrained(tmp_path / "parts")
    model.save_pretrained(tmp_path / "whole", state_dict=whole)
    loaded = PeftModel.from_pretrained(base_model(), tmp_path / "whole").state_dict()
    assert all(torch.equal(loaded[name], wanted[name]) for name in wanted)


def test_a_process_that_is_not_the_main_one_saves_nothing(tmp_path):
    from torch.testing._internal.distributed.fake_pg import FakeStore  # its import also registers the backend

    model = adapted()
    partition(model)
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        gathered = None  # what accelerate's get_state_dict gives it under ZeRO-3
        model.save_pretrained(tmp_path, state_dict=gathered or {}, is_main_process=False)
        with pytest.raises(ValueError, match="Cannot save adapter 'default': .*on the main one alone, giving it as `state_dict`"):
            model.save_pretrained(tmp_path, state_dict=gathered, is_main_process=False)
    finally:
        dist.destroy_process_group()
    assert not list(tmp_path.iterdir())


def test_parts_hidden_in_wrappers_keep_their_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    model = adapted()
    names = sorted(model.base_model.targeted_module_names)
    layers = model.base_model.model.model.layers
    for i, layer in enumerate(layers):
        layers[i] = checkpoint_wrapper(layer)
    assert isinstance(layers[0], nn.Module) and "_checkpoint_wrapped_module" in "".join(n for n, _ in model.named_modules())
    with record_routing(model) as routing:
        model(input_ids=TOKENS)
    assert sorted(routing) == names
