"""What a file that is no safetensors file looks like, by its first bytes."""

__all__ = ["looks_like"]

_STARTS = (
    (b"PK\x03\x04", "a zip archive, perhaps PyTorch weights (a pickle, which can run code)"),
    (b"\x80", "a Python pickle, which can run code when it is opened"),
    (b"version https://git-lfs", "a pointer of Git LFS: the file itself was not downloaded"),
    (b"<", "HTML or XML, perhaps an error page saved under this name"),
    (b"\x89PNG", "a PNG picture"),
    (b"\xff\xd8\xff", "a JPEG picture"),
    (b"GGUF", "a GGUF model"),
    (b"{", "JSON text"),
)


def looks_like(start: bytes) -> str:
    """A guess from the first bytes of a file, 23 or more of them; "" if they tell nothing."""
    return next((what for magic, what in _STARTS if start.lstrip().startswith(magic)), "")
