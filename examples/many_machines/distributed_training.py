"""
Many machines: DistributedDataParallel and FSDP2
================================================

The character model of ``examples/char_lm.py`` is trained by one process, by two with DistributedDataParallel (each has the
whole model), and by two with FSDP2 (each has half of every parameter). Both pairs write a checkpoint half way, forget all
that they know, and resume. The losses are always the same. Nothing here would be different with torch.nn's layers.

The page starts its processes itself. On machines with GPUs, ``torchrun --nproc-per-node 8 -m
examples.many_machines.distributed_training --strategy fsdp2 --device cuda`` starts them. The text is the Python
language reference, which ships with CPython (PSF licence).
"""

# sphinx_gallery_thumbnail_path = "results/distributed_training.png"
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoint
from matplotlib import pyplot as plt
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import fastrnn
from examples.char_lm import CharModel, read_text
from examples.counts import Counts
from examples.page import ROOT, Page

page = Page(__file__, __doc__, strategy="compare")
if page.extra["strategy"] not in ("compare", "ddp", "fsdp2"):
    raise ValueError(f"--strategy: expected one of compare, ddp, fsdp2, got {page.extra['strategy']!r}")
STEPS, BATCH, LENGTH, HIDDEN = page.pick((200, 32, 64, 192), (6, 8, 16, 32))
text = read_text()
alphabet = sorted(set(text))
data = torch.tensor([alphabet.index(letter) for letter in text], device=page.device)
held_out = len(data) // 20

# %%
# Every process makes the same model and draws the same batches, of which it takes its own share.


def build(strategy: str) -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model that all processes can train together."""
    torch.manual_seed(page.seed)
    model: nn.Module = CharModel(fastrnn, "lstm", len(alphabet), HIDDEN, layers=2).to(page.device)
    if strategy == "ddp":
        model = DistributedDataParallel(model)
    elif strategy == "fsdp2":
        for part in (*model.children(), model):
            fully_shard(part)
    return model, torch.optim.Adam(model.parameters(), lr=3e-3)


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    """Mean nats per character of [rows, LENGTH + 1] characters."""
    logits, _ = model(batch[:, :-1])
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: Sequence[Tensor]) -> list[float]:
    """Take a step for each batch; the losses of the whole batches, before each step."""
    losses = []
    for batch in batches:
        optimizer.zero_grad()
        loss = loss_of(model, batch[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else batch)
        loss.backward()
        optimizer.step()
        if dist.is_initialized():
            dist.all_reduce(loss.detach())
        losses.append(loss.item() / (dist.get_world_size() if dist.is_initialized() else 1))
    return losses


def draw(count: int) -> list[Tensor]:
    """Batches of pieces of the text, the same in every process."""
    chance = torch.Generator().manual_seed(page.seed)
    starts = torch.randint(len(data) - held_out - LENGTH - 1, (count, BATCH, 1), generator=chance)
    return list(data[(starts + torch.arange(LENGTH + 1)).to(page.device)])


# %%
# Checkpoints are written and read by all processes together, each its own part.


def work(strategy: str) -> None:
    """Train, with a break half way. The first process writes down the losses."""
    dist.init_process_group("nccl" if page.device.type == "cuda" else "gloo")
    batches, saved = draw(STEPS), page.output / f"checkpoint-{strategy}"
    model, optimizer = build(strategy)
    losses = train(model, optimizer, batches[: STEPS // 2])
    parts = get_state_dict(model, optimizer)
    checkpoint.save({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=saved)

    model, optimizer = build(strategy)  # as if the machines had been switched off
    parts = get_state_dict(model, optimizer)
    checkpoint.load({"model": parts[0], "optimizer": parts[1]}, checkpoint_id=saved)
    set_state_dict(model, optimizer, model_state_dict=parts[0], optim_state_dict=parts[1])
    losses += train(model, optimizer, batches[STEPS // 2 :])
    if dist.get_rank() == 0:
        (page.output / f"{strategy}.json").write_text(json.dumps(losses))
    dist.destroy_process_group()


def launch(strategy: str, folder: str) -> list[float]:
    """The losses of two processes."""
    torchrun = f"{sys.executable} -m torch.distributed.run --standalone --nproc-per-node 2 -m"
    flags = f"--strategy {strategy} --output {folder} --seed {page.seed} --device {page.device} {page.pick('', '--quick')}"
    command = f"{torchrun} examples.many_machines.distributed_training {flags}".split()
    subprocess.run(command, check=True, cwd=ROOT, stderr=subprocess.DEVNULL)
    return json.loads(Path(folder, f"{strategy}.json").read_text())


if page.extra["strategy"] != "compare":
    work(page.extra["strategy"])
    os._exit(0)  # at an ordinary end, threads of torch that still run abort the process now and then

model, optimizer = build("one")
page.race(model, lambda *arguments: statistics.mean(train(*arguments)), draw(STEPS))
runs = {"one process": train(model, optimizer, draw(STEPS))}
with tempfile.TemporaryDirectory() as folder:
    for strategy in page.progress(["ddp", "fsdp2"]):
        runs[f"two, {strategy}"] = launch(strategy, folder)

figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
for (name, losses), style in zip(runs.items(), ["-", "--", ":"]):
    apart = max(abs(a - b) for a, b in zip(losses, runs["one process"]))
    print(f"{name}: loss {losses[0]:.4f} to {losses[-1]:.4f}, at most {apart:.0e} away from one process")
    axes.plot(losses, style, linewidth=2, label=name)
    if apart > 1e-3:
        raise RuntimeError(f"{name}: expected the losses of one process, got {apart} more or less")
axes.axvline(STEPS // 2, color="grey", linestyle="--", label="checkpoint, resume")
axes.set(xlabel="step", ylabel="nats per character", title="The same training, spread over processes")
axes.legend()
page.save(figure)

with torch.no_grad():
    tested = loss_of(model, data[-held_out:][: held_out // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)).item()
pairs = statistics.mean(Counts([text[:-held_out]], width=1).bits(text[-held_out:])) * math.log(2)
page.result("nats per character", tested, {"counts of pairs": pairs}, lower=True)
