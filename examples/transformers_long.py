"""Fine-tune a model of transformers on one long text with MoBA, its sequence spread over all ranks, and let it go on.

python examples/transformers_long.py --text book.txt                                  # a small random model
torchrun --nproc-per-node 8 examples/transformers_long.py --model /models/llama --text book.txt --seq-len 131072
"""

import argparse
import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from moba_cp.hf import ContextParallel, use_moba
from moba_cp.hf.answer import answer


def load(folder: str | None, text: str):
    """A model, the tokens of ``text``, and tokens -> text; without a folder a token is a byte."""
    if folder is None:
        torch.manual_seed(0)
        config = LlamaConfig(vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=3,
                             num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=1 << 20)  # fmt: skip
        return LlamaForCausalLM(config), list(text.encode()), lambda ids: bytes(ids).decode("utf-8", "replace")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder), tokenizer(text).input_ids, tokenizer.decode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder of Hugging Face's (default: a small random model of bytes)")
    parser.add_argument("--text", required=True, help="a text file")
    parser.add_argument("--seq-len", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--block-size", type=int, default=64)
    parser.add_argument("--top-k", type=int, default=3)
    arguments = parser.parse_args()

    on_gpu = torch.cuda.is_available()
    if "RANK" in os.environ:
        dist.init_process_group("nccl" if on_gpu else "gloo")
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    rank, group = (dist.get_rank(), dist.group.WORLD) if dist.is_initialized() else (0, None)

    model, tokens, decode = load(arguments.model, Path(arguments.text).read_text(encoding="utf-8"))
    use_moba(model, arguments.block_size, arguments.top_k, full_layers="last 1").to(device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    parallel = ContextParallel(model, group)
    wrapped = parallel if group is None else DistributedDataParallel(parallel)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3 if arguments.model is None else 1e-5)

    ids = torch.tensor(tokens, device=device)
    if len(ids) < arguments.seq_len + 1:
        raise SystemExit(f"{arguments.text} has {len(ids)} tokens; use --seq-len below that")
    model.train()
    generator = torch.Generator().manual_seed(0)  # the same pieces on all ranks
    for step in range(1, arguments.steps + 1):
        start = int(torch.randint(len(ids) - arguments.seq_len, (1,), generator=generator))
        batch = ids[start : start + arguments.seq_len][None]
        loss = wrapped(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)

    model.eval()
    if rank == 0:
        print(decode(answer(model, ids[: arguments.seq_len], max_tokens=64).tolist()))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
