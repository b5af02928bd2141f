"""A model in parts: of every parameter, its gradient and the optimiser's state each process holds its share."""

import copy
from typing import Any

from lightning.pytorch.strategies import ModelParallelStrategy
from torch import distributed, nn
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor

from modalmerge import ranks
from modalmerge.model.layer import Layer
from modalmerge.train.module import TrainingModule


class ShardedModule(TrainingModule):
    """Steps of a model whose layers are gathered one by one as they run, and what lies around them for a whole step."""

    def __init__(self, model: nn.Module, *arguments: Any) -> None:
        self.plain = [copy.deepcopy(model)]  # in a list, which torch does not look into
        super().__init__(model, *arguments)

    def configure_model(self) -> None:
        if isinstance(next(self.parameters()), DTensor):
            return  # Lightning asks again for every loop
        assert self.device_mesh is not None, "set by Lightning before it asks"
        mesh = self.device_mesh["data_parallel"]
        if mesh.device_type == "cuda":
            nn.SyncBatchNorm.convert_sync_batchnorm(self)
        for module in self.modules():
            if isinstance(module, Layer):
                fully_shard(module, mesh=mesh)
        # losses call methods of the model that are not its forward; what is not the layers' is there for all of a step
        fully_shard(self, mesh=mesh, reshard_after_forward=False, ignored_params=set(self._scalars()))
        register_fsdp_forward_method(self, "training_step")

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for scalar in self._scalars():
            if scalar.grad is not None:
                distributed.all_reduce(scalar.grad)
                scalar.grad /= ranks.num_ranks()
        super().on_before_optimizer_step(optimizer)

    def _scalars(self) -> list[nn.Parameter]:
        """Parameters that cannot be shared: every process has them whole."""
        return [parameter for parameter in self.parameters() if parameter.ndim == 0]

    def restore(self) -> None:
        """Put the model together again, on the CPU of every process, as modules that are not in parts."""
        (plain,) = self.plain
        whole = {
            name: tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor.cpu()
            for name, tensor in self.model.state_dict().items()
        }
        plain.load_state_dict(whole)
        self.model.__dict__.update(plain.__dict__)  # sharding cannot be undone: its parts are others


def sharding_strategy(num_processes: int) -> ModelParallelStrategy:
    """Return Lightning's strategy for it, whose checkpoints are whole: a run may go on with other processes."""
    return ModelParallelStrategy(
        data_parallel_size=num_processes, tensor_parallel_size=1, save_distributed_checkpoint=False
    )
