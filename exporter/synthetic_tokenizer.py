"""The tokenizer of synthetic checkpoints: byte-level BPE with the chat markers of the real one."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from angelforge.atomic import write_atomic

#: Their ids are 0, 1, 2, …; `small_config` names the first two as padding and end.
SPECIAL_TOKENS = ("<|pad|>", "<|endoftext|>", "<|role_end|>", "<|startoftext|>", "<role>", "</role>")
PAD, END, ROLE_END = 0, 1, 2
#: 256 bytes and the special tokens: the least vocabulary that can spell every text.
SMALLEST = 256 + len(SPECIAL_TOKENS)

CHAT_TEMPLATE = (
    "{%- set names = {'system': 'SYSTEM', 'user': 'HUMAN', 'assistant': 'ASSISTANT'} -%}"
    "{%- for message in messages -%}"
    "{%- if message['role'] not in names -%}"
    "{{- raise_exception('Unknown role ' ~ message['role'] ~ '; expected system, user or assistant.') -}}"
    "{%- endif -%}"
    "{{- '<role>' ~ names[message['role']] ~ '</role>' ~ message['content'] ~ '<|role_end|>' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<role>ASSISTANT</role>' -}}{%- endif -%}"
)

_TEXT = (
    "The patient reports chest pain, shortness of breath and a persistent cough for three days. On examination "
    "the blood pressure is raised, the heart rate is regular and the lungs are clear. Which tests should be "
    "ordered, and which treatment is recommended? A fever with a sore throat is often caused by a virus; "
    "antibiotics do not help against it. Diabetes is treated with diet, exercise, metformin and, where needed, "
    "insulin. Headache, dizziness and nausea after a fall need a careful neurological examination. Please explain "
    "the diagnosis in plain words. The doctor and the nurse discuss the dose of the medicine, its side effects "
    "and its interactions with other drugs. Hypertension is a risk factor for stroke, heart failure and kidney "
    "disease. What are the symptoms of anaemia? Tiredness, pale skin and a fast pulse. When should a child with a "
    "rash be seen by a doctor? At once, if the rash does not fade under pressure. "
    "患者主诉胸痛、气短和咳嗽三天。高血压是中风和心脏病的危险因素。请用简单的语言解释诊断和治疗。"
)


def write_tokenizer(folder: Path, vocab_size: int, max_positions: int, texts: Iterable[str] = (_TEXT,)) -> None:
    """Writes tokenizer.json and tokenizer_config.json (with the chat template) for a model of `vocab_size` ids.

    The merges are learnt from `texts`. At most `vocab_size` ids are used, and fewer where they offer no
    more merges: the remaining ids exist in the model alone, and decode to nothing. `vocab_size` must be at least
    SMALLEST.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    write_atomic(folder / "tokenizer.json", tokenizer.to_str(pretty=True))
    settings = {
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": "<|startoftext|>",
        "chat_template": CHAT_TEMPLATE,
        "eos_token": SPECIAL_TOKENS[END],
        "model_max_length": max_positions,
        "pad_token": SPECIAL_TOKENS[PAD],
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    write_atomic(folder / "tokenizer_config.json", json.dumps(settings, indent=2) + "\n")
