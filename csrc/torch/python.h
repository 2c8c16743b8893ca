// A call that is not plainly fine is left to Python: these functions call what flash_attn_ext/interface.py has
// registered, which raises what is wrong, in its words, or returns, and then the call goes on.
#pragma once

#include <ATen/core/Tensor.h>

#include "operators.h"

namespace flash_attn_ext::python {

void check(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v, const CallOptions::Types& options);

void check_backward(const at::Tensor& dout, const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                    const at::Tensor& out, const at::Tensor& lse, const CallOptions::Types& options,
                    const OptionalTensor& dlse);

// Of a call with an input that has a tangent, or that requires a gradient that cannot be computed.
void check_derivatives(const at::Tensor& q, const at::Tensor& k, const at::Tensor& v,
                       const CallOptions::Types& options);

}  // namespace flash_attn_ext::python
