"""A checked run: everything that can be computed, and refused, before it starts."""

import math
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from torch import Tensor

from ..cp.layout import rank_segments
from ..data.corpus import Corpora, open_corpora
from ..data.encode import TokenizerEncoder
from ..data.packing import Mixer, PackedSequence, Packer, pad_documents, pad_end
from ..model.attention import AttentionConfig
from ..model.schedule import phase_ends
from .config import TrainConfig
from .log import human
from .mesh import context_size, divisors

# Weight, gradient and the two moments of AdamW, in float32.
_BYTES_PER_PARAMETER = 16


@dataclass(frozen=True)
class RunPlan:
    """A checked config on a given number of ranks."""

    config: TrainConfig
    size: int
    """Ranks."""
    context_size: int
    """Ranks that share a sequence."""
    corpus: Corpora

    @property
    def data_size(self) -> int:
        """Ranks, or groups of ranks, that work on different sequences."""
        return self.size // self.context_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all sequences of one optimizer step, without padding."""
        return self.config.data.seq_len * self.config.data.sequences_per_step

    @cached_property
    def training_sequences(self) -> Mixer:
        """The sequences to train on, by their number from 0 on."""
        corpora = self.corpus
        packers = [self._packer(part.training, self.config.run.seed) for part in corpora.parts]
        return Mixer(packers, corpora.weights, self.config.run.seed)

    @cached_property
    def validation_sequences(self) -> Mixer | None:
        """The sequences to validate on, the same in every run; None without any."""
        parts = self.corpus.validation
        if not parts:
            return None
        weights = self.corpus.weights if len(parts) > 1 else (1.0,)
        return Mixer([self._packer(part.validation, 0) for part in parts], weights, 0)

    def _packer(self, documents, seed: int) -> Packer:
        data = self.config.data
        return Packer(documents, data.seq_len, seed, data.packing, data.overlap, data.attend_across)

    def check_tokens(self, tokens: Tensor) -> None:
        """Raise ValueError unless ``tokens`` (on the CPU) are in the model's vocabulary."""
        if tokens.numel() and (most := int(tokens.max())) >= self.config.model.vocab_size:
            raise ValueError(
                f"data: token {most} is beyond model.vocab_size={self.config.model.vocab_size}; set it to the size of "
                f"the tokenizer of {self.corpus.source}"
            )

    def fit(self, sequence: PackedSequence) -> PackedSequence:
        """The sequence padded, where the layout asks for it, to lengths that divide among the ranks."""
        layout, size = self.config.attention.layout, self.context_size
        if layout == "zigzag_per_document":
            return pad_documents(sequence, 2 * size)
        if self.config.data.pad_to_multiple:
            return pad_end(sequence, size if layout == "contiguous" else 2 * size)
        return sequence

    def summary(self) -> list[str]:
        """Lines for the terminal that describe the run."""
        config, corpus = self.config, self.corpus
        model, data, attention = config.model, config.data, config.attention
        full = sorted(attention.full_layer_numbers(model.n_layers))
        of_index = attention.index_parameters(model.n_layers, model.n_kv_heads, model.hidden_size)
        of_keys = attention.key_conv_parameters(model.n_layers, model.n_kv_heads, model.head_dim)
        parameters = model.n_parameters_with(attention)
        tokens = config.run.steps * self.tokens_per_step
        flops = self.flops_per_token() * self.tokens_per_step
        state = human(parameters * _BYTES_PER_PARAMETER / self.size, "B", 1024)
        return [
            f"model: {human(parameters, 'parameters')}, {model.n_layers} layers, full attention in {full or 'none'}"
            + (f", {human(of_index, 'parameters')} of them in index branches" if of_index else "")
            + (f", {human(of_keys, 'parameters')} of them in convolutions over keys" if of_keys else ""),
            *self._schedule(),
            *self._coverage(),
            *self._data_lines(),
            f"ranks: {self.size} = {self.data_size} data x {self.context_size} context, "
            f"{self.tokens_per_rank()} tokens of a sequence on each",
            f"step: {data.sequences_per_step} x {data.seq_len} = {self.tokens_per_step} tokens, {human(flops, 'FLOP')}",
            f"run: {config.run.steps} steps = {human(tokens, 'tokens')} = {tokens / corpus.n_training:.2f} epochs, "
            f"into {config.run.directory}",
            f"memory: {state} per rank for weights, gradients and optimizer state, plus activations",
        ]

    def first_text(self, length: int = 200) -> str:
        """The first characters of the first training sequence, escaped; they show a wrong path or pattern at once."""
        tokens, _ = self.training_sequences.sequence(0).read([(0, min(self.config.data.seq_len, 4 * length))])
        if self.corpus.unit == "bytes":
            return repr(bytes(tokens.tolist()).decode("utf-8", "replace")[:length])
        corpus, _ = self.training_sequences.place(0)
        folder = self.corpus.parts[corpus].tokenizer
        if folder is None:
            return "tokens " + " ".join(map(str, tokens[:20].tolist()))
        return repr(TokenizerEncoder(folder).decode(tokens)[:length])

    def _data_lines(self) -> list[str]:
        """What is read, by corpus, and how it is packed."""
        data, corpora, lines = self.config.data, self.corpus, []
        for part, weight in zip(corpora.parts, corpora.weights):
            held_out = (
                f"{len(part.validation.lengths)} documents, {_amount(part.n_validation, part.unit)} for validation"
            )
            share = f"{100 * weight:.1f} % of " if len(corpora.parts) > 1 else ""
            lines.append(
                f"data: {share}{part.source}: {len(part.training.lengths)} documents, "
                f"{_amount(part.n_training, part.unit)} to train on; "
                + (f"validation on {data.validation_path}" if data.validation_path is not None else held_out)
            )
            lines += part.remarks
        if data.packing == "best_fit":
            packers = self.training_sequences.packers
            waste = sum(weight * packer.waste for weight, packer in zip(corpora.weights, packers))
            cut = sum(packer.n_cut for packer in packers)
            lines.append(f"packing: best fit, {100 * waste:.2f} % padding; {cut} documents longer than seq_len are cut")
        return lines

    def tokens_per_rank(self) -> int:
        """Tokens of a sequence on one context rank, with the padding at the end but without that of documents."""
        multiple = self.context_size if self.config.attention.layout == "contiguous" else 2 * self.context_size
        return -(-self.config.data.seq_len // multiple) * multiple // self.context_size

    def _phases(self) -> list[tuple[int, int, AttentionConfig]]:
        """First step, last step and attention of every phase; one phase without a schedule."""
        attention, steps = self.config.attention, self.config.run.steps
        ends = phase_ends(attention.schedule, steps) or [steps]
        return [(begin + 1, end, attention.at(end, steps)) for begin, end in zip([0, *ends], ends)]

    def flops_per_token(self) -> float:
        """FLOPs of training on one token, averaged over the run."""
        model, seq_len, steps = self.config.model, self.config.data.seq_len, self.config.run.steps
        return sum((b - a + 1) / steps * model.flops_per_token(seq_len, x) for a, b, x in self._phases())

    def utilization(self, attention: AttentionConfig, tokens_per_second: float, peak: float | None) -> dict[str, float]:
        """Model FLOPs utilization: the share of what the ranks' devices could compute at ``peak`` FLOP/s each that was
        useful, and what it would be had all layers computed full attention. Empty where the peak is not known."""
        if peak is None:
            return {}
        model, seq_len = self.config.model, self.config.data.seq_len
        flops = {"mfu": attention, "mfu_as_if_dense": replace(attention, default="full", schedule=())}
        per_second = tokens_per_second / (peak * self.size)
        return {name: round(model.flops_per_token(seq_len, x) * per_second, 4) for name, x in flops.items()}

    def _schedule(self) -> list[str]:
        if not self.config.attention.schedule:
            return []
        return ["schedule: " + ", ".join(f"{x.default} in steps {a} to {b}" for a, b, x in self._phases())]

    def _coverage(self) -> list[str]:
        """That MoBA is full attention here, where its blocks cover the sequence."""
        attention, seq_len = self.config.attention, self.config.data.seq_len
        sparse = any(x.default == "moba" for *_, x in self._phases())
        if not sparse or attention.top_k * attention.block_size < seq_len:
            return []
        return [
            f"note: attention.top_k={attention.top_k} blocks of {attention.block_size} cover data.seq_len={seq_len}: "
            "MoBA layers attend to everything"
        ]


def _amount(tokens: int, unit: str) -> str:
    return human(tokens, "B" if unit == "bytes" else "tokens")


def plan_run(config: TrainConfig, size: int) -> RunPlan:
    """Check ``config`` for ``size`` ranks and open its data; nothing is written.

    Raises:
        ValueError: sections that do not fit together, the number of ranks, or the data.
    """
    config, context = check_ranks(config, size)
    corpora = open_corpora(config.data, Path(config.run.directory))
    for part in (*corpora.parts, *corpora.validation):
        if part.vocab_size is not None:
            _check_vocabulary(config, part.vocab_size, part.unit)
    return RunPlan(config, size, context, corpora)


def check_ranks(config: TrainConfig, size: int) -> tuple[TrainConfig, int]:
    """``config`` with the sequences of a step that ``size`` ranks have, and how many of these share a sequence.

    Raises:
        ValueError: sections that do not fit together, or the number of ranks.
    """
    model = config.model
    try:
        config.attention.full_layer_numbers(model.n_layers)
        if config.attention.index is not None:
            config.attention.index.check_head_dim(model.head_dim)
        config.attention.at(1, config.run.steps)
    except ValueError as error:
        raise ValueError(f"attention.{error}") from None
    context = context_size(config.run, size)
    data_size = size // context
    config = _with_accumulation(config, data_size)
    data = config.data
    if data.sequences_per_step % data_size:
        raise ValueError(
            f"data.sequences_per_step={data.sequences_per_step} is not divisible by the {data_size} data ranks "
            f"({size} ranks / run.context_size={context}); use {-(-data.sequences_per_step // data_size) * data_size}"
        )
    per_node = config.exchange.ranks_per_node
    if per_node is not None and context % per_node:
        raise ValueError(
            f"exchange.ranks_per_node={per_node} does not divide the {context} context ranks; "
            f"use one of {divisors(context)}, or null to go by the launcher"
        )
    _check_heads(config, context)
    _check_length(config, context)
    return config, context


def _check_vocabulary(config: TrainConfig, vocab_size: int, unit: str) -> None:
    if config.model.vocab_size < vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size} is below {vocab_size}: "
            + ("the tokens are bytes" if unit == "bytes" else "that is the vocabulary of the data's tokenizer")
        )


def _with_accumulation(config: TrainConfig, data_size: int) -> TrainConfig:
    """The config with ``sequences_per_step`` as ``gradient_accumulation`` has it on so many data ranks."""
    data = config.data
    if data.gradient_accumulation is None:
        return config
    per_step = data.gradient_accumulation * data_size
    if data.sequences_per_step not in (1, per_step):
        raise ValueError(
            f"data.sequences_per_step={data.sequences_per_step} and data.gradient_accumulation="
            f"{data.gradient_accumulation} on {data_size} data ranks ask for different steps; leave one of them out"
        )
    return replace(config, data=replace(data, sequences_per_step=per_step))


def _check_heads(config: TrainConfig, context: int) -> None:
    """Raise ValueError unless tokens can be exchanged for heads as ``exchange`` asks for."""
    options, n_heads = config.exchange, config.model.n_heads
    if options.mode == "heads" and options.head_ranks not in (None, context):
        raise ValueError(
            f"exchange.head_ranks={options.head_ranks} with mode=heads, which is for all {context} context ranks; "
            "leave head_ranks out, or use mode auto"
        )
    named = "mode=heads" if options.mode == "heads" else f"head_ranks={options.head_ranks}"
    h = context if options.mode == "heads" else options.head_ranks or 1
    if context % h or n_heads % h:
        fits = divisors(math.gcd(context, n_heads))
        raise ValueError(
            f"exchange.{named}: {h} ranks are to exchange tokens for heads, and have to divide the {context} context "
            f"ranks and the {n_heads} query heads; use mode auto, and head_ranks one of {fits}, or null"
        )


def _check_length(config: TrainConfig, context: int) -> None:
    layout, seq_len = config.attention.layout, config.data.seq_len
    if layout == "zigzag_per_document" or config.data.pad_to_multiple:
        return
    try:
        rank_segments(layout, seq_len, context, np.array([0, seq_len]))
    except ValueError as error:
        raise ValueError(f"data.{error} or set data.pad_to_multiple: true") from None
