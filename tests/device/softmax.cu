// The online softmax in both its forms, the softcap and both masks on fragments, block by block, against a softmax in
// double on the CPU.
#include <cmath>
#include <iterator>
#include <string>

#include "../../csrc/tile/fragment.cuh"
#include "../../csrc/tile/mask.cuh"
#include "../../csrc/tile/softmax.cuh"
#include "device.cuh"

using namespace flash_attn_ext;
using test::DeviceArray;

constexpr int kRows = 64, kBlock = 32, kBlocks = 4, kKeys = kBlock * kBlocks;
constexpr float kScale = 0.3f, kLog2e = 1.4426950408889634f;

// O = softmax(scale * scores) 1, which is the sum of the probabilities: 1 where a row sees something and there is no
// sink. Also the lse. Row r sees the keys first_key[r] <= j < end_key[r]. With kKeepsOffset blocks behind the first one
// that all rows of a warp see as a whole are computed at the offset as it is, and `lost` says of which rows that fails.
template <bool kKeepsOffset>
__global__ void online_softmax(const float* scores, const int* first_key, const int* end_key, float sink, float* out,
                               float* lse_out, int* lost) {
  const int row = own_row(), column = own_column();
  OnlineSoftmax softmax(kScale * kLog2e);
  float o[2] = {0.f, 0.f};
  bool keeps_offset = false, is_lost[2] = {false, false};
  for (int block = 0; block < kBlocks; ++block) {
    float s[kBlock / 2], rescale[2];
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) {
      s[i] = scores[(row + 8 * fragment_row(i)) * kKeys + block * kBlock + column + fragment_column(i)];
    }
    const int first[2] = {first_key[row] - block * kBlock, first_key[row + 8] - block * kBlock};
    const int end[2] = {end_key[row] - block * kBlock, end_key[row + 8] - block * kBlock};
    const bool sees_all = first[0] <= 0 && first[1] <= 0 && end[0] >= kBlock && end[1] >= kBlock;
    bool rescales = false;
    if (kKeepsOffset && block > 0 && __all_sync(~0u, sees_all)) {
      if (!keeps_offset) softmax.keep_offset({true, true});
      keeps_offset = true;
      rescales = __any_sync(~0u, softmax.update_at_offset(s));
      if (rescales) softmax.raise_offset(s, rescale);
      for (int r = 0; r < 2; ++r) is_lost[r] = softmax.is_lost(r);
    } else {
      mask_before(s, first);
      mask_from(s, end);
      rescales = softmax.update(s, rescale);
    }
    if (rescales) {
      for (int r = 0; r < 2; ++r) o[r] *= rescale[r];
    }
#pragma unroll
    for (int i = 0; i < kBlock / 2; ++i) o[fragment_row(i)] += s[i];
  }
  float row_scale[2], lse[2];
  softmax.finish({sink * kLog2e, sink * kLog2e}, row_scale, lse);
  for (int r = 0; r < 2; ++r) {
    o[r] += __shfl_xor_sync(~0u, o[r], 1);
    o[r] += __shfl_xor_sync(~0u, o[r], 2);
    if (is_lost[r]) lost[row + 8 * r] = 1;
    if (column == 0) {
      out[row + 8 * r] = o[r] * row_scale[r];
      lse_out[row + 8 * r] = lse[r];
    }
  }
}

// Of each row whether it was lost: what it has then is not looked at.
template <bool kKeepsOffset>
static std::vector<int> check_softmax(const std::vector<float>& scores, const std::vector<int>& first,
                                      const std::vector<int>& end, float sink) {
  DeviceArray<float> scores_device(scores), out_device(kRows), lse_device(kRows);
  DeviceArray<int> first_device(first), end_device(end), lost_device(std::vector<int>(kRows, 0));
  online_softmax<kKeepsOffset><<<1, 128>>>(scores_device.data, first_device.data, end_device.data, sink,
                                           out_device.data, lse_device.data, lost_device.data);
  const std::vector<float> out = out_device.host(), lse = lse_device.host();
  const std::vector<int> lost = lost_device.host();

  for (int row = 0; row < kRows; ++row) {
    if (lost[row]) continue;
    double maximum = sink, sum = 0;
    bool poisoned = false;
    for (int key = first[row]; key < end[row]; ++key) {
      const float score = scores[row * kKeys + key];
      poisoned |= std::isnan(score) || score == INFINITY;
      maximum = std::fmax(maximum, kScale * score);
    }
    for (int key = first[row]; key < end[row]; ++key) sum += std::exp(kScale * scores[row * kKeys + key] - maximum);
    const std::string name = std::string(kKeepsOffset ? "offset that stays, " : "") + "sink " + std::to_string(sink) +
                             ", row " + std::to_string(row);
    if (poisoned) {
      test::check(std::isnan(out[row]) && !std::isfinite(lse[row]), name + " saw NaN or +inf");
    } else if (maximum == -INFINITY) {
      test::check(out[row] == 0.f && lse[row] == -INFINITY, name + " saw nothing");
    } else {
      const double all = sum + std::exp(sink - maximum), expected = sum / all, expected_lse = maximum + std::log(all);
      test::check(std::fabs(out[row] - expected) < 1e-5,
                  name + ": probabilities add up to " + std::to_string(out[row]));
      test::check(std::fabs(lse[row] - expected_lse) < 1e-5 + 1e-6 * std::fabs(expected_lse), name + ": lse");
      test::check(first[row] < end[row] || out[row] == 0.f, name + " saw the sink alone");
    }
  }
  return lost;
}

static void check_sink(const std::vector<float>& scores, const std::vector<int>& first, const std::vector<int>& end,
                       float sink) {
  check_softmax<false>(scores, first, end, sink);
  check_softmax<true>(scores, first, end, sink);
}

// One row of each warp, of which all others are small, and whether it must be lost.
static void check_offset_that_stays() {
  struct Warp {
    const char* name;
    float (*score)(int block, int key);  // of a key of the block, in nats
    bool lost;
  };
  const Warp warps[] = {
      {"small", [](int, int) { return 0.f; }, false},
      {"falling", [](int block, int) { return -500.f * block; }, false},
      {"growing by 20", [](int block, int) { return 20.f * block; }, false},
      {"growing by 60", [](int block, int) { return 60.f * block; }, false},
      {"growing by 100", [](int block, int) { return 100.f * block; }, true},
      {"one key of 60", [](int block, int key) { return block == 2 && key == 9 ? 60.f : 0.f; }, false},
      {"one key of 1000", [](int block, int key) { return block == 2 && key == 9 ? 1000.f : 0.f; }, true},
      {"nothing finite in the first two blocks", [](int block, int) { return block < 2 ? -INFINITY : 0.f; }, true},
      {"nothing finite", [](int, int) { return -INFINITY; }, true},
      {"NaN", [](int block, int key) { return block == 2 && key == 9 ? NAN : 0.f; }, true},
      {"NaN from the first block on", [](int, int) { return NAN; }, false},
      {"+inf", [](int block, int key) { return block == 1 && key == 9 ? INFINITY : 0.f; }, true},
  };
  static_assert(std::size(warps) % 4 == 0, "four warps a launch");
  std::mt19937 generator(2);
  std::normal_distribution<float> normal(0.f, 1.f);
  const std::vector<int> first(kRows, 0), end(kRows, kKeys);
  for (int at = 0; at < static_cast<int>(std::size(warps)); at += 4) {
    for (int own = 0; own < 16; ++own) {  // each row of a fragment in turn
      std::vector<float> scores(kRows * kKeys);
      for (int row = 0; row < kRows; ++row) {
        for (int key = 0; key < kKeys; ++key) {
          const float level = row % 16 == own ? warps[at + row / 16].score(key / kBlock, key % kBlock) : 0.f;
          scores[row * kKeys + key] = (level + normal(generator)) / kScale;
        }
      }
      const std::vector<int> lost = check_softmax<true>(scores, first, end, -INFINITY);
      for (int row = 0; row < kRows; ++row) {
        const Warp& warp = warps[at + row / 16];
        const bool expected = row % 16 == own && warp.lost;
        test::check(lost[row] == expected,
                    std::string(warp.name) + (expected ? " was not" : " was") + " lost in row " + std::to_string(row));
      }
    }
  }
}

// Any sequence of growths and falls, of each row its own, and both forms of the softmax agree with the exact one.
static void check_any_sequence() {
  constexpr float kSteps[] = {0.f, 0.f, 3.f, 11.f, 20.f, 60.f, 82.f, 90.f, 300.f, -10.f, -200.f};
  std::mt19937 generator(3);
  std::normal_distribution<float> normal(0.f, 2.f);
  const std::vector<int> first(kRows, 0), end(kRows, kKeys);
  for (int draw = 0; draw < 50; ++draw) {
    std::vector<float> scores(kRows * kKeys);
    const int growing_rows = draw % 2 == 0 ? 4 : 1;  // one row in as many
    for (int row = 0; row < kRows; ++row) {
      float level = 0.f;
      for (int key = 0; key < kKeys; ++key) {
        if (key % kBlock == 0 && row % growing_rows == 0) level += kSteps[generator() % std::size(kSteps)];
        scores[row * kKeys + key] = (level + normal(generator)) / kScale;
      }
    }
    for (float sink : {-INFINITY, 5.f}) check_sink(scores, first, end, sink);
    // The last block masked, as at the edge of a window.
    check_sink(scores, first, std::vector<int>(kRows, kKeys - 1), -INFINITY);
  }
}

// Sums that are large, and then rescaled in a masked block: nothing of them may be lost unnoticed.
static void check_large_sums() {
  const std::vector<int> first(kRows, 0), end(kRows, kKeys - 1);
  for (float before : {4.f, 40.f, 75.f, 82.f, 85.f, 87.5f, 95.f}) {
    for (float after : {20.f, 85.f, 87.5f, 95.f, 200.f}) {
      std::vector<float> scores(kRows * kKeys);
      for (int row = 0; row < kRows; row += 5) {
        scores[row * kKeys + 2 * kBlock + row % kBlock] = before / kScale;
        scores[row * kKeys + 3 * kBlock + row % (kBlock - 1)] = after / kScale;
      }
      const std::vector<int> lost = check_softmax<true>(scores, first, end, -INFINITY);
      for (int row = 0; row < kRows; ++row) {
        test::check(lost[row] == (row % 5 == 0 && before > 84), "large sums: row " + std::to_string(row));
      }
    }
  }
}

// Scores from far below to far above the cap, infinite ones too.
__global__ void cap_scores(float* scores, float factor) {
  float s[2] = {scores[2 * threadIdx.x], scores[2 * threadIdx.x + 1]};
  cap(s, factor * 2 * kLog2e);
  scores[2 * threadIdx.x] = s[0];
  scores[2 * threadIdx.x + 1] = s[1];
}

static void check_cap() {
  constexpr int kScores = 2048;
  constexpr float kFactor = 0.02f;
  std::vector<float> scores{0.f, INFINITY, -INFINITY, NAN};
  for (int i = 0; scores.size() < kScores; ++i)
    scores.push_back((i % 2 == 0 ? 1.f : -1.f) * std::pow(1.02f, i / 2 - 500));
  DeviceArray<float> device(scores);
  cap_scores<<<1, kScores / 2>>>(device.data, kFactor);
  const std::vector<float> capped = device.host();
  for (int i = 0; i < kScores; ++i) {
    const double expected = std::tanh(double{scores[i]} * kFactor);
    test::check(std::isnan(scores[i]) ? std::isnan(capped[i]) : std::fabs(capped[i] - expected) < 5e-7,
                "cap of " + std::to_string(scores[i]) + ": " + std::to_string(capped[i]));
  }
}

int main() {
  test::require_hopper();
  std::mt19937 generator(1);
  std::normal_distribution<float> normal(0.f, 10.f);
  std::vector<float> scores(kRows * kKeys);
  std::vector<int> first(kRows), end(kRows);
  for (int row = 0; row < kRows; ++row) {
    end[row] = static_cast<int>(generator() % (kKeys + 1));
    first[row] = row % 2 == 0 ? 0 : static_cast<int>(generator() % (end[row] + 1));
    for (int key = 0; key < kKeys; ++key) {
      float& score = scores[row * kKeys + key];
      score = normal(generator);
      if (row == 2) score = -INFINITY;                         // sees keys, and only -inf
      if (row == 3) score = key < kBlock ? -INFINITY : score;  // its first block is -inf
      if (row == 4) score = 20.f * key;                        // grows along the walk
      if (row == 5) score = -20.f * key;                       // falls
      if (row == 6) score = 7.f;                               // all equal
      if (row == 7 && key == 40) score = NAN;
      if (row == 8 && key == 40) score = INFINITY;
    }
  }
  for (int row = 1; row < 9; ++row) {
    first[row] = 0;
    end[row] = kKeys;
  }
  end[0] = 0;  // sees nothing
  first[9] = end[9] = kKeys;
  first[10] = kKeys;  // and begins after its end
  // No sink, one that is little, about as much as the scores, and so much that the scores vanish beside it.
  for (float sink : {-INFINITY, -100.f, 5.f, 1000.f}) check_sink(scores, first, end, sink);
  check_offset_that_stays();
  check_any_sequence();
  check_large_sums();
  check_cap();
  return test::finish("softmax");
}
