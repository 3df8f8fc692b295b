"""The KV cache on a CPU takes what is needed, within what is free or given."""

import pytest

from angelforge.config import ModelConfig
from angelforge.errors import AngelForgeError, UsageError
from angelforge.exporter.synthetic_config import FULL_CONFIG
from angelforge.runtime import memory

CONFIG = ModelConfig.from_dict(FULL_CONFIG)
PAGE = 64 * 32 * 2 * 4 * 128 * 4  # bytes: tokens, layers, keys and values, heads, dimensions, f32


def test_the_cache_holds_all_contexts_where_memory_allows():
    assert memory.pool_pages(CONFIG, 64, 32768, 2, 10**12) == 2 * 512 + 1
    assert memory.pool_pages(CONFIG, 64, 100, 3, 10**12) == 3 * 2 + 1


def test_the_cache_stays_within_the_memory_given():
    assert memory.pool_pages(CONFIG, 64, 32768, 2, 10 * PAGE) == 10
    assert memory.pool_pages(CONFIG, 64, 32768, 2, 10 * PAGE - 1) == 9


def test_the_cache_takes_a_quarter_of_the_free_memory_by_default(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda: 40 * PAGE)
    assert memory.pool_pages(CONFIG, 64, 32768, 2) == 10
    monkeypatch.setattr(memory, "free_memory", lambda: 7 * PAGE)
    with pytest.raises(AngelForgeError, match=r"hold 1 pages of 8\.4 MB, but at least 2 .* Free memory"):
        memory.pool_pages(CONFIG, 64, 32768, 2)


def test_memory_that_holds_no_page_is_wrong_use():
    with pytest.raises(UsageError, match="hold 1 pages"):
        memory.pool_pages(CONFIG, 64, 32768, 2, 2 * PAGE - 1)


def test_slots_stay_within_32_bits():
    assert memory.pool_pages(CONFIG, 64, 2**31, 64, 10**18) * 64 < 2**31


def test_some_memory_is_free() -> None:
    assert memory.free_memory() > 0
