#include "lm_head.h"

#include <algorithm>
#include <atomic>
#include <cstring>

#include "buffer.h"
#include "packing.h"
#include "thread_pool.h"

namespace xfast {
namespace {

constexpr int64_t kMaxRun = 32;  // panels that a thread takes at a time

// What lies in the workspace. The operand holds the head's input, then the decoder's.
struct Workspace {
  Workspace(const LmHeadArgs& args, int threads, uint8_t* base) : ld(row_stride(args.hidden)) {
    Carver carver(base);
    operand.chunk_stride = operand_capacity(args.tokens) * kChunkBytes;
    operand.data = carver.take<uint8_t>(operand_bytes(args.precision, args.tokens, args.hidden));
    y = carver.take<float>(args.tokens * ld);
    scratch_bytes = in_place_scratch_bytes(args.precision, args.hidden, args.tokens);
    scratch = carver.take<uint8_t>(scratch_bytes * threads);
    bytes = carver.used();
  }
  int64_t ld, bytes, scratch_bytes;
  Operand operand;
  float* y;  // [tokens, ld]
  uint8_t* scratch;
};

// The head's parts on one thread, with a barrier between them.
class Head {
 public:
  Head(const KernelTable& kernels, const LmHeadArgs& args, const Workspace& work, const Member& member,
       std::atomic<int64_t>& next_run)
      : kernels_(kernels), args_(args), work_(work), member_(member), next_run_(next_run) {}

  void run() const {
    if (args_.tokens == 0) return clear_padding();
    const Range rows = share(member_, 0, args_.tokens);
    const InputFormat format{args_.precision, 0, nullptr};
    kernels_.to_operand({format, args_.x, args_.hidden, rows.begin, rows.end, args_.hidden, work_.operand});
    member_.barrier->wait();
    InPlaceArgs dense = product(args_.dense, args_.dense_bias, args_.hidden, Epilogue::kBiasGelu);
    dense.out = work_.y;
    dense.out_type = TableType::kF32;
    dense.ldo = work_.ld;
    multiply(dense, share(member_, 0, panels_for(args_.hidden)));
    member_.barrier->wait();
    kernels_.layer_norm({format, work_.y, work_.ld, work_.y, work_.ld, rows.begin, rows.end, args_.hidden, args_.gamma,
                         args_.beta, args_.eps, work_.operand});
    clear_padding();
    member_.barrier->wait();
    InPlaceArgs decoder = product(args_.decoder, args_.decoder_bias, args_.vocab, Epilogue::kBias);
    decoder.out = args_.out;
    decoder.out_type = args_.out_type;
    decoder.ldo = args_.vocab;
    decoder.out_rows = args_.indices;
    const int64_t count = panels_for(args_.vocab);
    const int64_t run = std::clamp<int64_t>(count / (8 * member_.count), 1, kMaxRun);
    for (int64_t at = run * next_run_++; at < count; at = run * next_run_++)
      multiply(decoder, {at, std::min(at + run, count)});
  }

 private:
  InPlaceArgs product(const TableView& w, const float* bias, int64_t outputs, Epilogue epilogue) const {
    InPlaceArgs args{};
    args.precision = args_.precision;
    args.a = work_.operand;
    args.rows = args_.tokens;
    args.w = w;
    args.out_features = outputs;
    args.in_features = args_.hidden;
    args.bias = bias;
    args.epilogue = epilogue;
    args.scratch = work_.scratch + member_.id * work_.scratch_bytes;
    return args;
  }

  void multiply(InPlaceArgs& args, Range panels) const {
    args.panel_begin = panels.begin;
    args.panel_end = panels.end;
    kernels_.gemm_in_place(args);
  }

  void clear_padding() const {
    const int64_t bytes = args_.vocab * (args_.out_type == TableType::kF32 ? 4 : 2);
    walk_slots(
        share(member_, 0, args_.slots), args_.indices, args_.tokens, [](int64_t, int64_t) {},
        [&](int64_t slot) { std::memset(static_cast<uint8_t*>(args_.out) + slot * bytes, 0, bytes); });
  }

  const KernelTable& kernels_;
  const LmHeadArgs& args_;
  const Workspace& work_;
  const Member& member_;
  std::atomic<int64_t>& next_run_;
};

}  // namespace

void lm_head(const KernelTable& kernels, const LmHeadArgs& args) {
  const Team team(args.threads);
  advise_huge_pages(args.out, args.slots * args.vocab * (args.out_type == TableType::kF32 ? 4 : 2));
  const AlignedBuffer memory(Workspace(args, team.size(), nullptr).bytes);
  const Workspace work(args, team.size(), memory.data());
  std::atomic<int64_t> next_run{0};
  team.run([&](const Member& member) { Head(kernels, args, work, member, next_run).run(); });
}

}  // namespace xfast
