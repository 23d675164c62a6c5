"""MoBA's flags in Megatron-LM's argument parser.

args = parse_and_validate_args(extra_args_provider=add_moba_args)
"""

import argparse
from typing import get_args

from ..config import SCORES, SHARINGS
from ..cp.options import MODES, ExchangeOptions
from ..index.config import IndexConfig, Score
from ..model.attention import KEY_CONV_WIDTHS, AttentionConfig

_DEFAULT = AttentionConfig()


def add_moba_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add ``--moba-*``; an ``extra_args_provider`` of Megatron-LM's ``parse_args``.

    It also lets ``--help`` work, which megatron-core 0.19 breaks by a ``%`` in texts of its own.
    """
    if parser.formatter_class is argparse.HelpFormatter:
        parser.formatter_class = _HelpFormatter
    group = parser.add_argument_group("MoBA")
    group.add_argument("--moba-block-size", type=int, default=_DEFAULT.block_size, metavar="B",
                       help="Tokens per key/value block, a multiple of 16 (default: %(default)s).")  # fmt: skip
    group.add_argument("--moba-top-k", type=int, default=_DEFAULT.top_k, metavar="K",
                       help="Blocks each query attends to, with its current block (default: %(default)s).")  # fmt: skip
    group.add_argument("--moba-full-layers", nargs="+", default=["none"], metavar="LAYER",
                       help="Layers with full attention: 'none', 'all', 'last N', or layer numbers counted from 1 "
                       "through the whole model (default: none).")  # fmt: skip
    group.add_argument("--moba-index-heads", type=int, default=None, metavar="N",
                       help="Let a trained index branch choose blocks for each KV head's group, with so many queries "
                       "(default: no index branch).")  # fmt: skip
    group.add_argument("--moba-index-dim", type=int, default=IndexConfig.dim, metavar="D",
                       help="Width of its queries and keys, a divisor of the head dim "
                       "(default: %(default)s).")  # fmt: skip
    group.add_argument("--moba-index-score", choices=get_args(Score), default=IndexConfig.score,
                       help="A block's score: of its mean key, or the highest of its keys "
                       "(default: %(default)s).")  # fmt: skip
    group.add_argument("--moba-index-warm-up", action="store_true",
                       help="Attend fully in all layers while index branches learn; go on from the checkpoint without "
                       "this flag.")  # fmt: skip
    group.add_argument("--moba-deterministic", action="store_true",
                       help="Bit-identical results from run to run, at some cost in the backward pass.")  # fmt: skip
    group.add_argument("--moba-shared-by-group", choices=SHARINGS, default=_DEFAULT.shared_by_group,
                       help="Whether the query heads of a KV head attend to the same blocks, those with the highest "
                       "sum, or maximum, of their scores (default: %(default)s).")  # fmt: skip
    group.add_argument("--moba-score", choices=SCORES, default=_DEFAULT.score,
                       help="A block's score: by its mean key, or by the best of its keys, which is half the products "
                       "of full attention's forward pass (default: %(default)s).")  # fmt: skip
    group.add_argument("--moba-min-recent", type=int, default=_DEFAULT.min_recent, metavar="N",
                       help="So many blocks before a query's own are always taken, within --moba-top-k "
                       "(default: %(default)s).")  # fmt: skip
    group.add_argument("--moba-sink", action="store_true",
                       help="The document's first block is always taken, within --moba-top-k.")  # fmt: skip
    group.add_argument("--moba-key-conv", type=int, choices=KEY_CONV_WIDTHS, default=_DEFAULT.key_conv,
                       help="Width of a causal convolution over keys, trained with the model; 0 for none "
                       "(default: %(default)s).")  # fmt: skip
    group.add_argument("--moba-exchange", choices=MODES, default=ExchangeOptions.mode,
                       help="What moves between context-parallel ranks: selected blocks (kv), query rows (query), per "
                       "block whichever is fewer bytes, or all where a node's copy engines bring it behind attention "
                       "(auto), or all (allgather), or tokens for heads (heads); default: %(default)s.")  # fmt: skip
    group.add_argument("--moba-head-ranks", type=int, default=None, metavar="N",
                       help="Exchange tokens for heads among every N consecutive context-parallel ranks; "
                       "--moba-exchange says what moves between the others (default: all with heads; with auto, by "
                       "predicted time, on one node all or none, on several none, some or all of a node, or all; else "
                       "none).")  # fmt: skip
    group.add_argument("--moba-ranks-per-node", type=int, default=None, metavar="N",
                       help="Context-parallel ranks that share a node, so that a block several of them need crosses "
                       "the network once (default: by LOCAL_WORLD_SIZE, where a launcher has set it; 1: every rank for "
                       "itself).")  # fmt: skip
    group.add_argument("--moba-no-copy-engines", action="store_true",
                       help="All-gather by NCCL, also where the GPUs map each other's memory (default: by their copy "
                       "engines, whose buffers PyTorch's allocator does not count).")  # fmt: skip
    return parser


class _HelpFormatter(argparse.HelpFormatter):
    """Prints a help text as it is where a ``%`` in it is no placeholder."""

    def _expand_help(self, action):
        try:
            return super()._expand_help(action)
        except (ValueError, TypeError, KeyError):
            return self._get_help_string(action)


def attention_from_args(args: argparse.Namespace) -> AttentionConfig:
    """The configuration that the flags of :func:`add_moba_args` ask for.

    Raises:
        ValueError: the parser did not know the flags, or one is out of range.
    """
    if not hasattr(args, "moba_block_size"):
        raise ValueError(
            "args.moba_block_size is missing: this trainer's parser does not know MoBA's flags; pass "
            "extra_args_provider=moba_cp.megatron.add_moba_args to it, train with moba_cp.megatron.pretrain, or name a "
            "spec of your own, made with moba_cp.megatron.layer_spec(AttentionConfig(...)), in --spec"
        )
    words = [str(word) for word in args.moba_full_layers]
    kinds = {"default": "full"} if words == ["all"] else {"full_layers": _full_layers(words)}
    return AttentionConfig(
        block_size=args.moba_block_size,
        top_k=args.moba_top_k,
        deterministic=args.moba_deterministic,
        shared_by_group=args.moba_shared_by_group,
        score=args.moba_score,
        min_recent=args.moba_min_recent,
        sink=args.moba_sink,
        index=_index(args),
        key_conv=args.moba_key_conv,
        **(kinds | ({"default": "full"} if args.moba_index_warm_up else {})),
    )


def _index(args: argparse.Namespace) -> IndexConfig | None:
    if args.moba_index_heads is not None:
        return IndexConfig(args.moba_index_heads, args.moba_index_dim, args.moba_index_score)
    if args.moba_index_warm_up:
        raise ValueError("--moba-index-warm-up without an index branch; add --moba-index-heads, such as 4")
    return None


def _full_layers(words: list[str]) -> str | list[int]:
    words = [word for part in words for word in part.replace(",", " ").split()]
    return [int(word) for word in words] if all(word.isdigit() for word in words) else " ".join(words)


def options_of_trainer() -> tuple[AttentionConfig, ExchangeOptions]:
    """What the arguments of Megatron-LM's trainer in this process ask for.

    Raises:
        ValueError: there is no such trainer, or its arguments do not fit.
    """
    try:
        from megatron.training.global_vars import get_args

        args = get_args()
    except (ImportError, AssertionError) as error:
        raise ValueError(
            f"moba_layer_spec is configured by the arguments of Megatron-LM's trainer, but there are none ({error}); "
            "outside of it use moba_cp.megatron.layer_spec(AttentionConfig(...))"
        ) from error
    return attention_from_args(args), ExchangeOptions(
        args.moba_exchange,
        args.moba_head_ranks,
        ranks_per_node=args.moba_ranks_per_node,
        copy_engines=not args.moba_no_copy_engines,
    )
