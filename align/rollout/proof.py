"""Whether a model can be decoded by align's own loop: its configuration is asked, then the model itself."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from align.logps.engine import TOLERANCE
from align.logps.precision import computed_in
from align.rollout.decoder import Decoder
from align.rollout.engine import Synced
from align.rollout.kv import rollout_attention
from align.rollout.sampling import Sampler
from align.spec.stages import GenerationSettings

_proven: WeakKeyDictionary[Any, str | None] = WeakKeyDictionary()


def why_not(causal_lm: Any, tokens: int, synced: Synced | None = None) -> str | None:
    """Why a model cannot be decoded by the loop; None if it can.

    The first answer of a model is kept: what it says does not depend on weights. Every rank has to ask.

    Args:
        causal_lm: The model as a role sees it, in eval mode, without gradients.
        tokens: Of the longest prompt with its completion.
        synced: Says whether any rank has a reason, where all ranks have to draw alike (ZeRO-3).
    """
    reason = _unfit(causal_lm.config.get_text_config(), tokens)
    if synced is not None and synced(reason is not None) and reason is None:
        reason = "another rank has longer prompts, and all have to draw alike"
    if reason is not None:
        return reason
    body = causal_lm.model
    if body not in _proven:
        _proven[body] = _prove(causal_lm)
    return _proven[body]


def _unfit(config: Any, tokens: int) -> str | None:
    kinds = set(getattr(config, "layer_types", None) or ())
    others = kinds - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of type {', '.join(sorted(others))}"
    slides = "sliding_attention" in kinds if kinds else getattr(config, "use_sliding_window", True)
    window = getattr(config, "sliding_window", None)
    if slides and window and window < tokens:
        return f"its attention slides over {window} tokens"
    if getattr(config, "final_logit_softcapping", None):
        return "its logits are capped"
    return None


def _prove(causal_lm: Any) -> str | None:
    """Draw from prompts of several lengths and with one or two rows; compare with passes without any cache."""
    vocabulary = causal_lm.config.get_text_config().vocab_size
    prompts = [[(3 + 7 * i * n) % vocabulary for i in range(1, n + 1)] for n in (5, 3, 1)]
    of_row = [0, 0, 1, 2]
    found: list[Tensor] = []
    try:
        with rollout_attention(causal_lm.model):
            sampler = Sampler(GenerationSettings(temperature=0.0))
            decoder = Decoder(causal_lm, sampler, (), rows=4, new_tokens=2, slots=3, prompt_tokens=5, pad_id=0)
            decoder.prefill(prompts[:2], [0, 1])
            decoder.place_rows(range(4), [prompts[i] for i in of_row], None)
            decoder.arrange(of_row, [4, 2, 0], 2)
            for width in (1, 2):
                found.append(decoder.feed(width).float())
                decoder.follow(found[-1].argmax(-1), range(4), width)
    except Exception as error:  # whatever a model makes of a cache it does not know, `generate` knows better
        return f"{type(error).__name__}: {error}"
    expected: list[Tensor] = []
    drawn = found[0].argmax(-1).tolist()
    for step in range(2):
        rows = [[*prompts[i], *[drawn[b]] * step] for b, i in enumerate(of_row)]
        full = [causal_lm(input_ids=torch.tensor([ids], device=decoder.device), use_cache=False) for ids in rows]
        expected.append(torch.stack([out.logits[0, -1].float() for out in full]))
    own, plain = torch.cat(found), torch.cat(expected)
    # Against what tells states apart: what all of them share would hide a difference.
    scale = (plain - plain.mean(0)).norm(dim=-1).mean().clamp(min=1e-6)
    difference = float((own - plain).norm(dim=-1).max() / scale)
    if difference <= TOLERANCE[computed_in(decoder.device, causal_lm.model.dtype)]:
        return None
    return f"its logits with a cache differ by {difference:.2g}"
