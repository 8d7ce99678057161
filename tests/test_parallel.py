"""Several processes train as one: the same gradient, losses, weights and files.

When one of them is gone, the others end, and all is saved.
"""
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from processes import Launcher, lines, newest, own_images, tiny, until
from test_text_to_image import saved_autoencoder

from ddpm_tutorial.parallel import own_rows
from ddpm_tutorial.run.checkpoint import load_latest
from ddpm_tutorial.run.tracking import read_metrics

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="forks, /proc and gloo")

@pytest.fixture(scope="module")
def launcher(tmp_path_factory):
    with Launcher(tmp_path_factory.mktemp("processes")) as launcher: yield launcher

@pytest.fixture(scope="module")
def data(tmp_path_factory):
    "20 images to train on: batches of 8, 8 and 4."
    return own_images(tmp_path_factory.mktemp("data")/"own.npz", 22)

@pytest.fixture(scope="module")
def alone(launcher, data, tmp_path_factory):
    "A run in one process."
    folder = tmp_path_factory.mktemp("runs")/"alone"
    assert launcher.run(tiny(data, folder, "--epochs", 2)) == (0, "")
    return folder

def start_together(launcher, size, args, before=("",)*9):
    "Starts several processes and tells each who it is, like torchrun, but without the seconds that it takes."
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": str(port)}
    def who(rank): return {**common, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    return [launcher.start(args, f"os.environ.update({who(rank)})\n" + before[rank]) for rank in range(size)]

def run_together(launcher, size, args, before=("",)*9):
    processes = start_together(launcher, size, args, before)
    assert [process.wait() for process in processes] == [0]*size, [process.err for process in processes]

def files(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}

def assert_close(folder, other):
    "The same losses and weights up to rounding, and the same files."
    one, two = newest(folder), newest(other)
    assert one["step"] == two["step"] and files(folder) == files(other)
    for part in ("model", "ema"): torch.testing.assert_close(one[part], two[part], rtol=0, atol=1e-4)
    assert [line["step"] for line in lines(folder)] == [line["step"] for line in lines(other)]
    for a, b in zip(lines(folder), lines(other)):
        for name in ("loss", "epoch_loss", "validation_loss"):
            assert a.get(name, 0) == pytest.approx(b.get(name, 0), rel=1e-5)

@pytest.mark.parametrize("size", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 5, 8, 9])
def test_every_row_is_somebodys(rows, size):
    "Each process has the same number of rows, and together they take all rows, in order."
    shares = [own_rows(rows, rank, size) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    assert torch.cat(shares)[:rows].tolist() == list(range(rows))

GRADIENTS = """
import torch, torch.distributed as dist
from ddpm_tutorial.parallel import SharedBatch
def gradient(model, network, x, t, labels, several=False):
    network.zero_grad()
    target = torch.linspace(-1, 1, x.numel(), dtype=torch.float64).view(x.shape)
    if several:
        answer, inner = model(x, t, labels=labels, several=True)
        ((answer - target).square().mean() + inner.pow(3).mean()).backward()
    else: (model(x, t, labels=labels) - target).square().mean().backward()
    return torch.cat([p.grad.flatten() for p in network.parameters()])
class Network(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.out = torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.Conv2d(4, 1, 3, padding=1)
        self.embedding = torch.nn.Embedding(11, 4)
    def forward(self, x, t, labels, with_variance=False, several=False): # a flag isn't shared out
        shift = self.embedding(labels)[:, :, None, None]*t[:, None, None, None]
        first, second = (self.conv(x) + shift).sin().chunk(2, dim=1)
        h = self.out(torch.cat([first, second], dim=1))
        if several: return h, first # an answer that is used inside as well
        return torch.cat([h, h*h], dim=1) if with_variance else h
def compare(rank, size):
    torch.manual_seed(0)
    network, worst = Network().double(), 0.
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    shared = SharedBatch(network)
    for rows in (1, 2, 5, 8):
        x, t = torch.randn(rows, 1, 6, 6, dtype=torch.float64), torch.randn(rows, dtype=torch.float64)
        batch = x, t, torch.arange(rows)
        for several in (False, True):
            whole, together = (gradient(model, network, *batch, several) for model in (network, shared))
            worst = max(worst, ((whole - together).abs().max()/whole.abs().max()).item())
        with torch.no_grad(): one, several = network(*batch), shared(*batch[:2], labels=batch[2])
        assert torch.allclose(one, several, rtol=0, atol=1e-14)
        with torch.no_grad(): both = shared(*batch[:2], labels=batch[2], with_variance=True)
        assert torch.allclose(both, torch.cat([one, one*one], dim=1), rtol=0, atol=1e-14)
    (folder/f"worst_{rank}").write_text(str(worst))
    dist.destroy_process_group()
    os._exit(0)
size = int(request["args"][1])
children = []
for rank in range(size):
    if child := os.fork(): children.append(child)
    else: compare(rank, size)
os._exit(sum(os.waitpid(child, 0)[1] != 0 for child in children))
"""

@pytest.mark.parametrize("size", [2, 3])
def test_the_gradient_is_that_of_the_whole_batch(launcher, size):
    "In float64 to 1e-12, in every process, for any number of rows."
    process = launcher.start([size], GRADIENTS)
    assert process.wait() == 0, process.err
    assert all(float((process.folder/f"worst_{rank}").read_text()) < 1e-12 for rank in range(size))

@pytest.mark.parametrize("size", [2, 3])
def test_several_are_one(launcher, data, alone, tmp_path, size):
    """Losses, weights and files are those of one process.

    (3 does not divide 8, and the last batch has 4 images.)
    """
    run_together(launcher, size, tiny(data, tmp_path/"run", "--epochs", 2))
    assert_close(tmp_path/"run", alone)
    assert [line["processes"] for line in read_metrics(tmp_path/"run") if "started" in line] == [size]

@pytest.mark.parametrize("size, parts", [(2, 3), (3, 2)])
def test_several_compute_a_batch_in_parts(launcher, data, alone, tmp_path, size, parts):
    "Each part is shared out among the processes, and the run is still that of one process in one part."
    run_together(launcher, size, tiny(data, tmp_path/"run", "--epochs", 2, "--accumulate", parts))
    assert_close(tmp_path/"run", alone)

@pytest.mark.parametrize("first, then", [(2, 1), (1, 2)])
def test_the_number_of_processes_may_change(launcher, data, alone, tmp_path, first, then):
    "One process continues the run of two, and the other way round."
    args = tiny(data, tmp_path/"run", "--epochs", 2)
    step_4_is_not_taken = ["pause(training, 'drop_conditions', 4, hold=lambda: os._exit(9))"]*2
    if first > 1: start = start_together(launcher, first, args, step_4_is_not_taken)
    else: start = [launcher.start(args, step_4_is_not_taken[0])]
    assert [process.wait() for process in start] == [9]*first and newest(tmp_path/"run")["step"] == 3
    if then > 1: run_together(launcher, then, [*args, "--resume"])
    else: assert launcher.run([*args, "--resume"]) == (0, "")
    assert_close(tmp_path/"run", alone)

def test_the_graph_in_wandb(launcher, data, tmp_path):
    "Two processes make one W&B run, with the graph of the bare network in it."
    args = [arg for arg in tiny(data, tmp_path/"run", "--max_steps", 2) if arg != "--no-wandb"]
    offline = f"os.environ.update(WANDB_MODE='offline', HOME={str(tmp_path)!r})"
    run_together(launcher, 2, args, [offline]*2)
    runs = list((tmp_path/"run"/"wandb").glob("offline-run-*"))
    assert len(runs) == 1
    graph, = runs[0].rglob("*.graph.json")
    nodes = json.loads(graph.read_text())["nodes"]
    assert {"time_embedding", "conv_in", "conv_out"} <= {node["name"] for node in nodes}

def test_a_refusal_ends_all(launcher, data, alone):
    "The first process finds that the folder holds a run. The others do not wait for ever."
    before = files(alone)
    processes = start_together(launcher, 2, tiny(data, alone, "--epochs", 2))
    codes = [process.wait() for process in processes]
    assert codes[0] == 2 and "already holds a run" in processes[0].err and codes[1] in (1, 2), codes
    assert all("Traceback" not in process.err for process in processes) and files(alone) == before

@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_is_killed(launcher, data, tmp_path, lost):
    """There is no torchrun here that would end the other process. It ends by itself and says what to do.

    A leader that is left has saved the last step.
    """
    hold = "pause(training, 'drop_conditions', 6)" # step 6 begins
    processes = start_together(launcher, 2, tiny(data, tmp_path/"run", "--epochs", 2), [hold]*2)
    for process in processes: process.waits()
    os.kill(processes[lost].pid, signal.SIGKILL)
    for process in processes: process.go()
    left = processes[1 - lost]
    assert left.wait() == 1 and "another process of this run is gone" in left.err, left.err
    assert "continue with --resume" in left.err and "Traceback" not in left.err, left.err
    assert newest(tmp_path/"run")["step"] == (5 if lost else 4) # 4 was saved in passing
    resumed = launcher.run(tiny(data, tmp_path/"run", "--epochs", 2, "--resume"))
    assert resumed == (0, "") and newest(tmp_path/"run")["step"] == 6

def test_a_signal_while_the_leader_saves_because_of_a_lost_process(launcher, data, tmp_path):
    "torchrun sends a signal a moment after the loss. It does not cut the save short."
    hold = "pause(training, 'drop_conditions', 6)"
    # the fourth save, after those of steps 2, 3 and 4
    tell_and_wait = "lambda: ((folder/'saves').touch(), until_saves_may_go_on())"
    in_the_save = f"pause(checkpoint.torch, 'save', 4, {tell_and_wait})"
    before = [WAIT_TWICE + hold + "\n" + in_the_save, hold]
    leader, other = start_together(launcher, 2, tiny(data, tmp_path/"run", "--epochs", 2), before)
    for process in (leader, other): process.waits()
    os.kill(other.pid, signal.SIGKILL)
    leader.go()
    until((leader.folder/"saves").exists)
    os.kill(leader.pid, signal.SIGTERM)
    (leader.folder/"go on").touch()
    assert leader.wait(10) in (1, 143), leader.err
    assert "continue with --resume" in leader.err and "Traceback" not in leader.err, leader.err
    assert newest(tmp_path/"run")["step"] == 5

WAIT_TWICE = """
import time
def until_saves_may_go_on():
    while not (folder/"go on").exists(): time.sleep(0.01)
"""

def torchrun(data, folder):
    """The real torchrun, for a long run, as the leader of its own process group.

    It has already taken some steps.
    """
    args = ["--epochs", 100_000, "--save_every", 1000, "--sample_every", 1000]
    command = ["torch.distributed.run", "--standalone", "--nproc_per_node", 2,
               "-m", "ddpm_tutorial.run.train", *tiny(data, folder, *args)]
    process = subprocess.Popen([sys.executable, "-m", *map(str, command)], stdout=subprocess.DEVNULL,
                               stderr=subprocess.PIPE, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"},
                               start_new_session=True)
    def at_work():
        if process.poll() is not None: return True
        return (folder/"metrics.jsonl").exists() and steps(folder) > 10
    try: until(at_work, 120)
    except AssertionError:
        for pid in workers(process): os.kill(pid, signal.SIGKILL)
        process.kill()
        raise
    assert process.poll() is None, process.communicate()
    return process

def workers(process):
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]

def steps(folder): return max((line["step"] for line in read_metrics(folder)), default=0)

def ended(process, children):
    "Exit code and stderr. The process must end within a minute and leave none of its children."
    try: err = process.communicate(timeout=60)[1]
    finally: left = [pid for pid in children if Path(f"/proc/{pid}").exists()]
    for pid in left: os.kill(pid, signal.SIGKILL)
    assert not left
    return process.returncode, err

@pytest.mark.parametrize("rank", ["0", "1"])
def test_torchrun_and_a_process_that_is_killed(data, tmp_path, rank):
    "All processes end within a minute. The checkpoint is whole, and a message says how to go on."
    process = torchrun(data, tmp_path/"run")
    children = workers(process)
    victim, = (pid for pid in children if f"\0RANK={rank}\0" in Path(f"/proc/{pid}/environ").read_text())
    logged = steps(tmp_path/"run")
    os.kill(victim, signal.SIGKILL)
    code, err = ended(process, children)
    assert code and "continue with --resume" in err, err
    saved = load_latest(tmp_path/"run"/"checkpoints")[1]["step"]
    # the leader saves at the end of each epoch of 3 steps
    assert saved >= (logged if rank == "1" else logged//3*3 - 3)

@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_torchrun_and_a_signal_to_the_group(data, tmp_path, number):
    "As from a terminal: all get it, and torchrun passes it on again. The run saves and ends within 10 s."
    process = torchrun(data, tmp_path/"run")
    logged, sent, children = steps(tmp_path/"run"), time.monotonic(), workers(process)
    os.killpg(process.pid, number)
    code, err = ended(process, children)
    assert code and time.monotonic() - sent < 10 and "stopped and saved after step" in err, err
    assert load_latest(tmp_path/"run"/"checkpoints")[1]["step"] >= logged
    assert not list((tmp_path/"run").rglob("*.partial"))

def assert_two_are_one(launcher, folder, *args):
    "Six steps in one process and in two: the same losses and weights, in `alone` and `together`."
    args = [*args, "--batch_size", 8, "--max_steps", 6, "--warmup_steps", 0, "--device", "cpu", "--precision",
            "fp32", "--no-wandb", "--log_every", 1, "--output_dir"]
    assert launcher.run([*args, folder/"alone"]) == (0, "")
    run_together(launcher, 2, [*args, folder/"together"])
    assert_close(folder/"alone", folder/"together")

def test_an_autoencoder_in_two_processes(launcher, data, tmp_path):
    "Its network answers with three tensors. All of them are gathered, with their gradients."
    assert_two_are_one(launcher, tmp_path, "--config", "emoji_autoencoder", "--data", data, "--resize", 28,
                       "--base_channels", 8, "--num_groups", 2)
    norms = [[line["grad_norm"] for line in lines(tmp_path/name) if "grad_norm" in line]
             for name in ("alone", "together")]
    assert len(norms[0]) == 6 and norms[0] == pytest.approx(norms[1], rel=1e-3)

def test_text_on_latents_in_two_processes(launcher, tmp_path):
    "Words, their vectors and the latents are shared out like images and labels."
    codec = saved_autoencoder(tmp_path/"codec.safetensors")
    folder = tmp_path/"captioned"
    folder.mkdir()
    for i in range(22): Image.effect_noise((32, 32), 60).convert("RGB").save(folder/f"{i}.png")
    told = [{"file_name": f"{i}.png", "text": ("red dog", "black cat", "heart")[i % 3]} for i in range(22)]
    (folder/"metadata.jsonl").write_text("\n".join(map(json.dumps, told)))
    assert_two_are_one(launcher, tmp_path, "--config", "emoji", "--data", folder, "--resize", 32,
                       "--autoencoder", codec, "--base_channels", 8, "--channel_multipliers", 1, 1,
                       "--head_dim", 8, "--num_groups", 2, "--attention_resolutions", "--text_width", 32,
                       "--text_layers", 1, "--num_inference_steps", 2)
