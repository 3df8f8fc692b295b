"""Which tokens of the target a draft can propose."""

import numpy as np

from angelforge.bundle import Bundle
from angelforge.draft_config import DraftConfig
from angelforge.errors import AngelForgeError
from angelforge.runtime.batch import Int64
from angelforge.tensorfile import read_tensor


def read_vocabulary(bundle: Bundle, draft: DraftConfig) -> Int64:
    """The target's id of each of the draft's tokens, int64 [draft vocabulary]: the token's number and `d2t` of it.

    Export checked them; raises AngelForgeError if the file no longer holds ids of the target, each once.
    """
    ids: Int64 = np.arange(draft.draft_vocab_size) + read_tensor(bundle.tensors["draft.d2t"])
    if ids.min() < 0 or ids.max() >= draft.vocab_size or np.unique(ids).shape != ids.shape:
        raise AngelForgeError(
            f"{bundle.tensors['draft.d2t'].path} holds a damaged draft.d2t: its ids are not those of "
            f"{draft.vocab_size} tokens, each once. Export the bundle again."
        )
    return ids
