"""Choices of experts as MoERoute hands them on: by token, and as bits by expert."""

import numpy as np


def expert_tokens(expert_ids: np.ndarray, experts: int) -> np.ndarray:
    """int32 [experts, words] of expert_ids int32 [T, k]: bit t % 32 of word [e, t // 32] says that e has token t."""
    tokens = len(expert_ids)
    bits = np.zeros((experts, -(-tokens // 128) * 128), bool)
    token, slot = np.nonzero(expert_ids >= 0)
    bits[expert_ids[token, slot], token] = True
    return np.packbits(bits, axis=1, bitorder="little").view(np.int32)


def choose(
    rng: np.random.Generator, tokens: int, experts: int, per_token: int, padding: int = 0, shared: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """(expert_ids [T, k], expert_tokens): distinct random experts, `shared` ones last, the last rows padding."""
    ids = np.array([rng.permutation(experts - shared)[: per_token - shared] for _ in range(tokens)])
    everyone = np.broadcast_to(np.arange(experts - shared, experts), (tokens, shared))
    ids = np.concatenate([ids.reshape(tokens, per_token - shared), everyone], axis=1).astype(np.int32)
    ids[tokens - padding :] = -1
    return ids, expert_tokens(ids, experts)
