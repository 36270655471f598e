"""One base, many roles: named adapters on one frozen model, or the model itself trained in full.

The first trained role is the *resting* role: it is active whenever no other role has been asked for. A critic may be
trained beside the policy, in one backward pass; the recomputation of gradient checkpointing, which happens inside
backward, puts the role of its forward pass back. Every other role is frozen and runs without gradient only.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from align.errors import RecipeError, TrainingError
from align.models.heads import SCORE, ScalarHead
from align.spec.model import LoraSettings

T = TypeVar("T")
Beside = Sequence[tuple[str, Callable[..., Any]]]
"""Roles and functions that run in the same forward pass."""


class RoleModel(nn.Module):
    """Everything that DDP or DeepSpeed wraps. Starts in eval mode with no role at all.

    Args:
        base: A causal LM as `load_base` or `new_base` returns it. It is changed in place.
        gradient_checkpointing: Recompute activations in the backward pass (non-reentrant).
    """

    def __init__(self, base: PreTrainedModel, *, gradient_checkpointing: bool = False) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.heads = nn.ModuleDict()
        """Scalar heads by the key of their role; here, so that whatever wraps the model sees them."""
        self._keys: dict[str, str | None] = {}
        self._trained: tuple[str, ...] = ()
        self._active: str | None = None
        self._layers: list[Any] = []
        self._autocast: torch.dtype | None = None
        if gradient_checkpointing:
            # `gradient_checkpointing_enable` before transformers 5.20
            enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
            enable({"use_reentrant": False, "context_fn": self._recomputation})
        self.eval()

    @property
    def config(self) -> PretrainedConfig:
        return self.base.config

    @property
    def roles(self) -> tuple[str, ...]:
        """The names of all roles, in the order they were added."""
        return tuple(self._keys)

    @property
    def trained_role(self) -> str | None:
        """The first trained role."""
        return self._trained[0] if self._trained else None

    @property
    def trained_roles(self) -> tuple[str, ...]:
        return self._trained

    @property
    def causal_lm(self) -> Any:
        """The base with its adapters: `.model` (body), `.lm_head`, `.generate`, `.config`; callable."""
        if hasattr(self.base, "model") and hasattr(self.base, "lm_head"):
            return self.base
        return _CausalLM(self.base)

    # Roles -----------------------------------------------------------------------------------------------------------

    def add_adapter(
        self,
        role: str,
        *,
        settings: LoraSettings | None = None,
        folder: Path | str | None = None,
        revision: str | None = None,
        copy_of: str | None = None,
        dropout: float | None = None,
        with_head: bool = False,
        trainable: bool,
        seed: int = 0,
    ) -> None:
        """Add a role that is a LoRA adapter in fp32.

        It starts as the adapter in `folder` (or of that name on the Hub), as a copy of another role's, or (neither
        given) as the identity with noise drawn from `seed` alone, the same on every rank.

        Args:
            role: Its name.
            settings: Shape of the adapter. May be absent where `folder` or `copy_of` has one; where both are given they
                must agree in everything but dropout.
            folder: A PEFT adapter to start from.
            revision: Hub revision of `folder`.
            copy_of: A role of this model whose adapter to start from; a head of it stays behind.
            dropout: Overrides what the adapter to start from was trained with.
            with_head: Take the scalar head too, if `folder` has one; a folder with a head is refused otherwise.
            trainable: Whether the role is trained.
            seed: Seed of a fresh adapter.

        Raises:
            RecipeError: If the adapter to start from does not fit `settings` or the model.
        """
        from align.models import lora  # peft takes seconds to import; a model trained in full does without

        found, values, score = None, None, None
        if folder is not None:
            found, values, score = lora.read_adapter(folder, revision, with_head=with_head)
        elif copy_of is not None:
            found, values = self.adapter_config(copy_of), self._adapter(copy_of)
        what = f"the adapter {folder or copy_of}"
        if settings is not None:
            config = lora.lora_config(settings)
            if found is not None:
                lora.check_scaling(config, found, what)
        elif found is not None:
            config = found
        else:
            raise ValueError("give settings, folder or copy_of")

        if dropout is not None:
            config = copy.copy(config)
            config.lora_dropout = dropout
        key = self._claim(role, trainable)
        lora.inject(self.base, key, config)
        self._keys[role] = key
        if values is not None:
            lora.fill(self._adapter(role), values, what)
        else:
            lora.initialise(self._adapter(role).items(), seed)
        if not trainable:
            lora.without_dropout(self.base, key)
        self._settle(trained=role if trainable else None)
        if score is not None:
            self.add_head(role, weight=score)

    def add_head(self, role: str, *, weight: Tensor | None = None, seed: int = 0) -> ScalarHead:
        """Give a role a scalar head in fp32, trained if the role is; `forward` hands it to its functions.

        Args:
            role: A role without a head.
            weight: [1, H] to start from.
            seed: What a weight is drawn from where none is given.

        Raises:
            RecipeError: The role's adapter changes the language model's head, which a scalar head does without, or
                `weight` has another width.
        """
        if self.has_head(role):
            raise ValueError(f"role {role!r} has a head already")
        beside = [name for name in self._adapter(role) if not self._in_body(role, name)]
        if beside and self._keys[role] is not None:
            raise RecipeError(
                f"the adapter changes {beside[0].rpartition('.lora_')[0]}, which no reward passes through",
                where="model.adapter.targets",
                fix="name layers of the model's body, or all-linear",
            )
        head = ScalarHead(self.config.get_text_config().hidden_size, next(self.base.parameters()).device)
        if weight is None:
            head.draw(seed)
        elif weight.shape != head.weight.shape:
            raise RecipeError(f"the head has shape {list(weight.shape)}, the base wants {list(head.weight.shape)}")
        else:
            head.weight.data.copy_(weight)
        self.heads[_key(role)] = head
        self._settle()
        return head

    def has_head(self, role: str) -> bool:
        """Whether a role has a scalar head."""
        return _key(self._known(role)) in self.heads

    def head(self, role: str) -> ScalarHead:
        """The scalar head of a role that has one."""
        head = self.heads[_key(self._known(role))]
        assert isinstance(head, ScalarHead)
        return head

    def add_base_role(self, role: str) -> None:
        """Add a frozen role that is the base with all adapters off."""
        if self._trained and self._keys[self._trained[0]] is None:
            raise ValueError(
                f"the base is trained as {self.trained_role!r}; a frozen copy needs a RoleModel of its own"
            )
        self._claim(role, trainable=False)
        self._keys[role] = None
        self._settle()

    def adopt_adapter(self, role: str, key: str) -> None:
        """Make an adapter that PEFT has put on the base under `key` a frozen role."""
        self._claim(role, trainable=False)
        self._keys[role] = key
        self._settle()

    def train_base(self, role: str = "policy") -> None:
        """Train every parameter of the base, in fp32; a lower compute dtype is kept by autocast."""
        if self._keys:
            raise ValueError("a model is trained in full or has adapters, not both")
        self._claim(role, trainable=True)
        self._keys[role] = None
        if self.base.dtype != torch.float32 and not any(hasattr(p, "ds_id") for p in self.base.parameters()):
            self._autocast = self.base.dtype
            self.base.float()
        self._settle(trained=role)

    # Passes ----------------------------------------------------------------------------------------------------------

    @contextmanager
    def role(self, name: str) -> Iterator[None]:
        """Activate a role for passes without gradient; the resting role is back afterwards, whatever happened.

        Raises:
            TrainingError: If gradients are being recorded.
        """
        if torch.is_grad_enabled():
            raise TrainingError(f"role({name!r}) was entered while gradients are recorded", fix="use torch.no_grad()")
        with self._activated(self._known(name)):
            yield

    def forward(self, role: str, function: Callable[..., T], *args: Any, beside: Beside = ()) -> Any:
        """Run `function(causal_lm, *args)` with a role active; everything that computes goes through here.

        Args:
            role: Its name. With gradients on it must be a trained role.
            function: Gets an object with `.model`, `.lm_head`, `.generate` and `.config`, and the role's scalar head as
                its last argument if the role has one.
            *args: Handed on.
            beside: Other roles and their functions, run on the same arguments inside this one call: a launcher's
                wrapper sees one forward pass, with every trained parameter in it.

        Returns:
            What the function returns; a tuple with what each of them returns if there are some beside.

        Raises:
            TrainingError: If a frozen role is run while gradients are recorded.
        """
        if beside:
            return tuple(self.forward(name, each, *args) for name, each in ((role, function), *beside))
        if self.has_head(role):
            args = (*args, self.head(role))
        if torch.is_grad_enabled() and role not in self._trained:
            raise TrainingError(f"frozen role {role!r} was run while gradients are recorded", fix="use torch.no_grad()")
        with self._activated(self._known(role)), self._precision():
            return function(self.causal_lm, *args)

    # State -----------------------------------------------------------------------------------------------------------

    def tensors(self, role: str) -> dict[str, Tensor]:
        """The parameters of a role under their names on disk: PEFT's for an adapter, the model's own otherwise.

        A role with a scalar head has that instead of the language model's.
        """
        own = self._adapter(role)
        if not self.has_head(role):
            return own
        if self._keys[role] is None:
            own = {name: tensor for name, tensor in own.items() if self._in_body(role, name)}
        return {**own, self._prefix(role) + f"{SCORE}.weight": self.head(role).weight}

    def adapter_config(self, role: str) -> Any:
        """The `peft.LoraConfig` of a role that is an adapter; None for the base."""
        key = self._keys[self._known(role)]
        return None if key is None else self.base.peft_config[key]

    def trainable_state(self) -> dict[str, Tensor]:
        """The trained parameters themselves (not copies) under the names they have on disk.

        Those of a second trained role have its name before theirs.
        """
        first, *others = self._trained or (None,)
        own = {} if first is None else self.tensors(first)
        return own | {f"{role}/{name}": tensor for role in others for name, tensor in self.tensors(role).items()}

    def load_trainable_state(self, state: dict[str, Tensor]) -> None:
        """Copy what `trainable_state` gave, of this or an equal model, into the trained parameters.

        Raises:
            TrainingError: If names or shapes differ.
        """
        own = self.trainable_state()
        differing = {
            n for n in own.keys() | state.keys() if n not in own or n not in state or own[n].shape != state[n].shape
        }
        if differing:
            raise TrainingError(
                f"the saved state does not fit the model: {len(differing)} tensors, as {min(differing)}"
            )
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.copy_(state[name])

    # Inside ----------------------------------------------------------------------------------------------------------

    def _claim(self, role: str, trainable: bool) -> str:
        """Reserve a role and return the key of its adapter."""
        if role in self._keys:
            raise ValueError(f"there is a role {role!r} already")
        if trainable and self._trained and self._keys[self._trained[0]] is None:
            raise ValueError(f"the base is trained as {self.trained_role!r}; another trained role would move with it")
        key = _key(role)
        if key in map(_key, self._keys):
            raise ValueError(f"the role {role!r} is too like another one")
        return key

    def _adapter(self, role: str) -> dict[str, Tensor]:
        """The parameters of a role without its scalar head: those of its adapter, or all of the base."""
        key = self._keys[self._known(role)]
        if key is None:
            return dict(self.base.named_parameters())
        from align.models import lora

        return dict(lora.adapter_tensors(self.base, key))

    def _prefix(self, role: str) -> str:
        """What stands before the names that the base knows, in the names of a role's tensors on disk."""
        if self._keys[role] is None:
            return ""
        from align.models import lora

        return lora.DISK_PREFIX

    def _in_body(self, role: str, name: str) -> bool:
        """Whether a tensor of a role belongs to the base without the language model's head."""
        return name.removeprefix(self._prefix(role)).startswith(f"{self.base.base_model_prefix}.")

    def _settle(self, trained: str | None = None) -> None:
        """After a change of roles: new modules get the model's mode, flags are set anew, the resting role is active."""
        self._trained += (trained,) if trained else ()
        if any(self._keys.values()):
            from align.models import lora

            self._layers = lora.layers(self.base)
        self.train(self.training)
        self.base.requires_grad_(False)
        self.heads.requires_grad_(False)
        for parameter in self.trainable_state().values():
            parameter.requires_grad_(True)
        for layer in self._layers:
            if not getattr(layer, "_align_guarded", False):
                layer.register_forward_pre_hook(self._guard)
                layer._align_guarded = True
        self._activate(self.trained_role)

    def _guard(self, *_: Any) -> None:
        """Before every adapter layer, also when backward recomputes it: gradients belong to trained roles alone."""
        if torch.is_grad_enabled() and self._active not in self._trained:
            raise TrainingError(f"role {self._active!r} is active while gradients are recorded")

    def _recomputation(self) -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        """For gradient checkpointing: what surrounds a layer's forward pass, and its repetition inside backward."""
        return nullcontext(), self._activated(self._active)

    @contextmanager
    def _activated(self, role: str | None) -> Iterator[None]:
        before = self._active
        if role == before:
            yield
            return
        self._activate(role)
        try:
            yield
        finally:
            self._activate(before)

    def _activate(self, role: str | None) -> None:
        if self._layers:
            from align.models import lora

            lora.activate(self._layers, None if role is None else self._keys[role])
        self._active = role

    def _known(self, role: str) -> str:
        if role not in self._keys:
            raise ValueError(f"no role {role!r}; there are {', '.join(self._keys) or 'none'}")
        return role

    def _precision(self) -> AbstractContextManager[Any]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(next(self.base.parameters()).device.type, dtype=self._autocast)


def _key(role: str) -> str:
    """The key of a role's modules; those of a ModuleDict hold no dots and must not be attributes of it."""
    return f"role_{role.replace('.', '__')}"


class _CausalLM:
    """A causal LM whose body or head has another attribute name, under the usual ones."""

    def __init__(self, base: PreTrainedModel) -> None:
        self._base = base
        self.model = base.base_model
        self.lm_head = base.get_output_embeddings()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._base, name)

    @property
    def generation_config(self) -> Any:
        return self._base.generation_config

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self._base.generation_config = value

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._base(*args, **kwargs)
