// The forward kernel called through launch_forward, without torch: cells of the FlashAttention papers' grid.
#include "attention.cuh"

namespace {

using micro::Cell;

// Some rows of the last head against attention in float64.
template <class T>
void check_rows(const micro::Forward<T>& forward) {
  const Cell& cell = forward.cell;
  const micro::LastHead<T> q_head(cell, forward.q), k_head(cell, forward.k), v_head(cell, forward.v);
  const micro::LastHead<T> out_head(cell, forward.out);
  const auto lse_head = micro::last_lse(cell, forward.lse);
  for (const int row : micro::rows_to_check(cell)) {
    std::vector<double> expected(cell.head_dim);
    double sum = 0;
    for (int key = 0; key < (cell.causal ? row + 1 : cell.seqlen); ++key) {
      double score = 0;
      for (int c = 0; c < cell.head_dim; ++c) score += double(q_head(row, c)) * k_head(key, c);
      const double p = std::exp(score * cell.softmax_scale());
      sum += p;
      for (int c = 0; c < cell.head_dim; ++c) expected[c] += p * v_head(key, c);
    }
    for (double& x : expected) x /= sum;
    micro::require_row(out_head, row, expected, cell.name() + ", out");
    micro::require(std::abs(lse_head[row] - std::log(sum)) < 1e-4, cell.name() + ", lse, row " + std::to_string(row));
  }
}

template <class T>
micro::Timing time_cell(const micro::Session& session, const Cell& cell, double flops) {
  const micro::Forward<T> forward(cell);
  const micro::Timing timing = micro::time_calls(session, flops, forward);

  forward.out.poison();
  forward.lse.poison();
  forward();
  micro::require_finite(forward.out, cell.name() + ", out");
  micro::require_finite(forward.lse, cell.name() + ", lse");
  check_rows(forward);
  return timing;
}

void measure(micro::Session& session) {
  micro::measure_cells(
      session, [](const auto& row) { return row.forward.built(); }, 2,
      [](auto type, const auto&... arguments) { return time_cell<decltype(type)>(arguments...); });
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
      .cells = micro::kCellArguments,
      .columns = micro::columns()};
  return micro::run(description, argc, argv, measure);
}
