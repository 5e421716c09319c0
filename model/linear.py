"""Matrix products with a layer's weights, y = x·Wᵀ: one name, `linear`, for all devices, dtypes and batch sizes.

On a GPU and in training this is `F.linear`. Inference on a CPU multiplies few tokens by large weights, where the order
of the operands in memory costs more than the product itself. Measured: docs/experiments.md, "kernels" and "packed".
"""

import math
import threading
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SMALL_BATCH = 128  # tokens; an fp32 product with more of them takes as long with the weight on either side


def bucket_size(num_tokens: int, step: int = 16) -> int:
    """`num_tokens` rounded up to a power of two, or from `step` on to a multiple of it: the fast sizes of a CPU."""
    return 1 << (num_tokens - 1).bit_length() if num_tokens < step else -(-num_tokens // step) * step


def pad_to_multiple(x: Tensor, multiple: int = 32) -> Tensor:
    """Append zeros to `x` [N, ...] on a CPU, so that N, if above `multiple`, becomes a multiple of it.

    A CPU builds a bf16 kernel for every N it meets, which takes 10 to 20 ms and 5 to 8 MB that are never given back:
    docs/experiments.md, "kernels". On other devices nothing changes.
    """
    if x.device.type != "cpu" or len(x) <= multiple:
        return x
    return F.pad(x, (0, 0) * (x.dim() - 1) + (0, -len(x) % multiple))


def multiply_packed(x: Tensor, packed: Tensor) -> Tensor:
    """x [N, in] · weightᵀ → [N, out] in the weight's dtype; `packed`: the weight in oneDNN's order."""
    x = x if x.dtype == packed.dtype else x.to(packed.dtype)
    return torch.ops.mkldnn._linear_pointwise.default(x, packed, None, "none", [], "")


def linear(x: Tensor, weight: Tensor, prepacked: Tensor | None = None) -> Tensor:
    """x [..., in] · weight [out, in]ᵀ → [..., out]. `prepacked`: the weight as an engine keeps it, see
    `model.inference.prepacked`.

    A CPU reads the left operand as it lies in memory and reorders the right one. F.linear has the weight on the right,
    and reordering it takes longer than the product with a few tokens; so inference multiplies by a weight reordered
    before (1), or puts the weight on the left (3, 4). All else is F.linear (2).
    """
    x2d, is_half = x.flatten(0, -2), x.dtype == torch.bfloat16
    num_tokens = len(x2d)
    # 1. A prepacked weight. On a CPU, with one or two fp32 tokens the plain weight is as fast, unless it is fused.
    if prepacked is not None and x.is_cuda:
        return F.linear(x, prepacked)
    if prepacked is not None and (prepacked.dtype == torch.bfloat16 or num_tokens > 2 or len(prepacked) > len(weight)):
        bucket = bucket_size(num_tokens, 16 if num_tokens < SMALL_BATCH else 32)
        padded = F.pad(x2d, (0, 0, 0, bucket - num_tokens)) if bucket > num_tokens else x2d
        return multiply_packed(padded, prepacked)[:num_tokens].unflatten(0, x.shape[:-1])
    # 2. Training, other devices, large batches. no_grad alone must compute what training does, to the bit; while
    #    compiling, inference mode cannot be asked for.
    training = torch.is_grad_enabled() if torch.compiler.is_compiling() else not torch.is_inference_mode_enabled()
    if x.device.type != "cpu" or x.dtype != weight.dtype or training or num_tokens > SMALL_BATCH and not is_half:
        return F.linear(x, weight)
    # 3. One fp32 token only waits for the weight to be read: cut into chunks, it is read by all cores at once.
    if num_tokens == 1 and not is_half:
        chunks = math.gcd(len(weight), 64)
        return (weight.unflatten(0, (chunks, -1)) @ x2d.T.expand(chunks, -1, -1)).view(*x.shape[:-1], -1)
    # 4. The weight on the left. Who compiles sends buckets: rounding here would make one graph per size.
    bucket = num_tokens if torch.compiler.is_compiling() else bucket_size(num_tokens, 32 if is_half else 16)
    padded = F.pad(x2d, (0, 0, 0, bucket - num_tokens)) if bucket > num_tokens else x2d
    right = x2d.expand(2, -1) if num_tokens == 1 else padded.contiguous()  # strided, it is 5 times as slow
    return (weight @ right.T).T[:num_tokens].unflatten(0, x.shape[:-1])


class PrepackedWeights(threading.local):
    """The weights that an engine's step multiplies by instead of the parameters, by path; `use_prepacked` sets them."""

    by_path: dict[str | None, Any] = {}


PREPACKED = PrepackedWeights()
compiles_prepacked = False  # whether what is compiled now is such a step; a compiler can read this, but not the weights

# A compiler cannot look into oneDNN's order, so it calls this operator: x [N, in] · weightᵀ of a path → [N, out].
LIBRARY = torch.library.Library("minimind", "FRAGMENT")
LIBRARY.define("prepacked_linear(Tensor x, str path, int out_features) -> Tensor")


def _prepacked_linear(x: Tensor, path: str, out_features: int) -> Tensor:
    weight = PREPACKED.by_path[path]
    if x.dtype != weight.dtype:
        return _prepacked_linear(x.to(weight.dtype), path, out_features).to(x.dtype)
    return F.linear(x, weight) if x.is_cuda else multiply_packed(x, weight)


LIBRARY.impl("prepacked_linear", _prepacked_linear, "CompositeExplicitAutograd")


@torch.library.register_fake("minimind::prepacked_linear")
def _prepacked_linear_shape(x: Tensor, path: str, out_features: int) -> Tensor:
    return x.new_empty(x.shape[0], out_features)


class Linear(nn.Linear):
    """y = x·weightᵀ, without a bias."""

    # set by `model.inference.prepacked`: where PREPACKED has this weight, and this and those that `linears` joins to it
    path: str | None = None
    fused_path: str | None = None

    def __init__(self, in_features: int, out_features: int, device: str | None = None):
        super().__init__(in_features, out_features, bias=False, device=device)

    def forward(self, x: Tensor) -> Tensor:
        return linear_at(x, self.path, self.weight, self.out_features)


def linear_at(x: Tensor, path: str | None, weight: Tensor, out_features: int) -> Tensor:
    """The product with the prepacked weight of `path`, if there is one, else with `weight`."""
    if not torch.compiler.is_compiling():
        return linear(x, weight, PREPACKED.by_path.get(path))
    if path is None or not compiles_prepacked:
        return linear(x, weight)
    y = torch.ops.minimind.prepacked_linear(x.flatten(0, -2), path, out_features)
    return y.unflatten(0, x.shape[:-1])


def linears(x: Tensor, *layers: nn.Linear) -> list[Tensor]:
    """x [..., in] through each layer → [..., out] each; as one product where an engine has fused their weights."""
    path = getattr(layers[0], "fused_path", None)
    is_compiling = torch.compiler.is_compiling()
    if path is None or not (compiles_prepacked if is_compiling else path in PREPACKED.by_path):
        return [layer(x) for layer in layers]
    sizes = [layer.out_features for layer in layers]
    return list(linear_at(x, path, layers[0].weight, sum(sizes)).split(sizes, dim=-1))
