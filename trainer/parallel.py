"""How the ranks share a step: replicas (DDP) or shards (FSDP2), by the same methods; ZeRO is in zero.py.

The trainer sets learning rates in `optimizers` and calls `wrapped` for the loss. Weights are saved from
`gather_full_model()`, and a resume state has one format, that of a single process: any strategy on any number of ranks
reads it.
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from model.cli import UserError


class DDPStrategy:
    """ddp: every rank holds everything, gradients are averaged in the backward pass (Li et al. 2020). Also one rank.

    `make_optimizers`: model → optimizers, called once the model has the parameters that are stepped.
    """

    grad_norm: Tensor  # of the last step, before it was clipped

    def __init__(self, run, model: nn.Module, make_optimizers: Callable[[nn.Module], list[Optimizer]]):
        self.run, self.model = run, model
        self.unwrapped = model  # with the full shapes of all parameters; where they are sharded, without values
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        self.optimizers, self.wrapped = self._wrap(make_optimizers)

    def _wrap(self, make_optimizers: Callable) -> tuple[list[Optimizer], nn.Module]:
        device, alone = self.run.device, self.run.world.size == 1
        self.model.to(device)
        return make_optimizers(self.model), self.model if alone else DistributedDataParallel(
            self.model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    def no_sync(self) -> AbstractContextManager:
        """The context of every micro-step but the last: replicas exchange gradients once per step."""
        return nullcontext() if self.wrapped is self.model else self.wrapped.no_sync()

    def backward(self, value: Tensor) -> None:
        """Add the gradients of `value`, averaged over the ranks."""
        self.scaler.scale(value).backward()

    def clip_grad_norm(self, max_norm: float) -> None:
        """Scale the gradient of all ranks down to the norm `max_norm`."""
        params = [p for p in self.model.parameters() if p.requires_grad]
        if self.scaler.is_enabled() and len(self.optimizers) > 1:
            # The scaler makes an optimizer skip the step where its own gradients overflow. All of them have to: this is
            # NaN where any gradient is not finite, else 0.
            overflow = 0 * nn.utils.get_total_norm([p.grad for p in params if p.grad is not None])
            for optimizer in self.optimizers:
                gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
                for gradient in gradients[:1]:
                    gradient.add_(overflow)
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        self.grad_norm = nn.utils.clip_grad_norm_(params, max_norm)

    def optimizer_step(self) -> None:
        """Step all optimizers and drop the gradients."""
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()

    def summon_full_params(self) -> AbstractContextManager:
        """A context in which each rank may call the model as often as it likes. All ranks enter it."""
        return nullcontext()

    def gather_full_model(self) -> nn.Module:
        """The model with its full fp32 weights on the first rank, to be saved. All ranks call it."""
        return self.model

    def optimizer_states(self) -> list[dict]:
        """The full state_dict of each optimizer, on the first rank. All ranks call it."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_optimizer_states(self, states: list[dict]) -> None:
        """Restore what `optimizer_states` returned."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


class FSDPStrategy(DDPStrategy):
    """fsdp: every rank holds a shard of weights, gradients and moments (Rajbhandari et al. 2020, stage 3) by FSDP2.

    A block's weights are gathered when it is called, in half precision if the run computes in it, and its gradients
    are reduced in fp32: in every micro-step, so that no rank ever holds the full ones.
    """

    def __init__(self, run, model: nn.Module, make_optimizers: Callable):
        name = run.args.parallel
        if not dist.is_initialized():
            raise UserError(f"--parallel {name} needs a launcher, even for one process: torchrun --nproc_per_node N …")
        if run.args.optimizer == "muon":
            raise UserError(f"--optimizer muon needs whole matrices, which --parallel {name} does not keep: use adamw")
        if run.dtype == torch.float16:
            raise UserError(f"--dtype float16 is for --parallel ddp; use bfloat16 with {name}")
        super().__init__(run, model, make_optimizers)

    def _wrap(self, make_optimizers: Callable) -> tuple[list[Optimizer], nn.Module]:
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # of the logits: never changed
        self.unwrapped = meta_copy(self.model)
        size, half = self.run.world.size, self.run.dtype if self.run.dtype != torch.float32 else None
        shard = partial(fully_shard, mesh=init_device_mesh(self.run.device.type, (size,)),
                        reshard_after_forward=True, shard_placement_fn=partial(shard_placement, size=size))
        for block in decoder_blocks(self.model):
            shard(block, mp_policy=MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False))
        shard(self.model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        return make_optimizers(self.model), self.model

    def no_sync(self) -> AbstractContextManager:
        return nullcontext()

    def clip_grad_norm(self, max_norm: float) -> None:
        super().clip_grad_norm(max_norm)
        self.grad_norm = self.grad_norm.full_tensor()

    @contextmanager
    def summon_full_params(self) -> Iterator[None]:
        modules = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        fully_shard.state(self.model)._lazy_init()  # else the module that is called first takes itself for the root
        self.model.set_reshard_after_forward(False)
        for module in modules:
            module.unshard()
        try:
            yield
        finally:
            for module in modules:
                module.reshard()
            self.model.set_reshard_after_forward(True)

    def gather_full_model(self) -> nn.Module:
        model, full = copy.deepcopy(self.unwrapped), {}
        for p in self.model.parameters():
            if p.requires_grad:  # one at a time: only the first rank keeps them all
                full[p] = self._on_main(self._full_tensor(p))
        named = self.model.named_parameters(remove_duplicate=False)
        if self.run.world.main:
            model.load_state_dict({name: full[p] for name, p in named if p in full}, strict=False, assign=True)
        return model

    def optimizer_states(self) -> list[dict]:
        return [tree_map(lambda x: self._on_main(x.full_tensor()) if isinstance(x, DTensor) else x, state)
                for state in super().optimizer_states()]

    def load_optimizer_states(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            for number, p in enumerate(optimizer_params(optimizer)):
                moments = state["state"].get(number, {})
                for name, value in moments.items():
                    if value.shape == p.shape:
                        moments[name] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements,
                                                          src_data_rank=None)
        super().load_optimizer_states(states)

    def _full_tensor(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().full_tensor()

    def _on_main(self, value: Tensor) -> Tensor:
        """`value` in the memory of the first rank, nothing on the others."""
        return value.cpu() if self.run.world.main else value.new_empty(0)


def decoder_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of all decoders in `model`."""
    return [block for stack in model.modules() if isinstance(stack, nn.ModuleList) for block in stack]


def meta_copy(model: nn.Module) -> nn.Module:
    """A copy of `model` on the meta device: shapes without values."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def shard_placement(parameter: nn.Parameter, size: int) -> Shard:
    """The dimension that is sharded: the first; of stacked experts the second if there are fewer experts than ranks."""
    return Shard(int(parameter.dim() == 3 and parameter.shape[0] < size and parameter.shape[1] % size == 0))


def optimizer_params(optimizer: Optimizer) -> list[nn.Parameter]:
    """The parameters of `optimizer` in the order of the numbers in its state_dict."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def checkpoint_blocks(model: nn.Module) -> None:
    """Recompute each block's activations in the backward pass instead of keeping them (Chen et al. 2016).

    Blocks are compiled before: a compiler that meets `checkpoint` inside leaves the block as it is.
    """
    for block in decoder_blocks(model):
        name = "forward" if block._compiled_call_impl is None else "_compiled_call_impl"
        setattr(block, name, partial(checkpoint, getattr(block, name), use_reentrant=False))
