"""How a prompt divides into blocks of latents: arithmetic alone, without torch."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class Prefix:
    """A prompt as history, known latents of the first generated block, and what is generated.

    A latent that holds any prompt token is known; whole blocks of known latents are history.
    """

    num_tokens: int
    patch_size: int  # tokens per latent
    block_size: int  # latents per block

    @property
    def block_tokens(self) -> int:
        return self.patch_size * self.block_size

    @property
    def num_latents(self) -> int:
        return -(-self.num_tokens // self.patch_size)

    @property
    def history_blocks(self) -> int:
        return self.num_latents // self.block_size

    @property
    def known_latents(self) -> int:
        """Latents of the first generated block that are pinned to their clean values."""
        return self.num_latents % self.block_size

    @property
    def known_tokens(self) -> int:
        """Prompt tokens of the first generated block, cut from the output."""
        # A half-filled latent that completes a block makes history whole: its second token is then
        # never returned.
        return max(0, self.num_tokens - self.history_blocks * self.block_tokens)

    def generated_latents(self, num_new: int) -> int:
        """Latents of the first `num_new` new tokens, without known ones."""
        return max(0, -(-(self.known_tokens + num_new) // self.patch_size) - self.known_latents)

    def generated_blocks(self, num_new: int) -> int:
        """Blocks to generate for `num_new` new tokens."""
        return -(-(self.known_tokens + num_new) // self.block_tokens)
