"""How a call is shared out over threads, and the record in which a kernel finds everything it needs.

Pure integer arithmetic: compiled into the engine at build time, and run as plain Python by `describe`.

A team of threads works on one call. A bidirectional layer gives each direction a crew of its own where there are threads for
two. A crew splits its batch over `row_groups` (no synchronisation between them) and, within a group, the hidden units over
`unit_groups` (one barrier a step, each thread streaming only its share of the recurrent weights). Layers on top of each other
may run at once in inference, dealt out to crews, each a block of steps behind the one below.
"""

from __future__ import annotations

# One record of int64 per direction, or layer of those that run at once, shared by the C++ runtime (which gets it as a generated
# struct) and the kernels.
# Names are those of the op; *_step and *_row are strides in bytes of a step and of a batch row; a pointer may be 0 (absent).
_GROUPS = (
    # sizes and flags; rows counts those of all steps, output_size is hidden_size or the projection's
    # half: weight matrices are in bfloat16, and output_size is even; half_panels: forward's of W_hh stay so when packed
    # tiles: those of both stay so, and are multiplied in tile registers
    "steps batch rows input_size hidden_size output_size bias projected half half_panels tiles reverse save",
    # heads: blocks on W_hh's diagonal, each of head_units units, whose panels head_panels are: none has units of two heads
    "heads head_units head_panels",
    "need_dx need_dh0 need_dw",
    # layers: records are those of so many layers, on top of each other and of one direction, which run at once; else 0
    "layers",
    # packed, or with lengths: rows of each step, and rows before it. packed: they lie in this order; with lengths a step's rows
    # lie where those of a dense sequence of padded_steps lie, and `order` says which row of the batch each of them is, the
    # longest first: steps and rows count those within the lengths
    "batch_sizes offsets packed order padded_steps",
    # 0, or a byte for each row of x: do its states go back to h_reset and c_reset? These are h0 and c0, or other rows behind
    # them; dh_reset and dc_reset are where the gradients of these go
    "resets resets_step resets_row h_reset c_reset dh_reset dc_reset",
    # 0, or a factor for each number of h that enters the recurrent product [batch, output_size]; numbers of the cell's kind
    # Noise, as many for each unit of a row of x, side by side
    "mask noise noise_step noise_row",
    # the op's tensors; y and dy point at this direction's columns
    "x x_step x_row y y_step y_row h0 c0 h_n c_n w_ih w_hh b_ih b_hh w_hr saved",
    # dw_*_half: where the weights' gradients are wanted in bfloat16; dw_* are then the workspace's, where they are summed in
    # float32, but if rounded_at_once: of few rows they need no sums
    # dc_steps: 0, or gradients of the states but h after each step, rows as in saved
    "dy dy_step dy_row dh_n dc_n dc_steps dx dx_step dx_row dh0 dc0 dw_ih dw_hh db_ih db_hh dw_hr",
    "dw_ih_half dw_hh_half dw_hr_half rounded_at_once",
    # the machine; `threads` becomes the team's size; direction: or the layer's number
    "threads l2_bytes directions direction",
    # the schedule (see above); most threads in a crew; steps in a block of time
    "crews crew_threads row_groups unit_groups block_steps",
    # ih_once: W_ih is packed where it is used, into the thread's own buffer of panel_bytes: a panel, in backward what
    # multiply_once takes.
    # one_step: W_hh is used but once; forward reads both matrices where they lie, backward packs as with ih_once
    # operand_rows: rows of an operand of the weights' gradients that are packed at a time, a multiple of 128 or all
    # ih_depth, hh_depth: rows of a panel, of numbers or of pairs
    # own_block: bytes of a thread's space for a part of a matrix that meets many panels: units of gate gradients, or what is
    # taken apart for tiles, of which split_rows rows go at a time; where nothing is, all rows do
    "ih_once one_step panel_bytes operand_rows ih_depth hh_depth own_block split_rows",
    # frozen weights: all panels and summed biases of a direction lie at `pack`, if not 0; pack_only: put them there, no more;
    # pack_bytes: so many they are
    "pack pack_only pack_bytes",
    # the workspace: packed weights, summed biases, a row of zeros; of the crew: pre-activations or their gradients (shared),
    # packed operands of the weights' gradients, unprojected outputs or the projected ones' gradients (tails); of each thread
    # (own, own_bytes apart); dx of direction 1, to be added (dx_other); of each row the sums over its resets (reset_sums), of
    # gate gradients, of those of the states that enter element by element, and of h's where it is one of these; of the crew,
    # in backward, rows of h times the mask (masked), and of each row what goes from one stage to the next (carried)
    "workspace ih_panels hh_panels hr_panels bias_sums zeros shared operands tails own own_bytes dx_other reset_sums masked",
    # and in backward the sums over a block's steps of the gradients of the cell's own weights (own_sums)
    "carried own_sums",
    # the runtime's barrier function, and where it keeps count of arrivals: the team's, then each crew's and its groups'
    "wait arrivals",
)
FIELDS = tuple(" ".join(_GROUPS).split())

HALF_PANEL_ROWS = 16  # a step of so many rows waits for weights; one of more is busy, and wants them widened
VECTOR_ROWS = 4  # so many take less time in vectors than in a tile, which has 16
ARRIVALS_BYTES = 128  # of a thread at one kind of barrier
LINE = 64
BARRIER = 900  # cycles, on two AVX-512 cores
VECTOR_RATE, TILE_RATE = 2, 32  # vectors of products a cycle, of float32's and of bfloat16's in tiles
ROW_BLOCK = 48  # rows that a part of a panel meets while it is in L1 or L2
GROUP_BYTES = 256  # width of the panels that meet a part of many rows together: of one in AVX-512
FORWARD_PARTS, BACKWARD_PARTS = 3, 2  # numbers in bfloat16 that stand for one in float32, see tiles.py
TILE_ROWS, TILE_PAIRS = 16, 16  # of a tile register: rows, and pairs of numbers in bfloat16 in each
TILE_BYTES, TILE_DEPTH = TILE_ROWS * LINE, 2 * TILE_PAIRS
SPLIT_BYTES = 512 * 1024  # rows are taken apart for tiles so many bytes at a time before they meet the panels: they stay in L2
SPLIT_ROWS = 128  # or so many rows
TILE_UNITS = 64  # units whose columns of gate gradients are taken apart together
FORWARD_BLOCK_BYTES = 512 * 1024  # pre-activations of a block of steps: half stays in the L2 of each of two threads,
FORWARD_BLOCK_ROWS = 256  # but for so many rows W_ih is read at least: else it comes from beyond L2 too often
PANEL_DEPTH = 1024  # rows of a matrix that is packed to be used once, GROUP_BYTES of each: in backward, 256 KiB stay in L2
BACKWARD_BLOCK_ROWS = 512  # rows whose gate gradients are held at once; the same for any team, so that bits are, too
OPERAND_BYTES = 2048  # width of the panels of an operand of the weights' gradients that are packed at a time,
OPERAND_ROWS = 512  # of so many rows
UNIT_BLOCK = 48  # units whose columns of gate gradients are read together, for all those panels
PLACES = 9  # tables of addresses that a step of backward has, see backward.py
FEW_ROWS = 8  # rows whose share of the weights' gradients is summed without packing them
LAYER_BLOCKS = 16  # of steps, where layers run at once: a layer is a block behind the one below. Fewer where they would have
LAYER_ROWS = 4  # less than so many rows
LAYER_NUMBERS = 4 << 20  # of the outputs of all layers that run at once, which are there together: at most
L2_BYTES = 1 << 20  # where the runtime does not say


def ceil_div(a, b):
    return (a + b - 1) // b


def align(size):
    """Round up to whole cache lines."""
    return ceil_div(size, LINE) * LINE


def tile_blocks(depth):
    """Blocks of numbers in bfloat16 that a tile's row holds."""
    return ceil_div(depth, TILE_DEPTH)


def split_bytes(rows, depth, parts):
    """Of the tiles of so many rows."""
    return parts * ceil_div(rows, TILE_ROWS) * tile_blocks(depth) * TILE_BYTES


def split_rows(depth, parts):
    """Rows that are taken apart at a time: pairs of tiles."""
    return max(2 * TILE_ROWS, min(SPLIT_ROWS, SPLIT_BYTES // split_bytes(2 * TILE_ROWS, depth, parts) * 2 * TILE_ROWS))


def way_of_weights(forward, half, with_tiles, steps, batch, vector_bytes, heads, meetings, reduced):
    """(half_panels, tiles, way) of a pass, see FIELDS; way: (bytes of a vector of weights, bytes a cycle from L2, vectors of
    products a cycle, heads, meetings a step of threads that share rows, numbers of a row that each of these reduces).

    with_tiles: the processor has them. A single step would wait for packing them, and a head is seldom deep enough.
    """
    tiles = half and with_tiles and batch > VECTOR_ROWS and steps > 1 and heads == 1
    half_panels = forward and half and not tiles and batch <= HALF_PANEL_ROWS
    rate = TILE_RATE // (FORWARD_PARTS if forward else BACKWARD_PARTS) if tiles else VECTOR_RATE
    weight_bytes = vector_bytes // 2 if half_panels or tiles else vector_bytes
    return half_panels, tiles, (weight_bytes, 2 * vector_bytes // 3, rate, heads, meetings, reduced)


def unit_vectors(gates, registers):
    """Vectors of units in a panel: a cell of one gate takes several, to keep the multipliers busy."""
    return 1 if gates > 1 else wide_columns(registers)


def wide_columns(registers):
    """Vectors in a row of a panel that is not split by gates."""
    return 4 if registers >= 32 else 2


def scratch_bytes(panel_row):
    """A thread's space for the sums of a block of rows; panel_row: bytes of a row of a panel."""
    return ROW_BLOCK * max(GROUP_BYTES, panel_row)


def overlapped(work, streaming):
    """Cycles of both, which overlap in part, like the legs of a right triangle: its hypotenuse is about the longer leg and half
    the square of the other over it."""
    longer, other = max(work, streaming), min(work, streaming)
    return longer + other * other // (2 * longer)


def step_cost(rows, depth, panels, panel_vectors, way, row_groups, unit_groups, l2_bytes):
    """Estimated cycles of one step of one thread: its products and gates, the streaming of its share of the weights, and
    between threads that share rows, but no heads, the barrier, and fetching what the others computed. In a cell with reductions
    over a row, which meets more than once, heads are shared too, and each thread fetches all that is reduced.

    way: as way_of_weights says. Other rates were measured on two AVX-512 cores: 110 cycles for the gates of a vector of units;
    10 bytes a cycle from beyond L2; 6 cycles a number fetched.
    """
    vector_bytes, near, rate, heads, meetings, reduced = way
    group_rows = ceil_div(rows, row_groups)
    own_panels = ceil_div(panels, unit_groups)
    tiles = rate > VECTOR_RATE
    product_rows = ceil_div(group_rows, TILE_ROWS) * TILE_ROWS if tiles else group_rows  # a tile is never part of one
    work = own_panels * (product_rows * (depth * panel_vectors // rate) + 110 * group_rows)
    weights = own_panels * depth * panel_vectors * vector_bytes
    streaming = weights // (near if 4 * weights <= 3 * l2_bytes else 10)
    exchange = meetings * BARRIER + 6 * group_rows * (depth + reduced) * (unit_groups - 1) // unit_groups
    if unit_groups == 1 or (meetings == 1 and heads % unit_groups == 0):
        exchange = 0
    return overlapped(work, streaming) + exchange


def choose_groups(rows, depth, panels, panel_vectors, way, threads, l2_bytes):
    """(row_groups, unit_groups) of a crew of `threads`: the pair with the least estimated time a step."""
    best, best_cost = (1, 1), step_cost(rows, depth, panels, panel_vectors, way, 1, 1, l2_bytes)
    for row_groups in range(1, min(threads, rows) + 1):
        unit_groups = min(threads // row_groups, panels)
        cost = step_cost(rows, depth, panels, panel_vectors, way, row_groups, unit_groups, l2_bytes)
        if cost < best_cost:
            best, best_cost = (row_groups, unit_groups), cost
    return best


def worth_threads(flops, threads):
    """Threads that a call of `flops` operations keeps busy: waking another costs as much as 200,000 operations do."""
    return max(1, min(threads, flops // 400_000))


def block_length(steps, batch, rows):
    """Steps in a block of about `rows` rows, evened out over the sequence."""
    blocks = ceil_div(steps, max(1, rows // batch))
    return ceil_div(steps, blocks)


def forward_block(steps, batch, rows, input_size, preactivation_bytes):
    """Steps whose input is projected together; preactivation_bytes: of a row.

    All of them, where that takes less memory than a packed W_ih, which is then packed where it is used.
    """
    block_rows = max(FORWARD_BLOCK_ROWS, FORWARD_BLOCK_BYTES // preactivation_bytes)
    return steps if rows <= max(input_size, block_rows) else block_length(steps, batch, block_rows)


def backward_block(steps, batch, spared):
    """Steps whose gate gradients are held at once.

    spared: rows of them that take as much memory as a packed W_hh, if it can lie where its own gradient goes: it can where one
    block is all, which then takes so many more rows.
    """
    rows = min(BACKWARD_BLOCK_ROWS + spared, 2 * BACKWARD_BLOCK_ROWS)
    return steps if steps * batch <= rows else block_length(steps, batch, BACKWARD_BLOCK_ROWS)


def schedule(
    steps,
    rows,
    batch,
    input_size,
    hidden_size,
    output_size,
    directions,
    threads,
    l2_bytes,
    gates,
    depth,
    panels,
    panel_vectors,
    way,
    passes,
):
    """(crews, row_groups, unit_groups) of one call. passes: products a forward or backward pass does per weight (1 or 2)."""
    of_row = passes * directions * gates * hidden_size * (input_size + output_size // way[3])
    flops = 2 * rows * of_row
    if steps == 1:  # reading the weights is most of the work
        flops = max(flops, 6 * of_row)
    threads = worth_threads(flops, threads)
    crews = 2 if directions == 2 and threads > 1 else 1
    if steps == 1:  # each thread reads its own share of the weights
        return crews, 1, min(threads // crews, panels)
    row_groups, unit_groups = choose_groups(batch, depth, panels, panel_vectors, way, threads // crews, l2_bytes)
    return crews, row_groups, unit_groups


def layer_block(steps, batch, most):
    """Steps in a block of layers that run at once, `most` at most."""
    return min(most, max(ceil_div(LAYER_ROWS, batch), ceil_div(steps, LAYER_BLOCKS)))


def layer_cost(rows, input_size, depth, panels, panel_vectors, way, threads, l2_bytes, shared_by, block):
    """Estimated cycles of one step of a crew of `threads`, the input's product included.

    shared_by: layers whose weights one after the other are in the L2 of those threads. block: steps for which W_ih is read.
    """
    row_groups, unit_groups = choose_groups(rows, depth, panels, panel_vectors, way, threads, l2_bytes)
    vector_bytes, near, rate, _, _, _ = way
    own_panels = ceil_div(panels, unit_groups)
    work = ceil_div(rows, row_groups) * own_panels * (input_size * panel_vectors // rate)
    own_bytes = own_panels * panel_vectors * vector_bytes
    fits = shared_by * own_bytes * (input_size + depth) <= l2_bytes
    product = overlapped(work, own_bytes * input_size // (near if fits else 10) // block)
    return product + step_cost(rows, depth, panels, panel_vectors, way, row_groups, unit_groups, l2_bytes)


def crews_of_layers(
    layers, steps, batch, input_size, hidden_size, output_size, threads, l2_bytes, gates, panels, panel_vectors, way
):
    """Crews for layers on top of each other that run at once; 1 where they are faster one after the other, or would keep too
    much. input_size: of the lowest."""
    if steps == 1 or layers * steps * batch * output_size > LAYER_NUMBERS:
        return 1
    R, depth = output_size, output_size // way[3]
    flops = 2 * steps * batch * gates * hidden_size * (R + depth)
    crews = min(layers, worth_threads(layers * flops, threads))
    if crews == 1:
        return 1
    block, rounds = layer_block(steps, batch, steps), ceil_div(layers, crews)  # a crew takes its layers' blocks in turn
    blocks, of_each, most = ceil_div(steps, block), worth_threads(flops, threads // crews), worth_threads(flops, threads)
    shared = layer_cost(batch, input_size, depth, panels, panel_vectors, way, of_each, l2_bytes, rounds, block)
    shared = max(shared, layer_cost(batch, R, depth, panels, panel_vectors, way, of_each, l2_bytes, rounds, block))
    lowest = layer_cost(batch, input_size, depth, panels, panel_vectors, way, most, l2_bytes, 1, steps)
    other = layer_cost(batch, R, depth, panels, panel_vectors, way, most, l2_bytes, 1, steps)
    at_once = (blocks + layers - 1) * (rounds * block * shared + BARRIER)
    return crews if at_once < blocks * block * (lowest + (layers - 1) * other) else 1
