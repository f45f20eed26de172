// The product with weights that lie row-major in the caller's memory, as torch keeps them: y = epilogue(x . W^T + b).
//
// For a weight too large to keep twice, a masked-LM head's above all (250,002 x 768 floats, tied to the word
// embeddings). Each panel of 32 outputs is laid out as gemm.h reads it (layout.h) in scratch memory that stays in L2,
// multiplied by all rows, and forgotten. Nothing is kept, so a changed weight is seen by the next call.
#pragma once

namespace xfast {
namespace XFAST_TARGET {

constexpr int64_t kPackRows = 12;  // laying a panel out takes about as long as multiplying it by so many rows

// 16 outputs from `first` on and one chunk of `in`: table rows -> dst[16 groups][32 outputs][4 bytes], zeros outside.
template <Precision P>
void pack_tile(const InPlaceArgs& args, int64_t first, int64_t chunk, float* dst) {
  constexpr int64_t kElements = chunk_elements(P);
  const int64_t col = chunk * kElements, cols = args.in_features;
  if (P == Precision::kFp32 && args.w.type == TableType::kF32 && first + 16 <= args.out_features && col + 16 <= cols)
    return transpose16(static_cast<const float*>(args.w.data) + first * cols + col, cols, dst, kPanel);
  alignas(64) float groups[16 * kGroups];
  for (int64_t i = 0; i < 16; ++i) {
    float* row = groups + i * kGroups;
    if (first + i >= args.out_features) {
      store(row, set1(0.0f));
    } else if constexpr (P == Precision::kFp32) {
      store(row, load_table(args.w, first + i, cols, col));
    } else {
      uint16_t pairs[kElements];
      const V16 low = load_table(args.w, first + i, cols, col);
      store_bf16(pairs, low, col + 16 < cols ? load_table(args.w, first + i, cols, col + 16) : set1(0.0f));
      __builtin_memcpy(row, pairs, sizeof pairs);
    }
  }
  transpose16(groups, kGroups, dst, kPanel);
}

// Meanwhile the first `ahead_bytes` at `ahead` are fetched into L2.
template <Precision P>
void pack_panel(const InPlaceArgs& args, int64_t panel, uint8_t* out, const uint8_t* ahead, int64_t ahead_bytes) {
  const int64_t chunks = chunks_for(P, args.in_features);
  for (int64_t chunk = 0; chunk < chunks; ++chunk, out += kPanelChunkBytes) {
    const int64_t end = ahead_bytes * (chunk + 1) / chunks;
    for (int64_t at = ahead_bytes * chunk / chunks / 64 * 64; at < end; at += 64) __builtin_prefetch(ahead + at, 0, 2);
    for (int64_t half = 0; half < kPanel; half += 16)
      pack_tile<P>(args, panel * kPanel + half, chunk, reinterpret_cast<float*>(out) + half);
  }
}

// One row of `width` finished outputs from column `first` on, to where it belongs.
inline void write_outputs(const InPlaceArgs& args, int64_t row, const float* values, int64_t first, int64_t width) {
  const int64_t at = (args.out_rows != nullptr ? args.out_rows[row] : row) * args.ldo + first;
  if (args.out_type == TableType::kF32) {
    float* out = static_cast<float*>(args.out) + at;
    for (int64_t c = 0; c < width; c += 16) store_n(out + c, load(values + c), width - c);
    return;
  }
  uint16_t* out = static_cast<uint16_t*>(args.out) + at;
  for (int64_t c = 0; c < width; c += kPanel) {
    if (width - c >= kPanel) {
      store_bf16(out + c, load(values + c), load(values + c + 16));
      continue;
    }
    uint16_t last[kPanel];
    store_bf16(last, load(values + c), load(values + c + 16));
    __builtin_memcpy(out + c, last, (width - c) * sizeof *last);
  }
}

template <Precision P>
void gemm_in_place_with(const InPlaceArgs& args) {
  const int64_t chunks = chunks_for(P, args.in_features), bytes = chunks * kPanelChunkBytes;
  const int64_t together = in_place_panels(bytes, args.rows);
  uint8_t* packed = args.scratch;
  float* bias = reinterpret_cast<float*>(packed + together * bytes);
  float* outputs = bias + together * kPanel;
  // Weights come from memory all the time: while a panel is laid out, and while it is multiplied, a part in proportion.
  const int64_t raw = kPanel * args.in_features * (args.w.type == TableType::kF32 ? 4 : 2);
  const int64_t while_multiplied = raw * args.rows / (args.rows + kPackRows) / 64 * 64;
  const uint8_t* w = static_cast<const uint8_t*>(args.w.data);
  for (int64_t panel = args.panel_begin; panel < args.panel_end; panel += together) {
    const int64_t count = args.panel_end - panel < together ? args.panel_end - panel : together;
    const int64_t first = panel * kPanel, left = args.out_features - first;
    const int64_t width = left < count * kPanel ? left : count * kPanel;
    const uint8_t* next = panel + count < args.panel_end ? w + (panel + count) * raw : nullptr;
    const int64_t while_packed = next == nullptr ? 0 : raw - while_multiplied;
    for (int64_t p = 0; p < count; ++p)
      pack_panel<P>(args, panel + p, packed + p * bytes, w + (panel + p + 1) * raw, p + 1 < count ? raw : while_packed);
    for (int64_t c = 0; c < count * kPanel; c += 16)
      store(bias + c, args.bias != nullptr ? load_n(args.bias + first + c, width - c) : set1(0.0f));
    for (int64_t row = 0; row < args.rows; row += kPassRows) {
      const int64_t rows = args.rows - row < kPassRows ? args.rows - row : kPassRows;
      GemmArgs gemm_args{};
      gemm_args.precision = P;
      gemm_args.a = {args.a.data + row * kChunkBytes, args.a.chunk_stride};
      gemm_args.rows = rows;
      gemm_args.w = {packed, nullptr, bias, nullptr, width, chunks, bytes, 0};
      gemm_args.panel_end = count;
      gemm_args.epilogue = args.epilogue;
      gemm_args.out = outputs;
      gemm_args.ldo = together * kPanel;
      gemm_args.weights_in_cache = true;
      const int64_t from = while_multiplied * row / args.rows / 64 * 64,
                    to = while_multiplied * (row + rows) / args.rows;
      gemm_args.next = next == nullptr ? nullptr : next + while_packed + from;
      gemm_args.next_bytes = to - from;
      gemm(gemm_args);
      for (int64_t r = 0; r < rows; ++r) write_outputs(args, row + r, outputs + r * together * kPanel, first, width);
    }
  }
}

inline void gemm_in_place(const InPlaceArgs& args) {
  return args.precision == Precision::kFp32 ? gemm_in_place_with<Precision::kFp32>(args)
                                            : gemm_in_place_with<Precision::kBf16>(args);
}

}  // namespace XFAST_TARGET
}  // namespace xfast
