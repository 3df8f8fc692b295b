"""Inputs of ours in the layouts that other engines' kernels take. Prepared before anything is timed."""

import torch


def stacked(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """[…, a + b, n]: gate above up, as fused first matmuls take them; scales go the same way."""
    if first.dtype == torch.float8_e4m3fn:  # bytes: not every torch concatenates FP8
        return torch.cat((first.view(torch.uint8), second.view(torch.uint8)), -2).view(first.dtype)
    return torch.cat((first, second), -2)


def by_column(scale: torch.Tensor, multiple: int = 1) -> torch.Tensor:
    """[T, n] column after column, each padded to a multiple of so many rows; for one token too, where `contiguous`
    would keep strides (n, 1).
    """
    rows, columns = scale.shape
    padded = -(-rows // multiple) * multiple
    return torch.zeros((columns, padded), dtype=scale.dtype, device=scale.device).T[:rows].copy_(scale)


def ranks(ids: torch.Tensor, experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(place of each entry among its expert's, entries per expert), int64 [T·k] and [experts], of ids [T, k] ≥ 0."""
    flat = ids.flatten().long()
    counts = torch.bincount(flat, minlength=experts)
    order = flat.argsort(stable=True)
    place = torch.empty_like(flat)
    place[order] = torch.arange(len(flat), device=ids.device) - (counts.cumsum(0) - counts)[flat[order]]
    return place, counts


def masked_rows(ids: torch.Tensor, experts: int, alignment: int) -> tuple[torch.Tensor, torch.Tensor, int]:
    """(row of each entry in [experts · most], int32 entries per expert, most): every expert has room for `most` rows.

    `most` is a multiple of `alignment`.
    """
    place, counts = ranks(ids, experts)
    most = -(-int(counts.max()) // alignment) * alignment
    return ids.flatten().long() * most + place, counts.int(), most


def contiguous_rows(ids: torch.Tensor, experts: int, alignment: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(row of each entry, int32 [rows] expert of each row or −1): experts one after another, padded to `alignment`."""
    place, counts = ranks(ids, experts)
    padded = (counts + alignment - 1) // alignment * alignment
    flat = ids.flatten()
    rows = (padded.cumsum(0) - padded)[flat.long()] + place
    expert = torch.full((int(padded.sum()),), -1, dtype=torch.int32, device=ids.device)
    expert[rows] = flat
    return rows, expert


def scattered(values: torch.Tensor, rows: torch.Tensor, total: int) -> torch.Tensor:
    """[total, n]: values [entries, n] at their rows, zeros elsewhere."""
    result = torch.zeros((total, values.shape[1]), dtype=values.dtype, device=values.device)
    if values.dtype == torch.float8_e4m3fn:
        result.view(torch.uint8)[rows] = values.view(torch.uint8)
    else:
        result[rows] = values
    return result


def page_lists(
    page_table: torch.Tensor, kv_length: torch.Tensor, page_size: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(indptr [B + 1], indices, last_page_len [B]), int32: the pages in use of each sequence, one after another."""
    counts = (kv_length.long() + page_size - 1) // page_size
    indptr = torch.zeros(len(counts) + 1, dtype=torch.int64, device=page_table.device)
    indptr[1:] = counts.cumsum(0)
    used = torch.arange(page_table.shape[1], device=page_table.device)[None] < counts[:, None]
    last = kv_length.long() - (counts - 1).clamp_min(0) * page_size
    return indptr.int(), page_table[used].int(), last.int()


def in_order_of(wanted: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """ids and weights [T, k], each row in the order of `wanted`'s; ids that are not there take the first place's."""
    place = (ids[:, None, :] == wanted[:, :, None]).int().argmax(-1)
    return ids.gather(1, place), weights.gather(1, place)
