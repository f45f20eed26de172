// A masked-LM head over packed tokens: logits = decoder(layer_norm(gelu(dense(x)))), its weights read where they lie.
#pragma once

#include <cstdint>

#include "kernel_table.h"

namespace xfast {

struct LmHeadArgs {
  Precision precision;  // fp32 or bf16: of the operands of both products
  int64_t tokens, hidden, vocab;
  const float* x;    // [tokens, hidden]
  TableView dense;   // [hidden, hidden]
  const float* dense_bias;  // [hidden]
  const float *gamma, *beta;  // [hidden]
  float eps;
  TableView decoder;  // [vocab, hidden]
  const float* decoder_bias;  // [vocab], or null
  const int32_t* indices;  // [tokens], ascending: the row of `out` that each token owns
  int64_t slots;
  void* out;  // [slots, vocab]; rows that no token owns become zeros
  TableType out_type;  // kF32 or kBf16
  int threads;
};

void lm_head(const KernelTable& kernels, const LmHeadArgs& args);

}  // namespace xfast
