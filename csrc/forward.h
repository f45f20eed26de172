// The plan of one forward call: which rows each thread owns, and where everything lies in the workspace.
//
// Two ways to share the work, by number of rows:
//   rows     (many rows)  each thread owns a run of tokens, cut into groups of whole sequences. A group goes through a
//                         whole layer at once - QKV, attention, FFN - while it lies in the thread's L2 cache, in
//                         scratch memory that the next group uses again. Only a sequence that the cut between two
//                         threads runs through needs the other thread's keys: its QKV come first, its attention last,
//                         and the one barrier a layer lies between, where nobody waits long.
//   columns  (few rows)   one block; threads split the outputs of every product (by head for QKV), so that each
//                         weight is read once. A barrier after every phase.
#pragma once

#include <vector>

#include "encoder.h"

namespace xfast {

constexpr int64_t kColumnRows = 112;  // up to here the columns are split

struct Block {
  int64_t begin, end;
  int owner;       // thread that computes it (rows mode)
  Operand operand; // of the block's rows of x, row 0 = begin
};

// Consecutive query rows that belong to one sequence.
struct Segment {
  int64_t begin, end;
  int64_t sequence;
};

// Rows of one thread that go through a layer together. `shared`: parts of sequences that other threads hold the rest
// of (their queries, keys and values lie in ForwardPlan::qkv); otherwise whole sequences.
struct Group {
  int64_t begin, end;
  size_t first_block, last_block;      // blocks [first, last)
  size_t first_segment, last_segment;  // segments [first, last) that rows belong to
  int owner;
  bool shared;
};

// A set of rows that go through (the rest of) a layer together: all tokens, or the selected rows of the last layer.
struct RowSet {
  int64_t rows = 0;
  bool by_columns = false;
  BlockRows block_rows;
  float* x = nullptr;    // [rows, ld] residual stream
  std::vector<Block> blocks;
  std::vector<Group> groups;
  bool any_shared = false;
  std::vector<Segment> segments;
};

struct ForwardPlan {
  // Row strides of buffers with hidden, 3 hidden and intermediate columns.
  int64_t ld, ld_qkv, ld_ffn;
  RowSet all, selected;
  float* qkv[2];      // [T, ld_qkv] each: a fast thread may be one layer ahead
  float* selected_q;  // [row_count, ld]
  // Per thread. `wide`: a group's QKV [group rows, ld_qkv], then, once its attention is done, a block's FFN
  // [block rows, ld_ffn] (needs.apart only). `ctx`: attention output of a group [group rows, ld].
  std::vector<float*> wide, ctx;
  std::vector<float*> normed;  // [ld], pre-norm only: a normalised row on its way into an operand
  std::vector<Operand> ffn_operand;
  std::vector<float*> attention;  // scratch of the kernel

  // Lays everything out from `base` (null: only counts) and returns the bytes needed.
  int64_t build(const EncoderShape& shape, Precision precision, const OperandNeeds& needs, const BlockRows& sizes,
                const ForwardArgs& args, uint8_t* base);
};

}  // namespace xfast
