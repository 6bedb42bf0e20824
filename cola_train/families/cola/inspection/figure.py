"""The page of `cola-train inspect`: a panel for each question that a checkpoint can answer."""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.ticker import FuncFormatter, MaxNLocator

from cola_train.drawing import BLUE, GREEN, ORANGE, PURPLE, YELLOW, drawing
from cola_train.families.cola.inspection.inspection import LatentInspection
from cola_train.families.cola.inspection.posterior_probes import ACTIVE_VARIANCE, TOKEN_KINDS
from cola_train.families.cola.inspection.prior_probes import FlowByPlace, TokenAccuracy
from cola_train.families.cola.inspection.yardstick_probe import Yardstick

_GRAY = "0.45"
_ORDER_COLORS = {"unigram": ORANGE, "bigram": GREEN}
_KIND_COLORS = dict(zip(TOKEN_KINDS, (BLUE, YELLOW, ORANGE, GREEN, PURPLE), strict=True))
_COLUMNS = 3
_PANEL = (4.2, 3.1)  # inches
_MOST_MARKED = 24  # points on a line that are marked one by one
_COUNTED = ("channel", "block of", "token of")  # axes of whole numbers
_SHOWN = str.maketrans(" \n\t", "␣↵⇥")  # a token's spaces
_STYLE = {
    "lines.linewidth": 1.4,
    "lines.markersize": 3.5,
    "legend.fontsize": 7,
    "axes.titlelocation": "left",
    # Tokens are shown as they are: a dollar sign is none of mathematics.
    "text.parse_math": False,
}


def draw_inspection(inspection: LatentInspection, name: str, png: Path, svg: Path) -> None:
    """Draw the page, named after the checkpoint."""
    panels = _panels(inspection)
    rows = -(-len(panels) // _COLUMNS)
    with drawing((_PANEL[0] * _COLUMNS, _PANEL[1] * rows + 0.4), png, svg, _STYLE) as figure:
        figure.suptitle(
            f"{name}: {inspection.num_rows} held-out rows, {inspection.num_tokens:,} tokens",
            fontsize=10,
        )
        grid = figure.add_gridspec(rows, _COLUMNS)
        for place, panel in enumerate(panels):
            row, column = divmod(place, _COLUMNS)
            # The map, which is last, takes what is left of its row.
            axes = figure.add_subplot(grid[row, column:] if panel is _map else grid[row, column])
            axes.set_gid(panel.__name__.strip("_"))
            panel(axes, inspection)


def _panels(inspection: LatentInspection) -> list[Callable[[Any, LatentInspection], None]]:
    panels = [_log_snr, _divergence]
    if inspection.drift is not None:
        panels.append(_drift)
    panels += [_reconstruction, _hits_by_position]
    if inspection.flow is not None:
        panels += [_hits_by_block, _flow_by_time, _flow_by_block]
    if inspection.history is not None:
        panels.append(_history)
    return [*panels, _map]


def _log_snr(axes: Any, inspection: LatentInspection) -> None:
    health = inspection.posterior
    channels = range(len(health.kl_per_channel))
    active = [variance > ACTIVE_VARIANCE for variance in health.mean_variance_per_channel]
    # A channel whose mean is always 0 has no bar.
    heights = [value if math.isfinite(value) else 0.0 for value in health.log_snr_per_channel]
    axes.bar(channels, heights, color=[BLUE if on else "0.8" for on in active])
    axes.margins(y=0.15)
    label = f"all channels: {health.log_snr:.2f}"
    axes.axhline(health.log_snr, color=ORANGE, linestyle="--", linewidth=1, label=label)
    axes.set_title(f"VAE logSNR; active units: {health.active_units} of {len(active)}")
    _label(axes, "channel (grey: inactive)", "log(mean μ² / mean σ²)")
    axes.legend()


def _divergence(axes: Any, inspection: LatentInspection) -> None:
    health = inspection.posterior
    for values, shift, color, label in (
        (health.kl_per_channel, -0.2, BLUE, "KL(q || N(0, 1))"),
        (health.information_per_channel, 0.2, ORANGE, "KL(q || N(m, s²)) ≥ information"),
    ):
        places = [place + shift for place in range(len(values))]
        axes.bar(places, values, 0.4, color=color, label=label)
    # Room for the legend above the bars.
    highest = max(1e-6, *health.kl_per_channel, *health.information_per_channel)
    axes.set_ylim(top=1.3 * highest)
    axes.legend(loc="upper left")
    axes.set_title(f"Divergence; KL in all {health.kl_nats_per_token:.1f} nats per token")
    _label(axes, "channel", "nats per latent")


def _drift(axes: Any, inspection: LatentInspection) -> None:
    drift = inspection.drift
    assert drift is not None
    axes.bar(range(len(drift.kl_per_channel)), drift.kl_per_channel, color=BLUE)
    axes.set_title(f"Drift from the reference: KL {drift.kl_nats_per_token:.2f} nats per token")
    _label(axes, "channel", "KL(q || q_ref), nats per latent")
    axes.margins(y=0.15)
    changed, cosine = drift.rms_change_of_means, drift.cosine_of_means
    _note(axes, f"means: RMS change {changed:.3f}, cosine {cosine:.4f}")


def _reconstruction(axes: Any, inspection: LatentInspection) -> None:
    curve = inspection.reconstruction
    axes.plot(curve.times, curve.noised, color=BLUE, marker="o", label="z_t itself")
    if curve.denoised is not None:
        label = "one DiT step: z_t - t v(z_t, t)"
        axes.plot(curve.times, curve.denoised, color=ORANGE, marker="s", label=label)
    _commonest(axes, inspection)
    axes.set_title("Reconstruction from noised latents")
    _label(axes, "noise time t (0 data, 1 noise)", "share of true tokens")
    # Room for the legend.
    axes.set_ylim(0, 1.35)
    axes.legend(loc="upper right")


def _hits_by_position(axes: Any, inspection: LatentInspection) -> None:
    where = "row" if inspection.block_size is None else "block"
    _hit_lines(axes, inspection, lambda accuracy: accuracy.by_position)
    axes.set_title(f"True token hit, by place in the {where}")
    _label(axes, f"token of the {where}", "share of true tokens")


def _hits_by_block(axes: Any, inspection: LatentInspection) -> None:
    _hit_lines(axes, inspection, lambda accuracy: accuracy.by_block)
    axes.set_title(f"True token hit, by block of {inspection.block_size} latents")
    _label(axes, "block of the row", "share of true tokens")


def _hit_lines(
    axes: Any, inspection: LatentInspection, values: Callable[[TokenAccuracy], list[float]]
) -> None:
    for name, accuracy, color in (
        ("posterior hit", inspection.posterior_accuracy, BLUE),
        ("prior hit", inspection.prior_accuracy, ORANGE),
    ):
        if accuracy is not None:
            _line(axes, values(accuracy), color, f"{name}: {accuracy.share:.3f}")
    _commonest(axes, inspection)
    chance = inspection.chance_token_accuracy
    _level(axes, chance, "-.", f"tokens drawn by frequency: {chance:.3f}")
    # Posterior and prior may be a hundredfold apart.
    axes.set_yscale("log", nonpositive="clip")
    axes.set_ylim(0.4 * chance, 1.5)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.legend(loc="center", bbox_to_anchor=(0.5, 0.7))


def _flow_by_time(axes: Any, inspection: LatentInspection) -> None:
    flow = inspection.flow
    assert flow is not None
    lines = [
        (flow.loss_by_time, BLUE, "-", 1.6, f"DiT: {flow.loss:.4f} in all"),
        (flow.baseline_by_time, _GRAY, "--", 1.2, f"mean and variance alone: {flow.bound:.4f}"),
    ]
    for name, yardstick in _yardsticks(flow):
        label = f"codes and {name}s: {yardstick.loss:.4f}"
        lines.append((yardstick.loss_by_time, _ORDER_COLORS[name], "-", 1.2, label))
    for values, color, linestyle, width, label in lines:
        style = {"color": color, "linestyle": linestyle, "linewidth": width}
        axes.stairs(values, flow.time_bins, baseline=None, label=label, **style)
    axes.set_ylim(bottom=0)
    axes.legend(loc="lower center")
    axes.set_title("Flow-matching loss by noise time")
    _label(axes, "noise time t (0 data, 1 noise)", "mean of (v - (z₁ - z₀))²")


def _flow_by_block(axes: Any, inspection: LatentInspection) -> None:
    flow = inspection.flow
    assert flow is not None
    # The bound of a block moves with the times that the block happened to draw: the ratio does not.
    ratios = [
        loss / bound for loss, bound in zip(flow.loss_by_block, flow.baseline_by_block, strict=True)
    ]
    _line(axes, ratios, BLUE, f"all blocks: {flow.loss / flow.bound:.3f}")
    _level(axes, 1.0, "--", "mean and variance alone")
    for name, yardstick in _yardsticks(flow):
        by_block = zip(yardstick.loss_by_block, flow.baseline_by_block, strict=True)
        label = f"codes and {name}s: {yardstick.loss / flow.bound:.3f}"
        _line(axes, [loss / bound for loss, bound in by_block], _ORDER_COLORS[name], label)
    axes.set_title("Flow-matching loss over its bound, by block")
    _label(axes, "block of the row", "loss / mean-and-variance bound")
    axes.legend()


def _yardsticks(flow: FlowByPlace) -> Iterable[tuple[str, Yardstick]]:
    return () if flow.yardsticks is None else flow.yardsticks.items()


def _history(axes: Any, inspection: LatentInspection) -> None:
    use = inspection.history
    assert use is not None
    gains = (use.gain_over_shuffled, use.gain_over_none)
    errors = (use.gain_over_shuffled_standard_error, use.gain_over_none_standard_error)
    spans, caps = [2 * error for error in errors], {"elinewidth": 1, "capsize": 4}
    axes.bar((0, 1), gains, 0.5, color=(ORANGE, PURPLE), yerr=spans, error_kw=caps)
    axes.axhline(0, color="black", linewidth=0.8)
    shuffled = f"another row's history\n({use.shuffled_history:.4f})"
    axes.set_xticks((0, 1), (shuffled, f"no history\n({use.no_history:.4f})"))
    axes.set_xlim(-0.6, 1.6)
    axes.set_title(f"Does the prior use history? True history: {use.true_history:.4f}")
    _label(axes, "", "loss above that with the true history")
    _note(axes, "bars: 2 paired standard errors")


def _map(axes: Any, inspection: LatentInspection) -> None:
    found = inspection.map
    for kind, color in _KIND_COLORS.items():
        at = [place for place, other in enumerate(found.kind) if other == kind]
        if at:
            xs, ys = ([axis[i] for i in at] for axis in (found.x, found.y))
            label = f"{kind} ({len(at) / len(found.kind):.0%})"
            axes.scatter(xs, ys, s=5, color=color, alpha=0.55, linewidths=0, label=label)
    box = {"boxstyle": "round,pad=0.15", "facecolor": "white", "alpha": 0.75, "linewidth": 0.4}
    for text, x, y in found.common_tokens:
        axes.annotate(
            text.translate(_SHOWN), (x, y), fontsize=7, ha="center", va="center", bbox=box
        )
    first, second = found.variance_shares
    axes.set_title(f"{len(found.x):,} posterior means, by kind of token")
    _label(axes, f"principal axis 1 ({first:.0%} of variance)", f"principal axis 2 ({second:.0%})")
    axes.legend(markerscale=2.5, handletextpad=0.1, loc="upper left", bbox_to_anchor=(1, 1))


def _label(axes: Any, x: str, y: str) -> None:
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    if x.startswith(_COUNTED):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _commonest(axes: Any, inspection: LatentInspection) -> None:
    share = inspection.majority_token_accuracy
    _level(axes, share, ":", f"the commonest token always: {share:.3f}")


def _level(axes: Any, value: float, linestyle: str, label: str) -> None:
    """A yardstick: a gray horizontal line."""
    axes.axhline(value, color=_GRAY, linestyle=linestyle, linewidth=1.2, label=label)


def _note(axes: Any, text: str) -> None:
    axes.text(0.99, 0.98, text, transform=axes.transAxes, ha="right", va="top", fontsize=7)


def _line(axes: Any, values: Sequence[float], color: str, label: str) -> None:
    places = [place for place, value in enumerate(values) if math.isfinite(value)]
    marker = "o" if len(values) <= _MOST_MARKED else ""
    axes.plot(places, [values[place] for place in places], color=color, marker=marker, label=label)
