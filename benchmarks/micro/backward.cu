// The backward's kernels called through launch_backward, without torch: cells of the FlashAttention papers' grid.
#include "attention.cuh"

namespace {

using micro::Cell;
using micro::DeviceArray;
using micro::LastHead;

// The last head in float64: what the gradients are made of, for one query and one key.
template <class T>
struct Head {
  Cell cell;
  LastHead<T> q, k, v, out, dout;
  std::vector<float> lse;

  bool visible(int query, int key) const { return !cell.causal || key <= query; }

  double dot(const LastHead<T>& a, int a_row, const LastHead<T>& b, int b_row) const {
    double sum = 0;
    for (int c = 0; c < cell.head_dim; ++c) sum += double(a(a_row, c)) * b(b_row, c);
    return sum;
  }
  double p(int query, int key) const { return std::exp(dot(q, query, k, key) * cell.softmax_scale() - lse[query]); }
  double ds(int query, int key, double p) const {
    return p * (dot(dout, query, v, key) - dot(dout, query, out, query)) * cell.softmax_scale();
  }
};

// Some rows of each gradient, by the formulas of FlashAttention-2 (section 2.2 and algorithm 2).
template <class T>
void check_rows(const Head<T>& head, const LastHead<T>& dq, const LastHead<T>& dk, const LastHead<T>& dv) {
  const Cell& cell = head.cell;
  for (const int row : micro::rows_to_check(cell)) {
    std::vector<double> dq_row(cell.head_dim), dk_row(cell.head_dim), dv_row(cell.head_dim);
    for (int other = 0; other < cell.seqlen; ++other) {
      if (head.visible(row, other)) {
        const double ds = head.ds(row, other, head.p(row, other));
        for (int c = 0; c < cell.head_dim; ++c) dq_row[c] += ds * head.k(other, c);
      }
      if (head.visible(other, row)) {
        const double p = head.p(other, row), ds = head.ds(other, row, p);
        for (int c = 0; c < cell.head_dim; ++c) dk_row[c] += ds * head.q(other, c);
        for (int c = 0; c < cell.head_dim; ++c) dv_row[c] += p * head.dout(other, c);
      }
    }
    micro::require_row(dq, row, dq_row, cell.name() + ", dq");
    micro::require_row(dk, row, dk_row, cell.name() + ", dk");
    micro::require_row(dv, row, dv_row, cell.name() + ", dv");
  }
}

template <class T>
micro::Timing time_cell(const micro::Session& session, const Cell& cell, double flops) {
  const micro::Forward<T> forward(cell);
  forward();
  constexpr size_t kCount = micro::Forward<T>::kCount;
  DeviceArray<T> dout(kCount), dq(kCount), dk(kCount), dv(kCount);
  micro::fill_normal(dout, 3);

  flash_attn_ext::BackwardParams params{.problem = cell.problem(),
                                        .dout = cell.tensor(dout),
                                        .q = cell.tensor(forward.q),
                                        .k = cell.tensor(forward.k),
                                        .v = cell.tensor(forward.v),
                                        .out = cell.tensor(forward.out),
                                        .lse = forward.lse.data,
                                        .dq = cell.tensor(dq),
                                        .dk = cell.tensor(dk),
                                        .dv = cell.tensor(dv),
                                        .workspace = nullptr};
  DeviceArray<char> workspace(flash_attn_ext::backward_workspace_bytes(params));
  params.workspace = workspace.data;
  const auto call = [&] { flash_attn_ext::launch_backward(params, nullptr); };
  const micro::Timing timing = micro::time_calls(session, flops, call);

  for (const auto* gradient : {&dq, &dk, &dv}) gradient->poison();
  call();
  micro::require_finite(dq, cell.name() + ", dq");
  micro::require_finite(dk, cell.name() + ", dk");
  micro::require_finite(dv, cell.name() + ", dv");
  const Head<T> head{cell,
                     {cell, forward.q},
                     {cell, forward.k},
                     {cell, forward.v},
                     {cell, forward.out},
                     {cell, dout},
                     micro::last_lse(cell, forward.lse)};
  check_rows<T>(head, {cell, dq}, {cell, dk}, {cell, dv});
  return timing;
}

void measure(micro::Session& session) {
  micro::measure_cells(
      session, [](const auto& row) { return row.backward.built(); }, 5,
      [](auto type, const auto&... arguments) { return time_cell<decltype(type)>(arguments...); });
}

}  // namespace

int main(int argc, char** argv) {
  const micro::Description description{
      .name = "backward",
      .text =
          "The backward's three kernels, called from C++: 16384 tokens and hidden size 2048 (the FlashAttention\n"
          "papers' grid), with the share of the tensor cores' limit at the clock that ran. A causal mask halves the\n"
          "operations that are counted: five products, 2.5 times the forward's.",
      .seconds = 0.2,
      .cells = micro::kCellArguments,
      .columns = micro::columns()};
  return micro::run(description, argc, argv, measure);
}
