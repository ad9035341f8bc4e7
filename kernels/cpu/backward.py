"""A layer backward: gradients of the gates carried back through time, and every other gradient from them, block by block.

The product that brings a step's gate gradients to the step before ends in the cell's vector-Jacobian product, as forward's
ends in the gate maths. Gate gradients of one block of steps are held at a time; from them come the block's share of the
weights' and biases' gradients, in a fixed order of summation, and its rows of dx.
"""

from __future__ import annotations

import functools
from functools import cache

from numba import njit

from ..cells import Cell
from .elementary import make_reader, make_writer, over_vectors
from .plan import BACKWARD_PARTS as PARTS
from .plan import (
    FEW_ROWS,
    LINE,
    OPERAND_BYTES,
    PANEL_DEPTH,
    PLACES,
    ROW_BLOCK,
    TILE_BYTES,
    TILE_DEPTH,
    TILE_ROWS,
    TILE_UNITS,
    UNIT_BLOCK,
    scratch_bytes,
    wide_columns,
)
from .processor import Target
from .product import (
    ceil_div,
    fill_rows,
    make_multiply,
    make_pack_rows,
    make_product,
    options,
    panels_together,
    shift_rows,
    tile_rows,
)
from .stages import carried_values, make_stages, row_values
from .team import (
    RECORD_BYTES,
    active_rows,
    begins_anew,
    fill_step,
    first_row,
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
    make_pack_rows_block,
    make_parts_of,
    make_release,
    make_split,
    make_split_columns,
    make_tile_multiply,
    make_tile_product,
    rows_at,
    tile_blocks,
)
from .vector import VectorLibrary, load_int, prefetch, prefetch_far, store_int

ROWS_AHEAD = 8  # of the one that is copied: no processor expects so long strides
BIAS_CHAIN = 64  # rows summed into one register before the next sum begins
# Tables that a step looks up: for each row the addresses of dy, of what forward kept, of the output, of h and the other states
# before the step, of its noise, of the gradients of these states that are carried past the gates, and of what the gradients of
# the cell's own weights sum up to.
OF_DY, OF_KEPT, OF_OUTPUT, OF_HIDDEN, OF_CARRIED, OF_NOISE, OF_D_HIDDEN, OF_D_CARRIED, OF_OWN_SUMS = range(PLACES)


@cache
def make_backward(cell: Cell, v: VectorLibrary, target: Target):
    """backward(records, rank): the share of thread `rank` in one call; records is the address of one record a direction."""
    size, lanes, vector = v.size, v.lanes, v.lanes * v.size
    load, store, load_all, store_all, zero = v.load, v.store, v.load_all, v.store_all, v.zero
    multiply_add = v.multiply_add
    gates, hidden, slots, preactivations = cell.gates, cell.hidden, cell.slots, cell.preactivations
    kept_values, states, weights, reads_output = cell.kept, cell.states, cell.weights, cell.derived.reads_output
    names = tuple(name for name, _ in cell.derived.before)
    columns = wide_columns(target.registers)
    sums_bytes = scratch_bytes(columns * vector)
    wide, panel_row, most = columns * lanes, columns * vector, tile_rows(target, columns)
    (group, alone), operand_panels = panels_together(v, columns), OPERAND_BYTES // panel_row
    product = make_product(v, target, columns)
    multiply = make_multiply(v, target, columns)
    pack_rows = make_pack_rows(v, columns)
    # The same for matrices in bfloat16; in float64 there are none.
    has_half = v.half is not None
    multiply_half = make_multiply(v, target, columns, "rows" if has_half else "")
    pack_rows_half = make_pack_rows(v, columns, has_half)
    store_half = v.half.store if has_half else v.store
    tools = functools.partial(for_tiles, v, target)
    configure, release, parts_of = tools(make_configure, target), tools(make_release, target), tools(make_parts_of, v, PARTS)
    split, split_columns, pack_rows_block = (tools(make, v) for make in (make_split, make_split_columns, make_pack_rows_block))
    tile_product = tools(make_tile_product, v, target, columns, PARTS)
    tile_multiply = tools(make_tile_multiply, v, target, columns, PARTS)
    tile_multiply_both_apart = tools(make_tile_multiply, v, target, columns, PARTS, PARTS)
    input_order, hidden_order = cell.input, tuple(range(gates))
    reads_hidden = cell.reads_hidden
    stopped = cell.stopped
    differentiate, differentiate_twice = over_vectors(cell.derived.backward, v, target)
    reduces, stages = cell.reduces, cell.derived.backward_stages if cell.reduces else ()
    wait = wait_rows if reduces else wait_group  # a row's reductions are over all heads
    # of a row in p.carried: the gradient of the output, and what goes from one stage to the next
    carried_bytes, reduced_bytes = (1 + carried_values(stages)) * size, row_values(stages) * vector
    reader, writer = make_reader(v), make_writer(v)

    read_slots = reader((*range(kept_values), *range(slots - states, slots)))
    read_output, read_weights = reader((0,) * reads_output), reader(tuple(range(gates, gates + weights)))
    noise = cell.noise
    read_noise = reader(tuple(range(noise)))
    read_states, read_carried = reader(tuple(range(states))), reader(tuple(range(states)))
    # results: gradients of pre-activations, of states before the step, of the cell's own weights
    of_states = [preactivations + names.index(name) for name in names if name != "h"]
    of_hidden = preactivations + (names.index("h") if reads_hidden else 0)
    of_weights = range(preactivations + len(names), preactivations + len(names) + weights)
    write_gradients = writer(range(preactivations), range(preactivations))
    write_carried, add_own = writer(range(len(of_states)), of_states), writer(range(weights), of_weights, add=True)

    def before_reader(names):
        """States before a step in the cell's order, of the hidden one and a tuple of the others."""
        if not names:
            return njit(lambda h, others: (), **options)
        before, is_h, s = before_reader(names[:-1]), names[-1] == "h", len([name for name in names[:-1] if name != "h"])
        if is_h:
            return njit(lambda h, others: before(h, others) + h, **options)
        return njit(lambda h, others: before(h, others) + (others[s],), **options)

    in_order, read_hidden = before_reader(names), reader((0,) * reads_hidden)

    @njit(**options)
    def pitch(p):
        """Bytes from one row of gate gradients to the next: a line more, so that columns do not share a cache set."""
        return ceil_div(preactivations * p.hidden_size * size, LINE) * LINE + LINE

    @njit(**options)
    def weight_size(p):
        return 2 if p.half else size

    @njit(**options)
    def pack_weight(p, weight_rows, depth, width, panel, out):
        if p.half:
            pack_rows_half(weight_rows, depth, width, panel, out)
        else:
            pack_rows(weight_rows, depth, width, panel, out)

    @njit(**options)
    def pack_panel_block(rows, block, depth, width, panel, half, parts, out):
        """A block of panel `panel` of the matrix whose `depth` rows, `width` wide, have addresses `rows`, as tiles."""
        k = block * TILE_DEPTH
        for j in range(columns):
            column, tiles = (panel * columns + j) * lanes, out + j * parts * TILE_BYTES
            pack_rows_block(rows + 8 * k, column, min(TILE_DEPTH, depth - k), width, half, parts, tiles)

    @njit(**options)
    def pack_tiles(rows, depth, width, panel, out):
        """All of such a panel, of a matrix in bfloat16."""
        for block in range(tile_blocks(depth)):
            pack_panel_block(rows, block, depth, width, panel, 1, 1, out + block * columns * TILE_BYTES)

    @njit(**options)
    def fill_input_rows(p, table):
        """Addresses of the rows of W_ih, in the order in which gradients of the input pre-activations are kept."""
        row_bytes = p.input_size * weight_size(p)
        for s in range(gates):
            row = p.w_ih + input_order[s] * p.hidden_size * row_bytes
            fill_rows(table + 8 * s * p.hidden_size, p.hidden_size, row, row_bytes)

    @njit(**options)
    def parts_of_head(p):
        """(parts, length): the rows of W_hh that a head's product meets are so many parts of that length, H rows apart."""
        return (gates, p.head_units) if p.heads > 1 else (1, gates * p.hidden_size)

    @njit(**options)
    def fill_hidden_rows(p, head, table):
        """Addresses of these rows."""
        (parts, length), row_bytes = parts_of_head(p), head_depth(p) * weight_size(p)
        for part in range(parts):
            row = p.w_hh + (part * p.hidden_size + head * p.head_units) * row_bytes
            fill_rows(table + 8 * part * length, length, row, row_bytes)

    @njit(**options)
    def pack_weights(p, member, members, table):
        """This member's share of the panels that every step needs, of W_hh and W_hr: their rows are the k of the product.

        In tiles, those of W_ih too.
        """
        depth = gates * p.hidden_size
        if not p.one_step:
            panels, width = p.heads * p.head_panels, head_depth(p)
            first, last = share(panels, members, member), share(panels, members, member + 1)
            for panel in range(first, last):
                head = head_of(p, panel)
                own = panel - head * p.head_panels
                if panel == first or own == 0:
                    fill_hidden_rows(p, head, table)
                out = p.hh_panels + panel * p.hh_depth * panel_row
                if p.tiles:
                    pack_tiles(table, depth, width, own, out)
                else:
                    pack_weight(p, table, depth // p.heads, width, own, out)
        if not p.ih_once:
            fill_input_rows(p, table)
            panels = ceil_div(p.input_size, wide)
            for panel in range(share(panels, members, member), share(panels, members, member + 1)):
                out = p.ih_panels + panel * p.ih_depth * panel_row
                pack_tiles(table, depth, p.input_size, panel, out)
        if p.projected:
            fill_rows(table, p.output_size, p.w_hr, p.hidden_size * weight_size(p))
            panels = ceil_div(p.hidden_size, wide)
            for panel in range(share(panels, members, member), share(panels, members, member + 1)):
                out = p.hr_panels + panel * p.output_size * wide * size
                pack_weight(p, table, p.output_size, p.hidden_size, panel, out)

    @njit(**options)
    def earlier(p, t, r0, count):
        """(step, rows): which step came before step t, and how many of `count` rows from r0 on have it. It is any where none
        has: the others' states before step t were the initial ones."""
        step = t + 1 if p.reverse else t - 1
        if step < 0 or step == p.steps:
            return t, 0
        return step, max(0, min(count, active_rows(p, step) - r0))

    @njit(**options)
    def fill_before(p, t, r0, count, table, first, stride, initial, at_reset, initial_stride):
        """Addresses of a state of rows r0 .. r0+count-1 before step t: the batch's rows have it `stride` apart from `first` on
        in the step before, and initial_stride apart from `initial` on where none came before, from `at_reset` on at resets."""
        _, going_on = earlier(p, t, r0, count)
        fill_step(p, table, r0, going_on, first, stride)
        fill_step(p, table + 8 * going_on, r0 + going_on, count - going_on, initial, initial_stride)
        for i in range(count if p.resets else 0):
            if begins_anew(p, t, r0 + i):
                store_int(table + 8 * i, at_reset + row_at(p, r0 + i) * initial_stride)

    @njit(**options)
    def fill_hidden_before(p, t, r0, count, table):
        """Addresses of the hidden states that step t of these rows read."""
        before, _ = earlier(p, t, r0, count)
        first = p.y + step_base(p, before) * p.y_step
        fill_before(p, t, r0, count, table, first, p.y_row, p.h0, p.h_reset, p.output_size * size)

    @njit(**options)
    def fill_places(p, t, r0, count, saved_row, places):
        """The tables of what step t of rows r0 .. r0+count-1 reads, as far as the cell has it."""
        table, base, unit_bytes = 8 * p.batch, step_base(p, t), p.hidden_size * size
        fill_step(p, places + OF_DY * table, r0, count, p.dy + base * p.dy_step, p.dy_row)
        if kept_values + states > 0:
            fill_step(p, places + OF_KEPT * table, r0, count, p.saved + kept_base(p, t) * saved_row, saved_row)
        if reads_output:
            fill_step(p, places + OF_OUTPUT * table, r0, count, p.y + base * p.y_step, p.y_row)
        if reads_hidden:
            fill_hidden_before(p, t, r0, count, places + OF_HIDDEN * table)
        if states > 0:
            before, _ = earlier(p, t, r0, count)
            first = p.saved + kept_base(p, before) * saved_row + (slots - states) * unit_bytes
            carried_before = places + OF_CARRIED * table
            fill_before(p, t, r0, count, carried_before, first, saved_row, p.c0, p.c_reset, states * unit_bytes)
        if noise:
            fill_step(p, places + OF_NOISE * table, r0, count, p.noise + base * p.noise_step, p.noise_row)

    @njit(**options)
    def mask_at(p, b):
        """Address of the mask of row b, or 0."""
        return p.mask + row_at(p, b) * p.output_size * size if p.mask else 0

    @njit(**options)
    def state_gradient(q, unit, n, sums, panel_sums, mask, dy, more):
        """What reaches vector q of a row, units from `unit` on: through the next step, from outside, and past the gates."""
        at = unit * size
        through = load_all(sums + q // columns * panel_sums + q % columns * vector)
        if mask:
            through = through * load(mask + at, n)
        return through + load(dy + at, n) + load(more + at, n)

    @njit(**options)
    def places_of(p, i, places):
        """The addresses in the tables of row i, but for that of dy."""
        row, table = places + 8 * i, 8 * p.batch
        kept, output = load_int(row + OF_KEPT * table), load_int(row + OF_OUTPUT * table)
        h, c = load_int(row + OF_HIDDEN * table), load_int(row + OF_CARRIED * table)
        dc, dh = load_int(row + OF_D_CARRIED * table), load_int(row + OF_D_HIDDEN * table)
        return kept, output, h, c, load_int(row + OF_NOISE * table), dc, dh, load_int(row + OF_OWN_SUMS * table)

    @njit(**options)
    def arguments(q, context):
        """What the cell's vector-Jacobian product is given for vector q of a row."""
        p, unit0, end, sums, panel_sums, mask, dy, more, _, places = context
        unit = unit0 + q * lanes
        dh = state_gradient(q, unit, end - unit, sums, panel_sums, mask, dy, more)
        return (dh,) + beside_output(p, places, unit, end - unit)

    @njit(**options)
    def beside_output(p, places, unit, n):
        """The same but for the gradient of the output, of a vector of units of a row."""
        kept_row_at, output_row, h_row, c_row, noise_row, dc_row, _, _ = places
        at, gate_stride = unit * size, p.hidden_size * size
        carried = read_carried(dc_row + at, gate_stride, n)
        kept = read_slots(kept_row_at + at, gate_stride, n)
        output = read_output(output_row + at, gate_stride, n)
        h = read_hidden(h_row + at, gate_stride, n)
        before = in_order(h, read_states(c_row + at, gate_stride, n))
        given = read_weights(p.b_ih + at, gate_stride, n) + read_noise(noise_row + at, gate_stride, n)
        return carried + kept + output + before + given

    @njit(**options)
    def keep(q, result, context):
        """Keep the gradients of vector q's pre-activations, and what is carried past them."""
        p, unit0, end, _, _, _, _, _, gradients, places = context
        unit = unit0 + q * lanes
        keep_units(p, places, gradients, unit, end - unit, result)

    @njit(**options)
    def keep_units(p, places, gradients, unit, n, result):
        """The same of a vector of units of a row."""
        (_, _, _, _, _, dc_row, dh_row, sums), at, gate_stride = places, unit * size, p.hidden_size * size
        write_gradients(gradients + at, gate_stride, result, n)
        add_own(sums + at, gate_stride, result, n)
        write_carried(dc_row + at, gate_stride, result, n)
        if reads_hidden:
            store(dh_row + at, result[of_hidden], n)

    @njit(**options)
    def expect(p, first, rows, unit, vectors, places):
        """Prefetch what the gates of units from `unit` on read of `rows` rows from row `first` of the tables on: it comes while
        their product is computed."""
        gate_stride, at = p.hidden_size * size, unit * size
        for i in range(first, first + rows):
            dy, (kept, output, h, carried, noise_row, _, _, _) = load_int(places + 8 * i), places_of(p, i, places)
            for j in range(at, at + vectors * vector, vector):
                prefetch_far(dy + j)
                for s in range(kept_values):  # states after this step are those before the step that was done last
                    prefetch_far(kept + s * gate_stride + j)
                if reads_output:
                    prefetch_far(output + j)
                for s in range(states):
                    prefetch_far(carried + s * gate_stride + j)
                if reads_hidden:
                    prefetch_far(h + j)
                for s in range(noise):
                    prefetch_far(noise_row + s * gate_stride + j)

    @njit(**options)
    def place_of_gradients(p, b, gates):
        """Where what `gate_gradients` finds of row b goes: to `gates`; with reductions it is the gradient of its output."""
        return p.carried + b * carried_bytes * p.hidden_size if reduces else gates

    @njit(**options)
    def output_gradients(vectors, context):
        """Keep the gradient of the output of that many vectors of a row, from unit0 on."""
        _, unit0, end, sums, panel_sums, mask, dy, more, row, _ = context
        for q in range(vectors):
            unit = unit0 + q * lanes
            dh = state_gradient(q, unit, end - unit, sums, panel_sums, mask, dy, more)
            store(row + unit * size, dh, end - unit)

    @njit(**options)
    def cell_gradients(vectors, context):
        """The cell's vector-Jacobian product for that many vectors of a row, from unit0 on, two at a time."""
        for q in range(0, vectors, 2):
            a = arguments(q, context)
            if q + 1 < vectors:
                result, other = differentiate_twice(a, arguments(q + 1, context))
                keep(q + 1, other, context)
            else:
                result = differentiate(a)
            keep(q, result, context)

    gate_gradients = output_gradients if reduces else cell_gradients

    # What a cell with reductions does with whole rows after the product, see stages.py.

    @njit(**options)
    def stage_arguments(context, i, unit, n):
        """What the cell's vector-Jacobian product is given for a vector of units of row i."""
        p, _, r0, places, _ = context
        row = p.carried + (r0 + i) * carried_bytes * p.hidden_size
        return (load(row + unit * size, n),) + beside_output(p, places_of(p, i, places), unit, n)

    @njit(**options)
    def stage_results(context, i, unit, n, results):
        """Keep the gradients of a vector of units of row i."""
        p, _, _, places, gradients = context
        keep_units(p, places_of(p, i, places), gradients + i * pitch(p), unit, n, results)

    kept_row = njit(lambda context, i: load_int(context[3] + 8 * (OF_KEPT * context[0].batch + i)), **options)
    meet = njit(lambda context: wait_rows(context[0], context[1]), **options)
    slot_of = {name: place for place, (name, _) in enumerate(cell.derived.kept)}
    slot_of |= {name: slots - states + place for place, (name, _) in enumerate(cell.derived.after)}
    run_stages = make_stages(stages, slot_of, 1, v, target, (stage_arguments, stage_results, kept_row, meet))

    @njit(**options)
    def finish_step(context, count, reduced):
        """All that follows the product of `count` rows, for this thread's units."""
        p, member, r0 = context[0], context[1], context[2]
        (unit0, unit1), row_bytes = own_units(p, member), carried_bytes * p.hidden_size
        carried, alone = p.carried + r0 * row_bytes, p.unit_groups == 1
        between = carried, reduced, 0 if alone else row_bytes, 0 if alone else reduced_bytes
        together = 1 if alone else max(1, count)
        for i in range(0, count, together):
            run_stages(context, (i, min(count, i + together)), (unit0, min(unit1, p.hidden_size), p.hidden_size), between)

    @njit(**options)
    def step(
        p, turn, base, r0, count, live, later, extra, gradients, projected_gradients, head, first, last, scratch, own_block,
        places
    ):  # fmt: skip
        """A step of rows r0 .. r0+count-1, of which `live` have a later step, in panels first .. last-1 of a head's own:
        later * W_hh + dy + extra is dh.

        turn: from the first panel to the last if even, or back. places: see `fill_places`.
        Without a projection the cell takes it from the tile.
        """
        parts, depth = parts_of_head(p)
        row_bytes, panel_bytes, blocks = pitch(p), p.hh_depth * panel_row, tile_blocks(depth)
        head_unit, own_panels = head * p.head_units, p.hh_panels + head * p.head_panels * panel_bytes
        end = head_unit + p.head_units
        together = group if count > most else alone if count == 1 else 1
        if p.tiles:
            split(min(count, max(0, live)), later, depth, PARTS, own_block)
        groups = ceil_div(last - first, together)
        for index in range(groups):
            panel = first + there_and_back(turn, 0, groups, index) * together
            next_panel = first + there_and_back(turn, 0, groups, min(index + 1, groups - 1)) * together
            panels = min(together, last - panel)
            unit0 = head_unit + panel * wide
            vectors = min(panels * columns, ceil_div(end - unit0, lanes))
            wanted = vectors - (panels - 1) * columns
            i = 0
            while i < count:
                rows = min(count - i, 2 * TILE_ROWS if p.tiles else ROW_BLOCK)
                going_on, weights = min(rows, max(0, live - i)), own_panels + panel * panel_bytes
                if rows > most and not p.projected:
                    expect(p, i, rows, unit0, panels * columns, places)
                if p.tiles:
                    tile_product(going_on, rows_at(own_block, i, blocks, PARTS), weights, blocks, scratch)
                for part in range(0 if p.tiles else parts):
                    own, following = weights + part * depth * panel_row, own_panels + next_panel * panel_bytes
                    if part + 1 < parts:
                        following = own + depth * panel_row
                    product(
                        going_on, later + 8 * i, size, own, panel_bytes, panels, wanted, panel_row, depth, scratch, following,
                        part,
                    )  # fmt: skip
                    if parts > 1:
                        by = p.hidden_size if part + 1 < parts else -part * p.hidden_size
                        shift_rows(later + 8 * i, going_on, by * size)
                for m in range(rows):
                    b = r0 + i + m
                    dy, more = load_int(places + 8 * (i + m)), load_int(extra + 8 * (i + m))
                    sums, panel_sums, mask = scratch + m * columns * vector, going_on * columns * vector, mask_at(p, b)
                    if m >= going_on:
                        sums, panel_sums = p.zeros, columns * vector
                    if p.projected:
                        row = projected_gradients + (base + b) * p.output_size * size
                        for q in range(vectors):
                            unit = unit0 + q * lanes
                            dp = state_gradient(q, unit, end - unit, sums, panel_sums, mask, dy, more)
                            store(row + unit * size, dp, end - unit)
                    else:
                        row = place_of_gradients(p, b, gradients + (base + b) * row_bytes)
                        own_places = places_of(p, i + m, places)
                        gate_gradients(vectors, (p, unit0, end, sums, panel_sums, mask, dy, more, row, own_places))
                i += rows

    @njit(**options)
    def unproject(p, base, r0, count, out_rows, gradients, first, last, scratch, places):
        """The rest of a projected step: gradients of the output, their addresses in out_rows, through W_hr to the cell."""
        row_bytes = pitch(p)
        depth = p.output_size
        for panel in range(first, last):
            weights = p.hr_panels + panel * depth * panel_row
            following = p.hr_panels + min(panel + 1, last - 1) * depth * panel_row
            wanted = min(columns, ceil_div(p.hidden_size, lanes) - panel * columns)
            i = 0
            while i < count:
                rows = min(count - i, ROW_BLOCK)
                product(rows, out_rows + 8 * i, size, weights, 0, 1, wanted, panel_row, depth, scratch, following, 0)
                for m in range(rows):
                    b, unit = r0 + i + m, panel * wide
                    row = place_of_gradients(p, b, gradients + (base + b) * row_bytes)
                    vectors = min(columns, ceil_div(p.hidden_size - unit, lanes))
                    sums = scratch + m * columns * vector
                    own_places = places_of(p, i + m, places)
                    gate_gradients(vectors, (p, unit, p.hidden_size, sums, 0, 0, p.zeros, p.zeros, row, own_places))
                i += rows

    @njit(**options)
    def multiply_once(
        p, count, a_rows, weight_rows, in_order, depth, width, first, last, out_rows, add, scratch, own_panel
    ):  # fmt: skip
        """`multiply` with a matrix that is used this once, its rows of `width` at weight_rows, one after the other if in_order.

        Panels are packed before many rows meet them, a group together and PANEL_DEPTH deep, and the sums of each such part go
        to out_rows; few rows read them where they lie. a_rows is moved along, and back.
        """
        row_bytes, whole = width * weight_size(p), width // wide
        for k in range(0, depth, PANEL_DEPTH):
            length, adds, panel = min(PANEL_DEPTH, depth - k), add or k > 0, first
            while panel < last:
                beside = min(group, (min(last, whole) if panel < whole else last) - panel)
                in_place = in_order and count <= 2 * most and panel < whole
                weights, panel_bytes, stride = load_int(weight_rows + 8 * k), wide * weight_size(p), row_bytes
                if not in_place:
                    panel_bytes, stride = length * panel_row, panel_row
                    for q in range(beside):
                        pack_weight(p, weight_rows + 8 * k, length, width, panel + q, own_panel + q * panel_bytes)
                    weights = own_panel - panel * panel_bytes
                if in_place and p.half:
                    multiply_half(
                        count, a_rows, size, weights, panel_bytes, stride, length, width, panel, panel + beside, out_rows, adds,
                        scratch,
                    )  # fmt: skip
                else:
                    multiply(
                        count, a_rows, size, weights, panel_bytes, stride, length, width, panel, panel + beside, out_rows, adds,
                        scratch,
                    )  # fmt: skip
                panel += beside
            shift_rows(a_rows, count, length * size)
        shift_rows(a_rows, count, -depth * size)

    @njit(**options)
    def multiply_in_tiles(p, count, rows, panels, width, first, last, out_rows, add, scratch, own_block):
        """`multiply` with panels of a gate matrix that are tiles."""
        depth = gates * p.hidden_size
        for i in range(0, count, p.split_rows):
            n = min(count - i, p.split_rows)
            split(n, rows + 8 * i, depth, PARTS, own_block)
            tile_multiply(n, own_block, panels, depth, width, first, last, out_rows + 8 * i, add, scratch)

    @njit(**options)
    def add_masked(p, source, b, total, unit0, unit1):
        """Add units unit0 .. unit1-1 of a row, times the mask of row b, to a total."""
        mask = mask_at(p, b)
        end = min(unit1, p.output_size)
        for unit in range(unit0, end, lanes):
            n, at = end - unit, unit * size  # beyond are another member's units
            store(total + at, load(total + at, n) + load(source + at, n) * load(mask + at, n), n)

    @njit(**options)
    def mask_hidden(p, member, members, t_low, t_high, rows, h_rows):
        """This member's share of a block's rows of h before their steps times the mask, as they entered the product.

        h_rows: addresses of the former, which become those of the latter.
        """
        row_bytes, i = p.output_size * size, 0
        begin, end = share(rows, members, member), share(rows, members, member + 1)
        for t in range(t_low, t_high + 1):
            for b in range(active_rows(p, t)):
                if begin <= i < end:
                    source, mask, row = load_int(h_rows + 8 * i), mask_at(p, b), p.masked + i * row_bytes
                    for unit in range(0, p.output_size, lanes):
                        n, at = p.output_size - unit, unit * size
                        store(row + at, load(source + at, n) * load(mask + at, n), n)
                i += 1
        fill_rows(h_rows, rows, p.masked, row_bytes)
        wait_crew(p, member)

    @njit(**options)
    def own_units(p, member):
        """The units of the cell whose gate gradients this member calculates: the first, and the one past the last."""
        panels, unit_group = ceil_div(p.hidden_size, wide) if p.projected else p.heads * p.head_panels, member % p.unit_groups
        first, last = share(panels, p.unit_groups, unit_group), share(panels, p.unit_groups, unit_group + 1)
        if p.projected:
            return first * wide, last * wide
        return first_unit(p, first, wide), first_unit(p, last, wide)

    @njit(**options)
    def reset_row(p, b):
        """Address of what the resets of row b sum up."""
        return p.reset_sums + b * stopped * p.hidden_size * size

    @njit(**options)
    def add_units(source, sums, first, last, n):
        """Add units first .. last-1 of n to sums."""
        for unit in range(first, min(last, n), lanes):
            count, at = min(n, last) - unit, unit * size
            store(sums + at, load(sums + at, count) + load(source + at, count), count)

    @njit(**options)
    def add_step_gradients(p, t, r0, count, first, last, table):
        """Add what comes in for the states but h after step t of rows r0 .. r0+count-1 to their gradients, for units first ..
        last-1. table: to write to."""
        unit_bytes = p.hidden_size * size
        row_bytes = states * unit_bytes
        fill_step(p, table, r0, count, p.dc_steps + kept_base(p, t) * row_bytes, row_bytes)
        for i in range(count):
            source, dc = load_int(table + 8 * i), p.dc0 + row_at(p, r0 + i) * row_bytes
            for s in range(states):
                add_units(source + s * unit_bytes, dc + s * unit_bytes, first, last, p.hidden_size)

    @njit(**options)
    def clear_units(row, first, last, n):
        for unit in range(first, min(last, n), lanes):
            store(row + unit * size, zero(), min(n, last) - unit)

    @njit(**options)
    def add_gates(p, b, later, first, last):
        """Add the gate gradients of a step that began anew to the sums of its row, for units first .. last-1."""
        for g in range(gates):
            at = g * p.hidden_size * size
            add_units(later + at, reset_row(p, b) + at, first, last, p.hidden_size)

    @njit(**options)
    def stop_at_reset(p, b, i, later, extra, first, last):
        """What step t of row b would carry back is of the states that resets go back to instead, for units first .. last-1.

        The product with W_hh, which is linear, is done once, of the sum over all resets of a row.
        """
        unit_bytes = p.hidden_size * size
        sums, dc = reset_row(p, b) + gates * unit_bytes, p.dc0 + row_at(p, b) * states * unit_bytes
        if p.need_dh0:
            add_gates(p, b, load_int(later + 8 * i), first, last)
            for s in range(states):
                add_units(dc + s * unit_bytes, sums + s * unit_bytes, first, last, p.hidden_size)
            if reads_hidden:
                dh = p.dh0 + row_at(p, b) * unit_bytes
                add_units(dh, sums + states * unit_bytes, first, last, p.hidden_size)
        for s in range(states):
            clear_units(dc + s * unit_bytes, first, last, p.hidden_size)
        store_int(later + 8 * i, p.zeros)
        store_int(extra + 8 * i, p.zeros)

    @njit(**options)
    def add_through_product(p, row0, count, rows, initial, first, last, table, scratch, own_panel, own_block):
        """Add the gradients of h that rows row0 .. row0+count-1 of the batch bring through the product, in panels
        first .. last-1, to those of states of the batch at `initial`. rows: addresses of these rows' gate gradients."""
        row_bytes, out = p.output_size * size, p.masked if p.mask else initial  # where it can be multiplied with the mask
        fill_step(p, table, row0, count, out, row_bytes)
        weight_rows, width = table + 8 * count, head_depth(p)
        parts, length = parts_of_head(p)
        for head in range(head_of(p, first), head_of(p, last - 1) + 1):
            low, high = max(0, first - head * p.head_panels), min(last - head * p.head_panels, p.head_panels)
            own, at = p.hh_panels + head * p.head_panels * p.hh_depth * panel_row, head * p.head_units * size
            shift_rows(table, count, at)
            if p.tiles:
                add = 0 if p.mask else 1
                multiply_in_tiles(p, count, rows, own, width, low, high, table, add, scratch, own_block)
            if p.one_step:
                fill_hidden_rows(p, head, weight_rows)
            for part in range(0 if p.tiles else parts):
                along, add = at + part * p.hidden_size * size, 0 if p.mask and part == 0 else 1
                shift_rows(rows, count, along)
                if p.one_step:
                    multiply_once(
                        p, count, rows, weight_rows + 8 * part * length, True, length, width, low, high, table, add, scratch,
                        own_panel,
                    )  # fmt: skip
                else:
                    multiply(
                        count, rows, size, own + part * length * panel_row, p.hh_depth * panel_row, panel_row, length, width,
                        low, high, table, add, scratch,
                    )  # fmt: skip
                shift_rows(rows, count, -along)
            shift_rows(table, count, -at)
        if p.mask:
            for b in range(row0, row0 + count):
                at = row_at(p, b) * row_bytes
                add_masked(p, p.masked + at, b, initial + at, first_unit(p, first, wide), first_unit(p, last, wide))

    @njit(**options)
    def finish_rows(p, r0, from_row, to_row, later, extra, first, last, table, scratch, own_panel, own_block):
        """dh0 of rows whose first step is done: what is left of their gradient, from_row .. to_row-1 counted from r0."""
        if to_row <= from_row or not p.need_dh0:
            return
        for i in range(from_row, to_row):  # rows without a carried part start from zero
            dh0 = p.dh0 + row_at(p, r0 + i) * p.output_size * size
            if load_int(extra + 8 * i) != dh0:
                clear_units(dh0, first_unit(p, first, wide), first_unit(p, last, wide), p.output_size)
        add_through_product(
            p, r0 + from_row, to_row - from_row, later + 8 * from_row, p.dh0, first, last, table, scratch, own_panel, own_block
        )  # fmt: skip

    @njit(**options)
    def finish_resets(p, member, r0, r1, rows, first, last, table, scratch, own_panel, own_block):
        """Add what the resets of rows r0 .. r1-1 sum up to the gradients of the states that they go back to, when all steps are
        done. rows: a table to write to."""
        (unit0, unit1), unit_bytes = own_units(p, member), p.hidden_size * size
        for b in range(r0, r1):
            sums, own = reset_row(p, b) + gates * unit_bytes, row_at(p, b) * unit_bytes
            for s in range(states):
                dc = p.dc_reset + own * states + s * unit_bytes
                add_units(sums + s * unit_bytes, dc, unit0, unit1, p.hidden_size)
            if reads_hidden:
                add_units(sums + states * unit_bytes, p.dh_reset + own, unit0, unit1, p.hidden_size)
        fill_rows(rows, r1 - r0, reset_row(p, r0), stopped * unit_bytes)
        wait(p, member)  # the sums of all units are there
        add_through_product(p, r0, r1 - r0, rows, p.dh_reset, first, last, table, scratch, own_panel, own_block)

    @njit(**options)
    def sum_columns(gradients, rows, row_bytes, n, totals, part):
        """Sums over rows of the first n numbers of each, in chains of BIAS_CHAIN; part: room for as much as totals."""
        vectors = ceil_div(n, lanes)
        for j in range(vectors):
            store_all(totals + j * vector, zero())
        for first in range(0, rows, BIAS_CHAIN):
            for j in range(vectors):
                store_all(part + j * vector, zero())
            for i in range(first, min(rows, first + BIAS_CHAIN)):
                row = gradients + i * row_bytes
                for j in range(vectors):
                    at = j * vector
                    store_all(part + at, load_all(part + at) + load(row + at, n - j * lanes))
            for j in range(vectors):
                store_all(totals + j * vector, load_all(totals + j * vector) + load_all(part + j * vector))

    @njit(**options)
    def accumulate(destination, value, n, add):
        if add:
            value = value + load(destination, n)
        store(destination, value, n)

    @njit(**options)
    def outer_products(a, a_bytes, units, operand_rows, rows, width, out_rows, half, add):
        """The sum that weight_gradient takes, in vectors to the bit, of rows so few that neither packing nor a tile pays.

        half: it is all there is, and goes to where it is wanted in bfloat16.
        """
        for unit in range(units):
            out = load_int(out_rows + 8 * unit)
            for column in range(0, width, lanes):
                total, n = zero(), width - column
                for i in range(rows):
                    value = load(load_int(operand_rows + 8 * i) + column * size, n)
                    total = multiply_add(a + i * a_bytes + unit * size, value, total)
                if half:
                    store_half(out + column * 2, total, n)
                else:
                    accumulate(out + column * size, total, n, add)

    @njit(**options)
    def pack_operand(p, member, members, operand_rows, length, width, first, count):
        """This member's share of `length` rows of an operand, of `count` panels from `first` on."""
        for i in range(share(length, members, member), share(length, members, member + 1)):
            row = load_int(operand_rows + 8 * i)
            for panel in range(count):
                out = p.operands + (panel * length + i) * panel_row
                for j in range(columns):
                    column = ((first + panel) * columns + j) * lanes
                    value = load(row + column * size, width - column) if column < width else zero()
                    store_all(out + j * vector, value)

    @njit(**options)
    def pack_operand_tiles(p, member, members, operand_rows, length, width, first, count, parts):
        """The same in tiles."""
        blocks = tile_blocks(length)
        for block in range(share(blocks, members, member), share(blocks, members, member + 1)):
            for panel in range(count):
                out = p.operands + (panel * blocks + block) * columns * parts * TILE_BYTES
                pack_panel_block(operand_rows, block, length, width, first + panel, 0, parts, out)

    @njit(**options)
    def multiply_units(a, a_bytes, unit, end, panels, length, width, first, last, out_rows, add, tables, scratch, own_block):
        """Columns unit .. end-1 of `length` rows of `a` times panels of an operand.

        A block of units meets them from a copy in own_block: each row of `a` is in a page of its own, and a tile would go
        through more of them than the TLB holds.
        """
        for u in range(unit, end, UNIT_BLOCK):
            n = min(UNIT_BLOCK, end - u)
            for i in range(length):
                row = a + i * a_bytes + u * size
                for byte in range(0, UNIT_BLOCK * size, LINE):
                    prefetch(row + ROWS_AHEAD * a_bytes + byte)
                for j in range(0, n, lanes):
                    store(own_block + (i * UNIT_BLOCK + j) * size, load(row + j * size, n - j), n - j)
            fill_rows(tables, n, own_block, size)
            multiply(
                n, tables, UNIT_BLOCK * size, panels, length * panel_row, panel_row, length, width, first, last,
                out_rows + 8 * u, add, scratch,
            )  # fmt: skip

    @njit(**options)
    def multiply_units_in_tiles(
        a, a_bytes, unit, end, panels, parts, length, width, first, last, out_rows, add, scratch, own_block
    ):  # fmt: skip
        """The same in tiles, of an operand of so many parts."""
        for u in range(unit, end, TILE_UNITS):
            n, out = min(TILE_UNITS, end - u), out_rows + 8 * u
            split_columns(n, a + u * size, a_bytes, length, PARTS, own_block)
            if parts > 1:
                tile_multiply_both_apart(n, own_block, panels, length, width, first, last, out, add, scratch)
            else:
                tile_multiply(n, own_block, panels, length, width, first, last, out, add, scratch)

    @njit(**options)
    def weight_gradient(
        p, member, a, a_bytes, parts, units, operand_rows, rows, width, out_rows, add, tables, scratch, own_block
    ):  # fmt: skip
        """What is at out_rows, [units, width], (+)= a[rows, units]^T * operand[rows, width]; a_bytes from one row of a on.

        Of a and out_rows there are so many parts of `units`, H units apart. The operand is packed by all members together, some
        panels at a time, and each multiplies its share of the units.
        """
        members = p.row_groups * p.unit_groups
        unit0, unit1 = share(parts * units, members, member), share(parts * units, members, member + 1)
        if rows <= FEW_ROWS:
            for part in range(unit0 // units, ceil_div(unit1, units)):
                unit, end = max(unit0 - part * units, 0), min(unit1 - part * units, units)
                at = part * p.hidden_size + unit
                outer_products(
                    a + at * size, a_bytes, end - unit, operand_rows, rows, width, out_rows + 8 * at, p.rounded_at_once, add
                )  # fmt: skip
            return
        panels, operand_parts = ceil_div(width, wide), 0
        if p.tiles:
            operand_parts = parts_of(rows, operand_rows, width)
        for first in range(0, panels, operand_panels):
            count, last = min(operand_panels, panels - first), min(panels, first + operand_panels)
            for begin in range(0, rows, p.operand_rows):
                length, adds = min(p.operand_rows, rows - begin), add or begin > 0
                own_rows = operand_rows + 8 * begin
                wait_crew(p, member)  # the panels before are done with
                if p.tiles:
                    pack_operand_tiles(p, member, members, own_rows, length, width, first, count, operand_parts)
                else:
                    pack_operand(p, member, members, own_rows, length, width, first, count)
                wait_crew(p, member)
                for part in range(unit0 // units, ceil_div(unit1, units)):
                    unit, end = max(unit0 - part * units, 0), min(unit1 - part * units, units)
                    own, out = a + begin * a_bytes + part * p.hidden_size * size, out_rows + 8 * part * p.hidden_size
                    if p.tiles:
                        base = p.operands - first * tile_blocks(length) * columns * operand_parts * TILE_BYTES
                        multiply_units_in_tiles(
                            own, a_bytes, unit, end, base, operand_parts, length, width, first, last, out, adds, scratch,
                            own_block,
                        )  # fmt: skip
                    else:
                        base = p.operands - first * length * panel_row
                        multiply_units(
                            own, a_bytes, unit, end, base, length, width, first, last, out, adds, tables, scratch, own_block
                        )  # fmt: skip

    @njit(**options)
    def fill_gate_rows(p, table, order, matrix, width):
        """Addresses of the rows of a gradient [gates * hidden_size, width], the gates in `order`."""
        units, row_bytes = p.hidden_size, width * (2 if p.rounded_at_once else size)
        for s in range(gates):
            fill_rows(table + 8 * s * units, units, matrix + order[s] * units * row_bytes, row_bytes)

    @njit(**options)
    def round_gradient(numbers, count, out, members, member):
        """This member's share of `count` sums, to bfloat16."""
        vectors = ceil_div(count, lanes)
        for i in range(share(vectors, members, member) * lanes, min(count, share(vectors, members, member + 1) * lanes), lanes):
            store_half(out + 2 * i, load(numbers + size * i, count - i), count - i)

    @njit(**options)
    def round_gradients(p, member, members):
        """The weights' gradients to where they are wanted in bfloat16."""
        depth = gates * p.hidden_size
        round_gradient(p.dw_ih, depth * p.input_size, p.dw_ih_half, members, member)
        round_gradient(p.dw_hh, depth * head_depth(p), p.dw_hh_half, members, member)
        if p.projected:
            round_gradient(p.dw_hr, p.output_size * p.hidden_size, p.dw_hr_half, members, member)

    @njit(**options)
    def parameter_gradients(
        p, member, members, rows, gradients, out_gradients, t_low, t_high, add, tables, scratch, own_block
    ):  # fmt: skip
        """One block's share of the gradients of weights and biases: `rows` rows, steps t_low .. t_high."""
        row_bytes, units = pitch(p), p.hidden_size
        depth = gates * units
        x_rows, h_rows = tables, tables + 8 * rows
        out_rows = h_rows + 8 * rows
        columns_of_a = out_rows + 8 * max(depth, p.output_size)
        i = 0
        for t in range(t_low, t_high + 1):
            count = active_rows(p, t)
            fill_step(p, x_rows + 8 * i, 0, count, p.x + step_base(p, t) * p.x_step, p.x_row)
            fill_hidden_before(p, t, 0, count, h_rows + 8 * i)
            i += count
        if p.mask:
            mask_hidden(p, member, members, t_low, t_high, rows, h_rows)
        fill_gate_rows(p, out_rows, input_order, p.dw_ih, p.input_size)
        weight_gradient(
            p, member, gradients, row_bytes, 1, depth, x_rows, rows, p.input_size, out_rows, add, columns_of_a, scratch,
            own_block,
        )  # fmt: skip
        (parts, length), width = parts_of_head(p), head_depth(p)
        fill_gate_rows(p, out_rows, hidden_order, p.dw_hh, width)
        for head in range(p.heads):
            weight_gradient(
                p, member, gradients + (hidden * units + head * p.head_units) * size, row_bytes, parts, length, h_rows, rows,
                width, out_rows + 8 * head * p.head_units, add, columns_of_a, scratch, own_block,
            )  # fmt: skip
            shift_rows(h_rows, rows, p.head_units * size)
        if p.projected:
            saved_row = (slots + 1) * units * size
            i = 0
            for t in range(t_low, t_high + 1):
                first = p.saved + kept_base(p, t) * saved_row + slots * units * size
                fill_step(p, x_rows + 8 * i, 0, active_rows(p, t), first, saved_row)
                i += active_rows(p, t)
            fill_rows(out_rows, p.output_size, p.dw_hr, units * (2 if p.rounded_at_once else size))
            weight_gradient(
                p, member, out_gradients, p.output_size * size, 1, p.output_size, x_rows, rows, units, out_rows, add,
                columns_of_a, scratch, own_block,
            )  # fmt: skip
        if p.bias:
            blocks, room = ceil_div(units, lanes), sums_bytes // (2 * vector)
            end = min(units, share(blocks, members, member + 1) * lanes)
            for first in range(share(blocks, members, member) * lanes, end, room * lanes):
                n = min(end - first, room * lanes)
                for s in range(preactivations + weights):
                    if s < preactivations:
                        column = gradients + (s * units + first) * size
                        sum_columns(column, rows, row_bytes, n, scratch, scratch + room * vector)
                    else:  # of a row, the steps of the block are summed; the next block begins anew
                        column = p.own_sums + ((s - preactivations) * units + first) * size
                        sum_columns(column, p.batch, weights * units * size, n, scratch, scratch + room * vector)
                        for b in range(p.batch):
                            clear_units(column + b * weights * units * size, 0, n, n)
                    for j in range(0, n, lanes):
                        unit, total = first + j, load_all(scratch + j * size)
                        if s < gates:
                            accumulate(p.db_ih + (input_order[s] * units + unit) * size, total, n - j, add)
                        if hidden <= s < preactivations:
                            accumulate(p.db_hh + ((s - hidden) * units + unit) * size, total, n - j, add)
                        if s >= preactivations:
                            accumulate(p.db_ih + ((gates + s - preactivations) * units + unit) * size, total, n - j, add)

    @njit(**options)
    def input_gradient(p, member, members, rows, gradients, t_low, t_high, tables, scratch, own_panel, own_block):
        """dx of the block's rows: this member's share of the panels of W_ih, or of the rows where there are few panels.

        And in tiles, as what is taken apart is a row.
        """
        panels, depth = ceil_div(p.input_size, wide), gates * p.hidden_size
        panel_parts = 1 if p.tiles else min(panels, members)
        row_parts = members // panel_parts
        panel_part, row_part = member % panel_parts, member // panel_parts
        if row_part >= row_parts:
            return
        first, last = share(rows, row_parts, row_part), share(rows, row_parts, row_part + 1)
        weight_rows, gradient_rows = tables, tables + 8 * depth
        out_rows = gradient_rows + 8 * rows
        fill_rows(gradient_rows, last - first, gradients + first * pitch(p), pitch(p))
        i = 0
        for t in range(t_low, t_high + 1):
            fill_step(p, out_rows + 8 * i, 0, active_rows(p, t), p.dx + step_base(p, t) * p.dx_step, p.dx_row)
            i += active_rows(p, t)
        out_rows += 8 * first
        if p.tiles:
            multiply_in_tiles(
                p, last - first, gradient_rows, p.ih_panels, p.input_size, 0, panels, out_rows, 0, scratch, own_block
            )  # fmt: skip
            return
        fill_input_rows(p, weight_rows)
        multiply_once(
            p, last - first, gradient_rows, weight_rows, input_order == hidden_order, depth, p.input_size,
            share(panels, panel_parts, panel_part), share(panels, panel_parts, panel_part + 1), out_rows, 0, scratch, own_panel,
        )  # fmt: skip

    @njit(**options)
    def clear_input_gradients(p, member, members, t_low, t_high):
        """Zeros in dx of steps t_low .. t_high past the lengths: this member's share of the rows."""
        for t in range(t_low, t_high + 1):
            first = active_rows(p, t) if t < p.steps else 0
            count = p.batch - first
            for b in range(first + share(count, members, member), first + share(count, members, member + 1)):
                clear_units(p.dx + t * p.dx_step + row_at(p, b) * p.dx_row, 0, p.input_size, p.input_size)

    @njit(**options)
    def run_direction(p, member):
        members = p.row_groups * p.unit_groups
        row_group, unit_group = member // p.unit_groups, member % p.unit_groups
        r0, r1 = split_row(p, row_group), split_row(p, row_group + 1)
        hidden_bytes, output_bytes = p.hidden_size * size, p.output_size * size
        panels = p.heads * p.head_panels
        first, last = share(panels, p.unit_groups, unit_group), share(panels, p.unit_groups, unit_group + 1)
        heads = head_of(p, first), head_of(p, last - 1) + 1
        cell_panels = ceil_div(p.hidden_size, wide)
        first_cell = share(cell_panels, p.unit_groups, unit_group)
        last_cell = share(cell_panels, p.unit_groups, unit_group + 1)
        unit0, unit1 = own_units(p, member)
        row_bytes = pitch(p)
        saved_row = (slots + p.projected) * hidden_bytes

        # This thread's own memory: scratch tiles, panels packed to be used once, a block of units, tables of row addresses.
        scratch = p.own + member * p.own_bytes
        own_panel = scratch + sums_bytes
        own_block = own_panel + p.panel_bytes
        later = own_block + p.own_block
        extra = later + 8 * p.batch
        out_rows = extra + 8 * p.batch
        places = out_rows + 8 * p.batch
        reduced = places + 8 * PLACES * p.batch
        tables = reduced + p.batch * reduced_bytes
        gradients = p.shared  # of the pre-activations, a block of steps
        out_gradients = p.tails  # of the projected output, a block of steps
        carried = p.shared + p.block_steps * p.batch * row_bytes  # the last step of the block before

        if p.tiles:
            configure()
        if member == 0:
            widest = max(gates * p.hidden_size, p.output_size)
            for unit in range(0, widest, lanes):
                store(p.zeros + unit * size, zero(), widest - unit)
        pack_weights(p, member, members, tables)
        fill_step(p, places + 8 * OF_D_CARRIED * p.batch, r0, r1 - r0, p.dc0, states * hidden_bytes)
        fill_step(p, places + 8 * OF_D_HIDDEN * p.batch, r0, r1 - r0, p.dh0, hidden_bytes)
        fill_rows(places + 8 * OF_OWN_SUMS * p.batch, r1 - r0, p.own_sums + r0 * weights * hidden_bytes, weights * hidden_bytes)
        fill_step(p, extra, r0, r1 - r0, p.dh0, output_bytes)
        fill_rows(later, r1 - r0, p.zeros, 0)
        for b in range(r0, r1):
            own = row_at(p, b)
            for s in range(b * weights, (b + 1) * weights):
                clear_units(p.own_sums + s * hidden_bytes, unit0, unit1, p.hidden_size)
            if p.resets and p.need_dh0:
                for s in range(stopped):
                    clear_units(reset_row(p, b) + s * hidden_bytes, unit0, unit1, p.hidden_size)
                if p.dh_reset != p.dh0:
                    output0, output1 = first_unit(p, first, wide), first_unit(p, last, wide)
                    clear_units(p.dh_reset + own * output_bytes, output0, output1, p.output_size)
                    for state in range(own * states, (own + 1) * states):
                        clear_units(p.dc_reset + state * hidden_bytes, unit0, unit1, p.hidden_size)
            for panel in range(first, last):
                for j in range(columns):
                    unit = (panel * columns + j) * lanes
                    if unit < p.output_size:
                        n = p.output_size - unit
                        given = load(p.dh_n + own * output_bytes + unit * size, n) if p.dh_n else zero()
                        store(p.dh0 + own * output_bytes + unit * size, given, n)
            for state in range(own * states, (own + 1) * states):
                for unit in range(first_cell * wide, min(last_cell * wide, p.hidden_size), lanes):
                    n = p.hidden_size - unit
                    given = load(p.dc_n + state * hidden_bytes + unit * size, n) if p.dc_n else zero()
                    store(p.dc0 + state * hidden_bytes + unit * size, given, n)
        if p.need_dx:
            clear_input_gradients(p, member, members, p.steps, p.padded_steps - 1)
        wait_crew(p, member)

        end, previous_count = p.steps, 0
        while end > 0:
            start = max(0, end - p.block_steps)
            t_low = p.steps - end if p.reverse else start
            t_high = p.steps - 1 - start if p.reverse else end - 1
            rows = first_row(p, t_high) + active_rows(p, t_high) - first_row(p, t_low)
            for k in range(end - 1, start - 1, -1):
                t = p.steps - 1 - k if p.reverse else k
                count = max(0, min(r1, active_rows(p, t)) - r0)
                finish_rows(
                    p, r0, count, previous_count, later, extra, first, last, tables, scratch, own_panel, own_block
                )  # fmt: skip
                base = first_row(p, t) - first_row(p, t_low)
                fill_places(p, t, r0, count, saved_row, places)
                if p.dc_steps:
                    add_step_gradients(p, t, r0, count, unit0, unit1, out_rows)
                i, turn = 0, k
                while i < count:
                    n, live, at = min(count - i, p.split_rows), previous_count - i, 8 * i
                    for head in range(*heads):
                        head_bytes = head * p.head_units * size
                        if head > 0:
                            shift_rows(later + at, min(n, live), head_bytes)
                        low, high = max(0, first - head * p.head_panels), min(last - head * p.head_panels, p.head_panels)
                        step(
                            p, turn, base, r0 + i, n, live, later + at, extra + at, gradients, out_gradients, head, low, high,
                            scratch, own_block, places + at,
                        )  # fmt: skip
                        if head > 0:
                            shift_rows(later + at, min(n, live), -head_bytes)
                    i += n
                    turn += 1
                if p.projected:
                    wait(p, member)
                    fill_rows(out_rows, count, out_gradients + (base + r0) * output_bytes, output_bytes)
                    unproject(p, base, r0, count, out_rows, gradients, first_cell, last_cell, scratch, places)
                if reduces:
                    context = p, member, r0, places, gradients + (base + r0) * row_bytes
                    finish_step(context, count, reduced)
                wait(p, member)
                fill_rows(later, count, gradients + (base + r0) * row_bytes + hidden * hidden_bytes, row_bytes)
                if reads_hidden:
                    fill_step(p, extra, r0, count, p.dh0, output_bytes)
                else:
                    fill_rows(extra, count, p.zeros, 0)
                for i in range(count if p.resets else 0):
                    if begins_anew(p, t, r0 + i):
                        stop_at_reset(p, r0 + i, i, later, extra, unit0, unit1)
                previous_count = count
            if start == 0:
                finish_rows(p, r0, 0, previous_count, later, extra, first, last, tables, scratch, own_panel, own_block)
                if p.resets and p.need_dh0:
                    finish_resets(p, member, r0, r1, out_rows, first, last, tables, scratch, own_panel, own_block)
            wait_crew(p, member)
            if start > 0:  # the next block overwrites the gradients that its first step reads
                share0, share1 = (
                    share(previous_count, p.unit_groups, unit_group),
                    share(previous_count, p.unit_groups, unit_group + 1),
                )
                for i in range(share0, share1):
                    source, destination = load_int(later + 8 * i), carried + (r0 + i) * row_bytes
                    for unit in range(0, gates * p.hidden_size, lanes):
                        n = gates * p.hidden_size - unit
                        store(destination + unit * size, load(source + unit * size, n), n)
                for i in range(previous_count):
                    store_int(later + 8 * i, carried + (r0 + i) * row_bytes)
            if p.need_dw:
                add = 1 if end < p.steps else 0
                parameter_gradients(
                    p, member, members, rows, gradients, out_gradients, t_low, t_high, add, tables, scratch, own_block
                )  # fmt: skip
            if p.need_dx:
                input_gradient(p, member, members, rows, gradients, t_low, t_high, tables, scratch, own_panel, own_block)
                if p.order:
                    clear_input_gradients(p, member, members, t_low, t_high)
            wait_crew(p, member)
            end = start
        if p.half and p.need_dw and not p.rounded_at_once:
            round_gradients(p, member, members)
        if p.tiles:
            release()

    @njit(**options)
    def add_other_direction(p, rank):
        """Add dx of direction 1, which is kept apart: so it is the same sum when both directions run at once."""
        count = (p.padded_steps * p.batch if p.order else p.rows) * p.input_size
        step_size = ceil_div(ceil_div(count, p.threads), lanes) * lanes
        for i in range(rank * step_size, min(count, (rank + 1) * step_size), lanes):
            n = min(count, (rank + 1) * step_size) - i
            store(p.dx + i * size, load(p.dx + i * size, n) + load(p.dx_other + i * size, n), n)

    @njit(**options)
    def backward(records, rank):
        p = record_at(records)
        crew = p.row_groups * p.unit_groups
        if p.crews > 1:
            direction, member = rank // crew, rank % crew
            if direction < p.directions:
                run_direction(record_at(records + direction * RECORD_BYTES), member)
        else:
            for direction in range(p.directions):
                if rank < crew:
                    run_direction(record_at(records + direction * RECORD_BYTES), rank)
                wait_team(p, rank)
        if p.directions == 2 and p.need_dx:
            wait_team(p, rank)
            add_other_direction(p, rank)

    return backward
