// Torch's own attention operators, which scaled_dot_product_attention and varlen_attn call, with these kernels in front
// of torch's.
#pragma once

#include <memory>

namespace flash_attn_ext {

// From its construction to remove(), or its end, these kernels take the calls that they can, and torch's get the rest.
class SdpaOverride {
 public:
  SdpaOverride();
  void remove() { libraries_.reset(); }

 private:
  std::shared_ptr<void> libraries_;
};

}  // namespace flash_attn_ext
