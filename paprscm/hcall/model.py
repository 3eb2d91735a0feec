# SPDX-License-Identifier: GPL-2.0-or-later
"""Model of the device behind the storage class memory hcalls: the allowed answers to each call.

Sources: "Linux on Power Architecture Reference" (LoPAR), chapter "Storage Class Memory"; where
LoPAR leaves the choice to the hypervisor, the intended behaviour of QEMU's
hw/ppc/spapr_nvdimm.c, as the docstring of each call states. QEMU passes the registers r4 to r12 to
the call and returns them, so an output that the call does not set is the argument.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from paprscm.papr import (
    BIND_ANY_ADDRESS,
    HCALL_REGISTERS,
    SCM_BLOCK_SIZE,
    Hcall,
    Health,
    ReturnCode,
    UnbindScope,
    drc_index,
    return_code_name,
)

_WORD: Final = 1 << 64
_METADATA_LENGTHS: Final = (1, 2, 4, 8)

Branch = tuple[Hcall, ReturnCode, str]
"""One path through one call: the call, its return code, and the reason."""

BRANCHES: Final[frozenset[Branch]] = frozenset(
    (call, code, reason)
    for call, answers in {
        Hcall.H_SCM_READ_METADATA: {
            (ReturnCode.H_PARAMETER, "no such nvdimm"),
            (ReturnCode.H_P3, "length"),
            (ReturnCode.H_P2, "offset wraps"),
            (ReturnCode.H_P2, "beyond the label area"),
            *((ReturnCode.H_SUCCESS, f"{length} bytes") for length in _METADATA_LENGTHS),
        },
        Hcall.H_SCM_WRITE_METADATA: {
            (ReturnCode.H_PARAMETER, "no such nvdimm"),
            (ReturnCode.H_P4, "length"),
            (ReturnCode.H_P2, "offset wraps"),
            (ReturnCode.H_P2, "beyond the label area"),
            (ReturnCode.H_P2, "read-only backend"),
            *((ReturnCode.H_P2, f"data wider than {n} bytes") for n in _METADATA_LENGTHS[:3]),
            *((ReturnCode.H_SUCCESS, f"{length} bytes") for length in _METADATA_LENGTHS),
        },
        Hcall.H_SCM_BIND_MEM: {
            (ReturnCode.H_PARAMETER, "no such nvdimm"),
            (ReturnCode.H_P5, "token"),
            (ReturnCode.H_OVERLAP, "address chosen by the caller"),
            (ReturnCode.H_P2, "first block"),
            (ReturnCode.H_P3, "number of blocks wraps"),
            (ReturnCode.H_P3, "number of blocks"),
            (ReturnCode.H_SUCCESS, "bound"),
        },
        Hcall.H_SCM_UNBIND_MEM: {
            (ReturnCode.H_PARAMETER, "no such nvdimm"),
            (ReturnCode.H_P4, "token"),
            (ReturnCode.H_P2, "address not aligned"),
            (ReturnCode.H_P3, "no block"),
            (ReturnCode.H_P3, "number of blocks wraps"),
            (ReturnCode.H_P3, "range wraps"),
            (ReturnCode.H_P3, "outside"),
            (ReturnCode.H_SUCCESS, "unbound"),
        },
        Hcall.H_SCM_UNBIND_ALL: {
            (ReturnCode.H_P4, "token"),
            (ReturnCode.H_PARAMETER, "scope"),
            (ReturnCode.H_P2, "no such nvdimm"),
            (ReturnCode.H_SUCCESS, "one nvdimm"),
            (ReturnCode.H_SUCCESS, "all nvdimms"),
        },
        Hcall.H_SCM_HEALTH: {
            (ReturnCode.H_PARAMETER, "no such nvdimm"),
            (ReturnCode.H_SUCCESS, "armed"),
            (ReturnCode.H_SUCCESS, "unarmed"),
        },
        Hcall.H_SCM_FLUSH: {
            (ReturnCode.H_PARAMETER, "no such nvdimm"),
            (ReturnCode.H_PARAMETER, "no spapr-nvdimm"),
            (ReturnCode.H_UNSUPPORTED, "persistent backend"),
            (ReturnCode.H_LONG_BUSY_ORDER_10_MSEC, "begun"),
            (ReturnCode.H_LONG_BUSY_ORDER_10_MSEC, "goes on"),
            (ReturnCode.H_SUCCESS, "done"),
            (ReturnCode.H_HARDWARE, "failed"),
            (ReturnCode.H_P2, "unknown token"),
        },
        Hcall.H_SCM_QUERY_BLOCK_MEM_BINDING: {(ReturnCode.H_FUNCTION, "not implemented")},
        Hcall.H_SCM_QUERY_LOGICAL_MEM_BINDING: {(ReturnCode.H_FUNCTION, "not implemented")},
        Hcall.H_SCM_PERFORMANCE_STATS: {(ReturnCode.H_FUNCTION, "not implemented")},
    }.items()
    for code, reason in answers
)
"""Every branch that a call of storage class memory has."""


@dataclass(frozen=True)
class Expected:
    """One answer that the contract allows.

    Attributes:
        code: r3.
        outputs: r4 to r12.
        branch: the path through the call.
    """

    code: ReturnCode
    outputs: tuple[int, ...]
    branch: Branch


@dataclass
class PendingFlush:
    """A flush that has begun, and whose end was not reported yet.

    Attributes:
        end: its expected final return code.
        held: its sync is blocked, so that it cannot end.
    """

    end: ReturnCode
    held: bool


@dataclass(kw_only=True)
class ModelDimm:
    """State of one nvdimm in the model.

    Attributes:
        slot: its memory slot.
        address: its guest address, chosen by QEMU.
        size_bytes: its usable size.
        label: the content of the label area.
        spapr: it is a spapr-nvdimm, not a plain nvdimm.
        flushes: it supports H_SCM_FLUSH: the backend is not persistent, or pmem-override is on.
        unarmed: H_SCM_HEALTH reports it as unarmed.
        read_only: its backend is read-only.
        failing: syncs on the host that begin from now on fail.
        held: syncs on the host do not end before `release()`.
        last_token: token of the last flush; tokens count from 1.
    """

    slot: int
    address: int
    size_bytes: int
    label: bytearray
    spapr: bool = True
    flushes: bool = True
    unarmed: bool = False
    read_only: bool = False
    failing: bool = False
    held: bool = False
    last_token: int = 0
    outstanding: dict[int, PendingFlush] = field(default_factory=dict)
    """By token."""

    @property
    def blocks(self) -> int:
        """Its size in SCM blocks of 256 MiB."""
        return self.size_bytes // SCM_BLOCK_SIZE


class ScmModel:
    """The nvdimms of one machine, and their states after the calls so far.

    Call `allowed()` for the answers to a call, and `observe()` with the actual one, which updates
    the model.

    Attributes:
        covered: number of observations of each branch.
    """

    def __init__(self, dimms: Iterable[ModelDimm]) -> None:
        self.dimms = {dimm.slot: dimm for dimm in dimms}
        self.covered: Counter[Branch] = Counter()
        self._by_drc = {drc_index(slot): dimm for slot, dimm in self.dimms.items()}
        self._calls: Mapping[int, Callable[..., Sequence[Expected]]] = {
            Hcall.H_SCM_READ_METADATA: self._read_metadata,
            Hcall.H_SCM_WRITE_METADATA: self._write_metadata,
            Hcall.H_SCM_BIND_MEM: self._bind,
            Hcall.H_SCM_UNBIND_MEM: self._unbind,
            Hcall.H_SCM_UNBIND_ALL: self._unbind_all,
            Hcall.H_SCM_HEALTH: self._health,
            Hcall.H_SCM_FLUSH: self._flush,
        }

    def allowed(self, call: Hcall, arguments: Sequence[int]) -> tuple[Expected, ...]:
        """The allowed answers to a call now; more than one only if the result depends on time.

        Args:
            call: the call.
            arguments: r4 and following, 64-bit; missing ones are 0.
        """
        words = [argument % _WORD for argument in arguments]
        words += [0] * (HCALL_REGISTERS - len(words))
        rule = self._calls.get(call)
        if rule is None:
            return (_answer(call, words, ReturnCode.H_FUNCTION, "not implemented"),)
        return tuple(rule(words))

    def observe(self, expected: Expected, arguments: Sequence[int]) -> None:
        """Update the model with the answer to a call.

        Args:
            expected: the answer, one of those from `allowed()`.
            arguments: arguments of the call.
        """
        self.covered[expected.branch] += 1
        call, code, reason = expected.branch
        words = [argument % _WORD for argument in arguments]
        if call is Hcall.H_SCM_WRITE_METADATA and code is ReturnCode.H_SUCCESS:
            offset, data, length = words[1:4]
            label = self._by_drc[words[0] & 0xFFFFFFFF].label
            label[offset : offset + length] = data.to_bytes(length, "big")
        if call is Hcall.H_SCM_FLUSH and reason == "begun":
            dimm = self._by_drc[words[0] & 0xFFFFFFFF]
            dimm.last_token += 1
            dimm.outstanding[dimm.last_token] = PendingFlush(
                ReturnCode.H_HARDWARE if dimm.failing else ReturnCode.H_SUCCESS,
                dimm.held,
            )
        if call is Hcall.H_SCM_FLUSH and reason in ("done", "failed"):
            del self._by_drc[words[0] & 0xFFFFFFFF].outstanding[words[1]]

    def release(self, slot: int) -> None:
        """The host's syncs of this DIMM are no longer blocked."""
        dimm = self.dimms[slot]
        dimm.held = False
        for flush in dimm.outstanding.values():
            flush.held = False

    def migrate(
        self, slot: int, *, completed: Mapping[int, int], pending: Collection[int]
    ) -> list[str]:
        """Continue a DIMM on another machine, and return contradictions with its migrated state.

        The destination syncs again for each pending flush; the result of a completed one is kept
        (QEMU commit b5513584a08d, spapr_nvdimm_flush_post_load). Set `held` and `failing` to those
        of the destination before.

        Args:
            slot: slot of the DIMM.
            completed: result codes of flushes that had ended, by token.
            pending: tokens of the others.
        """
        dimm, wrong = self.dimms[slot], []
        tokens = sorted((*completed, *pending))
        if tokens != sorted(dimm.outstanding):
            wrong.append(f"tokens {tokens} instead of {sorted(dimm.outstanding)}")
        for token, flush in dimm.outstanding.items():
            if token in completed:
                if flush.held:
                    wrong.append(f"token {token} has ended while its sync was held")
                if (code := completed[token]) != flush.end:
                    ended = return_code_name(code)
                    wrong.append(f"token {token} ended with {ended}, expected {flush.end.name}")
            else:
                flush.held = dimm.held
                flush.end = ReturnCode.H_HARDWARE if dimm.failing else ReturnCode.H_SUCCESS
        return wrong

    def reset(self) -> None:
        """The machine was reset: QEMU completes and drops the flushes; tokens continue.

        Source: QEMU spapr_nvdimm.c:spapr_nvdimm_finish_flushes.
        """
        for dimm in self.dimms.values():
            dimm.outstanding.clear()

    def _dimm(self, word: int) -> ModelDimm | None:
        # QEMU uses the lower half only. DRC indices in LoPAR have 32 bits.
        return self._by_drc.get(word & 0xFFFFFFFF)

    def _metadata(
        self, call: Hcall, words: list[int], length: int, wrong_length: ReturnCode
    ) -> Expected | ModelDimm:
        """The DIMM, or the refusal common to both directions: DRC, length, range, in this order."""
        dimm, offset = self._dimm(words[0]), words[1]
        if dimm is None:
            return _answer(call, words, ReturnCode.H_PARAMETER, "no such nvdimm")
        if length not in _METADATA_LENGTHS:
            return _answer(call, words, wrong_length, "length")
        if offset + length >= _WORD:
            return _answer(call, words, ReturnCode.H_P2, "offset wraps")
        if offset + length > len(dimm.label):
            return _answer(call, words, ReturnCode.H_P2, "beyond the label area")
        return dimm

    def _read_metadata(self, words: list[int]) -> Sequence[Expected]:
        """(drc, offset, length): r4 is the big-endian number in these bytes."""
        call, (offset, length) = Hcall.H_SCM_READ_METADATA, words[1:3]
        dimm = self._metadata(call, words, length, ReturnCode.H_P3)
        if isinstance(dimm, Expected):
            return [dimm]
        value = int.from_bytes(dimm.label[offset : offset + length], "big")
        return [_answer(call, words, ReturnCode.H_SUCCESS, f"{length} bytes", r4=value)]

    def _write_metadata(self, words: list[int]) -> Sequence[Expected]:
        """(drc, offset, data, length): stores the lowest bytes of data, big-endian."""
        call, (data, length) = Hcall.H_SCM_WRITE_METADATA, words[2:4]
        dimm = self._metadata(call, words, length, ReturnCode.H_P4)
        if isinstance(dimm, Expected):
            return [dimm]
        if dimm.read_only:
            return [_answer(call, words, ReturnCode.H_P2, "read-only backend")]
        if data >= 1 << 8 * length:
            return [_answer(call, words, ReturnCode.H_P2, f"data wider than {length} bytes")]
        return [_answer(call, words, ReturnCode.H_SUCCESS, f"{length} bytes")]

    def _bind(self, words: list[int]) -> Sequence[Expected]:
        """(drc, first block, blocks, address, token): r5 is the address, r6 the blocks.

        QEMU's memory is always bound, at an address of its own choice.
        """
        call = Hcall.H_SCM_BIND_MEM
        first, count, address, token = words[1:5]
        dimm = self._dimm(words[0])
        if dimm is None:
            return [_answer(call, words, ReturnCode.H_PARAMETER, "no such nvdimm")]
        if token:
            return [_answer(call, words, ReturnCode.H_P5, "token")]
        if address != BIND_ANY_ADDRESS:
            return [_answer(call, words, ReturnCode.H_OVERLAP, "address chosen by the caller")]
        if first > dimm.blocks:
            return [_answer(call, words, ReturnCode.H_P2, "first block")]
        if first + count >= _WORD:
            return [_answer(call, words, ReturnCode.H_P3, "number of blocks wraps")]
        if first + count > dimm.blocks:
            return [_answer(call, words, ReturnCode.H_P3, "number of blocks")]
        place = dimm.address + first * SCM_BLOCK_SIZE
        return [_answer(call, words, ReturnCode.H_SUCCESS, "bound", r5=place, r6=count)]

    def _unbind(self, words: list[int]) -> Sequence[Expected]:
        """(drc, address, blocks, token): r5 is the blocks; nothing is unbound before an unplug."""
        call = Hcall.H_SCM_UNBIND_MEM
        address, count, token = words[1:4]
        dimm = self._dimm(words[0])
        if dimm is None:
            return [_answer(call, words, ReturnCode.H_PARAMETER, "no such nvdimm")]
        if token:
            return [_answer(call, words, ReturnCode.H_P4, "token")]
        if address % SCM_BLOCK_SIZE:
            return [_answer(call, words, ReturnCode.H_P2, "address not aligned")]
        if count == 0:
            return [_answer(call, words, ReturnCode.H_P3, "no block")]
        size = count * SCM_BLOCK_SIZE
        if size >= _WORD:
            return [_answer(call, words, ReturnCode.H_P3, "number of blocks wraps")]
        if address + size > _WORD:
            return [_answer(call, words, ReturnCode.H_P3, "range wraps")]
        if address < dimm.address or address + size > dimm.address + dimm.size_bytes:
            return [_answer(call, words, ReturnCode.H_P3, "outside")]
        return [_answer(call, words, ReturnCode.H_SUCCESS, "unbound", r5=count)]

    def _unbind_all(self, words: list[int]) -> Sequence[Expected]:
        """(scope, drc, token): r5 is the number of unbound blocks.

        A token results in H_P4, although it is the third argument: QEMU's behaviour, kept.
        """
        call, (scope, drc, token) = Hcall.H_SCM_UNBIND_ALL, words[:3]
        if token:
            return [_answer(call, words, ReturnCode.H_P4, "token")]
        if scope == UnbindScope.ALL:
            blocks = sum(dimm.blocks for dimm in self.dimms.values())
            return [_answer(call, words, ReturnCode.H_SUCCESS, "all nvdimms", r5=blocks)]
        if scope != UnbindScope.DRC:
            return [_answer(call, words, ReturnCode.H_PARAMETER, "scope")]
        dimm = self._dimm(drc)
        if dimm is None:
            return [_answer(call, words, ReturnCode.H_P2, "no such nvdimm")]
        return [_answer(call, words, ReturnCode.H_SUCCESS, "one nvdimm", r5=dimm.blocks)]

    def _health(self, words: list[int]) -> Sequence[Expected]:
        """(drc): r4 is the bitmap, r5 the mask of its valid bits: in QEMU only UNARMED."""
        call, dimm = Hcall.H_SCM_HEALTH, self._dimm(words[0])
        if dimm is None:
            return [_answer(call, words, ReturnCode.H_PARAMETER, "no such nvdimm")]
        bitmap, reason = (Health.UNARMED, "unarmed") if dimm.unarmed else (0, "armed")
        return [
            _answer(
                call, words, ReturnCode.H_SUCCESS, reason, r4=int(bitmap), r5=int(Health.UNARMED)
            )
        ]

    def _flush(self, words: list[int]) -> Sequence[Expected]:
        """(drc, token): token 0 begins a flush; the token in r4 polls it; the end is reported once.

        QEMU commit b5513584a08d (in v7.0). The first answer is always long-busy: QEMU's main loop
        completes the flush, and cannot run during the call.
        """
        call, busy = Hcall.H_SCM_FLUSH, ReturnCode.H_LONG_BUSY_ORDER_10_MSEC
        dimm, token = self._dimm(words[0]), words[1]
        if dimm is None:
            return [_answer(call, words, ReturnCode.H_PARAMETER, "no such nvdimm")]
        if not dimm.spapr:
            return [_answer(call, words, ReturnCode.H_PARAMETER, "no spapr-nvdimm")]
        if token == 0:
            if not dimm.flushes:
                return [_answer(call, words, ReturnCode.H_UNSUPPORTED, "persistent backend")]
            return [_answer(call, words, busy, "begun", r4=dimm.last_token + 1)]
        flush = dimm.outstanding.get(token)
        if flush is None:
            return [_answer(call, words, ReturnCode.H_P2, "unknown token")]
        reason = "done" if flush.end is ReturnCode.H_SUCCESS else "failed"
        goes_on = _answer(call, words, busy, "goes on", r4=token)
        return [goes_on] if flush.held else [goes_on, _answer(call, words, flush.end, reason)]


def _answer(
    call: Hcall,
    words: Sequence[int],
    code: ReturnCode,
    reason: str,
    *,
    r4: int | None = None,
    r5: int | None = None,
    r6: int | None = None,
) -> Expected:
    """An answer whose other outputs are the arguments."""
    set_by_call = (r4, r5, r6)
    outputs = tuple(
        word if number >= len(set_by_call) or set_by_call[number] is None else set_by_call[number]
        for number, word in enumerate(words)
    )
    return Expected(code, outputs, (call, code, reason))  # type: ignore[arg-type]


def describe_answer(code: int, outputs: Sequence[int], allowed: Iterable[Expected]) -> str:
    """Describe an answer and the allowed ones, for a message.

    Args:
        code: r3, signed.
        outputs: r4 and following.
        allowed: from ScmModel.allowed().
    """
    expected = " or ".join(
        f"{e.code.name} {_registers(e.outputs)} ({e.branch[2]})" for e in allowed
    )
    return f"answered {return_code_name(code)} {_registers(outputs)}, expected {expected}"


def _registers(outputs: Sequence[int]) -> str:
    return " ".join(f"r{number}={word:#x}" for number, word in enumerate(outputs[:3], 4))
