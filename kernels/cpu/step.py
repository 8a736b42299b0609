"""One forward step of a decoder in one compiled function that all threads walk through together.

    embedding -> per layer: norm, quantize | q k v | norm, RoPE, cache | attention | quantize | o | residual, norm, quantize
                            | gate up act | quantize | down | residual -> norm, quantize | head

Everything is passed by address: models, layers and calls are records (numpy structured arrays), so that there is one
compilation for every model, packing, family and cache.

How the work is shared. Products are shared by row groups of the weights: all rows of the call use a row group in one place,
so a weight is read once. Attention is shared by (tile of rows, key/value head); whichever thread is free takes the next
one. Where there are fewer than SPREAD of them for a thread, as in decoding with one key/value head, each is shared by spans
of positions, too, and the thread that finishes its last span merges them. What belongs to a row (norm, quantize, residual)
is shared by rows, with a barrier after it. With a single row, barriers would cost more than this work; then each thread
keeps a residual stream of its own and does all of it. Five barriers per layer remain (q k v, attention, o, gate up, down).

Sums: a product is exact in integers; everything else belongs to one row and is summed by one thread in one order. So
results depend neither on the number of threads nor on which rows are computed together.
"""

from bitdistill.kernels.cpu.activations import quantize_activation, quantize_activation_blocks, quantize_planes
from bitdistill.kernels.cpu.attention import (
    SPAN,
    attend,
    attend_span,
    finish_parts,
    first_span,
    merge_span,
    part_floats,
    prepare,
    tile_rows,
    write_position,
)
from bitdistill.kernels.cpu.compilation import jit
from bitdistill.kernels.cpu.elementwise import (
    add_rows,
    copy_floats,
    divide_rows,
    gated_activation,
    padded,
    rms_norm,
    rope_angles,
    rotate,
    scale_accumulators,
    scale_row,
)
from bitdistill.kernels.cpu.grouped import (
    finish_float_rows,
    finish_grouped,
    finish_rows,
    grouped_gemm,
    write_group_sums,
)
from bitdistill.kernels.cpu.matmul import gemm
from bitdistill.kernels.cpu.native import float32s, int64s, view_of
from bitdistill.kernels.cpu.records import (
    ACC_WORDS,
    ATTENTION,
    CALL,
    DOWN,
    EMBEDDING,
    GATE_UP,
    GROUP,
    HEAD,
    LAYER,
    MODEL,
    NORMS,
    PARTS,
    PROJECTION,
    QKV,
    SCRATCH,
    SPREAD,
    WAITING,
    O,
)
from bitdistill.kernels.cpu.tables import FP16, table_logits, table_row
from bitdistill.kernels.cpu.threads import barrier, begin_call, end_call, last_to_arrive, nanoseconds, next_ticket

_models, _calls, _scratches = view_of(MODEL, "_models"), view_of(CALL, "_calls"), view_of(SCRATCH, "_scratches")
_layers, _projections = view_of(LAYER, "_layers"), view_of(PROJECTION, "_projections")


@jit
def _lap(counter, since):
    """Adds the time since `since` to the int64 at `counter`; the time now. Nothing where nobody asked: since is 0."""
    if since == 0:
        return since
    now = nanoseconds()
    int64s(counter, 1)[0] += now - since
    return now


@jit
def _product(projection, tokens, records, record_bytes, out, out_stride, first, last, acc, scratch):
    """Row groups first .. last - 1 of ``(act_codes @ weight_codes.T) * (act_scale * weight_scale) + bias``."""
    act_blocks = projection["act_blocks"]
    at_once = max(1, ACC_WORDS // (GROUP * tokens))
    bias, scales, columns = projection["bias"], projection["scales"], projection["group_size"]
    for group in range(first, last, at_once):
        count = GROUP * min(at_once, last - group)
        row = GROUP * group
        if columns == 0 and act_blocks == 0:
            gemm(
                projection["weight"], projection["packing"], projection["in_features"], records, record_bytes, tokens,
                acc - 4 * row, count, group, group + count // GROUP, scratch,
            )  # fmt: skip
        else:
            grouped_gemm(
                projection["weight"], projection["packing"], projection["in_features"], 0 if columns == 0 else scales,
                columns, act_blocks, records, record_bytes, tokens, acc - 4 * row, count, group, group + count // GROUP,
                scratch,
            )  # fmt: skip
        for token in range(tokens):
            act_scale = float32s(records + token * record_bytes, 1)[0]
            source, target = acc + 4 * token * count, out + 4 * (token * out_stride + row)
            bias_at = bias + 4 * row if bias != 0 else 0
            if act_blocks != 0 and scales != 0 and columns == 0:
                finish_float_rows(source, scales + 2 * row, bias_at, count, target)
            elif act_blocks != 0:
                whole = projection["weight_scale"] if scales == 0 else act_scale  # which is 1
                finish_grouped(source, whole, bias_at, count, target)
            elif scales == 0:
                scale_accumulators(source, act_scale * projection["weight_scale"], bias_at, count, target)
            elif columns == 0:
                finish_rows(source, act_scale, scales + 2 * row, bias_at, count, target)
            else:
                finish_grouped(source, act_scale, bias_at, count, target)


@jit
def product(projection_at, tokens, records, record_bytes, out, out_stride, first, last, acc, scratch):
    """`_product` of one projection alone, in the calling thread.

    Args:
        projection_at: address of a PROJECTION record. tokens: how many. records, record_bytes: address of their quantized
            inputs, and bytes from one to the next. out, out_stride: address of float32 rows, and numbers from one to the next;
            row groups are written whole.
        first, last: row groups first .. last - 1. acc: address of max(ACC_WORDS, GROUP * tokens) int32. scratch: address of
            matmul.SCRATCH_BYTES bytes.
    """
    projection = _projections(projection_at, 1)[0]
    _product(projection, tokens, records, record_bytes, out, out_stride, first, last, acc, scratch)


@jit
def _quantize_input(projection, row, row2, record):
    """The quantized input of a projection from a row that is normalized already, through its SubLN where it has one."""
    if projection["own_codes"] == 0:
        return
    width = projection["in_features"]
    if projection["subln"] != 0:
        rms_norm(row, projection["subln"], projection["subln_eps"], width, row2)
        row = row2
    if projection["input_scale"] != 0:
        divide_rows(row, projection["input_scale"], width, row2)
        row = row2
    if projection["act_blocks"] != 0:
        quantize_activation_blocks(row, width, record)
        return
    quantize_activation(row, width, record)
    if projection["group_size"] != 0:
        write_group_sums(record, width, projection["group_size"])


@jit
def _groups(features):
    return (features + GROUP - 1) // GROUP


@jit
def _own_share(total, thread, threads):
    """First and last + 1 of a thread's share."""
    return total * thread // threads, total * (thread + 1) // threads


@jit
def _share(projection, start, stop, tokens, records, set_bytes, record_bytes, out, out_stride, acc, scratch):
    """Those of a projection's row groups that are among start .. stop - 1."""
    first, last = max(start, 0), min(stop, _groups(projection["out_features"]))
    if first < last:
        codes = records + projection["codes"] * set_bytes
        _product(projection, tokens, codes, record_bytes, out, out_stride, first, last, acc, scratch)


@jit
def _write_keys(model, layer, call, layer_index, row, head, qkv, qkv_stride, cos, sin, work):
    """Norm and RoPE of one key head of one row, and its place in the cache with the value's."""
    width = model["head_dim"]
    wide = padded(width)
    key, value = work, work + 4 * wide
    k = qkv + 4 * (row * qkv_stride + padded(layer["q"]["out_features"]))
    v = k + 4 * padded(layer["k"]["out_features"])
    copy_floats(k + 4 * head * width, key, width)
    copy_floats(v + 4 * head * width, value, width)
    for tail in (key, value):
        float32s(tail, wide)[width:] = 0
    if layer["k_norm"] != 0:
        rms_norm(key, layer["k_norm"], model["eps"], width, key)
    rotate(key, cos, sin, width // 2)
    slot, position = int64s(call["slots"], row + 1)[row], int64s(call["positions"], row + 1)[row]
    number = (layer_index * call["cache_slots"] + slot) * model["kv_heads"] + head
    write_position(call, number, position, key, value, width, value + 4 * wide)


@jit
def _prepare_queries(model, layer, row, rows, head, qkv, qkv_stride, cos, sin, work):
    """Norm, RoPE and scale of the queries of a tile of rows and one key/value head, as `attend` reads them."""
    width = model["head_dim"]
    wide, half = padded(width), width // 2
    group = model["heads"] // model["kv_heads"]
    for r in range(rows):
        for g in range(group):
            query = work + 4 * (r * group + g) * wide
            copy_floats(qkv + 4 * ((row + r) * qkv_stride + (head * group + g) * width), query, width)
            float32s(query, wide)[width:] = 0
            if layer["q_norm"] != 0:
                rms_norm(query, layer["q_norm"], model["eps"], width, query)
            rotate(query, cos + 4 * r * half, sin + 4 * r * half, half)
            scale_row(query, model["attention_scale"], width)


@jit
def _attend(model, layer, call_at, layer_index, row, rows, head, nth, spans, parts, arrived, attended, work):
    """Attention of a tile of rows with one key/value head, whose queries are in `work`; results to `attended`.

    Of more than one `spans`, it is that of the `nth` span of these rows alone: its part goes to `parts`, and the last one to
    arrive makes the result of all of them.
    """
    call, width, window = _calls(call_at, 1)[0], model["head_dim"], layer["window"]
    group = model["heads"] // model["kv_heads"]
    slot, position = int64s(call["slots"], row + 1)[row], int64s(call["positions"], row + 1)[row]
    number = (layer_index * call["cache_slots"] + slot) * model["kv_heads"] + head
    queries = rows * group
    if spans == 1:
        attend(call_at, number, position, rows, group, window, width, work)
    else:
        part_bytes, first = 4 * part_floats(queries, width), first_span(position, window)
        part = parts + nth * part_bytes
        prepare(call_at, queries, width, work)
        attend_span(call_at, number, position, rows, group, window, width, first + nth, part, work)
        if not last_to_arrive(arrived, spans):
            return
        whole = work + 4 * queries * padded(width)
        for span in range(spans):
            merge_span(parts + span * part_bytes, whole, first + span, position, queries, group, window, width)
        finish_parts(whole, queries, width, work)
    stride = padded(model["heads"] * width)
    for r in range(rows):
        for g in range(group):
            target = attended + 4 * ((row + r) * stride + (head * group + g) * width)
            copy_floats(work + 4 * (r * group + g) * padded(width), target, width)


@jit
def _spans(call, row, rows, window):
    """How many spans a tile of rows sees."""
    position = int64s(call["positions"], row + 1)[row]
    return (position + rows - 1) // SPAN + 1 - first_span(position, window)


@jit
def _cut_tiles(call, longest, tiles):
    """Cuts the rows into tiles of neighboring positions of one sequence; the first row of each, and the end."""
    rows = call["rows"]
    slots, positions, first = int64s(call["slots"], rows), int64s(call["positions"], rows), int64s(tiles, rows + 1)
    count = 0
    for row in range(rows):
        follows = row > 0 and slots[row] == slots[row - 1] and positions[row] == positions[row - 1] + 1
        if not follows or row - first[count - 1] == longest:
            first[count] = row
            count += 1
    first[count] = rows
    return count


@jit
def enter(state, thread, threads, seen, model_at, layers_at, call_at, scratch_at):
    """What every thread runs: the caller for one call, the others of a pool for all that come (pool.py).

    Args:
        state, thread, threads, seen: of pool.py. With one thread, state is not used.
        model_at, layers_at, call_at, scratch_at: addresses of a MODEL record, its LAYER records, a CALL and a SCRATCH.

    Returns: the number of calls seen.
    """
    model, call, scratch = _models(model_at, 1)[0], _calls(call_at, 1)[0], _scratches(scratch_at, 1)[0]
    layers = _layers(layers_at, model["layers"])
    while begin_call(state, thread, threads, seen):
        rows, hidden = call["rows"], model["hidden"]
        wide, half = padded(hidden), model["head_dim"] // 2
        alone = rows == 1  # then every thread does the row's own work for itself
        private = scratch["private"] + thread * scratch["private_bytes"]
        row_buffer, row_buffer2 = private + scratch["p_row"], private + scratch["p_row2"]
        acc, product, work = (
            private + scratch["p_acc"],
            private + scratch["p_product"],
            private + scratch["p_attention"],
        )
        record_bytes = scratch["record_bytes"]
        x, records, set_bytes = scratch["x"], scratch["records"], scratch["rows"] * record_bytes
        cos, sin, rope_rows = scratch["cos"], scratch["sin"], scratch["rows"]
        first_row, last_row = _own_share(rows, thread, threads)
        if alone:
            x, records, set_bytes = private + scratch["p_x"], private + scratch["p_records"], record_bytes
            cos, sin, rope_rows = private + scratch["p_cos"], private + scratch["p_sin"], 1
            first_row, last_row = 0, 1
        qkv, attended, gate, up, out = (
            scratch["qkv"],
            scratch["attended"],
            scratch["gate"],
            scratch["up"],
            scratch["out"],
        )
        profile = call["profile"] + 8 * len(PARTS) * thread
        since = nanoseconds() if call["profile"] != 0 else 0

        ids, positions = int64s(call["ids"], rows), int64s(call["positions"], rows)
        embedding = model["embedding"]
        for row in range(first_row, last_row):
            stream = x + 4 * row * wide
            table_row(embedding["weight"], embedding["scale"], embedding["format"], hidden, ids[row], stream)
            scale_row(stream, model["embedding_scale"], hidden)
            for rope in range(model["ropes"]):
                at = 4 * (rope * rope_rows + row) * half
                frequencies = model["inv_freq"] + 4 * rope * (half + 1)  # followed by their scaling
                scaling = float32s(frequencies + 4 * half, 1)[0]
                rope_angles(positions[row], frequencies, scaling, half, cos + at, sin + at)
        tiles = private + scratch["p_tiles"]
        group = model["heads"] // model["kv_heads"]
        tile_count = _cut_tiles(call, tile_rows(group), tiles)
        part_bytes = 4 * part_floats(min(rows, tile_rows(group)) * group, model["head_dim"])
        tile_starts = int64s(tiles, rows + 1)
        since = _lap(profile + EMBEDDING, since)

        for index in range(layers.size):
            layer = layers[index]
            q, k, v, o, up_, down = layer["q"], layer["k"], layer["v"], layer["o"], layer["up"], layer["down"]

            # norm, quantize | q k v
            for row in range(first_row, last_row):
                rms_norm(x + 4 * row * wide, layer["input_norm"], model["eps"], hidden, row_buffer)
                at = records + row * record_bytes
                _quantize_input(q, row_buffer, row_buffer2, at + q["codes"] * set_bytes)
                _quantize_input(k, row_buffer, row_buffer2, at + k["codes"] * set_bytes)
                _quantize_input(v, row_buffer, row_buffer2, at + v["codes"] * set_bytes)
            since = _lap(profile + NORMS, since)
            if not alone:
                barrier(state, threads)
                since = _lap(profile + WAITING, since)
            q_groups, k_groups, v_groups = (
                _groups(q["out_features"]),
                _groups(k["out_features"]),
                _groups(v["out_features"]),
            )
            start, stop = _own_share(q_groups + k_groups + v_groups, thread, threads)
            qkv_stride = GROUP * (q_groups + k_groups + v_groups)
            k_out = qkv + 4 * GROUP * q_groups
            v_out = k_out + 4 * GROUP * k_groups
            _share(q, start, stop, rows, records, set_bytes, record_bytes, qkv, qkv_stride, acc, product)
            start, stop = start - q_groups, stop - q_groups
            _share(k, start, stop, rows, records, set_bytes, record_bytes, k_out, qkv_stride, acc, product)
            start, stop = start - k_groups, stop - k_groups
            _share(v, start, stop, rows, records, set_bytes, record_bytes, v_out, qkv_stride, acc, product)
            since = _lap(profile + QKV, since)
            barrier(state, threads)
            since = _lap(profile + WAITING, since)

            # keys and values into the cache | attention
            kv_heads = model["kv_heads"]
            layer_cos, layer_sin = (
                cos + 4 * layer["rope"] * rope_rows * half,
                sin + 4 * layer["rope"] * rope_rows * half,
            )
            if not alone:
                start, stop = _own_share(rows * kv_heads, thread, threads)
                for unit in range(start, stop):
                    at = 4 * (unit // kv_heads) * half
                    _write_keys(
                        model, layer, call, index, unit // kv_heads, unit % kv_heads, qkv, qkv_stride,
                        layer_cos + at, layer_sin + at, work,
                    )  # fmt: skip
                since = _lap(profile + ATTENTION, since)
                barrier(state, threads)
                since = _lap(profile + WAITING, since)
            most, pairs = 1, tile_count * kv_heads
            if threads > 1 and pairs < SPREAD * threads:
                for tile in range(tile_count):
                    row = tile_starts[tile]
                    most = max(most, _spans(call, row, tile_starts[tile + 1] - row, layer["window"]))
            unit = next_ticket(state) if threads > 1 else 0
            while unit < most * pairs:
                pair, nth = unit // most, unit % most
                # Head by head, so that the keys and values of one stay in the second-level cache for all tiles of a prompt.
                tile, head = pair % tile_count, pair // tile_count
                row = tile_starts[tile]
                count = tile_starts[tile + 1] - row
                spans = _spans(call, row, count, layer["window"]) if most > 1 else 1
                if nth < spans:
                    if alone and nth == spans - 1:  # only the newest span reads them
                        _write_keys(model, layer, call, index, row, head, qkv, qkv_stride, layer_cos, layer_sin, work)
                    at = 4 * row * half
                    _prepare_queries(
                        model, layer, row, count, head, qkv, qkv_stride, layer_cos + at, layer_sin + at, work
                    )
                    _attend(
                        model, layer, call_at, index, row, count, head, nth, spans,
                        scratch["parts"] + pair * most * part_bytes, scratch["arrived"] + 8 * pair, attended, work,
                    )  # fmt: skip
                unit = next_ticket(state) if threads > 1 else unit + 1
            since = _lap(profile + ATTENTION, since)
            barrier(state, threads)
            since = _lap(profile + WAITING, since)

            # quantize | o
            for row in range(first_row, last_row):
                at = attended + 4 * row * padded(o["in_features"])
                _quantize_input(o, at, row_buffer2, records + row * record_bytes)
            since = _lap(profile + NORMS, since)
            if not alone:
                barrier(state, threads)
                since = _lap(profile + WAITING, since)
            start, stop = _own_share(_groups(hidden), thread, threads)
            _share(o, start, stop, rows, records, set_bytes, record_bytes, out, wide, acc, product)
            since = _lap(profile + O, since)
            barrier(state, threads)
            since = _lap(profile + WAITING, since)

            # residual, norm, quantize | gate up act
            gate_ = layer["gate"]
            for row in range(first_row, last_row):
                stream, branch = x + 4 * row * wide, out + 4 * row * wide
                if layer["post_attention_norm"] != 0:
                    rms_norm(branch, layer["post_attention_norm"], model["eps"], hidden, row_buffer)
                    branch = row_buffer
                add_rows(stream, branch, hidden)
                rms_norm(stream, layer["pre_mlp_norm"], model["eps"], hidden, row_buffer)
                at = records + row * record_bytes
                _quantize_input(gate_, row_buffer, row_buffer2, at + gate_["codes"] * set_bytes)
                _quantize_input(up_, row_buffer, row_buffer2, at + up_["codes"] * set_bytes)
            since = _lap(profile + NORMS, since)
            if not alone:
                barrier(state, threads)
                since = _lap(profile + WAITING, since)
            start, stop = _own_share(_groups(model["intermediate"]), thread, threads)
            middle = padded(model["intermediate"])
            _share(gate_, start, stop, rows, records, set_bytes, record_bytes, gate, middle, acc, product)
            _share(up_, start, stop, rows, records, set_bytes, record_bytes, up, middle, acc, product)
            for row in range(rows):
                at = 4 * (row * middle + GROUP * start)
                gated_activation(gate + at, up + at, model["activation"], GROUP * (stop - start))
            since = _lap(profile + GATE_UP, since)
            barrier(state, threads)
            since = _lap(profile + WAITING, since)

            # quantize | down
            for row in range(first_row, last_row):
                _quantize_input(down, gate + 4 * row * middle, row_buffer2, records + row * record_bytes)
            since = _lap(profile + NORMS, since)
            if not alone:
                barrier(state, threads)
                since = _lap(profile + WAITING, since)
            start, stop = _own_share(_groups(hidden), thread, threads)
            _share(down, start, stop, rows, records, set_bytes, record_bytes, out, wide, acc, product)
            since = _lap(profile + DOWN, since)
            barrier(state, threads)
            since = _lap(profile + WAITING, since)

            # residual
            for row in range(first_row, last_row):
                branch = out + 4 * row * wide
                if layer["post_mlp_norm"] != 0:
                    rms_norm(branch, layer["post_mlp_norm"], model["eps"], hidden, row_buffer)
                    branch = row_buffer
                add_rows(x + 4 * row * wide, branch, hidden)

        # norm, quantize | head, for the rows that are wanted
        wanted_rows = call["wanted_rows"]
        since = _lap(profile + NORMS, since)
        if wanted_rows > 0:
            head_table = model["head"]
            normed = out
            first, last = _own_share(wanted_rows, thread, threads)
            if alone:
                normed, first, last = row_buffer, 0, 1
            else:
                barrier(state, threads)  # the rows of other threads
            wanted = int64s(call["wanted"], wanted_rows)
            for n in range(first, last):
                rms_norm(x + 4 * wanted[n] * wide, model["final_norm"], model["eps"], hidden, normed + 4 * n * wide)
                if head_table["format"] != FP16:
                    quantize_planes(normed + 4 * n * wide, hidden, records + 2 * n * record_bytes, record_bytes)
            since = _lap(profile + NORMS, since)
            if not alone:
                barrier(state, threads)
                since = _lap(profile + WAITING, since)
            start, stop = _own_share(_groups(model["vocabulary"]), thread, threads)
            table_logits(
                head_table["weight"], head_table["scale"], head_table["format"], model["vocabulary"], hidden, normed, wide,
                records, record_bytes, wanted_rows, call["logits"], model["vocabulary"], start, stop, product,
            )  # fmt: skip
            _lap(profile + HEAD, since)
        seen = end_call(state, thread, threads, seen)
        if thread == 0:
            break
    return seen
