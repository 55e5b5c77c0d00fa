"""libnftables by ctypes: transactions of nft commands without starting a process (2 ms each otherwise).

A context's netlink socket acts in the network namespace in which its thread was when the context was made; a context
belongs to one thread.
"""

from __future__ import annotations

import ctypes
import errno
import functools
from typing import Self

from netnsd.errors import HostUnfit, KernelError

_LIBRARY = "libnftables.so.1"


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(_LIBRARY, use_errno=True)
    except OSError as error:
        raise HostUnfit(f"{_LIBRARY} cannot be loaded: {error}", hint="apt install nftables") from error
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    library.nft_ctx_free.argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).restype = ctypes.c_char_p
        getattr(library, name).argtypes = [ctypes.c_void_p]
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    library.nft_ctx_output_set_flags.argtypes = [ctypes.c_void_p, ctypes.c_uint]
    return library


class Nft:
    """One libnftables context. Use it in one thread, and close it."""

    # NFT_CTX_OUTPUT_* of nftables/libnftables.h.
    JSON = 1 << 4
    NUMERIC_PROTO = 1 << 7
    TERSE = 1 << 11

    def __init__(self) -> None:
        self._library = _library()
        self._context = self._library.nft_ctx_new(0)
        if not self._context:
            raise KernelError.at("nftables", OSError(errno.ENOMEM, ""))
        self._library.nft_ctx_buffer_output(self._context)
        self._library.nft_ctx_buffer_error(self._context)

    def close(self) -> None:
        """Free the context and its socket."""
        self._library.nft_ctx_free(self._context)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def run(self, commands: str, *, output_flags: int = 0) -> str:
        """Run commands as one transaction, all or nothing, and return what they print.

        Raises NftError with what nft says.
        """
        self._library.nft_ctx_output_set_flags(self._context, output_flags)
        status = self._library.nft_run_cmd_from_buffer(self._context, commands.encode())
        output = (self._library.nft_ctx_get_output_buffer(self._context) or b"").decode(errors="replace")
        said = (self._library.nft_ctx_get_error_buffer(self._context) or b"").decode(errors="replace")
        if status != 0:
            raise NftError(said)
        return output


class NftError(KernelError):
    """nftables refused a transaction; nothing of it was done. ``said`` is its first line."""

    def __init__(self, said: str) -> None:
        self.said = said
        first = said.strip().splitlines()[0] if said.strip() else "refused"
        super().__init__(f"nftables: {first.removeprefix('/dev/stdin:')}", stage="nftables", errno="",
                         hint="`netnsctl doctor` checks what this host lacks.")

    @property
    def is_missing(self) -> bool:
        """Whether what should be listed or deleted is not there."""
        return "No such file or directory" in self.said

    @property
    def exists(self) -> bool:
        """Whether what should be created is there already."""
        return "File exists" in self.said
