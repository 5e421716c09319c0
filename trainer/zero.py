"""DeepSpeed's ZeRO: weights, gradients and moments are sharded as a configuration file says."""

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from model.cli import UserError, first_line
from trainer.parallel import FSDPStrategy, meta_copy, optimizer_params

MOMENTS = ("exp_avg", "exp_avg_sq")  # of AdamW


class DeepSpeedStrategy(FSDPStrategy):
    """deepspeed: ZeRO stage 1, 2 or 3, as `--deepspeed_config` says (Rajbhandari et al. 2020).

    Batches, clipping, precision and the optimizer are the run's; the file chooses the stage, offloading and buckets.
    """

    def _wrap(self, make_optimizers: Callable) -> tuple[list[Optimizer], nn.Module]:
        args, run = self.run.args, self.run
        os.environ.setdefault("DS_ACCELERATOR", run.device.type)
        try:
            import deepspeed
        except ImportError as error:
            raise UserError(f"--parallel deepspeed: {first_line(error)}; pip install deepspeed") from None
        if args.deepspeed_config is None:
            raise UserError("--parallel deepspeed needs --deepspeed_config FILE, such as trainer/deepspeed/zero2.json")
        try:
            config = json.loads(args.deepspeed_config.read_text("utf-8"))
            self.stage = config["zero_optimization"]["stage"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"--deepspeed_config {args.deepspeed_config}: no DeepSpeed configuration with a "
                            f"zero_optimization stage ({type(error).__name__}: {first_line(error)})") from None
        if self.stage not in (1, 2, 3):
            raise UserError(f"--deepspeed_config {args.deepspeed_config}: ZeRO stage {self.stage}, not 1, 2 or 3")
        config |= {  # the trainer decides when a step is over; 2 stands for "several micro-steps"
            "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 2,
            "managed_gradient_accumulation": False, "gradient_clipping": args.grad_clip,
            "steps_per_print": 2**31, "zero_force_ds_cpu_optimizer": False}
        if run.dtype == torch.bfloat16 and not config.keys() & {"bf16", "torch_autocast"}:
            config["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        self.unwrapped = meta_copy(self.model)
        optimizer, = make_optimizers(self.model)
        self.params, self.param_groups = optimizer_params(optimizer), optimizer.state_dict()["param_groups"]
        deepspeed.utils.logger.setLevel("WARNING")
        engine, *_ = deepspeed.initialize(model=self.model, optimizer=optimizer, config=config,
                                          dist_init_required=False)
        return [optimizer], engine

    def backward(self, value: Tensor) -> None:
        self.wrapped.backward(value, scale_wrt_gas=False)

    def clip_grad_norm(self, max_norm: float) -> None:
        """Nothing: DeepSpeed clips in its step, at the `gradient_clipping` of its configuration."""

    def optimizer_step(self) -> None:
        self.wrapped.step()
        self.grad_norm = torch.as_tensor(self.wrapped.get_global_grad_norm(), device=self.run.device)

    @contextmanager
    def summon_full_params(self) -> Iterator[None]:
        if self.stage < 3:
            yield
            return
        from deepspeed.runtime.zero import GatheredParameters

        offload = self.wrapped.optimizer.parameter_offload
        if not (coordinator := offload.get_param_coordinator()).is_invalid_trace():
            coordinator._invalidate_trace()  # the order of calls that it recorded, and what it prefetched
        with GatheredParameters(list(self.model.parameters())):
            for hook in offload.forward_hooks + offload.backward_hooks:  # they gather and release at every call
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
        states = {}
        for number, p in enumerate(self.params):
            moments = {name: self._on_main(safe_get_full_optimizer_state(p, name)) for name in MOMENTS}
            states[number] = {"step": step.cpu().clone(), **moments}
        groups = zip(self.param_groups, self.optimizers[0].param_groups, strict=True)
        return [{"state": states, "param_groups": [{**group, "lr": current["lr"]} for group, current in groups]}]

    def load_optimizer_states(self, states: list[dict]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        zero, optimizer = self.wrapped.optimizer, self.optimizers[0]
        saved = states[0]["state"]
        for flat in zero.fp32_partitioned_groups_flat if self.stage == 3 else zero.single_partition_of_fp32_groups:
            optimizer.state[flat] = {"step": saved[0]["step"].to(flat.device, copy=True),
                                     **{name: torch.zeros_like(flat) for name in MOMENTS}}
        self._link_states()
        for number, p in enumerate(self.params):
            for name in MOMENTS:
                value = saved[number][name]
                if self.stage < 3:
                    safe_set_full_optimizer_state(p, value, name)
                else:
                    n, world = p.ds_tensor.numel(), self.run.world
                    padded = F.pad(value.flatten(), (0, n * world.size - value.numel()))
                    safe_set_local_optimizer_state(p, padded[world.rank * n:][:n], name)

    def _link_states(self) -> None:
        """Let ZeRO 1 and 2 find each parameter's moments again: it does so by itself for its first group only."""
        if self.stage < 3:
            self.wrapped.optimizer._hp_optimizer_states_linked = False
            self.wrapped.optimizer._lazy_init_hp_params_optimizer_state()

    def _full_tensor(self, parameter: nn.Parameter) -> Tensor:
        from deepspeed.utils import safe_get_full_fp32_param

        return safe_get_full_fp32_param(parameter)
