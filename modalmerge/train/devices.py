"""On which devices a model is trained or measured: several processes, one on each, that all run the same command."""

import contextlib
import functools
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, ParamSpec, TypeVar

import torch
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from torch import distributed

from modalmerge import ranks
from modalmerge.registry import find

# name -> what each process holds
STRATEGIES = {
    "auto": "the whole model",
    "ddp": "the whole model",
    "fsdp": "a part of every parameter, of its gradient and of the optimiser's state",
}
P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Devices:
    """How many processes there are, one on each device; it changes numbers by rounding only, and a run may go on.

    Args:
        devices: of each machine, at least 1.
        nodes: machines, at least 1.
        strategy: how processes share a model that is trained, a key of `STRATEGIES`; `fsdp` needs several.
    """

    devices: int = 1
    nodes: int = 1
    strategy: str = "auto"

    def __post_init__(self) -> None:
        for name in ("devices", "nodes"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        find(STRATEGIES, self.strategy, "strategy")
        if self.strategy == "fsdp" and self.num_processes == 1:
            raise ValueError("--strategy fsdp shares a model between processes; give --devices 2 or more")

    @property
    def num_processes(self) -> int:
        return self.devices * self.nodes

    def check_batch(self, samples_at_once: int) -> None:
        """Refuse a batch of all processes that has no equal parts for them, before any of them is started.

        Raises:
            ValueError: as `ranks.equal_part`.
        """
        ranks.equal_part(samples_at_once, self.num_processes)


ALONE = Devices()
FOLDER = "MODALMERGE_FOLDER"  # variable: folder of the command that started this process, which ends when that is gone

# -- what started this process ------------------------------------------------------------------------------


def cluster_environment() -> ClusterEnvironment | None:
    """Read what torchrun, or a step of SLURM, says of this process; None where it was started plainly.

    Raises:
        ValueError: a step of SLURM does not say how many tasks each of its nodes has.
    """
    if TorchElasticEnvironment.detect():
        return TorchElasticEnvironment()
    # only srun makes steps: a batch script itself is one process, whatever it asked for
    if "SLURM_STEP_ID" in os.environ and SLURMEnvironment.detect():
        try:
            return SLURMEnvironment(auto_requeue=False)  # which would write a checkpoint of its own
        except RuntimeError as error:
            raise ValueError(f"in the SLURM step: {error}") from error
    return None


def chosen_devices(devices: int | None, nodes: int | None, strategy: str) -> Devices:
    """Return the devices that are asked for; what is None is as torchrun or SLURM says, else 1.

    Raises:
        ValueError: what is asked for contradicts torchrun or SLURM, something else has started several processes, or
            as `Devices`.
    """
    environment = cluster_environment()
    if environment is None:
        size = os.environ.get("WORLD_SIZE", "1")
        if size != "1":  # each process would train alone, and Lightning reads some of these variables
            raise ValueError(
                f"WORLD_SIZE is {size}, but neither torchrun nor a SLURM step has started this process; start the "
                f"command by torchrun, or by srun, or unset WORLD_SIZE and RANK"
            )
        return Devices(
            devices=1 if devices is None else devices, nodes=1 if nodes is None else nodes, strategy=strategy
        )
    num_processes = environment.world_size()
    if isinstance(environment, SLURMEnvironment):
        starter, found_nodes = "the SLURM step", int(os.environ["SLURM_NNODES"])
    else:
        starter, found_nodes = "torchrun", num_processes // int(os.environ["LOCAL_WORLD_SIZE"])
    found = {"devices": num_processes // found_nodes, "nodes": found_nodes}
    for name, wanted in (("devices", devices), ("nodes", nodes)):
        if wanted not in (None, found[name]):
            raise ValueError(
                f"--{name} is {wanted}, and {starter} has {found['devices']} processes on each of {found['nodes']} "
                f"nodes; leave out --{name}, or change what {starter} starts"
            )
    return Devices(**found, strategy=strategy)


# -- the group of processes ---------------------------------------------------------------------------------


@contextlib.contextmanager
def joined(devices: Devices) -> Iterator[None]:
    """Be one of the processes that torchrun or SLURM started, which can tell each other things inside `with`.

    Tensors travel by NCCL between GPUs and by gloo between CPUs. Nothing happens where there is one process.

    Raises:
        ValueError: this process has no GPU of its own where there are GPUs.
    """
    environment = cluster_environment()
    if environment is None or devices.num_processes == 1:
        yield
        return
    if torch.cuda.is_available():
        check_gpus(devices)
        torch.cuda.set_device(environment.local_rank())
    if TorchElasticEnvironment.detect():
        _end_with_parent()
    os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"] = environment.main_address, str(environment.main_port)
    distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo",
        rank=environment.global_rank(),
        world_size=environment.world_size(),
    )
    yield
    # Not after an error: the others would see a closed connection, and tell of that, before ours has been told.
    distributed.destroy_process_group()


def check_gpus(devices: Devices) -> None:
    """Refuse more processes than there are GPUs, if there are any.

    Raises:
        ValueError: there are too few.
    """
    there = torch.cuda.device_count()
    if 0 < there < devices.devices:
        raise ValueError(
            f"--devices {devices.devices}: this machine has {there} GPUs, and each process needs one of its own; give "
            f"--devices {there}, or hide them with CUDA_VISIBLE_DEVICES='' to use the CPU"
        )


def _end_with_parent() -> None:
    """End this process when its parent is gone: it would go on writing beside the same command, given again."""
    parent, folder = os.getppid(), os.environ.get(FOLDER)

    def watch() -> None:
        while os.getppid() == parent and (folder is None or os.path.isdir(folder)):
            time.sleep(0.5)
        if folder is not None:  # a parent that was killed has left it
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def on_first(make: Callable[P, T]) -> Callable[P, T]:
    """Let a function run in the first process alone: in all of them it returns what it returns or raises there.

    It must be called by all processes, and must not call another such function.
    """

    @functools.wraps(make)
    def run(*arguments: P.args, **named: P.kwargs) -> T:
        if not ranks.is_distributed():
            return make(*arguments, **named)
        told: list[Any] = [None, None]
        if ranks.is_first():
            try:
                told[0] = make(*arguments, **named)
            except Exception as error:  # whatever it is: the others wait
                told[1] = error
        distributed.broadcast_object_list(told, 0)
        if told[1] is not None:
            raise told[1]
        return told[0]

    return run
