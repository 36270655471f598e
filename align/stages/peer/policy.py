"""The model that TRL trains: loaded and initialised as align does it, in the form that TRL's trainers expect."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor

from align.artifacts.store import Store
from align.models.base import load_base, without_dropout
from align.models.roles import RoleModel
from align.spec.job import Job
from align.spec.model import LoraSettings
from align.spec.stages import PolicyStage
from align.stages import start

TRAINED, REFERENCE = "default", "ref"
"""What TRL calls the adapter that it trains, and the frozen one beside it."""


class PeerPolicy:
    """A base, with a PEFT adapter on it unless every parameter is trained.

    Args:
        job: The stage.
        settings: Its settings, parsed.
        begin: Where the policy starts.

    Attributes:
        model: What a trainer is given.
    """

    def __init__(self, job: Job, settings: PolicyStage, begin: start.Start) -> None:
        assert job.model is not None
        self.job, self.settings, self.begin = job, settings, begin
        self.base = load_base(
            begin.base, quantization=job.model.quantization, dtype=job.model.dtype, revision=begin.revision
        )
        without_dropout(self.base)
        # TRL writes the tokenizer's special tokens into them; what is saved shall be as the base had it.
        self._configs = copy.deepcopy((self.base.config, self.base.generation_config))
        self.initial: dict[str, Tensor] = {}
        if isinstance(job.model.adapter, LoraSettings):
            self.model = self._with_adapter(job.model.adapter)
        else:
            self.model = self.base.float().requires_grad_(True)

    def _with_adapter(self, adapter: LoraSettings) -> Any:
        """The base under PEFT, with the adapter that align would start from."""
        from peft import get_peft_model

        from align.models import lora

        config, values = lora.lora_config(adapter), None
        if self.begin.adapter is not None:
            found, values = lora.read_adapter(self.begin.adapter, self.begin.adapter_revision)[:2]
            if isinstance(self.settings.policy, str):
                lora.check_scaling(config, found, f"the adapter {self.begin.adapter}")
            else:
                config = found
            config.lora_dropout = adapter.dropout
            config.inference_mode = False
        model = get_peft_model(self.base, config, adapter_name=TRAINED)
        tensors: dict[str, Tensor] = dict(lora.adapter_tensors(self.base, TRAINED))
        if values is not None:
            lora.fill(tensors, values, f"the adapter {self.begin.adapter}")
        else:
            lora.initialise(tensors.items(), self.settings.train.seed)
        self.initial = {name: tensor.detach().clone().float() for name, tensor in tensors.items()}
        return model

    # The reference ---------------------------------------------------------------------------------------------------

    def reference_model(self, store: Store) -> Any:
        """A second copy of the base for the reference of a policy that is trained in full; None with an adapter."""
        reference = start.of_reference(self.job, self.settings, store)
        if self.initial or reference is None:
            return None
        assert self.job.model is not None
        model = load_base(reference.base, dtype=self.job.model.dtype, revision=reference.revision)
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
            config, values = lora.read_adapter(reference.adapter)[:2]
            self.model.add_adapter(REFERENCE, config)
            lora.fill(dict(lora.adapter_tensors(self.base, REFERENCE)), values, f"the adapter {reference.adapter}")
            lora.without_dropout(self.base, REFERENCE)

    # The end ---------------------------------------------------------------------------------------------------------

    def finished(self) -> tuple[RoleModel, dict[str, Tensor]]:
        """What was trained as a role, and its tensors as they are saved."""
        self.base.config, self.base.generation_config = self._configs
        roles = RoleModel(self.base)
        if self.initial:
            roles.adopt_adapter("policy", TRAINED)
        else:
            roles.add_base_role("policy")
        return roles, {name: t.detach().cpu().clone().contiguous() for name, t in roles.tensors("policy").items()}
