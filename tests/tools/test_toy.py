"""The toy: the stored one has learnt, training is repeatable, and the torch modules that are trained are the model."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from support.draft_references import load_draft_reference

from angelforge.checkpoint import Checkpoint
from angelforge.config import ModelConfig
from angelforge.draft_checkpoint import DraftCheckpoint
from angelforge.draft_config import DraftConfig
from angelforge.exporter.synthetic_draft import small_draft_config, write_draft
from angelforge.runtime.validate.draft_reference import DraftReference
from angelforge.runtime.validate.reference import Reference, load_reference
from angelforge.tools.toy import DRAFT, MODEL
from angelforge.tools.toy.complaints import COMPLAINTS
from angelforge.tools.toy.data import batches
from angelforge.tools.toy.draft import ToyDraft
from angelforge.tools.toy.draft_training import STEPS, accepted_length
from angelforge.tools.toy.files import CONFIG, DRAFT_CONFIG, load_tensors
from angelforge.tools.toy.grammar import dialogue
from angelforge.tools.toy.model import ToyModel
from angelforge.tools.toy.tokenizer import Encoder
from angelforge.tools.toy.training import answer_accuracy, train_model
from angelforge.tools.train_toy import train_toy

torch.set_num_threads(1)  # small matrices: more threads only wait for each other


@pytest.fixture(scope="module")
def model() -> ToyModel:
    loaded = ToyModel(ModelConfig.load(MODEL))
    loaded.load_state_dict(load_tensors(MODEL))
    return loaded


def load_draft(folder: Path, target: ModelConfig) -> ToyDraft:
    """A draft in torch with the tensors of a folder."""
    tensors = load_tensors(folder)
    draft = ToyDraft(DraftConfig.load(folder, target), torch.arange(len(tensors["d2t"])) + tensors["d2t"])
    draft.load_state_dict(tensors)
    return draft


def tokens() -> np.ndarray:
    """A dialogue."""
    return Encoder(MODEL).encode(dialogue(random.Random(4)))[0]


def test_the_stored_checkpoints_are_whole_and_small() -> None:
    """They fit each other and their configurations, take less than 15 MB, and say what they are."""
    checkpoint = Checkpoint.open(MODEL)
    checkpoint.check()
    draft = DraftCheckpoint.open(DRAFT, checkpoint.config)
    draft.check()
    assert json.loads((MODEL / "config.json").read_text()) == CONFIG
    assert json.loads((DRAFT / "config.json").read_text()) == DRAFT_CONFIG
    assert sum(file.stat().st_size for folder in (MODEL, DRAFT) for file in folder.iterdir()) < 15e6
    parameters = sum(int(np.prod(info.shape)) for info in checkpoint.tensors.values())
    assert 2e6 < parameters < 5e6
    for folder in (MODEL, DRAFT):
        assert "no medical value" in (folder / "README.md").read_text()


def test_the_architecture_is_complete() -> None:
    """Experts in groups, a bias that training has moved, a shared expert, QK-norm, partial RoPE."""
    config = ModelConfig.load(MODEL)
    assert config.n_group > config.topk_group > 1
    assert config.num_shared_experts == 1
    assert config.use_qk_norm
    assert config.rotary_dim < config.head_dim
    assert load_tensors(MODEL)["model.layers.1.mlp.gate.expert_bias"].abs().max() > 0.01


def test_what_is_trained_is_the_model(model: ToyModel) -> None:
    """The torch model computes what the independent reference computes, and every layer's residual stream."""
    ids = tokens()
    with torch.no_grad():
        logits, streams = model(torch.from_numpy(ids)[None])
    trace = load_reference(MODEL).trace(ids)
    np.testing.assert_allclose(logits[0], trace.logits, atol=2e-4 * np.abs(trace.logits).max())
    for found, expected in zip(streams, trace.residuals[1:], strict=True):
        np.testing.assert_allclose(found[0], expected, atol=2e-4 * np.abs(expected).max())


@pytest.mark.parametrize("trained", [True, False])
def test_what_is_trained_is_the_draft(model: ToyModel, tmp_path: Path, trained: bool) -> None:
    """Every step of the torch draft, on its own states, is the reference's; also with random weights."""
    folder = DRAFT if trained else write_draft(tmp_path / "draft", MODEL, small_draft_config(CONFIG), dtype="F32")
    draft, ids = load_draft(folder, model.config), tokens()[:40]
    trace = load_reference(MODEL).trace(ids)
    hidden = _fresh(folder).first_hidden(trace)[:-1]
    captured = np.concatenate([trace.residuals[layer + 1] for layer in draft.config.capture_layers], axis=1)[:-1]
    embeddings = model.model.word_embeddings.weight[torch.from_numpy(ids[1:])]
    with torch.no_grad():
        logits = draft(torch.from_numpy(captured).float()[None], embeddings[None], STEPS)
    begin = 20  # a chain that begins here and is fed the dialogue's own tokens
    reference = _fresh(folder)
    made = reference.step(ids[1 : begin + 2], hidden[: begin + 1], 0)
    for step in range(STEPS):
        found, expected = logits[step][0, begin + step].numpy(), made.logits[-1]
        np.testing.assert_allclose(found, expected, atol=2e-4 * np.abs(expected).max())
        made = reference.step(ids[begin + step + 2 : begin + step + 3], made.hidden[-1:], begin + step + 1)


def _fresh(folder: Path) -> DraftReference:
    return load_draft_reference(folder, MODEL)


def test_the_stored_toy_has_learnt(model: ToyModel) -> None:
    """On dialogues that it has not seen; and its draft is worth having."""
    unseen = next(batches(Encoder(MODEL), 16, 99))
    assert answer_accuracy(model, unseen) > 0.9
    assert accepted_length(load_draft(DRAFT, model.config), model, unseen) > 2.5


def test_dialogues_are_repeatable_and_name_what_they_are_about() -> None:
    first, second = ([dialogue(random.Random(seed)) for seed in range(50)] for _ in range(2))
    assert first == second
    assert all(messages[-1]["role"] == "assistant" for messages in first)
    text = json.dumps(first)
    assert sum(complaint.sign in text for complaint in COMPLAINTS) > len(COMPLAINTS) / 2


def test_answers_are_what_is_learnt() -> None:
    encoder = Encoder(MODEL)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}] * 2
    ids, answer = encoder.encode(messages)
    learnt = encoder._tokenizer.decode(ids[answer].tolist())
    assert learnt == "Hello.Hello."
    assert answer[-1]


def test_the_script_runs(tmp_path: Path) -> None:
    """A few steps of each training: checkpoints that the loader accepts, with the stored tokenizer."""
    result = CliRunner().invoke(train_toy, [str(tmp_path), "--steps", "0.002"])
    assert result.exit_code == 0, result.output
    assert (tmp_path / "model/tokenizer.json").read_bytes() == (MODEL / "tokenizer.json").read_bytes()
    target = Checkpoint.open(tmp_path / "model")
    target.check()
    DraftCheckpoint.open(tmp_path / "draft", target.config).check()


def test_training_is_repeatable() -> None:
    """Equal seeds give equal weights, whatever was computed before."""

    def trained() -> torch.Tensor:
        torch.manual_seed(3)
        model = ToyModel(ModelConfig.from_dict(CONFIG))
        train_model(model, batches(Encoder(MODEL), 2, 5), 2, lambda line: None)
        return torch.cat([parameter.detach().flatten() for parameter in model.parameters()])

    assert torch.equal(trained(), trained())


def test_references_take_the_toys_configuration() -> None:
    """No key of the toy's config.json is unknown to the reference."""
    assert Reference(CONFIG, load_reference(MODEL).tensor).layers == CONFIG["num_hidden_layers"]
