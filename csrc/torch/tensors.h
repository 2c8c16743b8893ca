// Torch's tensors as the kernels have them: problems, strides, copies of what a tensor map cannot address, results.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/cuda/EmptyTensor.h>
#include <ATen/ops/empty_like.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGraphsC10Utils.h>
#include <c10/cuda/CUDAStream.h>

#include <map>
#include <mutex>
#include <utility>

#include "../launch.h"
#include "operators.h"

namespace flash_attn_ext {

// A tensor of a call is (batch, seqlen, heads, head_dim), or of packed sequences (total, heads, head_dim): the last
// three dimensions are counted from behind.

// (batch, heads, seqlen), packed (heads, total).
inline c10::SmallVector<int64_t, 3> lse_size(const at::Tensor& q) {
  if (q.dim() == 3) return {q.size(1), q.size(0)};
  return {q.size(0), q.size(2), q.size(1)};
}

inline Problem problem_of(const at::Tensor& q, const at::Tensor& k, const CallOptions& options) {
  // Python may let a call pass that is not plainly fine, but not a type that would be read as another.
  TORCH_CHECK(q.scalar_type() == at::kHalf || q.scalar_type() == at::kBFloat16, "the kernels take 16-bit types");
  const auto lengths = [](const OptionalTensor& t) { return t ? t->const_data_ptr<int>() : nullptr; };
  return {
      .batch = options.cu_seqlens_q ? options.cu_seqlens_q->size(0) - 1 : q.size(0),
      .seqlen_q = q.size(-3),
      .seqlen_k = k.size(-3),
      .heads = q.size(-2),
      .kv_heads = k.size(-2),
      .head_dim = q.size(-1),
      .dtype = q.scalar_type() == at::kHalf ? DType::kFloat16 : DType::kBFloat16,
      .options = options.numbers,
      .lengths = {.cu_seqlens_q = lengths(options.cu_seqlens_q),
                  .cu_seqlens_k = lengths(options.cu_seqlens_k),
                  .seqused_q = lengths(options.seqused_q),
                  .seqused_k = lengths(options.seqused_k)},
  };
}

inline bool is_aligned(const at::Tensor& t) { return reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0; }

// Whether tensor maps can address the tensor where it lies: 16-byte aligned, and so is every stride that is used.
inline bool is_addressable(const at::Tensor& t) {
  if (t.stride(-1) != 1 || !is_aligned(t)) return false;
  for (int i = 0; i < t.dim() - 1; ++i) {
    if (t.size(i) > 1 && (t.stride(i) <= 0 || t.stride(i) * t.element_size() % 16 != 0)) return false;
  }
  return true;
}

inline Strides strides_of(const at::Tensor& t) {
  // The stride of a dimension of size 1 may be anything and is never used; a tensor map needs a valid one all the same.
  const auto stride = [&](int i) { return t.size(i) > 1 ? t.stride(i) : t.size(-1); };
  return {.batch = t.dim() == 4 ? stride(0) : t.size(-1), .row = stride(-3), .head = stride(-2)};
}

// Whether so many sequences of a batch follow each other like rows, as they must where only a part of each is used.
inline bool batches_follow(const at::Tensor& t) {
  return t.dim() == 3 || t.size(0) <= 1 || t.size(1) <= 1 || t.stride(0) == t.size(1) * t.stride(1);
}

// A tensor that a pass takes: where it lies, or copied where tensor maps cannot address that.
class Input {
 public:
  explicit Input(const at::Tensor& t, bool part_is_used = false)
      : tensor_(is_addressable(t) && (!part_is_used || batches_follow(t)) ? t : t.clone(at::MemoryFormat::Contiguous)) {
  }

  operator Tensor() const&& = delete;  // its memory would be gone before the launch
  operator Tensor() const& { return {const_cast<void*>(tensor_.const_data_ptr()), strides_of(tensor_)}; }

 private:
  at::Tensor tensor_;
};

inline at::Tensor contiguous_and_aligned(const at::Tensor& t) {
  return t.is_contiguous() && is_aligned(t) ? t : t.clone(at::MemoryFormat::Contiguous);
}

// Memory as it comes: a kernel writes all of it. at::empty would fill it under torch.use_deterministic_algorithms(True)
// (torch.utils.deterministic.fill_uninitialized_memory), results and workspace alike; at::detail's functions below it
// do not.

inline at::Tensor allocate_like(const at::Tensor& t) {
  // The usual case without the dispatcher, which costs as much as the allocation itself.
  return t.is_non_overlapping_and_dense()
             ? at::Tensor(at::detail::empty_strided_cuda(t.sizes(), t.strides(), t.options()))
             : at::empty_like(t);
}

inline at::Tensor allocate(at::IntArrayRef size, const at::Tensor& like, at::ScalarType type) {
  return at::detail::empty_cuda(size, like.options().dtype(type));
}

// Of as many dimensions.
inline at::Tensor allocate_empty(const at::Tensor& like) {
  return allocate(c10::SmallVector<int64_t, 4>(like.dim(), 0), like, like.scalar_type());
}

// A result, and the memory that a kernel writes for it: its own, or a stand-in where tensor maps cannot address that.
// Without elements, and so with null for its memory, if it is not needed.
struct Result {
  at::Tensor tensor, written;

  explicit Result(const at::Tensor& like, bool is_needed = true, bool part_is_used = false)
      : tensor(is_needed ? allocate_like(like) : allocate_empty(like)),
        written(is_addressable(tensor) && (!part_is_used || batches_follow(tensor))
                    ? tensor
                    : at::empty_like(tensor, tensor.options(), at::MemoryFormat::Contiguous)) {}

  operator Tensor() const&& = delete;
  operator Tensor() const& { return {written.mutable_data_ptr(), strides_of(written)}; }

  // The result, for after the launch: a stand-in is copied to it.
  at::Tensor finish() const { return written.is_same(tensor) ? tensor : tensor.copy_(written); }
};

// The forward kernel's item counters: those of claims are 0 before a launch and again after it. A launch claims nothing
// until the one before it in the stream has ended, so each stream has its own, which nothing has to zero between
// launches. A captured launch may be replayed on any stream, beside anything: it gets counters of its own, which the
// graph zeroes. So does a launch on a further stream when there are many already: a program that keeps making streams
// must not fill the memory with them.
inline at::Tensor item_counters(c10::cuda::CUDAStream stream, const at::Tensor& like) {
  const auto new_counters = [&] { return allocate({kItemCounters}, like, at::kInt).zero_(); };
  if (c10::cuda::currentStreamCaptureStatusMayInitCtx() != c10::cuda::CaptureStatus::None) return new_counters();
  unsigned long long id;  // not the handle, which may come back after the stream is gone
  C10_CUDA_CHECK(cudaStreamGetId(stream.stream(), &id));
  using Key = std::pair<c10::DeviceIndex, unsigned long long>;
  static std::mutex mutex;
  static auto& of_stream = *new std::map<Key, at::Tensor>;  // never freed: the driver may go first
  constexpr std::size_t kMostStreams = 1024;
  const std::lock_guard lock(mutex);
  const Key key{stream.device_index(), id};
  if (of_stream.size() >= kMostStreams && !of_stream.contains(key)) return new_counters();
  at::Tensor& counters = of_stream[key];
  if (!counters.defined()) counters = new_counters();
  return counters;
}

}  // namespace flash_attn_ext
