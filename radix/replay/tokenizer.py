"""Tokenizers for text traces; tiktoken is imported when one is asked for."""

from __future__ import annotations

from radix.replay.readers import Encode
from seqattn.errors import BadValueError, MissingExtraError, SeqAttnError

__all__ = ["load_tokenizer"]


def load_tokenizer(name: str) -> Encode:
    """The encoder of a tiktoken encoding (`cl100k_base`, or one that a `tiktoken_ext` plug-in brings).

    Text that spells a special token is encoded as the text that it is: a trace quotes whatever people wrote. tiktoken
    downloads the published encodings at first use and keeps them in `TIKTOKEN_CACHE_DIR`.

    Raises:
        MissingExtraError: tiktoken is not installed.
        BadValueError: tiktoken knows no such encoding.
        SeqAttnError: it cannot be loaded: the download fails, or is not what was published.
    """
    try:
        import tiktoken
    except ImportError as error:
        raise MissingExtraError("cli", "tiktoken") from error
    if name not in tiktoken.list_encoding_names():
        known = ", ".join(tiktoken.list_encoding_names())
        raise BadValueError(f"tiktoken knows no encoding {name!r}: use one of {known}")
    try:
        return tiktoken.get_encoding(name).encode_ordinary
    # Requests' errors are OSErrors; a wrong checksum is a ValueError.
    except (OSError, ValueError) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        advice = "check the connection, or put the file into TIKTOKEN_CACHE_DIR"
        raise SeqAttnError(f"the encoding {name!r} cannot be loaded: {advice} ({reason})") from error
