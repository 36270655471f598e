"""The model that TRL trains: loaded and initialised as align does it, in the form that TRL's trainers expect."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from align.artifacts.store import Store
from align.models.base import load_base, without_dropout
from align.models.heads import SCORE, ScalarHead
from align.models.rewards import load_reward_base
from align.models.roles import RoleModel
from align.models.save import empty_scorer
from align.recipe.rope import check_rope
from align.spec.job import Job
from align.spec.model import LoraSettings
from align.spec.stages import PolicyStage
from align.stages import start

TRAINED, REFERENCE = "default", "ref"
"""What TRL calls the adapter that it trains, and the frozen one beside it."""


class PeerPolicy:
    """A base, for a reward model as a sequence classifier, with a PEFT adapter on it unless all of it is trained.

    Args:
        job: The stage.
        settings: Its settings, parsed.
        begin: Where the policy starts.

    Raises:
        RecipeError: The model computes sequences of this length by what is beside them.

    Attributes:
        model: What a trainer is given.
        base: The causal LM in it; a classifier shares its body.
        role: What is trained, a `policy` or a `reward`.
        initial: Where the adapter starts; empty for a model that is trained in full.
    """

    def __init__(self, job: Job, settings: PolicyStage, begin: start.Start) -> None:
        model = job.model
        assert model is not None
        self.job, self.settings, self.begin, self.role = job, settings, begin, settings.produces
        of: dict[str, Any] = {"quantization": model.quantization, "dtype": model.dtype, "revision": begin.revision}
        self.base: PreTrainedModel
        score: Tensor | None = None
        if self.role == "reward":
            self.base, score = load_reward_base(begin.base, **of)
        else:
            self.base = load_base(begin.base, **of)
        check_rope(self.base.config, settings.train.max_tokens)
        without_dropout(self.base)
        # TRL writes the tokenizer's special tokens into them; what is saved shall be as the base had it.
        self._configs = copy.deepcopy((self.base.config, self.base.generation_config))
        self.initial: dict[str, Tensor] = {}
        if isinstance(model.adapter, LoraSettings):
            self.model = self._with_adapter(model.adapter, score)
        else:
            self.base.float()
            self.model = self._classifier(score).requires_grad_(True)

    def _with_adapter(self, adapter: LoraSettings, score: Tensor | None) -> Any:
        """The model under PEFT, with the adapter that align would start from."""
        from peft import get_peft_model

        from align.models import lora

        config, values = lora.lora_config(adapter), None
        if self.begin.adapter is not None:
            found, values, own_score = lora.read_adapter(
                self.begin.adapter, self.begin.adapter_revision, with_head=self.role == "reward"
            )
            score = score if own_score is None else own_score
            if isinstance(self.settings.policy, str):
                lora.check_scaling(config, found, f"the adapter {self.begin.adapter}")
            else:
                config = found
            config.lora_dropout = adapter.dropout
            config.inference_mode = False
        if self.role == "reward":
            config.task_type, config.modules_to_save = "SEQ_CLS", [SCORE]
        model = get_peft_model(self._classifier(score), config, adapter_name=TRAINED)
        tensors: dict[str, Tensor] = dict(lora.adapter_tensors(self.base, TRAINED))
        if values is not None:
            lora.fill(tensors, values, f"the adapter {self.begin.adapter}")
        else:
            lora.initialise(tensors.items(), self.settings.train.seed)
        self.initial = {name: tensor.detach().clone().float() for name, tensor in tensors.items()}
        return model

    def _classifier(self, score: Tensor | None) -> Any:
        """The base itself; for a reward model the sequence classifier on its body, with the head align starts from."""
        if self.role != "reward":
            return self.base
        model, body = empty_scorer(self.base.config), getattr(self.base, self.base.base_model_prefix)
        head = ScalarHead(self.base.config.get_text_config().hidden_size, next(body.parameters()).device)
        if score is None:
            head.draw(self.settings.train.seed)
        else:
            head.weight.data.copy_(score)
        setattr(model, model.base_model_prefix, body)
        setattr(model, SCORE, head)
        model.config.use_cache = False
        return model

    # The reference ---------------------------------------------------------------------------------------------------

    def reference_model(self, store: Store) -> Any:
        """A second copy of the base for the reference of a policy that is trained in full; None with an adapter."""
        reference = start.of_reference(self.job, self.settings, store)
        if self.initial or reference is None:
            return None
        assert self.job.model is not None
        model = load_base(reference.base, dtype=self.job.model.dtype, revision=reference.revision)
        check_rope(model.config, self.settings.train.max_tokens, "the reference")
        # Where the policy starts from it, both round alike: a lower compute dtype comes from autocast.
        return model.float() if reference.base == self.begin.base else model

    def settle(self, store: Store) -> None:
        """After a trainer was built: trained weights in fp32 again, and the reference that the recipe names.

        TRL rounds the adapter of a quantised base to bf16, and has made the reference a copy of where the policy
        starts.
        """
        if not self.initial:
            return
        assert self.job.model is not None
        from align.models import lora

        tensors: dict[str, Tensor] = dict(lora.adapter_tensors(self.base, TRAINED))
        for tensor in tensors.values():
            tensor.data = tensor.data.float()
        lora.fill(tensors, self.initial, "the adapter")
        reference = start.of_reference(self.job, self.settings, store)
        if reference is None:
            return
        parent = start.of_policy(self.job, self.settings, store)
        if self.job.model.merge_parent or (reference.base, reference.adapter) == (parent.base, parent.adapter):
            return
        self.model.delete_adapter(REFERENCE)  # without one TRL switches adapters off, which is the base
        if reference.adapter is not None:
            config, values, _ = lora.read_adapter(reference.adapter)
            self.model.add_adapter(REFERENCE, config)
            lora.fill(dict(lora.adapter_tensors(self.base, REFERENCE)), values, f"the adapter {reference.adapter}")
            lora.without_dropout(self.base, REFERENCE)

    # The end ---------------------------------------------------------------------------------------------------------

    def finished(self) -> tuple[RoleModel, dict[str, Tensor]]:
        """What was trained as a role, and its tensors as they are saved."""
        self.base.config, self.base.generation_config = self._configs
        roles = RoleModel(self.base)
        if self.initial:
            self.base.peft_config = self.model.peft_config  # a classifier around the body has kept it to itself
            roles.adopt_adapter(self.role, TRAINED)
        else:
            roles.add_base_role(self.role)
        if self.role == "reward":
            head = self.model.base_model.model.score.modules_to_save[TRAINED] if self.initial else self.model.score
            roles.add_head(self.role, weight=head.weight.detach())
        return roles, {name: t.detach().cpu().clone().contiguous() for name, t in roles.tensors(self.role).items()}
