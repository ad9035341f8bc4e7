"""A layer forward: project the input, carry the state through time, gate maths on the tile that the product just left."""

from __future__ import annotations

import functools
from functools import cache

from numba import njit

from ..cells import Cell
from .elementary import make_reader, make_writer, over_vectors
from .plan import FORWARD_PARTS as PARTS
from .plan import (
    ROW_BLOCK,
    TILE_BYTES,
    TILE_DEPTH,
    TILE_ROWS,
    scratch_bytes,
    unit_vectors,
    wide_columns,
)
from .processor import Target
from .product import (
    ceil_div,
    fill_rows,
    make_dot_rows,
    make_multiply,
    make_pack_columns,
    make_product,
    options,
    panels_together,
    shift_rows,
)
from .stages import carried_values, make_stages, row_values
from .team import (
    RECORD_BYTES,
    active_rows,
    begins_anew,
    end_unit,
    fill_step,
    first_unit,
    head_depth,
    head_of,
    kept_base,
    record_at,
    row_at,
    share,
    split_row,
    step_base,
    there_and_back,
    wait_crew,
    wait_group,
    wait_rows,
    wait_team,
)
from .tiles import (
    for_tiles,
    make_configure,
    make_pack_columns_block,
    make_parts_of,
    make_release,
    make_split,
    make_tile_product,
    rows_at,
    tile_blocks,
)
from .vector import VectorLibrary, load_int, prefetch, store_int


@cache
def make_forward(cell: Cell, v: VectorLibrary, target: Target):
    """forward(records, rank): the share of thread `rank` in one call; records is the address of one record a direction, or a
    layer where layers run at once."""
    size, lanes, vector = v.size, v.lanes, v.lanes * v.size
    load, store, load_all, zero = v.load, v.store, v.load_all, v.zero
    gates, hidden, slots, preactivations = cell.gates, cell.hidden, cell.slots, cell.preactivations
    kept, states, weights, noise = cell.kept, cell.states, cell.weights, cell.noise
    names = tuple(name for name, _ in cell.derived.before)
    per_panel = unit_vectors(gates, target.registers)
    columns, panel_units = gates * per_panel, per_panel * lanes
    sums_bytes = scratch_bytes(columns * vector)
    product = make_product(v, target, columns)
    # The same for matrices in bfloat16; in float64 there are none.
    has_half = v.half is not None
    product_half = make_product(v, target, columns, "pairs" if has_half else "")
    pack_columns_half, dot_rows_half = make_pack_columns(v, has_half), make_dot_rows(v, has_half)
    tools = functools.partial(for_tiles, v, target)
    configure, release, parts_of = tools(make_configure, target), tools(make_release, target), tools(make_parts_of, v, PARTS)
    split, pack_columns_block = (tools(make, v) for make in (make_split, make_pack_columns_block))
    exact_product = tools(make_tile_product, v, target, columns, 1)
    tile_product = tools(make_tile_product, v, target, columns, PARTS)
    wide = wide_columns(target.registers)
    multiply = make_multiply(v, target, wide)
    pack_columns, dot_rows = make_pack_columns(v), make_dot_rows(v)
    input_order, hidden_order = cell.input, tuple(range(gates))
    apply, apply_twice = over_vectors(cell.derived.forward, v, target)
    reduces, room = cell.reduces, preactivations if cell.reduces else gates
    wait = wait_rows if reduces else wait_group  # a row's reductions are over all heads
    # Panels that a row alone meets before its gate maths, which takes two vectors at a time.
    alone = max(panels_together(v, columns)[1], 2 // per_panel)

    def preactivation_tuple(count):
        """Pre-activations 0 .. count-1 of one vector of units, as a tuple."""
        if count == 0:
            return njit(lambda z, z_gate, sums, bias, bias_gate, n: (), **options)
        before, s = preactivation_tuple(count - 1), count - 1

        @njit(**options)
        def all_of(z, z_gate, sums, bias, bias_gate, n):
            if s < gates:
                value = load(z + s * z_gate, n)  # input product and biases
            else:
                value = load_all(bias + s * bias_gate)
            if s >= hidden:
                value = value + load_all(sums + (s - hidden) * per_panel * vector)
            return before(z, z_gate, sums, bias, bias_gate, n) + (value,)

        return all_of

    preactivations_of = preactivation_tuple(preactivations)

    writer = make_writer(v)
    write_slots = writer((*range(kept), *range(slots - states, slots)), range(1, 1 + kept + states))
    write_states = writer(range(states), range(1 + kept, 1 + kept + states))

    def state_reader(names):
        """States before the step of a vector of units: h from its row, others from theirs, `stride` bytes apart."""
        if not names:
            return njit(lambda h, c, stride, n: (), **options)
        before, is_h, s = state_reader(names[:-1]), names[-1] == "h", len([name for name in names[:-1] if name != "h"])

        @njit(**options)
        def read(h, c, stride, n):
            return before(h, c, stride, n) + (load(h if is_h else c + s * stride, n),)

        return read

    read_states = state_reader(names)

    # The cell's own weights stand behind the sums of biases.
    own_weights, reader = tuple(range(preactivations, preactivations + weights)), make_reader(v)
    read_weights, read_noise = reader(own_weights), reader(tuple(range(noise)))

    @njit(**options)
    def pack_rows_of(p, source, units, depth, out, out_stride):
        if p.half:
            pack_columns_half(source, depth * 2, units, depth, out, out_stride)
        else:
            pack_columns(source, depth * size, units, depth, out, out_stride)

    @njit(**options)
    def pack_gates(p, w, depth, order, panel, paired, out):
        """One panel of a gate matrix [gates * hidden_size, depth]: all gates of a block of units, k running down.

        paired: in bfloat16, pairs of k. In torch's layout these are next to each other: one number in the size of a float32.
        """
        w_size, end = 2 if p.half else size, end_unit(p, panel)
        for j in range(per_panel):
            unit = first_unit(p, panel, panel_units) + j * lanes
            for g in range(gates):
                source, units = w + (order[g] * p.hidden_size + unit) * depth * w_size, end - unit
                column = out + (g * per_panel + j) * vector
                if p.tiles:
                    tile = out + (g * per_panel + j) * TILE_BYTES
                    for k in range(0, depth, TILE_DEPTH):
                        pack_columns_block(source + k * w_size, depth * w_size, units, min(TILE_DEPTH, depth - k), tile)
                        tile += columns * TILE_BYTES
                elif paired:
                    pack_columns(source, depth * 2, units, depth // 2, column, columns * vector)
                else:
                    pack_rows_of(p, source, units, depth, column, columns * vector)

    @njit(**options)
    def dot_gates(p, count, a_rows, w, depth, order, unit0, end, sums, buffer):
        """What the product with a panel of pack_gates gives, but for rounding, from the matrix where it lies: of units from
        unit0 on, in a head that ends at `end`."""
        w_size = 2 if p.half else size
        for j in range(per_panel):
            unit = unit0 + j * lanes
            for g in range(gates):
                rows = w + (order[g] * p.hidden_size + unit) * depth * w_size
                out = sums + (g * per_panel + j) * vector
                if p.half:
                    dot_rows_half(count, a_rows, rows, end - unit, depth, out, columns * vector, buffer)
                else:
                    dot_rows(count, a_rows, rows, end - unit, depth, out, columns * vector, buffer)

    @njit(**options)
    def sum_biases(p, panel, bias_gate):
        """Both biases of each pre-activation of a panel's units, summed, and the cell's own weights."""
        for j in range(per_panel):
            unit = first_unit(p, panel, panel_units) + j * lanes
            n = end_unit(p, panel) - unit
            for s in range(preactivations):
                total = zero()
                if p.bias and n > 0:
                    if s < gates:
                        total = total + load(p.b_ih + (input_order[s] * p.hidden_size + unit) * size, n)
                    if s >= hidden:
                        total = total + load(p.b_hh + ((s - hidden) * p.hidden_size + unit) * size, n)
                store(p.bias_sums + s * bias_gate + unit * size, total, n)
            for s in range(weights):
                value = load(p.b_ih + ((gates + s) * p.hidden_size + unit) * size, n)
                store(p.bias_sums + (preactivations + s) * bias_gate + unit * size, value, n)

    @njit(**options)
    def pack_weights(p, member, members, bias_gate):
        """This member's share of the panels that are packed once for all, and of the biases."""
        panels = p.heads * p.head_panels
        for panel in range(share(panels, members, member), share(panels, members, member + 1)):
            if not p.ih_once:
                out = p.ih_panels + panel * p.ih_depth * columns * vector
                pack_gates(p, p.w_ih, p.input_size, input_order, panel, 0, out)
            if not p.one_step:
                out = p.hh_panels + panel * p.hh_depth * columns * vector
                pack_gates(p, p.w_hh, head_depth(p), hidden_order, panel, p.half_panels, out)
            sum_biases(p, panel, bias_gate)
        if p.projected:
            outputs = ceil_div(p.output_size, lanes * wide)
            for panel in range(share(outputs, members, member), share(outputs, members, member + 1)):
                for j in range(wide):
                    unit = (panel * wide + j) * lanes
                    out = p.hr_panels + (panel * p.hidden_size * wide + j) * vector
                    source = p.w_hr + unit * p.hidden_size * (2 if p.half else size)
                    pack_rows_of(p, source, max(0, p.output_size - unit), p.hidden_size, out, wide * vector)

    @njit(**options)
    def pack_alone(p):
        """All of a direction's panels, by one thread."""
        pack_weights(p, 0, 1, p.heads * p.head_panels * per_panel * vector)

    @njit(**options)
    def bring_near(count, rows, parts, part_bytes, unit):
        """Prefetch a panel's units, from `unit` on, in each part of `count` rows, whose addresses are at `rows`."""
        for m in range(count):
            row = load_int(rows + 8 * m) + unit * size
            for part in range(parts):
                for j in range(per_panel):
                    prefetch(row + part * part_bytes + j * vector)

    @njit(**options)
    def wanted_columns(units):
        """Count the columns of a panel that stand for units, of which so many are left: of a cell of one gate, a head's last
        panel may have others."""
        return min(columns, ceil_div(units, lanes)) if gates == 1 else columns

    @njit(**options)
    def project(p, count, x_rows, z_rows, z_gate, first, last, bias_gate, scratch, own_panel):
        """Input product and biases of `count` rows, for the units of panels first .. last-1."""
        panel_bytes, blocks, parts = p.ih_depth * columns * vector, tile_blocks(p.input_size), 1
        own_rows = own_panel + p.panel_bytes
        if p.tiles:
            parts = parts_of(count, x_rows, p.input_size)  # of a layer in bfloat16, one: its input is exact
            split(count, x_rows, p.input_size, parts, own_rows)
        for panel in range(first, last):
            unit0, end = first_unit(p, panel, panel_units), end_unit(p, panel)
            weights, following = p.ih_panels + panel * panel_bytes, p.ih_panels + min(panel + 1, last - 1) * panel_bytes
            if p.ih_once and not p.one_step:
                weights = following = own_panel
                pack_gates(p, p.w_ih, p.input_size, input_order, panel, 0, weights)
            i = 0
            while i < count:
                rows = min(count - i, 2 * TILE_ROWS if p.tiles else ROW_BLOCK)
                bring_near(rows, z_rows + 8 * i, gates, z_gate, unit0)  # what is written would else be waited for
                if p.one_step:
                    dot_gates(p, rows, x_rows + 8 * i, p.w_ih, p.input_size, input_order, unit0, end, scratch, own_panel)
                elif p.tiles and parts == 1:
                    exact_product(rows, rows_at(own_rows, i, blocks, 1), weights, blocks, scratch)
                elif p.tiles:
                    tile_product(rows, rows_at(own_rows, i, blocks, PARTS), weights, blocks, scratch)
                else:
                    product(
                        rows, x_rows + 8 * i, size, weights, 0, 1, wanted_columns(end - unit0), columns * vector, p.input_size,
                        scratch, following, 0,
                    )  # fmt: skip
                for m in range(rows):
                    z = load_int(z_rows + 8 * (i + m))
                    for j in range(per_panel):
                        unit = unit0 + j * lanes
                        if unit < end:
                            for g in range(gates):
                                value = load_all(scratch + ((m * gates + g) * per_panel + j) * vector)
                                value = value + load_all(p.bias_sums + g * bias_gate + unit * size)
                                store(z + g * z_gate + unit * size, value, end - unit)
                i += rows

    @njit(**options)
    def vector_at(q, i, count, unit, scratch):
        """Row, first unit and sums of vector q: of rows from i on in the panel whose units begin at `unit`, or of a row alone
        in those from there on."""
        group, j = q // per_panel, q % per_panel
        m, unit = (i, unit + group * panel_units) if count == 1 else (i + group, unit)
        return m, unit + j * lanes, scratch + (group * columns + j) * vector

    def keeper(count):
        """Pre-activations hidden .. count-1 of a vector of units, to where those of the input alone are, behind these."""
        if count == hidden:
            return njit(lambda z, z_gate, sums, n: None, **options)
        before, s = keeper(count - 1), count - 1

        @njit(**options)
        def keep_all(z, z_gate, sums, n):
            before(z, z_gate, sums, n)
            value = load_all(sums + (s - hidden) * per_panel * vector)
            if s < gates:
                value = value + load(z + s * z_gate, n)
            store(z + s * z_gate, value, n)

        return keep_all

    keep_preactivations = keeper(preactivations)

    @njit(**options)
    def arguments(p, m, unit, head, sums, previous, z_rows, z_gate, c_rows, noise_rows, bias_gate):
        """What the cell is given for a vector of units of row m, in the head whose first unit is `head`."""
        n, at, stride = head + p.head_units - unit, unit * size, p.hidden_size * size
        a = preactivations_of(load_int(z_rows + 8 * m) + at, z_gate, sums, p.bias_sums + at, bias_gate, n)
        h = load_int(previous + 8 * m) + at - head * size
        before = read_states(h, load_int(c_rows + 8 * m) + at, stride, n)
        given = read_weights(p.bias_sums + at, bias_gate, n) + read_noise(load_int(noise_rows + 8 * m) + at, stride, n)
        return a + before + given

    @njit(**options)
    def keep(p, m, unit, end, result, z_rows, h_rows, c_rows):
        """The new states, and what backward needs, of a vector of units of row m, in a head that ends at `end`."""
        n, at, gate_stride = end - unit, unit * size, p.hidden_size * size
        write_states(load_int(c_rows + 8 * m) + at, gate_stride, result, n)
        if p.save:
            write_slots(load_int(z_rows + 8 * m) + at, gate_stride, result, n)
        store(load_int(h_rows + 8 * m) + at, result[0], n)

    @njit(**options)
    def step(
        p, turn, count, previous, entering, z_rows, z_gate, h_rows, c_rows, noise_rows, head, first, last, bias_gate, scratch,
        own_panel
    ):  # fmt: skip
        """A step of `count` rows, for the units of a head's own panels first .. last-1: product, gate maths, new state.

        turn: from the first panel to the last if even, or back. previous: addresses of the head's states. entering: of these as
        they enter the product, which is the same but for a mask.
        """
        head_unit, depth = head * p.head_units, head_depth(p)
        panel_bytes, blocks = p.hh_depth * columns * vector, tile_blocks(depth)
        end, own_panels = head_unit + p.head_units, p.hh_panels + head * p.head_panels * panel_bytes
        own_rows = own_panel + p.panel_bytes
        if p.tiles:
            split(count, entering, depth, PARTS, own_rows)
        together = alone if count == 1 else 1
        groups = ceil_div(last - first, together)
        for index in range(groups):
            panel = first + there_and_back(turn, 0, groups, index) * together
            next_panel = first + there_and_back(turn, 0, groups, min(index + 1, groups - 1)) * together
            panels = min(together, last - panel)
            weights, following = own_panels + panel * panel_bytes, own_panels + next_panel * panel_bytes
            unit0 = head_unit + panel * panel_units
            wanted = wanted_columns(end - unit0 - (panels - 1) * panel_units)
            i = 0
            while i < count:
                rows = min(count - i, 2 * TILE_ROWS if p.tiles else ROW_BLOCK)
                for q in range(panels):
                    bring_near(rows, z_rows + 8 * i, max(gates, slots * p.save), z_gate, unit0 + q * panel_units)
                    bring_near(rows, h_rows + 8 * i, 1, 0, unit0 + q * panel_units)
                if p.one_step:
                    for q in range(panels):
                        sums, unit = scratch + q * columns * vector, unit0 + q * panel_units
                        dot_gates(p, rows, entering + 8 * i, p.w_hh, depth, hidden_order, unit, end, sums, own_panel)
                elif p.tiles:
                    for q in range(panels):
                        sums = scratch + q * columns * vector
                        own = rows_at(own_rows, i, blocks, PARTS)
                        tile_product(rows, own, weights + q * panel_bytes, blocks, sums)
                elif p.half_panels:
                    product_half(
                        rows, entering + 8 * i, size, weights, panel_bytes, panels, wanted,
                        columns * vector, depth, scratch, following, 0,
                    )  # fmt: skip
                else:
                    product(
                        rows, entering + 8 * i, size, weights, panel_bytes, panels, wanted,
                        columns * vector, depth, scratch, following, 0,
                    )  # fmt: skip
                vectors = panels * rows * per_panel
                if reduces:
                    for q in range(vectors):
                        m, unit, sums = vector_at(q, i, count, unit0, scratch)
                        if unit < end:
                            keep_preactivations(load_int(z_rows + 8 * m) + unit * size, z_gate, sums, end - unit)
                else:
                    for q in range(0, vectors, 2):
                        m, unit, sums = vector_at(q, i, count, unit0, scratch)
                        if unit >= end:
                            continue
                        a = arguments(p, m, unit, head_unit, sums, previous, z_rows, z_gate, c_rows, noise_rows, bias_gate)
                        if q + 1 < vectors:
                            other, unit_too, sums = vector_at(q + 1, i, count, unit0, scratch)
                            b = arguments(
                                p, other, unit_too, head_unit, sums, previous, z_rows, z_gate, c_rows, noise_rows, bias_gate
                            )  # fmt: skip
                            result, b_result = apply_twice(a, b)
                            keep(p, other, unit_too, end, b_result, z_rows, h_rows, c_rows)
                        else:
                            result = apply(a)
                        keep(p, m, unit, end, result, z_rows, h_rows, c_rows)
                i += rows

    @njit(**options)
    def shift_heads(p, count, previous, entering, heads):
        """Move `count` addresses of states at `previous`, and at `entering` where these are others, so many heads on."""
        shift_rows(previous, count, heads * p.head_units * size)
        if p.mask:
            shift_rows(entering, count, heads * p.head_units * size)

    # What a cell with reductions does with whole rows after the product, see stages.py.

    read_preactivations, write_after = reader(tuple(range(preactivations))), writer(range(states), range(1, 1 + states))
    write_last_slots = writer(range(slots - states, slots), range(1, 1 + states))

    @njit(**options)
    def stage_arguments(context, i, unit, n):
        """What the cell is given for a vector of units of row i."""
        p, _, previous, z_rows, _, c_rows, noise_rows, bias_gate = context
        at, stride = unit * size, p.hidden_size * size
        a = read_preactivations(load_int(z_rows + 8 * i) + at, stride, n)
        before = read_states(load_int(previous + 8 * i) + at, load_int(c_rows + 8 * i) + at, stride, n)
        given = read_weights(p.bias_sums + at, bias_gate, n) + read_noise(load_int(noise_rows + 8 * i) + at, stride, n)
        return a + before + given

    @njit(**options)
    def stage_results(context, i, unit, n, results):
        """The output and the new states of a vector of units of row i."""
        p, _, _, z_rows, h_rows, c_rows, _, _ = context
        at, stride = unit * size, p.hidden_size * size
        write_after(load_int(c_rows + 8 * i) + at, stride, results, n)
        if p.save:
            write_last_slots(load_int(z_rows + 8 * i) + at, stride, results, n)
        store(load_int(h_rows + 8 * i) + at, results[0], n)

    stages = cell.derived.forward_stages if reduces else ()
    carried_bytes, reduced_bytes = carried_values(stages) * size, row_values(stages) * vector
    kept_row = njit(lambda context, i: load_int(context[3] + 8 * i), **options)
    meet = njit(lambda context: wait_rows(context[0], context[1]), **options)
    places = {name: place for place, (name, _) in enumerate(cell.derived.kept)}
    run_stages = make_stages(stages, places, 0, v, target, (stage_arguments, stage_results, kept_row, meet))

    @njit(**options)
    def finish_rows(context, r0, count, unit0, unit1, reduced):
        """All that follows the product of `count` rows from r0 on, for units unit0 .. unit1-1."""
        p, member = context[0], context[1]
        wait_rows(p, member)  # the pre-activations of whole rows are there
        row_bytes, end = carried_bytes * p.hidden_size, min(unit1, p.hidden_size)
        carried, alone = p.carried + r0 * row_bytes, p.unit_groups == 1
        between = carried, reduced, 0 if alone else row_bytes, 0 if alone else reduced_bytes
        together = 1 if alone else max(1, count)
        for i in range(0, count, together):
            run_stages(context, (i, min(count, i + together)), (unit0, end, p.hidden_size), between)

    @njit(**options)
    def copy_units(source, destination, first, last, n):
        for unit in range(first, min(last, n), lanes):
            store(destination + unit * size, load(source + unit * size, min(n, last) - unit), min(n, last) - unit)

    @njit(**options)
    def enter(p, count, r0, previous, masked_rows, masked, first, last):
        """Multiply units first .. last-1 of `count` rows of h with their mask, at `masked`, and note where each row is."""
        row_bytes = p.output_size * size
        for i in range(count):
            source, mask, row = load_int(previous + 8 * i), p.mask + row_at(p, r0 + i) * row_bytes, masked + i * row_bytes
            store_int(masked_rows + 8 * i, row)
            for unit in range(first, last, lanes):
                n, at = last - unit, unit * size
                store(row + at, load(source + at, n) * load(mask + at, n), n)

    @njit(**options)
    def begin_states(p, b, initial, unit0, unit1):
        """Set the states of row b, but for the hidden one, to those of the batch at `initial`, for units unit0 .. unit1-1."""
        state_bytes = p.hidden_size * size
        for s in range(row_at(p, b) * states, (row_at(p, b) + 1) * states):
            copy_units(initial + s * state_bytes, p.c_n + s * state_bytes, unit0, unit1, p.hidden_size)

    @njit(**options)
    def clear_outputs(p, t, r0, r1, first, last):
        """Zeros in outputs first .. last-1 of rows r0 .. r1-1 that step t is past the lengths of."""
        for b in range(max(r0, active_rows(p, t) if t < p.steps else 0), r1):
            row = p.y + t * p.y_step + row_at(p, b) * p.y_row
            for unit in range(first, last, lanes):
                store(row + unit * size, zero(), last - unit)

    @njit(**options)
    def run_block(p, member, block, begins):
        """A block of steps of one direction or layer; nothing but what comes before all blocks if begins and block < 0."""
        unit_group = member % p.unit_groups
        hidden_bytes, output_bytes = p.hidden_size * size, p.output_size * size
        panels = p.heads * p.head_panels
        first, last = share(panels, p.unit_groups, unit_group), share(panels, p.unit_groups, unit_group + 1)
        bias_gate = panels * per_panel * vector
        heads = head_of(p, first), head_of(p, last - 1) + 1
        outputs = ceil_div(p.output_size, lanes * wide)
        first_out, last_out = share(outputs, p.unit_groups, unit_group), share(outputs, p.unit_groups, unit_group + 1)
        unit0, unit1 = first_unit(p, first, panel_units), first_unit(p, last, panel_units)

        # This thread's own memory: scratch tiles, a panel packed to be used once, tables of row addresses.
        scratch = p.own + member * p.own_bytes
        own_panel = scratch + sums_bytes
        previous = own_panel + p.panel_bytes + p.own_block
        y_rows = previous + 8 * p.batch
        h_rows = y_rows + 8 * p.batch if p.projected else y_rows
        c_rows = h_rows + 8 * p.batch
        x_rows = c_rows + 8 * p.batch
        z_rows = x_rows + 8 * p.block_steps * p.batch
        own_rows = z_rows + 8 * p.block_steps * p.batch  # this thread's
        masked_rows = own_rows + 16
        masked = masked_rows + 8 * p.batch
        noise_rows = masked + p.batch * output_bytes * (p.mask != 0) if noise or reduces else previous
        reduced = noise_rows + 8 * p.batch * (noise > 0)
        own, owns = p.output_size * unit_group // p.unit_groups, p.output_size * (unit_group + 1) // p.unit_groups

        if begins:
            r0, r1 = split_row(p, member // p.unit_groups), split_row(p, member // p.unit_groups + 1)
            store_int(own_rows, r0)
            store_int(own_rows + 8, r1)
            if not p.pack:
                pack_weights(p, member, p.row_groups * p.unit_groups, bias_gate)
            fill_step(p, previous, r0, r1 - r0, p.h0, output_bytes)
            fill_step(p, c_rows, r0, r1 - r0, p.c_n, states * hidden_bytes)
            for b in range(r0, r1):
                begin_states(p, b, p.c0, unit0, unit1)
            for t in range(p.steps, p.padded_steps):
                clear_outputs(p, t, r0, r1, own, owns)
            wait_crew(p, member)
            if block < 0:
                return
        r0, r1 = load_int(own_rows), load_int(own_rows + 8)

        # Pre-activations live where what is kept goes afterwards: saved, or y for a cell without slots, or a block's buffer.
        in_saved = p.save and slots > 0
        saved_row = (slots + p.projected) * hidden_bytes
        s = block * p.block_steps
        end = min(p.steps, s + p.block_steps)
        n = 0
        for k in range(s, end):
            t = p.steps - 1 - k if p.reverse else k
            count, z = max(0, min(r1, active_rows(p, t)) - r0), z_rows + 8 * n
            fill_step(p, x_rows + 8 * n, r0, count, p.x + step_base(p, t) * p.x_step, p.x_row)
            if slots == 0:
                fill_step(p, z, r0, count, p.y + step_base(p, t) * p.y_step, p.y_row)
            elif in_saved:
                fill_step(p, z, r0, count, p.saved + kept_base(p, t) * saved_row, saved_row)
            else:
                row_bytes = room * hidden_bytes
                fill_rows(z, count, p.shared + ((k - s) * p.batch + r0) * row_bytes, row_bytes)
            n += count
        for i in range(0, n, p.split_rows):
            rows, x, z = min(n - i, p.split_rows), x_rows + 8 * i, z_rows + 8 * i
            project(p, rows, x, z, hidden_bytes, first, last, bias_gate, scratch, own_panel)

        n = 0
        for k in range(s, end):
            t = p.steps - 1 - k if p.reverse else k
            count = max(0, min(r1, active_rows(p, t)) - r0)
            fill_step(p, y_rows, r0, count, p.y + step_base(p, t) * p.y_step, p.y_row)
            if p.projected and p.save:
                fill_step(p, h_rows, r0, count, p.saved + kept_base(p, t) * saved_row + slots * hidden_bytes, saved_row)
            elif p.projected:
                fill_rows(h_rows, count, p.tails + r0 * hidden_bytes, hidden_bytes)
            for i in range(count if p.resets else 0):
                if begins_anew(p, t, r0 + i):
                    store_int(previous + 8 * i, p.h_reset + row_at(p, r0 + i) * output_bytes)
                    begin_states(p, r0 + i, p.c_reset, unit0, unit1)
            if noise:
                fill_step(p, noise_rows, r0, count, p.noise + step_base(p, t) * p.noise_step, p.noise_row)
            if p.order:  # here memory has time to take it
                clear_outputs(p, t, r0, r1, own, owns)
            entering = previous
            if p.mask:
                # of the heads whose units are this thread's: nobody waits for those of others
                low, high = (heads[0] * p.head_units, heads[1] * p.head_units) if p.heads > 1 else (0, p.output_size)
                enter(p, count, r0, previous, masked_rows, masked, low, high)
                entering = masked_rows
            i, turn = 0, k  # each block of rows begins with the panels that the one before ended with
            while i < count:
                rows, at, z = min(count - i, p.split_rows), 8 * i, z_rows + 8 * (n + i)
                before, inside = previous + at, entering + at
                for head in range(*heads):
                    if head > 0:
                        shift_heads(p, rows, before, inside, head)
                    low, high = max(0, first - head * p.head_panels), min(last - head * p.head_panels, p.head_panels)
                    step(
                        p, turn, rows, before, inside, z, hidden_bytes, h_rows + at, c_rows + at, noise_rows + at, head, low,
                        high, bias_gate, scratch, own_panel,
                    )  # fmt: skip
                    if head > 0:
                        shift_heads(p, rows, before, inside, -head)
                i += rows
                turn += 1
            if reduces:
                context = p, member, previous, z_rows + 8 * n, h_rows, c_rows, noise_rows, bias_gate
                finish_rows(context, r0, count, unit0, unit1, reduced)
            if p.projected:
                wait(p, member)
                panel_row = wide * vector
                multiply(
                    count, h_rows, size, p.hr_panels, p.hidden_size * panel_row, panel_row, p.hidden_size, p.output_size,
                    first_out, last_out, y_rows, 0, scratch,
                )  # fmt: skip
            wait(p, member)
            for i in range(count):
                store_int(previous + 8 * i, load_int(y_rows + 8 * i))
            n += count

        if end == p.steps:
            for b in range(r0, r1):
                copy_units(load_int(previous + 8 * (b - r0)), p.h_n + row_at(p, b) * output_bytes, own, owns, p.output_size)

    @njit(**options)
    def forward(records, rank):
        p = record_at(records)
        if p.pack_only:
            for direction in range(p.directions):
                pack_alone(record_at(records + direction * RECORD_BYTES))
            return
        # Directions run at once or one after the other, layers each a block of steps behind the one below.
        crew, member = rank // p.crew_threads, rank % p.crew_threads
        count, blocks = max(p.directions, p.layers), ceil_div(p.steps, p.block_steps)
        behind = 1 if p.layers > 1 else 0 if p.crews > 1 else blocks
        waves = blocks + (count - 1) * behind
        if p.tiles:
            configure()
        for wave in range(waves):
            for index in range(crew, count if crew < p.crews else 0, p.crews):
                own, block = record_at(records + index * RECORD_BYTES), wave - index * behind
                begins = wave == 0 if p.layers > 1 else block == 0
                if member < own.row_groups * own.unit_groups and block < blocks and (begins or block >= 0):
                    run_block(own, member, block, begins)
            if behind > 0 and (wave + 1) % behind == 0 and wave + 1 < waves:
                wait_team(p, rank)
        if p.tiles:
            release()

    return forward
