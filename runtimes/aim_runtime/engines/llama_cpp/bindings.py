"""llama.cpp in three small classes: model, context, batch. The only file that imports ``llama_cpp``.

Import it late, in the loading thread: the library takes some 0.3 s. Nothing here is thread-safe but the model's
vocabulary: a context and its batches belong to one thread.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import llama_cpp as lib
import numpy as np

from .parking import State
from .sampling import Logits, TokenIds
from .special_tokens import SpecialTokens

# Where ggml gives up it would call gdb for a stack, which buries the reason it gave and delays the end.
os.environ.setdefault("GGML_NO_BACKTRACE", "1")

logger = logging.getLogger("aim.engine.llama_cpp")

#: llama_decode's answer when the cache has no room for the batch; the cache is then as it was before.
NO_KV_SLOT = 1
_LEVELS = {4: logging.ERROR}  # ggml_log_level; its warnings are chatter to an operator
_CONTINUES = 5
#: What llama.cpp looks for in a text before it tokenizes the rest.
_SPECIAL = lib.LLAMA_TOKEN_ATTR_CONTROL | lib.LLAMA_TOKEN_ATTR_USER_DEFINED | lib.LLAMA_TOKEN_ATTR_UNKNOWN


class _Log:
    """Routes llama.cpp's stderr chatter to logging, and remembers errors for the message of a failed load."""

    def __init__(self) -> None:
        self._level = logging.DEBUG
        self.errors: list[str] = []

    def __call__(self, level: int, text: bytes, _user_data: Any) -> None:
        if level != _CONTINUES:
            self._level = _LEVELS.get(level, logging.DEBUG)
        line = text.decode("utf-8", "replace").strip()
        if self._level == logging.ERROR and line:
            self.errors = [*self.errors[-3:], line]
        if line:
            logger.log(min(self._level, logging.WARNING), "llama.cpp: %s", line)


_log = _Log()
_log_callback = lib.llama_log_callback(_log)  # kept alive: C holds no reference
lib.llama_log_set(_log_callback, ctypes.c_void_p(0))
lib.llama_backend_init()


class LlamaError(Exception):
    """llama.cpp refused. The message is its own."""


class LlamaModel:
    """Weights and vocabulary of one GGUF file.

    Raises:
        LlamaError: llama.cpp cannot load the file.
    """

    def __init__(self, path: Path) -> None:
        _log.errors = []
        self._interrupted = False
        self._model = lib.llama_model_load_from_file(str(path).encode(), lib.llama_model_default_params())
        if not self._model:
            raise LlamaError("; ".join(_log.errors) or "llama.cpp gives no reason")
        self._vocab = lib.llama_model_get_vocab(self._model)
        self.vocabulary_size: int = lib.llama_vocab_n_tokens(self._vocab)
        self.trained_context: int = lib.llama_model_n_ctx_train(self._model)
        self.metadata = self._read_metadata()
        ids = range(self.vocabulary_size)
        self.end_tokens = frozenset(token for token in ids if lib.llama_vocab_is_eog(self._vocab, token))
        self._pieces = list(self._every_piece())
        #: Most bytes of text that one token stands for.
        self.token_bytes = max(map(len, self._pieces), default=1)
        self._shown_pieces: dict[int, bytes] = {}
        self._special_tokens = self._find_special_tokens()
        self._head, self._tail = _frame(self._tokenize("a", add_special=True), self._tokenize("a", add_special=False))

    @property
    def bos_text(self) -> str:
        return self._special_text(lib.llama_vocab_bos(self._vocab))

    @property
    def eos_text(self) -> str:
        return self._special_text(lib.llama_vocab_eos(self._vocab))

    @property
    def chat_template(self) -> str | None:
        return self.metadata.get("tokenizer.chat_template")

    @property
    def keeps_prefixes(self) -> bool:
        """Whether a part of a sequence's state can be kept: not so for recurrent models."""
        return not (lib.llama_model_is_recurrent(self._model) or lib.llama_model_is_hybrid(self._model))

    @property
    def kv_bytes_per_token(self) -> int:
        """Cache bytes of one token: layers * KV heads * (key + value length) * 2 (float16)."""
        architecture = self.metadata.get("general.architecture", "")
        heads = lib.llama_model_n_head(self._model)
        length = lib.llama_model_n_embd(self._model) // max(1, heads)
        key = int(self.metadata.get(f"{architecture}.attention.key_length", length))
        value = int(self.metadata.get(f"{architecture}.attention.value_length", length))
        layers, kv_heads = lib.llama_model_n_layer(self._model), lib.llama_model_n_head_kv(self._model)
        return int(layers * kv_heads * (key + value) * 2)

    def tokenize(self, text: str, *, add_special: bool) -> TokenIds:
        """Token ids of ``text`` in linear time. Special tokens written out in it count as such.

        ``add_special``: with the tokens that the model wants at the beginning and the end of a text.
        """
        parts = list(self._special_tokens.parts(text))
        if len(parts) == 1:
            return self._tokenize(text, add_special=add_special)
        tokens = [self._tokenize(part, add_special=False) for part in parts]
        return np.concatenate([self._head, *tokens, self._tail] if add_special else tokens)

    def piece(self, token: int, *, special: bool = False) -> bytes:
        """The bytes a token stands for: part of a character, a word, or nothing (a control token)."""
        if special:
            return self._pieces[token]
        piece = self._shown_pieces.get(token)
        if piece is None:
            piece = self._shown_pieces[token] = self._piece(token, special=False)
        return piece

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``, special tokens written out."""
        return b"".join(self._pieces[token] for token in tokens).decode("utf-8", "replace")

    def new_context(
        self, *, cells: int, slots: int, batch_tokens: int, threads: int, streams: bool = False
    ) -> LlamaContext:
        """A cache of ``cells`` tokens shared by ``slots`` sequences, computed by ``threads`` threads.

        ``streams``: every slot has its own part of the cells (see ``exact``).

        Raises:
            LlamaError: no memory for it, or the model refuses the sizes.
        """
        params = lib.llama_context_default_params()
        params.n_ctx, params.n_seq_max, params.kv_unified = cells, slots, not streams
        params.n_batch = params.n_ubatch = batch_tokens
        params.n_threads = params.n_threads_batch = threads
        params.no_perf = True
        _log.errors = []
        context = lib.llama_init_from_model(self._model, params)
        if not context:
            raise LlamaError("; ".join(_log.errors) or "llama.cpp gives no reason")
        return LlamaContext(context, self.vocabulary_size, batch_tokens, slots, streams=streams)

    def load_adapter(self, path: Path) -> LoadedLora:
        """A LoRA adapter for this model's contexts. While none of them computes: they read the list it is put on.

        Raises:
            LlamaError: llama.cpp refuses it.
        """
        _log.errors = []
        adapter = lib.llama_adapter_lora_init(self._model, str(path).encode())
        if not adapter:
            raise LlamaError("; ".join(_log.errors) or "llama.cpp gives no reason")
        return LoadedLora(adapter)

    def interrupt(self) -> None:
        """Tokenizing stops after the part it is at; its callers get a LlamaError. From any thread."""
        self._interrupted = True

    def close(self) -> None:
        """Free it. No other thread may be using it."""
        model, self._model = self._model, None
        if model:
            lib.llama_model_free(model)

    def _tokenize(self, text: str, *, add_special: bool) -> TokenIds:
        """llama.cpp's own tokens: quadratic in the number of special tokens in ``text``."""
        self._check_open()
        data = text.encode("utf-8", "replace")
        room = len(data) + 2
        tokens = np.empty(room, dtype=np.int32)
        pointer = tokens.ctypes.data_as(ctypes.POINTER(ctypes.c_int32))
        count = lib.llama_tokenize(self._vocab, data, len(data), pointer, room, add_special, True)
        if count < 0:
            raise LlamaError(f"cannot tokenize {len(data)} bytes")
        return tokens[:count].copy()

    def _find_special_tokens(self) -> SpecialTokens:
        attributes = {token: lib.llama_vocab_get_attr(self._vocab, token) for token in range(self.vocabulary_size)}
        texts = {
            lib.llama_vocab_get_text(self._vocab, token).decode("utf-8", "replace"): attribute
            for token, attribute in attributes.items()
            if attribute & _SPECIAL
        }
        strips = any(
            attribute & (lib.LLAMA_TOKEN_ATTR_LSTRIP | lib.LLAMA_TOKEN_ATTR_RSTRIP) for attribute in texts.values()
        )
        glued = (
            text
            for text, attribute in texts.items()
            if strips and (attribute & lib.LLAMA_TOKEN_ATTR_LSTRIP or text[:1].isspace())
        )
        return SpecialTokens(texts, glued)

    def _check_open(self) -> None:
        """llama.cpp would read freed memory."""
        if self._interrupted or not self._model:
            raise LlamaError("the model has been closed")

    def _special_text(self, token: int) -> str:
        return "" if token < 0 else self._piece(token, special=True).decode("utf-8", "replace")

    def _piece(self, token: int, *, special: bool) -> bytes:
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            size = lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, special)
            if size >= 0:
                return buffer.raw[:size]
            room = -size

    def _every_piece(self) -> Iterator[bytes]:
        """Of all tokens, in half the time: one buffer serves all."""
        room = 64
        buffer = ctypes.create_string_buffer(room)
        for token in range(self.vocabulary_size):
            size = lib.llama_token_to_piece(self._vocab, token, buffer, room, 0, True)
            yield buffer.raw[:size] if size >= 0 else self._piece(token, special=True)

    def _read_metadata(self) -> dict[str, str]:
        entries = {}
        for index in range(lib.llama_model_meta_count(self._model)):
            key = _sized_text(lib.llama_model_meta_key_by_index, self._model, index)
            entries[key] = _sized_text(lib.llama_model_meta_val_str_by_index, self._model, index)
        return entries


def _frame(whole: TokenIds, bare: TokenIds) -> tuple[TokenIds, TokenIds]:
    """What ``whole`` has before and after ``bare``."""
    for start in range(len(whole) - len(bare) + 1):
        if np.array_equal(whole[start : start + len(bare)], bare):
            return whole[:start], whole[start + len(bare) :]
    raise LlamaError("the tokenizer changes a text when it adds special tokens to it")


def _sized_text(call: Any, model: Any, index: int) -> str:
    """llama.cpp writes what fits and answers the full length, like snprintf."""
    room = 256
    while True:
        buffer = ctypes.create_string_buffer(room)
        size = call(model, index, buffer, room)
        if size < room:
            return str(buffer.value.decode("utf-8", "replace"))
        room = size + 1


class Batch:
    """Tokens of several sequences for one decode, as numpy arrays that llama.cpp reads in place."""

    def __init__(self, room: int, slots: int) -> None:
        self._tokens = np.zeros(room, np.int32)
        self._positions = np.zeros(room, np.int32)
        self._slot_counts = np.ones(room, np.int32)
        self._wanted = np.zeros(room, np.int8)
        self._slot_table = np.arange(slots, dtype=np.int32)
        self._slot_pointers = np.zeros(room, np.uint64)
        self.room = room
        self.size = 0
        self.raw = lib.llama_batch()
        self.raw.token = _pointer(self._tokens, lib.llama_token)
        self.raw.pos = _pointer(self._positions, lib.llama_pos)
        self.raw.n_seq_id = _pointer(self._slot_counts, ctypes.c_int32)
        self.raw.seq_id = _pointer(self._slot_pointers, ctypes.POINTER(lib.llama_seq_id))
        self.raw.logits = _pointer(self._wanted, ctypes.c_int8)

    def clear(self) -> None:
        self.size = 0

    def add(self, tokens: TokenIds, position: int, slot: int, *, wants_logits: bool, of_all: bool = False) -> int:
        """Append consecutive tokens of one slot. Returns the last one's index, which LlamaContext.logits takes.

        ``wants_logits``: the last one's; ``of_all``: everyone's.
        """
        start, end = self.size, self.size + len(tokens)
        self._tokens[start:end] = tokens
        self._positions[start:end] = np.arange(position, position + len(tokens))
        self._slot_pointers[start:end] = self._slot_table.ctypes.data + self._slot_table.itemsize * slot
        self._wanted[start:end] = of_all
        self._wanted[end - 1] = wants_logits or of_all
        self.size = end
        return end - 1


def _pointer(array: Any, ctype: Any) -> Any:
    return ctypes.cast(array.ctypes.data, ctypes.POINTER(ctype))


class LoadedLora:
    """An adapter in memory. Freed with its model, or before."""

    def __init__(self, pointer: Any) -> None:
        self.as_list = (lib.llama_adapter_lora_p_ctypes * 1)(pointer)

    def free(self) -> None:
        """Only once no context uses it, and while none computes."""
        lib.llama_adapter_lora_free(self.as_list[0])


_FULL_SCALE = (ctypes.c_float * 1)(1.0)


class LlamaContext:
    """The cache of all sequences, and the computation over it."""

    def __init__(
        self, context: Any, vocabulary_size: int, batch_tokens: int, slots: int, *, streams: bool = False
    ) -> None:
        self._context = context
        self._streams = streams
        self._memory = lib.llama_get_memory(context)
        self._row_type = ctypes.c_float * vocabulary_size
        self.cells: int = lib.llama_n_ctx(context)
        self.batch = Batch(batch_tokens, slots)
        self._lora: LoadedLora | None = None

    def use(self, lora: LoadedLora | None) -> None:
        """Compute with this adapter from now on, or with none. Another one costs some 2 ms at the next decode."""
        if lora is not self._lora:
            self._lora = lora
            lib.llama_set_adapters_lora(self._context, *((lora.as_list, 1, _FULL_SCALE) if lora else (None, 0, None)))

    def release(self, lora: LoadedLora) -> None:
        """Free an adapter. llama.cpp compares them by address, so the context must not go on holding it."""
        if self._lora is lora:
            self.use(None)
        lora.free()

    def decode(self) -> int:
        """Compute ``batch``. 0 is success, NO_KV_SLOT "no room", anything else a failure of the whole batch."""
        self.batch.raw.n_tokens = self.batch.size
        return int(lib.llama_decode(self._context, self.batch.raw))

    def logits(self, index: int) -> Logits:
        """The row of batch entry ``index``: llama.cpp's own memory, writable, valid until the next decode."""
        pointer = lib.llama_get_logits_ith(self._context, index)
        row: Logits = np.ctypeslib.as_array(self._row_type.from_address(ctypes.addressof(pointer.contents)))
        return row

    def keep(self, slot: int, length: int) -> bool:
        """Forget a slot's tokens from position ``length`` on. False when only all of it can be forgotten."""
        return bool(lib.llama_memory_seq_rm(self._memory, slot, length if length else -1, -1))

    def share(self, source: int, target: int, length: int) -> None:
        """Give an empty slot the first ``length`` tokens of another. Cells are shared, nothing is copied; from one
        stream to another llama.cpp copies the whole of it."""
        lib.llama_memory_seq_cp(self._memory, source, target, *((-1, -1) if self._streams else (0, length)))
        if self._streams:
            self.keep(target, length)

    def state_bytes(self, slot: int) -> int:
        """The size of what ``save`` copies."""
        return int(lib.llama_state_seq_get_size(self._context, slot))

    def save(self, slot: int) -> State:
        """A copy of everything that is computed of a slot's tokens.

        Raises:
            MemoryError: there is none for it.
        """
        state = np.empty(self.state_bytes(slot), np.uint8)
        lib.llama_state_seq_get_data(self._context, _bytes(state), state.nbytes, slot)
        return state

    def load(self, slot: int, state: State) -> bool:
        """Put into a slot what was saved of any. False: there are not enough free cells; the slot is empty then."""
        if lib.llama_state_seq_set_data(self._context, _bytes(state), state.nbytes, slot):
            return True
        self.keep(slot, 0)
        return False

    def close(self) -> None:
        lib.llama_free(self._context)


def _bytes(state: State) -> Any:
    return _pointer(state, ctypes.c_uint8)
