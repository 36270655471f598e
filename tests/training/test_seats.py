"""Who sits beside the policy of a stage on rollouts: the critic, and the reward model, maybe with a base of its own."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from align.artifacts.manifest import Manifest, PolicyRecord
from align.artifacts.store import Store
from align.data import ChatEncoder, PromptExample
from align.data.chat import Completion, Example
from align.data.records import Conversation
from align.errors import DataError, RecipeError
from align.logps import last_rewards, pack_examples, token_values
from align.methods import get_method
from align.models import load_base, train_tokenizer
from align.models.rewards import NORMALIZATION, Normalization, load_reward
from align.models.roles import RoleModel
from align.models.save import save_policy
from align.models.tokenizer import load_tokenizer
from align.spec.job import Job
from align.spec.model import LoraSettings, ModelSettings, TokenizerSettings
from align.stages import online as seats
from align.stages import own_reward as owned
from align.stages import start
from align.training.passes import run_passes
from tests.methods.batches import config_of
from tests.training.worlds import random_examples, random_prompts, save_tiny_base

LORA = LoraSettings(rank=2, alpha=4)
REWARD = "reward-fingerprint"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return save_tiny_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def store(base, tmp_path_factory) -> Store:
    """A store with a reward model: an adapter and a head on the base, with a scale of its own."""
    store = Store(tmp_path_factory.mktemp("home"))
    roles = RoleModel(load_base(base))
    roles.add_adapter("reward", settings=LORA, trainable=True)
    g = torch.Generator().manual_seed(0)
    for tensor in roles.tensors("reward").values():
        tensor.data.copy_(torch.randn(tensor.shape, generator=g) / 10)
    roles.add_head("reward", seed=1)
    model = ModelSettings(base=str(base), adapter=LORA)
    record = PolicyRecord(base=str(base), base_kind="path", adapter=True, model=model)
    manifest = Manifest(kind="reward", stage="rm", recipe="r", fingerprint=REWARD, reward=record)
    folder = store.temporary(REWARD)
    save_policy(roles, "reward", folder, tokenizer=load_tokenizer(base), base_reference=str(base))
    (folder / NORMALIZATION).write_text(Normalization(mean=0.3, std=2.0, n=9, on="data").model_dump_json())
    store.add(manifest, folder)
    return store


def job_of(base, store: Store, tmp_path, **model) -> Job:
    return Job(
        recipe="r", stage="ppo", kind="ppo", settings={}, fingerprint="f", inputs={"rm": REWARD}, folder=str(tmp_path),
        work=str(tmp_path / "work"), home=str(store.home),
        model=ModelSettings(base=str(base), **{"adapter": LORA} | model),
    )  # fmt: skip


def seated(base, store: Store, tmp_path, *, own: bool = False, **settings) -> RoleModel:
    roles = RoleModel(load_base(base))
    roles.add_adapter("policy", settings=LORA, trainable=True, seed=7)
    config = config_of(get_method("ppo"), reward="rm", **settings)
    seats.add_seats(job_of(base, store, tmp_path), config, get_method("ppo"), store, roles, own=own)
    return roles


def drawn(prompts: list[PromptExample], seed: int = 0) -> list[list[list[int]]]:
    """Two completions for each prompt."""
    found = random_examples(len(prompts), 2, seed, longest=10)
    return [[c.ids for c in e.completions] for e in found]


def scored(model: RoleModel, prompts: list[PromptExample], completions: list[list[list[int]]]) -> list[float]:
    """What the role `reward` says of ids."""
    examples = [
        Example(p.row, p.prompt_ids, tuple(Completion(ids, [True] * len(ids), False) for ids in each), 1.0)
        for p, each in zip(prompts, completions, strict=True)
    ]
    (found,) = run_passes(model, [("reward", last_rewards)], examples, 64)
    return torch.cat(found).tolist()


def test_prompts_without_room_for_an_answer_are_refused(base, store, tmp_path):
    config = config_of(get_method("ppo"), generation={"max_new_tokens": 128})
    with pytest.raises(RecipeError, match="128 new tokens leave no room for a prompt in 128 tokens") as caught:
        seats.read_prompts(job_of(base, store, tmp_path), config, load_tokenizer(base), 128, None)
    assert caught.value.where == "stages.ppo.generation.max_new_tokens"


# --- on the policy's base ---------------------------------------------------------------------------------------------


def test_a_critic_that_starts_as_the_reward_model_says_what_it_says_in_the_same_state(base, store, tmp_path):
    """A value is of the state before a token, a reward of the state after the last one: one token further on."""
    roles = seated(base, store, tmp_path)
    prompts = random_prompts(load_tokenizer(base), 6)
    completions = drawn(prompts)
    further = [Example(p.row, p.prompt_ids, tuple(Completion([*ids, 9], [True] * (len(ids) + 1), False)
               for ids in each), 1.0) for p, each in zip(prompts, completions, strict=True)]  # fmt: skip
    (values,) = run_passes(roles, [("critic", token_values)], further, 64)
    lengths = [len(ids) + 1 for each in completions for ids in each]
    last = [each[-1].item() for each in torch.cat(values).split(lengths)]
    assert last == pytest.approx(scored(roles, prompts, completions), abs=1e-5)
    assert roles.trained_roles == ("policy", "critic")
    mine, theirs = roles.tensors("critic"), roles.tensors("reward")
    for name in theirs:
        assert torch.equal(mine[name], theirs[name])
        assert mine[name].data_ptr() != theirs[name].data_ptr()
        assert (mine[name].requires_grad, theirs[name].requires_grad) == (True, False)


@pytest.mark.parametrize("own", [False, True])
def test_a_critic_that_starts_as_the_policy_says_nothing_yet(own, base, store, tmp_path):
    roles = seated(base, store, tmp_path, own=own, **({} if own else {"critic_start": "policy"}))
    assert ("reward" in roles.roles) == (not own)
    policy, critic = roles.tensors("policy"), roles.tensors("critic")
    assert all(torch.equal(policy[name], critic[name]) for name in policy)
    assert critic.keys() - policy.keys() == {"base_model.model.score.weight"}
    (pack,) = pack_examples(random_examples(3, 1), 1000)
    with torch.no_grad():
        assert not roles("critic", token_values, pack).any()


def test_a_reward_model_shares_the_base_that_it_was_trained_on(base, store, tmp_path):
    config = config_of(get_method("ppo"), reward="rm")

    def shares(**model) -> bool:
        job = job_of(base, store, tmp_path, **model)
        return owned.shares_base(job, config, store, start.of_policy(job, config, store))

    assert shares()
    assert not shares(quantization="nf4")
    assert not shares(merge_parent=True)
    assert not shares(adapter="none")
    job = job_of(base, store, tmp_path)
    assert owned.load_own_reward(job, config, store, load_tokenizer(base)) is None
    assert owned.load_own_reward(job, config_of(get_method("ppo")), store, load_tokenizer(base)) is None


# --- on a base of its own ---------------------------------------------------------------------------------------------


def own_reward(base, store: Store, tokenizer=None) -> owned.OwnReward:
    """The reward model alone, with another tokenizer where one is given."""
    model, _ = load_reward(store, REWARD)
    mine = load_tokenizer(base)
    return owned.OwnReward(model, tokenizer or mine, mine, 64)


def flat(rewards: list[list[float]]) -> list[float]:
    return [each for row in rewards for each in row]


def test_it_says_what_the_one_on_the_shared_base_says(base, store, tmp_path):
    roles = seated(base, store, tmp_path)
    prompts = random_prompts(load_tokenizer(base), 6)
    completions = drawn(prompts)
    found = own_reward(base, store).rewards(prompts, completions)
    assert [len(row) for row in found] == [2] * 6
    assert flat(found) == pytest.approx(scored(roles, prompts, completions), abs=1e-5)
    loaded = owned.load_own_reward(
        job_of(base, store, tmp_path, quantization="nf4"), config_of(get_method("ppo"), reward="rm"), store,
        load_tokenizer(base),
    )  # fmt: skip
    assert flat(loaded.rewards(prompts, completions)) == pytest.approx(flat(found), abs=1e-5)


def other_template(base):
    tokenizer = load_tokenizer(base)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] + ': ' + m['content'] | trim + '<|im_end|>' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
    )
    return tokenizer


def other_tokenizer(base):
    return train_tokenizer(["quick brown foxes jump over lazy dogs " * 4], TokenizerSettings(vocab_size=290))


def prompts_of(tokenizer, *questions: str) -> list[PromptExample]:
    encoder = ChatEncoder(tokenizer, 128)
    asked = [[{"role": "user", "content": question}] for question in questions]
    return [
        PromptExample(row, each[0]["content"], each, encoder.prompt(each)) for row, each in enumerate(asked)
    ]  # fmt: skip


QUESTIONS = ("is the sea wide", "which hills are green", "what is a fox")
ANSWERS = ("the sea is wide", " hills are green \n", "")


@pytest.mark.parametrize("other", [other_template, other_tokenizer])
@pytest.mark.parametrize("ended", [True, False])
def test_one_that_reads_in_another_way_is_told_the_text(other, ended, base, store):
    mine, theirs = load_tokenizer(base), other(base)
    prompts, reward = prompts_of(mine, *QUESTIONS), own_reward(base, store, theirs)
    completions = [[mine(text)["input_ids"] + [mine.eos_token_id] * ended] for text in ANSWERS]
    if not ended:
        completions[-1] = [mine(" ")["input_ids"]]
    records = [
        Conversation(p.row, [*p.messages, {"role": "assistant", "content": text or " "}])
        for p, text in zip(prompts, ANSWERS, strict=True)
    ]
    examples = ChatEncoder(theirs, 128).encode_many(records)
    (expected,) = run_passes(reward.model, [("reward", last_rewards)], examples, 64)
    found = flat(reward.rewards(prompts, completions))
    assert found == pytest.approx(torch.cat(expected).tolist(), abs=1e-6)
    assert len(set(found)) == 3


def test_nothing_that_the_policy_writes_stops_it(base, store):
    """Tokens that are text to the policy and control to the reward model, and what its template would leave out."""
    mine, theirs = load_tokenizer(base), other_template(base)
    theirs.add_special_tokens({"additional_special_tokens": ["<s>"]})
    theirs.chat_template = theirs.chat_template.replace("| trim", "| trim if '</think>' not in m['content'] else ''")
    reward = own_reward(base, store, theirs)
    (prompt,) = prompts_of(mine, "strike it out")
    said = ("an <s>old</s> word", "an old</s> word", "<<s>s>", "so</think>", "")
    completions = [[mine(text)["input_ids"] + [mine.eos_token_id] for text in said]]
    old, plain, left, thought, nothing = reward.rewards([prompt], completions)[0]
    assert old == pytest.approx(plain, abs=1e-6)
    assert left == pytest.approx(nothing, abs=1e-6)
    ids = reward.encoder.prompt(prompt.messages)
    raw = Completion([*theirs("so</think>")["input_ids"], theirs.eos_token_id], [True] * 1, False)
    (pack,) = pack_examples([Example(0, ids, (replace(raw, mask=[True] * len(raw.ids)),), 1.0)], 1000)
    with torch.no_grad():
        assert thought == pytest.approx(reward.model("reward", last_rewards, pack).item(), abs=1e-6)


def test_a_prompt_that_it_cannot_read_is_told_at_once(base, store):
    mine = load_tokenizer(base)
    prompts = prompts_of(mine, "is the sea wide", "and <s>green</s>", "sad dog? " * 20)
    own_reward(base, store).check(prompts[:2], 8)
    with pytest.raises(DataError, match=r"cannot read the prompt in row 2: its \d+ tokens and 8 new ones are over 128"):
        own_reward(base, store).check(prompts, 8)
    theirs = other_template(base)
    theirs.add_special_tokens({"additional_special_tokens": ["<s>"]})
    with pytest.raises(DataError, match="cannot read the prompt in row 1: control token in the text"):
        own_reward(base, store, theirs).check(prompts[:2], 8)
    own_reward(base, store, other_tokenizer(base)).check(prompts[:1], 8)


# --- scorers ----------------------------------------------------------------------------------------------------------


def test_a_scorer_that_calls_itself_like_the_reward_model_keeps_its_own_weight(base, store, tmp_path, monkeypatch):
    scorers = {"x": SimpleNamespace(label="reward"), "y": SimpleNamespace(label="gold")}
    monkeypatch.setattr(seats, "scorers_of", lambda job, settings: scorers)
    config = config_of(get_method("ppo"), reward="rm", scorers=["x", "y"], weights={"x": 3.0, "reward": 0.5})
    judges = seats._judges(job_of(base, store, tmp_path), config, None)
    assert judges.columns == ["reward", "x", "gold"]
    assert judges.weights == {"reward": 0.5, "x": 3.0, "gold": 1.0}
    alone = seats._judges(job_of(base, store, tmp_path), config.model_copy(update={"reward": None}), None)
    assert (alone.columns, alone.weights) == (["x", "gold"], {"x": 3.0, "gold": 1.0})
