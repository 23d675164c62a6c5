"""Three steps of training in Megatron's own way: its parallel state, schedules, DDP and optimizer, with our spec."""

import contextlib
import hashlib
import re
from dataclasses import dataclass, field
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.enums import ModelType
from megatron.core.models.gpt import GPTModel
from megatron.core.num_microbatches_calculator import destroy_num_microbatches_calculator
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.transformer_config import TransformerConfig

from moba_cp import CPContext
from moba_cp.cp.options import ExchangeOptions
from moba_cp.megatron import AttentionConfig, block_spec, layer_spec
from tests.helpers.cuda_stub import cuda_on_cpu

T, VOCAB, SEQUENCES, STEPS = 192, 64, 4, 3
# 12 blocks of which 3 are attended to; the last layer is full.
HYBRID = AttentionConfig(block_size=16, top_k=3, full_layers="last 1")
# Documents of a packed sequence, padded to multiples of 4 for zigzag on two ranks, and where they really end.
PADDED, REAL = (0, 52, 56, 140, T), (0, 50, 53, 137, 183)


# Every other layer has experts; no token is dropped, and no loss but that of the tokens is made.
EXPERTS = dict(
    num_moe_experts=4,
    moe_layer_freq=[0, 1, 0, 1],
    moe_ffn_hidden_size=48,
    moe_router_topk=2,
    moe_router_load_balancing_type="none",
    moe_token_dispatcher_type="alltoall",
)


@dataclass(frozen=True)
class Run:
    """One way to spread the training over ranks."""

    tp: int = 1
    cp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    experts: bool = False
    packed: bool = False
    attention: AttentionConfig = HYBRID
    exchange: ExchangeOptions | None = None
    distributed_optimizer: bool = False
    config: dict = field(default_factory=dict)


def model_config(run: Run) -> TransformerConfig:
    fields = dict(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        apply_rope_fusion=False,
        persist_layer_norm=False,
        transformer_impl="local",
        tensor_model_parallel_size=run.tp,
        context_parallel_size=run.cp,
        pipeline_model_parallel_size=run.pp,
        virtual_pipeline_model_parallel_size=run.vpp,
        pipeline_dtype=torch.float32,
        # Otherwise two stages would have several messages under way between them in one batch, and mix them up.
        overlap_p2p_comm=run.vpp is not None,
        batch_p2p_comm=run.vpp is None,
        expert_model_parallel_size=run.ep,
        # Split experts would gather uneven numbers of tokens, which gloo cannot.
        expert_tensor_parallel_size=1,
        cp_comm_type="p2p",
        use_cpu_initialization=True,
    )
    return TransformerConfig(**{**fields, **(EXPERTS if run.experts else {}), **run.config})


def build(run: Run) -> list[GPTModel]:
    config, chunks = model_config(run), []
    for stage in range(run.vpp or 1):
        vp_stage = stage if run.vpp else None
        at = dict(ignore_virtual=False, vp_stage=vp_stage)
        spec = layer_spec(run.attention, run.exchange)
        if config.sequence_parallel:
            spec = block_spec(config, vp_stage, run.attention, run.exchange)
        model = GPTModel(
            config,
            spec,
            VOCAB,
            T,
            pre_process=parallel_state.is_pipeline_first_stage(**at),
            post_process=parallel_state.is_pipeline_last_stage(**at),
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            vp_stage=vp_stage,
        )
        model.model_type = ModelType.encoder_or_decoder
        set_weights(model, run)
        chunks.append(model)
    return chunks


def global_name(model: GPTModel, name: str) -> str:
    """A parameter's name with the numbers of its layer and its expert in the whole model."""
    if not name.startswith("decoder.layers."):
        return name
    _, _, index, rest = name.split(".", 3)
    if ".local_experts." in rest:
        before, expert, after = re.fullmatch(r"(.*\.local_experts)\.(\d+)\.(.*)", rest).groups()
        first = parallel_state.get_expert_model_parallel_rank() * model.config.num_moe_experts
        first //= parallel_state.get_expert_model_parallel_world_size()
        rest = f"{before}.{first + int(expert)}.{after}"
    return f"decoder.layers.{model.decoder.layers[int(index)].layer_number - 1}.{rest}"


def local_part(full: torch.Tensor, name: str, parameter, size: int, rank: int) -> torch.Tensor:
    """A tensor-parallel rank's part; gate and up projections stand side by side on each."""
    if size == 1 or not getattr(parameter, "tensor_model_parallel", False):
        return full
    if name.endswith("linear_fc1.weight"):
        return torch.cat([half.chunk(size)[rank] for half in full.chunk(2)])
    return full.chunk(size, parameter.partition_dim)[rank]


@torch.no_grad()
def set_weights(model: GPTModel, run: Run) -> None:
    """Weights that depend on nothing but a parameter's name in the whole model."""
    rank = parallel_state.get_tensor_model_parallel_rank()
    for name, parameter in model.named_parameters():
        name, shape = global_name(model, name), list(parameter.shape)
        size = 1 if ".local_experts." in name else run.tp
        if size > 1 and getattr(parameter, "tensor_model_parallel", False):
            shape[parameter.partition_dim] *= size
        generator = torch.Generator().manual_seed(int(hashlib.sha256(name.encode()).hexdigest()[:8], 16))
        full = torch.randn(shape, generator=generator) * 0.2 + (1.0 if len(shape) == 1 else 0.0)
        parameter.copy_(local_part(full, name, parameter, size, rank))


def batches(run: Run):
    """This rank's micro-batches of all steps: tokens, labels, loss mask, positions, packed_seq_params."""
    generator = torch.Generator().manual_seed(7)
    dp_rank, dp_size = (
        parallel_state.get_data_parallel_rank(with_context_parallel=False),
        parallel_state.get_data_parallel_world_size(with_context_parallel=False),
    )
    group = parallel_state.get_context_parallel_group()
    bounds = torch.tensor(PADDED, dtype=torch.int32) if run.packed else None
    layout = "contiguous" if run.cp == 1 else "zigzag_per_document" if run.packed else "zigzag"
    context = CPContext(group, layout=layout, seq_len=T, cu_seqlens=bounds, device="cpu")
    for sequence in range(SEQUENCES * STEPS):
        tokens = torch.randint(VOCAB, (T,), generator=generator)
        # Uneven masks: few tokens count in some sequences, and fewer in their second half.
        keep = torch.rand(T, generator=generator) * torch.linspace(1, 0.6, T) > (0.1, 0.7)[sequence % 2]
        params = None
        if run.packed:
            real = torch.tensor(REAL, dtype=torch.int32)
            params = PackedSeqParams("thd", real, real, bounds, bounds, max_seqlen_q=84, max_seqlen_kv=84)
            for end, padded in zip(REAL[1:], PADDED[1:], strict=True):
                keep[end:padded] = False
        if sequence % dp_size == dp_rank:
            shared = (tokens, tokens.roll(-1), keep.float(), torch.arange(T))
            yield *(context.shard(x)[None] for x in shared), params


def loss_function(mask, per_token):
    loss = (per_token.reshape(-1).float() * mask.reshape(-1)).sum()
    count = mask.sum().to(torch.int)
    return loss, count, {"loss": torch.stack([loss.detach(), count.float()])}


def forward_step(data, model):
    tokens, labels, mask, positions, params = next(data)
    out = model(tokens, positions, None, labels=labels, packed_seq_params=params)
    return out, partial(loss_function, mask)


def train(run: Run) -> dict:
    """losses [STEPS], norms [STEPS] of the gradients, and the gradients of the first step on this rank."""
    parallel_state.initialize_model_parallel(
        run.tp,
        run.pp,
        run.vpp,
        context_parallel_size=run.cp,
        expert_model_parallel_size=run.ep,
        expert_tensor_parallel_size=1,
    )
    try:
        # megatron-core 0.16 names this function of TransformerEngine in its router without having imported it.
        missing = contextlib.nullcontext()
        if not hasattr(moe_utils, "te_general_gemm"):
            missing = mock.patch.object(moe_utils, "te_general_gemm", None, create=True)
        with missing, cuda_on_cpu():
            return _train(run)
    finally:
        parallel_state.destroy_model_parallel()
        destroy_num_microbatches_calculator()


def _train(run: Run) -> dict:
    model_parallel_cuda_manual_seed(1)
    chunks = build(run)
    config = chunks[0].config
    ddp = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, use_distributed_optimizer=run.distributed_optimizer, overlap_grad_reduce=False
    )
    wrapped = [DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam", lr=1e-2, min_lr=1e-2, weight_decay=0.0, clip_grad=1.0,
            use_distributed_optimizer=run.distributed_optimizer,
        ),
        wrapped,
    )  # fmt: skip
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    micro_batches = SEQUENCES // parallel_state.get_data_parallel_world_size(with_context_parallel=False)
    data = [batches(run) for _ in chunks]
    results = {"losses": [], "norms": [], "grads": {}, "kinds": []}
    for step in range(STEPS):
        for chunk in wrapped:
            chunk.zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=data if run.vpp else data[0],
            model=wrapped if run.vpp else wrapped[0],
            num_microbatches=micro_batches,
            seq_length=T,
            micro_batch_size=1,
            decoder_seq_length=T,
            forward_only=False,
        )
        if step == 0:
            for chunk in chunks:
                for name, parameter in chunk.named_parameters():
                    results["grads"][global_name(chunk, name)] = parameter.main_grad.clone()
        ok, norm, _ = optimizer.step()
        assert ok
        results["norms"].append(float(norm))
        results["losses"].append(_mean_loss(reports))
    results["kinds"] = [layer.self_attention.core_attention.kind for chunk in chunks for layer in chunk.decoder.layers]
    return results


def _mean_loss(reports) -> float:
    """Of the whole batch; ranks of earlier pipeline stages take it from the last."""
    total = torch.zeros(2)
    if parallel_state.is_pipeline_last_stage(ignore_virtual=True):
        total = torch.stack([report["loss"] for report in reports]).sum(0)
        torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    torch.distributed.broadcast(
        total,
        parallel_state.get_pipeline_model_parallel_last_rank(),
        group=parallel_state.get_pipeline_model_parallel_group(),
    )
    return float(total[0] / total[1])
