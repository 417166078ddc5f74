"""The UNet as a picture: encoder left, decoder right, every part with its cost, and what a plan has done to it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from diffusers import UNet2DConditionModel
from markupsafe import Markup

from asdm_compress.assembly.plan import LEVELS, Plan, level_modules, place
from asdm_compress.core.edits import EXACT, SHORTCUT, Edit, conv_spec, kept_share
from asdm_compress.models.sites import Site, find_sites
from asdm_compress.reporting.svg import box, drawing, line, pickable, tag, text

State = Literal["kept", "gone", "narrowed", "convolution", "experts", "shortcut", "same"]
STATES: Final[Mapping[State, str]] = {
    "kept": "kept",
    "gone": "taken out",
    "narrowed": "narrowed",
    "convolution": "replaced by a convolution",
    "experts": "replaced by experts",
    "shortcut": "its shortcut alone",
    "same": "the same function for less",
}
_SHORT: Final = {
    "resnet": "ResNet", "downsampler": "down", "upsampler": "up", "stem": "conv in", "time": "time", "head": "conv out",
    "projections": "proj", "self-attention": "self", "cross-attention": "cross", "feed-forward": "feed-f.",
}  # fmt: skip
_WIDTH: Final = 760.0
_COLUMN: Final = 340.0
_CELL: Final = 40.0  # height of a unit
_GAP: Final = 5.0
_HEAD: Final = 24.0
_RESNET: Final = 84.0
_PAD: Final = 8.0


@dataclass(frozen=True, slots=True)
class SiteFigures:
    """What is known of a site: its share of what it is drawn by, before and, where known, after; and lines to tell."""

    before: float
    after: float | None = None
    lines: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Changes:
    """What a plan does, site by site: the edit of each that is changed itself or as a part of something larger."""

    edits: Mapping[str, Edit]
    gone: frozenset[str]

    def state(self, path: str) -> State:
        """What has become of a unit or sub-unit."""
        if path in self.gone:
            return "gone"
        edit = self.edits.get(path)
        if edit is None:
            return "kept"
        spec = conv_spec(edit)
        if spec is not None:
            return "experts" if spec.experts > 1 else "convolution"
        if kept_share(edit) is not None:
            return "narrowed"
        return "same" if edit in EXACT else {SHORTCUT: "shortcut"}.get(edit, "gone")  # type: ignore[return-value]


def changes_of(unet: UNet2DConditionModel, plan: Plan) -> Changes:
    """A plan in terms of units and sub-units. Raises AsdmError for one that does not fit the UNet."""
    placed = place(unet, plan)
    sites = find_sites(unet)
    blocks = {m for site in plan.edits if site.startswith(LEVELS) for m in level_modules(unet, site)}
    if placed.drop_mid:
        blocks.add("mid_block")
    gone = {s.path for s in sites if any(s.path == b or s.path.startswith(f"{b}.") for b in blocks)}
    dropped = {path for path, edit in placed.units.items() if edit == "drop"}
    gone |= {s.path for s in sites if any(s.path == d or s.path.startswith(f"{d}.") for d in dropped)}
    return Changes(placed.units, frozenset(gone))


def draw_costs(unet: UNet2DConditionModel, plan: Plan, figures: Mapping[str, SiteFigures], what: str) -> str:
    """The drawing. `figures` are by site; `what` is what their shares are of, such as "latency"."""
    picture = _Picture(unet, changes_of(unet, plan), figures, what)
    return picture.draw()


class _Picture:
    def __init__(
        self, unet: UNet2DConditionModel, changes: Changes, figures: Mapping[str, SiteFigures], what: str
    ) -> None:
        self.unet, self.changes, self.figures, self.what = unet, changes, figures, what
        self.sites = {site.path: site for site in find_sites(unet)}
        units = [s.path for s in self.sites.values() if s.level in ("unit", "sub-unit") or s.kind in ("stem", "head")]
        self.most = max((figures[p].before for p in units if p in figures), default=1.0) or 1.0

    def draw(self) -> str:
        """Level by level from the top; the decoder's flow goes up, so that its last part is at the top."""
        count = len(self.unet.down_blocks)
        left, right = 1.0, _WIDTH - _COLUMN - 1
        parts: list[Markup] = []
        y = 2.0
        half = (_COLUMN - _GAP) / 2
        parts += [self._cell("conv_in", left, y, half), self._cell("time_embedding", left + half + _GAP, y, half)]
        parts.append(self._cell("conv_out", right, y, _COLUMN))
        y += _CELL + 14
        for level in range(count):
            down, up = f"down_blocks.{level}", f"up_blocks.{count - 1 - level}"
            height = max(self._height(down), self._height(up))
            middle = y + height / 2
            if not self._is_gone(down) and not self._is_gone(up):
                parts += [
                    line(_COLUMN + 4, middle, right - 10, middle, "skip"),
                    tag("path", d=f"M{right - 11:.0f} {middle - 4:.0f}l7 4l-7 4z", class_="skip-head"),
                    text(_WIDTH / 2, middle - 7, "skip", "tick", "middle"),
                ]
            parts += self._block(down, left, y, height, upward=False)
            parts += self._block(up, right, y, height, upward=True)
            y += height + 14
        if "mid_block" in self.sites:
            parts += self._block("mid_block", (_WIDTH - _COLUMN) / 2, y, self._height("mid_block"), upward=False)
            y += self._height("mid_block") + 14
        title = "The UNet with the cost of every part and what the plan does to it"
        return drawing(_WIDTH, y - 12, title, _pattern(), *parts, class_="unet", role="group")

    def _is_gone(self, block: str) -> bool:
        return block in self.changes.gone

    def _layers(self, block: str) -> list[list[Site]]:
        """The units of a block in the order in which they run, layer by layer; samplers stand alone."""
        rows: list[list[Site]] = []
        for site in self.sites.values():
            if site.parent == block and site.level == "layer":
                rows.append([self.sites[module] for module in site.modules])
            elif site.parent == block:
                rows.append([site])
        return rows

    def _height(self, block: str) -> float:
        return _HEAD + len(self._layers(block)) * (_CELL + _GAP) + _PAD - _GAP

    def _block(self, block: str, x: float, y: float, height: float, upward: bool) -> list[Markup]:
        rows = self._layers(block)
        figures = self.figures.get(block)
        share = "" if figures is None else _share(figures)
        head = pickable(
            block, self._lines(block), box(x, y, _COLUMN, height, "block", 8), text(x + _PAD, y + 16, block, "name"),
            text(x + _COLUMN - _PAD, y + 16, share, "figure", "end"), class_="frame",
        )  # fmt: skip
        parts = [head]
        top = y + _HEAD
        spare = height - self._height(block)
        order = list(reversed(rows)) if upward else rows
        for number, row in enumerate(order):
            at = top + number * (_CELL + _GAP) + (spare if upward else 0)
            parts += self._row(row, x + _PAD, at, _COLUMN - 2 * _PAD)
        return parts

    def _row(self, row: Sequence[Site], x: float, y: float, width: float) -> list[Markup]:
        if len(row) == 1:
            return [self._cell(row[0].path, x, y, width)]
        parts: list[Markup] = []
        for site in row:
            wide = _RESNET if site.kind == "resnet" else width - _RESNET - _GAP
            inside = [s.path for s in self.sites.values() if s.parent == site.path]
            if site.kind == "transformer" and inside and self.changes.state(site.path) == "kept":
                each = (wide - 2 * (len(inside) - 1)) / len(inside)
                parts += [self._cell(path, x + i * (each + 2), y, each) for i, path in enumerate(inside)]
            else:
                parts.append(self._cell(site.path, x, y, wide))
            x += wide + _GAP
        return parts

    def _cell(self, path: str, x: float, y: float, width: float) -> Markup:
        site, state = self.sites[path], self.changes.state(path)
        figures = self.figures.get(path)
        name = _SHORT.get(site.kind, "attention" if site.kind == "transformer" else site.kind)
        parts = [box(x, y, width, _CELL, f"cell {state}", 5), text(x + 6, y + 15, name, "name")]
        if state == "gone":
            parts.append(box(x, y, width, _CELL, "hatch", 5))
        badge = _badge(self.changes.edits.get(path), state, width > 130)
        if width > 130 and badge:
            parts.append(text(x + width - 6, y + 15, badge, "badge", "end"))
        elif badge:
            parts.append(text(x + 6, y + 28, badge, "badge"))
        if figures is not None:
            if width > 130:
                parts.append(text(x + width - 6, y + 28, _share(figures), "figure", "end"))
            room = width - 12
            parts.append(box(x + 6, y + _CELL - 9, room * min(figures.before / self.most, 1), 5, "before", 1.5))
            if figures.after is not None:
                parts.append(box(x + 6, y + _CELL - 9, room * min(figures.after / self.most, 1), 5, "after", 1.5))
        return pickable(path, self._lines(path), *parts)

    def _lines(self, path: str) -> list[str]:
        state = self.changes.state(path)
        edit = self.changes.edits.get(path)
        site = self.sites[path]
        told = f"{site.kind}: {STATES[state]}"
        if edit is not None and edit != "drop":
            told += f" ({edit})"
        inside = [p for p in self.changes.edits if p.startswith(f"{path}.") and p not in self.changes.gone]
        if state == "kept" and (inside or any(g.startswith(f"{path}.") for g in self.changes.gone)):
            told = f"{site.kind}: changed in part"
        figures = self.figures.get(path)
        return [told, *(figures.lines if figures else ())]


def states_of(unet: UNet2DConditionModel, plan: Plan) -> list[State]:
    """The states that occur."""
    changes = changes_of(unet, plan)
    paths = [site.path for site in find_sites(unet) if site.level in ("unit", "sub-unit")]
    found = {changes.state(path) for path in paths}
    return [state for state in STATES if state in found]


def _share(figures: SiteFigures) -> str:
    if figures.after is None:
        return f"{figures.before:.1%}"
    return f"{figures.before:.1%} → {figures.after:.1%}"


def _badge(edit: Edit | None, state: State, wide: bool) -> str:
    """A word or two for what was done, that fits into a small cell."""
    if edit is None or state == "gone":
        return "out" if state == "gone" else ""
    spec = conv_spec(edit)
    if spec is not None:
        kind = "separable" if spec.separable else f"{spec.kernel}×{spec.kernel}"
        rank = f" r{spec.rank}" if spec.rank else ""
        experts = f" · {spec.experts} experts" if wide else f" · {spec.experts} e."
        return f"{kind}{rank}{experts if spec.experts > 1 else ''}"
    share = kept_share(edit)
    return f"× {share:g}" if share is not None else edit


def _pattern() -> Markup:
    stripes = tag("path", d="M0 6L6 0", class_="stripe")
    return tag("defs", tag("pattern", stripes, id="stripes", width=6, height=6, patternUnits="userSpaceOnUse"))
