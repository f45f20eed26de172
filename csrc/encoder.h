// A packed encoder and its forward pass over packed (padding-free) tokens.
#pragma once

#include <memory>
#include <mutex>
#include <vector>

#include "buffer.h"
#include "kernel_table.h"
#include "weights.h"

namespace xfast {

// Sizes in elements, and where LayerNorms sit:
//   post-norm  x = LN(embeddings);  x = LN(x + attention(x));  x = LN(x + ffn(x))
//   pre-norm   x = embeddings;  x = x + attention(LN(x));  x = x + ffn(LN(x));  after the encoder's last layer x =
//   LN(x)
struct EncoderShape {
  int64_t layers, hidden, heads, head_dim, intermediate;
  int64_t vocab, positions, types;
  float eps;
  bool pre_norm;
};

struct Norm {
  std::vector<float> gamma, beta;
};

struct Layer {
  PackedLinear qkv, attention_out, ffn_in, ffn_out;  // qkv: query, key, value outputs one after another
  Norm attention_norm, ffn_norm;  // post-norm: after attention and FFN; pre-norm: before them
};

// What the workspace of a forward must have room for: the precisions of all products.
struct OperandNeeds {
  int64_t bytes_per_element = 0;       // of the widest precision
  bool scales = false;                 // any quantised precision
  bool apart = false;  // some FFN's inner values are quantised, or change precision, after its product
  int64_t smallest_group = 0;  // int4, 0 = none
};

// One forward call. T = cu_seqlens[sequences] packed tokens.
struct ForwardArgs {
  const int32_t* ids;  // [T], or null with embeds
  const float* embeds;  // [T, hidden], or null with ids
  const int32_t* position_ids;  // [T]
  const int32_t* type_ids;  // [T], or null = all zero
  const int32_t* cu_seqlens;  // [sequences + 1]
  int64_t sequences;
  const int32_t* rows;  // packed rows wanted from the last layer, ascending; null = all
  int64_t row_count;
  int64_t layers;  // how many layers to run, 0 .. shape.layers
  float* out;  // [rows or T, hidden]
  float* hidden_states;  // [layers + 1, T, hidden] or null
  int threads;
};

class Encoder {
 public:
  Encoder(const EncoderShape& shape, Precision precision, const KernelTable& kernels);

  const EncoderShape& shape() const { return shape_; }
  OperandNeeds needs() const;
  const KernelTable& kernels() const { return kernels_; }
  std::vector<Layer>& layers() { return layers_; }
  const std::vector<Layer>& layers() const { return layers_; }
  // The LayerNorm outside the layers: of the embeddings (post-norm) or after the last layer (pre-norm).
  Norm& outer_norm() { return outer_norm_; }
  const Norm& outer_norm() const { return outer_norm_; }
  // The tables stay the caller's: they are read in place, never copied.
  void set_tables(TableView word, TableView position, TableView type);
  // Copies the word table in 8 bits a value; the caller's is not read any more. Not while a forward runs.
  void quantize_word_table(int threads);
  bool owns_word_table() const { return word_table_.bytes() > 0; }
  const TableView* tables() const { return tables_; }  // word, position, type
  // True when every weight of every layer has been set.
  bool complete() const;
  // Bytes of packed weights (embedding tables that are read in place excluded).
  int64_t packed_bytes() const;

  // Thread-safe. Arguments must be valid (ids and lengths in range, complete()): bindings.cpp checks them.
  void forward(const ForwardArgs& args) const;

 private:
  // Workspaces are reused: fresh memory would cost a page fault every 4 KiB on every call.
  AlignedBuffer acquire_workspace(int64_t bytes) const;
  void release_workspace(AlignedBuffer buffer, int64_t needed) const;

  EncoderShape shape_;
  Precision precision_;
  const KernelTable& kernels_;
  TableView tables_[3];
  QuantizedTable word_table_;
  Norm outer_norm_;
  std::vector<Layer> layers_;
  mutable std::mutex workspace_mutex_;
  mutable std::vector<AlignedBuffer> free_workspaces_;
  mutable int64_t recent_need_ = 0;
};

}  // namespace xfast
