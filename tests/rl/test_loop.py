from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from jaxtrain.generate.sampling import Sampling
from jaxtrain.models import DecoderConfig, build_model
from jaxtrain.rl.config import PPOConfig
from jaxtrain.rl.loop import PPOLoop
from jaxtrain.rl.rewards import ModelReward
from jaxtrain.rl.rollout import estimate_advantages, make_sampler
from jaxtrain.sharding import MeshConfig, make_mesh


def recorded(run):
    """Keeps the metrics of every policy update."""
    history, step = [], run.loop.policy_step

    def policy_step(state, batch):
        state, metrics = step(state, batch)
        history.append(jax.device_get(metrics))
        return state, metrics

    run.loop.policy_step = policy_step
    return history


@pytest.mark.smoke
@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_the_first_ratio_is_one(copy_run, temperature):
    run = copy_run(temperature=temperature, epochs=1, stop_ids=(3,))
    history = recorded(run)
    metrics = run.iterate()
    assert abs(history[0]["val/ratio"] - 1) <= 1e-5
    # The mean of ½ (log ρ)²: 1e-10 / 2 bounds the typical |ρ − 1| by 1e-5.
    assert history[0]["policy/approxkl_avg"] <= 0.5e-10 and history[0]["policy/clipfrac_avg"] == 0
    assert metrics["gate/max"] <= 1e-5 and metrics["objective/kl"] == 0
    assert history[1]["policy/approxkl_avg"] > 1e-5, "the first update must move the policy"


def test_a_tampered_sampler_is_refused_before_any_update(copy_run):
    run = copy_run(temperature=0.7, stop_ids=(3,))
    before = jax.device_get(run.policy.params)
    run.loop.sampler = make_sampler(run.loop.policy, Sampling(temperature=1.0, stop_ids=(3,)), 5)
    with pytest.raises(ValueError, match=r"sampler and trainer disagree.*gate_threshold=0\.001"):
        run.iterate()
    assert int(run.policy.step) == 0
    jax.tree.map(np.testing.assert_array_equal, before, run.policy.params)


def test_stale_parameters_are_refused(copy_run):
    run = copy_run()
    sampler = run.loop.sampler
    run.loop.sampler = lambda params, *args: sampler(jax.tree.map(lambda x: 1.05 * x, params), *args)
    with pytest.raises(ValueError, match="sampler and trainer disagree"):
        run.iterate()


def test_a_resumed_run_repeats_the_uninterrupted_one_bit_for_bit(copy_run):
    settings = {"stop_ids": (3,), "kl_target": 0.5, "kl_horizon": 20, "seed": 1}
    whole = copy_run(**settings)
    logged = [whole.iterate() for _ in range(4)]
    assert logged[0]["objective/kl_coef"] != logged[3]["objective/kl_coef"], "the controller must have state to lose"

    first = copy_run(**settings)
    for _ in range(2):
        first.iterate()
    saved = jax.device_get((first.policy, first.critic, first.state))
    second = copy_run(**settings)
    second.policy, second.critic, second.state = jax.device_put(saved)
    assert [second.iterate() for _ in range(2)] == logged[2:]
    jax.tree.map(np.testing.assert_array_equal, second.policy, whole.policy)
    jax.tree.map(np.testing.assert_array_equal, second.critic, whole.critic)


def test_iterations_differ_and_seeds_differ(copy_run):
    def rewards_of(seed):
        run = copy_run(seed=seed)
        return [run.iterate()["objective/entropy"] for _ in range(2)]

    first, other = rewards_of(0), rewards_of(1)
    assert len({*first, *other}) == 4


def test_rewards_see_exactly_what_was_sampled(copy_run):
    seen = []

    def watch(prompts, completions, completion_ids, rows):
        seen.append((prompts, completions, completion_ids, rows))
        return [0.25] * len(rows)

    run = copy_run(rewards=(watch,), stop_ids=(3, 4, 5), epochs=1)
    prompts = run.loop.prompts
    run.loop.prompts = lambda i: dataclasses.replace(prompts(i), rows=[{"number": n} for n in range(8)])
    metrics = run.iterate()
    ((asked, texts, ids, rows),) = seen
    batch = prompts(0)
    for n in range(8):
        prompt = batch.ids[n, 4 - batch.lengths[n] :].tolist()
        assert rows[n]["prompt_ids"] == prompt and asked[n] == " ".join(map(str, prompt))
        assert rows[n]["number"] == n and rows[n]["stopped"] == (ids[n][-1] in (3, 4, 5))
        assert texts[n] == " ".join(map(str, ids[n][:-1] if rows[n]["stopped"] else ids[n]))
    stopped = np.mean([row["stopped"] for row in rows])
    assert 0 < stopped < 1
    assert metrics["completions/stopped_fraction"] == stopped == 1 - metrics["completions/truncated_fraction"]
    assert metrics["completions/mean_length"] == np.mean([len(x) for x in ids])
    assert metrics["rewards/watch/mean"] == metrics["objective/scores"] == 0.25


def test_a_nan_reward_stops_the_run_with_its_name(copy_run):
    def broken(prompts, completions, completion_ids, rows):
        return [0.0] * 5 + [float("nan")] + [0.0] * 2

    run = copy_run(rewards=(broken,))
    with pytest.raises(ValueError, match="reward broken returned nan for row 5"):
        run.iterate()
    assert int(run.policy.step) == 0


def test_unscored_rows_are_not_trained(copy_run):
    def half(prompts, completions, completion_ids, rows):
        return [1.0 if n % 2 else None for n in range(len(rows))]

    run = copy_run(rewards=(half,))
    rollout, metrics = run.loop.make_rollout(run.policy.params, run.critic.params, 0, np.float32(0))
    assert (rollout.tokens.weights.sum(axis=1) > 0).tolist() == [False, True] * 4
    assert not rollout.advantages[::2].any() and metrics["objective/scores"] == 1.0


def test_epochs_end_when_the_policy_drifts(copy_run):
    assert copy_run(epochs=3).iterate()["policy/epochs"] == 3
    assert copy_run(epochs=3, target_kl_stop=1e-6).iterate()["policy/epochs"] == 1


def test_every_epoch_trains_every_row_once_in_its_own_order(copy_run):
    """Six rollouts in minibatches of four: the second is filled up with two rows of weight 0."""
    run, orders = copy_run(prompts_per_iteration=6), []
    step = run.loop.policy_step

    def policy_step(state, batch):
        rows = zip(batch.tokens.ids.tolist(), batch.tokens.weights.sum(axis=1), strict=True)
        orders.append([tuple(ids) for ids, weight in rows if weight > 0])
        return step(state, batch)

    run.loop.policy_step = policy_step
    run.iterate()
    assert [len(x) for x in orders] == [4, 2, 4, 2]
    first, second = orders[0] + orders[1], orders[2] + orders[3]
    assert len(set(first)) == 6 and set(first) == set(second) and first != second


def test_a_shared_critic_learns_the_value(copy_run):
    run = copy_run(critic="shared", rewards=(lambda *a: [1.0] * 8,), kl_coef=0.0, whiten_advantages=False)
    losses = [run.iterate()["loss/value_avg"] for _ in range(12)]
    assert run.critic is None and losses[0] > 0.3 and losses[-1] < 0.5 * losses[0]


def test_critics_are_checked(copy_run):
    run = copy_run()
    given = {
        "policy": run.loop.policy,
        "critic": run.loop.critic,
        "reference_params": {},
        "prompts": run.loop.prompts,
        "decode": str,
        "stop_ids": (),
        "rewards": run.loop.rewards,
        "weights": run.loop.weights,
        "policy_step": run.loop.policy_step,
        "critic_step": run.loop.critic_step,
        "seed": 0,
    }
    with pytest.raises(ValueError, match="critic is 'shared', but one was given"):
        PPOLoop(dataclasses.replace(run.loop.config, critic="shared"), **given)
    with pytest.raises(ValueError, match="no 'value'"):
        PPOLoop(run.loop.config, **(given | {"critic": run.loop.policy}))


def test_reward_models_are_normalised_on_the_first_policy_the_same_in_every_process(copy_run):
    config = DecoderConfig(
        vocab_size=16,
        num_layers=1,
        d_model=16,
        num_heads=2,
        num_kv_heads=1,
        d_ff=16,
        max_positions=16,
        heads=("reward",),
    )
    model = build_model(config)
    reward = ModelReward(model=model, params=model.init(jax.random.key(5)), length=9, batch_size=8)

    def run(**settings):
        return copy_run(rewards=(reward,), prompts_per_iteration=64, epochs=1, **settings)

    first, resumed = run(normalise_batches=2), run(normalise_batches=2)
    metrics = first.iterate()
    assert abs(metrics["rewards/model/mean"]) < 0.5 and 0.7 < metrics["rewards/model/std"] < 1.4
    first.iterate()
    resumed.policy, resumed.critic, resumed.state = first.policy, first.critic, first.state
    resumed.iterate()
    ours, theirs = first.loop.rewards[0], resumed.loop.rewards[0]
    assert (ours.shift, ours.gain) == (theirs.shift, theirs.gain) != (0.0, 1.0)


@pytest.mark.slow
def test_an_iteration_is_the_same_on_eight_devices(copy_run):
    settings = {"minibatch_size": 8, "epochs": 2, "stop_ids": (3,)}
    alone = copy_run(**settings)
    spread = copy_run(**settings, mesh=make_mesh(MeshConfig(data=4, fsdp=2)))
    for _ in range(2):
        expected, found = alone.iterate(), spread.iterate()
        assert expected.keys() == found.keys()
        for name in expected:
            assert found[name] == pytest.approx(expected[name], rel=1e-4, abs=1e-5), name


# Two rows of three tokens; the second was cut off.
SCORES = np.array([1.0, 2.0], np.float32)
STOPPED = np.array([True, False])
WEIGHTS = np.array([[1, 1, 0], [1, 1, 1]], np.float32)
OLD = np.array([[-1, -1, 9], [-1, -1, -1]], np.float32)
REFERENCE = np.array([[-1.5, -1, 7], [-1, -1, -2]], np.float32)
VALUES = np.array([[0.5, 0.25, 9], [0, 0, 0.5]], np.float32)
END = np.array([9.0, 0.75], np.float32)


def estimated(**settings):
    config = PPOConfig(
        iterations=1, prompts_per_iteration=2, max_new_tokens=3, minibatch_size=2, lam=1.0,
        whiten_advantages=False, **settings,
    )  # fmt: skip
    advantages, returns, metrics = estimate_advantages(
        config, SCORES, STOPPED, WEIGHTS, OLD, REFERENCE, VALUES, END, np.float32(0.1)
    )
    return (
        np.asarray(advantages),
        np.asarray(returns),
        {name: float(value) for name, value in metrics.items()},
    )


def test_advantages_by_hand():
    advantages, returns, metrics = estimated()
    # Token rewards: -0.1 · [0.5, 0] + 1 at the end; [0, 0, -0.1 + 2].
    np.testing.assert_allclose(returns, [[0.95, 1, 0], [1.9, 1.9, 1.9]], atol=1e-6)
    np.testing.assert_allclose(advantages, [[0.45, 0.75, 0], [1.9, 1.9, 1.4]], atol=1e-6)
    assert metrics == pytest.approx(
        {
            "objective/scores": 1.5,
            "objective/kl": 0.75,
            "objective/non_score_reward": -0.075,
            "objective/rlhf_reward": 1.425,
            "objective/entropy": 2.5,
        }
    )


def test_truncation_placement_and_missing_eos_by_hand():
    np.testing.assert_allclose(estimated(truncation="bootstrap")[1][:, 0], [0.95, 2.65], atol=1e-6)
    np.testing.assert_allclose(estimated(missing_eos_penalty=0.5)[1][:, 0], [0.95, 1.4], atol=1e-6)
    np.testing.assert_allclose(estimated(missing_eos_score=-1.0)[1][:, 0], [0.95, -1.1], atol=1e-6)
    _, returns, metrics = estimated(kl_placement="loss")
    np.testing.assert_allclose(returns[:, 0], [1, 2], atol=1e-6)
    assert metrics["objective/rlhf_reward"] == 1.5 and metrics["objective/kl"] == pytest.approx(0.75)
    np.testing.assert_allclose(estimated(kl_estimator="k2")[1][:, 0], [1 - 0.0125, 2 - 0.05], atol=1e-6)
    # Rewards -0.05, 1, 0, 0, 1.9 have mean 0.57 and sample deviation 0.87 (Bessel).
    rewards = np.array([-0.05, 1, 0, 0, 1.9])
    whitened = (rewards - rewards.mean()) / rewards.std(ddof=1) + rewards.mean()
    np.testing.assert_allclose(
        estimated(whiten_rewards=True)[1][:, 0], [whitened[:2].sum(), whitened[2:].sum()], atol=1e-5
    )
