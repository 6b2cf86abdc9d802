"""What each descriptor means: the golden device's operations, in the order of the prompt-to-token table."""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from golden import attention, epilogue, fp, group_dequant, layout, norm, quant, tlmm
from spec.config import K_GROUP, KEY_BLOCK, LANES, AcceleratorConfig
from spec.descriptors import Epilogue, Opcode
from spec.faults import FaultCode
from spec.layout import KV_SCALE_BYTES, SegmentKind

Op = dict[str, int]


class FaultError(Exception):
    """The device stops with this code and address."""

    def __init__(self, code: FaultCode, address: int) -> None:
        super().__init__(f"{code.name} at {address:#x}")
        self.code = code
        self.address = address


class Executor:
    """State of the units and what descriptors do to it.

    ``vector``: float32 (vector_rows, 8). ``activations``: int8 (tokens, max k), ``activation_scales``: float32 (tokens,).
    ``group_scales``: bfloat16 bits as int64 (tokens, max k / 32), with group engines.
    ``queries``: int8 (tokens * max_q_dim / 8, 8) with ``query_scales`` (tokens, heads).
    """

    def __init__(self, config: AcceleratorConfig, memory: np.ndarray) -> None:
        self.config = config
        self.memory = memory
        self.vector = torch.zeros(config.vector_rows, LANES)
        self.activations = torch.zeros(config.matmul.tokens, config.matmul.max_k_blocks * config.matmul.k_block, dtype=torch.int8)
        self.activation_scales = torch.zeros(config.matmul.tokens)
        self.group_scales = torch.zeros(config.matmul.tokens, config.matmul.max_k_blocks, dtype=torch.int64)
        self.queries = torch.zeros(config.matmul.tokens * config.attention.max_q_dim // LANES, LANES, dtype=torch.int8)
        self.query_scales = torch.zeros(config.matmul.tokens, 256)
        self.rope_rows = torch.zeros(config.matmul.tokens, config.attention.max_head_dim)
        self.argmax, self._best = 0, torch.tensor(float("-inf"))
        self.tag = 0
        self.counts: dict[str, int] = {}
        self.position, self.tokens, self.slots, self._limit = 0, [0], 0, 0
        self._logits: int | None = None
        self._stream: list[tuple[int, int, str]] = []
        self._weights: dict[tuple[int, ...], Any] = {}

    # 0. a step begins ----------------------------------------------------------------------------------------------

    def begin(self, *, position: int, tokens: list[int], slots: int, limit: int, logits: int | None) -> None:
        """Latch the registers of a start."""
        self.position, self.tokens, self.slots, self._limit, self._logits = position, tokens, slots, limit, logits
        self._stream = []
        self.counts = {}

    def next_token(self) -> None:
        """Feed the argmax back as the token of the next position."""
        self.position += len(self.tokens)
        self.tokens = [self.argmax]

    def execute(self, opcode: Opcode, op: Op) -> None:
        """Carry out one descriptor."""
        operations: dict[Opcode, Callable[[Op], None]] = {
            Opcode.STREAM: self._open_stream,
            Opcode.ROPE: self._rope,
            Opcode.EMBED: self._embed,
            Opcode.NORM: self._norm,
            Opcode.MATMUL: self._matmul,
            Opcode.ATTEND: self._attend,
        }
        operations[opcode](op)

    # memory --------------------------------------------------------------------------------------------------------

    def read(self, counter: str, address: int, size: int) -> np.ndarray:
        """Bytes of the memory, counted."""
        self._check(address, size)
        self.counts[counter] = self.counts.get(counter, 0) + size
        return self.memory[address : address + size]

    def _write(self, counter: str, address: int, data: np.ndarray) -> None:
        raw = np.ascontiguousarray(data).view(np.uint8).reshape(-1)
        self._check(address, raw.size)
        self.counts[counter] = self.counts.get(counter, 0) + raw.size
        self.memory[address : address + raw.size] = raw

    def _check(self, address: int, size: int) -> None:
        if address + size > self._limit:
            raise FaultError(FaultCode.ADDRESS, address)
        if address + size > self.memory.size:
            raise FaultError(FaultCode.AXI_DATA_READ, address)

    def vector_bits(self, row: int, lane: int) -> int:
        """Bits of a word of the vector memory; 0 beyond it."""
        if row >= self.vector.shape[0]:
            return 0
        return int(fp.bits_of(self.vector[row, lane]))

    def forget_weights(self) -> None:
        """The memory changed: unpack weights again when they are next used."""
        self._weights.clear()

    def _rows(self, first: int, stride: int, tokens: int, beats: int) -> Tensor:
        """Row numbers (tokens, beats) of a block of the vector memory."""
        rows = first + torch.arange(tokens)[:, None] * stride + torch.arange(beats)[None, :]
        if int(rows.max()) >= self.vector.shape[0]:
            raise FaultError(FaultCode.ILLEGAL_DESCRIPTOR, 0)
        return rows

    def _load(self, first: int, stride: int, tokens: int, beats: int) -> Tensor:
        return self.vector[self._rows(first, stride, tokens, beats)].reshape(tokens, beats * LANES)

    def _store(self, first: int, stride: int, values: Tensor) -> None:
        tokens, beats = values.shape[0], values.shape[1] // LANES
        self.vector[self._rows(first, stride, tokens, beats)] = values.reshape(tokens, beats, LANES)

    # weight stream --------------------------------------------------------------------------------------------------

    def _open_stream(self, op: Op) -> None:
        counter = "head_bytes" if op["head"] else "weight_bytes"
        size = op["beats"] * self.config.bus.weight_bytes
        self.read(counter, op["address"], size)
        self._stream.append((op["address"], op["address"] + size, counter))

    def _segment(self, kind: SegmentKind) -> int:
        """Address of the next segment's header, which must be of that kind; the stream moves behind the segment."""
        if not self._stream:
            raise FaultError(FaultCode.WATCHDOG, 0)
        address, end, counter = self._stream[0]
        try:
            header = layout.read_header(self.memory[address : address + self.config.bus.weight_bytes].tobytes())
        except ValueError as error:
            raise FaultError(FaultCode.WEIGHT_STREAM, address) from error
        if header.kind is not kind:
            raise FaultError(FaultCode.WEIGHT_STREAM, address)
        behind = address + (1 + header.beats) * self.config.bus.weight_bytes
        self._stream[0] = (behind, end, counter)
        if behind >= end:
            self._stream.pop(0)
        return address

    def _aux(self, dtype: type, count: int) -> Tensor:
        """Values of the next AUX segment."""
        address = self._segment(SegmentKind.AUX) + self.config.bus.weight_bytes
        size = count * np.dtype(dtype).itemsize
        return torch.from_numpy(self.memory[address : address + size].copy().view(dtype))

    def _matrix(self, op: Op) -> Any:
        """The next matrix, padded as it lies: trits (planes, n, k) of a TRITS segment, or the weights of GROUPS."""
        grouped = self.config.grouped
        address = self._segment(SegmentKind.GROUPS if grouped else SegmentKind.TRITS)
        key = (address, op["k_blocks"], op["row_blocks"], op["planes"], op["exponent"])
        if key not in self._weights:
            shape = (op["k_blocks"], op["row_blocks"], op["planes"])
            memory = self.memory[address:]
            try:
                if grouped:
                    self._weights[key] = layout.unpack_groups(memory, self.config, *shape, op["exponent"])
                else:
                    self._weights[key] = layout.unpack_matrix(memory, self.config, *shape)
            except ValueError as error:
                raise FaultError(FaultCode.WEIGHT_STREAM, address) from error
        return self._weights[key]

    # 1. embedding row, and the RoPE rows that step 4 needs -----------------------------------------------------------

    def _rope(self, op: Op) -> None:
        size = op["row_beats"] * LANES * 4
        for token in range(len(self.tokens)):
            row = self.read("activation_bytes", op["address"] + (self.position + token) * size, size)
            self.rope_rows[token, : size // 4] = torch.from_numpy(row.copy().view(np.float32))

    def _embed(self, op: Op) -> None:
        values = []
        for token in self.tokens:
            address = op["address"] + token * op["row_bytes"]
            if token >= op["vocab"]:
                raise FaultError(FaultCode.ADDRESS, address)
            row = self.read("activation_bytes", address, op["row_bytes"])
            length = op["row_beats"] * LANES
            if op["grouped"]:
                halves = row[: -(-length // K_GROUP) * 2].copy().view(np.int16)
                scale = fp.h2f(torch.from_numpy(halves)).repeat_interleave(K_GROUP)[:length]
            else:
                scale = torch.from_numpy(row[:4].copy().view(np.float32))
            body = torch.from_numpy(row[8 * op["header_words"] :][:length].copy().view(np.int8))
            values.append(fp.fmul(fp.i2f(body), scale))
        self._store(op["dst"], op["dst_stride"], torch.stack(values))

    # 2, 6, 7. RMSNorm and quantise -----------------------------------------------------------------------------------

    def _norm(self, op: Op) -> None:
        tokens = len(self.tokens)
        gamma = self._aux(np.float32, op["beats"] * LANES) if op["norm"] else None
        x = self._load(op["src"], op["src_stride"], tokens, op["beats"])
        if op["last_only"]:
            x = x[-1:]
        inv_length, eps = fp.from_bits(torch.tensor([op["inv_length"], op["eps"]]))
        if self.config.grouped:
            q, groups, scale = norm.norm_quantise_groups(x, gamma, inv_length, eps)
            self.group_scales[: q.shape[0], : groups.shape[1]] = groups
        else:
            q, scale = norm.norm_quantise(x, gamma, inv_length, eps)
        self.activations[: q.shape[0], : q.shape[1]] = q
        self.activation_scales[: q.shape[0]] = scale

    # 3, 4, 6, 7, 8. matmul and its epilogue --------------------------------------------------------------------------

    def _matmul(self, op: Op) -> None:
        tokens = 1 if op["last_only"] else len(self.tokens)
        n = op["beats"] * LANES
        if op["row_scale"]:
            weight_scale = fp.h2f(self._aux(np.int16, n))
        else:
            weight_scale = fp.from_bits(torch.tensor(op["scale"]))
        kind = Epilogue(op["epilogue"])
        channels = None
        if op["channels"] and kind in (Epilogue.QUERY, Epilogue.KEY):
            channels = self._aux(np.int32, n).reshape(-1, op["head_beats"] * LANES)
        matrix = self._matrix(op)
        if self.config.grouped:
            inputs = self.activations[:tokens, : op["k_blocks"] * K_GROUP]
            sums = group_dequant.accumulate(inputs, self.group_scales[:tokens, : op["k_blocks"]], matrix)
        else:
            sums = tlmm.matmul(self.activations[:tokens, : matrix.shape[2]], matrix)
        y = epilogue.dequant(sums[:, :n], weight_scale, self.activation_scales[:tokens])
        where = (op["dst"], op["dst_stride"])
        if kind is Epilogue.STORE:
            self._store(*where, y)
        elif kind is Epilogue.RESIDUAL:
            self._store(*where, epilogue.residual(self._load(*where, tokens, op["beats"]), y))
        elif kind is Epilogue.GATE_SILU:
            self._store(*where, epilogue.gate_silu(y))
        elif kind is Epilogue.GATE_RELU2:
            self._store(*where, epilogue.gate_relu2(y))
        elif kind is Epilogue.UP:
            self._store(*where, epilogue.up(self._load(*where, tokens, op["beats"]), y))
        elif kind is Epilogue.LOGITS:
            self._logits_out(op, y)
        else:
            self._heads_out(op, kind, y, channels)

    def _heads_out(self, op: Op, kind: Epilogue, y: Tensor, channels: Tensor | None) -> None:
        tokens, head_dim = y.shape[0], op["head_beats"] * LANES
        y = y.reshape(tokens, -1, head_dim)
        if kind is not Epilogue.VALUE:
            y = epilogue.rope(y, self.rope_rows[:tokens, :head_dim])
        if channels is not None:
            y = epilogue.channels(y, *layout.unpack_channels(channels))
        int4 = bool({Epilogue.KEY: op["k_int4"], Epilogue.VALUE: op["v_int4"]}.get(kind))
        q, scale = epilogue.quantise_heads(y, int4=int4)
        heads = range(op["first_head"], op["first_head"] + y.shape[1])
        if kind is Epilogue.QUERY:
            for token in range(tokens):
                first = op["dst"] + token * op["dst_stride"] + op["first_head"] * op["head_beats"]
                rows = q[token].reshape(-1, LANES)
                self.queries[first : first + rows.shape[0]] = rows
                self.query_scales[token, heads.start : heads.stop] = scale[token]
            return
        k_row, v_row = _kv_row_bytes(op)
        region, row = (0, k_row) if kind is Epilogue.KEY else (self.slots * k_row, v_row)
        scales = self.slots * (k_row + v_row) + (0 if kind is Epilogue.KEY else 4)
        packed = quant.pack_int4(q) if int4 else q
        for token in range(tokens):
            slot = self.position + token
            for number, head in enumerate(heads):
                base = op["kv_address"] + head * op["kv_stride"]
                self._write("kv_write_bytes", base + region + slot * row, packed[token, number].numpy())
                place = base + scales + slot * KV_SCALE_BYTES
                self._write("kv_write_bytes", place, scale[token, number : number + 1].numpy())

    def _logits_out(self, op: Op, y: Tensor) -> None:
        if self._logits is not None:
            self._write("activation_bytes", self._logits + 4 * op["first_row"], y[0].numpy())
        if op["first_row"] == 0:
            self.argmax, self._best = 0, torch.tensor(float("-inf"))
        real = y[0, : y.shape[1] - LANES + op["valid"]]
        row = int(epilogue.argmax(real))
        if op["first_row"] == 0 or torch.isnan(self._best) or real[row] > self._best:
            self.argmax, self._best = op["first_row"] + row, real[row]

    # 5. attention ----------------------------------------------------------------------------------------------------

    def _attend(self, op: Op) -> None:
        tokens, head_dim = len(self.tokens), op["head_beats"] * LANES
        heads = op["kv_heads"] * op["group"]
        stride = heads * op["head_beats"]
        rows = torch.arange(tokens)[:, None] * stride + torch.arange(stride)
        q = self.queries[rows].reshape(tokens, heads, head_dim)
        slots = -(-(self.position + tokens) // KEY_BLOCK) * KEY_BLOCK
        parts = [self._kv_head(op, op["kv_address"] + head * op["kv_stride"], slots) for head in range(op["kv_heads"])]
        k, v, scales = (torch.stack(part) for part in zip(*parts, strict=True))
        bias = None
        if op["bias"]:
            raw = self.read("kv_read_bytes", op["bias_address"], 4 * slots)
            bias = torch.from_numpy(raw.copy().view(np.float32))
        state = None
        state_beats = op["head_beats"] + 1
        if op["resume"]:
            saved = self._load(op["state"], heads * state_beats, tokens, heads * state_beats).reshape(tokens, heads, -1)
            state = attention.AttentionState(saved[..., head_dim], saved[..., head_dim + 1], saved[..., :head_dim])
        end = attention.attend_state(
            q,
            self.query_scales[:tokens, :heads],
            k,
            scales[..., 0],
            v,
            scales[..., 1],
            positions=self.position + torch.arange(tokens),
            score_scale=fp.from_bits(torch.tensor(op["score_scale"])),
            bias=bias,
            state=state,
        )
        if op["export"]:
            tail = torch.zeros(tokens, heads, LANES)
            tail[..., 0], tail[..., 1] = end.m, end.l
            self._store(op["state"], heads * state_beats, torch.cat([end.o, tail], dim=-1).reshape(tokens, -1))
        else:
            self._store(op["dst"], op["dst_stride"], attention.output(end).reshape(tokens, -1))

    def _kv_head(self, op: Op, base: int, slots: int) -> tuple[Tensor, Tensor, Tensor]:
        """K (slots, head_dim), V, scales (slots, 2) of one KV head, as far as the step reads them."""
        k_row, v_row = _kv_row_bytes(op)

        def rows(address: int, size: int, int4: int) -> Tensor:
            raw = self.read("kv_read_bytes", address, slots * size).copy().reshape(slots, size)
            return quant.unpack_int4(torch.from_numpy(raw)) if int4 else torch.from_numpy(raw.view(np.int8))

        k = rows(base, k_row, op["k_int4"])
        v = rows(base + self.slots * k_row, v_row, op["v_int4"])
        s = self.read("kv_read_bytes", base + self.slots * (k_row + v_row), slots * KV_SCALE_BYTES)
        return k, v, torch.from_numpy(s.copy().view(np.float32).reshape(slots, 2))


def _kv_row_bytes(op: Op) -> tuple[int, int]:
    """Bytes of a K row and of a V row, of a MATMUL or an ATTEND."""
    head_dim = op["head_beats"] * LANES
    return head_dim >> op["k_int4"], head_dim >> op["v_int4"]
