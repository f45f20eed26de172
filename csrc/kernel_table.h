// The functions one instruction-set target provides, and the plain structs they take. Raw pointers and sizes only:
// kernels know nothing of models, torch or Python. One table per target, chosen once (isa.h).
#pragma once

#include <cstdint>

#include "layout.h"

namespace xfast {

// Activations in operand layout (layout.h). `scale` has one entry per row (int8 and int4).
struct Operand {
  uint8_t* data = nullptr;
  int64_t chunk_stride = 0;  // bytes between chunks = row capacity * 64
  float* scale = nullptr;
  int32_t* sums = nullptr;   // [group][row capacity], int4 only: -8 * sum of the row's values in the group
  int64_t capacity() const { return chunk_stride / kChunkBytes; }
};

// How a linear layer wants its input. Quantised precisions may have it smoothed: multiplied by `column_scale` [cols]
// (null = all 1), which the weights were divided by.
struct InputFormat {
  Precision precision = Precision::kFp32;
  int64_t group = 0;  // int4 only
  const float* column_scale = nullptr;
};

// Packed weights of one linear layer, as the kernels read them. scale/bias/compensation have panels * 32 entries.
struct LinearView {
  const uint8_t* data;
  const float* scale;           // per output, int8 only (int4: in the data)
  const float* bias;            // zeros when the layer has none
  const int32_t* compensation;  // per output, int8 only
  int64_t out_features;
  int64_t chunks;
  int64_t panel_bytes;
  int64_t group;                // int4 only
};

enum class Epilogue : int {
  kBias,          // out = y + b
  kBiasResidual,  // out = y + b + residual
  kBiasGelu,      // out = gelu(y + b), exact (erf) GELU
};

// out[rows, panels * 32] = epilogue(a . w^T), for output panels [panel_begin, panel_end).
struct GemmArgs {
  Precision precision;
  Operand a;
  int64_t rows;
  LinearView w;
  int64_t panel_begin, panel_end;
  Epilogue epilogue;
  float* out;             // [rows, ldo] row-major; unused when out_operand.data is set
  int64_t ldo;
  const float* residual;  // [rows, ldo], kBiasResidual only; may alias out
  Operand out_operand;    // fp32 and bf16: write the next product's operand directly
  const uint8_t* next;    // start of the weights that are read after this call (prefetch hint), or null
  int64_t next_bytes;
  bool weights_in_cache = false;  // nothing but `next` is fetched, all of its next_bytes
};

// x[rows, cols] -> operand layout, converting (fp32, bf16) or quantising per row (int8, int4).
struct OperandArgs {
  InputFormat format;
  const float* x;
  int64_t ldx;
  int64_t row_begin, row_end;  // rows of x and of the operand
  int64_t cols;
  Operand out;
};

// y = layer_norm(x) * gamma + beta over rows [row_begin, row_end), then the operand of y if out.data is set.
struct NormArgs {
  InputFormat format;  // of the operand
  const float* x;
  int64_t ldx;
  float* y;  // x itself, or elsewhere; ldy 0 = one row that each row overwrites, when only the operand is wanted
  int64_t ldy;
  int64_t row_begin, row_end;
  int64_t cols;
  const float* gamma;
  const float* beta;
  float eps;
  Operand out;
};

enum class TableType : int { kF32 = 0, kBf16 = 1, kF16 = 2, kInt8 = 3 };
struct TableView {
  const void* data = nullptr;
  TableType type = TableType::kF32;
  const float* scale = nullptr;  // per row, kInt8 only
};

// x[row, :] = word[ids[row]] (or embeds[row]) + type[type_ids[row]] + position[position_ids[row]].
struct EmbeddingArgs {
  TableView word, position, type;
  const int32_t* ids;           // null when embeds is given
  const float* embeds;          // [rows, cols] or null
  const int32_t* position_ids;
  const int32_t* type_ids;      // null = all zero
  float* x;
  int64_t ldx;
  int64_t row_begin, row_end;
  int64_t cols;
};

// out[out_rows[r], :] = epilogue(a . w^T + bias) for output panels [panel_begin, panel_end) of weights that lie
// row-major in the caller's memory: `w` [out_features, in_features] (gemm_in_place.h).
struct InPlaceArgs {
  Precision precision;  // fp32 or bf16
  Operand a;
  int64_t rows;
  TableView w;
  int64_t out_features, in_features;
  const float* bias;  // [out_features], or null
  int64_t panel_begin, panel_end;
  Epilogue epilogue;  // kBias or kBiasGelu
  void* out;          // [any row of out_rows, ldo]
  TableType out_type;  // kF32 or kBf16
  int64_t ldo;
  const int32_t* out_rows;  // [rows], or null: row r
  uint8_t* scratch;         // in_place_scratch_bytes(...)
};
constexpr int64_t kPassRows = 112;  // rows whose accumulators wait between passes over `in`
// Panels that are laid out together. With many rows the operand is read from L3: once for several panels.
constexpr int64_t in_place_panels(int64_t bytes_of_panel, int64_t rows) {
  const int64_t fit = (int64_t{384} << 10) / bytes_of_panel;
  return rows <= kPassRows || fit < 2 ? 1 : fit < 4 ? fit : 4;
}
constexpr int64_t in_place_scratch_bytes(Precision p, int64_t in_features, int64_t rows) {
  const int64_t bytes = chunks_for(p, in_features) * kPanelChunkBytes, panels = in_place_panels(bytes, rows);
  return panels * (bytes + kPanel * 4 * (1 + (rows < kPassRows ? rows : kPassRows)));
}

constexpr int64_t kKeyBlock = 256;  // keys per online-softmax step: memory stays linear in length
constexpr int64_t kInt16MaxHeadDim = 128;  // up to here sums of 16-bit products cannot overflow

// Softmax(scale q k^T) v for one sequence and heads [head_begin, head_end). Row-major with leading dimensions;
// head h occupies columns [h * head_dim, (h + 1) * head_dim).
struct AttentionArgs {
  const float* q;
  int64_t ldq, q_count;
  const float* k;
  const float* v;
  int64_t ldkv, kv_len;
  int head_begin, head_end, head_dim;
  float scale;
  bool int16;  // products of 16-bit integers where head_dim allows it: in all precisions but fp32
  float* out;
  int64_t ldo;
  float* scratch;  // attention_scratch_floats(head_dim, q_count)
};
constexpr int64_t attention_scratch_floats(int64_t head_dim, int64_t q_count) {
  const int64_t d32 = ceil_div(head_dim, 32) * 32;
  return 2 * kKeyBlock * d32                              // transposed keys, values
         + (q_count + kMaxTileRows) * d32                 // query operands
         + kMaxTileRows * (2 * kKeyBlock + kPanel)        // scores, probabilities, tile
         + kKeyBlock + 2 * d32                            // scales of keys; scales and means of values
         + 3 * (q_count + 16);                            // scale, running maximum and sum of queries
}

// Rows that go through a layer together when rows are split: at most `most` undivided, else about `usual`.
struct BlockRows {
  int64_t usual, most;
};

struct KernelTable {
  const char* name;
  const char* bf16_note;  // how bf16 products are computed here
  bool bf16_instruction;  // by an instruction of their own, as a rule faster than fp32's
  BlockRows block_rows;
  void (*gemm)(const GemmArgs&);
  void (*gemm_in_place)(const InPlaceArgs&);
  void (*to_operand)(const OperandArgs&);
  void (*layer_norm)(const NormArgs&);
  void (*embed)(const EmbeddingArgs&);
  void (*attention)(const AttentionArgs&);
  int64_t (*spin)(Precision, int64_t iterations);        // ceiling.h
  float (*read_all)(const float* data, int64_t count);
};

}  // namespace xfast
