"""Scalar heads on shared bases, and reward models as folders that transformers and PEFT score with."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForSequenceClassification
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, GPTNeoXConfig, PreTrainedTokenizerBase

from align.artifacts.manifest import Manifest, PolicyRecord
from align.artifacts.store import Store
from align.data.chat import Completion, Example
from align.errors import ArtifactError, RecipeError
from align.logps import empty_pack, last_rewards, pack_examples
from align.models import RoleModel, load_base
from align.models.base import quantization_config
from align.models.card import write_card
from align.models.policies import load_policies, locate
from align.models.rewards import NORMALIZATION, Normalization, load_reward, load_reward_base, load_scorer
from align.models.save import empty_scorer, save_policy
from align.spec.model import LoraSettings, ModelSettings
from align.training import collectives
from align.training.checkpoint import gather_trainable
from tests.distributed.ranks import run_ranks
from tests.models.test_wrapped import config
from tests.models.tiny import LORA, logits, randomise, token_ids


def examples(n: int = 5) -> list[Example]:
    """Pairs of many lengths."""
    ids = token_ids(rows=3 * n, length=20, seed=4).tolist()
    pairs = [(ids[i], ids[n + i][: 1 + 3 * i], ids[2 * n + i][: 12 - 2 * i]) for i in range(n)]
    return [
        Example(i, prompt[: 4 + i], tuple(Completion(c, [True] * len(c), False) for c in completions), 1.0)
        for i, (prompt, *completions) in enumerate(pairs)
    ]


@torch.no_grad()
def rewards(roles: RoleModel, role: str = "reward", pack_tokens: int = 10_000) -> torch.Tensor:
    """[2n] rewards of the examples, in their order."""
    found: dict[int, list[torch.Tensor]] = {}
    for pack in pack_examples(examples(), pack_tokens):
        values = list(roles(role, last_rewards, pack))
        for i in pack.examples:
            found[i], values = values[:2], values[2:]
    return torch.stack([value for i in sorted(found) for value in found[i]])


@torch.no_grad()
def scores_of_transformers(model, pad: int, side: str) -> torch.Tensor:
    """The same in transformers' own way: one padded batch and the last token that is not padding."""
    sequences = [e.prompt_ids + c.ids for e in examples() for c in e.completions]
    width = max(map(len, sequences))
    ids, mask = torch.full((len(sequences), width), pad), torch.zeros(len(sequences), width, dtype=torch.long)
    for row, own in enumerate(sequences):
        at = slice(0, len(own)) if side == "right" else slice(width - len(own), width)
        ids[row, at], mask[row, at] = torch.tensor(own), 1
    return model(input_ids=ids, attention_mask=mask).logits[:, 0]


def scored(folder: Path, quantization: str = "none", seed: int = 1) -> RoleModel:
    roles = RoleModel(load_base(folder, quantization=quantization))
    roles.add_adapter("reward", settings=LORA, trainable=True, seed=seed)
    randomise(roles, "reward", seed=seed)
    roles.add_head("reward", seed=seed)
    return roles


def quantized(quantization: str) -> dict:
    return {} if quantization == "none" else {"quantization_config": quantization_config(quantization, torch.float32)}


# Heads ---------------------------------------------------------------------------------------------------------------


def test_a_head_stands_beside_a_shared_base(folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders["llama"], quantization="nf4"))
    before = {name: p.data_ptr() for name, p in roles.base.named_parameters()}
    roles.add_adapter("policy", settings=LORA, trainable=False, seed=1)
    roles.add_adapter("reward", settings=LORA, trainable=True, seed=2)
    roles.add_head("reward", seed=2)
    after = {name.replace(".base_layer", ""): p.data_ptr() for name, p in roles.base.named_parameters()}
    assert before.items() <= after.items(), "one storage of the base"
    assert list(roles.heads) == ["role_reward"]
    names = {name for name, p in roles.named_parameters() if p.requires_grad}
    assert "heads.role_reward.weight" in names
    assert all("role_reward" in name for name in names)
    assert roles.tensors("reward")["base_model.model.score.weight"] is roles.head("reward").weight
    assert not any("score" in name for name in roles.tensors("policy"))
    with torch.no_grad():  # a role without a head computes as ever
        assert roles("policy", logits, token_ids()).shape[-1] == roles.config.vocab_size
    with pytest.raises(ValueError, match="has a head already"):
        roles.add_head("reward")


def test_a_head_is_drawn_from_its_seed_alone(folders: dict[str, Path]) -> None:
    def weight(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        state = torch.random.get_rng_state()
        roles = RoleModel(load_base(folders["llama"]))
        roles.add_base_role("reward")
        found = roles.add_head("reward", seed=seed).weight
        assert torch.equal(state, torch.random.get_rng_state())
        assert not found.requires_grad
        return found

    assert torch.equal(weight(0, 1), weight(0, 2))
    assert not torch.equal(weight(0, 1), weight(1, 1))
    assert weight(0, 0).std() == pytest.approx(1 / 65**0.5, rel=0.3)


def test_head_and_adapter_get_their_gradients(folders: dict[str, Path]) -> None:
    """The head's gradient is the state of the last token; an empty pack reaches every trained tensor with zero."""
    roles = scored(folders["qwen2"])
    pack = pack_examples(examples(), 10_000)[0]
    roles("reward", last_rewards, pack).sum().backward()
    with torch.no_grad():
        states = roles("reward", lambda lm, p, h: lm.model(input_ids=p.input_ids).last_hidden_state.flatten(0, 1), pack)
    expected = states[pack.last].sum(0, keepdim=True)
    torch.testing.assert_close(roles.head("reward").weight.grad, expected, rtol=1e-5, atol=1e-5)
    trained = [p for p in roles.parameters() if p.requires_grad]
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained)
    roles.zero_grad()
    (roles("reward", last_rewards, empty_pack(0)).sum() * 0).backward()
    assert all(p.grad is not None and not p.grad.any() for p in trained)


@pytest.mark.parametrize("make", ["llama", "qwen2", "gpt2"])
def test_a_model_trained_in_full_has_the_head_instead_of_the_language_models(
    folders: dict[str, Path], make: str
) -> None:
    roles = RoleModel(load_base(folders[make]))
    roles.train_base("reward")
    roles.add_head("reward")
    roles("reward", last_rewards, pack_examples(examples(), 10_000)[0]).sum().backward()
    trained = {name: p for name, p in roles.named_parameters() if p.requires_grad}
    assert all(p.grad is not None for p in trained.values()), "DDP waits for a gradient of each of them"
    assert set(roles.trainable_state()) == set(empty_scorer(roles.config).state_dict())
    assert "base.lm_head.weight" not in trained


def test_the_head_computes_in_fp32_under_autocast(folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders["llama"], dtype="bfloat16"))
    roles.train_base("reward")
    head = roles.add_head("reward")
    seen = []
    head.register_forward_hook(lambda _, args, out: seen.append((args[0], out)))
    values = roles("reward", last_rewards, pack_examples(examples(), 10_000)[0])
    states, out = seen[0]
    assert values.dtype == out.dtype == torch.float32
    assert torch.equal(out, states.float() @ head.weight.T), "bf16 would have rounded it"


def test_rewards_depend_on_nothing_but_their_own_tokens(model_kind: tuple[str, str], folders: dict[str, Path]) -> None:
    make, quantization = model_kind
    roles = scored(folders[make], quantization)
    together, alone = rewards(roles, pack_tokens=10_000), rewards(roles, pack_tokens=1)
    # int8 scales activations by what else is in the batch.
    torch.testing.assert_close(together, alone, rtol=0, atol=0.1 if quantization == "int8" else 2e-6)
    assert together.std() > 0.1


def test_an_adapter_of_the_language_models_head_is_refused(folders: dict[str, Path]) -> None:
    roles = RoleModel(load_base(folders["qwen2"]))
    targets = LoraSettings(rank=2, alpha=4, targets=["q_proj", "lm_head"])
    roles.add_adapter("reward", settings=targets, trainable=True)
    with pytest.raises(RecipeError, match=r"changes base_model\.model\.lm_head, which no reward passes through"):
        roles.add_head("reward")


# Folders -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("model_kind", [("llama", "none"), ("qwen2", "none"), ("llama", "nf4"), ("qwen2", "nf4")])
def test_an_adapter_scores_the_same_in_peft(
    model_kind: tuple[str, str], folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase, side: str
) -> None:
    make, quantization = model_kind
    roles = scored(folders[make], quantization)
    out = save_policy(roles, "reward", tmp_path, tokenizer=tokenizer, base_reference=str(folders[make]))
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["score"])
    assert roles.adapter_config("reward").task_type == "CAUSAL_LM", "saving changes nothing"
    peft = AutoPeftModelForSequenceClassification.from_pretrained(
        str(out), num_labels=1, dtype=torch.float32, **quantized(quantization)
    )
    found = scores_of_transformers(peft, tokenizer.pad_token_id, side)
    torch.testing.assert_close(found, rewards(roles), rtol=0, atol=2e-6)


@pytest.mark.parametrize("make", ["llama", "qwen2", "gpt2"])
def test_a_full_model_scores_the_same_in_transformers(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase, make: str
) -> None:
    roles = RoleModel(load_base(folders[make]))
    roles.train_base("reward")
    roles.add_head("reward", seed=3)
    for tensor in roles.trainable_state().values():
        tensor.data.mul_(1.01)
    out = save_policy(roles, "reward", tmp_path, tokenizer=tokenizer, base_reference="")
    assert {path.suffix for path in out.iterdir()} == {".json", ".safetensors", ".jinja"}
    loaded, info = AutoModelForSequenceClassification.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert (loaded.config.num_labels, loaded.config.use_cache) == (1, True)
    found = scores_of_transformers(loaded, loaded.config.pad_token_id, "right")
    torch.testing.assert_close(found, rewards(roles), rtol=0, atol=2e-6)
    again = load_scorer(out)
    assert torch.equal(rewards(again), rewards(roles))
    assert not any(p.requires_grad for p in again.parameters())
    assert again.tensors("reward").keys() == roles.tensors("reward").keys()


def save_under_zero3(rank: int, world: int, folder: Path, out: Path, tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the head is whole when such a model is loaded again in parts."""
    from transformers.integrations import HfDeepSpeedConfig, is_deepspeed_zero3_enabled

    keep = HfDeepSpeedConfig(config("zero3"))
    roles = RoleModel(load_base(folder))
    roles.train_base("reward")
    roles.add_head("reward", seed=3)
    state = gather_trainable(roles)
    if rank == 0:
        save_policy(roles, "reward", out, tokenizer=tokenizer, base_reference="", state=state)
    collectives.barrier()
    assert is_deepspeed_zero3_enabled(), keep
    base, head = load_reward_base(out / "model")
    assert any(hasattr(p, "ds_id") for p in base.parameters())
    return head is not None and torch.equal(head, state["score.weight"])


def test_one_rank_writes_a_model_that_zero3_took_apart(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    pytest.importorskip("deepspeed")
    assert all(run_ranks(save_under_zero3, folders["qwen2"], tmp_path, tokenizer, deepspeed=True))
    alone = RoleModel(load_base(folders["qwen2"]))
    alone.train_base("reward")
    alone.add_head("reward", seed=3)
    assert torch.equal(rewards(load_scorer(tmp_path / "model")), rewards(alone))


def test_a_base_without_a_classifier_is_refused() -> None:
    from transformers import BertConfig, CodeGenConfig

    for unfit in (BertConfig(hidden_size=8, num_attention_heads=2), CodeGenConfig(n_embd=64, n_head=4)):
        with pytest.raises(RecipeError, match=f"no sequence classifier .* of type '{unfit.model_type}'"):
            empty_scorer(unfit)
    assert (
        empty_scorer(GPTNeoXConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=1)).config.num_labels == 1
    )


def test_a_reward_models_adapter_is_no_policy(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    roles = scored(folders["llama"])
    out = save_policy(roles, "reward", tmp_path, tokenizer=tokenizer, base_reference=str(folders["llama"]))
    child = RoleModel(load_base(folders["llama"]))
    with pytest.raises(RecipeError, match="adapter of a reward model or classifier, not of a policy"):
        child.add_adapter("policy", folder=out, trainable=True)
    child.add_adapter("reward", folder=out, settings=LORA, with_head=True, trainable=True)
    assert torch.equal(rewards(child), rewards(roles))
    assert child.head("reward").weight.requires_grad


def test_gathered_state_is_what_is_written(
    folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    roles = scored(folders["llama"])
    state = {name: torch.full_like(tensor, 0.5) for name, tensor in roles.trainable_state().items()}
    out = save_policy(roles, "reward", tmp_path, tokenizer=tokenizer, base_reference="x", state=state)
    written = load_file(out / "adapter_model.safetensors")
    assert written.keys() == state.keys()
    assert (written["base_model.model.score.weight"] == 0.5).all()


# Somebody else's -----------------------------------------------------------------------------------------------------


@pytest.fixture
def classifier(folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A reward model as somebody else would publish it."""
    torch.manual_seed(5)
    model = AutoModelForSequenceClassification.from_pretrained(folders["qwen2"], num_labels=1)
    model.save_pretrained(tmp_path / "theirs")
    tokenizer.save_pretrained(tmp_path / "theirs")
    return tmp_path / "theirs"


@pytest.mark.parametrize("quantization", ["none", "nf4"])
def test_somebody_elses_reward_model_is_a_role(
    classifier: Path, tokenizer: PreTrainedTokenizerBase, quantization: str
) -> None:
    model = AutoModelForSequenceClassification.from_pretrained(
        classifier, dtype=torch.float32, **quantized(quantization)
    )
    theirs = scores_of_transformers(model, tokenizer.pad_token_id, "right")
    roles = load_scorer(classifier, quantization=quantization)
    torch.testing.assert_close(rewards(roles), theirs, rtol=0, atol=2e-6)
    base, weight = load_reward_base(classifier, quantization=quantization)
    child = RoleModel(base)
    child.add_adapter("reward", settings=LORA, trainable=True)
    child.add_head("reward", weight=weight)
    torch.testing.assert_close(rewards(child), theirs, rtol=0, atol=2e-6)


def test_what_is_no_reward_model_is_told(folders: dict[str, Path], classifier: Path) -> None:
    assert load_reward_base(folders["llama"])[1] is None
    with pytest.raises(RecipeError, match="is no reward model: its architecture"):
        load_scorer(folders["llama"])
    model = AutoModelForSequenceClassification.from_pretrained(folders["llama"], num_labels=3)
    model.save_pretrained(classifier)
    with pytest.raises(RecipeError, match=r"\(LlamaForSequenceClassification, 3 labels\) is no reward model"):
        load_scorer(classifier)


# The store -----------------------------------------------------------------------------------------------------------


def manifest(name: str, record: PolicyRecord) -> Manifest:
    return Manifest(
        kind="reward", stage=name, recipe="tiny", fingerprint=name * 8, reward=record, metrics={"evaluation/a": 0.75}
    )


@pytest.fixture
def shelf(folders: dict[str, Path], tmp_path: Path, tokenizer: PreTrainedTokenizerBase) -> tuple[Store, dict]:
    """A reward model as an adapter on NF4, one trained in full, and what both say."""
    store = Store(tmp_path / "home")
    lora = scored(folders["llama"], "nf4")
    full = RoleModel(load_base(folders["llama"]))
    full.train_base("reward")
    full.add_head("reward", seed=9)
    base = str(folders["llama"])
    for name, roles in {"lora": lora, "full": full}.items():
        adapter = name == "lora"
        model = ModelSettings(base=base, quantization="nf4", adapter=LORA) if adapter else ModelSettings(base=base)
        record = PolicyRecord(
            base=base if adapter else name * 8, base_kind="path" if adapter else "stage", adapter=adapter, model=model
        )
        entry, folder = manifest(name, record), store.temporary(name * 8)
        save_policy(roles, "reward", folder, tokenizer=tokenizer, base_reference=base)
        found = Normalization(mean=0.5, std=2.0, n=10, on="data")
        (folder / NORMALIZATION).write_text(found.model_dump_json())
        write_card(folder, entry)
        store.add(entry, folder)
    return store, {"lora": rewards(lora), "full": rewards(full)}


def test_a_reward_model_of_the_store_is_loaded_with_its_scale(shelf: tuple[Store, dict], folders) -> None:
    store, expected = shelf
    policy = RoleModel(load_base(folders["llama"], quantization="nf4"))
    policy.add_adapter("policy", settings=LORA, trainable=True)
    joined, scale = load_reward(store, "lora" * 8, onto=policy)
    assert joined is policy
    assert (scale.mean, scale.std, scale.n, scale.on) == (0.5, 2.0, 10, "data")
    assert policy.trained_role == "policy"
    assert not policy.head("reward").weight.requires_grad
    assert torch.equal(rewards(policy), (expected["lora"] - 0.5) / 2.0)
    for name in expected:
        own, _ = load_reward(store, name * 8)
        torch.testing.assert_close(rewards(own), (expected[name] - 0.5) / 2.0, rtol=0, atol=0)


def test_a_reward_model_is_no_policy(shelf: tuple[Store, dict]) -> None:
    store = shelf[0]
    with pytest.raises(ArtifactError, match=r"'lora' \(reward\) made no policy"):
        load_policies(store, {"policy": "lora" * 8})
    assert locate(store, "full" * 8, "reward").adapter is None


def test_the_card_of_a_reward_model(shelf: tuple[Store, dict]) -> None:
    store = shelf[0]
    card = {name: (store.folder(name * 8) / "README.md").read_text() for name in ("lora", "full")}
    assert "A reward model: a LoRA adapter and a scalar head on the model in" in card["lora"]
    assert "A reward model: all parameters and a scalar head, trained by" in card["full"]
    for text in card.values():
        assert "(r - 0.5) / 2: mean 0 and standard deviation 1 over 10 completions (data)" in " ".join(text.split())
        assert "pipeline_tag: text-classification" in text
        assert "| evaluation/a | 0.75 |" in text
    snippet = card["lora"].split("```python\n")[1].split("```")[0]
    compile(snippet, "card", "exec")
    assert "BitsAndBytesConfig" in snippet
    assert '{"num_labels": 1, "pad_token_id": tokenizer.pad_token_id}' in snippet
