"""Fill in a call's schedule and lay out its workspace: the first thing a call does, and again if fewer threads came."""

from __future__ import annotations

from functools import cache

from numba import njit

from ..cells import Cell, bind
from . import plan
from .plan import scratch_bytes, unit_vectors, wide_columns
from .processor import Target
from .product import DOT_PART, ceil_div, options
from .stages import carried_values, row_values
from .team import RECORD_BYTES, record_at
from .tiles import tile_blocks
from .vector import VectorLibrary


def compiled_plan() -> dict:
    """The functions of plan.py, compiled; each finds those before it under their own names."""
    compiled = {"ceil_div": ceil_div, "tile_blocks": tile_blocks}
    for function in (
        plan.align,
        plan.split_bytes,
        plan.split_rows,
        plan.way_of_weights,
        plan.block_length,
        plan.overlapped,
        plan.step_cost,
        plan.choose_groups,
        plan.worth_threads,
        plan.layer_block,
        plan.layer_cost,
        plan.crews_of_layers,
        plan.forward_block,
        plan.backward_block,
        plan.schedule,
    ):
        compiled[function.__name__] = njit(bind(function, **compiled), **options)
    return compiled


PLAN = compiled_plan()
align, split_bytes, split_rows = PLAN["align"], PLAN["split_bytes"], PLAN["split_rows"]
forward_block, backward_block = PLAN["forward_block"], PLAN["backward_block"]
way_of_weights, schedule = PLAN["way_of_weights"], PLAN["schedule"]
layer_block, crews_of_layers = PLAN["layer_block"], PLAN["crews_of_layers"]


@cache
def make_arrange(cell: Cell, v: VectorLibrary, target: Target, forward: bool):
    """arrange(records, threads) -> bytes of workspace: call it once to learn the size, and again with `workspace` set.

    Of layers that are faster one after the other the first call returns 0.
    """
    size, lanes, vector = v.size, v.lanes, v.lanes * v.size
    gates, slots, values, weights = cell.gates, cell.slots, cell.preactivations, cell.weights
    stopped, noise = cell.stopped, cell.noise
    # of a row: pre-activations that are in memory at once, what goes from one stage to the next, and results of reductions;
    # of a unit: operands of these
    room, carried, reduced, meetings, operands = gates, 0, 0, cell.meetings[not forward], cell.reduced[not forward]
    if cell.reduces:
        room, stages = cell.preactivations, cell.derived.forward_stages if forward else cell.derived.backward_stages
        carried, reduced = carried_values(stages) + (not forward), row_values(stages)
    per_panel = unit_vectors(gates, target.registers)
    wide = wide_columns(target.registers) * lanes
    columns = gates * per_panel if forward else wide_columns(target.registers)
    scratch = scratch_bytes(columns * vector)
    with_tiles, tile_parts = bool(target.tiles) and size == 4, plan.FORWARD_PARTS if forward else plan.BACKWARD_PARTS

    @njit(**options)
    def lay_out(records, threads, start):
        """The same of a layer, whose part of the workspace begins at `start`; returns where that ends."""
        p = record_at(records)
        H, R, I, B, heads = p.hidden_size, p.output_size, p.input_size, p.batch, p.heads
        panel_units = lanes * per_panel if forward else wide
        seen, own_units = (R // heads, H // heads) if heads > 1 else (R, H)
        head_units = own_units if forward else seen
        head_panels = ceil_div(head_units, panel_units)
        panels = heads * head_panels
        units = panels * panel_units
        input_depth, depth = (I, seen) if forward else (gates * H, gates * own_units)
        half_panels, tiles, way = way_of_weights(
            forward, p.half, with_tiles, p.steps, B, vector, heads, meetings, operands * H
        )  # fmt: skip
        frozen = forward and (p.pack != 0 or p.pack_only != 0)
        crews, row_groups, unit_groups = schedule(
            p.steps, p.rows, B, I, H, R, p.directions, threads, p.l2_bytes, gates, depth, panels, columns, way,
            1 if forward else 2,
        )  # fmt: skip
        ih_depth, hh_depth = input_depth, depth // 2 if half_panels else depth
        if tiles:
            ih_depth, hh_depth = plan.TILE_PAIRS * tile_blocks(input_depth), plan.TILE_PAIRS * tile_blocks(depth)
        together = split_rows(max(input_depth, depth), tile_parts) if tiles else max(1, p.rows)  # lengths may all be 0
        one_step = p.steps == 1 and not frozen
        rounded_at_once = p.half and p.rows <= plan.FEW_ROWS
        # Packed W_hh may lie in its gradient, which is as large and written when no step needs the panels any more.
        in_gradient = not forward and p.need_dw and seen % wide == 0 and hh_depth <= depth and not rounded_at_once
        team = crews * row_groups * unit_groups
        if forward:
            at_once = p.layers > 1
            block = forward_block(p.steps, B, p.rows, 0 if at_once else I, room * H * size)
            if at_once:  # the same for all, whatever their inputs
                block = layer_block(p.steps, B, block)
            tables = 5 * B + 2 * block * B + 2 + B * (noise > 0)
            # Panels used once go through a buffer that stays in cache. (A row group apiece would pack them all again.)
            ih_once = row_groups == 1 and block == p.steps and not frozen and p.rows <= together
            panel_bytes = align(columns * vector * ih_depth) if ih_once else 0
            if one_step:
                panel_bytes = lanes * DOT_PART * size if p.half and B > 2 else 0
        else:
            block = backward_block(p.steps, B, hh_depth * R // (values * H) if in_gradient else 0)
            tables = (3 + plan.PLACES) * B + 2 * block * B + max(gates * H, R) + plan.UNIT_BLOCK
            ih_once = not (tiles and p.need_dx)
            buffered = ih_once and (p.need_dx or one_step)
            panel_bytes = align(plan.GROUP_BYTES * min(input_depth, plan.PANEL_DEPTH)) if buffered else 0
        operand_rows = operand_panels = 0
        if not forward and p.need_dw:
            operand_panels = min(ceil_div(max(I, R, H), wide), plan.OPERAND_BYTES // (wide * size))
            operand_rows = min(plan.OPERAND_ROWS, block * B)
        own_block, operand_depth = operand_rows * plan.UNIT_BLOCK * size, operand_rows
        if tiles:
            own_block = split_bytes(min(together, block * B), max(input_depth, depth), tile_parts)
            if operand_rows > 0:
                own_block = max(own_block, split_bytes(plan.TILE_UNITS, operand_rows, tile_parts))
                operand_depth = plan.TILE_PAIRS * tile_blocks(operand_rows) * tile_parts
        masked = B * R * size if p.mask else 0
        own = align(scratch + panel_bytes + own_block + 8 * tables + (masked if forward else 0) + B * reduced * vector)

        offset = start
        for direction in range(p.directions):
            d = record_at(records + direction * RECORD_BYTES)
            d.threads, d.crews, d.crew_threads, d.block_steps = team, crews, row_groups * unit_groups, block
            d.row_groups, d.unit_groups = row_groups, unit_groups
            if crews == 1:
                offset = start  # directions take turns in one workspace
            d.half_panels, d.tiles, d.split_rows = half_panels, tiles, together
            d.head_units, d.head_panels = head_units, head_panels
            d.ih_once, d.one_step, d.panel_bytes, d.own_block = ih_once, one_step, panel_bytes, own_block
            d.ih_depth, d.hh_depth = ih_depth, hh_depth
            if not forward and d.half and d.need_dw:
                d.rounded_at_once = rounded_at_once
                d.dw_ih, d.dw_hh, d.dw_hr = d.dw_ih_half, d.dw_hh_half, d.dw_hr_half
                if not d.rounded_at_once:
                    d.dw_ih = d.workspace + offset
                    d.dw_hh = d.dw_ih + align(gates * H * I * size)
                    d.dw_hr = d.dw_hh + align(gates * H * seen * size)
                    offset = d.dw_hr - d.workspace + (align(R * H * size) if d.projected else 0)
            begin, behind = (d.pack, offset) if frozen else (d.workspace, 0)
            offset = 0 if frozen else offset
            d.ih_panels = begin + offset
            if not ih_once:
                offset += align((units * gates if forward else ceil_div(I, wide) * wide) * ih_depth * size)
            d.hh_panels = begin + offset
            if in_gradient and block == p.steps:
                d.hh_panels = d.dw_hh
            elif not one_step:
                offset += align((units * gates if forward else units) * hh_depth * size)
            d.hr_panels = begin + offset
            if d.projected:
                offset += align(ceil_div(R, wide) * wide * H * size if forward else ceil_div(H, wide) * wide * R * size)
            d.bias_sums = begin + offset
            d.zeros = begin + offset
            offset += align(((values + weights) * units if forward else max(gates * H, R)) * size)
            if frozen:
                d.pack_bytes, offset = offset, behind
            d.shared = d.workspace + offset
            if forward:
                if slots > 0 and not d.save:
                    offset += align(block * B * room * H * size)
            else:
                offset += (block * B + B) * (align(values * H * size) + plan.LINE)
            d.tails = d.workspace + offset
            if d.projected:
                offset += align(B * H * size if forward else block * B * R * size)
            d.masked = d.workspace + offset
            if not forward and d.mask:
                offset += align(block * masked)
            d.carried = d.workspace + offset
            offset += align(B * carried * H * size)
            d.own_sums = d.workspace + offset
            if not forward:
                offset += align(B * weights * H * size)
            d.reset_sums = d.workspace + offset
            if not forward and d.resets and d.need_dh0:
                offset += align(B * stopped * H * size)
            d.operands = d.workspace + offset
            if not forward and d.need_dw:
                d.operand_rows = operand_rows
                offset += align(operand_panels * wide * operand_depth * size)
            d.own, d.own_bytes = d.workspace + offset, own
            offset += row_groups * unit_groups * own
        if not forward and p.directions == 2 and p.need_dx:
            other = record_at(records + RECORD_BYTES)
            other.dx = p.dx_other = p.workspace + offset
            offset += align((p.padded_steps * B if p.order else p.rows) * I * size)
        return offset

    @njit(**options)
    def arrange(records, threads):
        p = record_at(records)
        crews, of_each = 1, threads
        if p.layers > 1:
            H, R, I = p.hidden_size, p.output_size, p.input_size
            panels = p.heads * ceil_div(H // p.heads, lanes * per_panel)
            _, _, way = way_of_weights(forward, 0, with_tiles, p.steps, p.batch, vector, p.heads, meetings, operands * H)
            crews = crews_of_layers(p.layers, p.steps, p.batch, I, H, R, threads, p.l2_bytes, gates, panels, columns, way)
            if crews == 1 and p.workspace == 0:
                return 0
            of_each = threads // crews
        offset = most = 0
        for layer in range(max(1, p.layers)):
            offset = lay_out(records + layer * RECORD_BYTES, of_each, offset)
            most = max(most, record_at(records + layer * RECORD_BYTES).threads)
        for layer in range(p.layers):
            own = record_at(records + layer * RECORD_BYTES)
            own.threads, own.crews, own.crew_threads, own.direction = crews * most, crews, most, layer
        return offset

    return arrange
