"""A step on a GPU that is not there, with tensors that have a device and a shape and no content (torch's FakeTensor).

An operation of tensors on two devices is an error, and so is reading one back, for which the host would wait. The
engine of autograd wants a real device: forward (which computes the head's gradient), what backward calls for a weight's
and an embedding's gradient, and the update.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from megatron_hammer.kernels import attention, linear
from megatron_hammer.kernels.embedding import add_rows
from megatron_hammer.optim.schedule import learning_rate
from megatron_hammer.parallel.context import ParallelContext
from megatron_hammer.sampling.batch import Batch
from megatron_hammer.train.build import build
from megatron_hammer.train.schedules import objective_of
from megatron_hammer.train.source_sums import Sources, mean_loss, sum_by_source
from tests.model.tiny import tiny_config

GPU = torch.device("cuda", 0)
REFERENCES = dict.fromkeys((f"kernels__{name}" for name in ("norm", "rope", "swiglu", "loss", "adamw")), "torch")


def _attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """torch's own asks for the GPU's name."""
    assert q.device == k.device == v.device
    return torch.empty_like(q)


def _addmm(place: Tensor, a: Tensor, b: Tensor, *, beta: int, out_dtype: torch.dtype, out: Tensor) -> Tensor:
    """torch has no shape function for this one."""
    assert place is out and out.dtype == out_dtype and out.shape == torch.mm(a, b).shape and out.device == a.device
    return out


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
@pytest.mark.parametrize(
    "changes",
    [dict(train__precision="bf16", optimizer__style="muon"), dict(train__precision="fp16", train__z_loss=1e-3)],
    ids=str,
)
def test_nothing_is_read_back_and_nothing_comes_from_elsewhere(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(**REFERENCES, kernels__attention="sdpa", **changes)
    monkeypatch.setattr(attention, "causal_attention", _attention)
    monkeypatch.setattr(torch, "addmm", _addmm)
    b, s, v = config.train.micro_batch_size, config.data.seq_length, config.model.vocab_size
    with FakeTensorMode():
        ctx = ParallelContext.single(GPU)
        model, optimizer = build(config, ctx)
        sources = Sources(2, torch.zeros(v or 0, dtype=torch.int64, device=GPU))
        for step in (1, 2):
            optimizer.store.begin(first=True, last=True)
            windows, weights = torch.empty(b, s + 1, dtype=torch.int64, device=GPU), torch.empty(b, s, device=GPU)
            batch = Batch.from_windows(windows, weights, sources=torch.empty(b, dtype=torch.int64, device=GPU))
            share = optimizer.scaler.scale / optimizer.store.total([weights.sum()])
            losses = model(batch.tokens, batch.labels, None, objective_of(batch, share, config.train.z_loss))
            for gradient in optimizer.store.of_stages[0].gradients:
                gradient.ready()
            table = sum_by_source([batch], [losses.detach()], sources, GPU)
            norm = optimizer.clip_grad_norm(config.optimizer.clip_grad)
            optimizer.limits = 1.0, 2.0
            applied = optimizer.step(learning_rate(config, step), mean_loss(table))
            assert {x.device for x in (losses, table, norm, applied)} == {GPU}
        x, grad = (torch.empty(64, n, dtype=model.options.dtype, device=GPU) for n in (32, 16))
        for begun in (False, True):
            linear.add_wgrad(grad, x, torch.empty(16, 32, device=GPU), begun)
        add_rows(torch.empty(301, 32, device=GPU), torch.empty(64, dtype=torch.int64, device=GPU), x)
        with pytest.raises(Exception, match="_local_scalar_dense"):
            norm.item()
