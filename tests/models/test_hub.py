"""An adapter from the Hub is read at the commit that is asked for, not where its branch is now."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase

from align.models import RoleModel, load_base
from align.models.save import merge_adapter, save_policy
from tests.models.tiny import LORA, logits, randomise, token_ids

NAME, OLD, NEW = "someone/adapter", "a" * 40, "b" * 40


@pytest.fixture
def published(
    folders: dict[str, Path], tokenizer: PreTrainedTokenizerBase, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> dict[str, dict[str, torch.Tensor]]:
    """An adapter with two commits in the local cache of the Hub, `main` at the second; the weights of both."""
    cache, weights = tmp_path / "hub", {}
    repository = cache / "models--someone--adapter"
    for seed, commit in enumerate((OLD, NEW)):
        roles = RoleModel(load_base(folders["llama"]))
        roles.add_adapter("policy", settings=LORA, trainable=True, seed=seed)
        randomise(roles, "policy", seed=10 + seed)
        weights[commit] = {name: tensor.detach().clone() for name, tensor in roles.tensors("policy").items()}
        made = save_policy(
            roles, "policy", tmp_path / commit, tokenizer=tokenizer, base_reference=str(folders["llama"])
        )
        shutil.copytree(made, repository / "snapshots" / commit)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    for name in ("huggingface_hub.constants.HF_HUB_CACHE", "transformers.utils.hub.TRANSFORMERS_CACHE"):
        monkeypatch.setattr(name, str(cache), raising=False)
    return weights


@pytest.mark.parametrize(("revision", "commit"), [(OLD, OLD), (NEW, NEW), (None, NEW)])
def test_a_role_starts_from_the_commit(
    published: dict[str, dict[str, torch.Tensor]], folders: dict[str, Path], revision: str | None, commit: str
) -> None:
    roles = RoleModel(load_base(folders["llama"]))
    roles.add_adapter("policy", folder=NAME, revision=revision, trainable=True)
    found = roles.tensors("policy")
    assert all(torch.equal(found[name], tensor) for name, tensor in published[commit].items())


def test_the_commit_is_merged(
    published: dict[str, dict[str, torch.Tensor]],
    folders: dict[str, Path],
    tokenizer: PreTrainedTokenizerBase,
    tmp_path: Path,
) -> None:
    ids, found = token_ids(), {}
    for commit in (OLD, NEW):
        merged = merge_adapter(
            folders["llama"], NAME, tmp_path / f"merged-{commit}", tokenizer=tokenizer, adapter_revision=commit
        )
        roles = RoleModel(load_base(folders["llama"]))
        roles.add_adapter("policy", folder=NAME, revision=commit, trainable=False)
        with torch.no_grad():
            found[commit] = logits(AutoModelForCausalLM.from_pretrained(merged), ids)
            with roles.role("policy"):
                torch.testing.assert_close(found[commit], logits(roles.causal_lm, ids), atol=1e-4, rtol=1e-4)
    assert not torch.allclose(found[OLD], found[NEW], atol=1e-3)
