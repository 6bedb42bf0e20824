"""Settings of `cola-train bench data`."""

import dataclasses

from cola_train.config.settings import require, setting


@dataclasses.dataclass(frozen=True)
class BenchDataConfig:
    """`cola-train bench data`: tokenising, reading rows, and opening a store of 10^9 rows, by one process on one core."""

    text: str | None = setting(None, help="A .txt file to tokenize, a paragraph a document; null is the novels that are included.")
    tokenizer: str | None = setting(None, help="A tokenizer.json; null learns one of 4,096 ids from the text.")
    least_characters: int = setting(
        4_000_000, help="A shorter text is repeated up to this many, its paragraphs in another order each time."
    )
    seq_len: int = setting(256, help="Tokens in a row.")
    rows: int = setting(8, help="Rows of a training batch.")
    step_seconds: float | None = setting(
        None, help="Seconds of the training step to compare reading with; null measures workload S's with such a batch."
    )
    runs: int = setting(5, help="Runs that count, after one to warm up; their median is the figure.")
    out: str | None = setting(None, help="A new JSON file for the result; null prints it.")

    def __post_init__(self) -> None:
        for name in ("least_characters", "seq_len", "rows", "runs"):
            require(getattr(self, name) >= 1, f"{name} must be at least 1, not {getattr(self, name)}.")
        require(self.step_seconds is None or self.step_seconds > 0,
                f"step_seconds must be above 0, or null to measure a step, not {self.step_seconds}.")  # fmt: skip
