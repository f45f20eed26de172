// The packed layouts that every target shares, so that weights are packed once and are portable between them.
//
// A matrix product y[rows, out] = x[rows, in] . W[out, in]^T reads both operands in 64-byte chunks along `in`:
//
//   chunk        16 groups of 4 bytes; a group holds the 1 / 2 / 4 consecutive `in` elements (fp32 / bf16 / int8)
//                that one multiply-accumulate instruction consumes.
//   activations  [in chunk][row][64 bytes]       "operand": rows sit inside the chunk, so any row-tile height reads
//                                                 consecutive lines and long `in` does not alias in the L1 cache.
//   weights      [out panel][in chunk][group][32 outputs][4 bytes]     one panel = 32 outputs, 2048 bytes a chunk.
//
// `in` is padded with zero weights to a whole chunk and `out` with zero weights to a whole panel.
// int8 activations are stored as unsigned bytes q + 128 (q in [-127, 127]); the constant is taken out again by
// starting each accumulator at -128 * sum_k W[n, k] ("compensation"), so accumulation stays exact in 32 bits.
//
// int4 weights have one scale for each output and each `group` of 32, 64 or 128 consecutive inputs:
//
//   weights      [out panel][in group][32 bf16 scales][pair][32 outputs][4 bytes]     a "record" = one group of a panel
//
// Byte j of a pair's 4 bytes holds input 8 * pair + j of the group in its low half and input 8 * pair + 4 + j in its
// high half, as unsigned q + 8 (q in [-8, 7]): one 64-byte load makes two registers of 4-byte weight groups. Here the
// activations are the signed bytes (q in [-127, 127], no constant added) and the weights the unsigned ones, so that
// unpacking needs no sign extension; the 8 is taken out by starting each group's accumulator at
// -8 * sum_k x[k] over the group ("sums"), one number for all outputs. The last group may end early, at a chunk.
#pragma once

#include <cstdint>

namespace xfast {

enum class Precision : int { kFp32 = 0, kBf16 = 1, kInt8 = 2, kInt4 = 3 };

// Activations are quantised per row: the operand has scales, and is written only once its whole row is known.
constexpr bool is_quantised(Precision p) { return p == Precision::kInt8 || p == Precision::kInt4; }

constexpr int kPackVersion = 1;  // bump when any layout below changes
constexpr int64_t kChunkBytes = 64;  // bytes of one row of one chunk
constexpr int64_t kGroups = 16;  // 4-byte groups in a chunk
constexpr int64_t kPanel = 32;  // outputs of one weight panel
constexpr int64_t kPanelChunkBytes = kGroups * kPanel * 4;
constexpr int64_t kInt4ChunkBytes = kPanelChunkBytes / 2;  // int4 weights of one chunk of one panel, without scales
constexpr int64_t kInt4ScaleBytes = kPanel * 2;  // scales of one group of one panel
constexpr int64_t kInt4MaxGroup = 128;
constexpr int64_t kDefaultGroup = 64;
constexpr int kMaxTileRows = 14;  // tallest row tile of vector registers

// Elements of `in` in one 64-byte chunk of activations.
constexpr int64_t chunk_elements(Precision p) { return p == Precision::kFp32 ? 16 : p == Precision::kBf16 ? 32 : 64; }
constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
constexpr int64_t chunks_for(Precision p, int64_t in_features) { return ceil_div(in_features, chunk_elements(p)); }
constexpr int64_t int4_groups(int64_t chunks, int64_t group) { return ceil_div(chunks * 64, group); }
// Bytes of one panel of weights. `group`: int4 only.
constexpr int64_t panel_bytes(Precision p, int64_t chunks, int64_t group) {
  return p == Precision::kInt4 ? chunks * kInt4ChunkBytes + int4_groups(chunks, group) * kInt4ScaleBytes
                               : chunks * kPanelChunkBytes;
}
constexpr int64_t panels_for(int64_t out_features) { return ceil_div(out_features, kPanel); }

// Row capacity of an operand block of at most `rows` rows: odd, so that consecutive chunks (capacity * 64 bytes apart)
// fall into different cache sets.
constexpr int64_t operand_capacity(int64_t rows) { return rows | 1; }
constexpr int64_t operand_bytes(Precision p, int64_t rows, int64_t features) {
  return operand_capacity(rows) * kChunkBytes * chunks_for(p, features);
}

// Entries of an int4 operand's sums, one for each group and row of its capacity.
constexpr int64_t operand_sums(int64_t rows, int64_t features, int64_t group) {
  return operand_capacity(rows) * int4_groups(chunks_for(Precision::kInt4, features), group);
}

// Floats between rows of a row-major fp32 buffer of `cols` columns: an odd number of cache lines, so that the rows of a
// tile fall into different cache sets (with 4096 or 12288 bytes between them, all would fall into one).
constexpr int64_t row_stride(int64_t cols) { return (ceil_div(cols, 16) | 1) * 16; }

}  // namespace xfast
