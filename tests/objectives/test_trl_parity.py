"""T2: loss, gradients, metrics and three updates of TRL's own trainers, on the same weights and batches.

Everything is built here: a Llama from its config and a tokenizer of single characters; nothing is fetched.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxtrain.models import DecoderConfig, Rope, build_model
from jaxtrain.objectives import DPO, SFT, RewardModel
from jaxtrain.objectives.dpo import add_reference
from jaxtrain.types import Pairs, Tokens

pytestmark = pytest.mark.parity

COMPILE_FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,?!"
SPECIAL = ("<pad>", "<eos>", "<unk>")
V, L, D, N, K, H, F = len(CHARACTERS) + len(SPECIAL), 2, 32, 4, 2, 8, 48

ROWS = [
    {"prompt": "what is it? ", "chosen": "a cat.", "rejected": "not a dog, no.", "margin": 0.3},
    {"prompt": "say yes. ", "chosen": "yes, of course, yes!", "rejected": "no", "margin": 1.1},
    {"prompt": "go ", "chosen": "on", "rejected": "away", "margin": 0.0},
    {"prompt": "tell me a long story ", "chosen": "once upon a time.", "rejected": "the end", "margin": 2.0},
]


@pytest.fixture(scope="module")
def torch():
    module = pytest.importorskip("torch", reason="parity with TRL needs torch (the 'parity' extra)")
    pytest.importorskip("trl", reason="parity with TRL needs trl (the 'parity' extra)")
    return module


@pytest.fixture(scope="module")
def tokenizer(torch):
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {piece: i for i, piece in enumerate([*SPECIAL, *CHARACTERS])}
    characters = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    characters.pre_tokenizer = pre_tokenizers.Split(Regex("."), behavior="isolated")
    characters.decoder = decoders.Fuse()
    names = {"pad_token": "<pad>", "eos_token": "<eos>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=characters, **names)


def llama(torch, cls, seed):
    """A random Llama.  Its weights are larger than an initialisation's, so that no token is like another."""
    from transformers import LlamaConfig

    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=L, num_attention_heads=N,
        num_key_value_heads=K, head_dim=H, max_position_embeddings=128, rms_norm_eps=1e-6,
        tie_word_embeddings=False, num_labels=1, attn_implementation="eager",
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )  # fmt: skip
    model = cls(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.1 * noise if "norm" in name else 0.2 * noise)
    return model


def decoder(head):
    return build_model(
        DecoderConfig(
            vocab_size=V,
            num_layers=L,
            d_model=D,
            num_heads=N,
            num_kv_heads=K,
            head_dim=H,
            d_ff=F,
            max_positions=128,
            rope=Rope(theta=10000.0),
            tie_embeddings=False,
            norm_eps=1e-6,
            heads=(head,),
        )
    )


def ours(tensors):
    """Hugging Face's named tensors (weights or gradients) as our parameter tree."""
    arrays = {name.removeprefix("model."): tensor.detach().numpy() for name, tensor in tensors.items()}

    def layers(name, *shape):
        rows = [arrays[f"layers.{i}.{name}.weight"] for i in range(L)]
        # torch stores [out, in], our kernels are [in, out], with the heads' axis apart.
        return jnp.stack([row.T.reshape(shape) for row in rows])

    attention = {
        "query": {"kernel": layers("self_attn.q_proj", D, N, H)},
        "key": {"kernel": layers("self_attn.k_proj", D, K, H)},
        "value": {"kernel": layers("self_attn.v_proj", D, K, H)},
        "out": {"kernel": layers("self_attn.o_proj", N, H, D)},
    }
    mlp = {
        "gate": {"kernel": layers("mlp.gate_proj", D, F)},
        "up": {"kernel": layers("mlp.up_proj", D, F)},
        "down": {"kernel": layers("mlp.down_proj", F, D)},
    }
    tree = {
        "embed": {"embedding": jnp.asarray(arrays["embed_tokens.weight"])},
        "layers": {
            "attention": attention,
            "attention_norm": {"scale": layers("input_layernorm", D)},
            "mlp": mlp,
            "mlp_norm": {"scale": layers("post_attention_layernorm", D)},
        },
        "final_norm": {"scale": jnp.asarray(arrays["norm.weight"])},
    }
    if "lm_head.weight" in arrays:
        tree["lm_head"] = {"kernel": jnp.asarray(arrays["lm_head.weight"].T)}
    else:
        tree["reward_head"] = {"kernel": jnp.asarray(arrays["score.weight"].T)}
    return tree


def shifted(ids, valid, trained) -> Tokens:
    """Rows as TRL collates them, ``[B, T]``, as ours ``[B, T]``: the last position predicts nothing."""
    ids, valid, trained = (np.asarray(x).astype(np.int32) for x in (ids, valid, trained))

    def following(x):
        return np.pad(x[:, 1:], ((0, 0), (0, 1)))

    positions = np.arange(ids.shape[1], dtype=np.int32)[None] * valid
    weights = following(trained).astype(np.float32)
    return Tokens(ids=ids, targets=following(ids), weights=weights, positions=positions, segments=valid)


def shifted_pairs(inputs, mask_name, reward_margin=None) -> Pairs:
    ids, valid = inputs["input_ids"], inputs["attention_mask"]
    half = len(ids) // 2
    mask = inputs[mask_name]
    chosen, rejected = (shifted(ids[s], valid[s], mask[s]) for s in (slice(half), slice(half, None)))
    zeros = np.zeros(half, np.float32)
    margin = zeros if reward_margin is None else np.asarray(reward_margin)
    return Pairs(
        chosen=chosen, rejected=rejected, reference_chosen=zeros, reference_rejected=zeros,
        margin=margin, weight=zeros + 1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def trainer_of(torch, tokenizer, tmp_path_factory):
    """(trainer class, config class, rows, model, options) -> a trainer of TRL's and its collated batch."""
    from datasets import Dataset

    def build(trainer_class, config_class, rows, model, *, kwargs=None, **options):
        args = config_class(
            output_dir=str(tmp_path_factory.mktemp("trl")), report_to=[], use_cpu=True, bf16=False,
            gradient_checkpointing=False, per_device_train_batch_size=len(rows), dataset_num_proc=None,
            **options,
        )  # fmt: skip
        trainer = trainer_class(
            model=model, args=args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer,
            **(kwargs or {}),
        )  # fmt: skip
        return trainer, trainer.data_collator(list(trainer.train_dataset))

    return build


def peer_step(trainer, inputs):
    """TRL's loss, gradients in our layout, and metrics of one batch."""
    model = trainer.model
    model.train()
    model.zero_grad()
    loss = trainer.compute_loss(model, dict(inputs))
    loss.backward()
    grads = ours({name: parameter.grad for name, parameter in model.named_parameters()})
    metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
    return float(loss.detach()), grads, metrics


def our_step(apply, objective):
    """(params, batch) -> the mean loss, gradients and metrics."""

    def mean(params, batch):
        loss = objective(apply, params, batch, None)
        return loss.total / loss.weight, loss.metrics

    compiled = jax.jit(jax.value_and_grad(mean, has_aux=True), compiler_options=COMPILE_FAST)

    def step(params, batch):
        (loss, metrics), grads = compiled(params, batch)
        return float(loss), grads, {name: float(m.total / m.weight) for name, m in metrics.items()}

    return step


def check_step(found, expected, names):
    (loss, grads, metrics), (peer_loss, peer_grads, peer_metrics) = found, expected
    np.testing.assert_allclose(loss, peer_loss, rtol=1e-5)

    def check(path, one, other):
        scale = np.abs(other).max()
        assert scale > 0, path
        np.testing.assert_allclose(one, other, rtol=0, atol=1e-4 * scale, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(check, grads, peer_grads)
    for name, peer_name in names.items():
        np.testing.assert_allclose(metrics[name], peer_metrics[peer_name], rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.fixture(scope="module")
def sft(torch, trainer_of):
    from transformers import LlamaForCausalLM
    from trl import SFTConfig, SFTTrainer

    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    trainer, inputs = trainer_of(SFTTrainer, SFTConfig, rows, llama(torch, LlamaForCausalLM, 0))
    tokens = shifted(inputs["input_ids"], inputs["attention_mask"], inputs["labels"] != -100)
    assert tokens.weights.sum() == sum(len(row["chosen"]) + 1 for row in ROWS)  # completions with their EOS
    return trainer, inputs, tokens


def test_logits(torch, sft):
    trainer, inputs, tokens = sft
    with torch.no_grad():
        peer = trainer.model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    logits = decoder("lm").apply(ours(trainer.model.state_dict()), tokens).logits
    valid = tokens.segments > 0
    assert np.abs(peer.numpy()[valid]).max() > 1
    np.testing.assert_allclose(np.asarray(logits)[valid], peer.numpy()[valid], rtol=0, atol=2e-5)


def test_sft(sft):
    trainer, inputs, tokens = sft
    params = ours(trainer.model.state_dict())
    found = our_step(decoder("lm").apply, SFT())(params, tokens)
    check_step(found, peer_step(trainer, inputs), {"accuracy": "mean_token_accuracy"})
    # The other reduction is another number: this comparison could tell them apart.
    other, _, _ = our_step(decoder("lm").apply, SFT(reduction="sequence"))(params, tokens)
    assert abs(other - found[0]) > 1e-2


@pytest.mark.parametrize(
    "options",
    [
        {"loss": "sigmoid"},
        {"loss": "sigmoid", "beta": 0.5},
        {"loss": "sigmoid_norm", "beta": 2.0},
        {"loss": "robust", "label_smoothing": 0.1},
        {"loss": "hinge"},
        {"loss": "ipo"},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_dpo(torch, trainer_of, options):
    from transformers import LlamaForCausalLM
    from trl import DPOConfig, DPOTrainer

    rows = [{name: row[name] for name in ("prompt", "chosen", "rejected")} for row in ROWS]
    policy, reference = (llama(torch, LlamaForCausalLM, seed) for seed in (0, 1))
    peer_options = {"loss_type" if name == "loss" else name: value for name, value in options.items()}
    trainer, inputs = trainer_of(DPOTrainer, DPOConfig, rows, policy, kwargs={"ref_model": reference}, **peer_options)
    apply, params = decoder("lm").apply, ours(policy.state_dict())
    batch = shifted_pairs(inputs, "completion_mask")
    batch = jax.jit(partial(add_reference, apply), compiler_options=COMPILE_FAST)(ours(reference.state_dict()), batch)
    names = ("rewards/chosen", "rewards/rejected", "rewards/margins", "rewards/accuracies")
    names += ("logps/chosen", "logps/rejected")
    check_step(our_step(apply, DPO(**options))(params, batch), peer_step(trainer, inputs), {n: n for n in names})


@pytest.mark.parametrize(
    "objective", [RewardModel(), RewardModel(centering=0.01), RewardModel(centering=0.1, use_margin=True)]
)
def test_reward_model(torch, trainer_of, objective):
    from transformers import LlamaForSequenceClassification
    from trl import RewardConfig, RewardTrainer

    columns = ("prompt", "chosen", "rejected", *(["margin"] if objective.use_margin else []))
    rows = [{name: row[name] for name in columns} for row in ROWS]
    model = llama(torch, LlamaForSequenceClassification, 0)
    trainer, inputs = trainer_of(
        RewardTrainer, RewardConfig, rows, model, center_rewards_coefficient=objective.centering or None
    )
    batch = shifted_pairs(inputs, "attention_mask", inputs.get("margin"))
    assert ("margin" in inputs) == objective.use_margin
    found = our_step(decoder("reward").apply, objective)(ours(model.state_dict()), batch)
    check_step(found, peer_step(trainer, inputs), {n: n for n in ("accuracy", "margin", "mean_reward")})


def test_three_updates(torch, sft):
    """AdamW on the SFT batch: the losses of the updated models, and where the weights have gone."""
    trainer, inputs, tokens = sft
    apply, start = decoder("lm").apply, ours(trainer.model.state_dict())
    kept = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    options = {"weight_decay": 0.1, "eps": 1e-8}
    peer_optimizer = torch.optim.AdamW(trainer.model.parameters(), lr=1e-3, betas=(0.9, 0.999), **options)
    optimizer = optax.adamw(1e-3, b1=0.9, b2=0.999, **options)
    params, state = start, optimizer.init(start)
    losses, peer_losses = [], []
    step = our_step(apply, SFT())
    for _ in range(3):
        loss, grads, _ = step(params, tokens)
        updates, state = optimizer.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        peer_loss, _, _ = peer_step(trainer, inputs)
        peer_optimizer.step()
        losses.append(loss)
        peer_losses.append(peer_loss)
    peer_params = ours({name: tensor.clone() for name, tensor in trainer.model.state_dict().items()})
    trainer.model.load_state_dict(kept)

    np.testing.assert_allclose(losses, peer_losses, rtol=1e-5)
    assert peer_losses[2] < peer_losses[0] - 0.01
    for one, other, before in zip(*map(jax.tree.leaves, (params, peer_params, start)), strict=True):
        moved = np.linalg.norm(np.asarray(other - before))
        assert np.linalg.norm(np.asarray(one - other)) < 1e-3 * moved
