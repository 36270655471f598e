"""Everything that turns records into log-probabilities."""

from align.logps.head import check_head, last_rewards, token_logps, token_logps_and_entropy, token_values
from align.logps.pack import Pack, Packing, empty_pack, pack_examples
from align.logps.score import completion_logps

__all__ = [
    "Pack",
    "Packing",
    "check_head",
    "completion_logps",
    "empty_pack",
    "last_rewards",
    "pack_examples",
    "token_logps",
    "token_logps_and_entropy",
    "token_values",
]
