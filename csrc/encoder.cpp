#include "encoder.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "forward.h"
#include "thread_pool.h"

namespace xfast {
namespace {

// Whether a layer's first FFN product can write the operand of the second itself: no row scale is needed, and both have
// the same layout.
bool writes_operand(const Layer& layer) {
  return layer.ffn_in.precision() == layer.ffn_out.precision() && !is_quantised(layer.ffn_in.precision());
}

// Attention's input was computed from 8 significant bits: 16 are enough for its products.
bool in_int16(const Layer& layer) { return layer.qkv.precision() != Precision::kFp32; }

// One thread's part of a forward call; forward.h explains the two modes.
class Worker {
 public:
  Worker(const Encoder& encoder, const ForwardArgs& args, const ForwardPlan& plan, const Member& member)
      : encoder_(encoder),
        shape_(encoder.shape()),
        kernels_(encoder.kernels()),
        args_(args),
        plan_(plan),
        member_(member),
        head_panels_(shape_.head_dim % kPanel == 0) {}

  void run() {
    embed();
    const bool select = plan_.selected.rows > 0;
    for (int64_t l = 0; l < args_.layers; ++l) {
      if (select && l + 1 == args_.layers) {
        selected_layer(l, plan_.qkv[l % 2]);
        return copy_out(plan_.selected);
      }
      if (plan_.all.by_columns)
        columns_layer(l, plan_.qkv[l % 2]);
      else
        rows_layer(l, plan_.qkv[l % 2]);
      keep_hidden_state(l + 1);
    }
    if (!select) return copy_out(plan_.all);
    sync();  // no layer ran: the wanted rows are rows of the embeddings
    for (int64_t i = member_.id; i < plan_.selected.rows; i += member_.count)
      copy_row(args_.out + i * shape_.hidden, plan_.all.x + args_.rows[i] * plan_.ld);
  }

 private:
  Range share(int64_t begin, int64_t end) const { return xfast::share(member_, begin, end); }
  // This thread's part of [begin, end): all of it where rows are shared out instead.
  Range part_of(const RowSet& set, int64_t begin, int64_t end) const {
    return set.by_columns ? share(begin, end) : Range{begin, end};
  }
  void sync() const { member_.barrier->wait(); }
  void sync(const RowSet& set) const {
    if (set.by_columns) sync();
  }
  void copy_row(float* to, const float* from) const { std::memcpy(to, from, shape_.hidden * sizeof(float)); }

  // This thread's rows of a block (rows mode: all of them), relative to the block.
  Range rows_of(const RowSet& set, const Block& block) const { return part_of(set, 0, block.end - block.begin); }
  template <class F>
  void for_blocks(const RowSet& set, F&& body) const {
    for (const Block& block : set.blocks)
      if (set.by_columns || block.owner == member_.id) body(block);
  }
  template <class F>
  void for_groups(const RowSet& set, F&& body) const {
    for (const Group& group : set.groups)
      if (group.owner == member_.id) body(group);
  }
  int scratch(const RowSet& set) const { return set.by_columns ? 0 : member_.id; }

  void embed() const {
    const RowSet& set = plan_.all;
    const TableView* tables = encoder_.tables();
    for_blocks(set, [&](const Block& block) {
      const Range rows = rows_of(set, block);
      kernels_.embed({tables[0], tables[1], tables[2], args_.ids, args_.embeds, args_.position_ids, args_.type_ids,
                      set.x, plan_.ld, block.begin + rows.begin, block.begin + rows.end, shape_.hidden});
      prepare(set, block, rows, 0);
    });
    sync(set);
    keep_hidden_state(0);
  }

  // After `done` layers: the LayerNorm that comes now, and the operand of the next layer's QKV.
  // Pre-norm: the last layer's output is normalised. When fewer layers are asked for, x stays as it is.
  void prepare(const RowSet& set, const Block& block, Range rows, int64_t done) const {
    const std::vector<Layer>& layers = encoder_.layers();
    const bool more = done < args_.layers;
    const InputFormat format = more ? layers[done].qkv.input() : InputFormat{};
    if (shape_.pre_norm && more)
      normalize_apart(set, block, rows, layers[done].attention_norm, format);
    else if (!shape_.pre_norm || done == shape_.layers)
      normalize(set, block, rows, shape_.pre_norm || done == 0 ? encoder_.outer_norm() : layers[done - 1].ffn_norm,
                more ? block.operand : Operand{}, format);
  }

  // x = LN(x), and its operand (or none) in `format`.
  void normalize(const RowSet& set, const Block& block, Range rows, const Norm& norm, const Operand& operand,
                 const InputFormat& format) const {
    float* x = set.x + block.begin * plan_.ld;
    kernels_.layer_norm({format, x, plan_.ld, x, plan_.ld, rows.begin, rows.end, shape_.hidden, norm.gamma.data(),
                         norm.beta.data(), shape_.eps, operand});
  }
  // The operand of LN(x); x stays, it is the residual stream.
  void normalize_apart(const RowSet& set, const Block& block, Range rows, const Norm& norm,
                       const InputFormat& format) const {
    kernels_.layer_norm({format, set.x + block.begin * plan_.ld, plan_.ld, plan_.normed[member_.id], 0, rows.begin,
                         rows.end, shape_.hidden, norm.gamma.data(), norm.beta.data(), shape_.eps, block.operand});
  }

  // Output panels [begin, end) of linear(block's operand) -> out (row 0 = the block's first row).
  void multiply(const Block& block, const Operand& a, const PackedLinear& linear, Range panels, Epilogue epilogue,
                float* out, int64_t ldo, const PackedLinear* next, const Operand& out_operand = {}) const {
    if (panels.begin >= panels.end) return;
    GemmArgs gemm{linear.precision(),
                  a,
                  block.end - block.begin,
                  linear.view(),
                  panels.begin,
                  panels.end,
                  epilogue,
                  out,
                  ldo,
                  out,
                  out_operand,
                  nullptr,
                  0};
    if (next != nullptr) {
      const LinearView view = next->view();
      gemm.next = view.data + first_panel(*next) * view.panel_bytes;
      gemm.next_bytes = view.panel_bytes;
    }
    kernels_.gemm(gemm);
  }
  int64_t first_panel(const PackedLinear& linear) const {
    return plan_.all.by_columns ? share(0, panels_for(linear.out_features())).begin : 0;
  }
  Range panels_of(const RowSet& set, const PackedLinear& linear) const {
    return part_of(set, 0, panels_for(linear.out_features()));
  }

  // Queries, keys and values: row r of the packed tokens at q + (r - first) * ldq, keys at kv + hidden likewise.
  struct Projected {
    const float* q;
    int64_t ldq, q_first;
    const float* kv;
    int64_t kv_first;
  };
  Projected projected(const float* qkv, int64_t first) const { return {qkv, plan_.ld_qkv, first, qkv, first}; }

  // Few rows: the outputs are split, queries, keys and values by head, so that each thread then attends to just the
  // heads that it computed.
  void columns_layer(int64_t index, float* qkv) const {
    const Layer& layer = encoder_.layers()[index];
    const RowSet& set = plan_.all;
    const Block& block = set.blocks[0];
    const Range heads = share(0, shape_.heads);
    if (head_panels_) {
      const int64_t per_head = shape_.head_dim / kPanel, section = shape_.hidden / kPanel;
      for (int64_t s = 0; s < 3; ++s)
        multiply(block, block.operand, layer.qkv,
                 {s * section + heads.begin * per_head, s * section + heads.end * per_head}, Epilogue::kBias, qkv,
                 plan_.ld_qkv, s == 2 ? &layer.attention_out : nullptr);
    } else {
      multiply(block, block.operand, layer.qkv, panels_of(set, layer.qkv), Epilogue::kBias, qkv, plan_.ld_qkv,
               &layer.attention_out);
      sync();
    }
    attend(set, set.groups[0], heads, projected(qkv, 0), layer);
    sync();
    finish_group(set, set.groups[0], index, qkv_after(index));
  }

  // Many rows: group by group through the whole layer. Sequences shared with another thread begin before and end after
  // all others, so that their keys are there when they are needed.
  void rows_layer(int64_t index, float* shared_qkv) const {
    const Layer& layer = encoder_.layers()[index];
    const RowSet& set = plan_.all;
    const PackedLinear* after = qkv_after(index);
    for_groups(set, [&](const Group& group) {
      if (group.shared) project(group, layer, shared_qkv + group.begin * plan_.ld_qkv, layer.qkv);
    });
    for_groups(set, [&](const Group& group) {
      if (group.shared) return;
      float* qkv = plan_.wide[member_.id];
      project(group, layer, qkv, layer.attention_out);
      attend(set, group, {0, shape_.heads}, projected(qkv, group.begin), layer);
      const Group* following = &group == &set.groups.back() ? nullptr : &group + 1;
      const bool more = following != nullptr && following->owner == member_.id && !following->shared;
      finish_group(set, group, index, more ? &layer.qkv : after);
    });
    if (!set.any_shared) return;
    sync();
    for_groups(set, [&](const Group& group) {
      if (!group.shared) return;
      attend(set, group, {0, shape_.heads}, projected(shared_qkv, 0), layer);
      finish_group(set, group, index, after);
    });
  }

  // The weights that are read after a layer, or null.
  const PackedLinear* qkv_after(int64_t index) const {
    return index + 1 < args_.layers ? &encoder_.layers()[index + 1].qkv : nullptr;
  }

  // QKV of a group's rows -> out [group rows, ld_qkv]. `next`: the weights that are read after these.
  void project(const Group& group, const Layer& layer, float* out, const PackedLinear& next) const {
    for (size_t b = group.first_block; b < group.last_block; ++b) {
      const Block& block = plan_.all.blocks[b];
      const bool last = b + 1 == group.last_block;
      multiply(block, block.operand, layer.qkv, panels_of(plan_.all, layer.qkv), Epilogue::kBias,
               out + (block.begin - group.begin) * plan_.ld_qkv, plan_.ld_qkv, last ? &next : &layer.qkv);
    }
  }

  // Attention of the group's queries -> ctx scratch [group rows, ld].
  void attend(const RowSet& set, const Group& group, Range heads, const Projected& p, const Layer& layer) const {
    if (heads.begin >= heads.end) return;
    const int64_t hidden = shape_.hidden, ld = plan_.ld_qkv;
    for (size_t i = group.first_segment; i < group.last_segment; ++i) {
      const Segment& segment = set.segments[i];
      const int64_t begin = std::max(segment.begin, group.begin), end = std::min(segment.end, group.end);
      const int64_t first_key = args_.cu_seqlens[segment.sequence];
      const float* kv = p.kv + (first_key - p.kv_first) * ld;
      kernels_.attention({p.q + (begin - p.q_first) * p.ldq, p.ldq, end - begin, kv + hidden, kv + 2 * hidden, ld,
                          args_.cu_seqlens[segment.sequence + 1] - first_key, static_cast<int>(heads.begin),
                          static_cast<int>(heads.end), static_cast<int>(shape_.head_dim),
                          1.0f / std::sqrt(static_cast<float>(shape_.head_dim)), in_int16(layer),
                          plan_.ctx[scratch(set)] + (begin - group.begin) * plan_.ld, plan_.ld,
                          plan_.attention[member_.id]});
    }
  }

  void finish_group(const RowSet& set, const Group& group, int64_t index, const PackedLinear* next) const {
    for (size_t b = group.first_block; b < group.last_block; ++b)
      finish_block(set, set.blocks[b], plan_.ctx[scratch(set)] + (set.blocks[b].begin - group.begin) * plan_.ld, index,
                   b + 1 == group.last_block ? next : &encoder_.layers()[index].attention_out);
  }

  // After attention: output projection + residual + norm, FFN + residual + norm, of one block in cache.
  void finish_block(const RowSet& set, const Block& block, const float* ctx, int64_t index,
                    const PackedLinear* next) const {
    const Layer& layer = encoder_.layers()[index];
    const int64_t hidden = shape_.hidden, inner = shape_.intermediate;
    const Operand& ffn_operand = plan_.ffn_operand[scratch(set)];
    const bool direct = writes_operand(layer);
    float* ffn = direct ? nullptr : plan_.wide[scratch(set)];
    const Range rows = rows_of(set, block);
    float* x = set.x + block.begin * plan_.ld;
    kernels_.to_operand({layer.attention_out.input(), ctx, plan_.ld, rows.begin, rows.end, hidden, block.operand});
    sync(set);
    multiply(block, block.operand, layer.attention_out, panels_of(set, layer.attention_out), Epilogue::kBiasResidual, x,
             plan_.ld, &layer.ffn_in);
    sync(set);
    if (shape_.pre_norm)
      normalize_apart(set, block, rows, layer.ffn_norm, layer.ffn_in.input());
    else
      normalize(set, block, rows, layer.attention_norm, block.operand, layer.ffn_in.input());
    sync(set);
    multiply(block, block.operand, layer.ffn_in, panels_of(set, layer.ffn_in), Epilogue::kBiasGelu, ffn, plan_.ld_ffn,
             &layer.ffn_out, direct ? ffn_operand : Operand{});
    sync(set);
    if (!direct) {
      kernels_.to_operand({layer.ffn_out.input(), ffn, plan_.ld_ffn, rows.begin, rows.end, inner, ffn_operand});
      sync(set);
    }
    multiply(block, ffn_operand, layer.ffn_out, panels_of(set, layer.ffn_out), Epilogue::kBiasResidual, x, plan_.ld,
             next);
    sync(set);
    prepare(set, block, rows, index + 1);
    sync(set);
  }

  // The last layer when only some rows are read: keys and values of all rows, everything else of those rows.
  void selected_layer(int64_t index, float* qkv) const {
    const Layer& layer = encoder_.layers()[index];
    const RowSet &all = plan_.all, &set = plan_.selected;
    const int64_t hidden = shape_.hidden, ld = plan_.ld_qkv;
    // Panel that holds the first key; queries before it in the same panel are computed in vain when hidden % 32 != 0.
    const int64_t key_panel = hidden / kPanel, panels = panels_for(3 * hidden);
    for_blocks(all, [&](const Block& block) {
      multiply(block, block.operand, layer.qkv, part_of(all, key_panel, panels), Epilogue::kBias,
               qkv + block.begin * ld, ld, nullptr);
    });
    sync();
    for_blocks(set, [&](const Block& block) {
      const Range rows = rows_of(set, block);
      for (int64_t i = block.begin + rows.begin; i < block.begin + rows.end; ++i)
        copy_row(set.x + i * plan_.ld, all.x + args_.rows[i] * plan_.ld);
      if (shape_.pre_norm)
        normalize_apart(set, block, rows, layer.attention_norm, layer.qkv.input());
      else
        kernels_.to_operand(
            {layer.qkv.input(), set.x + block.begin * plan_.ld, plan_.ld, rows.begin, rows.end, hidden, block.operand});
    });
    sync();
    query_rows(layer.qkv);
    sync();
    const Projected p{plan_.selected_q, plan_.ld, 0, qkv, 0};
    if (set.by_columns) {
      attend(set, set.groups[0], share(0, shape_.heads), p, layer);
      sync();
      finish_group(set, set.groups[0], index, nullptr);
      return;
    }
    for_groups(set, [&](const Group& group) {
      attend(set, group, {0, shape_.heads}, p, layer);
      finish_group(set, group, index, nullptr);
    });
  }

  // Queries of the selected rows -> plan.selected_q [rows, ld]: the first `hidden` outputs of the QKV product.
  void query_rows(const PackedLinear& linear) const {
    const RowSet& set = plan_.selected;
    LinearView queries = linear.view();
    queries.out_features = shape_.hidden;  // masks the keys that share the last panel
    for_blocks(set, [&](const Block& block) {
      const Range range = part_of(set, 0, panels_for(shape_.hidden));
      if (range.begin >= range.end) return;
      float* out = plan_.selected_q + block.begin * plan_.ld;
      kernels_.gemm({linear.precision(),
                     block.operand,
                     block.end - block.begin,
                     queries,
                     range.begin,
                     range.end,
                     Epilogue::kBias,
                     out,
                     plan_.ld,
                     nullptr,
                     {},
                     nullptr,
                     0});
    });
  }

  template <class F>
  void for_my_rows(const RowSet& set, F&& body) const {
    for_blocks(set, [&](const Block& block) {
      const Range rows = rows_of(set, block);
      for (int64_t row = block.begin + rows.begin; row < block.begin + rows.end; ++row) body(row);
    });
  }
  void keep_hidden_state(int64_t index) const {
    if (args_.hidden_states == nullptr) return;
    float* out = args_.hidden_states + index * plan_.all.rows * shape_.hidden;
    for_my_rows(plan_.all, [&](int64_t row) { copy_row(out + row * shape_.hidden, plan_.all.x + row * plan_.ld); });
  }
  void copy_out(const RowSet& set) const {
    for_my_rows(set, [&](int64_t row) { copy_row(args_.out + row * shape_.hidden, set.x + row * plan_.ld); });
  }

  const Encoder& encoder_;
  const EncoderShape& shape_;
  const KernelTable& kernels_;
  const ForwardArgs& args_;
  const ForwardPlan& plan_;
  const Member& member_;
  const bool head_panels_;  // heads are whole weight panels
};

}  // namespace

Encoder::Encoder(const EncoderShape& shape, Precision precision, const KernelTable& kernels)
    : shape_(shape), precision_(precision), kernels_(kernels) {
  for (int64_t l = 0; l < shape.layers; ++l) {
    Layer layer;
    layer.qkv = PackedLinear(precision, kDefaultGroup, 3 * shape.hidden, shape.hidden);
    layer.attention_out = PackedLinear(precision, kDefaultGroup, shape.hidden, shape.hidden);
    layer.ffn_in = PackedLinear(precision, kDefaultGroup, shape.intermediate, shape.hidden);
    layer.ffn_out = PackedLinear(precision, kDefaultGroup, shape.hidden, shape.intermediate);
    layers_.push_back(std::move(layer));
  }
}

OperandNeeds Encoder::needs() const {
  OperandNeeds needs;
  for (const Layer& layer : layers_) {
    needs.apart |= !writes_operand(layer);
    for (const PackedLinear* linear : {&layer.qkv, &layer.attention_out, &layer.ffn_in, &layer.ffn_out}) {
      const int64_t bytes = kChunkBytes / chunk_elements(linear->precision());
      needs.bytes_per_element = std::max(needs.bytes_per_element, bytes);
      needs.scales |= is_quantised(linear->precision());
      const int64_t group = linear->group();
      if (group > 0 && (needs.smallest_group == 0 || group < needs.smallest_group)) needs.smallest_group = group;
    }
  }
  return needs;
}

void Encoder::set_tables(TableView word, TableView position, TableView type) {
  tables_[0] = word;
  tables_[1] = position;
  tables_[2] = type;
}

void Encoder::quantize_word_table(int threads) {
  word_table_ = QuantizedTable(tables_[0], shape_.vocab, shape_.hidden, threads);
  tables_[0] = word_table_.view();
}

bool Encoder::complete() const {
  const auto set = [](const Norm& norm) { return !norm.gamma.empty(); };
  if (tables_[0].data == nullptr || !set(outer_norm_)) return false;
  return std::all_of(layers_.begin(), layers_.end(), [&](const Layer& l) {
    return l.qkv.complete() && l.attention_out.complete() && l.ffn_in.complete() && l.ffn_out.complete() &&
           set(l.attention_norm) && set(l.ffn_norm);
  });
}

int64_t Encoder::packed_bytes() const {
  int64_t bytes = word_table_.bytes();
  for (const Layer& l : layers_)
    bytes += l.qkv.bytes() + l.attention_out.bytes() + l.ffn_in.bytes() + l.ffn_out.bytes() + 16 * shape_.hidden;
  return bytes;
}

AlignedBuffer Encoder::acquire_workspace(int64_t bytes) const {
  {
    // try_lock: a lock held by another thread at fork() must not hang the child.
    std::unique_lock<std::mutex> lock(workspace_mutex_, std::try_to_lock);
    if (lock.owns_lock() && !free_workspaces_.empty()) {
      AlignedBuffer buffer = std::move(free_workspaces_.back());
      free_workspaces_.pop_back();
      if (buffer.bytes() >= bytes) return buffer;
    }
  }
  return AlignedBuffer(bytes);
}

void Encoder::release_workspace(AlignedBuffer buffer, int64_t needed) const {
  constexpr size_t kKeep = 4;
  constexpr int64_t kSmall = int64_t{16} << 20;  // not worth giving back
  std::unique_lock<std::mutex> lock(workspace_mutex_, std::try_to_lock);
  if (!lock.owns_lock()) return;
  // A largest call that is forgotten, by half in eleven calls: the memory of one giant batch goes back soon after it.
  recent_need_ = std::max(needed, recent_need_ - recent_need_ / 16);
  const auto too_large = [&](const AlignedBuffer& one) { return one.bytes() > std::max(kSmall, 4 * recent_need_); };
  auto& free = free_workspaces_;
  free.erase(std::remove_if(free.begin(), free.end(), too_large), free.end());
  if (free.size() < kKeep && !too_large(buffer)) free.push_back(std::move(buffer));
}

void Encoder::forward(const ForwardArgs& given) const {
  if (given.cu_seqlens[given.sequences] == 0 || (given.rows != nullptr && given.row_count == 0)) return;
  const Team team(given.threads);
  ForwardArgs args = given;
  args.threads = team.size();
  ForwardPlan plan;
  const OperandNeeds operands = needs();
  const BlockRows& rows = kernels_.block_rows;
  const int64_t needed = plan.build(shape_, precision_, operands, rows, args, nullptr);
  AlignedBuffer workspace = acquire_workspace(needed);
  plan.build(shape_, precision_, operands, rows, args, workspace.data());
  team.run([&](const Member& member) { Worker(*this, args, plan, member).run(); });
  release_workspace(std::move(workspace), needed);
}

}  // namespace xfast
