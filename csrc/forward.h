// The plan of one forward call: which rows each thread owns, and where everything lies in the workspace.
//
// Two ways to share the work, by number of rows:
//   rows     (many rows)  each thread owns a run of tokens, cut into blocks that stay in its L2 cache, and takes
//                         them through a whole layer. One barrier a layer, between QKV and attention; QKV is
//                         double-buffered so that no second one is needed.
//   columns  (few rows)   one block; threads split the outputs of every product (by head for QKV), so that each
//                         weight is read once. A barrier after every phase.
#pragma once

#include <vector>

#include "encoder.h"

namespace xfast {

constexpr int64_t kColumnRows = 112;  // up to here the columns are split
constexpr int64_t kBlockRows = 56;    // rows of a block when rows are split: four tiles of 14

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

// A set of rows that go through (the rest of) a layer together: all tokens, or the selected rows of the last layer.
struct RowSet {
  int64_t rows = 0;
  bool by_columns = false;
  float* x = nullptr;    // [rows, ld] residual stream
  float* ctx = nullptr;  // [rows, ld] attention output
  const float* q = nullptr;
  int64_t ldq = 0;
  std::vector<Block> blocks;
  std::vector<Segment> segments;
};

struct ForwardPlan {
  int64_t ld, ld_qkv, ld_ffn;          // row strides of buffers with hidden, 3 hidden and intermediate columns
  RowSet all, selected;
  float* qkv[2];           // [T, ld_qkv] each
  float* selected_q;       // [row_count, ld]
  std::vector<float*> ffn;             // per thread: [block rows, ld_ffn], int8 only
  std::vector<Operand> ffn_operand;    // per thread
  std::vector<float*> attention;       // per thread: attention scratch

  // Lays everything out from `base` (null: only counts) and returns the bytes needed.
  int64_t build(const EncoderShape& shape, Precision precision, const ForwardArgs& args, uint8_t* base);
};

}  // namespace xfast
