// The forward kernel called through launch_forward, without torch: cells of the FlashAttention papers' grid.
#include <random>
#include <stdexcept>

#include "../../csrc/launch.h"
#include "../../csrc/limits.h"
#include "micro.cuh"

namespace {

using flash_attn_ext::DType;
using flash_attn_ext::ForwardParams;
using flash_attn_ext::Strides;
using micro::DeviceArray;
using micro::Stamp;

// Hidden size 2048 and 16384 tokens, as in the papers.
struct Cell {
  int head_dim = 0, seqlen = 0;
  bool causal = false;
  DType dtype = DType::kBFloat16;

  int heads() const { return 2048 / head_dim; }
  int batch() const { return 16384 / seqlen; }
  double flops() const { return (causal ? 2. : 4.) * batch() * heads() * seqlen * seqlen * head_dim; }
  std::string name() const {
    return std::to_string(head_dim) + "," + std::to_string(seqlen) + "," + (causal ? "causal" : "full") +
           (dtype == DType::kFloat16 ? ",fp16" : ",bf16");
  }
};

int number(const std::string& text) {
  char* end;
  const long value = std::strtol(text.c_str(), &end, 10);
  return text.empty() || *end || value < 1 || value > 1 << 20 ? 0 : static_cast<int>(value);
}

// "128,16384,causal,fp16"; the mask is full and the type bf16 by default.
Cell parse(const std::string& text) {
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
  const int head_dim = number(parts[0]);
  for (const auto& row : flash_attn_ext::kLimits) {
    if (row.head_dim == head_dim && row.forward.built() && 2048 % head_dim == 0) cell.head_dim = head_dim;
  }
  cell.seqlen = number(parts[1]);
  if (cell.head_dim == 0 || cell.seqlen == 0 || 16384 % cell.seqlen != 0) throw wrong;
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

// Normally distributed (Box and Muller); each number another tensor.
template <class T>
__global__ void fill(T* to, uint32_t count, uint32_t number) {
  for (uint32_t i = blockIdx.x * blockDim.x + threadIdx.x; i < count; i += gridDim.x * blockDim.x) {
    const uint32_t bits = micro::hash(number * count + i);
    const float u = ((bits >> 8) + 1) * 0x1p-24f, v = (micro::hash(bits) >> 8) * 0x1p-24f;
    to[i] = T(sqrtf(-2.f * logf(u)) * cospif(2.f * v));
  }
}

// The moment on every multiprocessor, kept by its number. Two of them give its clock between them.
__global__ void stamp(Stamp* stamps) { stamps[cuda::ptx::get_sreg_smid()] = Stamp::now(); }

constexpr int kStamps = 1024;  // multiprocessor numbers are below

// Rows of one head, (seqlen, head_dim), of a (batch, seqlen, heads, head_dim) tensor.
template <class T>
std::vector<T> head_of(const Cell& cell, const T* tensor, int batch, int head) {
  const size_t row_bytes = cell.head_dim * sizeof(T);
  const T* first = tensor + (int64_t{batch} * cell.seqlen * cell.heads() + head) * cell.head_dim;
  std::vector<T> rows(size_t{1} * cell.seqlen * cell.head_dim);
  micro::check(cudaMemcpy2D(rows.data(), row_bytes, first, cell.heads() * row_bytes, row_bytes, cell.seqlen,
                            cudaMemcpyDeviceToHost),
               "copying a head");
  return rows;
}

// Some rows of the last head against attention in float64; a wrong tile or mask is off by far more than the tolerance.
template <class T>
void check_rows(const Cell& cell, const T* q, const T* k, const T* v, const T* out, const float* lse) {
  const int batch = cell.batch() - 1, head = cell.heads() - 1, d = cell.head_dim;
  const auto q_head = head_of(cell, q, batch, head), k_head = head_of(cell, k, batch, head);
  const auto v_head = head_of(cell, v, batch, head), out_head = head_of(cell, out, batch, head);
  std::vector<float> lse_head(cell.seqlen);
  micro::check(cudaMemcpy(lse_head.data(), lse + (int64_t{batch} * cell.heads() + head) * cell.seqlen,
                          cell.seqlen * sizeof(float), cudaMemcpyDeviceToHost),
               "copying lse");
  for (const int row : {0, 1, cell.seqlen / 3, cell.seqlen / 2, cell.seqlen - 1}) {
    const int keys = cell.causal ? row + 1 : cell.seqlen;
    std::vector<double> p(keys), expected(d);
    double sum = 0;
    for (int j = 0; j < keys; ++j) {
      double score = 0;
      for (int c = 0; c < d; ++c) score += double(float(q_head[size_t{1} * row * d + c])) * float(k_head[j * d + c]);
      p[j] = std::exp(score / std::sqrt(d));
      sum += p[j];
      for (int c = 0; c < d; ++c) expected[c] += p[j] * float(v_head[j * d + c]);
    }
    const std::string where = cell.name() + ", row " + std::to_string(row);
    micro::require(std::abs(lse_head[row] - std::log(sum)) < 1e-4, where + ", lse");
    for (int c = 0; c < d; ++c) {
      const double error = std::abs(float(out_head[size_t{1} * row * d + c]) - expected[c] / sum);
      micro::require(error < 0.01 + 0.01 * std::abs(expected[c] / sum), where + ", column " + std::to_string(c));
    }
  }
}

template <class T>
void check_no_nan(const Cell& cell, const DeviceArray<T>& out, const DeviceArray<float>& lse) {
  for (const T x : out.host()) micro::require(!std::isnan(float(x)), cell.name() + ", NaN in out");
  for (const float x : lse.host()) micro::require(std::isfinite(x), cell.name() + ", lse");
}

template <class T>
void measure_cell(micro::Session& session, const Cell& cell) {
  double microseconds = NAN, tflops = NAN, clock = NAN, percent = NAN;
  if (!session.dry_run) {
    const size_t count = size_t{16384} * 2048;
    DeviceArray<T> q(count), k(count), v(count), out(count);
    DeviceArray<float> lse(size_t{16384} * cell.heads());
    DeviceArray<int> tile_counter(1);
    tile_counter.zero();
    fill<<<1024, 256>>>(q.data, static_cast<uint32_t>(count), 0u);
    fill<<<1024, 256>>>(k.data, static_cast<uint32_t>(count), 1u);
    fill<<<1024, 256>>>(v.data, static_cast<uint32_t>(count), 2u);
    micro::check(cudaGetLastError(), "launching a kernel");

    const Strides strides{.batch = int64_t{cell.seqlen} * 2048, .seqlen = 2048, .heads = cell.head_dim};
    const ForwardParams params{.q = q.data,
                               .k = k.data,
                               .v = v.data,
                               .out = out.data,
                               .lse = lse.data,
                               .tile_counter = tile_counter.data,
                               .q_strides = strides,
                               .k_strides = strides,
                               .v_strides = strides,
                               .out_strides = strides,
                               .batch = cell.batch(),
                               .seqlen_q = cell.seqlen,
                               .seqlen_k = cell.seqlen,
                               .heads = cell.heads(),
                               .kv_heads = cell.heads(),
                               .head_dim = cell.head_dim,
                               .dtype = cell.dtype,
                               .softmax_scale = 1.f / std::sqrt(float(cell.head_dim)),
                               .causal = cell.causal};

    DeviceArray<Stamp> before(kStamps), after(kStamps);
    before.zero();
    after.zero();
    micro::Timer timer;
    std::vector<double> times, clocks;
    flash_attn_ext::launch_forward(params, nullptr);
    constexpr double kRoundSeconds = 7e-3;
    const int calls = static_cast<int>(kRoundSeconds * 600e12 / cell.flops()) + 1;
    for (double measured = 0; measured < session.seconds;) {
      micro::hold();
      stamp<<<session.multiprocessors, 1>>>(before.data);
      const double seconds = timer.seconds([&] {
        for (int i = 0; i < calls; ++i) flash_attn_ext::launch_forward(params, nullptr);
      });
      stamp<<<session.multiprocessors, 1>>>(after.data);
      micro::check(cudaGetLastError(), "launching a kernel");
      std::vector<Stamp> intervals;
      const auto starts = before.host(), ends = after.host();
      for (int i = 0; i < kStamps; ++i) {  // of the multiprocessors that both launches met
        if (starts[i].nanoseconds == 0 || ends[i].nanoseconds == 0) continue;
        intervals.push_back({ends[i].cycles - starts[i].cycles, ends[i].nanoseconds - starts[i].nanoseconds});
      }
      clocks.push_back(micro::clock_of(intervals));
      times.push_back(seconds / calls);
      measured += seconds;
    }
    const double seconds = micro::median(times);
    clock = micro::median(clocks);
    microseconds = 1e6 * seconds;
    tflops = cell.flops() / seconds / 1e12;
    percent = 100 * tflops * 1e12 / (micro::kTensorFlops * clock * session.multiprocessors);

    out.poison();
    lse.poison();
    flash_attn_ext::launch_forward(params, nullptr);
    check_no_nan(cell, out, lse);
    check_rows<T>(cell, q.data, k.data, v.data, out.data, lse.data);
  }
  session.add({double(cell.head_dim), cell.causal ? "causal" : "full", double(cell.seqlen), double(cell.batch()),
               double(cell.heads()), micro::type_name<T>(), microseconds, tflops, clock / 1e9, percent});
}

void measure(micro::Session& session) {
  std::vector<Cell> cells;
  for (const std::string& text : session.cells) cells.push_back(parse(text));
  if (cells.empty()) {
    for (const auto& row : flash_attn_ext::kLimits) {
      if (!row.forward.built() || 2048 % row.head_dim != 0) continue;
      for (const bool causal : {false, true}) {
        for (const int seqlen : {2048, 16384}) {
          cells.push_back({.head_dim = row.head_dim, .seqlen = seqlen, .causal = causal});
        }
      }
    }
  }
  for (const Cell& cell : cells) {
    if (cell.dtype == DType::kFloat16) {
      measure_cell<__half>(session, cell);
    } else {
      measure_cell<__nv_bfloat16>(session, cell);
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  const micro::Description description{
      .name = "forward",
      .text =
          "The forward kernel, called from C++: 16384 tokens and hidden size 2048 (the FlashAttention papers' grid),\n"
          "with the share of the tensor cores' limit at the clock that ran. A causal mask halves the operations\n"
          "that are counted.",
      .seconds = 0.2,
      .cells = "[HEAD_DIM,SEQLEN[,full|causal][,bf16|fp16] ...]",
      .columns = {{"head_dim", "head dim", 0},
                  {"mask", "mask"},
                  {"seqlen", "length", 0},
                  {"batch", "batch", 0},
                  {"heads", "heads", 0},
                  {"dtype", "dtype"},
                  {"microseconds", "us", 1},
                  {"tflops", "TFLOP/s", 0},
                  {"clock_ghz", "GHz", 3},
                  {"percent", "% of limit", 1}}};
  return micro::run(description, argc, argv, measure);
}
