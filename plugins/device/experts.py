"""Who works on which expert's tokens: read from MoERoute's `expert_tokens`, a bit a token, by every program itself.

An expert's tokens are its rows, in order; m of them are a tile. All integers that are read may be arbitrary: tokens
stay below `tokens`, experts below `experts`.
"""

import triton
import triton.language as tl


@triton.jit
def _popcount(word):
    """Set bits of each uint32, as int32."""
    word = word - ((word >> 1) & 0x55555555)
    word = (word & 0x33333333) + ((word >> 2) & 0x33333333)
    word = (word + (word >> 4)) & 0x0F0F0F0F
    word = word + (word >> 8)
    return ((word + (word >> 16)) & 0x3F).to(tl.int32)


@triton.jit
def _place_of_bit(word, nth):
    """Where bit number `nth` ≥ 0 (int32) among the set bits of each uint32 stands; some place below 32 if none is."""
    place = nth * 0
    for step in tl.static_range(5):
        width = 16 >> step
        low = _popcount(word & ((1 << width) - 1))
        beyond = nth >= low
        nth = tl.where(beyond, nth - low, nth)
        word = tl.where(beyond, word >> width, word)
        place = tl.where(beyond, place + width, place)
    return place


@triton.jit
def _words_of(expert_tokens, expert, word, tokens):
    """uint32 of the words `word` of the experts `expert`; bits of tokens that do not exist are 0."""
    stride = (tokens + 127) // 128 * 4
    there = tl.minimum(tl.maximum(tokens - word * 32, 0), 32)  # bits of this word that are tokens
    bits = tl.load(expert_tokens + expert.to(tl.int64) * stride + word, mask=there > 0, other=0)
    every = tl.full(there.shape, 0xFFFFFFFF, tl.uint32)
    return bits.to(tl.uint32, bitcast=True) & (every >> tl.minimum(32 - there, 31).to(tl.uint32))


@triton.jit
def tile_ends(expert_tokens, tokens, experts: tl.constexpr, m: tl.constexpr, count: tl.constexpr):
    """int32 [experts, padded]: tiles of all experts up to and including each. `count` words are read in one step."""
    padded: tl.constexpr = triton.next_power_of_2(experts)
    expert = tl.minimum(tl.arange(0, padded), experts - 1)
    rows = tl.zeros((padded,), tl.int32)
    for start in range(0, (tokens + 31) // 32, count):
        word = start + tl.arange(0, count)
        rows += tl.sum(_popcount(_words_of(expert_tokens, expert[:, None], word[None, :], tokens)), 1)
    rows = tl.where(tl.arange(0, padded) < experts, rows, 0)
    return tl.cumsum((rows + m - 1) // m, 0)


@triton.jit
def pieces_of_work(ends, columns: tl.constexpr, span: tl.constexpr):
    """How many pieces of work there are: every tile of rows times its `columns`, `span` at a time."""
    return tl.max(ends) * ((columns + span - 1) // span)


@triton.jit
def piece_of_work(
    ends,
    work,
    expert_ids,
    expert_tokens,
    tokens,
    per_token: tl.constexpr,
    columns: tl.constexpr,
    m: tl.constexpr,
    span: tl.constexpr,
    reach: tl.constexpr,
):
    """Piece number `work`: (expert int64, first column, column behind the last, token [m] int64, entry [m] int32).

    Behind an expert's last row the token is 0 and the entry −1. An expert's tiles of rows follow each other, then come
    its next columns: so programs that run at the same time share weights.
    """
    pieces: tl.constexpr = (columns + span - 1) // span
    before = ends * pieces <= work
    expert = tl.sum(before.to(tl.int32))
    first = tl.max(tl.where(before, ends, 0))
    within = work - first * pieces
    tiles = tl.maximum(tl.min(tl.where(before, 0x7FFFFFFF, ends)) - first, 1)
    token = tokens_of_tile(expert_tokens, expert, within % tiles, tokens, m, reach)
    entry = entry_of(expert_ids, token, expert, per_token)
    begin = within // tiles * span
    return expert.to(tl.int64), begin, tl.minimum(begin + span, columns), tl.maximum(token, 0).to(tl.int64), entry


@triton.jit
def tokens_of_tile(expert_tokens, expert, tile, tokens, m: tl.constexpr, reach: tl.constexpr):
    """int32 [m]: the tokens of an expert's tile; −1 behind its last. `reach` words are looked through in one step."""
    row = tile * m + tl.arange(0, m)
    token = tl.full((m,), -1, tl.int32)
    passed = 0
    for start in range(0, (tokens + 31) // 32, reach):
        count = _popcount(_words_of(expert_tokens, expert, start + tl.arange(0, reach), tokens))
        upto = tl.cumsum(count, 0)
        local = row - passed
        earlier = upto[:, None] <= local[None, :]  # [reach, m]: neighbouring threads have neighbouring rows
        which = tl.sum(earlier.to(tl.int32), 0)
        skipped = tl.max(tl.where(earlier, upto[:, None], 0), 0)
        inside = (local >= 0) & (which < reach)
        word = _words_of(expert_tokens, expert, start + tl.where(inside, which, 0), tokens)
        found = (start + which) * 32 + _place_of_bit(word, tl.maximum(local - skipped, 0))
        token = tl.where(inside, found, token)
        passed += tl.sum(count)
    return token


@triton.jit
def entry_of(expert_ids, token, expert, per_token: tl.constexpr):
    """int32: the first entry t · per_token + j of each token t that names the expert; −1 if none does."""
    padded: tl.constexpr = triton.next_power_of_2(per_token)
    j = tl.arange(0, padded)
    entry = token.to(tl.int64)[:, None] * per_token + j[None, :]
    named = tl.load(expert_ids + entry, mask=(token >= 0)[:, None] & (j < per_token)[None, :], other=-1)
    first = tl.min(tl.where(named == expert, j[None, :], padded), 1)
    return tl.where(first < padded, token * per_token + first, -1)


@triton.jit
def unowned(expert_ids, expert_tokens, entry, tokens, experts: tl.constexpr, per_token: tl.constexpr):
    """Whether no expert computes an existing entry (int64 [n]): it names none, or not the one that has the token."""
    exists = entry < tokens.to(tl.int64) * per_token
    token = tl.where(exists, entry // per_token, -1)
    expert = tl.load(expert_ids + entry, mask=exists, other=-1)
    named = (expert >= 0) & (expert < experts)
    safe = tl.where(named, expert, 0)
    word = _words_of(expert_tokens, safe, (tl.maximum(token, 0) // 32).to(tl.int32), tokens)
    has = (word >> (token % 32).to(tl.uint32)) & 1
    first = entry_of(expert_ids, token, safe[:, None], per_token)
    return exists & ~(named & (has == 1) & (first == entry))


@triton.jit
def fill_unowned(
    output,
    value,
    expert_ids,
    expert_tokens,
    tokens,
    experts: tl.constexpr,
    per_token: tl.constexpr,
    width: tl.constexpr,
    at_once: tl.constexpr,
):
    """Writes `value` to the rows [width] of all entries that no expert computes: padding."""
    part: tl.constexpr = min(triton.next_power_of_2(width), 128)
    # The last programs begin: they have no other work when there are few tokens.
    first = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * at_once
    for start in range(first, tokens.to(tl.int64) * per_token, tl.num_programs(0) * at_once):
        entry = start + tl.arange(0, at_once)
        empty = unowned(expert_ids, expert_tokens, entry, tokens, experts, per_token)
        if tl.max(empty.to(tl.int32)) > 0:
            for begin in range(0, width, part):
                column = begin + tl.arange(0, part)
                mask = empty[:, None] & (column < width)[None, :]
                tl.store(output + entry[:, None] * width + column[None, :], value, mask)
