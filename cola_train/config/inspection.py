"""Settings of a look into the latent space."""

import dataclasses

from cola_train.config.settings import SEED, at_least, require_each, setting


@dataclasses.dataclass(frozen=True)
class InspectionConfig:
    """`cola-train inspect`: what latents of held-out rows hold and what the prior knows of them."""

    num_rows: int = setting(256, help="Held-out rows to look at, from the first, at most.")
    batch_size: int = setting(16, help="Rows at a time; memory grows with it.")
    num_times: int = setting(
        11, help="Noise times, evenly from 0 to 1, at which noised latents are decoded."
    )
    num_time_bins: int = setting(10, help="Equal parts of [0, 1] by which the flow loss is given.")
    num_steps: int = setting(
        16, help="Euler steps from noise to data when the prior is asked for a block (guidance 1)."
    )
    map_latents: int = setting(2000, help="Latents on the 2-D map, from the first row on, at most.")
    seed: int = setting(
        0, help="Seed of posterior samples, noise and times: every look sees the same ones."
    )

    def __post_init__(self) -> None:
        prefix = "inspection's "
        # Of two rows each can be given the other's history.
        require_each(self, prefix, at_least(2), "num_rows", "batch_size", "num_times")
        require_each(self, prefix, at_least(1), "num_time_bins", "num_steps")
        require_each(self, prefix, at_least(3), "map_latents")
        require_each(self, prefix, SEED, "seed")
