"""A checked run: everything that can be computed, and refused, before it starts."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..cp.layout import rank_segments
from ..data.packing import PackedSequence, Packer, pad_documents, pad_end
from ..data.text import VOCABULARY, Corpus, open_corpus
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
    corpus: Corpus

    @property
    def data_size(self) -> int:
        """Ranks, or groups of ranks, that work on different sequences."""
        return self.size // self.context_size

    @property
    def tokens_per_step(self) -> int:
        """Tokens of all sequences of one optimizer step, without padding."""
        return self.config.data.seq_len * self.config.data.sequences_per_step

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
        parameters = model.n_parameters(embeddings=True)
        tokens = config.run.steps * self.tokens_per_step
        epochs = tokens / corpus.training_bytes
        flops = self.flops_per_token() * self.tokens_per_step
        state = human(parameters * _BYTES_PER_PARAMETER / self.size, "B", 1024)
        return [
            f"model: {human(parameters, 'parameters')}, {model.n_layers} layers, full attention in {full or 'none'}",
            *self._schedule(),
            f"data: {corpus.source}: {len(corpus.training)} documents, {human(corpus.training_bytes, 'B')} "
            f"to train on; {len(corpus.validation)} documents, {human(corpus.validation_bytes, 'B')} for validation",
            *self._remarks_on_data(),
            f"ranks: {self.size} = {self.data_size} data x {self.context_size} context, "
            f"{self.tokens_per_rank()} tokens of a sequence on each",
            f"step: {data.sequences_per_step} x {data.seq_len} = {self.tokens_per_step} tokens, {human(flops, 'FLOP')}",
            f"run: {config.run.steps} steps = {human(tokens, 'tokens')} = {epochs:.2f} epochs, "
            f"into {config.run.directory}",
            f"memory: {state} per rank for weights, gradients and optimizer state, plus activations",
        ]

    def first_text(self, length: int = 200) -> str:
        """The first characters of the first training sequence, escaped; they show a wrong path or pattern at once."""
        tokens = Packer(self.corpus.training, self.config.data.seq_len, self.config.run.seed).sequence(0).tokens
        text = bytes(tokens[: 4 * length].tolist()).decode("utf-8", "replace")
        return repr(text[:length])

    def _remarks_on_data(self) -> list[str]:
        """Which files were left out, and which are trained on in a way that may not be meant."""
        corpus, lines = self.corpus, []
        if corpus.left_out:
            kinds = ", ".join(f"{count} {kind}" for kind, count in corpus.left_out)
            total = sum(count for _, count in corpus.left_out)
            lines.append(f"left out: {total} files that are no text ({kinds}); data.not_text decides")
        if corpus.json_lines:
            lines.append(
                f"note: {corpus.json_lines} files hold JSON lines; their keys, quotes and escapes are trained on too, "
                "as bytes: write their text into files to avoid that"
            )
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


def plan_run(config: TrainConfig, size: int) -> RunPlan:
    """Check ``config`` for ``size`` ranks and open its data; nothing is written.

    Raises:
        ValueError: sections that do not fit together, the number of ranks, or the data.
    """
    model, data = config.model, config.data
    if model.vocab_size < VOCABULARY:
        raise ValueError(f"model.vocab_size={model.vocab_size} is below {VOCABULARY}: the tokens are bytes")
    try:
        config.attention.full_layer_numbers(model.n_layers)
        config.attention.at(1, config.run.steps)
    except ValueError as error:
        raise ValueError(f"attention.{error}") from None
    context = context_size(config.run, size)
    data_size = size // context
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
    _check_length(config, context)
    return RunPlan(config, size, context, open_corpus(data, Path(config.run.directory)))


def _check_length(config: TrainConfig, context: int) -> None:
    layout, seq_len = config.attention.layout, config.data.seq_len
    if layout == "zigzag_per_document" or config.data.pad_to_multiple:
        return
    try:
        rank_segments(layout, seq_len, context, np.array([0, seq_len]))
    except ValueError as error:
        raise ValueError(f"data.{error} or set data.pad_to_multiple: true") from None
