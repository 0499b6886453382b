"""Decodes captions: UTF-8, or UTF-16 and UTF-32 that say so with a byte order mark.

Anything else is refused by name rather than guessed: Latin-1, Windows-1252 and Mac Roman are the
same bytes for other words, and training would learn them.
"""

from __future__ import annotations

import codecs

from anyflow_deploy.errors import AnyFlowError

_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),  # begins as UTF-16's does
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


def decode_caption(data: bytes, name: str) -> str:
    """Decode a caption, without white space around it.

    Args:
        data: the file's bytes.
        name: of the file, for messages.

    Raises:
        AnyFlowError: bytes that are no text in these encodings.
    """
    mark, encoding = next((pair for pair in _MARKS if data.startswith(pair[0])), (b"", "utf-8"))
    try:
        text = data[len(mark) :].decode(encoding)
    except UnicodeDecodeError as error:
        if mark and encoding != "utf-8":
            raise AnyFlowError(
                f"the caption {name} begins as {encoding.upper()[:6]} and is none at byte"
                f" {error.start + len(mark)}: it is damaged. Write it again as UTF-8."
            ) from None
        raise AnyFlowError(
            f"the caption {name} is not UTF-8 (byte {data[error.start]:#04x} at {error.start}), but"
            " perhaps Latin-1 or Windows-1252. Convert it: iconv -f WINDOWS-1252 -t UTF-8."
        ) from None
    if "\0" in text:
        raise AnyFlowError(
            f"the caption {name} holds NUL characters: perhaps UTF-16 without its byte order mark."
            " Convert it: iconv -f UTF-16LE -t UTF-8."
        )
    return text.strip()
