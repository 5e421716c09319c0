"""How the ranks share a step: as replicas, as shards, or as DeepSpeed does it. One class each, with the same methods.

The loop sets learning rates in `optimizers` and calls `wrapped` for the loss. Weights are saved from `gathered()`, a
plain model, and a resume state has one format, that of a single process: any strategy on any number of ranks reads it.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.utils._pytree import tree_map
from torch.utils.checkpoint import checkpoint

from model.cli import UserError, first_line

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class Replicas:
    """ddp: every rank holds everything, gradients are averaged in the backward pass (Li et al. 2020). Also one rank.

    `make`: model → optimizers, called when the parameters are the ones to be stepped.
    """

    def __init__(self, run, model: nn.Module, make: Callable[[nn.Module], list[Optimizer]]):
        self.run, self.model = run, model
        self.plain = model  # with the shapes of all parameters, whatever becomes of the weights
        self.scaler = torch.amp.GradScaler(run.device.type, enabled=run.dtype == torch.float16)
        self.optimizers, self.wrapped = self._wrap(make)

    def _wrap(self, make: Callable) -> tuple[list[Optimizer], nn.Module]:
        device, alone = self.run.device, self.run.world.size == 1
        self.model.to(device)
        return make(self.model), self.model if alone else DistributedDataParallel(
            self.model, device_ids=[device.index] if device.type == "cuda" else None, gradient_as_bucket_view=True)

    def accumulating(self, last: bool) -> AbstractContextManager:
        """The context of a micro-step: replicas exchange gradients in the last one only."""
        return nullcontext() if last or self.wrapped is self.model else self.wrapped.no_sync()

    def backward(self, value: Tensor) -> None:
        """Add the gradients of `value`, averaged over the ranks."""
        self.scaler.scale(value).backward()

    def update(self, limit: float) -> Tensor:
        """Clip the gradient of all ranks to the norm `limit` and step. → its norm before"""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_([p for p in self.model.parameters() if p.requires_grad], limit)
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)
            optimizer.zero_grad(set_to_none=True)
        self.scaler.update()
        return norm

    def whole(self) -> AbstractContextManager:
        """A context in which the model can be called by each rank as often as it likes. All ranks enter it."""
        return nullcontext()

    def gathered(self) -> nn.Module:
        """The model with whole fp32 weights, on the first rank: to be saved. All ranks call it."""
        return self.model

    def optimizer_states(self) -> list[dict]:
        """state_dict of each optimizer, whole, on the first rank. All ranks call it."""
        return [optimizer.state_dict() for optimizer in self.optimizers]

    def load_optimizers(self, states: list[dict]) -> None:
        """Take up what `optimizer_states` gave."""
        for optimizer, state in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict(state)


class Shards(Replicas):
    """fsdp: every rank holds a share of weights, gradients and moments (Rajbhandari et al. 2020, stage 3) by FSDP2.

    A block's weights are gathered when it is called, in half precision if the run computes in it, and its gradients
    are summed in fp32. They are in every micro-step, so that none is ever whole.
    """

    def __init__(self, run, model: nn.Module, make: Callable):
        name = run.args.parallel
        if not dist.is_initialized():
            raise UserError(f"--parallel {name} needs a launcher, also for one process: torchrun --nproc_per_node N …")
        if run.args.optimizer == "muon":
            raise UserError(f"--optimizer muon needs whole matrices, which --parallel {name} does not keep: use adamw")
        if run.dtype == torch.float16:
            raise UserError(f"--dtype float16 is for --parallel ddp; use bfloat16 with {name}")
        super().__init__(run, model, make)

    def _wrap(self, make: Callable) -> tuple[list[Optimizer], nn.Module]:
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")  # of the logits: never changed
        self.plain = outline(self.model)
        size, half = self.run.world.size, self.run.dtype if self.run.dtype != torch.float32 else None
        share = partial(fully_shard, mesh=init_device_mesh(self.run.device.type, (size,)),
                        reshard_after_forward=True, shard_placement_fn=partial(placement, size=size))
        for block in blocks(self.model):
            share(block, mp_policy=MixedPrecisionPolicy(half, torch.float32, cast_forward_inputs=False))
        share(self.model, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
        return make(self.model), self.model

    def accumulating(self, last: bool) -> AbstractContextManager:
        return nullcontext()

    def update(self, limit: float) -> Tensor:
        return super().update(limit).full_tensor()

    @contextmanager
    def whole(self) -> Iterator[None]:
        parts = [module for module in self.model.modules() if isinstance(module, FSDPModule)]
        fully_shard.state(self.model)._lazy_init()  # else the part that is called first takes itself for the root
        self.model.set_reshard_after_forward(False)
        for part in parts:
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
            self.model.set_reshard_after_forward(True)

    def gathered(self) -> nn.Module:
        model, whole = copy.deepcopy(self.plain), {}
        for p in self.model.parameters():
            if p.requires_grad:  # one at a time: only the first rank has room for all
                whole[p] = self._kept(self._whole(p))
        named = self.model.named_parameters(remove_duplicate=False)
        if self.run.world.main:
            model.load_state_dict({name: whole[p] for name, p in named if p in whole}, strict=False, assign=True)
        return model

    def optimizer_states(self) -> list[dict]:
        return [tree_map(lambda x: self._kept(x.full_tensor()) if isinstance(x, DTensor) else x, state)
                for state in super().optimizer_states()]

    def load_optimizers(self, states: list[dict]) -> None:
        for optimizer, state in zip(self.optimizers, states, strict=True):
            for number, p in enumerate(parameters_of(optimizer)):
                of_one = state["state"].get(number, {})
                for name, value in of_one.items():
                    if value.shape == p.shape:
                        of_one[name] = distribute_tensor(value.to(p.device), p.device_mesh, p.placements,
                                                         src_data_rank=None)
        super().load_optimizers(states)

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        return parameter.detach().full_tensor()

    def _kept(self, value: Tensor) -> Tensor:
        return value.cpu() if self.run.world.main else value.new_empty(0)


class DeepSpeed(Shards):
    """deepspeed: ZeRO stage 1, 2 or 3, as `--deepspeed_config` says (Rajbhandari et al. 2020).

    Batches, clipping, precision and the optimizer are the run's; the file chooses the stage, offloading and buckets.
    """

    def _wrap(self, make: Callable) -> tuple[list[Optimizer], nn.Module]:
        args, run = self.run.args, self.run
        os.environ.setdefault("DS_ACCELERATOR", run.device.type)
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(f"--parallel deepspeed: {first_line(error)}; pip install deepspeed") from None
        if args.deepspeed_config is None:
            raise UserError("--parallel deepspeed needs --deepspeed_config FILE: trainer/deepspeed has some")
        try:
            config = json.loads(args.deepspeed_config.read_text("utf-8"))
            self.stage = config["zero_optimization"]["stage"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--deepspeed_config {args.deepspeed_config}: no DeepSpeed configuration with a "
                            f"zero_optimization stage ({type(error).__name__}: {first_line(error)})") from None
        if self.stage not in (1, 2, 3):
            raise UserError(f"--deepspeed_config {args.deepspeed_config}: ZeRO stage {self.stage}; 1, 2 or 3 shard")
        config |= {  # a step is over when the loop says so; 2 stands for "several micro-steps"
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
            "managed_gradient_accumulation": False, "gradient_clipping": args.grad_clip,
            "steps_per_print": 2**31, "zero_force_ds_cpu_optimizer": False}
        if run.dtype == torch.bfloat16 and not config.keys() & {"bf16", "torch_autocast"}:
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        self.plain = outline(self.model)
        optimizer, = make(self.model)
        self.order, self.groups = parameters_of(optimizer), optimizer.state_dict()["param_groups"]
        deepspeed.utils.logger.setLevel("WARNING")
        engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config,
                                          dist_init_required=False)
        return [optimizer], engine

    def backward(self, value: Tensor) -> None:
        self.wrapped.backward(value, scale_wrt_gas=False)

    def update(self, limit: float) -> Tensor:
        self.wrapped.step()
        return torch.as_tensor(self.wrapped.get_global_grad_norm(), device=self.run.device)

    @contextmanager
    def whole(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        offload = self.wrapped.optimizer.parameter_offload
        if not (coordinator := offload.get_param_coordinator()).is_invalid_trace():
            coordinator._invalidate_trace()  # what it has learned of the order of calls, and fetched in advance
        with GatheredParameters(list(self.model.parameters())):
            for hook in offload.forward_hooks + offload.backward_hooks:  # they gather and release around every call
                hook.remove()
            offload.forward_hooks, offload.backward_hooks = [], []
            try:
                yield
            finally:
                offload._register_deepspeed_module(offload.module)

    def optimizer_states(self) -> list[dict]:
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link_states()
        step = next(iter(self.optimizers[0].state.values()))["step"]
        states = {number: {"step": step.cpu().clone(), **{name: self._kept(safe_get_full_optimizer_state(p, name))
                                                  for name in MOMENTS}} for number, p in enumerate(self.order)}
        now = [{**group, "lr": ours["lr"]} for group, ours in
               zip(self.groups, self.optimizers[0].param_groups, strict=True)]
        return [{"state": states, "param_groups": now}]

    def load_optimizers(self, states: list[dict]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        zero, optimizer = self.wrapped.optimizer, self.optimizers[0]
        saved = states[0]["state"]
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            optimizer.state[flat] = {"step": saved[0]["step"].to(flat.device, copy=True),
                                     **{name: torch.zeros_like(flat) for name in MOMENTS}}
        self._link_states()
        for number, p in enumerate(self.order):
            for name in MOMENTS:
                value = saved[number][name]
                if self.stage < 3:
                    safe_set_full_optimizer_state(p, value, name)
                else:
                    n, rank = p.ds_tensor.numel(), self.run.world.rank
                    mine = F.pad(value.flatten(), (0, n * self.run.world.size - value.numel()))[rank * n:][:n]
                    safe_set_local_optimizer_state(p, mine, name)

    def _link_states(self) -> None:
        """Tell ZeRO 1 and 2 where each parameter's moments are: it does so itself when only the first group has any."""
        if self.stage < 3:
            self.wrapped.optimizer._hp_optimizer_states_linked = False
            self.wrapped.optimizer._lazy_init_hp_params_optimizer_state()

    def _whole(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)


STRATEGIES = {"ddp": Replicas, "fsdp": Shards, "deepspeed": DeepSpeed}


def blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of all decoders in `model`."""
    return [block for stack in model.modules() if isinstance(stack, nn.ModuleList) for block in stack]


def outline(model: nn.Module) -> nn.Module:
    """A copy of `model` without its weights."""
    empty = {id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()}
    return copy.deepcopy(model, empty)


def placement(parameter: nn.Parameter, size: int) -> Shard:
    """Which dimension is cut: of stacked experts, if there are fewer than ranks, the next one."""
    return Shard(int(parameter.dim() == 3 and parameter.shape[0] < size and parameter.shape[1] % size == 0))


def parameters_of(optimizer: Optimizer) -> list[nn.Parameter]:
    """In the order of the numbers in its state_dict."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def checkpoint_blocks(model: nn.Module) -> None:
    """Let the backward pass compute each block's activations anew instead of keeping them (Chen et al. 2016)."""
    for block in blocks(model):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False)
