"""``moba-cp data show PREFIX``: what tokenized data holds, and what is in a sequence of it."""

import argparse

_SHOWN = 300


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("prefix", metavar="PREFIX", help="of PREFIX.bin and PREFIX.idx")
    parser.add_argument("--document", type=int, metavar="N", help="print this document, counted from 0")
    parser.add_argument("--sequence", type=int, metavar="N", help="print this sequence of training, counted from 0")
    parser.add_argument("--seq-len", type=int, default=4096, metavar="T", help="tokens of a sequence (default: 4096)")
    parser.add_argument("--packing", choices=("stream", "best_fit"), default="stream", help="as data.packing")
    parser.add_argument("--seed", type=int, default=0, help="as run.seed (default: 0)")
    parser.add_argument("--tokenizer", metavar="PATH", help="to decode with (default: the one it was built with)")
    parser.add_argument("--all", action="store_true", help="print texts whole, not their beginnings and ends")


def main(arguments: argparse.Namespace) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError, OSError: what the user should read.
    """
    from .indexed import IndexedDocuments, prefix_of

    prefix = prefix_of(arguments.prefix)
    if prefix is None:
        raise ValueError(f"{arguments.prefix}: no {arguments.prefix}.idx there; moba-cp data build makes it")
    documents = IndexedDocuments(prefix)
    decode = _decoder(documents, arguments.tokenizer)
    text = lambda tokens: _shortened(decode(tokens), arguments.all)
    if arguments.document is not None:
        if not 0 <= arguments.document < len(documents):
            raise ValueError(f"--document={arguments.document}: there are {len(documents)}, counted from 0")
        length = int(documents.lengths[arguments.document])
        print(f"document {arguments.document}: {length:,} tokens from token {documents.starts[arguments.document]:,}")
        print(text(documents.read(arguments.document, 0, length)))
    if arguments.sequence is not None:
        _show_sequence(arguments, documents, text)
    if arguments.document is None and arguments.sequence is None:
        print(*_summary(documents), sep="\n")
        if len(documents):
            print(f"document 0: {text(documents.read(0, 0, int(documents.lengths[0])))}")
    return 0


def _summary(documents) -> list[str]:
    lengths, told = documents.lengths, documents.description
    lines = [f"{documents.prefix}: {len(documents):,} documents, {documents.n_tokens:,} tokens of {documents.dtype}"]
    if len(documents):
        lines.append(f"lengths: {lengths.min():,} to {lengths.max():,} tokens, {lengths.mean():,.0f} in the mean")
    if told:
        tokens = told["tokens"]
        lines.append(f"tokens: {tokens['name']}, vocabulary {tokens['vocab_size']:,}, end token {tokens['end']}")
        lines.append(
            f"text: {told['text_bytes']:,} bytes, {told['bytes_per_token']} per token, of {', '.join(told['inputs'])}"
        )
        lines += ["a mask says of which tokens a loss is taken"] if told["mask"] else []
    return lines


def _show_sequence(arguments: argparse.Namespace, documents, text) -> None:
    if arguments.sequence < 0:
        raise ValueError(f"--sequence={arguments.sequence} is below 0; they are counted from 0")
    # Packing is PyTorch's: its import waits until a sequence is asked for.
    from .corpus import open_prefix
    from .packing import Packer

    packer = Packer(open_prefix(documents), arguments.seq_len, arguments.seed, packing=arguments.packing)
    sequence = packer.sequence(arguments.sequence)
    print(
        f"sequence {arguments.sequence} of {packer.per_epoch:,} in an epoch: {len(sequence.pieces)} pieces of documents"
    )
    tokens, labels = sequence.read()
    for piece, begin in zip(sequence.pieces, sequence.cu_seqlens.tolist()):
        held = labels[begin : begin + piece.length]
        print(f"[{begin:,}, {begin + piece.length:,}) document {piece.document} from token {piece.start:,}, "
              f"{int((held >= 0).sum()):,} labels: {text(tokens[begin : begin + piece.length].numpy())}")  # fmt: skip


def _decoder(documents, path: str | None):
    from .encode import ByteEncoder, TokenizerEncoder

    copied = documents.prefix.with_name(documents.prefix.name + ".tokenizer")
    if path is None and not copied.is_dir():
        if documents.description.get("tokens", {}).get("name") == "bytes":
            return ByteEncoder().decode
        return lambda tokens: " ".join(map(str, tokens.tolist()))
    return TokenizerEncoder(path or copied).decode


def _shortened(text: str, whole: bool) -> str:
    if whole or len(text) <= _SHOWN:
        return repr(text) if not whole else text
    return f"{text[: _SHOWN // 2]!r} ... {text[-_SHOWN // 2 :]!r}"
