// What the programs that call a whole kernel share: cells of the FlashAttention papers' grid, their inputs, the time of
// a call with the clock that ran, and the rows that are worked out again on the CPU.
#pragma once

#include <stdexcept>

#include "../../csrc/launch.h"
#include "../../csrc/limits.h"
#include "micro.cuh"

namespace micro {

using flash_attn_ext::DType;
using flash_attn_ext::HeadDimLimits;
using flash_attn_ext::Problem;
using flash_attn_ext::Tensor;

constexpr int kTokens = 16384, kHidden = 2048;  // as in the papers

struct Cell {
  int head_dim = 0, seqlen = 0;
  bool causal = false;
  DType dtype = DType::kBFloat16;

  int heads() const { return kHidden / head_dim; }
  int batch() const { return kTokens / seqlen; }
  // Of one product, over all heads; a causal mask halves what is counted.
  double product_flops() const { return (causal ? 1. : 2.) * kTokens * seqlen * kHidden; }
  Problem problem() const {
    return {.batch = batch(),
            .seqlen_q = seqlen,
            .seqlen_k = seqlen,
            .heads = heads(),
            .kv_heads = heads(),
            .head_dim = head_dim,
            .dtype = dtype,
            .options = {.causal = causal}};
  }
  float softmax_scale() const { return problem().softmax_scale(); }
  // A contiguous (batch, seqlen, heads, head_dim) tensor.
  template <class T>
  Tensor tensor(const DeviceArray<T>& array) const {
    return {array.data, {.batch = int64_t{seqlen} * kHidden, .row = kHidden, .head = head_dim}};
  }
  std::string name() const {
    return std::to_string(head_dim) + "," + std::to_string(seqlen) + "," + (causal ? "causal" : "full") +
           (dtype == DType::kFloat16 ? ",fp16" : ",bf16");
  }
};

inline int number(const std::string& text) {
  char* end;
  const long value = std::strtol(text.c_str(), &end, 10);
  return text.empty() || *end || value < 1 || value > 1 << 20 ? 0 : static_cast<int>(value);
}

// Whether the kernel that is measured is there for this head dim, and the grid has heads of it.
using IsBuilt = bool (*)(const HeadDimLimits&);

// "128,16384,causal,fp16"; the mask is full and the type bf16 by default.
inline Cell parse(const std::string& text, IsBuilt built) {
  const std::invalid_argument wrong("'" + text +
                                    "' is no cell; one is HEAD_DIM,SEQLEN[,full|causal][,bf16|fp16], the head dim "
                                    "one that is built, the length a divisor of 16384");
  std::vector<std::string> parts(1);
  for (const char c : text) {
    if (c == ',') {
      parts.emplace_back();
    } else {
      parts.back() += c;
    }
  }
  Cell cell;
  if (parts.size() < 2) throw wrong;
  for (const HeadDimLimits& row : flash_attn_ext::kLimits) {
    if (row.head_dim == number(parts[0]) && built(row) && kHidden % row.head_dim == 0) cell.head_dim = row.head_dim;
  }
  cell.seqlen = number(parts[1]);
  if (cell.head_dim == 0 || cell.seqlen == 0 || kTokens % cell.seqlen != 0) throw wrong;
  for (size_t i = 2; i < parts.size(); ++i) {
    if (parts[i] == "causal" || parts[i] == "full") {
      cell.causal = parts[i] == "causal";
    } else if (parts[i] == "fp16" || parts[i] == "bf16") {
      cell.dtype = parts[i] == "fp16" ? DType::kFloat16 : DType::kBFloat16;
    } else {
      throw wrong;
    }
  }
  return cell;
}

// The cells that were asked for; else a short and the longest sequence of every head dim.
inline std::vector<Cell> cells_of(const Session& session, IsBuilt built) {
  std::vector<Cell> cells;
  for (const std::string& text : session.cells) cells.push_back(parse(text, built));
  if (!cells.empty()) return cells;
  for (const HeadDimLimits& row : flash_attn_ext::kLimits) {
    if (!built(row) || kHidden % row.head_dim != 0) continue;
    for (const bool causal : {false, true}) {
      for (const int seqlen : {2048, kTokens}) {
        cells.push_back({.head_dim = row.head_dim, .seqlen = seqlen, .causal = causal});
      }
    }
  }
  return cells;
}

// Normally distributed (Box and Muller); each number another tensor.
template <class T>
__global__ void fill(T* to, uint32_t count, uint32_t number) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const uint32_t bits = hash(number * count + i);
    const float u = ((bits >> 8) + 1) * 0x1p-24f, v = (hash(bits) >> 8) * 0x1p-24f;
    to[i] = T(sqrtf(-2.f * logf(u)) * cospif(2.f * v));
  }
}

template <class T>
void fill_normal(const DeviceArray<T>& array, uint32_t number) {
  fill<<<1024, 256>>>(array.data, static_cast<uint32_t>(array.size), number);
  check(cudaGetLastError(), "launching a kernel");
}

// The forward's tensors, the inputs random, and the call that fills the others.
template <class T>
struct Forward {
  static constexpr size_t kCount = size_t{kTokens} * kHidden;

  Cell cell;
  DeviceArray<T> q{kCount}, k{kCount}, v{kCount}, out{kCount};
  DeviceArray<float> lse{size_t{kTokens} * cell.heads()};
  DeviceArray<int> item_counters{2};

  explicit Forward(const Cell& cell) : cell(cell) {
    item_counters.zero();
    fill_normal(q, 0);
    fill_normal(k, 1);
    fill_normal(v, 2);
  }

  void operator()() const {
    flash_attn_ext::launch_forward({.problem = cell.problem(),
                                    .q = cell.tensor(q),
                                    .k = cell.tensor(k),
                                    .v = cell.tensor(v),
                                    .out = cell.tensor(out),
                                    .lse = lse.data,
                                    .item_counters = item_counters.data},
                                   nullptr);
  }
};

// -------------------------------------------------------------------------------------------------------------- time

struct Timing {
  double seconds = NAN, clock = NAN;  // of a call, medians over rounds; cycles a second
};

// The moment on every multiprocessor, kept by its number. Two of them give its clock between them.
static __global__ void stamp(Stamp* stamps) { stamps[cuda::ptx::get_sreg_smid()] = Stamp::now(); }

// Rounds of about 7 ms each, as many as the session's seconds hold. `flops` of a call only choose how many make a
// round.
template <class Call>
Timing time_calls(const Session& session, double flops, Call&& call) {
  constexpr int kStamps = 1024;  // multiprocessor numbers are below
  constexpr double kRoundSeconds = 7e-3;
  DeviceArray<Stamp> before(kStamps), after(kStamps);
  before.zero();
  after.zero();
  Timer timer;
  std::vector<double> times, clocks;
  call();
  const int calls = static_cast<int>(kRoundSeconds * 600e12 / flops) + 1;
  for (double measured = 0; measured < session.seconds;) {
    hold();
    stamp<<<session.multiprocessors, 1>>>(before.data);
    const double seconds = timer.seconds([&] {
      for (int i = 0; i < calls; ++i) call();
    });
    stamp<<<session.multiprocessors, 1>>>(after.data);
    check(cudaGetLastError(), "launching a kernel");
    std::vector<Stamp> intervals;
    const auto starts = before.host(), ends = after.host();
    for (int i = 0; i < kStamps; ++i) {  // of the multiprocessors that both launches met
      if (starts[i].nanoseconds == 0 || ends[i].nanoseconds == 0) continue;
      intervals.push_back({ends[i].cycles - starts[i].cycles, ends[i].nanoseconds - starts[i].nanoseconds});
    }
    clocks.push_back(clock_of(intervals));
    times.push_back(seconds / calls);
    measured += seconds;
  }
  return {median(times), median(clocks)};
}

// A row for each cell; `time_cell`, given a value of its type, times a call of so many FLOPs and checks what it wrote.
template <class TimeCell>
void measure_cells(Session& session, IsBuilt built, int products, TimeCell&& time_cell) {
  for (const Cell& cell : cells_of(session, built)) {
    const bool fp16 = cell.dtype == DType::kFloat16;
    const double flops = products * cell.product_flops();
    Timing timing;
    if (!session.dry_run) {
      timing = fp16 ? time_cell(__half(), session, cell, flops) : time_cell(__nv_bfloat16(), session, cell, flops);
    }
    const double tflops = flops / timing.seconds / 1e12;
    const double percent = 100 * tflops * 1e12 / (kTensorFlops * timing.clock * session.multiprocessors);
    session.add({double(cell.head_dim), cell.causal ? "causal" : "full", double(cell.seqlen), double(cell.batch()),
                 double(cell.heads()), fp16 ? "fp16" : "bf16", 1e6 * timing.seconds, tflops, timing.clock / 1e9,
                 percent});
  }
}

constexpr const char* kCellArguments = "[HEAD_DIM,SEQLEN[,full|causal][,bf16|fp16] ...]";

inline std::vector<Column> columns() {
  return {{"head_dim", "head dim", 0}, {"mask", "mask"},         {"seqlen", "length", 0},
          {"batch", "batch", 0},       {"heads", "heads", 0},    {"dtype", "dtype"},
          {"microseconds", "us", 1},   {"tflops", "TFLOP/s", 0}, {"clock_ghz", "GHz", 3},
          {"percent", "% of limit", 1}};
}

// ----------------------------------------------------------------------------------------------------------- results

// The last head of the last sequence of a (batch, seqlen, heads, head_dim) tensor, as (seqlen, head_dim) floats.
template <class T>
class LastHead {
 public:
  LastHead(const Cell& cell, const DeviceArray<T>& tensor)
      : head_dim_(cell.head_dim), sequence_(cell.seqlen * kHidden) {
    check(cudaMemcpy(sequence_.data(), tensor.data + tensor.size - sequence_.size(), sequence_.size() * sizeof(T),
                     cudaMemcpyDeviceToHost),
          "copying a sequence");
  }
  float operator()(int row, int column) const {
    return static_cast<float>(sequence_[size_t{1} * row * kHidden + kHidden - head_dim_ + column]);
  }

 private:
  int head_dim_;
  std::vector<T> sequence_;
};

// The last head's rows of lse, (batch, heads, seqlen).
inline std::vector<float> last_lse(const Cell& cell, const DeviceArray<float>& lse) {
  std::vector<float> rows(cell.seqlen);
  check(cudaMemcpy(rows.data(), lse.data + lse.size - rows.size(), rows.size() * sizeof(float), cudaMemcpyDeviceToHost),
        "copying lse");
  return rows;
}

// The first, the last and some rows between.
inline std::vector<int> rows_to_check(const Cell& cell) {
  return {0, 1, cell.seqlen / 3, cell.seqlen / 2, cell.seqlen - 1};
}

// Rounding to 16 bits, of the results and of what is multiplied, moves an entry by up to 1 % of its row's size; a wrong
// tile or mask moves it by about all of it. A causal mask's first rows of dq are 0, but for float32 noise.
template <class T>
void require_row(const LastHead<T>& values, int row, const std::vector<double>& expected, const std::string& where) {
  double squares = 0;
  for (const double x : expected) squares += x * x;
  const double tolerance = 0.03 * std::sqrt(squares / expected.size()) + 1e-5;
  for (size_t c = 0; c < expected.size(); ++c) {
    require(std::abs(values(row, static_cast<int>(c)) - expected[c]) < tolerance,
            where + ", row " + std::to_string(row) + ", column " + std::to_string(c));
  }
}

template <class T>
__global__ void count_not_finite(const T* values, size_t count, int* found) {
  int mine = 0;
  for (size_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += size_t{1} * gridDim.x * blockDim.x) {
    mine += !isfinite(static_cast<float>(values[i]));
  }
  if (mine > 0) atomicAdd(found, mine);
}

// What a kernel did not write is still the poison, which is NaN.
template <class T>
void require_finite(const DeviceArray<T>& array, const std::string& where) {
  DeviceArray<int> found(1);
  found.zero();
  count_not_finite<<<1024, 256>>>(array.data, array.size, found.data);
  check(cudaGetLastError(), "launching a kernel");
  require(found.host()[0] == 0, where + ", NaN or infinity");
}

}  // namespace micro
