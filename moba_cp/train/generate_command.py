"""``moba-cp generate MODEL``: what a model says after a prompt of any length, token by token on the terminal."""

import argparse
import sys
import time
from pathlib import Path

# Text without a line break that is decoded again with each token.
_PENDING_TOKENS = 200


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("model", metavar="MODEL", help="a run, a checkpoint, or a folder of Hugging Face's")
    prompt = parser.add_mutually_exclusive_group(required=True)
    prompt.add_argument("--prompt-file", metavar="FILE", help="a text file; - for standard input")
    prompt.add_argument("--prompt", metavar="TEXT", help="the prompt itself")
    parser.add_argument("--max-tokens", type=int, default=256, metavar="N", help="of the answer (default: 256)")
    parser.add_argument("--attention", choices=("as_trained", "moba", "full"), default="as_trained",
                        help="of the prompt; full layers stay full (default: as_trained, or full)")  # fmt: skip
    parser.add_argument("--decoding", choices=("moba", "full"), help="attention of the answer (default: the prompt's)")
    parser.add_argument("--block-size", type=int, metavar="B", help="of MoBA layers, where the model says nothing")
    parser.add_argument("--top-k", type=int, metavar="K", help="likewise")
    parser.add_argument("--temperature", type=float, default=0.0, metavar="X",
                        help="0 takes the likeliest token (default: 0)")  # fmt: skip
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="with a temperature (default: 1)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of drawn tokens (default: 0)")
    parser.add_argument("--piece", type=int, default=16_384, metavar="N",
                        help="tokens of a prompt at a time: fewer take less memory (default: 16384)")  # fmt: skip
    parser.add_argument("--tokenizer", metavar="PATH", help="tokenizer.json or a folder with one (default: its own)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"),
                        help="(default: bfloat16 on a GPU, else float32)")  # fmt: skip
    parser.add_argument("--device", metavar="NAME", help="(default: cuda if there is a GPU, else cpu)")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    import torch

    from .. import hf  # noqa: F401, which says what to install
    from ..hf.answer import answer

    device = _device(arguments.device)
    dtype = arguments.dtype or ("bfloat16" if device.type == "cuda" else "float32")
    text = _prompt(arguments)
    model, encode, decode, end = _load(arguments, device, dtype)
    prompt = encode(text)
    if not len(prompt):
        raise ValueError("the prompt is empty; give a text of at least one token")
    printer = _Printer(decode, end)
    torch.manual_seed(arguments.seed)
    begun = time.perf_counter()
    answer(
        model, torch.tensor(prompt, dtype=torch.int64), arguments.max_tokens, arguments.piece, arguments.temperature,
        arguments.top_p, end or None, printer.add,
    )  # fmt: skip
    printer.close()
    print(_summary(len(prompt), printer.times, begun, device), file=sys.stderr)
    return 0


def _device(name: str | None):
    import torch

    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device={name}: not known; use cpu, cuda, or a GPU by its number, such as cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"--device={name}: PyTorch finds {torch.cuda.device_count()} GPUs here; use cpu, or leave it out"
        )
    return device


def _prompt(arguments: argparse.Namespace) -> str:
    if arguments.prompt is not None:
        return arguments.prompt
    # As bytes: reading as text changes line breaks, which are tokens.
    data = sys.stdin.buffer.read() if arguments.prompt_file == "-" else Path(arguments.prompt_file).read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt-file={arguments.prompt_file}: not UTF-8 at byte {error.start}") from None


def _load(arguments: argparse.Namespace, device, dtype: str):
    """The model, text -> tokens, tokens -> text, and the tokens that end an answer."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from ..data.encode import TOKENIZER, ByteEncoder, TokenizerEncoder
    from ..hf import use_moba
    from .exported import trained_model
    from .weights import is_hf

    of_hf = is_hf(arguments.model)
    if of_hf:
        named = arguments.tokenizer or arguments.model
        known = arguments.tokenizer is not None or (Path(named) / TOKENIZER).is_file()
        encoder = TokenizerEncoder(named) if known else None
        model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=getattr(torch, dtype))
        # Beginnings and ends are the tokenizer's own affair.
        encode = None if encoder is None else lambda text: encoder.tokenizer.encode(text).ids
        end = model.generation_config.eos_token_id
    else:
        from ..hf.key_conv import add_key_conv
        from ..megatron.hf import hf_tensors

        trained = trained_model(arguments.model, arguments.tokenizer)
        config = AutoConfig.for_model(**trained.hf_config(dtype))
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
        if width := trained.config.attention.key_conv:
            add_key_conv(model, width)
        _fill(model, hf_tensors(trained.model, config.vocab_size, trained.read))
        encoder = trained.tokenizer
        encode = None if encoder is None else lambda text: encoder.encode_exactly(text).tolist()
        end = None if encoder is None else encoder.end
    if encoder is None:
        if model.config.vocab_size < ByteEncoder.vocab_size or model.config.vocab_size > 2 * ByteEncoder.vocab_size:
            raise ValueError(
                f"{arguments.model} has {model.config.vocab_size} tokens and no {TOKENIZER}; name its tokenizer with "
                "--tokenizer PATH"
            )
        encoder = ByteEncoder()
        encode = lambda text: encoder.encode(text).tolist()
    ends = [] if end is None else end if isinstance(end, list) else [end]
    use_moba(model, **_attention(arguments, model.config))
    return model.to(device).eval(), encode, encoder.decode, ends


def _fill(model, tensors) -> None:
    import torch

    own = model.state_dict()
    with torch.no_grad():
        for name, value in tensors:
            own[name].copy_(value)


def _attention(arguments: argparse.Namespace, config) -> dict:
    """Arguments of :func:`moba_cp.hf.use_moba`."""
    options = dict(getattr(config, "moba", None) or {})
    for name in ("block_size", "top_k"):
        if getattr(arguments, name) is not None:
            options[name] = getattr(arguments, name)
    knows = {"block_size", "top_k"} <= set(options)
    if arguments.attention == "moba" and not knows:
        raise ValueError(f"{arguments.model} says no block size and top-k; give --block-size and --top-k")
    if arguments.attention == "full" or not knows:
        options = {"block_size": 512, "top_k": 1} | options
        options["full_layers"] = list(range(1, config.num_hidden_layers + 1))
        if arguments.decoding == "moba":
            raise ValueError("--decoding=moba with full attention of the prompt; leave it out")
    if arguments.decoding is not None:
        options["decoding"] = arguments.decoding
    return options


class _Printer:
    """Writes tokens to the terminal as text, as soon as they are whole characters."""

    def __init__(self, decode, end: list[int]):
        self._decode, self._end = decode, end
        self._pending: list[int] = []
        self._written = ""
        self.times: list[float] = []
        """When each token came."""

    def add(self, token: int) -> None:
        """The next token."""
        self.times.append(time.perf_counter())
        if token in self._end:
            return
        self._pending.append(token)
        text = self._text()
        # A character of several tokens is not whole yet.
        if not text.endswith("\ufffd"):
            self._write(text)
            if text.endswith("\n") or len(self._pending) >= _PENDING_TOKENS:
                # Some tokenizers' first token loses its space.
                self._pending = self._pending[-1:]
                self._written = self._text()

    def close(self) -> None:
        """Write what is left, and end the line."""
        self._write(self._text())
        sys.stdout.write("\n")
        sys.stdout.flush()

    def _text(self) -> str:
        import numpy as np

        return self._decode(np.array(self._pending, np.int64))

    def _write(self, text: str) -> None:
        sys.stdout.write(text[len(self._written) :].encode("utf-8", "replace").decode())
        sys.stdout.flush()
        self._written = text


def _summary(n_prompt: int, times: list[float], begun: float, device) -> str:
    first = times[0] - begun
    line = f"prompt: {n_prompt:,} tokens in {first:.2f} s; answer: {len(times)} tokens"
    if len(times) > 1:
        line += f", {(len(times) - 1) / (times[-1] - times[0]):.1f} a second"
    if device.type == "cuda":
        import torch

        line += f"; at most {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    return line
