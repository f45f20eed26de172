#include "forward.h"

#include <algorithm>

namespace xfast {
namespace {

// Attention costs this many times more per multiply-add than the products of the precision do.
double attention_weight(Precision p) { return is_quantised(p) ? 4.0 : p == Precision::kBf16 ? 2.5 : 1.5; }

// Ends of `threads` runs of rows of about equal cost. A row's cost: its share of the products, plus attention over
// its sequence (2 * 2 * length * hidden against 24 * hidden^2 operations a layer). An end that comes close to the end
// of a sequence moves there, so that no sequence is cut.
std::vector<int64_t> balanced_ends(const RowSet& set, const ForwardArgs& args, const EncoderShape& shape,
                                   Precision precision, int threads) {
  const double linear = 8.0 * shape.hidden + 4.0 * shape.intermediate;
  const int64_t close = set.rows / (40 * threads);
  const auto row_cost = [&](const Segment& s) {
    const double length = args.cu_seqlens[s.sequence + 1] - args.cu_seqlens[s.sequence];
    return linear + 4.0 * length * attention_weight(precision);
  };
  double total = 0;
  for (const Segment& s : set.segments) total += row_cost(s) * (s.end - s.begin);
  std::vector<int64_t> ends;
  double before = 0;
  size_t i = 0;
  for (int t = 1; t < threads; ++t) {
    const double goal = total * t / threads;
    while (i < set.segments.size()) {
      const Segment& s = set.segments[i];
      const double cost = row_cost(s) * (s.end - s.begin);
      if (before + cost >= goal) break;
      before += cost;
      ++i;
    }
    const Segment& s = set.segments[std::min(i, set.segments.size() - 1)];
    const int64_t inside = static_cast<int64_t>((goal - before) / row_cost(s));
    int64_t end = std::clamp(s.begin + inside, s.begin, s.end);
    if (end - s.begin <= close)
      end = s.begin;
    else if (s.end - end <= close)
      end = s.end;
    ends.push_back(end);
  }
  ends.push_back(set.rows);
  return ends;
}

// Rows [begin, end) of segments [first, last) as one group of about equal blocks.
void add_group(RowSet& set, int owner, int64_t begin, int64_t end, size_t first, size_t last, bool shared) {
  const int64_t rows = end - begin, count = rows <= set.block_rows.most ? 1 : ceil_div(rows, set.block_rows.usual);
  const size_t first_block = set.blocks.size();
  for (int64_t b = 0; b < count; ++b)
    set.blocks.push_back({begin + rows * b / count, begin + rows * (b + 1) / count, owner, {}});
  set.groups.push_back({begin, end, first_block, set.blocks.size(), first, last, owner, shared});
  set.any_shared |= shared;
}

// One thread's rows [begin, end) as groups. `segment` is the first segment that ends after `begin`; returns the first
// one that ends after `end`.
size_t add_groups(RowSet& set, int owner, int64_t begin, int64_t end, size_t segment) {
  const auto is_cut = [&](const Segment& s) { return s.begin < begin || s.end > end; };
  int64_t whole = 0, rows = 0;  // rows of uncut sequences: of all, and of the open group [first, segment)
  for (size_t i = segment; i < set.segments.size() && set.segments[i].begin < end; ++i)
    if (!is_cut(set.segments[i])) whole += set.segments[i].end - set.segments[i].begin;
  const int64_t usual = set.block_rows.usual, share = whole / std::max<int64_t>(1, (whole + usual / 2) / usual);
  size_t first = segment;
  const auto close = [&] {
    if (rows > 0)
      add_group(set, owner, set.segments[first].begin, set.segments[segment - 1].end, first, segment, false);
    rows = 0;
    first = segment;
  };
  for (; segment < set.segments.size() && set.segments[segment].begin < end; ++segment) {
    const Segment& s = set.segments[segment];
    if (is_cut(s)) {
      close();
      add_group(set, owner, std::max(s.begin, begin), std::min(s.end, end), segment, segment + 1, true);
      if (s.end > end) return segment;
      first = segment + 1;
      continue;
    }
    // Groups of about equal size: a sequence goes to the group whose share it brings nearer.
    if (rows + (s.end - s.begin) / 2 > share) close();
    rows += s.end - s.begin;
  }
  close();
  return segment;
}

Operand take_operand(Carver& carver, const OperandNeeds& needs, int64_t rows, int64_t features) {
  const int64_t capacity = operand_capacity(rows);
  Operand operand;
  operand.chunk_stride = capacity * kChunkBytes;
  operand.data = carver.take<uint8_t>(operand.chunk_stride * ceil_div(features * needs.bytes_per_element, kChunkBytes));
  if (needs.scales) operand.scale = carver.take<float>(rows);
  if (needs.smallest_group > 0) operand.sums = carver.take<int32_t>(operand_sums(rows, features, needs.smallest_group));
  return operand;
}

void lay_out(RowSet& set, Carver& carver, const EncoderShape& shape, const OperandNeeds& needs) {
  set.x = carver.take<float>(set.rows * row_stride(shape.hidden));
  for (Block& block : set.blocks) block.operand = take_operand(carver, needs, block.end - block.begin, shape.hidden);
}

void cut(RowSet& set, const ForwardArgs& args, const EncoderShape& shape, Precision precision) {
  set.by_columns = set.rows <= kColumnRows;
  set.blocks.clear();
  set.groups.clear();
  set.any_shared = false;
  if (set.by_columns) {
    set.blocks.push_back({0, set.rows, 0, {}});
    set.groups.push_back({0, set.rows, 0, 1, 0, set.segments.size(), 0, true});
    return;
  }
  const std::vector<int64_t> ends = balanced_ends(set, args, shape, precision, args.threads);
  int64_t begin = 0;
  size_t segment = 0;
  for (int t = 0; t < static_cast<int>(ends.size()); ++t) {
    if (ends[t] > begin) segment = add_groups(set, t, begin, ends[t], segment);
    begin = std::max(begin, ends[t]);
  }
}

}  // namespace

int64_t ForwardPlan::build(const EncoderShape& shape, Precision precision, const OperandNeeds& needs,
                           const BlockRows& sizes, const ForwardArgs& args, uint8_t* base) {
  Carver carver(base);
  all.block_rows = selected.block_rows = sizes;
  ld = row_stride(shape.hidden), ld_qkv = row_stride(3 * shape.hidden), ld_ffn = row_stride(shape.intermediate);
  all.rows = args.cu_seqlens[args.sequences];
  all.segments.clear();
  for (int64_t s = 0; s < args.sequences; ++s)
    if (args.cu_seqlens[s + 1] > args.cu_seqlens[s])
      all.segments.push_back({args.cu_seqlens[s], args.cu_seqlens[s + 1], s});
  cut(all, args, shape, precision);
  lay_out(all, carver, shape, needs);

  selected.rows = args.rows != nullptr ? args.row_count : 0;
  if (selected.rows > 0) {
    selected.segments.clear();
    size_t sequence = 0;
    for (int64_t i = 0; i < selected.rows; ++i) {
      while (args.rows[i] >= all.segments[sequence].end) ++sequence;
      const int64_t id = all.segments[sequence].sequence;
      if (!selected.segments.empty() && selected.segments.back().sequence == id)
        selected.segments.back().end = i + 1;
      else
        selected.segments.push_back({i, i + 1, id});
    }
    cut(selected, args, shape, precision);
    lay_out(selected, carver, shape, needs);
    selected_q = carver.take<float>(selected.rows * ld);
  }
  for (float*& buffer : qkv) buffer = carver.take<float>(all.rows * ld_qkv);

  // Scratch per thread; in columns mode all threads work on thread 0's.
  int64_t block_rows = 0, group_rows = 0, segment_rows = 0;
  for (const RowSet* set : {&all, &selected}) {
    for (const Block& block : set->blocks) block_rows = std::max(block_rows, block.end - block.begin);
    for (const Group& group : set->groups) group_rows = std::max(group_rows, group.end - group.begin);
    for (const Segment& segment : set->segments) segment_rows = std::max(segment_rows, segment.end - segment.begin);
  }
  const int64_t wide_floats = std::max(group_rows * ld_qkv, needs.apart ? block_rows * ld_ffn : int64_t{0});
  wide.clear();
  ctx.clear();
  normed.clear();
  ffn_operand.clear();
  attention.clear();
  for (int t = 0; t < args.threads; ++t) {
    wide.push_back(carver.take<float>(wide_floats));
    ctx.push_back(carver.take<float>(group_rows * ld));
    normed.push_back(carver.take<float>(shape.pre_norm ? ld : 0));
    ffn_operand.push_back(take_operand(carver, needs, block_rows, shape.intermediate));
    attention.push_back(carver.take<float>(attention_scratch_floats(shape.head_dim, segment_rows)));
  }
  return carver.used();
}

}  // namespace xfast
