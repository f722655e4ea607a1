"""What the tokens of steps and requests cost in bytes. Pure.

    device bytes  |--- activations of a step ---|--- KV blocks: null | request | request | rest ---|

A static engine sets the first part aside for its largest step for ever; an elastic one needs it while the step runs,
and can make do with the smallest step.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class Memory:
    """What tokens cost.

    Attributes:
        block_bytes, block_tokens: of a KV block.
        token_bytes: activations of a token of a step; step_bytes: of a step whatever its size.
    """

    block_bytes: int
    block_tokens: int
    token_bytes: float
    step_bytes: float

    def activation_bytes(self, tokens: int) -> int:
        """Activations of a step."""
        return round(self.step_bytes + tokens * self.token_bytes)

    def blocks(self, device_bytes: int, step_tokens: int) -> int:
        """KV blocks beside the activations of a step, vLLM's null block included; 0 where there is no room."""
        return max(0, device_bytes - self.activation_bytes(step_tokens)) // self.block_bytes

    def step_tokens(self, device_bytes: int, blocks: int) -> int:
        """Tokens of the largest step whose activations fit beside so many KV blocks; 0 where none does."""
        room = device_bytes - blocks * self.block_bytes - self.step_bytes
        if room <= 0:
            return 0
        return int(room / self.token_bytes) if self.token_bytes > 0 else 1 << 30

    def held(self, device_bytes: int, step_tokens: int, request_tokens: int) -> int:
        """Requests of ``request_tokens``, prompt and output, whose KV fits at once beside such a step."""
        return max(0, self.blocks(device_bytes, step_tokens) - 1) // self.request_blocks(request_tokens)

    def request_blocks(self, request_tokens: int) -> int:
        """KV blocks of a request of so many tokens."""
        return -(-request_tokens // self.block_tokens)
