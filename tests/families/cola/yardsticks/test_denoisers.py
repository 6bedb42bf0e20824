"""Yardsticks against the enumeration of every sequence of a block's tokens; tiles; size."""

import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from cola_train.families.cola.yardsticks import denoisers
from cola_train.families.cola.yardsticks.denoisers import (
    Blocks,
    bigram_velocity,
    unigram_velocity,
)
from cola_train.likelihood.token_tables import BigramModel
from cola_train.models.codebook import Codebook
from tests.helpers.tiny import random_latents
from tests.likelihood.test_token_tables import NUMBER, counted_model, dense_table

CHANNELS = 2


def codebook_of(model: BigramModel) -> Codebook:
    codes = random_latents(NUMBER, CHANNELS, seed=3).double()
    return Codebook(codes, model.p.log(), torch.tensor([0.02, 0.3]).double())


def some_blocks(number: int = 12, size: int = 3) -> Blocks:
    generator = torch.Generator().manual_seed(6)
    starts = torch.rand(number, size, generator=generator) < 0.2
    return Blocks(
        random_latents(number, size, CHANNELS, seed=5).double(),
        torch.rand(number, size, generator=generator).double(),
        torch.randint(0, NUMBER, (number,), generator=generator),
        starts,
        torch.rand(number, size, generator=generator) < 0.9,
    )


def enumerated(codebook: Codebook, blocks: Blocks, p: Tensor, table: Tensor | None) -> Tensor:
    """E[z_1 - z_0] of each latent, over all sequences of tokens one by one."""
    result = torch.zeros_like(blocks.z_t)
    for block, (times, z_t) in enumerate(zip(blocks.t.tolist(), blocks.z_t)):
        total, sums = 0.0, torch.zeros_like(z_t)
        for sequence in itertools.product(range(NUMBER), repeat=len(times)):
            log_weight, known = 0.0, int(blocks.before[block])
            clean = torch.zeros_like(z_t)
            for place, (token, t) in enumerate(zip(sequence, times)):
                after = p if table is None or blocks.starts[block, place] else table[known]
                log_weight += math.log(after[token])
                mean = (1 - t) * codebook.codes[token]
                normal = torch.distributions.Normal(
                    mean, ((1 - t) ** 2 * codebook.variance + t**2).sqrt()
                )
                # Padding says nothing of its token.
                if blocks.counted[block, place]:
                    log_weight += float(normal.log_prob(z_t[place]).sum())
                # z_0 and z_t are jointly normal.
                gain = (1 - t) * codebook.variance / normal.variance
                clean[place] = codebook.codes[token] + gain * (z_t[place] - mean)
                known = token
            total += math.exp(log_weight)
            sums += math.exp(log_weight) * clean
        result[block] = (z_t - sums / total) / blocks.t[block][:, None]
    return result


def test_both_yardsticks_are_means_over_all_sequences_of_tokens() -> None:
    model, (p, table) = counted_model()[1], dense_table()
    codebook, blocks = codebook_of(model), some_blocks()
    assert {bool(x) for x in blocks.starts[:, 1:].flatten()} == {True, False}
    bigram = bigram_velocity(codebook, model, blocks)
    expected = enumerated(codebook, blocks, p, table)
    assert (bigram - expected)[blocks.counted].abs().max() < 1e-9
    unigram = unigram_velocity(codebook, blocks)
    expected = enumerated(codebook, blocks, p, None)
    assert (unigram - expected)[blocks.counted].abs().max() < 1e-9
    assert (bigram - unigram)[blocks.counted].abs().mean() > 1e-2
    target = random_latents(*unigram.shape, seed=7)
    losses = [(v - target)[blocks.counted].square().mean() for v in (unigram, expected)]
    assert abs(float(losses[0] - losses[1])) < 1e-9
    # The same in the arithmetic of an inspection.
    single = Codebook(*(x.float() for x in (codebook.codes, codebook.log_p, codebook.variance)))
    tables = BigramModel(model.p.float(), model.backoff.float(), model.pairs, model.seen.float())
    parts = (blocks.before, blocks.starts, blocks.counted)
    rounded = bigram_velocity(single, tables, Blocks(blocks.z_t.float(), blocks.t.float(), *parts))
    assert torch.allclose(rounded.double(), bigram, atol=1e-4)


def test_blocks_of_one_see_the_token_before_and_their_own_latent() -> None:
    model, (_, table) = counted_model()[1], dense_table()
    codebook, blocks = codebook_of(model), some_blocks(40, 1)
    z_t, t = blocks.z_t[:, 0], blocks.t[:, 0]
    known = torch.where(blocks.starts, codebook.log_p, table[blocks.before].log())
    expected = codebook.velocity(z_t, t, codebook.mean_code(z_t, t, known))
    found = bigram_velocity(codebook, model, blocks)[:, 0]
    assert torch.allclose(found[blocks.counted[:, 0]], expected[blocks.counted[:, 0]], atol=1e-12)


def test_tiles_and_their_number_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model, blocks = counted_model()[1], some_blocks(11, 5)
    codebook = codebook_of(model)
    whole = unigram_velocity(codebook, blocks), bigram_velocity(codebook, model, blocks)
    for most in (1, 3 * 5 * NUMBER):
        monkeypatch.setattr(denoisers, "_MOST_VALUES", most)
        parts = unigram_velocity(codebook, blocks), bigram_velocity(codebook, model, blocks)
        for one, other in zip(whole, parts):
            assert torch.allclose(one, other, atol=1e-12)


def test_long_blocks_of_clear_latents_do_not_underflow() -> None:
    model = counted_model()[1]
    codebook = Codebook(
        10 * random_latents(NUMBER, CHANNELS, seed=3), model.p.log().float(), torch.full((2,), 1e-4)
    )
    tables = BigramModel(model.p.float(), model.backoff.float(), model.pairs, model.seen.float())
    tokens = torch.randint(0, NUMBER, (2, 300), generator=torch.Generator().manual_seed(0))
    t, starts = torch.full((2, 300), 0.01), torch.zeros(2, 300, dtype=torch.bool)
    z_1 = random_latents(2, 300, CHANNELS, seed=8)
    z_t = (1 - t)[..., None] * codebook.codes[tokens] + t[..., None] * z_1
    blocks = Blocks(z_t, t, tokens[:, 0], starts, ~starts)
    found = z_t - t[..., None] * bigram_velocity(codebook, tables, blocks)
    # Each latent is where its token's code is, however unlikely the pairs.
    assert torch.allclose(found, codebook.codes[tokens], atol=0.05)


def test_blocks_of_rows_come_after_the_clean_tokens_before_them() -> None:
    tokens = torch.arange(12).view(2, 6)
    starts = torch.zeros(2, 6, dtype=torch.bool)
    starts[:, 0] = starts[1, 4] = True
    z_t = random_latents(2, 6, CHANNELS, seed=0)
    blocks = Blocks.of(z_t, torch.rand(2, 6), tokens, starts, ~starts, 2)
    assert blocks.before.tolist()[1:3] == [1, 3]
    assert blocks.before.tolist()[4:] == [7, 9]
    assert blocks.starts.tolist()[::3] == [[True, False], [True, False]]
    assert blocks.starts[5].tolist() == [True, False]
    assert torch.equal(blocks.z_t[4], z_t[1, 2:4])
    whole = Blocks.of(z_t, torch.rand(2, 6), tokens, starts, ~starts, 6)
    assert whole.t.shape == (2, 6)


PROGRAM = """
import resource, time, torch
from cola_train.models.codebook import Codebook
from cola_train.families.cola.yardsticks.denoisers import Blocks, bigram_velocity, unigram_velocity
from cola_train.likelihood.token_tables import BigramModel, PairTally
torch.set_num_threads(1)
number, channels = 100_278, 16
generator = torch.Generator().manual_seed(0)
shares = 1 / torch.arange(1, number + 1)
tokens = torch.multinomial(shares, 2_000_000, True, generator=generator).view(2000, -1)
starts = torch.zeros_like(tokens, dtype=torch.bool)
starts[:, 0] = True
tally = PairTally(number)
tally.add(tokens, ~starts | True, starts)
bigram = BigramModel.of(tally, None, torch.float32)
codes = torch.randn(number, channels, generator=generator)
codebook = Codebook(codes, bigram.p.log(), torch.full((channels,), 0.06))
def memory(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
for size in (1, 4, 16):
    some = tokens[:8, :64]
    t = torch.rand(some.shape, generator=generator)
    z_t = (1 - t)[..., None] * codes[some] + t[..., None] * torch.randn(*some.shape, channels)
    blocks = Blocks.of(z_t, t, some, starts[:8, :64], some >= 0, size)
    before = memory()
    for name, call in (
        ("unigram", lambda: unigram_velocity(codebook, blocks)),
        ("bigram", lambda: bigram_velocity(codebook, bigram, blocks)),
    ):
        began = time.process_time()
        call()
        print(name, size, 1000 * (time.process_time() - began) / some.numel(), memory() - before)
print("pairs", tally.pairs.numel(), "whole", memory())
"""


@pytest.mark.slow
def test_a_hundred_thousand_codes_fit_in_small_memory(tmp_path: Path) -> None:
    environment = os.environ | {"PYTHONPATH": str(Path(denoisers.__file__).parents[4])}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(
        command, env=environment, cwd=tmp_path, check=True, text=True, capture_output=True
    )
    print(done.stdout)  # ms of CPU a latent, MB beyond what was held
    for line in done.stdout.splitlines()[:-1]:
        name, _, milliseconds, more = line.split()
        assert float(more) < 600, line
        assert float(milliseconds) < {"unigram": 100, "bigram": 500}[name], line
