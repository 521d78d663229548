"""Cells on several processes: the same losses, the same adapter after a kill, and settings that cannot be."""

import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch
from accelerate.commands import launch as accelerate_launch
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env
from safetensors.torch import load_file

from crab.core.files import read_json, write_json
from crab.samples.shards import Shards, write_shard
from crab.study import launch as module
from crab.study.answer import WEIGHTS
from crab.study.hardware import Hardware
from crab.study.launch import LOG, command, write_job
from crab.study.ledger import cost_table, sample_scores
from crab.study.loop import WHOLE
from crab.study.train import RECORD

TWO = Hardware(workers=1, processes=2)
SPREAD = Path(__file__).with_name("spread_on_cpu.py")


def weights(store, cell):
    return load_file(store.adapter(cell) / WEIGHTS)


@pytest.mark.slow
def test_two_processes_do_what_one_does(store, cell, tmp_path):
    """32 samples in batches of 8, five passes: 20 steps. Answers and scores are the same, too."""
    results = {}
    for name, hardware in (("one", store.hardware), ("parts", Hardware(workers=1, accumulate=2)), ("two", TWO)):
        here = replace(store, hardware=hardware, cells=tmp_path / name, ledger=tmp_path / f"{name}.xz")
        (keyed,) = here.run([cell("joint-ilora-bare", "ilora", passes=5)], "test", need="adapter")
        losses = cost_table(here.ledger, [keyed])["loss"][0]
        results[name] = (losses, weights(here, keyed), sample_scores(here.ledger, [keyed])["score"].tolist())
    for name in ("parts", "two"):
        for step, loss in results["one"][0]:
            assert dict(results[name][0])[step] == pytest.approx(loss, abs=1e-5)
        for key, tensor in results["one"][1].items():
            torch.testing.assert_close(results[name][1][key], tensor, atol=1e-4, rtol=1e-3)
        assert results[name][2] == results["one"][2]


@pytest.fixture
def as_gpus(monkeypatch):
    """Processes of a launch run on CPUs what an Accelerate configuration that comes with the package asks for."""

    def settings(store):
        parser = accelerate_launch.launch_command_parser()
        values = [
            "--config_file",
            str(store.hardware.configuration()),
            "--num_processes",
            "2",
            "--mixed_precision",
            "no",
        ]
        args, entries, _ = accelerate_launch._validate_launch_command(parser.parse_args([*values, str(SPREAD)]))
        args.deepspeed_fields_from_accelerate_config = ",".join(entries.deepspeed_config)
        prepare = prepare_deepspeed_cmd_env if args.use_deepspeed else lambda args: (None, prepare_multi_gpu_env(args))
        changed = {key: value for key, value in prepare(args)[1].items() if os.environ.get(key) != value}
        return {**changed, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}

    start = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(SPREAD)]
    monkeypatch.setattr(module, "command", lambda store, job: [*start, str(job)])
    monkeypatch.setattr(module, "environment", settings)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp", "zero2", "zero3"])
def test_spread_weights_do_what_one_process_does(name, store, cell, tmp_path, as_gpus, monkeypatch):
    """The configurations of the package, by two processes: the same losses, an adapter that loads, the same answers.

    Stopped after the second of five passes, the same command goes on to the same adapter.
    """
    if name != "fsdp":
        pytest.importorskip("deepspeed")
    results = {}
    for hardware in (store.hardware, replace(TWO, accelerate=name)):
        here = replace(store, hardware=hardware, cells=tmp_path / str(hardware.processes))
        here = replace(here, ledger=tmp_path / f"{hardware.processes}.xz")
        (keyed,) = here.run([cell("joint-ilora-bare", "ilora", passes=5)], "test", need="answers")
        losses = dict(cost_table(here.ledger, [keyed])["loss"][0])
        answers = {slot: here.answers(keyed, slot) for slot in keyed.slots}
        results[hardware.processes] = (losses, weights(here, keyed), answers)
    kind = "FSDP" if name == "fsdp" else "DEEPSPEED"
    assert f"trained by DistributedType.{kind}" in (here.folder(keyed) / LOG).read_text(encoding="utf-8")
    (losses, tensors, answers), (ours, spread, same) = results[1], results[2]
    assert len(losses) == 20 and ours == pytest.approx(losses, abs=1e-5) and same == answers
    for key, tensor in tensors.items():
        torch.testing.assert_close(spread[key], tensor, atol=1e-4, rtol=1e-3)
    stopped = replace(here, cells=tmp_path / "stopped", ledger=tmp_path / "stopped.xz")
    monkeypatch.setenv("STOP_AT", "8")
    with pytest.raises(RuntimeError, match="joint-ilora-bare: its processes failed"):
        stopped.run([keyed], "test")
    monkeypatch.delenv("STOP_AT")
    stopped.run([keyed], "test")
    resumed = weights(stopped, keyed)
    assert read_json(stopped.adapter(keyed) / RECORD)["resumed_from"] == 8
    assert all(torch.equal(resumed[key], tensor) for key, tensor in spread.items())


COMMAND = """
import sys
from crab.study.launch import read_job
store, cell = read_job(sys.argv[1])
store.run([cell], "killed", need="answers")
"""
#: Whom to kill, when, and how many seconds later.
KILLS = [
    ("rank 0", "writing a checkpoint", 0.0), ("loader", "training", 0.0), ("launcher", "training", 0.3),
    ("parent", "answering", 0.05),
]  # fmt: skip


def running(process):
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def newest(folder):
    """Step of the last whole checkpoint of a cell."""
    return max((int(path.parent.name.rpartition("-")[2]) for path in folder.glob(f"checkpoint-*/{WHOLE}")), default=0)


def member(parent, name):
    """A process of the group, or None."""
    if name == "parent":
        return parent
    launcher = next((p for p in parent.children() if "torch.distributed.run" in p.cmdline()), None)
    ranks = launcher.children() if launcher and name != "launcher" else []
    rank = next((p for p in ranks if p.environ().get("RANK") == name[-1:]), ranks[-1] if ranks else None)
    below = rank.children(recursive=True) if rank and name == "loader" else []
    loader = next((process for process in below if process.name().startswith("pt_data")), None)
    return {"launcher": launcher, "loader": loader}.get(name, rank)


def kill(job, folder, victim, when, later):
    """Start a command that runs a cell, and kill one of its processes. None of them may be left.

    Returns whether it was done before the command ended.
    """
    before, began, victims, seen = newest(folder), time.time(), [], {}

    def writing():
        paths = [path for path in folder.glob("checkpoint-*") if not (path / WHOLE).exists()]
        return any(path.stat().st_mtime > began for path in paths)  # others are of an earlier run

    moments = {
        "training": lambda: newest(folder) > before,
        "writing a checkpoint": writing,
        "answering": (folder / "adapter" / RECORD).exists,
    }
    run = subprocess.Popen([sys.executable, "-c", COMMAND, str(job)], stderr=subprocess.DEVNULL)
    parent, due = psutil.Process(run.pid), None
    try:
        while run.poll() is None and not victims:
            time.sleep(0.005)
            try:
                seen |= {process.pid: process for process in parent.children(recursive=True)}
                due = due or (moments[when]() and time.monotonic() + later) or None
                if due and time.monotonic() >= due and (process := member(parent, victim)):
                    process.kill()
                    victims.append(process)
            except (psutil.NoSuchProcess, FileNotFoundError):
                pass
        run.wait(180)
        end = time.monotonic() + 15
        while (left := [process for process in seen.values() if running(process)]) and time.monotonic() < end:
            time.sleep(0.1)
        assert not left, f"{victim} was killed, and others went on"
    finally:
        for process in [parent, *seen.values()]:
            if running(process):
                process.kill()
    return bool(victims)


@pytest.fixture
def long(store, cell, tmp_path):
    """By name, a store and a cell that trains for 10 to 60 s, on two processes with a checkpoint every second."""

    def make(name, **fields):
        hardware = replace(TWO, loaders=1, save_minutes=0.01, **fields)
        here = replace(store, hardware=hardware, cells=tmp_path / name, ledger=tmp_path / f"{name}.xz")
        dropout = {"r": 2, "lora_alpha": 4, "num_heads": 2, "lora_dropout": 0.1}
        (keyed,) = here.keyed([cell("joint-ilora-bare", "ilora", passes=40, options=dropout)])
        return here, keyed

    return make


@pytest.mark.slow
def test_killed_it_goes_on_to_the_same_adapter(long, tmp_path):
    """Any process, at any time; the same command goes on, and loses only what came after a checkpoint."""
    whole, keyed = long("whole")
    whole.run([keyed], "test", need="answers")
    here, keyed = long("killed")
    folder, job = here.folder(keyed), tmp_path / "job.pickle"
    write_job(job, here, keyed)
    for victim, when, later in KILLS:
        before = newest(folder)
        assert kill(job, folder, victim, when, later), f"it ended before {victim} was killed, {when}"
        assert (folder / "adapter" / RECORD).exists() or newest(folder) >= before
    record = read_json(folder / "adapter" / RECORD)
    assert record["resumed_from"] >= before > 0 and record["steps"] == 160
    here.run([keyed], "test", need="answers")
    ours, expected = weights(here, keyed), weights(whole, keyed)
    assert ours.keys() == expected.keys() and all(torch.equal(ours[name], expected[name]) for name in ours)
    assert [here.answers(keyed, slot) == whole.answers(keyed, slot) for slot in keyed.slots] == [True, True]


@pytest.mark.parametrize(
    ("fields", "content", "message"),
    [
        ({"processes": 3}, {}, "shared.batch_size is 8, which does not divide by 3 processes"),
        ({"accumulate": 8}, {}, "shared.batch_size is 8, which does not divide by 2 processes with 8 parts each"),
        ({"processes": 8}, {}, "shared.hardware.processes is 8, but there are 4 GPUs"),
        ({}, {"num_processes": 4}, "num_processes: 4; set it to 2 there .shared.hardware.processes decides"),
        ({}, {"mixed_precision": "bf16"}, "mixed_precision: bf16; set it to no there .shared.precision decides"),
        ({}, {"distributed_type": "NO"}, "must have distributed_type: MULTI_GPU, DEEPSPEED or FSDP"),
        ({}, {"distributed_type": "FSDP", "fsdp_config": {}}, "fsdp_version: 1, by default; set it to 2"),
        ({}, {"fsdp_config": {"fsdp_state_dict_type": "SHARDED_STATE_DICT"}}, "set it to FULL_STATE_DICT there"),
        ({}, {"fsdp_config": {"fsdp_cpu_ram_efficient_loading": True}}, "fsdp_cpu_ram_efficient_loading: True"),
        ({}, {"deepspeed_config": {"gradient_accumulation_steps": 4}}, "set it to 1 .*shared.hardware.accumulate"),
        ({}, {"zero": {"train_micro_batch_size_per_gpu": 2}}, "train_micro_batch_size_per_gpu: 2; set it to 4"),
        ({}, {"zero": {"bf16": {"enabled": True}}}, "bf16.enabled: True, but shared.precision is fp32; set it to auto"),
    ],
)
def test_a_configuration_that_contradicts_the_parameters(tmp_path, fields, content, message):
    path, content = tmp_path / "own.yaml", {"distributed_type": "MULTI_GPU", **content}
    if zero := content.pop("zero", None):
        write_json(tmp_path / "zero.json", {"zero_optimization": {"stage": 2}, **zero})
        kind = {"distributed_type": "DEEPSPEED", "deepspeed_config_file": str(tmp_path / "zero.json")}
        content = {"distributed_type": kind.pop("distributed_type"), "deepspeed_config": kind}
    write_json(path, content)  # JSON is YAML, too
    with pytest.raises(ValueError, match=message):
        Hardware(**{"processes": 2, "accelerate": str(path), **fields}).check(8, "fp32", True, 4)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", ["ddp", "zero2", "zero3", "fsdp"])
def test_configurations_of_the_package(name, precision):
    """Accelerate reads them, they leave to params.yaml what it decides, and spread weights need cached features."""
    hardware = Hardware(processes=2, accelerate=name)
    entries = load_config_from_file(str(hardware.configuration()))
    kind = {"ddp": "MULTI_GPU", "fsdp": "FSDP"}.get(name, "DEEPSPEED")
    assert entries.distributed_type.value == kind and entries.mixed_precision is None and entries.num_processes == -1
    hardware.check(8, precision, True, 2)
    if name in ("zero3", "fsdp"):
        with pytest.raises(ValueError, match=f"encode.cache is false, and shared.hardware.accelerate is '{name}'"):
            hardware.check(8, precision, False, 2)
    else:
        hardware.check(8, precision, False, 2)
    if name != "ddp":
        with pytest.raises(ValueError, match=f"shared.hardware.accelerate is '{name}', which needs GPUs"):
            hardware.check(8, precision, True, 0)


def test_a_name_or_file_that_is_no_configuration(tmp_path):
    with pytest.raises(ValueError, match="shared.hardware.accelerate is 'zero4'; use ddp, fsdp, zero2, zero3, or the"):
        Hardware(accelerate="zero4")
    (tmp_path / "own.yaml").write_text("a: [", encoding="utf-8")
    with pytest.raises(ValueError, match="shared.hardware.accelerate: .*own.yaml cannot be read"):
        Hardware(processes=2, accelerate=str(tmp_path / "own.yaml")).check(8, "fp32", True, 2)


def damaged_shard(path, base):
    path.write_bytes(path.read_bytes()[:-5])


def shard_of_another_base(path, base):
    shards = Shards(path.parent)
    rows = [{**shards[i], "tokens": 5} for i in range(len(shards))]
    write_shard(path, rows, [], {"compatibility": "none", "base": "another"})


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("change", "message"),
    [(damaged_shard, "00000.safetensors: .*damaged"), (shard_of_another_base, "00000.safetensors: encoded by another")],
)
def test_shards_are_checked_before_training(store, cell, tmp_path, monkeypatch, split, change, message):
    shutil.copytree(store.encoded, tmp_path / "encoded")
    change(tmp_path / "encoded" / "ks" / split / "00000.safetensors", store.base)
    monkeypatch.setattr("crab.study.run.train", lambda *args, **kwargs: pytest.fail("training started"))
    with pytest.raises((ValueError, RuntimeError), match=message):
        replace(store, encoded=tmp_path / "encoded").run([cell()], "test")


def test_a_checkpoint_of_another_number_of_processes_is_told_before_work(store, cell, monkeypatch):
    monkeypatch.setattr("crab.study.store.launch", lambda *args: pytest.fail("processes were started"))
    here = replace(store, hardware=TWO)
    (keyed,) = here.keyed([cell()])
    note = {"processes": 4, "micro_batch": 2, "accelerate": "whole model"}
    write_json(here.folder(keyed) / "checkpoint-8" / WHOLE, note)
    with pytest.raises(ValueError, match="checkpoint-8: processes was 4 when this checkpoint was written, and is 2"):
        here.run([keyed], "test")


def test_the_command_for_gpus(store, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    line = " ".join(command(replace(store, hardware=replace(TWO, accelerate="zero3"), precision="bf16"), tmp_path))
    assert "zero3.yaml --num_processes 2 --mixed_precision bf16 -m crab.study.launch" in line
