"""Each supervised objective learns a task that a wrong mask, pooling or shift would spoil (T12).

Learning alone proves little: a reward model that pools at padding still reaches 97%.  It complements the exact tests.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxtrain.evaluate.heldout import evaluate, make_eval_step
from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.objectives import DPO, SFT, RewardModel
from jaxtrain.objectives.dpo import add_reference
from jaxtrain.optim import AdamW, Linear
from jaxtrain.train.state import new_state
from jaxtrain.train.step import make_train_step
from jaxtrain.types import Pairs, Tokens

VOCAB, PROMPT, LONGEST, BATCH = 16, 4, 6, 64
EOS = 0  # also the padding's id: masks must come from lengths
CONFIG = DecoderConfig(
    vocab_size=VOCAB,
    num_layers=2,
    d_model=64,
    num_heads=4,
    num_kv_heads=4,
    d_ff=128,
    max_positions=16,
    tie_embeddings=False,
)


def rows(prompts: np.ndarray, completions: list[np.ndarray]) -> Tokens:
    """Prompt, completion and EOS, padded on the right; weights on the completion and its EOS."""
    shape = (len(prompts), PROMPT + LONGEST + 1)
    ids = np.full(shape, EOS, np.int32)
    lengths = np.array([PROMPT + len(c) + 1 for c in completions])
    for row, prompt, completion in zip(ids, prompts, completions, strict=True):
        row[:PROMPT], row[PROMPT : PROMPT + len(completion)] = prompt, completion
    slots = np.arange(shape[1])
    valid = slots < lengths[:, None]
    trained = (slots >= PROMPT - 1) & (slots < lengths[:, None] - 1)
    return Tokens(
        ids=ids,
        targets=np.roll(ids, -1, axis=1),
        weights=trained.astype(np.float32),
        positions=(slots * valid).astype(np.int32),
        segments=valid.astype(np.int32),
    )


def copy_pairs(seed: int, count: int = BATCH) -> Pairs:
    """Chosen: the prompt's first token, one to six times over.  Rejected: other tokens, as often as it likes."""
    rng = np.random.default_rng(seed)
    prompts = rng.integers(1, VOCAB, (count, PROMPT))
    chosen = [np.full(rng.integers(1, LONGEST + 1), prompt[0]) for prompt in prompts]
    wrong = [1 + (prompt[0] + rng.integers(0, VOCAB - 2)) % (VOCAB - 1) for prompt in prompts]
    rejected = [np.full(rng.integers(1, LONGEST + 1), token) for token in wrong]
    zeros = np.zeros(count, np.float32)
    return Pairs(
        chosen=rows(prompts, chosen),
        rejected=rows(prompts, rejected),
        reference_chosen=zeros,
        reference_rejected=zeros,
        margin=zeros,
        weight=np.ones(count, np.float32),
    )


def train(model, objective, params, batches, steps: int, peak: float = 3e-3):
    optimizer = AdamW(schedule=Linear(peak=peak, warmup_steps=10), weight_decay=0.0)
    tx = optimizer.build(steps, model.shapes(), model.axes)
    state = new_state(jax.tree.map(jnp.copy, params), tx, 0)
    step = make_train_step(model.apply, objective, tx)
    for number in range(steps):
        state, _ = step(state, batches(number))
    assert int(state.skipped) == 0
    return state.params


def test_pairs_differ():
    pairs = copy_pairs(0, 1000)
    assert (pairs.chosen.ids[:, PROMPT] != pairs.rejected.ids[:, PROMPT]).all()
    assert (pairs.chosen.ids[:, PROMPT] == pairs.chosen.ids[:, 0]).all()


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_reward_model_learns(seed):
    model = build_model(dataclasses.replace(CONFIG, heads=("reward",)))
    step = make_eval_step(model.apply, RewardModel())
    heldout = [copy_pairs(10**6 + seed, 512)]
    params = model.init(jax.random.key(seed))
    assert evaluate(step, params, heldout)["accuracy"] < 0.7
    params = train(model, RewardModel(), params, lambda n: copy_pairs(seed * 10**4 + n), 300)
    assert evaluate(step, params, heldout)["accuracy"] >= 0.99


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_dpo_learns(seed):
    model = build_model(CONFIG)
    reference = model.init(jax.random.key(seed))
    refer = jax.jit(lambda pairs: add_reference(model.apply, reference, pairs))
    step = make_eval_step(model.apply, DPO(beta=0.1))
    heldout = [refer(copy_pairs(10**6 + seed, 512))]
    before = evaluate(step, reference, heldout)
    assert before["loss"] == pytest.approx(np.log(2), abs=1e-6) and before["rewards/margins"] == 0
    params = train(model, DPO(beta=0.1), reference, lambda n: refer(copy_pairs(seed * 10**4 + n)), 200)
    after = evaluate(step, params, heldout)
    assert after["rewards/accuracies"] >= 0.99
    assert after["rewards/margins"] >= 3


@pytest.mark.parametrize("seed", [0, pytest.param(1, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_sft_learns_to_stop(seed):
    """Completions go on with probability 1/2, so EOS must come to about 1/2 too, though it is the padding's id."""
    model = build_model(CONFIG)

    def batch(number):
        rng = np.random.default_rng(seed * 10**4 + number)
        prompts = rng.integers(1, VOCAB, (BATCH, PROMPT))
        lengths = np.minimum(rng.geometric(0.5, BATCH), LONGEST)
        return rows(prompts, [np.full(n, prompt[0]) for n, prompt in zip(lengths, prompts, strict=True)])

    params = train(model, SFT(), model.init(jax.random.key(seed)), batch, 200)
    some = batch(10**6)
    probs = jax.nn.softmax(model.apply(params, some).logits)[:, PROMPT, EOS]  # after the first copy
    assert 0.3 <= float(probs.mean()) <= 0.7
    follows = jax.nn.softmax(model.apply(params, some).logits)[:, PROMPT - 1, :]
    assert float(np.take_along_axis(np.asarray(follows), some.ids[:, :1], axis=1).mean()) > 0.9
